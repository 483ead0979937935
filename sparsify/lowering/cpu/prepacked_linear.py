"""A dense linear whose weight lies in oneDNN's blocked layout: what serves where a packed weight does not pay.

    nn.Linear (out, in) ──▶ PrepackedLinear: the same bytes, reordered once instead of in every call

Torch's own dense product reads the weight as it lies; at 4 to 64 tokens that costs it most of the machine's peak.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from sparsify.errors import RefusedError
from sparsify.kernels.cpu.formats import check
from sparsify.kernels.cpu.operator import check_one_device
from sparsify.modules.kernel_module import KernelModule

if TYPE_CHECKING:
    from torch.fx.node import Argument

PREPACKED_DTYPES = (torch.float32, torch.bfloat16)
torch.library.define("sparsify::prepacked_linear", "(Tensor x, Tensor? bias, int out_features, int handle) -> Tensor")
handles = itertools.count()
alive: weakref.WeakValueDictionary[int, PrepackedLinear] = weakref.WeakValueDictionary()


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether this torch has oneDNN, and it takes this weight on this CPU."""
    if not torch.backends.mkldnn.is_available() or weight.dtype not in PREPACKED_DTYPES or weight.device.type != "cpu":
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """An (out, in) weight in the blocked layout that oneDNN prefers; `to_dense()` gives it back bit for bit."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def prepacked_product(x: torch.Tensor, blocked: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (…, in) times a weight from `prepack`, plus bias."""
    return torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


@torch.library.impl("sparsify::prepacked_linear", "CPU")
def prepacked_linear_cpu(x: torch.Tensor, bias: torch.Tensor | None, out_features: int, handle: int) -> torch.Tensor:
    """One node for compiled graphs, which take no tensor in oneDNN's layout: the weight is found by its module's handle. Raises
    RefusedError for a handle of no module, FormatError for arguments that do not fit its weight."""
    module = alive.get(handle)
    if module is None:
        raise RefusedError("sparsify::prepacked_linear: the module of this compiled graph no longer exists")
    check(out_features == module.out_features, f"prepacked_linear: {out_features} outputs, {module.out_features} rows")
    module.check(x, bias)
    return prepacked_product(x.contiguous(), module.blocked, bias)


@torch.library.register_fake("sparsify::prepacked_linear")
def prepacked_linear_fake(x: torch.Tensor, bias: torch.Tensor | None, out_features: int, handle: int) -> torch.Tensor:
    check_one_device("prepacked_linear", x, (bias,))
    torch._check(x.dim() > 0, lambda: "prepacked_linear: x has no axis")
    return x.new_empty((*x.shape[:-1], out_features))


class PrepackedLinear(KernelModule):
    """`y = x Wᵀ + b`; inference, but differentiable in x. transposed: the original weight was stored (in, out)."""

    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.transposed, self.dtype = transposed, weight.dtype
        self.blocked = prepack(weight)
        self.handle = next(handles)
        alive[self.handle] = self
        self.register_buffer("bias", bias.detach().contiguous() if bias is not None else None, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the original weight without its data."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=self.dtype, device="meta")

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.sparsify.prepacked_linear.default

    def arguments(self, tensor: Callable[[str], Argument]) -> dict[str, Argument]:
        bias = None if self.bias is None else tensor("bias")
        return {"bias": bias, "out_features": self.out_features, "handle": self.handle}

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the blocked weight, which is no buffer because oneDNN's layout has no storage that torch shows."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def check(self, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Refuse what oneDNN could not read safely: it goes by the weight's sizes. Raises FormatError."""
        name = f"PrepackedLinear({self.in_features} → {self.out_features})"
        check(x.device.type == "cpu" and x.dtype == self.dtype, f"{name}: x is {x.dtype} on {x.device}")
        check(x.dim() > 0 and x.shape[-1] == self.in_features, f"{name}: x has shape {tuple(x.shape)}")
        if bias is not None:
            fits = tuple(bias.shape) == (self.out_features,) and bias.dtype == self.dtype and bias.device == x.device
            check(fits and bias.is_contiguous(), f"{name}: bias is {bias.dtype} of shape {tuple(bias.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(
                x, self.blocked.to_dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
            )
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
            return torch.ops.sparsify.prepacked_linear(x, self.bias, self.out_features, self.handle)
        self.check(x, self.bias)
        return prepacked_product(x, self.blocked, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PrepackedLinear:
        probe = fn(torch.zeros(1))
        if probe.device.type != "cpu":
            raise RefusedError(f"this layer was lowered for the CPU and cannot move to {probe.device}")
        return self

    def dense(self) -> torch.Tensor:
        return self.blocked.to_dense()

    def take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.blocked = prepack(weight.to(self.dtype))
        if bias is not None and self.bias is not None:
            self.bias = bias.to(self.bias.dtype).contiguous()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "blocked": self.blocked.to_dense()}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.blocked = prepack(self.blocked)
        self.handle = next(handles)
        alive[self.handle] = self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
