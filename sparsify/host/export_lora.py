"""`export_lora`: an adapter of a host as PEFT's LoRA directory, and the base that it belongs to."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsify.adapters import peft_export
from sparsify.adapters.adapter import Adapter
from sparsify.adapters.vllm_check import check_for_vllm
from sparsify.errors import AdapterError
from sparsify.files.atomic import check_target, reported
from sparsify.host.adapters import DEFAULT, WHOLE, write_once
from sparsify.model.sharded import back_to_pieces
from sparsify.modules.exact import changed

if TYPE_CHECKING:
    from sparsify.host.handle import Handle

REASONS_SHOWN = 4


def export_lora(
    handle: Handle,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    sparse: str = "refuse",
    changed_base: str = "refuse",
    engine: str = "peft",
    max_lora_rank: int | None = None,
) -> Path:
    """See `Handle.export_lora`."""
    if engine not in ("peft", "vllm"):
        raise AdapterError(f"export_lora: engine must be 'peft' or 'vllm', got {engine!r}")
    if max_lora_rank is not None and engine != "vllm":
        raise AdapterError("export_lora: max_lora_rank is a setting of vLLM's; pass engine='vllm' beside it")
    if sparse not in ("refuse", "merge"):
        raise AdapterError(f"export_lora: sparse must be 'refuse' or 'merge', got {sparse!r}")
    if changed_base not in ("refuse", "keep"):
        raise AdapterError(f"export_lora: changed_base must be 'refuse' or 'keep', got {changed_base!r}")
    if name is None and not handle.active.trainable and len(handle.active.weights) == 1:
        name = next(iter(handle.active.weights))
    source = handle.current() if name is None and handle.active.trainable else handle.get(name or DEFAULT)
    path = getattr(getattr(handle.host, "config", None), "_name_or_path", None) or None
    rest = tuple(d for d in source.deltas if d.kind not in ("sparse", "buffer"))
    moved = [d.param for d in source.deltas if d.kind == "buffer"]
    if moved and sparse == "refuse":
        raise AdapterError(
            f"export_lora: the buffer {moved[0]} moved in training, and a PEFT adapter has no place for it; keep it still while you "
            "train (its module in eval mode), merge() and save the whole model, or pass sparse='merge' to put it into the base"
        )
    if len(rest) < len(source.deltas):
        if sparse == "refuse":
            one = next(d for d in source.deltas if d.kind == "sparse")
            raise AdapterError(
                f"export_lora: {one.param} has a sparse part of {one.channels.numel()} scattered entries, which no low-rank "
                "matrix of useful rank equals; merge() and save the whole model, or pass sparse='merge' to fold it into the base"
            )
        path = str(Path(directory) / "base")
    elif changed_base == "refuse":
        say_base_changed(handle)
    kept = Adapter(rest, source.bases, source.info)
    exported = peft_export.export(kept, handle.host, handle.shapes(), handle.dense_base, path)
    if engine == "vllm":
        check_served(handle, exported, max_lora_rank)
    if len(rest) < len(source.deltas):
        write_sparse_base(handle, source, Path(directory) / "base")
    return write_once(handle, lambda: exported.write(directory), directory)


def check_served(handle: Handle, exported: peft_export.Exported, max_lora_rank: int | None) -> None:
    """Raises AdapterError with every reason why vLLM would not take the folder."""
    shapes = {name: tuple(tensor.shape) for name, tensor in exported.tensors.items()}
    kind = getattr(getattr(handle.host, "config", None), "model_type", None)
    report = check_for_vllm(exported.config, shapes, max_lora_rank, kind)
    if not report.fine:
        reasons = "; ".join(map(str, report.refusals[:REASONS_SHOWN]))
        more = f"; {len(report.refusals) - REASONS_SHOWN} more" if len(report.refusals) > REASONS_SHOWN else ""
        raise AdapterError(f"export_lora: vLLM would not take this adapter. {reasons}{more}")


def say_base_changed(handle: Handle) -> None:
    """Before an export: the adapter computes the same only over the base that Prune or Quantize made of the user's."""
    if handle.program.masks:
        raise AdapterError(
            "export_lora: Prune changed the base, and over the dense one PEFT computes something else; merge() and save the whole "
            "model, or pass changed_base='keep' if PEFT will load the adapter over the same pruned base"
        )
    if handle.program.quantize or handle.dequantised:
        warnings.warn(
            "export_lora: Quantize changed the base, and the adapter belongs to it: PEFT computes the same over a base that is "
            "quantised in the same way, and not quite over the dense one (changed_base='keep' says that you know)",
            stacklevel=4,
        )


def write_sparse_base(handle: Handle, source: Adapter, directory: Path) -> Path:
    """Save the base with only the sparse parts of an adapter folded in."""
    if not hasattr(handle.host, "save_pretrained"):
        raise AdapterError(
            "export_lora(sparse='merge') writes the base with save_pretrained, which this model does not have"
        )
    if handle.program.quantize:
        raise AdapterError("export_lora(sparse='merge') would write the packed base as if it were dense; merge() first")
    host_memory = torch.device("cpu")
    pieces = back_to_pieces(handle.host)
    state = handle.gathered_state(host_memory) if pieces else handle.original_state_dict()
    state |= {
        n: handle.layout(n).to_original(n.rpartition(".")[2], b) for n, b in handle.buffers.base.items() if n in state
    }
    for param in dict.fromkeys(d.param for d in source.deltas if d.kind not in WHOLE):
        state[param] = handle.base_original(param).to(state[param].device)
    for delta in source.deltas:
        if delta.kind == "buffer" and delta.param in state:
            state[delta.param] = delta.values.to(state[delta.param].device)
        if delta.kind == "sparse":
            weight = state[delta.param].view(-1)
            places = delta.channels.to(weight.device)
            weight[places] = changed(weight[places], delta.values, delta.exact, weight.dtype)

    def write() -> Path:
        check_target(directory / "config.json")
        with reported(directory):
            directory.mkdir(parents=True, exist_ok=True)
            handle.host.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
        return directory

    return write_once(handle, write, directory)
