"""The diagonal of the empirical Fisher information: the mean over samples of the squared gradient of each sample's own loss.

    F_ij = 1/N Σ_n (∂ loss(sample n) / ∂W_ij)²         "gradient" squares the gradient of a whole batch instead: Σ_b (Σ_{n∈b} …)²

All samples of a chunk at once: `vmap(grad(loss of one sample))` over `functional_call` (torch.func). The gradient of a weight is taken
with respect to a zero that is added to it, y = x Wᵀ + x Zᵀ, so that packed and adapted linears and Conv1D are measured alike and no
parameter of the model is touched. (RoSA, arXiv 2401.04679, section 4.2: the mask is the top-k of this diagonal.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sparsify.calibration.checks import IGNORED, all_finite, labels_of, squares_of
from sparsify.calibration.ranks import same_weights, together
from sparsify.calibration.statistics import (
    default_loss,
    hooks,
    layer_name,
    logical_shape,
    require_gradients,
    require_seen,
    run_batch,
)
from sparsify.errors import PlanError, SparsifyError
from sparsify.program.capture import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

    from sparsify.calibration.statistics import Loss
    from sparsify.program.values import Batch

MASKS = ("attention_mask", "decoder_attention_mask")
BUDGET = 1 << 28
"""Entries of per-sample gradients that are alive at a time (1 GiB in fp32); one sample of one weight always fits."""


class Probe(nn.Module):
    """A model whose linears add `x Zᵀ` to their output, Z (out, in) in fp32 or wider: buffers that `functional_call` replaces."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.keys = {name: f"zero_{number}" for number, name in enumerate(modules)}
        self.ran: dict[str, bool] = {}
        for key in self.keys.values():
            self.register_buffer(key, torch.zeros(0), persistent=False)

    def add(self, name: str) -> Callable[..., Tensor]:
        """The forward hook of one linear."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.ran[name] = True
            zero: Tensor = getattr(self, self.keys[name])
            return output + F.linear(args[0].to(zero.dtype), zero).to(output.dtype)

        return hook

    def forward(self, batch: Batch) -> object:
        return run_batch(self.model, batch)


def sample_squares(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    reduce: Callable[[str, Float[Tensor, "n m"]], None],
    loss: Loss | None = None,
    progress: bool = True,
    budget: int = BUDGET,
) -> None:
    """Call `reduce(name, squares)` with sums over samples of dW², `(out, in)` in fp32 (fp64 for models in fp64, or where the squares
    need it), once per chunk and layer.

    batches: every tensor has one row for each sample; the loss of a sample is `loss(outputs, batch)` of its row alone. Rows whose
    labels are all ignored carry no loss and are left out. Rows with equal padding are measured together.
    budget: entries of per-sample gradients alive at a time; samples, then layers, are taken in turns to keep to it.

    Raises PlanError, on all ranks: batches that are not made of rows, a model that vmap cannot trace (with the reason), a layer that
    never ran or that no gradient reaches. SparsifyError: a gradient that is NaN or Inf or zero everywhere.
    """
    moved: dict[str, bool] = {}
    ran: dict[str, bool] = {}
    shapes = {name: logical_shape(module) for name, module in modules.items()}
    same_weights(model, "calibration")
    with together(), evaluating(model), torch.no_grad():
        for group in groups_of({name: rows * columns for name, (rows, columns) in shapes.items()}, budget):
            probe = Probe(model, {name: modules[name] for name in group})
            size = max(1, budget // sum(shapes[name][0] * shapes[name][1] for name in group))
            with hooks([modules[name].register_forward_hook(probe.add(name)) for name in group]):
                bar = tqdm(batches, desc="calibrate: gradients of samples", disable=not progress, leave=False)
                for number, batch in enumerate(bar):
                    for chunk in chunks(number, batch, size):
                        found = chunk_gradients(probe, shapes, chunk, loss or default_loss, number)
                        for name, gradients in found.items():
                            if not all_finite(gradients):
                                raise SparsifyError(
                                    f"calibration batch {number}: the gradient of a sample at {layer_name(name)} has NaN or Inf"
                                )
                            squares = squares_of(gradients).sum(0)
                            moved[name] = moved.get(name, False) or bool(squares.any())
                            reduce(name, squares)
            ran |= probe.ran
    require_seen(modules, ran)
    require_gradients(modules, moved)
    for name in modules:
        if name not in moved:  # measured on other ranks only
            reduce(name, torch.zeros(shapes[name]))


def groups_of(sizes: Mapping[str, int], budget: int) -> list[list[str]]:
    """Layers, in order, in groups of at most `budget` entries; a larger layer is a group of its own."""
    found: list[list[str]] = []
    filled = budget + 1
    for name, size in sizes.items():
        if filled + size > budget:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += size
    return found


@dataclass(frozen=True)
class Chunk:
    """Some rows of a batch that are measured together.

    leaves: of the batch, in the order of `spec`. kinds: "row" for tensors with a row for each sample, "mask" for padding masks, of
    which the rows are equal here, so that code which asks `mask.all()` sees a number; "rest" for everything else.
    """

    leaves: Sequence[object]
    kinds: list[str]
    spec: pytree.TreeSpec

    @property
    def rows(self) -> list[Shaped[Tensor, "samples ..."]]:
        return [leaf for leaf, kind in zip(self.leaves, self.kinds, strict=True) if kind == "row" and has_rows(leaf)]

    def sample(self, rows: Sequence[Tensor]) -> Batch:
        """A batch of one sample, from one row of each tensor."""
        own = iter(rows)
        leaves: list[object] = [
            next(own)[None] if kind == "row" else leaf[:1] if kind == "mask" and has_rows(leaf) else leaf
            for leaf, kind in zip(self.leaves, self.kinds, strict=True)
        ]
        batch: Batch = pytree.tree_unflatten(leaves, self.spec)
        return batch


def chunks(number: int, batch: Batch, size: int) -> Iterator[Chunk]:
    """A batch in chunks of at most `size` rows with equal padding. Raises PlanError when its tensors have different numbers of rows."""
    leaves, spec = pytree.tree_flatten(batch)
    rows = {leaf.shape[0] for leaf in leaves if has_rows(leaf)}
    if len(rows) != 1:
        have = f"its tensors have {sorted(rows)} rows" if rows else "it holds no tensor with rows"
        raise PlanError(f"mask='fisher' takes calibration batch {number} apart into samples, but {have}")
    given = [batch.get(key) for key in MASKS] if isinstance(batch, Mapping) else []
    masks = [mask for mask in given if has_rows(mask)]
    kinds = ["mask" if any(leaf is m for m in masks) else "row" if has_rows(leaf) else "rest" for leaf in leaves]
    alike = torch.zeros(rows.pop(), dtype=torch.int64)
    if masks:
        alike = torch.cat([m.flatten(1).cpu().long() for m in masks], 1).unique(dim=0, return_inverse=True)[1]
    labels = labels_of(batch)
    counts = torch.ones_like(alike, dtype=torch.bool)
    if labels is not None and labels.dim() > 1:
        counts = (labels.flatten(1) != IGNORED).any(1).cpu()
    for group in alike.unique():
        for part in ((alike == group) & counts).nonzero()[:, 0].split(size):
            if part.numel():
                taken = [leaf[part.to(leaf.device)] if has_rows(leaf) else leaf for leaf in leaves]
                yield Chunk(taken, kinds, spec)


def has_rows(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def chunk_gradients(
    probe: Probe,
    shapes: Mapping[str, tuple[int, int]],
    chunk: Chunk,
    loss: Loss,
    number: int,
) -> dict[str, Float[Tensor, "samples n m"]]:
    """Per-sample gradients `(samples, out, in)` of every probed layer. Raises PlanError where vmap cannot follow the model."""

    def sample_loss(zeros: dict[str, Tensor], rows: list[Tensor]) -> Tensor:
        one = chunk.sample(rows)
        value = loss(functional_call(probe, zeros, (one,)), one)
        if value.numel() != 1:
            raise PlanError(f"the loss of calibration batch {number} must be one number, not {tuple(value.shape)}")
        return value.reshape(())

    reference = next((p for p in probe.model.parameters() if p.is_floating_point()), torch.zeros(()))
    work = torch.promote_types(reference.dtype, torch.float32)
    zeros = {
        probe.keys[name]: torch.zeros((), dtype=work, device=reference.device).expand(shapes[name])
        for name in probe.keys
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "There is a performance drop", UserWarning
            )  # an operator in a loop over samples
            found = vmap(grad(sample_loss), in_dims=(None, 0))(zeros, chunk.rows)
    except SparsifyError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise PlanError(
            f"mask='fisher' measures all samples of a batch at once, and {type(probe.model).__name__} cannot be traced for that by "
            f"torch.func.vmap: {reason}. mask='gradient' with calibration batches of one sample each measures the same"
        ) from error
    return {name: found[key] for name, key in probe.keys.items() if name in probe.ran}
