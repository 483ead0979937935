"""LoRA (arXiv 2106.09685) of convolutions: PEFT's `r × k × k` convolution and a `1 × 1` one behind it.

%y = aten.conv2d(%x, @conv.weight, @conv.bias, stride, padding, dilation)
──▶
%y = sparsify.lowrank_conv(%x, @conv.weight, @conv.bias, @conv.lora_A, @conv.lora_B, s, stride, padding, dilation)

The stored weight `(n, c, *k)`, flattened behind its outputs, changes by `s · B A` with `lora_B (n, r)`, `lora_A (r, c·∏k)`: in files and
mixes it is a low-rank change like those of linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.errors import VerifyError
from sparsify.methods.part import TrainedPart, beside, master_dtype
from sparsify.methods.sparse_lowrank import SparseLowRank, SparseLowRankMixin, describe_parts, kaiming_a
from sparsify.model.convolutions import padded
from sparsify.modules.adapted import carries
from sparsify.ops.lowrank_conv import convolved
from sparsify.program import ConvolutionNode, LinearNode, Program
from sparsify.program.graph_editor import GraphEditor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

ops = torch.ops.sparsify


class LowRankConvMixin(SparseLowRankMixin):
    """A convolution with a low-rank part: `lora_A (r, c·∏k)`, `lora_B (n, r)`; scale, dropout."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    trained_leaves = ("lora_A", "lora_B")
    part_buffers = ()
    entries_of_weight = ()
    support_leaf = ""

    # as `nn.Conv2d` calls it, whose input a host may name
    def forward(self, input: Float[Tensor, "N c *size"]) -> Float[Tensor, "N n *out"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert isinstance(self, nn.Conv1d | nn.Conv2d)
        self.check_dtype(input)
        single = input.dim() < self.weight.dim()
        x, zeros = padded(self, input.unsqueeze(0) if single else input)
        where = (list(self.stride), zeros, list(self.dilation))
        if self.dropout and self.training:
            small = self.lora_A.view(-1, *self.weight.shape[1:])
            y = convolved(x, self.weight, self.bias, *where)
            low = convolved(nn.functional.dropout(x, self.dropout), small, None, *where)
            y = y + self.scale * torch.einsum("nr,br...->bn...", self.lora_B.to(low.dtype), low)
        else:
            y = ops.lowrank_conv(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, *where)
        return y.squeeze(0) if single else y

    def folded(self, weight: Float[Tensor, "n c *k"]) -> Float[Tensor, "n c *k"]:
        return super().folded(weight.flatten(1)).view(weight.shape)

    def extra_repr(self) -> str:
        sizes = f"{self.weight.shape[1]}, {self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[2:])}"
        return f"{sizes}, stride={self.stride}, {describe_parts(self)}"


class LowRankConv2d(LowRankConvMixin, nn.Conv2d):
    """`nn.Conv2d` with a low-rank part; that of `nn.Conv1d` is made like it."""


carries("LowRankConv", LowRankConvMixin, LowRankConv2d)


@dataclass(frozen=True, eq=False)
class LowRankKernels(SparseLowRank):
    """The low-rank part of one convolution."""

    module_kind = "LowRankConv"
    mixin = LowRankConvMixin
    operators = {  # noqa: RUF012
        ops.lowrank_conv.default: "reference: a second convolution of r outputs, one small GEMM",
    }

    def initial(self, weight: Callable[[], Float[Tensor, "n c *k"]], program: Program, seed: int) -> dict[str, Tensor]:
        stored = program.tensor(self.param)
        dtype, device, size = master_dtype(stored), stored.device, stored[0].numel()
        a = kaiming_a(self.param, self.rank, size, seed).to(device, dtype)
        b = torch.zeros(stored.shape[0], self.rank, dtype=dtype, device=device)
        return {beside(self.param, "lora_A"): a, beside(self.param, "lora_B"): b}

    def insert(self, editor: GraphEditor, linear: LinearNode) -> None:
        raise VerifyError(
            f"{self.param}: node {linear.node.name} multiplies with a kernel that a low-rank part trains in"
        )

    def insert_convolution(self, editor: GraphEditor, found: ConvolutionNode) -> None:
        given = {
            "a": editor.beside(self.param, "lora_A"),
            "b": editor.beside(self.param, "lora_B"),
            "scale": self.scale,
        }
        given |= {"x": found.x, "weight": editor.input(self.param), "bias": found.bias}
        given |= {"stride": list(found.stride), "padding": list(found.padding), "dilation": list(found.dilation)}
        editor.replace(found.node, ops.lowrank_conv.default, **given)

    @classmethod
    def section(
        cls, parts: Sequence[TrainedPart], program: Program, ids: Callable[[Sequence[int]], str]
    ) -> tuple[str, list[str]]:
        return f"low-rank convolutions: {len(parts)}", super().section(parts, program, ids)[1]

    @classmethod
    def counted(cls, count: int) -> str:
        return f"{count} low-rank convolution{'s' if count != 1 else ''}"


__all__ = ["LowRankConv2d", "LowRankConvMixin", "LowRankKernels"]
