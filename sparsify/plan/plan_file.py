"""The plan file: one YAML document from a model to a trained adapter, for `sparsify plan`, `finetune` and whoever keeps a run.

    model: SmolLM2-135M                         a folder
    rules:                                      the plan: rules, their options, where
      - {rule: S2FT, fraction: 0.03, match: "model.layers.{0-14}.*"}
      - {rule: LoRA, rank: 8, match: [q_proj, v_proj]}
    data: {path: train.jsonl, eval: 0.05}
    training: {epochs: 2, batch: 8, length: 1024, learning_rate: 1e-4}
    output: runs/first

`read` refuses hostile files (`sparsify.files.strict_yaml`), checks every name and type, and answers an unknown key with the nearest.
Paths are relative to the folder in which the command runs, as on its command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from sparsify.errors import PlanError
from sparsify.files import strict_yaml
from sparsify.files.strict_json import short
from sparsify.plan.installed import find
from sparsify.plan.rules import MAX_ENTRIES, RULES, Plan, Rule, as_tuple, describe, fits, hints_of, make_rule, nearest

Section = TypeVar("Section")

RULE, METHOD = "rule", "method"
"""What the name of a rule stands behind. `method` is taken for it where there is no `rule` (Prune has a field of that name)."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned.

    path: a .jsonl or .parquet file, or a folder that `datasets` saved (`save_to_disk`) or that holds such files. split: which one of a
    folder with several. format: of a row: {"messages": […]}, {"text": …} or {"prompt": …, "completion": …}; "auto" looks at the first.
    eval: rows on which the loss is measured while training: another path, or a share of the rows, which the seed holds out.
    streaming: read the rows while training, over and over, with a window of 1,000 in memory, within which they are shuffled; needs
    `training.steps`, and `eval` by a path.
    """

    path: str = "train.jsonl"
    split: str | None = None
    format: Literal["auto", "messages", "text", "prompt-completion"] = "auto"
    eval: str | float | None = None
    streaming: bool = False

    def check(self) -> tuple[str, str] | None:
        if self.streaming and isinstance(self.eval, float | int):
            return "eval", "rows that are streamed cannot be divided: the path of other rows is needed"
        if isinstance(self.eval, float | int) and not 0 < self.eval < 1:
            return "eval", "a share between 0 and 1, or a path, is needed"
        return ("path", "an empty path") if not self.path else None


@dataclass(frozen=True, kw_only=True)
class Training:
    """How it is learned.

    steps: of the optimizer; without them `epochs` passes over the rows. batch: rows of one process and step; accumulate: steps of
    backward before one of the optimizer. sparse_learning_rate: of RoSA's S, lora_learning_rate: of low-rank factors (the paper has 2e-4 and
    7e-4); without them learning_rate, which everything else has.
    length: tokens at which a row is cut. packing: put several rows into one of `length` tokens; they do not see each other.
    warmup: steps, or below 1 a share of all. weight_decay: of
    what holds changes and of what trains in full; values of weights are never decayed. dtype: of the base's weights, "auto" as they are
    stored; what trains over 16 bits is kept in 32. seed: of the plan's random choices and of the order of rows. calibration: batches of
    the rows from which rules with data-driven choices (`select`, RoSA's `mask`) choose. save_every, eval_every, log_every: steps
    (eval_every: 0 for once at the end).
    """

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 8
    accumulate: int = 1
    length: int = 1024
    packing: bool = False
    learning_rate: float = 1e-4
    sparse_learning_rate: float | None = None
    lora_learning_rate: float | None = None
    warmup: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    calibration: int = 8
    save_every: int = 500
    eval_every: int = 0
    log_every: int = 10

    def check(self) -> tuple[str, str] | None:
        for name, least in (
            ("batch", 1), ("accumulate", 1), ("length", 2), ("save_every", 1), ("log_every", 1), ("eval_every", 0), ("warmup", 0),
            ("weight_decay", 0), ("max_grad_norm", 0), ("seed", 0), ("calibration", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                return name, f"at least {least} is needed"
        for name in ("batch", "accumulate", "length", "save_every", "log_every", "eval_every", "calibration"):
            if getattr(self, name) > 1 << 31:
                return name, "more than 2³¹"
        if self.steps is not None and not 1 <= self.steps <= 1 << 40:
            return "steps", "at least 1 is needed"
        if not 0 < self.epochs <= 1e6:
            return "epochs", "more than 0 and at most a million are needed"
        for name in ("learning_rate", "sparse_learning_rate", "lora_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= 1e3:
                return name, "a rate above 0 (and at most 1000) is needed"
        if self.seed >= 1 << 32:
            return "seed", "at most 32 bits"
        return None


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where it goes. dir: a folder: the adapter, its README.md, `plan.yaml` and checkpoints/. keep: the newest checkpoints that stay.
    peft: write the adapter as PEFT's LoRA too, in dir/peft."""

    dir: str = "adapter"
    keep: int = 2
    peft: bool = False

    def check(self) -> tuple[str, str] | None:
        if self.keep < 1:
            return "keep", "at least 1 is needed"
        return ("dir", "an empty path") if not self.dir else None


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A plan file's content. train: globs of modules that train in full, as in `Plan`. `plan` is what `sparsify.compile` takes."""

    model: str
    rules: tuple[Rule, ...]
    train: tuple[str, ...] = ()
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    output: Output = field(default_factory=Output)

    @property
    def plan(self) -> Plan:
        return Plan(self.rules, train=self.train, seed=self.training.seed)

    def to_dict(self) -> dict[str, Any]:
        """What a plan file says: rules without fields at their defaults, sections in full."""
        document: dict[str, Any] = {"model": self.model, "rules": [rule_entry(rule) for rule in self.rules]}
        if self.train:
            document["train"] = list(self.train)
        return document | {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


SECTIONS: dict[str, type[Any]] = {"data": Data, "training": Training, "output": Output}
SHORT = {"data": "path", "output": "dir"}
"""Sections that may be one word: the field that it fills."""
KEYS = ("model", "rules", "train", *SECTIONS)


def read(path: str | os.PathLike[str], changes: Sequence[str] = ()) -> PlanFile:
    """The plan file at `path` with `changes` ("training.steps=20", "rules.0.fraction=0.1") written over it. Raises PlanError."""
    where = os.fspath(path)
    document = strict_yaml.read(path, PlanError)
    return from_document(changed(document, changes, where), where)


def from_document(document: Any, where: str = "the plan") -> PlanFile:
    """A plan file from values as YAML or JSON hold them. Raises PlanError: "where: training.bach: unknown key; did you mean 'batch'?"."""
    if not isinstance(document, Mapping):
        raise PlanError(f"{where}: expected keys such as model, rules, data, got {short(document)}")
    check_keys(document, KEYS, where, "")
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise PlanError(f"{where}: model: expected the folder of a model, got {short(model)}")
    sections = {name: section(kind, document.get(name), f"{where}: {name}", name) for name, kind in SECTIONS.items()}
    train = document.get("train") or []
    rules = () if train and not document.get("rules") else read_rules(document.get("rules"), where)
    found = PlanFile(model=model, rules=rules, train=as_tuple(train), **sections)
    if found.data.streaming and found.training.steps is None:
        raise PlanError(
            f"{where}: training.steps: nobody knows how many rows a stream has, so the number of steps is needed"
        )
    try:
        found.plan  # noqa: B018  (checks what concerns several rules, and `train`)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
    return found


def read_rules(entries: Any, where: str) -> tuple[Rule, ...]:
    if not isinstance(entries, list) or not entries:
        raise PlanError(
            f"{where}: rules: expected a list such as [{{rule: S2FT, fraction: 0.03}}], got {short(entries)}"
        )
    if len(entries) > MAX_ENTRIES:
        raise PlanError(f"{where}: rules: {len(entries):,} of them, at most {MAX_ENTRIES:,} are read")
    rules = []
    for number, entry in enumerate(entries):
        place = f"{where}: rules.{number}"
        if not isinstance(entry, Mapping):
            raise PlanError(f"{place}: expected a rule and its options, got {short(entry)}")
        key = RULE if RULE in entry else METHOD
        if not isinstance(entry.get(key), str):
            raise PlanError(f"{place}: expected 'rule: …', one of {', '.join(RULES)}, got {short(entry.get(key))}")
        values = {name: as_tuple(value) for name, value in entry.items() if name != key}
        rule = rule_named(entry[key], place)
        try:
            rules.append(make_rule(rule, values, place))
        except PlanError as error:
            text = str(error)
            raise PlanError(text if text.startswith(place) else f"{place}: {text}") from None
    return tuple(rules)


def rule_named(name: str, where: str) -> type[Rule]:
    """The rule of this name, in whatever case. Raises PlanError with the nearest."""
    if name not in RULES:
        find(name)
    folded = {known.lower(): known for known in RULES}
    known = name if name in RULES else folded.get(name.lower())
    if known is None:
        close = next(iter(difflib.get_close_matches(name.lower()[:200], folded, n=1)), name)
        raise PlanError(f"{where}: unknown rule {short(name)}{nearest(folded.get(close, name), RULES)}")
    return RULES[known]


def section(kind: type[Section], value: Any, where: str, name: str) -> Section:
    """A section as its dataclass. Raises PlanError for unknown keys, other types, and values out of range."""
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    if isinstance(value, str) and name in SHORT:
        value = {SHORT[name]: value}
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise PlanError(f"{where}: expected keys ({', '.join(f.name for f in fields)}), got {short(value)}")
    check_keys(value, [f.name for f in fields], where, f"{name}.")
    hints = hints_of(kind)
    for key, found in value.items():
        if not fits(found, hints[key]):
            raise PlanError(f"{where}.{key}: expected {describe(hints[key])}, got {short(found)}")
    made: Any = kind(**value)
    wrong = made.check()
    if wrong is not None:
        raise PlanError(f"{where}.{wrong[0]}: {wrong[1]}, got {short(getattr(made, wrong[0]))}")
    return made


HABITS = {
    "lr": "learning_rate", "max_steps": "steps", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch",
    "batch_size": "batch", "micro_batch_size": "batch", "gradient_accumulation_steps": "accumulate", "max_length": "length",
    "max_seq_length": "length", "sequence_len": "length", "cutoff_len": "length", "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule", "warmup_ratio": "warmup", "warmup_steps": "warmup", "save_steps": "save_every",
    "eval_steps": "eval_every", "logging_steps": "log_every", "save_total_limit": "keep", "output_dir": "dir",
    "base_model": "model", "model_name_or_path": "model", "datasets": "data", "dataset": "data", "train_file": "path",
    "sample_packing": "packing", "neat_packing": "packing", "stream": "streaming",
    "num_epochs": "epochs", "max_epochs": "epochs", "max_train_steps": "steps", "total_steps": "steps", "num_train_steps": "steps",
    "train_batch_size": "batch", "gradient_clipping": "max_grad_norm", "clip_grad_norm": "max_grad_norm", "bf16": "dtype",
    "fp16": "dtype", "torch_dtype": "dtype", "precision": "dtype", "val_set_size": "eval", "test_size": "eval", "val_size": "eval",
    "validation": "eval", "validation_file": "eval", "eval_dataset": "eval", "test_datasets": "eval", "type": "format", "file": "path",
    "save_strategy": "save_every", "eval_strategy": "eval_every", "evaluation_strategy": "eval_every", "logging_strategy": "log_every",
    "lora_plus_lr": "lora_learning_rate",
}  # fmt: skip
"""Words of transformers, TRL, axolotl and LLaMA-Factory for what stands under another name here."""


A_RULE = "write it into rules: [{rule: LoRA, r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}]"
NOT_HERE = "leave it out: "
ANSWERS = {
    **dict.fromkeys(
        ("adapter", "method", "plan", "peft_config", "finetuning_type", "lora", "r", "rank", "alpha", "lora_r", "lora_rank",
         "lora_alpha", "lora_dropout", "lora_target", "lora_target_modules", "lora_target_linear", "target_modules"), A_RULE,
    ),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "quantization_config"),
        "write a rule beside the others: rules: [{rule: Quantize, format: nf4}, {rule: LoRA, …}]",
    ),
    **dict.fromkeys(("lora_modules_to_save", "modules_to_save"), "write train: [lm_head, …] for what trains in full"),
    **dict.fromkeys(("optimizer", "optim"), NOT_HERE + "AdamW trains, and values of weights are not decayed"),
    **dict.fromkeys(
        ("report_to", "wandb_project", "wandb", "use_wandb", "mlflow", "logging_dir"),
        NOT_HERE + "losses are said on stderr and written to training.json; in Python finetune(…, callbacks=[…]) takes transformers' own",
    ),
    **dict.fromkeys(("resume_from_checkpoint", "resume", "auto_resume_from_checkpoints"), "write --resume on the command line"),
    **dict.fromkeys(
        ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model"),
        NOT_HERE + "in Python finetune(…, callbacks=[…]) takes transformers' EarlyStoppingCallback",
    ),
    **dict.fromkeys(
        ("template", "chat_template", "special_tokens", "tokenizer_type", "tokens"), NOT_HERE + "it is the tokenizer's, in its folder"
    ),
    **dict.fromkeys(
        ("text_field", "dataset_text_field", "field", "columns", "text_column", "prompt_column"),
        "rows have 'text', 'messages', or 'prompt' and 'completion': rename the column",
    ),
    **dict.fromkeys(("max_samples", "shuffle"), NOT_HERE + "all rows are taken, in the order of training.seed"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), NOT_HERE + "rows are tokenised before training, or as they are streamed"),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "sdp_attention"), NOT_HERE + "write it into the model's config.json"
    ),
    **dict.fromkeys(
        ("stage", "do_train", "do_eval", "trl", "rl"),
        NOT_HERE + "this is supervised fine-tuning; TRL's trainers take a host (examples/chat_trl.py)",
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), NOT_HERE + "the launcher says it: accelerate launch, torchrun"),
}  # fmt: skip
"""Words of the same tools for what is said otherwise here, or not at all."""


def check_keys(found: Mapping[Any, Any], known: Sequence[str], where: str, prefix: str) -> None:
    for key in found:
        if key in known:
            continue
        ours = HABITS.get(key) if isinstance(key, str) else None
        if ours is not None and ours in known:
            raise PlanError(f"{where}: unknown key {short(key)}; here it is {prefix}{ours}")
        elsewhere = next(
            (n for n, kind in SECTIONS.items() if (ours or key) in {f.name for f in dataclasses.fields(kind)}), None
        )
        hint = f"; it is {elsewhere}.{ours or key} here" if elsewhere else nearest(str(key), list(known))
        if not elsewhere and isinstance(key, str) and key in ANSWERS:
            hint = f"; {ANSWERS[key]}"
        raise PlanError(f"{where}: unknown key {short(key)}{hint}")


def changed(document: Any, changes: Sequence[str], where: str) -> Any:
    """The document with every "a.b.0.c=value" written into it; values are read as YAML. Raises PlanError."""
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path.strip("."):
            raise PlanError(f"{short(change)}: expected key=value, such as training.steps=20")
        value, place = strict_yaml.parse(text, f"the value of {path}", PlanError), document
        *above, last = path.split(".")
        for step in above:
            if isinstance(place, dict) and isinstance(place.get(step), str) and step in SHORT:
                place[step] = {SHORT[step]: place[step]}
            place = entry_of(place, step, path, where)
        if isinstance(place, list):
            entry_of(place, last, path, where)
            place[int(last)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise PlanError(f"{path}: {where} has {short(place)} above {last!r}, so nothing can be set there")
    return document


def entry_of(place: Any, step: str, path: str, where: str) -> Any:
    if isinstance(place, list):
        if not step.isdecimal() or int(step) >= len(place):
            raise PlanError(f"{path}: {where} has {len(place)} entries there, 0 to {len(place) - 1}, not {step!r}")
        return place[int(step)]
    if isinstance(place, dict):
        if place.get(step) is None:
            place[step] = {}
        return place[step]
    raise PlanError(f"{path}: {where} has {short(place)} above {step!r}, so nothing can be set there")


def rule_entry(rule: Rule) -> dict[str, Any]:
    """A rule as a plan file writes it, without what is at its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(rule)}
    values = {k: plain(v) for k, v in rule.to_dict().items() if k != "rule" and v != defaults.get(k)}
    return {RULE: type(rule).__name__, **values}


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


# --- the schema ---


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the plan file, for editors: every key, type, choice and default."""
    sections = {}
    for name, kind in SECTIONS.items():
        whole = object_schema(kind, describe_with=kind.__doc__)
        sections[name] = {"anyOf": [{"type": "string"}, whole]} if name in SHORT else whole
    rules = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [rule_schema(name, rule) for name, rule in RULES.items()]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparsify plan file",
        "type": "object",
        "properties": {
            "model": {"type": "string", "minLength": 1, "description": "the folder of a Hugging Face model"},
            "rules": rules,
            "train": {
                "type": "array",
                "items": {"type": "string"},
                "description": "globs of modules and parameters that train in full",
            },
            **sections,
        },
        "required": ["model"],
        "anyOf": [{"required": ["rules"]}, {"required": ["train"]}],
        "additionalProperties": False,
    }


def rule_schema(name: str, rule: type[Rule]) -> dict[str, Any]:
    found = object_schema(rule, describe_with=rule.__doc__)
    found["properties"] = {RULE: {"enum": [name, name.lower()]}, **found["properties"]}
    found["required"] = [RULE]
    return found


def object_schema(kind: type[Any], describe_with: str | None) -> dict[str, Any]:
    hints, properties = hints_of(kind), {}
    for spec in dataclasses.fields(kind):
        properties[spec.name] = schema_of(hints[spec.name])
        if spec.default is not dataclasses.MISSING:
            properties[spec.name]["default"] = plain(spec.default)
    text = " ".join((describe_with or "").split())
    return {"type": "object", "description": text, "properties": properties, "additionalProperties": False}


def schema_of(hint: Any) -> dict[str, Any]:
    """JSON Schema of a type as `fits` checks it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(a) for a in args]}
    if origin in (tuple, list):
        inner = [a for a in args if a is not Ellipsis]
        return {"type": "array", "items": schema_of(inner[0]) if inner else {}}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of(args[1])}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", None: "null"}
    return {"type": names[hint]} if hint in names else {}


__all__ = ["Data", "Output", "PlanFile", "Training", "changed", "from_document", "read", "schema"]
