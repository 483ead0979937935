"""What must hold of calibration data, and where a NaN in it comes from.

    before a batch runs    it has tokens: rows, positions that are not padding, labels that count
    while it runs          every layer that is measured sees finite numbers; padding may hold anything
    afterwards             every layer was measured, and a gradient score measured something

A score that is NaN, or the same for every channel, still sorts, and the first channels would be taken in silence. So every
measurement that failed is an error, which names the batch, the layer and the place where the number first went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from jaxtyping import Float

    from sparsify.program.values import Batch

IGNORED = -100  # the label of positions that carry no loss
SAFE = (1e-15, 1e15)  # magnitudes whose squares fit fp32 with room for sums


def check_batch(number: int, batch: Batch) -> None:
    """Raises SparsifyError for a calibration batch that has no token: no inputs, no rows, or nothing but padding."""
    leaves = pytree.tree_leaves(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sized = [tensor for tensor in tensors if tensor.dim()]
    if not leaves or (sized and all(tensor.numel() == 0 for tensor in sized)):
        raise SparsifyError(f"calibration batch {number} is empty: drop it")
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name) if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() and not bool(mask.bool().any()):
            raise SparsifyError(
                f"calibration batch {number}: every position is padding ({name} is zero everywhere), so there is no token to "
                "measure: drop it, or check what makes the mask"
            )


def check_batches(batches: Sequence[Batch]) -> None:
    for number, batch in enumerate(batches):
        check_batch(number, batch)


def check_labels(number: int, batch: Batch) -> None:
    """Raises SparsifyError when labels are there and none of them counts."""
    if labels_ignored(batch):
        raise SparsifyError(
            f"every label of calibration batch {number} is ignored ({IGNORED}), so its loss says nothing: drop the batch, or check "
            "the collator that makes the labels"
        )


def labels_of(batch: Batch) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    return labels if labels.numel() else None


def labels_ignored(batch: Batch) -> bool:
    labels = labels_of(batch)
    return labels is not None and bool((labels == IGNORED).all())


def about_labels(number: int, batch: Batch) -> str:
    """What the labels have to do with a loss that is NaN or zero; empty when they look right."""
    labels = labels_of(batch)
    if labels is None or labels.dim() < 2 or not bool((labels[..., 1:] == IGNORED).all()):
        return f"; every label of calibration batch {number} is ignored ({IGNORED})" if labels_ignored(batch) else ""
    return (
        f"; every label of calibration batch {number} is ignored ({IGNORED}), except at the start of a row, where a language model "
        "predicts nothing"
    )


def check_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises SparsifyError naming the first weight with NaN or Inf, and the entry."""
    for name, weight in weights:
        if weight.device.type == "meta" or all_finite(weight):
            continue
        entry = tuple((~torch.isfinite(weight.detach())).nonzero()[0].tolist())
        raise SparsifyError(
            f"{name} has NaN or Inf (the first at {entry}), so nothing can be chosen by it: repair or load the weights again"
        )


def all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def column_squares(x: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
    """`Σ x²` over the rows of `x (rows, columns)`, fp64 on the CPU: squared in fp32, in fp64 where that over- or underflows."""
    if x.shape[0] == 0:
        return torch.zeros(x.shape[1], dtype=torch.float64)
    return squares_of(x).sum(0, dtype=torch.float64).cpu()


def rows_of(weight: Float[Tensor, "*shape"], axis: int) -> Float[Tensor, "rows channels"]:
    """A weight as `(rows, channels)`, its channels on `axis`; rows of all experts, where it has a third axis."""
    return weight.movedim(axis, -1).reshape(-1, weight.shape[axis])


def squares_of(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x²` entry by entry, in fp32, or in fp64 where that over- or underflows."""
    wide = x.detach().to(torch.float32) if x.dtype != torch.float64 else x.detach()
    largest = float(wide.abs().amax()) if wide.numel() else 0.0
    fits = largest == 0 or SAFE[0] <= largest <= SAFE[1]
    return (wide if fits else wide.double()).square() if x.device.type != "mps" else wide.square()


def nonfinite_input(number: int, batch: Batch, name: str, model: nn.Module, run: Callable[[], object]) -> SparsifyError:
    """The error for a layer that sees NaN or Inf: which batch, which layer, and where it began."""
    return SparsifyError(
        f"calibration batch {number} gives NaN or Inf at the input of {name}{blame(number, batch, model, run)}"
    )


def blame(number: int, batch: Batch, model: nn.Module, run: Callable[[], object] | None = None) -> str:
    """`; …` naming the input of the batch, or else the first module, where NaN or Inf begins. run: the batch's forward."""
    leaves, _ = pytree.tree_flatten_with_path(batch)
    texts = []
    for path, leaf in leaves:
        masked = "mask" in pytree.keystr(path)  # additive masks are −Inf by design
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not masked and not all_finite(leaf):
            texts.append(f"calibration batch {number}{pytree.keystr(path)} has NaN or Inf: drop or repair it")
            break
    found = None if run is None else first_nonfinite(model, run)
    texts += [] if found is None else [found]
    return "; " + ("; ".join(texts) or "drop or repair the batch")


class Found(BaseException):
    """The first module whose output is not finite: the rest of the forward need not run."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def first_nonfinite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Run a forward again and say which innermost module first gives NaN or Inf, and whether its own tensors do."""
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: object, output: object) -> None:
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
            bad = [t for t in tensors if not all_finite(t)]
            if not bad:
                return
            for leaf, own in module.named_parameters(recurse=False):
                if own.is_floating_point() and not all_finite(own):
                    raise Found(f"the parameter {name}.{leaf} has NaN or Inf: repair or load the weights again")
            small = bad[0].dtype == torch.float16
            hint = ": float16 ends at 65,504, so calibrate in bfloat16 or float32" if small else ""
            raise Found(f"it begins in the output of {name} ({type(module).__name__}, {bad[0].dtype}){hint}")

        return hook

    for name, module in model.named_modules():
        if name and next(module.children(), None) is None:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        run()
    except Found as found:
        return found.text
    except Exception:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None
