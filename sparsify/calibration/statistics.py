"""Calibration: run batches through the host and reduce what its linears see to per-channel statistics.

Only sums survive a hook: squares of inputs `(in,)` for activation scores, squares of one dense gradient `(n, m)` reduced to
`(m,)` at once, so that never more than one layer's gradient is alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sparsify.calibration.checks import (
    IGNORED,
    about_labels,
    all_finite,
    blame,
    check_batches,
    check_labels,
    column_squares,
    nonfinite_input,
)
from sparsify.calibration.ranks import same_weights, sum_over_ranks, together
from sparsify.errors import PlanError, SparsifyError
from sparsify.model.linears import stored_transposed
from sparsify.model.packed_experts import GroupedLinear
from sparsify.program.capture import evaluating

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch.utils.hooks import RemovableHandle

    from sparsify.program.values import Batch

#: a loss of the user's: `(outputs of the model, batch)` → one number; what the outputs are is between model and loss
Loss: TypeAlias = Callable[[Any, Any], Tensor]


def run_batch(model: nn.Module, batch: Batch) -> object:
    """One forward on a batch: mapping → keywords, tuple or list → positional, tensor → one argument."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def token_mask(batch: Batch, shape: torch.Size, decoder: bool = False) -> Bool[Tensor, " T"] | None:
    """Flat bool mask of the non-padding tokens of an input `(*shape, channels)`, or None when every position counts.

    Decoders of encoder–decoders go by `decoder_attention_mask`, else by labels ≠ −100; everything else by `attention_mask`.
    A mask of another shape (pooled rows, downsampled frames) does not apply.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    labels = batch.get("labels")
    if mask is None and decoder and isinstance(labels, Tensor):
        mask = labels != IGNORED
    if isinstance(mask, Tensor) and mask.dim() == 2 and (shape == mask.shape or shape == (mask.numel(),)):
        return mask.reshape(-1).bool()
    return None


def decoder_modules(model: nn.Module) -> set[nn.Module]:
    """Modules on the decoder's side of a Hugging Face encoder–decoder; empty for every other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return set()
    return set(model.modules()) - set(model.get_encoder().modules())  # type: ignore[operator]


def default_loss(outputs: object, batch: Batch) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise PlanError(
            "gradient scores need a loss: put labels into the calibration batches, or pass loss=…(outputs, batch)"
        )
    return loss


def need_batches(batches: Sequence[Batch] | Iterable[Batch] | None, why: str) -> list[Batch]:
    """The batches as a list, checked. Under `torch.distributed` a rank may have none, as long as another one has some."""
    with together():
        found = [] if batches is None else list(batches)
        check_batches(found)
    if batch_count(found) == 0:
        raise PlanError(f"{why} needs calibration batches: sparsify.compile(…, calibration=[batch, …])")
    return found


class Kept:
    """The batches of a generator, for every rule: read when the first asks, where an error in it reaches all ranks."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.read: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.read is None:
            self.read = list(self.batches)
        return iter(self.read)


def repeatable(batches: Iterable[Batch] | None) -> Iterable[Batch] | None:
    """The same batches, which can be iterated over any number of times."""
    return Kept(batches) if isinstance(batches, Iterator) else batches


def batch_count(batches: Sequence[Batch]) -> int:
    """Number of batches of all ranks."""
    return round(float(sum_over_ranks(torch.tensor([float(len(batches))], dtype=torch.float64))))


def given(batches: Iterable[Batch] | None) -> bool:
    """Whether calibration was passed to `compile`, on any rank."""
    return bool(float(sum_over_ranks(torch.tensor([float(batches is not None)]))))


@contextlib.contextmanager
def hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_squares(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch], progress: bool = True
) -> dict[str, Float[Tensor, " m"]]:
    """Mean over tokens of the squared input of each module, per input channel, fp64 `(in,)`; padding is left out.

    Raises SparsifyError, on all ranks, naming batch and layer where a token's input is NaN or Inf, and the layer that no token
    reached.
    """
    sums = {name: torch.zeros(logical_shape(module)[1], dtype=torch.float64) for name, module in modules.items()}
    counts = dict.fromkeys(modules, 0)
    seen: dict[str, bool] = {}
    decoder = decoder_modules(model)
    place: tuple[int, Batch] = (0, ())

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = True
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            keep = token_mask(place[1], args[0].shape[:-1], module in decoder) if len(args) == 1 else None
            if keep is not None:
                x = x[keep.to(x.device)]
            total = column_squares(x)
            if not all_finite(total):
                raise NonFiniteInput(name)
            sums[name] += total
            counts[name] += x.shape[0]

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    same_weights(model, "calibration")
    with together(), evaluating(model), torch.no_grad():
        try:
            with hooks(handles):
                for number, batch in enumerate(
                    tqdm(batches, desc="calibrate: activations", disable=not progress, leave=False)
                ):
                    place = (number, batch)
                    run_batch(model, batch)
        except NonFiniteInput as found:
            number, batch = place
            run = partial(run_batch, model, batch)
            raise nonfinite_input(number, batch, layer_name(found.layer), model, run) from None
    require_seen(modules, seen)
    result = {}
    for name in modules:  # one order on every rank
        total = sum_over_ranks(torch.cat([sums[name], torch.tensor([float(counts[name])], dtype=torch.float64)]))
        if float(total[-1]) == 0:
            raise SparsifyError(f"no token of the calibration batches reaches {layer_name(name)}: they are all padding")
        result[name] = total[:-1] / float(total[-1])
    return result


class NonFiniteInput(BaseException):
    """A watched layer saw NaN or Inf; leaves the forward, whatever the model catches."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


def layer_name(param: str) -> str:
    """The module that owns a weight, for messages."""
    return param.rpartition(".")[0] or param


def logical_shape(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a linear, a Conv1D, or one of ours that has no dense weight."""
    own = getattr(module, "logical_shape", None)
    if own is not None:
        return own()
    shape = module.get_parameter("weight").shape
    return (shape[1], shape[0]) if stored_transposed(module) else (shape[0], shape[1])


def gradient_shape(module: nn.Module) -> tuple[int, ...]:
    """Of what `gradient_statistics` reduces: `(out, in)`, of packed experts `(experts, out, in)`."""
    experts = (module.weight.shape[0],) if isinstance(module, GroupedLinear) else ()
    return (*experts, *logical_shape(module))


def gradient_statistics(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    reduce: Callable[[str, Float[Tensor, "*experts n m"]], None],
    loss: Loss | None = None,
    progress: bool = True,
) -> None:
    """Call `reduce(name, dW)` with each module's dense weight gradient `(out, in)` in fp32, once per batch and layer; of packed
    experts it is `(experts, out, in)`.

    The gradient is formed inside a backward hook from the layer's own input and output gradient and dropped when
    `reduce` returns: one dense gradient is alive at a time, and no `.grad` of the model is touched. A module that runs
    several times in one forward contributes the sum of its uses, at its last backward. A module that ran on other ranks only
    is reduced once with zeros.

    Raises SparsifyError or PlanError, on all ranks: a loss or a gradient that is NaN or Inf (with the batch and the layer), a
    batch whose labels are all ignored, a layer whose gradient is zero in every batch, so that nothing was measured.
    """
    compute = loss or default_loss
    flags = [(p, p.requires_grad) for p in model.parameters()]
    pending: dict[str, Tensor] = {}
    left: dict[str, int] = {}
    decoder = decoder_modules(model)
    place: tuple[int, Batch] = (0, ())

    def watch(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            x = args[0].detach()
            offsets = args[1] if len(args) > 1 else None  # of packed experts: their gradients stay apart
            keep = token_mask(place[1], x.shape[:-1], module in decoder) if offsets is None else None
            left[name] = left.get(name, 0) + 1
            ran[name] = True
            started = not output.requires_grad
            if started:  # everything is frozen, so the graph starts at the first watched output
                output = output.detach().requires_grad_(True).clone()

            def backward(g: Tensor) -> None:
                part = weight_gradient(x, g.detach(), keep, offsets)
                if part is None:
                    raise SparsifyError(
                        f"calibration batch {place[0]}: the gradient at {layer_name(name)} has NaN or Inf ({g.dtype})"
                        + (": float16 ends at 65,504, so calibrate in bfloat16" if g.dtype == torch.float16 else "")
                        + (blame(place[0], place[1], model) if not all_finite(x) else "")
                    )
                pending[name] = pending[name] + part if name in pending else part
                left[name] -= 1
                if left[name] == 0:
                    total = pending.pop(name)
                    now[name] = bool(total.any())
                    reduce(name, total)

            output.register_hook(backward)
            return output if started else None

        return hook

    ran: dict[str, bool] = {}
    now: dict[str, bool] = {}  # in this batch: whether the gradient that reached a module is not zero everywhere
    moved: dict[str, bool] = {}  # in any batch
    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    same_weights(model, "calibration")
    with together():
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            with hooks(handles), evaluating(model), torch.enable_grad():
                for number, batch in enumerate(
                    tqdm(batches, desc="calibrate: gradients", disable=not progress, leave=False)
                ):
                    place = (number, batch)
                    left.clear()
                    pending.clear()
                    if loss is None:
                        check_labels(number, batch)
                    now.clear()
                    value = compute(run_batch(model, batch), batch)
                    check_loss(number, batch, value, model)
                    value.backward()
                    if not any(now.values()):
                        check_labels(number, batch)
                    moved |= {name: moved.get(name, False) or nonzero for name, nonzero in now.items()}
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
    require_seen(modules, ran)
    require_gradients(modules, moved)
    for name, module in modules.items():
        if name not in moved:
            reduce(name, torch.zeros(gradient_shape(module)))


def weight_gradient(
    x: Float[Tensor, "*t m"],
    g: Float[Tensor, "*t n"],
    keep: Bool[Tensor, " T"] | None,
    offsets: Int[Tensor, " experts"] | None = None,
) -> Float[Tensor, "*experts n m"] | None:
    """`gᵀ x` in fp32 over tokens, `(out, in)`; None when it is not finite. keep: flat mask of the rows that are no padding, which
    are looked at alone when the whole is not finite. offsets: ends of experts' groups of rows, for `(experts, out, in)`."""
    rows_g, rows_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    if offsets is not None:
        part = torch.ops.sparsify.grouped_outer(rows_g.float(), rows_x.float(), offsets)
        return part if all_finite(part) else None
    part = rows_g.float().t() @ rows_x.float()
    if not all_finite(part) and keep is not None:
        kept = keep.to(x.device)
        part = rows_g[kept].float().t() @ rows_x[kept].float()
    return part if all_finite(part) else None


def check_loss(number: int, batch: Batch, value: object, model: nn.Module) -> None:
    """Raises PlanError for what is no scalar with a gradient, SparsifyError for NaN and Inf."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PlanError(f"the loss of calibration batch {number} must be one number, not {shape}: take its mean or sum")
    if not all_finite(value):
        labels = about_labels(number, batch)
        why = labels or blame(number, batch, model, partial(run_batch, model, batch))
        raise SparsifyError(f"the loss of calibration batch {number} is {float(value.detach()):g}{why}")
    if not value.requires_grad:
        raise PlanError(
            f"the loss of calibration batch {number} depends on none of the layers that are scored: compute it from the model's "
            "outputs, without detach() or no_grad()"
        )


def require_seen(modules: Mapping[str, nn.Module], seen: Mapping[str, bool]) -> None:
    """Raises PlanError, on all ranks, when some module ran on none."""
    missing = [name for name, times in zip(modules, on_ranks(modules, seen), strict=True) if not times]
    if missing:
        raise PlanError(f"the calibration batches never ran {missing[0]} ({len(missing)} modules in all)")


def require_gradients(modules: Mapping[str, nn.Module], moved: Mapping[str, bool]) -> None:
    """Raises SparsifyError, on all ranks, when the gradient of some module reached it on none, or is zero everywhere."""
    reached = on_ranks(modules, dict.fromkeys(moved, True))
    for name, here, nonzero in zip(modules, reached, on_ranks(modules, moved), strict=True):
        if not here:
            raise PlanError(
                f"the calibration batches run {layer_name(name)}, but no gradient of the loss reaches it: leave it out of the rule, "
                "or select by activation, by weight or at random"
            )
        if not nonzero:
            raise SparsifyError(
                f"the gradient at {layer_name(name)} is zero in every calibration batch, so nothing was measured there: check labels "
                "and loss (and fp16 underflow), or select by activation, by weight or at random"
            )


def on_ranks(names: Iterable[str], flags: Mapping[str, bool]) -> list[bool]:
    """For each name whether its flag is set on any rank."""
    own = torch.tensor([float(bool(flags.get(name, False))) for name in names], dtype=torch.float64)
    return (sum_over_ranks(own) > 0).tolist()
