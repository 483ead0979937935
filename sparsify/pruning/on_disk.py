"""Prune a model that is larger than memory: from one folder of safetensors files to another, block by block.

    result = prune_on_disk("llama-2-7b/", "llama-2-7b-50/", Plan([Prune(sparsity=0.5, method="wanda")]), calibration=batches)
    print(result)                                                    # what was pruned, error and seconds of each layer
    model = AutoModelForCausalLM.from_pretrained("llama-2-7b-50/")   # an ordinary checkpoint with zeros

In memory at any time: one block, what lies outside of blocks (embeddings, head), the hidden states of the calibration batches,
one Hessian with its factor, and the masks at one bit per weight. Interrupted, the same call goes on with the first block that
is not in `target` yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsify.errors import PlanError, Refusal, SparsifyError
from sparsify.files import strict_json
from sparsify.plan import Plan
from sparsify.program.capture import capture
from sparsify.pruning.assign import assign_prune_rules
from sparsify.pruning.rule import Prune
from sparsify.pruning.sequential import HESSIAN_BYTES, PruneResult, prune_model
from sparsify.pruning.streaming import StreamedWeights, parameters_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from sparsify.files.strict_json import Json
    from sparsify.program.values import Batch

BUFFER_BYTES = 1 << 30
MOST_LAYERS = 10_000


def prune_on_disk(
    source: str | Path,
    target: str | Path,
    plan: Plan,
    *,
    calibration: Iterable[Batch] | None = None,
    build: Callable[[], nn.Module] | None = None,
    example: Batch | None = None,
    progress: bool = True,
    max_hessian_bytes: int = HESSIAN_BYTES,
    dtype: torch.dtype | None = None,
) -> PruneResult:
    """Write the model in `source`, pruned as `plan` says, to the folder `target`.

    source: safetensors files, as `save_pretrained` writes them; config and tokenizer are copied.
    target: gets shards, index and `pruning/` (masks and statistics of each block).
    plan: `Prune` rules only; what else the plan does is for `sparsify.compile` on the pruned model.
    calibration: batches, as for `sparsify.compile`.
    build: makes the module with the names of the files; default: the class and config in `source/config.json`. It is called
        on the meta device and with `parameters_on_meta`, so it needs no memory for weights.
    example: one batch for the trace; Hugging Face models need none.
    max_hessian_bytes: of SparseGPT's statistics that are held at once; more layers are collected in several rounds.
    progress: show bars, and stages that take long, on stderr.
    dtype: floating weights are cast to it as they are read, and written so; None: as stored. `config.json` names it afterwards.

    Raises PlanError (another kind of rule, a rule that serves nothing, missing calibration, a `target` that holds another run) and
    SparsifyError (files that do not fit the module, NaN in the calibration).
    """
    for rule in plan.rules:
        if not isinstance(rule, Prune):
            raise PlanError(f"prune_on_disk: only Prune rules, not {rule}; compile the pruned model with the others")
    residence = StreamedWeights(source, target, dtype)
    build = build or (lambda: hugging_face_model(Path(source)))
    with torch.device("meta"):
        skeleton = build()
    residence.check_shapes(skeleton)
    check_buffers(skeleton, residence)
    program = capture(skeleton, example)
    wanted, refusals = assign_prune_rules(program, plan)
    with parameters_on_meta():
        host = build().eval()
    result = prune_model(
        host,
        program,
        list(wanted.items()),
        calibration,
        seed=plan.seed,
        progress=progress,
        max_hessian_bytes=max_hessian_bytes,
        residence=residence,
    )
    known = host.state_dict(keep_vars=True)
    unused = [unused_tensor(name) for name in residence.files if name not in known]
    result.refusals = [*refusals, *result.refusals, *unused]
    return result


def unused_tensor(name: str) -> Refusal:
    return Refusal(name, "the model has no such tensor, so it is not written")


def check_buffers(model: nn.Module, residence: StreamedWeights) -> None:
    """Raises SparsifyError when buffers, which get memory before anything is read, need far more than the files have."""
    needed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    given = sum({file.path: file.identity[2] for file in residence.given.values()}.values())
    if needed > given + BUFFER_BYTES:
        raise SparsifyError(
            f"{residence.source}: the model's buffers need {needed / 2**30:.1f} GiB, its files have {given / 2**30:.1f} GiB: does "
            "config.json belong to them?"
        )


def hugging_face_model(folder: Path) -> nn.Module:
    """An untrained model of the class and config that `folder/config.json` names. Raises PlanError when they make none."""
    kind, config = hugging_face_config(folder)
    try:
        return kind(config)
    except (Exception, RecursionError) as error:
        raise PlanError(
            f"{folder / 'config.json'}: {kind.__name__} cannot be made of it: {type(error).__name__}: {error}"
        ) from error


def hugging_face_class(folder: Path) -> type[PreTrainedModel]:
    """The class that `folder/config.json` names. Raises PlanError when there is none."""
    return hugging_face_config(folder)[0]


def hugging_face_config(folder: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and config of a folder. Raises PlanError when config.json is missing or damaged, or names no model of transformers."""
    import transformers

    path = folder / "config.json"
    if not path.exists():
        raise PlanError(f"{folder} has no config.json; pass build=… (a function that makes the module)")
    document = strict_json.read(path, PlanError)
    if not isinstance(document, dict):
        raise PlanError(f"{path}: a config must be a JSON object; pass build=… (a function that makes the module)")
    check_depth(path, document)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise PlanError(f"{path}: transformers cannot read it: {type(error).__name__}: {error}") from error
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list | tuple) and names else "none"
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise PlanError(f"{path}: transformers has no class {str(name)[:80]}; pass build=… (a function that makes it)")
    return kind, config


def check_depth(path: Path, document: dict[str, Json]) -> None:
    """Raises PlanError for a number of layers that no model has: making them would take for ever."""
    for name, value in document.items():
        if isinstance(value, dict):
            check_depth(path, value)
        elif ("layers" in name or name in ("n_layer", "depth")) and isinstance(value, int) and value > MOST_LAYERS:
            raise PlanError(f"{path}: {name} is {str(value)[:20]}; models have at most {MOST_LAYERS:,} layers")
