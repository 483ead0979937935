"""PEFT's `adapter_config.json`: which fields may stand there for the adapter to be a plain low-rank change, and what they say.

An allow-list. A field is known to leave the function alone (READ), known to change it (REFUSED, each with what to do), or
unknown: then it may be absent, null, false or empty, and is refused by name otherwise, because a later PEFT wrote it and nobody
here knows what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, TypeVar

from sparsify.errors import AdapterError
from sparsify.files.strict_json import short
from sparsify.plan import MAX_ENTRIES, MAX_RANK, MAX_TOKENS
from sparsify.plan.name_patterns import Budget, PatternError, Regex

PLAIN = "save it in PEFT as a plain LoRA, or merge it there (merge_and_unload) and use the merged model as the base"
CONVERT = (
    "convert it in PEFT with save_pretrained(…, path_initial_model_for_weight_conversion=…), which writes a plain LoRA "
    "of twice the rank"
)

#: beginnings that leave the base as it is: what is saved is all there is
PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
#: beginnings that take their own factors out of the base, each time that PEFT loads the adapter, in a way that can be repeated
RESIDUAL_BEGINNINGS = ("pissa", "olora")

#: truthy values of these fields change the function
REFUSED = {
    "use_dora": f"DoRA rescales the rows of the weight; {PLAIN}",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts only after its invocation tokens; only PEFT can run it",
    "layer_replication": "the adapter belongs to a model whose layers are repeated; build that model, and save the adapter on it",
    "lora_bias": f"lora_B has a bias of its own; {PLAIN}",
    "megatron_config": f"the adapter belongs to Megatron's parallel linears; {PLAIN}",
    "use_qalora": f"QALoRA pools the input of lora_A; {PLAIN}",
    "enable_lora": f"only parts of a merged linear are adapted (an old MergedLinear); {PLAIN}",
}
#: of these PEFT takes even an empty table for "on"
REFUSED_TABLES = {
    "kasa_config": f"KaSA truncates the singular values of the base; {PLAIN}",
    "monteclora_config": "MonteCLoRA draws random perturbations of the factors; only PEFT can run it",
    "use_bdlora": f"BD-LoRA's factors are block-diagonal; {PLAIN}",
    "arrow_config": "Arrow routes every token between several adapters; load each of them by itself",
    "velora_config": f"VeLoRA keeps further tensors; {PLAIN}",
}


def is_bool(value: object) -> TypeGuard[bool]:
    return isinstance(value, bool)


def is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def is_table(value: object) -> bool:
    return value is None or isinstance(value, dict)


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9


def is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_rank(value: object) -> bool:
    return is_integer(value) and 1 <= value <= MAX_RANK


def is_names(value: object) -> bool:
    """A list of names, one string, or null."""
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, list) and len(value) <= MAX_ENTRIES and all(isinstance(v, str) and v for v in value)


def is_layers(value: object) -> bool:
    return value is None or is_integer(value) or (isinstance(value, list) and all(is_integer(v) for v in value))


def is_table_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        value is None
        or (isinstance(value, dict) and len(value) <= MAX_ENTRIES and all(k and check(v) for k, v in value.items()))
    )


def is_tokens(value: object) -> bool:
    """A list of distinct ids."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TOKENS:
        return False
    return all(is_integer(v) and v >= 0 for v in value) and len(set(value)) == len(value)


#: field → (what it may hold, in words)
READ: dict[str, tuple[Callable[[object], bool], str]] = {
    "peft_type": (is_text, "a string"),
    "task_type": (is_text, "a string"),
    "base_model_name_or_path": (is_text, "a string"),
    "revision": (is_text, "a string"),
    "peft_version": (is_text, "a string"),
    "auto_mapping": (is_table, "a table"),
    "inference_mode": (is_bool, "true or false"),
    "merge_weights": (is_bool, "true or false"),
    "r": (is_rank, f"a rank from 1 to {MAX_RANK:,}"),
    "lora_alpha": (is_number, "a finite number"),
    "lora_dropout": (is_share, "a number from 0 to 1"),
    "use_rslora": (is_bool, "true or false"),
    "fan_in_fan_out": (is_bool, "true or false"),
    "ensure_weight_tying": (is_bool, "true or false"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "init_lora_weights": (lambda v: is_bool(v) or isinstance(v, str), "true, false or a word"),
    "target_modules": (is_names, "a list of names, or a regular expression"),
    "exclude_modules": (is_names, "a list of names, or a regular expression"),
    "target_parameters": (lambda v: is_names(v) and not isinstance(v, str), "a list of names"),
    "trainable_token_indices": (
        lambda v: v is None or is_tokens(v) or bool(v and is_table_of(is_tokens)(v)),
        "a list of tokens, or a table of modules and lists of tokens",
    ),
    "modules_to_save": (lambda v: is_names(v) and not isinstance(v, str), "a list of names"),
    "layers_to_transform": (is_layers, "a list of layer numbers"),
    "layers_pattern": (is_names, "a list of names"),
    "rank_pattern": (is_table_of(is_rank), "a table of patterns and ranks"),
    "alpha_pattern": (is_table_of(is_number), "a table of patterns and finite numbers"),
    # settings of features that are off, or of how the training began
    "megatron_core": (is_text, "a string"),
    "qalora_group_size": (is_integer, "a whole number"),
    "loftq_config": (is_table, "a table"),
    "eva_config": (is_table, "a table"),
    "corda_config": (is_table, "a table"),
    "lora_ga_config": (is_table, "a table"),
    "runtime_config": (is_table, "a table"),
}

Number = TypeVar("Number", int, float)


class Ending:
    """A key of `rank_pattern` or `alpha_pattern`: PEFT matches `(.*\\.)?(key)$`."""

    def __init__(self, key: str, budget: Budget) -> None:
        self.budget = budget
        self.fixed = Regex(key).fixed
        self.regex = Regex(rf"(.*\.)?({key})$", budget)

    def matches(self, module: str) -> bool:
        if self.fixed is None:
            return self.regex.match(module)
        self.budget.spend(1)
        count = len(self.fixed)
        ends = len(module) == count or (len(module) > count and module[-count - 1] == ".")
        return ends and all(test(c) for test, c in zip(self.fixed, module[len(module) - count :], strict=True))


@dataclass(frozen=True)
class Settings:
    """What a checked configuration says. `residual`: the base loses this beginning's factors ("" for none). tokens: end of a module's
    name ("" for the only one) → ids of its trained rows."""

    rank: int
    alpha: float
    rslora: bool
    ranks: tuple[tuple[Ending, int], ...]
    alphas: tuple[tuple[Ending, float], ...]
    targets: Targets
    saved: tuple[str, ...]
    tying: bool
    residual: Literal["", "pissa", "olora"]
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return next((r for key, r in self.ranks if key.matches(module)), self.rank)

    def scale_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), next((a for key, a in self.alphas if key.matches(module)), self.alpha)
        return float(alpha / rank**0.5 if self.rslora else alpha / rank)


class Targets:
    """Which modules PEFT adapts when it loads the configuration (`check_target_module_exists` of peft 0.21)."""

    def __init__(self, config: Mapping[str, Any], budget: Budget) -> None:
        targets, excluded = config.get("target_modules"), config.get("exclude_modules")
        #: whether the configuration names its modules; null and "all-linear" are resolved by PEFT with tables of its own
        self.named = targets is not None and targets != "all-linear"
        self.regex = Regex(targets, budget) if self.named and isinstance(targets, str) else None
        self.names = set(targets) if isinstance(targets, list) else set()
        self.excluded_regex = Regex(excluded, budget) if excluded and isinstance(excluded, str) else None
        self.excluded = set(excluded) if isinstance(excluded, list) else set()
        saved = config.get("modules_to_save") or []
        self.saved = [Regex(rf"(^|.*\.){name}($|\..*)", budget) for name in saved]
        layers = config.get("layers_to_transform")
        self.layers = [layers] if is_integer(layers) else layers or None
        patterns = config.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        #: what stands before the layer's number
        self.before_number = [Regex(rf"(?:.*\.)?{p}", budget) for p in patterns]

    def __contains__(self, module: str) -> bool:
        if self.excluded_regex is not None and self.excluded_regex.fullmatch(module):
            return False
        if ends_in(module, self.excluded) or any(regex.match(module) for regex in self.saved):
            return False
        if not self.named:
            return True
        if self.regex is not None:
            return self.regex.fullmatch(module)
        if module in self.names or not self.layers:
            return ends_in(module, self.names)
        return ends_in(module, self.names) and self.layer_of(module) in self.layers

    def layer_of(self, module: str) -> int | None:
        """The first number in the name after a path that ends in a layers pattern; without patterns, after any two names."""
        parts = module.split(".")
        numbered = [(".".join(parts[:i]), parts[i]) for i in range(1, len(parts) - 1) if parts[i].isdecimal()]
        if not self.before_number:
            return next((int(number[:18]) for before, number in numbered if "." in before), None)
        for regex in self.before_number:
            for before, number in numbered:
                if regex.fullmatch(before):
                    return int(number[:18])
        return None


def ends_in(module: str, names: set[str]) -> bool:
    """Whether the module, or its end after a dot, is one of the names."""
    if module in names:
        return True
    at = module.find(".")
    while at >= 0:
        if module[at + 1 :] in names:
            return True
        at = module.find(".", at + 1)
    return False


def read_config(config: Any, where: str) -> Settings:
    """Check every field. Raises AdapterError naming the field, what it means, and what to do."""
    if not isinstance(config, dict):
        raise AdapterError(f"{where}: adapter_config.json holds no JSON object but {short(config)}")
    kind = config.get("peft_type")
    if kind == "TRAINABLE_TOKENS":
        return rows_alone(config, where)
    if kind != "LORA":
        raise AdapterError(f"{where}: a PEFT adapter of type {short(kind)}; only LORA can be read ({PLAIN})")
    for name, value in config.items():
        check_field(name, value, where)
    for name in ("r", "lora_alpha"):
        if name not in config:
            raise AdapterError(f"{where}: adapter_config.json does not say {name}")
    residual = beginning(config.get("init_lora_weights", True), where)
    budget = Budget(5_000_000)
    field = ""
    try:
        ranks, alphas = [], []
        for field, found in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            found += [(Ending(key, budget), value) for key, value in (config.get(field) or {}).items()]
        field = "target_modules, exclude_modules, modules_to_save or layers_pattern"
        targets = Targets(config, budget)
    except PatternError as error:
        raise AdapterError(f"{where}: {field}: {error}") from None
    return Settings(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=config.get("use_rslora", False),
        ranks=tuple(ranks),
        alphas=tuple(alphas),
        targets=targets,
        saved=tuple(config.get("modules_to_save") or ()),
        tying=config.get("ensure_weight_tying", False),
        residual=residual,
        parameters=tuple(config.get("target_parameters") or ()),
        tokens=tokens_of(config.get("trainable_token_indices")),
    )


def tokens_of(value: Any) -> dict[str, tuple[int, ...]]:
    """`trainable_token_indices` by module; a bare list is of the input embedding, whose name PEFT looks up."""
    table = value if isinstance(value, dict) else {"": value} if value else {}
    return {module: tuple(ids) for module, ids in table.items()}


#: fields of TRAINABLE_TOKENS
ALONE = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "inference_mode",
)


def rows_alone(config: Mapping[str, Any], where: str) -> Settings:
    """The configuration of an adapter that holds rows of embeddings alone."""
    ids, targets = config.get("token_indices"), config.get("target_modules")
    if not is_tokens(ids) or not is_names(targets):
        raise AdapterError(f"{where}: token_indices must be a list of tokens, and target_modules names")
    for name, value in config.items():
        if name in ALONE:
            check_field(name, value, where)
        elif name not in ("token_indices", "target_modules", "init_weights") and value:
            raise AdapterError(
                f"{where}: adapter_config.json sets {short(name)}, which rows alone (TRAINABLE_TOKENS) have not"
            )
    names = [targets] if isinstance(targets, str) else targets or [""]
    tokens = {name: tuple(ids or ()) for name in names}
    return Settings(1, 1.0, False, (), (), Targets({"target_modules": []}, Budget(1)), (), False, "", (), tokens)


def check_field(name: str, value: object, where: str) -> None:
    if name in REFUSED:
        if value:
            raise AdapterError(f"{where}: {name} is set ({short(value)}): {REFUSED[name]}")
        return
    if name in REFUSED_TABLES:
        if value is not None and value is not False:
            raise AdapterError(f"{where}: {name} is set ({short(value)}): {REFUSED_TABLES[name]}")
        return
    if name in READ:
        check, words = READ[name]
        optional = value is None and name not in ("r", "lora_alpha", "init_lora_weights", "bias")
        if not optional and not check(value):
            raise AdapterError(f"{where}: {name} must be {words}, it is {short(value)}")
        return
    if value:
        raise AdapterError(
            f"{where}: adapter_config.json sets {short(name)} to {short(value)}, a field that this version does not know; it may "
            f"change what the adapter computes. Take it out if it does not, or {PLAIN}"
        )


def beginning(value: object, where: str) -> Literal["", "pissa", "olora"]:
    """Whether PEFT changes the base when it loads an adapter that began so."""
    word = value.lower() if isinstance(value, str) else ""
    if isinstance(value, bool) or word in PLAIN_BEGINNINGS:
        return ""
    if word == "olora":
        return "olora"
    if value == "pissa":
        return "pissa"
    if word.startswith("pissa"):
        raise AdapterError(
            f"{where}: init_lora_weights is {short(value)}: the base lost a randomised decomposition that nobody can repeat; {CONVERT}"
        )
    if word in ("corda", "lora_ga"):
        raise AdapterError(
            f"{where}: init_lora_weights is {short(value)}: the base lost factors that depend on training data; {CONVERT}"
        )
    if word == "loftq":
        raise AdapterError(
            f"{where}: init_lora_weights is 'loftq': the base was replaced by a quantised one; save that base, and the adapter "
            "with init_lora_weights=true beside it"
        )
    raise AdapterError(f"{where}: init_lora_weights is {short(value)}, which this version does not know; {PLAIN}")
