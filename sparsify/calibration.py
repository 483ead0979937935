"""Calibration: run batches through the host and reduce what its linears see to per-channel statistics.

Only sums survive a hook: squares of inputs `(in,)` for activation scores, squares of one dense gradient `(n, m)` reduced to
`(m,)` at once, so that never more than one layer's gradient is alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sparsify.capture import evaluating
from sparsify.errors import PlanError

IGNORED = -100  # the label of positions that carry no loss


def run_batch(model: nn.Module, batch: Any) -> Any:
    """One forward on a batch: mapping → keywords, tuple or list → positional, tensor → one argument."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def token_mask(batch: Any, shape: torch.Size, decoder: bool = False) -> Tensor | None:
    """Flat bool mask of the non-padding tokens of an input `(*shape, channels)`, or None when every position counts.

    Decoders of encoder–decoders go by `decoder_attention_mask`, else by labels ≠ −100; everything else by `attention_mask`.
    A mask of another shape (pooled rows, downsampled frames) does not apply.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None and decoder and isinstance(batch.get("labels"), Tensor):
        mask = batch["labels"] != IGNORED
    if isinstance(mask, Tensor) and mask.dim() == 2 and (shape == mask.shape or shape == (mask.numel(),)):
        return mask.reshape(-1).bool()
    return None


def decoder_modules(model: nn.Module) -> set[nn.Module]:
    """Modules on the decoder's side of a Hugging Face encoder–decoder; empty for every other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return set()
    return set(model.modules()) - set(model.get_encoder().modules())  # type: ignore[operator]


def default_loss(outputs: Any, batch: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise PlanError(
            "gradient scores need a loss: put labels into the calibration batches, or pass loss=…(outputs, batch)"
        )
    return loss


def need_batches(batches: Sequence[Any] | Iterable[Any] | None, why: str) -> list[Any]:
    found = [] if batches is None else list(batches)
    if not found:
        raise PlanError(f"{why} needs calibration batches: sparsify.compile(…, calibration=[batch, …])")
    return found


@contextlib.contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_squares(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any], progress: bool = True
) -> dict[str, Tensor]:
    """Mean over tokens of the squared input of each module, per input channel, fp64 `(in,)`; padding is left out."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    current: dict[str, Any] = {}

    decoder = decoder_modules(model)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            keep = token_mask(current["batch"], args[0].shape[:-1], module in decoder)
            if keep is not None:
                x = x[keep.to(x.device)]
            total = x.to(torch.float32).square().sum(0, dtype=torch.float64).cpu()
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + x.shape[0]

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    with hooks(handles), evaluating(model), torch.no_grad():
        for batch in tqdm(batches, desc="calibrate: activations", disable=not progress, leave=False):
            current["batch"] = batch
            run_batch(model, batch)
    require_seen(modules, sums)
    result = {}
    for name in modules:  # one order on every rank
        total = sum_over_ranks(torch.cat([sums[name], torch.tensor([float(counts[name])], dtype=torch.float64)]))
        result[name] = total[:-1] / max(float(total[-1]), 1.0)
    return result


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a CPU tensor over all ranks, so that scores from different batches choose the same everywhere."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else value.device
    moved = value.to(device)
    distributed.all_reduce(moved)
    return moved.to(value.device)


def gradient_statistics(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Any],
    reduce: Callable[[str, Tensor], None],
    loss: Callable[[Any, Any], Tensor] | None = None,
    progress: bool = True,
) -> None:
    """Call `reduce(name, dW)` with each module's dense weight gradient `(out, in)` in fp32, once per batch and layer.

    The gradient is formed inside a backward hook from the layer's own input and output gradient and dropped when
    `reduce` returns: one dense gradient is alive at a time, and no `.grad` of the model is touched. A module that runs
    several times in one forward contributes the sum of its uses, at its last backward.
    """
    compute = loss or default_loss
    flags = [(p, p.requires_grad) for p in model.parameters()]
    pending: dict[str, Tensor] = {}
    left: dict[str, int] = {}

    def watch(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            x = args[0].detach()
            left[name] = left.get(name, 0) + 1
            started = not output.requires_grad
            if started:  # everything is frozen, so the graph starts at the first watched output
                output = output.detach().requires_grad_(True).clone()

            def backward(g: Tensor) -> None:
                part = g.detach().reshape(-1, g.shape[-1]).float().t() @ x.reshape(-1, x.shape[-1]).float()
                pending[name] = pending[name] + part if name in pending else part
                left[name] -= 1
                if left[name] == 0:
                    reduce(name, pending.pop(name))
                    seen[name] = True

            output.register_hook(backward)
            return output if started else None

        return hook

    seen: dict[str, bool] = {}
    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with hooks(handles), evaluating(model), torch.enable_grad():
            for batch in tqdm(batches, desc="calibrate: gradients", disable=not progress, leave=False):
                left.clear()
                pending.clear()
                compute(run_batch(model, batch), batch).backward()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    require_seen(modules, seen)


def require_seen(modules: Mapping[str, nn.Module], seen: Mapping[str, Any]) -> None:
    missing = [name for name in modules if name not in seen]
    if missing:
        raise PlanError(f"the calibration batches never ran {missing[0]} ({len(missing)} modules in all)")
