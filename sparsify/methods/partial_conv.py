"""Input channels of a convolution that train: PaCA (arXiv 2503.01905), whose columns are those of the kernel flattened behind its outputs.

%y = aten.conv2d(%x, @conv.weight, @conv.bias, stride, padding, dilation)
──▶
%y = sparsify.partial_conv(%x, @conv.weight, @conv.bias, @conv.weight_slice, @conv.slice_channels, stride, padding, dilation)

A channel stands for the `∏k` columns of its taps: `weight_slice (n, s·∏k)`, `slice_channels (s·∏k,)`. In files, mixes and PEFT's folders
they are trained columns of a matrix `(n, c·∏k)`, as those of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from sparsify.errors import VerifyError
from sparsify.methods.channels import PartialMixin, TrainedSlice
from sparsify.methods.part import TrainedPart
from sparsify.model.convolutions import padded
from sparsify.modules.adapted import carries
from sparsify.program import ConvolutionNode, LinearNode, Program
from sparsify.program.graph_editor import GraphEditor
from sparsify.program.repeats import Line

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

ops = torch.ops.sparsify


class PartialConvMixin(PartialMixin):
    """A convolution with trained input channels."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    # as `nn.Conv2d` calls it, whose input a host may name
    def forward(self, input: Float[Tensor, "N c *size"]) -> Float[Tensor, "N n *out"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert isinstance(self, nn.Conv1d | nn.Conv2d)
        self.check_dtype(input)
        single = input.dim() < self.weight.dim()
        x, zeros = padded(self, input.unsqueeze(0) if single else input)
        where = (list(self.stride), zeros, list(self.dilation))
        y = ops.partial_conv(x, self.weight, self.bias, self.trained_block(), self.slice_channels, *where)
        return y.squeeze(0) if single else y

    def logical(self, stored: Float[Tensor, "n c *k"]) -> Float[Tensor, "n m"]:
        return stored.view(stored.shape[0], -1)

    @property
    def stored_axis(self) -> int:
        return 1

    def region(self, stored: Float[Tensor, "n c *k"]) -> Float[Tensor, "n j"]:
        return super().region(stored.contiguous())

    def folded(self, weight: Float[Tensor, "n c *k"]) -> Float[Tensor, "n c *k"]:
        return super().folded(weight.contiguous())

    def extra_repr(self) -> str:
        sizes = f"{self.weight.shape[1]}, {self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[2:])}"
        trained = self.weight_slice.shape[1] // self.weight[0, 0].numel()
        return f"{sizes}, stride={self.stride}, trained input channels={trained}"


class PartialConv2d(PartialConvMixin, nn.Conv2d):
    """`nn.Conv2d` with trained input channels; that of `nn.Conv1d` is made like it."""


carries("PartialConv", PartialConvMixin, PartialConv2d)


@dataclass(frozen=True)
class KernelColumns(TrainedSlice):
    """Input channels of one convolution; `channels` and `places` are their columns in the flattened kernel."""

    taps: int = 1

    module_kind = "PartialConv"
    mixin = PartialConvMixin
    operators = {  # noqa: RUF012  (a class attribute of a frozen dataclass)
        ops.partial_conv.default: "reference: columns copied into the kernel, one convolution",
    }

    def placed(self, program: Program) -> KernelColumns:
        return self  # nothing reorders the channels of a convolution

    def read(self, stored: Shaped[Tensor, "n c *k"]) -> Shaped[Tensor, "n j"]:
        flat = stored.reshape(stored.shape[0], -1)
        return flat.index_select(1, torch.tensor(self.places, device=stored.device))

    def write(self, stored: Float[Tensor, "n c *k"], block: Float[Tensor, "n j"]) -> None:
        columns = torch.tensor(self.places, device=stored.device)
        flat = stored.reshape(stored.shape[0], -1).index_copy(1, columns, block.to(stored.dtype))
        stored.copy_(flat.view(stored.shape))

    def insert(self, editor: GraphEditor, linear: LinearNode) -> None:
        raise VerifyError(f"{self.param}: node {linear.node.name} multiplies with a kernel whose channels train")

    def insert_convolution(self, editor: GraphEditor, found: ConvolutionNode) -> None:
        block, index = (editor.beside(self.param, leaf) for leaf in ("weight_slice", "slice_channels"))
        given = {"x": found.x, "weight": editor.input(self.param), "bias": found.bias, "block": block, "index": index}
        given |= {"stride": list(found.stride), "padding": list(found.padding), "dilation": list(found.dilation)}
        editor.replace(found.node, ops.partial_conv.default, **given)

    def check_node(self, node: fx.Node) -> None:
        """Its settings are the convolution's own."""

    def text(self) -> str:
        return f"trains {self.length // self.taps} input channels of its kernels"

    def row(self) -> str | None:
        return f"{self.param}: {self.length // self.taps} input channels, gathered (rule {self.rule})"

    @classmethod
    def section(
        cls, parts: Sequence[TrainedPart], program: Program, ids: Callable[[Sequence[int]], str]
    ) -> tuple[str, list[str]]:
        return f"channels of kernels: {len(parts)}", [Line.about(p.param, f"@{p.param} {p.text()}") for p in parts]

    @classmethod
    def counted(cls, count: int) -> str:
        return f"channels of {count} convolution{'s' if count != 1 else ''}"

    def saved_bytes(self, x: Float[Tensor, "N c *size"]) -> int | None:
        return x.numel() * x.element_size() // x.shape[1] * (self.length // self.taps)


__all__ = ["KernelColumns", "PartialConv2d", "PartialConvMixin"]
