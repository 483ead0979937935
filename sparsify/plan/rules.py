"""Plans: which method goes where. Frozen, validated at construction, readable and writable as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from sparsify.console import printable
from sparsify.errors import PlanError
from sparsify.files import strict_json
from sparsify.files.strict_json import short
from sparsify.formats.registry import packing_format
from sparsify.plan.habits import FROM_PEFT, from_habit, hint_for, is_peft_config, without_neutral
from sparsify.plan.installed import find
from sparsify.plan.name_patterns import PatternError, check_pattern, matches

SelectionMethod = Literal["random", "weight", "activation", "product", "gradient"]
DATA_DRIVEN: frozenset[str] = frozenset({"activation", "product", "gradient"})

#: Bounds on numbers, checked when a plan is made: beyond them something else was meant (or an attack).
MAX_RANK = 1 << 20
MAX_TOKENS = 1 << 18
MAX_INTEGER = 1 << 127
MAX_ENTRIES = 10_000
MAX_CHARACTERS, MAX_DEPTH = 16 << 20, 32  # of a plan's JSON


class ArgumentError(PlanError, TypeError):
    """A rule or a plan was called with arguments that it does not have."""


def check_types(rule: Any) -> None:
    """Refuse a wrong type or a word that a `Literal` field does not list, naming field and rule."""
    hints = hints_of(type(rule))
    for spec in dataclasses.fields(rule):
        value, hint = getattr(rule, spec.name), hints[spec.name]
        if not fits(value, hint):
            raise PlanError(f"{type(rule).__name__}({spec.name}={short(value)}): expected {describe(hint)}")


@functools.cache
def hints_of(rule: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(rule)


def fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args, strict=True))
    if origin is not None and isinstance(origin, type):
        if not isinstance(value, origin):
            return False
        if issubclass(origin, Mapping) and args:
            return all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        if isinstance(value, int):  # beyond a float, `math.isfinite` would raise
            return not isinstance(value, bool) and abs(value) < MAX_INTEGER
        return isinstance(value, float) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_INTEGER
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def as_tuple(value: Any) -> Any:
    """Lists become tuples (a plan is frozen and hashable); JSON has no tuples."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, list | tuple) else value


class Table(dict[str, Any]):
    """A mapping from glob to number inside a frozen rule: hashable, in its own order, not to be changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def frozen(self, *_arguments: Any, **_fields: Any) -> Any:
        raise PlanError("a plan is frozen: make a new rule instead of changing its table")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = frozen  # type: ignore[assignment]

    def __reduce__(self) -> Any:  # copies and pickles are made whole, not entry by entry
        return Table, (dict(self),)


def check_fraction(rule: Any, name: str, *, zero: bool = False) -> None:
    value = getattr(rule, name)
    if value is None:
        return
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        low = "0 ≤" if zero else "0 <"
        raise PlanError(f"{type(rule).__name__}({name}={value!r}): a fraction {low} {name} ≤ 1 is needed")


Dataclass = TypeVar("Dataclass")


def takes_habits(rule: type[Dataclass]) -> type[Dataclass]:
    """Let a rule be called with PEFT's words (`LoRA(r=8, target_modules=["q_proj"])`), and answer for words that it does not have."""
    made: Callable[..., None] = rule.__init__

    @functools.wraps(made)
    def init(self: Any, *values: Any, **fields: Any) -> None:
        made(self, **arguments(rule, values, fields, rule.__name__))

    rule.__init__ = init  # type: ignore[method-assign]
    return rule


def arguments(rule: Any, values: tuple[Any, ...], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a call: positions named, PEFT's words translated. Raises ArgumentError naming the nearest field."""
    specs = dataclasses.fields(rule)
    positional = [spec.name for spec in specs if not spec.kw_only]
    if len(values) > len(positional):
        rest = f"takes {len(positional)} value by position ({', '.join(positional)})" if positional else "takes none"
        raise ArgumentError(f"{where}: {len(values)} values are given by position, it {rest}; name the others")
    found = dict(zip(positional, values, strict=False))
    names = [spec.name for spec in specs]
    for word, value in without_neutral(fields, names).items():
        name, value = (word, value) if word in names else from_habit(word, value, names)
        if name is None:
            hint = hint_for(rule.__name__, word)
            answer = f"; {hint}" if hint else nearest(word, names) if word else ""
            raise ArgumentError(f"{where}: unknown field {short(word)}{answer} (its fields are {', '.join(names)})")
        if name in found:
            also = f"as {word}" if word != name else "by position"
            raise ArgumentError(f"{where}: {name} is given twice (once {also})")
        found[name] = value
    for spec in specs:
        if (
            spec.name not in found
            and spec.default is dataclasses.MISSING
            and spec.default_factory is dataclasses.MISSING
        ):
            raise ArgumentError(f"{where}: {spec.name} is missing (its fields are {', '.join(names)})")
    return found


@printable
@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules.

    match: which modules: a glob over qualified names (`*.o_proj`, `model.layers.[0-3].mlp`), a name without wildcards (the module
        itself, or every module whose name ends in it after a dot: `q_proj`), numbers in braces for layers
        (`model.layers.{0-15,31}.*`), `re:` and a regular expression that matches the whole
        name (without look-behind and back-references), or a list of these; for S2FT structure names are matched too.
        The first rule that matches a module wins; a rule that matches nothing is an error.
    """

    match: str | tuple[str, ...] | list[str] = "*"

    #: "adapt" rules train something, "weight" rules change the base; a module takes one of each at most.
    phase: ClassVar[Literal["adapt", "weight"]] = "adapt"

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, list):
                object.__setattr__(self, spec.name, as_tuple(value))
            elif isinstance(value, Mapping):
                object.__setattr__(self, spec.name, Table(value))
        if not isinstance(self.match, str | tuple):
            raise PlanError(f"{type(self).__name__}(match={short(self.match)}): expected str")
        check_types(self)
        if not self.match:
            raise PlanError(
                f"{type(self).__name__}(match={self.match!r}): an empty pattern matches nothing; use '*' for everything"
            )
        check_patterns(type(self).__name__, "match", self.patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """`match` as a tuple."""
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    def matches(self, *names: str) -> bool:
        """Whether the rule is for a module that has one of these names."""
        return any(matches(pattern, name) for pattern in self.patterns for name in names)

    def is_named(self, *names: str) -> bool:
        """Whether one of the names stands in `match` as it is: what the user names so must be served, or the plan is refused."""
        return any(name in self.patterns for name in names)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns of a list that match none of the names."""
        names = list(names)
        return [p for p in self.patterns if not any(matches(p, name) for name in names)]

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON holds it: its name under "rule", and every field."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"rule": type(self).__name__, **{k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}}

    def __str__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default or f.name == "match"
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@takes_habits
@dataclass(frozen=True, kw_only=True)
class S2FT(Rule):
    """Structured sparse fine-tuning (arXiv 2412.06289): whole heads and whole FFN channels train, the rest is frozen.

    `S2FT(0.03)` is `S2FT(fraction=0.03)`.

    structure: which coupled structures: "ffn" (columns of Down), "attention" (columns of O), or "both".
    fraction: trained share *of the consumers' parameters* (O, Down), not of the whole model; uniform over layers. The report's line
        "budget" says the number that it is a share of, and "trainable" the share of the model. With "both", O and Down get equal
        *parameters* (`balance="parameters"`), or the same share of units ("units"), as nearly as whole units allow.
    budget: "total": what all structures of the rule train together is at most `fraction`, so that a head which costs more than its half
        gives way to channels, and a budget below one unit in each layer goes to fewer layers (one unit always trains). "structure": each
        structure rounds to the nearest by itself and trains one unit at least, which may be several times what was asked.
        The report says what was asked and what trains.
    units: instead of `fraction`, the number of units (heads, channels) in each structure; one with fewer is declined.
    producer_fraction: share of producer units (rows of V and Up) that also train, within a budget of its own by the same rules; 0, the
        paper's default, for none.
    select: how units are scored. "random" by the plan's seed; "weight" ‖W_unit‖₂ of the consumer's columns;
        "activation" root mean square over calibration tokens of ‖x_unit‖₂ at the consumer's input; "product" of the
        two; "gradient" root mean square over calibration batches of ‖dW_unit‖₂ of the consumer's columns.
    largest: take the units with the largest score instead of the smallest (the paper found smallest activation best).
    avoid: folders of saved adapters whose units are left alone, so that this adapter shares none with them and they can be fused (the
        paper fuses best without overlap); too few free units are an error. `h.overlap("a", "b")` says what two adapters share.
    permute: bring the chosen channels of a feed-forward structure together by co-permuting its weights, where the structure is
        proven (`sparsify.passes.prove_units`); elsewhere, for attention heads and with False, the same units train in place.
    """

    structure: Literal["ffn", "attention", "both"] = "both"
    fraction: float | None = field(default=None, kw_only=False)
    units: int | None = None
    producer_fraction: float = 0.0
    balance: Literal["parameters", "units"] = "parameters"
    budget: Literal["total", "structure"] = "total"
    select: SelectionMethod = "random"
    largest: bool = False
    avoid: tuple[str, ...] | list[str] = ()
    permute: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.avoid, str):
            object.__setattr__(self, "avoid", (self.avoid,))
        super().__post_init__()
        if (self.fraction is None) == (self.units is None):
            raise PlanError(
                "S2FT: give either fraction=… (share of parameters) or units=… (heads or channels), not both"
            )
        check_fraction(self, "fraction")
        check_fraction(self, "producer_fraction", zero=True)
        if self.units is not None and self.units < 1:
            raise PlanError(f"S2FT(units={self.units}): at least one unit must train")


HEADS = ("lm_head", "*.lm_head", "embed_out")


@dataclass(frozen=True, kw_only=True)
class LinearRule(Rule):
    """Base of the rules that go to single linears.

    exclude: patterns (as in `match`) of modules that are left alone although `match` names them; the output head by default.
        Whatever its name, the output projection of a Hugging Face model is left alone too, and by `Quantize` every head of a task
        model (what lies beside its base model: classifiers, CTC heads), with the reason in the report. `exclude=()` takes
        heads in, and a module whose exact name stands in `match` is taken in spite of the default.
    """

    exclude: tuple[str, ...] = HEADS

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))
        super().__post_init__()
        check_patterns(type(self).__name__, "exclude", self.exclude)

    def matches(self, *names: str) -> bool:
        """Whether the rule is for a module that has one of these names."""
        excluded = any(matches(pattern, n) for n in names for pattern in self.exclude)
        return super().matches(*names) and (not excluded or (self.exclude == HEADS and self.is_named(*names)))


def check_patterns(rule: str, name: str, patterns: Iterable[str]) -> None:
    """Refuse patterns that cannot be read, and more of them than anybody writes."""
    patterns = tuple(patterns)
    if len(patterns) > MAX_ENTRIES:
        raise PlanError(f"{rule}({name}=…): {len(patterns):,} patterns, at most {MAX_ENTRIES:,} are read")
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except PatternError as error:
            raise PlanError(f"{rule}({name}={short(pattern)}): {error}") from None


def check_alpha(rule: Any) -> None:
    if rule.alpha is not None and abs(rule.alpha) > 1e9:
        raise PlanError(
            f"{type(rule).__name__}(alpha={short(rule.alpha)}): at most 1e9 is read; twice the rank is usual"
        )


def check_pattern_table(rule: Any, name: str, check: Any) -> None:
    """A field that is a number, or a mapping from glob to number."""
    value = getattr(rule, name)
    if isinstance(value, Mapping):
        if not value:
            raise PlanError(f"{type(rule).__name__}({name}={{}}): an empty table names no module")
        check_patterns(type(rule).__name__, name, value)
    for pattern, number in value.items() if isinstance(value, Mapping) else (("*", value),):
        if not check(number):
            raise PlanError(
                f"{type(rule).__name__}({name}={short(value)}): {number!r} for {short(pattern)} is out of range"
            )


def pattern_value(value: Any, module: str) -> Any:
    """The entry of a pattern table for a module (first pattern that matches); None when none does."""
    if not isinstance(value, Mapping):
        return value
    return next((v for pattern, v in value.items() if matches(pattern, module)), None)


@takes_habits
@dataclass(frozen=True, kw_only=True)
class PaCA(LinearRule):
    """Partial connection adaptation (arXiv 2503.01905): `rank` input columns of every matched linear train.

    There is no alpha: the columns themselves train, and under Adam a factor would only scale the learning rate. A rate that the paper
    gives with its α/r multiplies by it: its 1e-4 with α/r = 4 is 4e-4 here.

    rank: columns per linear, or a mapping from glob to columns; the same parameter count as LoRA of rank r needs
        `rank · n` against `r · (n + m)`.
    select: "random" by the plan's seed, "weight" ‖W[:, c]‖₂, "activation" root mean square of x_c over calibration tokens,
        "product", or "gradient" root mean square over batches of ‖dW[:, c]‖₂. Linears that share an input share one index
        set, scored together, so that the saved activation is shared too.
    largest: take the columns with the largest score (the default, unlike S2FT) or the smallest.
    permute: where a coupled structure owns the input (Down), reorder it so that the columns are contiguous and no gather is
        needed; False always gathers.
    match: as everywhere; convolutions (`nn.Conv1d`, `nn.Conv2d` of one group), of which whole input channels train, where the last word
        of a pattern speaks of them (`*.projection`, `conv1`), and chosen by "random" or "weight" alone.
    """

    rank: int | Mapping[str, int] = field(default=16, kw_only=False)
    select: SelectionMethod = "random"
    largest: bool = True
    permute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern_table(self, "rank", lambda r: 1 <= r <= MAX_RANK)


@takes_habits
@dataclass(frozen=True, kw_only=True)
class RoSA(LinearRule):
    """Robust adaptation (arXiv 2401.04679): `W + S + s·BA`, a sparse and a low-rank part, in one operator.

    rank: of the low-rank part, or a mapping from glob to rank; 0 gives pure sparse adaptation.
    alpha: the low-rank part is scaled by `alpha / rank` (rsLoRA: `alpha / √rank`); None for `rank` (scale 1, or √rank), the paper's.
        `LoRA` has 2 by default, the habit of its field: to compare the two at one learning rate, give both the same `alpha`.
    density: trained share of the weight's entries, or a mapping from glob to share; 0 gives LoRA.
    mask: which entries, by what their gradient dW is on calibration data:
        "gradient" (default)  mean over *batches* of dW²: what the authors' code accumulates; a batch of one sample is the paper's formula
        "fisher"              mean over *samples* of each sample's own dW², whatever the batch size: the paper's formula, the diagonal
                              Fisher (`torch.func`; models that vmap cannot trace are refused)
        "gradient_abs"        |mean dW|: noise of single samples cancels
        "magnitude", "random" |W|; none of it
        Where the true change is known (sparse + rank 4 on one linear, `tests/numeric/test_robust_pca.py`) the absolute mean finds 93–100 %
        of the true entries, squares of batches of 16 74–90 %, of samples 19–30 %: prefer "gradient_abs" or large batches. The
        default stays what the paper's results were made with. The first three, without calibration batches, are left open: the
        low-rank part trains alone until `sparsify.train.rosa` collects them (the paper's schedule).
    dropout: on the input of the low-rank part only (the paper has 0.05); at 0, the default here and of `LoRA`, no mask is made or kept.
    rslora: scale by `alpha / √rank` instead of `alpha / rank`.
    """

    rank: int | Mapping[str, int] = field(default=16, kw_only=False)
    alpha: float | None = None
    density: float | Mapping[str, float] = 0.006
    mask: Literal["gradient", "fisher", "gradient_abs", "magnitude", "random"] = "gradient"
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern_table(self, "rank", lambda r: 0 <= r <= MAX_RANK)
        check_pattern_table(self, "density", lambda d: 0 <= d <= 1)
        check_alpha(self)
        if not 0 <= self.dropout < 1:
            raise PlanError(f"{type(self).__name__}(dropout={self.dropout}): 0 ≤ dropout < 1 is needed")
        if self.rank == 0 and self.density == 0:
            raise PlanError(f"{type(self).__name__}: rank 0 and density 0 leave nothing to train")

    def scale(self, rank: int) -> float:
        """What the product of the two factors is multiplied by."""
        if rank == 0:
            return 1.0
        alpha = rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@takes_habits
@dataclass(frozen=True, kw_only=True)
class LoRA(LinearRule):
    """Low-rank adaptation (arXiv 2106.09685): RoSA with density 0. `rslora` scales by `alpha / √rank` (arXiv 2312.03732).

    alpha: None for twice the rank, the habit of the field (scale 2, where `RoSA` has the paper's 1: give both the same `alpha` to compare
        them at one learning rate). Writes and reads PEFT's adapter directory.
    match: as everywhere; embeddings (`nn.Embedding` that is tied to nothing) and convolutions (`nn.Conv1d`, `nn.Conv2d` of one group)
        train where the last word of a pattern speaks of them (`*.embed_tokens`, `conv1`), as with PEFT, and by no `*` or regular
        expression. Ids have no dropout.
    """

    rank: int | Mapping[str, int] = field(default=8, kw_only=False)
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern_table(self, "rank", lambda r: 1 <= r <= MAX_RANK)
        check_alpha(self)
        if not 0 <= self.dropout < 1:
            raise PlanError(f"LoRA(dropout={self.dropout}): 0 ≤ dropout < 1 is needed")

    def scale(self, rank: int) -> float:
        """What the product of the two factors is multiplied by."""
        alpha = 2 * rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@takes_habits
@dataclass(frozen=True, kw_only=True)
class Tokens(Rule):
    """Single rows of token embeddings and output heads train; every other row stays what it is, and gets no gradient.

    For tokens that were added: `tokenizer.add_tokens(…)`, `model.resize_token_embeddings(len(tokenizer))`, then
    `Plan([…, Tokens(ids=range(old, len(tokenizer)))])`. PEFT's `trainable_token_indices`, which the export writes.

    match: "*" is the model's own input embedding and its output head (`get_input_embeddings`, `get_output_embeddings`), of a model that
        names neither every `nn.Embedding`; other patterns name embeddings and linear heads. A head that is tied to the embedding
        computes with the same rows, which train once; one that is not has rows of its own.
    ids: the tokens, by number: a list, a tuple, a set or a range.
    new: instead of `ids`, how many of the last rows.
    """

    ids: tuple[int, ...] = field(default=(), kw_only=False)
    new: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ids, list | set | frozenset | range):
            object.__setattr__(self, "ids", tuple(self.ids))
        super().__post_init__()
        if bool(self.ids) == (self.new is not None):
            raise PlanError(
                "Tokens: give either ids=[…] (tokens by number) or new=… (how many of the last rows), not both"
            )
        if self.new is not None and not 1 <= self.new <= MAX_TOKENS:
            raise PlanError(f"Tokens(new={self.new}): a number of rows from 1 to {MAX_TOKENS:,} is needed")
        wrong = next((i for i in self.ids if i < 0), None)
        if wrong is not None:
            raise PlanError(f"Tokens(ids=…): {wrong} is no token; new=… counts rows from the end")
        if len(set(self.ids)) < len(self.ids):
            raise PlanError("Tokens(ids=…): a token is named twice")
        if len(self.ids) > MAX_TOKENS:
            raise PlanError(
                f"Tokens(ids=…): {len(self.ids):,} tokens, at most {MAX_TOKENS:,} are read; Plan(train=…) trains all rows"
            )


@takes_habits
@dataclass(frozen=True, kw_only=True)
class Quantize(LinearRule):
    """Store frozen weights in few bits; what other rules train stays in 16 or 32 bits beside them.

    format: "nf4" (4-bit NormalFloat with double quantisation, QLoRA), "int8" (one scale per output row), "int4" (groups of 64), or a
        format that `sparsify.formats.register` or an entry point of an installed distribution made known.
    """

    format: str = field(default="nf4", kw_only=False)

    phase: ClassVar[Literal["adapt", "weight"]] = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            packing_format(self.format)
        except PlanError as error:
            raise PlanError(f"{type(self).__name__}(format={short(self.format)}): {error}") from None


RULES: dict[str, type[Rule]] = {rule.__name__: rule for rule in (S2FT, PaCA, RoSA, LoRA, Tokens, Quantize)}


def register_rule(rule: type[Rule]) -> type[Rule]:
    """Make a rule known to `Plan.from_json`."""
    RULES[rule.__name__] = rule
    return rule


@takes_habits
@printable
@dataclass(frozen=True)
class Plan:
    """What `sparsify.compile` should do.

    rules: in order; the first that matches a module wins.
    train: parameters or modules that train in full, by name (a new classification head, "*.bias", "*norm*"), beside the rules or
        alone; saved with adapters, and exported where PEFT loads them (`modules_to_save`, `bias`).
    seed: of every random choice; the same seed gives the same selection on every rank and machine.
    check: "numeric" runs the example after every pass and lowering, and both controls of every structure that is permuted, and names what
        drifted.
    target: "auto", "cpu" (generated sparse kernels), "cuda" (generated Triton kernels: packed linears for plans of Prune and
        Quantize rules; training plans use the training kernels). Plain PyTorch is no target of one plan but a setting of the
        process, SPARSIFY_KERNELS=off: operators are shared by all models.
    """

    rules: tuple[Rule, ...] | list[Rule]
    train: tuple[str, ...] | list[str] = field(default=(), kw_only=True)
    seed: int = field(default=0, kw_only=True)
    check: Literal["none", "numeric"] = field(default="none", kw_only=True)
    target: Literal["auto", "cpu", "cuda"] = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if self.target == "reference":
            raise PlanError(
                "Plan(target='reference') was never honoured and is no longer taken: leave target out, and set "
                "SPARSIFY_KERNELS=off in the environment to compute everything in plain PyTorch"
            )
        if isinstance(self.rules, Rule):
            raise PlanError(f"Plan takes a list of rules: Plan([{type(self.rules).__name__}(…)])")
        if isinstance(self.train, str):
            raise PlanError(f"Plan(train={self.train!r}): expected a list of patterns")
        rules = listed(self.rules)
        peft = next((rule for rule in rules or [self.rules] if is_peft_config(rule)), None)
        if peft is not None:
            raise PlanError(f"Plan: {type(peft).__name__} is PEFT's: {FROM_PEFT}")
        if rules is None:
            raise PlanError(f"Plan({short(self.rules)}): expected a list of rules")
        train = listed(self.train)
        if train is None:
            raise PlanError(f"Plan(train={short(self.train)}): expected a list of patterns")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise PlanError(f"Plan: {short(rule)} is not a rule; rules are {', '.join(RULES)}")
        for pattern in train:
            if not isinstance(pattern, str):
                raise PlanError(f"Plan(train=[{short(pattern)}]): expected patterns, which are strings")
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "train", train)
        check_patterns("Plan", "train", [pattern for pattern in train if pattern])
        if not self.rules and not self.train and self.target not in ("cpu", "cuda"):
            raise PlanError("Plan: no rules, so nothing would train; train=['*.bias'] trains parameters by name")
        if self.target == "cpu" and self.adapts:
            rule = next((type(r).__name__ for r in self.rules if r.phase == "adapt"), "train=…")
            raise PlanError(
                f"Plan(target='cpu') is for inference, but {rule} trains parts: train first, then compile the "
                "trained model with a plan of Prune and Quantize rules only"
            )
        check_types(self)

    @classmethod
    def empty(cls) -> Plan:
        """No rules: the plan of a host that only serves adapters (`sparsify.load`). Not to be compiled, so not to be written."""
        plan = cls([Rule()])
        object.__setattr__(plan, "rules", ())
        return plan

    @property
    def for_inference(self) -> bool:
        """Whether linears are lowered to kernels that only multiply: target "cpu", or "cuda" when no rule trains parts."""
        return self.target == "cpu" or (self.target == "cuda" and not self.adapts)

    @property
    def adapts(self) -> bool:
        """Whether something trains beside a frozen base: a rule's parts, or what `train` names where nothing is pruned. A plan that
        only prunes trains every survivor instead."""
        return any(rule.phase == "adapt" for rule in self.rules) or bool(self.train and not self.rules)

    def to_json(self, **options: Any) -> str:
        """JSON text that `from_json` reads back to an equal plan."""
        document = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rules"}
        return json.dumps({"rules": [rule.to_dict() for rule in self.rules], **document}, **options)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; unknown rules and fields are refused, naming the nearest known one."""
        if not isinstance(text, str):
            raise PlanError(f"the plan is not JSON: expected a string, got {type(text).__name__}")
        if len(text) > MAX_CHARACTERS:
            raise PlanError(f"the plan is not read: {len(text):,} characters, at most {MAX_CHARACTERS:,} are")
        document = strict_json.parse(text, "the plan", PlanError, depth=MAX_DEPTH)
        entries = document.pop("rules", None) if isinstance(document, dict) else None
        if not isinstance(document, dict) or not isinstance(entries, list):
            raise PlanError('the plan must be a JSON object with a list "rules"')
        rules = []
        if len(entries) > MAX_ENTRIES:
            raise PlanError(f"the plan has {len(entries):,} rules, at most {MAX_ENTRIES:,} are read")
        for number, entry in enumerate(entries):
            name = entry.get("rule") if isinstance(entry, dict) else None
            if not isinstance(entry, dict) or not isinstance(name, str):
                raise PlanError(f'rules[{number}]: expected an object with a "rule" name, got {short(entry)}')
            del entry["rule"]
            if name not in RULES:
                find(name)
            if name not in RULES:
                raise PlanError(f"rules[{number}]: unknown rule {short(name)}{nearest(name, RULES)}")
            values = {field: as_tuple(value) for field, value in entry.items()}
            rules.append(make_rule(RULES[name], values, f"rules[{number}] ({name})"))
        if document.get("target") == "reference":  # of earlier versions, which read it nowhere
            document["target"] = "auto"
        names = {f.name for f in dataclasses.fields(cls)} - {"rules"}
        for name in document:
            if name not in names:
                raise PlanError(f"plan: unknown field {short(name)}{nearest(name, names)}")
        return cls(rules, **{name: as_tuple(value) for name, value in document.items()})


def listed(value: Any) -> tuple[Any, ...] | None:
    """A list, tuple, set of patterns or iterator as a tuple, MAX_ENTRIES at most; None for what holds no sequence of things."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not hasattr(value, "__iter__"):
        return None
    found = tuple(itertools.islice(value, MAX_ENTRIES + 1))
    if len(found) > MAX_ENTRIES:
        raise PlanError(f"Plan: a list of more than {MAX_ENTRIES:,} entries")
    return found


def make_rule(rule: type[Rule], values: dict[str, Any], where: str) -> Rule:
    """A rule from a file: whatever goes wrong is a PlanError, also inside rules that others registered."""
    fields = arguments(rule, (), values, where)
    try:
        return rule(**fields)
    except PlanError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError, RecursionError) as error:
        raise PlanError(f"{where}: {short(str(error), 200)}") from error


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`; did you mean …` with the closest names, or the first few when nothing is close."""
    known = sorted(known) if isinstance(known, set) else list(known)
    if not known:
        return ""
    close = difflib.get_close_matches(name[:200], known, n=count, cutoff=0.4)
    if close:
        return "; did you mean " + ", ".join(repr(c) for c in close) + "?"
    return "; known are " + ", ".join(repr(c) for c in known[:count]) + (", …" if len(known) > count else "")
