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
from typing import Any

import torch
from torch import nn

from sparsify.capture import capture
from sparsify.errors import PlanError, Refusal
from sparsify.passes.prune import assign_prune_rules
from sparsify.plan import Plan
from sparsify.pruning.sequential import HESSIAN_BYTES, PruneResult, prune_model
from sparsify.pruning.streaming import StreamedWeights, parameters_on_meta
from sparsify.rules_prune import Prune


def prune_on_disk(
    source: str | Path,
    target: str | Path,
    plan: Plan,
    *,
    calibration: Iterable[Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
    example: Any = None,
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
        program = capture(build(), example)
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


def hugging_face_model(folder: Path) -> nn.Module:
    """An untrained model of the class and config that `folder/config.json` names."""
    import transformers

    kind = hugging_face_class(folder)
    return kind(transformers.AutoConfig.from_pretrained(folder))


def hugging_face_class(folder: Path) -> Any:
    """The class that `folder/config.json` names. Raises PlanError when there is none."""
    import transformers

    if not (folder / "config.json").is_file():
        raise PlanError(f"{folder} has no config.json; pass build=… (a function that makes the module)")
    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or ["none"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise PlanError(
            f"{folder / 'config.json'}: transformers has no class {names[0]}; pass build=… (a function that makes it)"
        )
    return kind
