"""The driver: prunes a model layer by layer, every layer with inputs from the already pruned part.

    trace one batch ─▶ units and groups ─▶ all batches in lockstep ─▶ for each unit: for each group: collect → prune → write
                                                                                   └ run the pruned unit once more, go on

One group's statistics are alive at a time (one Hessian for all matrices that read the same tensor; for packed experts as many
as fit in `max_hessian_bytes`). The host's Parameters are replaced, never written. With `resume_dir` every finished group is on
disk (atomically) and a second run with the same inputs goes on where the first stopped, to the same result.

The work per batch is one forward of each unit per group and one to go on, linear in depth. A forward stops as soon as the group has
its input (SparseGPT needs no product of the group itself), and products of weights that are pruned already are kept from one to the
next. Models without repeated blocks are stopped at each linear; a weight that is used several times in one forward (ALBERT) is
collected over all its uses by running the smallest module that holds them all.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sparsify.calibration.checks import all_finite, blame, check_batches, check_weights
from sparsify.calibration.ranks import (
    from_rank,
    object_from_rank,
    of_every_rank,
    rank,
    rank_count,
    same_weights,
    sum_over_ranks,
    together,
)
from sparsify.console import printable
from sparsify.errors import PlanError, Refusal, SparsifyError
from sparsify.model.blocks import repeated_blocks
from sparsify.model.linears import stored_transposed
from sparsify.program import Program, canonical_names
from sparsify.program.capture import evaluating
from sparsify.pruning.allocate import SaliencyCurve, by_sensitivity, saliency_curve
from sparsify.pruning.collect import (
    InputIdentities,
    PaddingDropper,
    Product,
    View,
    Watcher,
    choose_mask,
    token_masks,
)
from sparsify.pruning.kept_products import KeptProducts
from sparsify.pruning.lockstep import LockstepForward, intercepted
from sparsify.pruning.resume import ResumeStore, ViewStats, Written
from sparsify.pruning.rule import Prune
from sparsify.pruning.scores import InputNorms, magnitude_prune, random_prune, wanda_prune
from sparsify.pruning.sparsegpt import Hessian, Pruned, inverse_factor, sparsegpt_prune
from sparsify.pruning.streaming import NoStreaming, Residence
from sparsify.pruning.trace import Group, Unit, inside, plan_units, record_events

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from sparsify.files.strict_json import Json
    from sparsify.program.values import Batch, Inputs
    from sparsify.pruning.collect import InputId

Forward: TypeAlias = Callable[..., object]
#: a forward that waits at a unit, the number of its batch, and the batch
Waiting: TypeAlias = "tuple[LockstepForward, int, Batch]"

RUN_VERSION = 1  # of what makes two runs the same
HESSIAN_BYTES = 2 << 30
FINGERPRINT_ENTRIES = 4096


@printable
@dataclass(frozen=True)
class LayerStats:
    """What happened to one parameter.

    sparsity: achieved fraction of zeros. error: squared error of the layer's output relative to its energy on the calibration tokens
    (SparseGPT: exact up to the damping; Wanda: inputs taken as uncorrelated; without data: the share of Σ w²). tokens: calibration
    tokens seen (packed experts: the fewest of any expert). seconds: pruning only. note: what was done differently, and why.
    numel: entries of the parameter. itemsize: bytes of each.
    """

    name: str
    method: str
    pattern: str
    sparsity: float
    error: float
    tokens: int
    seconds: float
    note: str = ""
    numel: int = 0
    itemsize: int = 0


@printable
@dataclass
class PruneResult:
    """masks and tensors by qualified parameter name, in the stored layout (masks bool, True = survivor); layers in order.

    When weights are streamed, `tensors` is empty (they are in the output folder) and masks are packed bits, read when asked for.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerStats] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Zeros over all pruned parameters."""
        total = sum(layer.numel for layer in self.layers)
        return sum(layer.sparsity * layer.numel for layer in self.layers) / total if total else 0.0

    def __str__(self) -> str:
        lines = [f"{'layer':60} {'method':10} {'pattern':12} {'zeros':>7} {'error':>9} {'seconds':>8}"]
        for s in self.layers:
            lines.append(
                f"{s.name:60} {s.method:10} {s.pattern:12} {s.sparsity:7.2%} {s.error:9.2e} {s.seconds:8.2f}  {s.note}".rstrip()
            )
        lines += [f"not pruned: {refusal}" for refusal in self.refusals]
        return "\n".join(lines)


def prune_model(
    host: nn.Module,
    program: Program | None,
    rules: Sequence[tuple[str, Prune]],
    calibration: Iterable[Batch] | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
    resume_dir: str | Path | None = None,
    max_hessian_bytes: int = HESSIAN_BYTES,
    residence: Residence | None = None,
) -> PruneResult:
    """Prune parameters of `host`, replacing its Parameter objects (tensors shared with the user's model are not written).

    program: of the model before pruning; tells encoder from decoder inputs. None is fine for models with one side.
    rules: `(qualified parameter name, rule)` pairs, each name once.
    calibration: batches as for `forward` (a mapping with `attention_mask`, a tuple, or a tensor); padding is left out.
    seed: mixed into the rules' own.
    resume_dir: folder for finished groups; must belong to the same rules, weights and calibration (of weights a sample is compared).
    residence: where weights live while their block is not being pruned (`sparsify.pruning.streaming`).

    Under `torch.distributed` every rank must call it, with the same rules and weights and with batches of its own (a rank may have
    none): inputs are summed over all ranks, the first rank prunes, and all ranks get its bits. Errors are raised on all ranks.

    Raises PlanError (unknown name, sparsity or pattern that does not fit, missing calibration, foreign `resume_dir`) before anything is
    changed, and SparsifyError for a batch without tokens, and for NaN or Inf in a weight or at a layer's input.
    """
    driver = Driver(
        host, program, rules, calibration, seed, progress, resume_dir, max_hessian_bytes, residence or NoStreaming()
    )
    return driver.run()


@dataclass
class Begun:
    """A parameter of which some views are pruned. mask: their survivors so far; numel: how many entries they have."""

    mask: Tensor
    numel: int = 0
    stats: list[ViewStats] = field(default_factory=list)


class Driver:
    """State of one `prune_model` call."""

    def __init__(
        self,
        host: nn.Module,
        program: Program | None,
        rules: Sequence[tuple[str, Prune]],
        calibration: Iterable[Batch] | None,
        seed: int,
        progress: bool,
        resume_dir: str | Path | None,
        max_hessian_bytes: int,
        residence: Residence,
    ) -> None:
        self.host, self.residence, self.progress, self.seed = host, residence, progress, seed
        self.max_hessian_bytes = max_hessian_bytes
        self.names = canonical_names(host)
        self.rules = self.check_rules(rules)
        needs_data = [name for name, rule in self.rules.items() if rule.needs_calibration]
        with together():
            self.batches = list(calibration) if calibration is not None else []
            check_batches(self.batches)
        self.source = first_with_batches(self.batches)  # the rank whose first batch is traced
        if rank_count() > 1 and not isinstance(self.residence, NoStreaming):
            raise PlanError(
                "pruning on disk writes one folder, so it runs in one process: call it before torch.distributed is initialised"
            )
        if needs_data and self.source is not None:
            same_weights(host, f"Prune(method={self.rules[needs_data[0]].method!r})")
        if needs_data and self.source is None:
            rule = self.rules[needs_data[0]]
            raise PlanError(
                f"Prune(method='{rule.method}') looks at inputs: give calibration batches "
                f"(sparsify.compile(…, calibration=[batch, …])), or use method='magnitude'; first layer: {needs_data[0]}"
            )
        self.sides = {} if program is None else token_sides(program)
        self.result = PruneResult(masks=self.residence.masks())
        self.run_hash = fingerprint_of_all(self.fingerprint())
        with together():  # one rank reads and writes the folder
            mine = resume_dir is not None and rank() == 0
            self.store = ResumeStore(Path(resume_dir), self.run_hash) if mine and resume_dir is not None else None
        self.begun: dict[str, Begun] = {}
        self.sparsity: dict[str, float] = {}
        self.short: dict[str, tuple[int, int]] = {}  # fewer calibration tokens than inputs: (tokens, inputs)
        self.bar = tqdm(total=len(self.rules), desc="pruning", unit="layer", disable=not progress)

    # --- before anything is changed ---

    def check_rules(self, rules: Sequence[tuple[str, Prune]]) -> dict[str, Prune]:
        checked: dict[str, Prune] = {}
        for given, rule in rules:
            name = self.names.get(given)
            if name is None:
                raise PlanError(f"prune_model: the model has no parameter '{given}'")
            if name in checked:
                raise PlanError(f"prune_model: '{given}' has two Prune rules")
            shape = tuple(self.parameter(name).shape)
            if len(shape) not in (2, 3):
                raise PlanError(
                    f"{given}: only matrices and packed experts can be pruned, not a tensor of shape {shape}"
                )
            checked[name] = rule
        return checked

    def parameter(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.host.get_submodule(owner), leaf)

    def module_of(self, name: str) -> str:
        return name.rpartition(".")[0]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{RUN_VERSION}:{self.seed}:{len(self.batches)}".encode())
        for name, rule in self.rules.items():
            parameter = self.parameter(name).detach()
            digest.update(f"{name}{tuple(parameter.shape)}{rule!r}".encode())
            sample = self.residence.sample(name)
            if sample is None and parameter.device.type != "meta":
                sample = parameter.reshape(-1)[:: max(1, parameter.numel() // FINGERPRINT_ENTRIES)]
            if sample is not None:
                digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for leaf in pytree.tree_leaves(self.batches):
            if isinstance(leaf, Tensor) and leaf.numel():
                digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # --- the run ---

    def run(self) -> PruneResult:
        with ExitStack() as scope:
            scope.enter_context(evaluating(self.host))
            scope.enter_context(eager_products(self.host))
            scope.callback(self.bar.close)
            scope.enter_context(self.residence.opened(self.host, self.run_hash))
            if self.source is not None:
                units, refusals = self.trace(self.source)
                self.result.refusals += refusals
            else:
                units = units_without_data(self.host, list(self.rules))
            self.check_patterns(units)
            self.allocate(units)
            restored = {unit.name for unit in units if self.restore(unit)}
            if any(rule.needs_calibration for rule in self.rules.values()):
                if len(restored) < len(units):
                    self.walk(units, restored)
            else:
                for unit in units:
                    if unit.name in restored:
                        continue
                    with self.residence.loaded(unit.name, keep=True):
                        for group in unit.groups:
                            self.prune_without_data(group)
        order = {name: place for place, name in enumerate(self.rules)}
        self.result.layers.sort(key=lambda s: order[s.name])
        if self.short:
            few = {name: found for name, found in self.short.items() if found[0] < found[1]}
            text = too_few_tokens(few, len(self.result.layers)) if few else None
            warnings.warn(text or sparse_for_tokens(self.short, len(self.result.layers)), stacklevel=2)
        return self.result

    def trace(self, source: int) -> tuple[list[Unit], list[Refusal]]:
        """What the first batch of rank `source` shows; the same on every rank, whatever its own batches would show."""
        planned: tuple[list[Unit], list[Refusal]] = ([], [])
        with together():
            if rank() == source:
                events, others = record_events(
                    self.host,
                    lambda: run_batch(self.host, self.batches[0]),
                    lambda: {name: self.parameter(name) for name in self.rules},
                    self.residence.loading_forward,
                )
                names = {name: self.parameter(name) for name in self.rules}
                planned = plan_units(self.host, events, names, others)
        units, refusals = object_from_rank(source, planned)
        named = {r.where for r in refusals}
        for name in named:
            self.rules.pop(name)
            self.bar.total -= 1
        return units, refusals

    def check_patterns(self, units: list[Unit]) -> None:
        """Every layer fits its pattern, before anything is changed."""
        for unit in units:
            for group in unit.groups:
                for view in group.views or [view for name in group.params for view in self.plain_views(name)]:
                    self.rules[view.param].shape.check(self.label(view), view.shape)
        for name, rule in self.rules.items():
            sparsity = rule.sparsity_of(self.module_of(name))
            if sparsity is None:
                raise PlanError(f"{name}: no pattern of Prune(sparsity=…) matches it")
            self.sparsity[name] = sparsity

    def plain_views(self, name: str) -> list[View]:
        """Views of a parameter that no forward has shown: `(out, in)`, transposed for Conv1D, one per expert."""
        parameter = self.parameter(name)
        stored: tuple[int, int] = (parameter.shape[-2], parameter.shape[-1])
        strides: tuple[int, int] = (parameter.stride(-2), parameter.stride(-1))
        if stored_transposed(self.host.get_submodule(self.module_of(name))):
            stored, strides = (stored[1], stored[0]), (strides[1], strides[0])
        if parameter.dim() == 2:
            return [View(name, 0, stored, strides)]
        return [View(name, e * parameter.stride(0), stored, strides) for e in range(parameter.shape[0])]

    def label(self, view: View) -> str:
        parameter = self.parameter(view.param)
        return f"{view.param}[{view.offset // parameter.stride(0)}]" if parameter.dim() == 3 else view.param

    # --- allocation ---

    def allocate(self, units: list[Unit]) -> None:
        """Sparsity per parameter; "sensitivity" looks at all inputs of the dense model once."""
        moving: dict[int, list[str]] = {}
        by_identity = {id(rule): rule for rule in self.rules.values()}
        for name, rule in self.rules.items():
            if rule.allocation == "sensitivity":
                moving.setdefault(id(rule), []).append(name)
        if not moving:
            return
        wanted = list(dict.fromkeys(name for names in moving.values() for name in names))  # one order on every rank
        norms: dict[View, InputNorms] = {}
        with together():
            self.collect_norms(norms, wanted)
        views: dict[str, list[View]] = {}
        for unit in units:
            for group in unit.groups:
                for view in group.views or [v for n in group.params for v in self.plain_views(n)]:
                    views.setdefault(view.param, []).append(view)
        if self.source is not None:
            for view in dict.fromkeys(view for name in wanted for view in views.get(name, ())):
                norm = norms.setdefault(view, InputNorms(view.shape[1]))
                norm.over_ranks()
        norms = {view: norm for view, norm in norms.items() if norm.tokens}
        curves: dict[str, SaliencyCurve] = {}
        for unit in units:
            with self.residence.loaded(unit.name):
                for name in dict.fromkeys(n for group in unit.groups for n in group.params):
                    if name in wanted and name not in curves:
                        curves[name] = self.curve(name, views[name], norms)
        for identity, names in moving.items():
            rule = by_identity[identity]
            for target in sorted({self.sparsity[name] for name in names}):
                level = [name for name in names if self.sparsity[name] == target]
                self.sparsity |= by_sensitivity({n: curves[n] for n in level}, target, rule.max_shift)

    def collect_norms(self, norms: dict[View, InputNorms], wanted: Sequence[str]) -> None:
        for number, batch in enumerate(self.batches):
            masks = token_masks(batch)

            def seen(
                product: Product,
                masks: Mapping[str, Bool[Tensor, " T"]] = masks,
                number: int = number,
                batch: Batch = batch,
            ) -> None:
                norm = norms.setdefault(product.view, InputNorms(product.view.shape[1]))
                with self.naming(number, batch, product.view):
                    norm.add(self.tokens_only(product, masks, product.x))

            watcher = Watcher(lambda: {name: self.parameter(name) for name in wanted}, seen)
            with self.residence.loading_forward(watcher), torch.no_grad(), watcher:
                run_batch(self.host, batch)

    @contextmanager
    def naming(self, number: int, batch: Batch, view: View) -> Iterator[None]:
        """An error inside gets the batch and the layer it came from."""
        try:
            yield
        except SparsifyError as error:
            why = blame(number, batch, self.host)
            raise SparsifyError(f"calibration batch {number}, {self.label(view)}: {error}{why}") from error

    def curve(self, name: str, views: list[View], norms: Mapping[View, InputNorms]) -> SaliencyCurve:
        tensor = self.parameter(name).detach()
        check_weights([(name, tensor)])
        parts = [
            saliency_curve(view.of(tensor), norms[view].mean_squares() if view in norms else None) for view in views
        ]
        if len(parts) == 1:
            return parts[0]
        sample = torch.cat([part.sample / len(parts) for part in parts]).sort().values
        return SaliencyCurve(sum(part.numel for part in parts), sample)

    # --- the walk ---

    def restore(self, unit: Unit) -> bool:
        """Take over what an earlier start of this run has put away, if it has."""
        saved = self.residence.finished(unit.name)
        for stats in saved or ():
            self.result.layers.append(layer_stats(stats, f"{unit.name or 'the model'}: what an earlier start left"))
            self.bar.update()
        return saved is not None

    def walk(self, units: list[Unit], restored: set[str]) -> None:
        modules = {unit.name: self.host.get_submodule(unit.name) for unit in units}
        forwards: list[LockstepForward] = []
        with intercepted(modules) as originals:
            try:
                with together():
                    for batch in self.batches:
                        forwards.append(LockstepForward(lambda batch=batch: run_batch(self.host, batch)))
                    for forward in forwards:
                        forward.advance()
                done: set[str] = set()
                for place, unit in enumerate(units):
                    last = place == len(units) - 1
                    fresh = unit.name not in restored
                    names = [name for group in unit.groups for name in group.params]
                    kept = KeptProducts(lambda names=names: {name: self.parameter(name) for name in names})
                    with self.residence.loaded(unit.name, keep=fresh), torch.no_grad():
                        with together():
                            here = self.bring_to(unit.name, forwards, done, originals)
                        for group in unit.groups if fresh else ():
                            self.prune_group(unit, group, here, originals[unit.name], kept)
                        done.add(unit.name)
                        if not last:
                            with together():
                                for forward, number, _ in here:
                                    with kept.running(number):
                                        output = originals[unit.name](*forward.args, **forward.kwargs)
                                    forward.advance(output)
            finally:
                for forward in forwards:
                    forward.abandon()

    def bring_to(
        self, unit: str, forwards: list[LockstepForward], done: set[str], originals: Mapping[str, Forward]
    ) -> list[Waiting]:
        """Forwards that wait at `unit`, with their batches and numbers; those at a finished unit run through it first."""
        here: list[Waiting] = []
        for number, (forward, batch) in enumerate(zip(forwards, self.batches, strict=True)):
            while forward.unit in done and forward.unit is not None:
                with self.residence.loaded(forward.unit):
                    output = originals[forward.unit](*forward.args, **forward.kwargs)
                forward.advance(output)
            if forward.unit == unit:
                here.append((forward, number, batch))
        return here

    def prune_group(self, unit: Unit, group: Group, here: list[Waiting], forward: Forward, kept: KeptProducts) -> None:
        """Collect on every rank, prune on the first, and give all ranks its bits (the same sums may still be factorised to
        other last digits on another machine)."""
        written: Written | None = None
        with together():
            if self.store is not None:
                written = self.store.load(group.views, {name: self.parameter(name).dtype for name in group.params})
        if not object_from_rank(0, written is not None):
            written = {}
            if self.is_scored(group):
                check_weights((name, self.parameter(name)) for name in group.params)
            for views in self.passes(group):
                with together():
                    statistics = self.collect(group, views, here, forward, kept)
                statistics.over_ranks(views, self.is_full(group), self.parameter(group.params[0]).device)
                with together():
                    if self.is_early(group) and rank() == 0:
                        statistics.take_energies({v: v.of(self.parameter(v.param).detach()) for v in views})
                    for view in views if rank() == 0 else ():
                        written[view] = self.prune_view(view, statistics)
                statistics.release()
            with together():
                if self.store is not None:
                    self.store.save(written)
        for view, (values, mask, stats) in self.from_first_rank(group.views, written or {}).items():
            self.write(view, values, mask, stats)
        kept.final.update(name for name in group.params if name not in self.begun)

    def from_first_rank(self, views: list[View], written: Written) -> Written:
        if rank_count() == 1:
            return written
        found: Written = {}
        for view in views:
            here = view.of(self.parameter(view.param).detach())
            values, mask = torch.empty(view.shape, dtype=here.dtype), torch.empty(view.shape, dtype=torch.bool)
            stats: ViewStats | None = None
            if view in written:
                values, mask, stats = written[view]
            values, mask = values.to(here.device), mask.to(here.device)
            stats = object_from_rank(0, stats)
            assert stats is not None  # the first rank has written every view
            found[view] = (from_rank(0, values), from_rank(0, mask), stats)
        return found

    def is_scored(self, group: Group) -> bool:
        return any(self.rules[name].method != "random" for name in group.params)

    def is_full(self, group: Group) -> bool:
        """Whether some matrix of the group wants the whole Hessian."""
        return any(self.rules[name].method == "sparsegpt" for name in group.params)

    def is_early(self, group: Group) -> bool:
        """Whether one input, seen once, tells all: the Hessian gives the outputs' energy too, so no product need be computed."""
        return all(self.rules[name].method == "sparsegpt" for name in group.params) and group.calls == len(group.views)

    def passes(self, group: Group) -> list[list[View]]:
        """Experts whose Hessians fit in memory together; other groups share one input and need one pass."""
        if not group.experts or self.rules[group.params[0]].method != "sparsegpt":
            return [group.views]
        each = group.views[0].shape[1] ** 2 * 4
        count = max(1, self.max_hessian_bytes // each)
        return [group.views[i : i + count] for i in range(0, len(group.views), count)]

    def prune_without_data(self, group: Group) -> None:
        """On the first rank, for all of them: the others' weights may not have come yet (accelerate's efficient loading)."""
        views = [
            view
            for name in group.params
            for view in [v for v in group.views if v.param == name] or self.plain_views(name)
        ]
        written: Written = {}
        with together():
            if rank() == 0:
                if self.is_scored(group):
                    check_weights((name, self.parameter(name)) for name in group.params)
                written = {view: self.prune_view(view, Statistics(False)) for view in views}
        for view, (values, mask, stats) in self.from_first_rank(views, written).items():
            self.write(view, values, mask, stats)

    def collect(
        self, group: Group, views: list[View], here: list[Waiting], forward: Forward, kept: KeptProducts
    ) -> Statistics:
        """Run the unit on every batch, up to the group's last product, and accumulate."""
        rules = {name: self.rules[name] for name in group.params}
        statistics = Statistics(group.experts)
        if not any(rule.needs_calibration for rule in rules.values()):
            return statistics
        full, early = self.is_full(group), self.is_early(group)
        wanted = set(views)
        owners = [self.host.get_submodule(self.module_of(name)) for name in group.params] if group.experts else []
        for waiting, number, batch in here:
            masks = token_masks(batch)
            remaining = group.calls
            inputs: set[InputId] = set()
            identities = InputIdentities()

            def seen(
                product: Product,
                masks: Mapping[str, Bool[Tensor, " T"]] = masks,
                inputs: set[InputId] = inputs,
                identities: InputIdentities = identities,
                number: int = number,
                batch: Batch = batch,
            ) -> None:
                nonlocal remaining
                if product.view in wanted:
                    x = self.tokens_only(product, masks, product.x)
                    identity = identities.of(product.x)
                    with self.naming(number, batch, product.view):
                        if early:
                            statistics.add_inputs(product.view, x, full)
                            raise GroupDone
                        assert product.y is not None
                        y = self.tokens_only(product, masks, product.y)
                        statistics.add(product.view, x, y, product.bias, full, fresh=identity not in inputs)
                    inputs.add(identity)
                if remaining is not None:
                    remaining -= product.view in wanted
                    if remaining == 0:
                        raise GroupDone

            side = self.sides.get(group.params[0], "encoder")
            args, kwargs = copied_inputs((waiting.args, waiting.kwargs))
            with PaddingDropper(owners, masks.get(side)):
                # experts see fewer rows while padding is dropped, so nothing is kept there
                again = nullcontext() if owners else kept.running(number)
                try:
                    with again, Watcher(lambda: {name: self.parameter(name) for name in group.params}, seen, early):
                        forward(*args, **kwargs)
                except GroupDone:
                    pass
        return statistics

    def tokens_only(
        self, product: Product, masks: Mapping[str, Bool[Tensor, " T"]], values: Float[Tensor, "T c"]
    ) -> Float[Tensor, "tokens c"]:
        """Inputs or outputs of a product in the rows that are tokens: all `T`, or as many as their mask keeps."""
        mask = choose_mask(masks, product.x.shape[0], self.sides.get(product.view.param, "encoder"))
        return values if mask is None else values[mask.to(values.device)]

    def prune_view(
        self, view: View, statistics: Statistics
    ) -> tuple[Float[Tensor, "n m"], Bool[Tensor, "n m"], ViewStats]:
        rule, sparsity, where = self.rules[view.param], self.sparsity[view.param], self.label(view)
        weight = view.of(self.parameter(view.param).detach())
        started, method, note = time.perf_counter(), rule.method, ""
        tokens = statistics.tokens(view)
        if rule.needs_calibration and tokens == 0:
            method, note = "magnitude", "no calibration token reached it, so it was pruned by magnitude"
        scale = 1.0
        if method == "sparsegpt":
            factor = statistics.factor(view, rule.damping, where)
            pruned = sparsegpt_prune(
                weight, factor[0], sparsity, rule.shape, damping=rule.damping, where=where, factor=factor
            )
            scale = 2 / tokens
        elif method == "wanda":
            pruned = wanda_prune(
                weight, statistics.mean_squares(view).to(weight.device), sparsity, rule.shape, where=where
            )
            scale = 2 / tokens
        elif method == "random":
            pruned = random_prune(weight, sparsity, rule.shape, seed=rule.seed * 1_000_003 + self.seed, where=where)
        else:
            pruned = magnitude_prune(weight, sparsity, rule.shape, where=where)
        energy = (
            statistics.energy(view) * scale
            if method in ("sparsegpt", "wanda")
            else float(weight.float().square().sum()) * 2
        )
        stats: ViewStats = {
            "method": method,
            "error": relative(pruned, energy),
            "energy": energy,
            "tokens": tokens,
            "seconds": time.perf_counter() - started,
            "note": f"{where}: {note}" if note else "",
        }
        return pruned.weight, pruned.mask, stats

    # --- writing ---

    def write(self, view: View, values: Float[Tensor, "n m"], mask: Bool[Tensor, "n m"], stats: ViewStats) -> None:
        """Put one view's result into the host; when the parameter is complete, into the result."""
        name = view.param
        state = self.begun.get(name)
        if state is None:
            old = self.parameter(name)
            fresh = nn.Parameter(
                old.detach().clone(memory_format=torch.preserve_format), requires_grad=old.requires_grad
            )
            state = self.begun[name] = Begun(torch.ones_like(old, dtype=torch.bool))
            self.rebind(name, fresh)
        parameter = self.parameter(name)
        view.of(parameter.data).copy_(values)
        view.of(state.mask).copy_(mask)
        state.numel += view.numel
        if stats["method"] == "sparsegpt" and stats["tokens"] < tokens_wanted(view.shape[1], mask):
            self.short[name] = min(
                self.short.get(name, (stats["tokens"], view.shape[1])), (stats["tokens"], view.shape[1])
            )
        state.stats.append(stats)
        if state.numel < parameter.numel():
            return
        final, every = state.mask, state.stats
        del self.begun[name]
        energy = sum(s["energy"] for s in every)
        error = sum(s["error"] * s["energy"] for s in every if s["energy"]) / energy if energy else math.nan
        notes = [s["note"] for s in every if s["note"]]
        if name in self.short:
            notes.insert(0, f"only {self.short[name][0]:,} calibration tokens for {self.short[name][1]:,} inputs")
        rule = self.rules[name]
        self.result.layers.append(
            LayerStats(
                name=name,
                method=rule.method,
                pattern=str(rule.shape),
                sparsity=1 - int(torch.count_nonzero(final)) / final.numel(),
                error=error,
                tokens=min(s["tokens"] for s in every),
                seconds=sum(s["seconds"] for s in every),
                note="; ".join(notes[:2]) + (f"; and {len(notes) - 2} more" if len(notes) > 2 else ""),
                numel=final.numel(),
                itemsize=parameter.element_size(),
            )
        )
        self.residence.keep(self.result, name, parameter.detach(), final)
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update()

    def rebind(self, name: str, fresh: nn.Parameter) -> None:
        """Put a new Parameter at every alias of `name`."""
        for alias in [a for a, canonical in self.names.items() if canonical == name]:
            owner, _, leaf = alias.rpartition(".")
            setattr(self.host.get_submodule(owner), leaf, fresh)


def units_without_data(host: nn.Module, names: list[str]) -> list[Unit]:
    """A unit per repeated block, and one per module outside of blocks: what has to be in memory together."""
    blocks = [name for stack in repeated_blocks(host) for name in stack.names]
    units: dict[str, Unit] = {}
    for name in names:
        unit = next((block for block in blocks if inside(name, block)), name.rpartition(".")[0])
        units.setdefault(unit, Unit(unit)).groups.append(Group([name], []))
    return list(units.values())


def too_few_tokens(short: Mapping[str, tuple[int, int]], layers: int) -> str:
    """The warning for Hessians with fewer tokens than inputs. short: `(tokens, inputs)` by parameter."""
    worst = min(short, key=lambda name: short[name][0] / short[name][1])
    tokens, width = short[worst]
    return (
        f"Prune(method='sparsegpt'): {len(short)} of {layers} weights were pruned with fewer calibration tokens than inputs; the worst "
        f"is {worst}: {tokens:,} tokens for a Hessian {width:,} wide, which is singular without damping, so that the survivors are "
        f"fitted to these tokens. Give at least {width:,} tokens, better {8 * width:,}, or use method='wanda', which needs no Hessian"
    )


def tokens_wanted(width: int, mask: Bool[Tensor, "n m"]) -> float:
    """Calibration tokens below which SparseGPT is warned of: one per input, and more where few weights survive to carry the others' part.

    Inputs times zeros per survivor: 1 × at 50 %, 3 × at 75 %. On SmolLM2-135M (1,536 inputs at most) 1,024 tokens destroy the model at
    75 %; 3,072 give a perplexity of 213 there and of 54.6 at 50 %, where the dense model has 38.4.
    """
    kept = int(torch.count_nonzero(mask))
    return width * max(
        1.0, (mask.numel() - kept) / max(kept, 1) - 1e-3
    )  # (a rounded sparsity of 50 % may be a little more)


def sparse_for_tokens(short: Mapping[str, tuple[int, int]], layers: int) -> str:
    """The warning for more zeros than the tokens pay for. short: `(tokens, inputs)` by parameter."""
    worst = min(short, key=lambda name: short[name][0] / short[name][1])
    tokens, width = short[worst]
    return (
        f"Prune(method='sparsegpt'): {len(short)} of {layers} weights lost more than half of their entries on few calibration tokens; the "
        f"worst is {worst}: {tokens:,} tokens for {width:,} inputs. A Hessian of so few tokens does not tell which weights matter, and the "
        f"model may be destroyed (a small language model at 75 % zeros: perplexity 38 → 213 with 2 tokens an input). Give {8 * width:,} "
        "tokens or more, prune less, or train the survivors, and measure the loss"
    )


def first_with_batches(batches: Sequence[Batch]) -> int | None:
    """The first rank that has calibration batches; None when none has."""
    counts = of_every_rank(len(batches))
    return next((number for number, count in enumerate(counts) if count), None)


def fingerprint_of_all(own: str) -> str:
    """One hash on every rank, of what every rank works with."""
    every = of_every_rank(own)
    return own if len(every) == 1 else hashlib.sha256(":".join(every).encode()).hexdigest()


class GroupDone(BaseException):
    """The group has its inputs: the rest of the unit need not run."""


def copied_inputs(inputs: Inputs) -> Inputs:
    """Floating tensors copied, because a block may write to its inputs; what is one object stays one (`key is value`)."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
        return copies[id(leaf)]

    return pytree.tree_map(copy, inputs)


def on_any_rank(flags: Sequence[bool]) -> list[bool]:
    return (sum_over_ranks(torch.tensor([float(flag) for flag in flags], dtype=torch.float64)) > 0).tolist()


def relative(pruned: Pruned, energy: float) -> float:
    return pruned.error / energy if energy > 0 else math.nan


class Statistics:
    """Of one group: a Hessian or input norms, shared by all views or (experts) one per view; output energy per view."""

    def __init__(self, per_view: bool) -> None:
        self.per_view = per_view
        self.inputs: dict[View | None, Hessian | InputNorms] = {}
        self.energies: dict[View, float] = {}
        self.factors: dict[View | None, tuple[Tensor, Tensor]] = {}
        self.counts: dict[View | None, int] = {}

    def key(self, view: View) -> View | None:
        return view if self.per_view else None

    def add(
        self,
        view: View,
        x: Float[Tensor, "tokens m"],
        y: Float[Tensor, "tokens n"],
        bias: Tensor | None,
        full: bool,
        *,
        fresh: bool,
    ) -> None:
        """fresh: this input was not added for another matrix of the group."""
        if fresh or self.per_view or self.key(view) not in self.inputs:
            self.add_inputs(view, x, full)
        output = y.float() if bias is None else y.float() - bias.float()
        energy = float(output.square_().sum() if bias is not None else output.square().sum())
        if not math.isfinite(energy) and not all_finite(y):
            raise SparsifyError(f"the calibration data gives NaN or Inf at this layer's output ({y.dtype})")
        self.energies[view] = self.energies.get(view, 0.0) + energy

    def add_inputs(self, view: View, x: Float[Tensor, "tokens m"], full: bool) -> None:
        key = self.key(view)
        if key not in self.inputs:
            self.inputs[key] = Hessian(x.shape[-1], x.device) if full else InputNorms(x.shape[-1])
        self.inputs[key].add(x)
        self.counts[key] = self.inputs[key].tokens

    def take_energies(self, weights: Mapping[View, Float[Tensor, "n m"]]) -> None:
        """Energy of every output from the Hessian that they share, `Σ ‖W x‖² = tr(W (Σ x xᵀ) Wᵀ)`, instead of from outputs."""
        held = self.inputs.get(None)
        if not isinstance(held, Hessian) or not held.tokens:
            return
        sums = held.total()
        for view, weight in weights.items():
            weight = weight.float()
            self.energies[view] = float(torch.mm(weight, sums).mul_(weight).sum(dtype=torch.float64))

    def over_ranks(self, views: Sequence[View], full: bool, device: torch.device) -> None:
        """Take in what the other ranks have seen; every rank must call it with the same views, in the same order."""
        if rank_count() == 1:
            return
        known = on_any_rank([self.key(view) in self.inputs for view in views])
        for key in dict.fromkeys(self.key(view) for view, seen in zip(views, known, strict=True) if seen):
            width = (views[0] if key is None else key).shape[1]
            if key not in self.inputs:
                self.inputs[key] = Hessian(width, device) if full else InputNorms(width)
            held = self.inputs[key]
            held.over_ranks()
            self.counts[key] = held.tokens
        energies = torch.tensor([self.energies.get(view, 0.0) for view in views], dtype=torch.float64)
        self.energies = dict(zip(views, sum_over_ranks(energies).tolist(), strict=True))

    def tokens(self, view: View) -> int:
        return self.counts.get(self.key(view), 0)

    def energy(self, view: View) -> float:
        return self.energies.get(view, 0.0)

    def mean_squares(self, view: View) -> Float[Tensor, " m"]:
        held = self.inputs[self.key(view)]
        return held.mean_squares() if isinstance(held, InputNorms) else held.matrix.diagonal() / max(held.tokens, 1)

    def factor(self, view: View, damping: float, where: str) -> tuple[Float[Tensor, "m m"], Bool[Tensor, " m"]]:
        """`U` and the dead inputs; computed once per Hessian, which is freed."""
        key = self.key(view)
        if key not in self.factors:
            held = self.inputs.pop(key)
            assert isinstance(held, Hessian)
            self.factors[key] = inverse_factor(held.value(), damping, where=where)
        factor = self.factors[key]
        if self.per_view:
            del self.factors[key]
        return factor

    def release(self) -> None:
        self.inputs.clear()
        self.factors.clear()


def run_batch(model: nn.Module, batch: Batch) -> object:
    """One forward: mapping → keywords, tuple or list → positional, tensor → one argument; caches off."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    batch = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)
    accepted = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    cached = "use_cache" in accepted or (open_ended and hasattr(getattr(model, "config", None), "use_cache"))
    extra = {"use_cache": False} if cached else {}
    if isinstance(batch, Mapping):
        return model(**{**extra, **batch})
    return model(*batch, **extra) if isinstance(batch, tuple | list) else model(batch, **extra)


@contextmanager
def eager_products(host: nn.Module) -> Iterator[None]:
    """Products as operators that can be seen: no fused encoder fast path, no gathered copies of expert weights."""
    fast = torch.backends.mha.get_fastpath_enabled()
    changed = []
    for module in host.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) not in (None, "eager", "grouped_mm"):
            changed.append((config, config._experts_implementation))  # type: ignore[union-attr]
            config._experts_implementation = "eager"  # type: ignore[union-attr]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config, before in reversed(changed):
            config._experts_implementation = before


def token_sides(program: Program) -> dict[str, str]:
    """For each weight: "decoder" when its input depends on a `decoder_…` input of the model, else "encoder". From the graph."""
    decoder: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name.removeprefix("kwargs_").startswith("decoder_"):
                decoder.add(node)
        elif any(source in decoder for source in node.all_input_nodes):
            decoder.add(node)
    sides = {linear.weight: "decoder" if linear.x in decoder else "encoder" for linear in program.linears()}
    names = program.tensor_names
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and names[node.name] not in sides:
            sides[names[node.name]] = "decoder" if any(user in decoder for user in node.users) else "encoder"
    return sides


def layer_stats(stats: Mapping[str, Json], where: str) -> LayerStats:
    """LayerStats from what a file brought back (None for NaN). Raises SparsifyError when it is something else."""
    known = {f.name: str(f.type) for f in fields(LayerStats)}
    types: dict[str, type | UnionType] = {"str": str, "int": int, "float": int | float | None}
    if set(stats) != set(known) or not all(
        isinstance(value, types[known[name]]) and not isinstance(value, bool) for name, value in stats.items()
    ):
        raise SparsifyError(f"{where}: the statistics of a layer are damaged; delete the folder to start over")
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in stats.items()}
    return LayerStats(**values)


def stats_table(result: PruneResult) -> list[dict[str, Json]]:
    """The layers as plain dictionaries, for JSON."""
    return [asdict(layer) for layer in result.layers]
