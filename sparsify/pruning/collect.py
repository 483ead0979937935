"""Seeing what the matrices of a model are multiplied with, whatever module or function does it.

    y = x Wᵀ      any product whose right operand lies in a watched parameter's memory gives (parameter, view, x, y)

Watching is by memory and not by module, so Linear, Conv1D, packed projections of `nn.MultiheadAttention`, functional
calls and packed experts (each expert a view, with its own tokens) are one case. A *view* is the rectangle of the parameter that
one product reads, in the orientation `(out, in)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from sparsify.calibration.checks import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Bool, Num, Shaped

    from sparsify.program.values import Batch, Inputs


@dataclass(frozen=True)
class View:
    """`(n out, m in)` entries of a parameter: offset and strides in elements, relative to the parameter's first element."""

    param: str
    offset: int
    shape: tuple[int, int]
    stride: tuple[int, int]

    def of(self, tensor: Tensor) -> Shaped[Tensor, "n m"]:
        """The rectangle of `tensor`, which has the parameter's layout; shares its memory."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class Product:
    """One product `y = x Wᵀ (+ bias)`: `x (tokens, m)`, `y (tokens, n)`; y is None for who looks before it is computed."""

    view: View
    x: Tensor
    y: Tensor | None
    bias: Tensor | None


class Watcher(TorchDispatchMode):
    """Calls `seen(product)` for every product with a watched parameter; other uses of one are noted in `other_uses`.

    before: look at the inputs before the product is computed, so that who has seen enough need not pay for it.
    """

    def __init__(
        self, params: Callable[[], Mapping[str, Tensor]], seen: Callable[[Product], None], before: bool = False
    ) -> None:
        super().__init__()
        self.params, self.seen, self.before = params, seen, before
        self.other_uses: dict[str, str] = {}
        self.ranges: dict[int, list[tuple[int, int, str]]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look the parameters up again (a streamed model's memory comes and goes)."""
        self.ranges.clear()
        for name, tensor in self.params().items():
            if tensor.device.type != "meta":
                start = int(tensor.storage_offset())
                place = self.ranges.setdefault(tensor.untyped_storage().data_ptr(), [])
                place.append((start, start + tensor.numel(), name))

    def owner(self, tensor: object) -> tuple[str, int] | None:
        """`(parameter, offset in elements)` when `tensor` lies in a watched parameter."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.device.type == "meta":
            return None
        for start, stop, name in self.ranges.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= tensor.storage_offset() < stop:
                return name, int(tensor.storage_offset()) - start
        return None

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if self.before:
            self.look(func, args, kwargs or {}, None)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not self.before:
            self.look(func, args, kwargs or {}, result)
        return result

    def look(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor | None) -> None:
        aten = torch.ops.aten
        name = func.name()
        if func is aten.mm.default:
            self.product(args[0], args[1], None, result)
        elif func is aten.addmm.default and kwargs.get("beta", 1) == 1:
            self.product(args[1], args[2], args[0], result)
        elif func is aten.linear.default:
            self.product(args[0], args[1].t(), args[2] if len(args) > 2 else None, result)
        elif func is aten.bmm.default and self.owner(args[1]) is not None:
            for slot in range(args[1].shape[0]):
                self.product(args[0][slot], args[1][slot], None, None if result is None else result[slot])
        elif name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback") and self.owner(args[1]) is not None:
            offsets = kwargs["offs"] if "offs" in kwargs else args[2]
            start = 0
            for slot, stop in enumerate(offsets.tolist()):
                self.product(args[0][start:stop], args[1][slot], None, None if result is None else result[start:stop])
                start = stop
        elif func in (aten.index.Tensor, aten.index_select.default, aten.bmm.default, aten.convolution.default):
            for operand in args[:2]:
                if (found := self.owner(operand)) is not None:
                    self.other_uses.setdefault(found[0], name)

    def product(
        self, x: Num[Tensor, "*t m"], weight_t: Num[Tensor, "m n"], bias: Tensor | None, y: Num[Tensor, "*t n"] | None
    ) -> None:
        """`weight_t (in, out)` as the operator got it; `bias` whatever it adds."""
        found = self.owner(weight_t)
        if found is None or weight_t.dim() != 2:
            return
        shape, stride = tuple(weight_t.shape[::-1]), tuple(weight_t.stride()[::-1])
        view = View(found[0], found[1], (shape[0], shape[1]), (stride[0], stride[1]))
        flat = None if y is None else y.reshape(-1, y.shape[-1])
        self.seen(Product(view, x.reshape(-1, x.shape[-1]), flat, bias))


#: memory, offset, shape, strides and version of a tensor
InputId: TypeAlias = "tuple[int, int | torch.SymInt, tuple[int, ...], tuple[int, ...], int]"


class InputIdentities:
    """Tells inputs apart while it lives, by memory, shape and version; memory that was freed and used again is another input.

    Weak references: the memory itself is released, but no other storage can get the same identity.
    """

    def __init__(self) -> None:
        self.alive: list[StorageWeakRef] = []

    def of(self, x: Tensor) -> InputId:
        storage = StorageWeakRef(x.untyped_storage())
        self.alive.append(storage)
        return storage.cdata, x.storage_offset(), tuple(x.shape), tuple(x.stride()), x._version


# --- which rows are tokens --------------------------------------------------------------------------------------------------------


def token_masks(batch: Batch) -> dict[str, Bool[Tensor, " T"]]:
    """Flat bool masks of the non-padding tokens by side: "encoder" (or the only side) and "decoder"."""
    if not isinstance(batch, Mapping):
        return {}
    masks: dict[str, Bool[Tensor, " T"]] = {}
    encoder, decoder = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    labels = batch.get("labels")
    if isinstance(encoder, Tensor) and encoder.dim() == 2:
        masks["encoder"] = encoder.reshape(-1).bool()
    if isinstance(decoder, Tensor) and decoder.dim() == 2:
        masks["decoder"] = decoder.reshape(-1).bool()
    elif isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        masks["decoder"] = labels.reshape(-1) != IGNORED
    return masks


def choose_mask(masks: Mapping[str, Bool[Tensor, " T"]], rows: int, side: str) -> Bool[Tensor, " T"] | None:
    """The mask of `side` when it has `rows` tokens; None when every row counts (pooled rows, frames without a mask)."""
    mask = masks.get(side)
    return mask if mask is not None and mask.numel() == rows else None


class PaddingDropper:
    """While active, modules that own packed experts see only non-padding tokens; the rows that they skip come out as zeros.

    Expert products read rows that are already routed, so padding has to go before the router's choice is applied.
    """

    def __init__(self, modules: Iterable[nn.Module], mask: Bool[Tensor, " T"] | None) -> None:
        self.modules, self.mask = list(modules), mask
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> PaddingDropper:
        mask = self.mask
        if mask is not None and not bool(mask.all()):
            for module in self.modules:
                self.handles.append(module.register_forward_pre_hook(self._drop, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._restore))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _drop(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Inputs:
        assert self.mask is not None
        mask = self.mask

        def keep(t: object) -> object:
            return t[mask.to(t.device)] if isinstance(t, Tensor) and t.dim() and t.shape[0] == mask.numel() else t

        kept: Inputs = pytree.tree_map(keep, (args, kwargs))
        return kept

    def _restore(self, _module: nn.Module, _args: object, output: object) -> object:
        assert self.mask is not None
        mask = self.mask
        kept = int(mask.sum())

        def spread(t: object) -> object:
            if not isinstance(t, Tensor) or not t.dim() or t.shape[0] != kept:
                return t
            full = t.new_zeros((mask.numel(), *t.shape[1:]))
            full[mask.to(t.device)] = t
            return full

        return pytree.tree_map(spread, output)
