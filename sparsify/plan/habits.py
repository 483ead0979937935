"""Words that users bring from PEFT and other tools, and what they are called here.

    LoRA(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    LoRA(rank=8, alpha=16, dropout=0.1, match=["q_proj", "v_proj"])                        the same rule
    LoRA(**config.to_dict())                                                               of a whole `LoraConfig`, too

ALIASES are accepted where the rule has the field, and so are fields of PEFT's `LoraConfig` at values that change nothing (NEUTRAL),
`rank_pattern` (a table of ranks), and `layers_to_transform` with the names of modules (patterns of layers). For HINTS nothing equal can
be written into the rule; the error says where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.plan.name_patterns import REGEX, is_glob

#: other tools' word → ours
ALIASES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "target_modules": "match",
    "exclude_modules": "exclude",
    "trainable_token_indices": "ids",
    "token_indices": "ids",
}

#: fields of `LoraConfig` that say nothing at these values
NEUTRAL: dict[str, tuple[object, ...]] = {
    "task_type": ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None),
    "inference_mode": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, True, None),
    "init_lora_weights": (True, None),
    "use_dora": (False, None),
    "use_rslora": (),
    "modules_to_save": (None, [], ()),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None,),
    "peft_type": ("LORA", None),
    "target_modules": (None,),
    "exclude_modules": (None,),
}

#: fields of `LoraConfig` that switch something on which is not here; off they say nothing
SWITCHES = (
    "auto_mapping", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "lora_bias", "use_bdlora", "arrow_config",
    "kasa_config", "ensure_weight_tying", "runtime_config",
)  # fmt: skip
#: and fields that say where a config comes from, or belong to a switch
REMARKS = ("peft_version", "base_model_name_or_path", "revision", "megatron_core", "qalora_group_size")

HINTS = {
    "modules_to_save": "write Plan([…], train=[…]) for modules that train in full",
    "trainable_token_indices": "put Tokens(ids=[…]) beside it into the plan",
    "bias": "write Plan([…], train=['*.bias']) for biases that train",
    "rank_pattern": "write rank={'pattern': rank, '*': rank for the rest}",
    "alpha_pattern": "write one rule for every alpha; the first rule that matches a module wins",
    "layers_to_transform": "write the layers into match: 'model.layers.{0-3}.*' or a list of patterns",
    "layers_pattern": "write the layers into match: 'model.layers.{0-3}.*' or a list of patterns",
    "target_parameters": "write the parameters into match, as if they were linears: match='*.experts.down_proj'",
    "use_dora": "DoRA is a method from outside: examples/write_a_method.py has it, a rule of its own",
    "init_lora_weights": "A is drawn as Kaiming does and B is zero; other beginnings are not implemented",
    "task_type": "leave it out: the model says what it is",
    "inference_mode": "leave it out; sparsify.load gives a model that does not train",
    "fan_in_fan_out": "leave it out: Conv1D is recognised",
    "seed": "the seed is the plan's: Plan([…], seed=…)",
    "train": "it is the plan's: Plan([…], train=[…])",
    "target": "it is the plan's: Plan([…], target=…)",
    "ratio": "write fraction=… (share of the parameters)",
    "s_ratio": "write fraction=… (share of the parameters)",
    "d": "write density=…",
    "sparsity": "RoSA's share of trained entries is density=…; Prune's share of zeros is sparsity=…",
    "amount": "write sparsity=…",
    "bits": "write format='nf4', 'int8' or 'int4'",
    "load_in_4bit": "write Quantize('nf4')",
    "load_in_8bit": "write Quantize('int8')",
    "quant_type": "write format=…",
    "bnb_4bit_quant_type": "write format='nf4'",
    "targets": "write match=…",
    "ignore": "write exclude=[…]",
}

#: answers that depend on the rule
HINTS_OF = {
    ("S2FT", "r"): "write fraction=… (share of the parameters) or units=… (heads or channels): S2FT has no rank",
    ("S2FT", "rank"): "write fraction=… (share of the parameters) or units=… (heads or channels): S2FT has no rank",
    ("PaCA", "alpha"): "leave it out: PaCA trains columns of the weight itself, nothing is scaled",
    ("PaCA", "lora_alpha"): "leave it out: PaCA trains columns of the weight itself, nothing is scaled",
    ("LoRA", "density"): "RoSA has a sparse part beside the low-rank one: RoSA(rank=…, density=…)",
    ("Quantize", "r"): "Quantize trains nothing; put LoRA(rank=…) beside it into the plan",
}


def hint_for(rule: str, word: str) -> str | None:
    """What to write instead of a word that a rule does not have; None when nobody knows."""
    name = ALIASES.get(word)
    elsewhere = f"{rule} has no {name}, which is what it means in LoRA" if name else None
    return HINTS_OF.get((rule, word)) or HINTS.get(word) or elsewhere


def without_neutral(fields: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The words of a call without those that say nothing, and with `rank_pattern` and `layers_to_transform` written as ours."""
    found = {w: v for w, v in fields.items() if w in known or not says_nothing(w, v)}
    table = found.get("rank_pattern")
    rank = next((w for w in ("rank", "r", "lora_r") if w in found), None)
    if isinstance(table, Mapping) and "rank" in known and rank is not None and isinstance(found[rank], int):
        found[rank] = {**{module_patterns(k): v for k, v in table.items()}, "*": found[rank]}
        del found["rank_pattern"]
    layers, names = found.get("layers_to_transform"), next((w for w in ("target_modules", "match") if w in found), None)
    if layers is not None and names is not None and "match" in known:
        patterns = layer_patterns(found[names], layers, found.get("layers_pattern"))
        if patterns is not None:
            found = {w: v for w, v in found.items() if w not in (names, "layers_to_transform", "layers_pattern")}
            found["match"] = patterns
    return found


def says_nothing(word: str, value: Any) -> bool:
    if word in REMARKS:
        return True
    if word in SWITCHES:
        return not value
    if isinstance(value, str):  # PEFT's enums are words too
        return any(isinstance(neutral, str) and value == neutral for neutral in NEUTRAL.get(word, ()))
    return any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(word, ()))


def is_peft_config(value: object) -> bool:
    """Whether somebody wrote a `LoraConfig` where a rule belongs. PEFT is not imported."""
    return hasattr(value, "peft_type") and callable(getattr(value, "to_dict", None))


FROM_PEFT = "write Plan([LoRA(**config.to_dict())]) for a LoraConfig"


def layer_patterns(names: Any, layers: Any, lists: Any) -> str | None:
    """A pattern of modules in some layers; None where the words are no plain names and numbers."""
    wanted = [layers] if isinstance(layers, int) else layers
    modules = [names] if isinstance(names, str) else names
    above = [lists] if isinstance(lists, str) else lists or ["*"]
    if not all(isinstance(group, list | tuple | set) for group in (wanted, modules, above)):
        return None
    if not wanted or not all(type(n) is int and n >= 0 for n in wanted):
        return None
    if not all(isinstance(m, str) and m.replace("_", "a").replace(".", "a").isalnum() for m in modules):
        return None
    if not all(isinstance(name, str) and name.replace("_", "a").isalnum() for name in above if name != "*"):
        return None
    stem = ".*" if "*" in above else rf"(.*\.)?({'|'.join(above)})"
    ends = "|".join(m.replace(".", r"\.") for m in sorted(modules))
    return rf"{REGEX}{stem}\.({'|'.join(map(str, sorted(wanted)))})\.(.*\.)?({ends})"


def from_habit(word: str, value: Any, fields: Sequence[str]) -> tuple[str | None, Any]:
    """Our field and value for another tool's word; `(None, value)` when the rule has no such field."""
    name = ALIASES.get(word)
    if name is None or name not in fields:
        return None, value
    if name in ("match", "exclude"):
        value = module_patterns(value)
        if name == "exclude" and isinstance(value, str):
            value = (value,)
    return name, value


def module_patterns(value: Any) -> Any:
    """PEFT's `target_modules`: names match the ends of names, as ours do; one string is a regular expression over the whole name."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if not isinstance(value, str):
        return value
    if value == "all-linear":
        return "*"
    plain = value.replace("_", "a").replace(".", "a").isalnum()
    return value if plain or value.startswith(REGEX) or (is_glob(value) and value[0] == "*") else REGEX + value


#: PEFT's door → ours
DOOR = {
    "get_peft_model": "sparsify.compile(model, Plan([LoRA(…)]))",
    "LoraConfig": "a rule: LoRA(…), or LoRA(**config.to_dict())",
    "PeftConfig": "a Plan",
    "PeftModel": "the compiled model itself, with model.sparsify; sparsify.load(model, folder) opens an adapter",
    "AutoPeftModelForCausalLM": "sparsify.load(AutoModelForCausalLM.from_pretrained(…), folder)",
    "from_pretrained": "sparsify.load(model, folder)",
    "prepare_model_for_kbit_training": "nothing: sparsify.compile freezes what does not train; model.gradient_checkpointing_enable()",
    "TaskType": "nothing: the model says what it is",
}


def at_the_door(word: str) -> str:
    """What to say about a name that the package does not have."""
    hint = f"; here it is {DOOR[word]}" if word in DOOR else ""
    return f"module 'sparsify' has no attribute {word!r}{hint}"
