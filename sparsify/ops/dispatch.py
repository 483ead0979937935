"""Which kernel serves an operator: by device, type, size, density and switch. The only file here that knows `sparsify.kernels`.

    skinny_serves, skinny_by_kernel      products with few rows                 generated C++
    update_low_rank                      y += low second                        generated C++
    write_values                         trained values into a weight           Triton, generated C++
    sampled_product                      the gradient on a support              Triton, generated C++
    quantized_serves, quantized_product  the product with a packed weight       Triton
    channel_grad_serves, channel_gradient  the gradient of some channels        Triton, cuBLAS
    add_adapters                         y += what each token's adapter adds    Triton, generated C++

What no kernel serves is computed by the operator's own file. `SPARSIFY_KERNELS=off` leaves everything to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import sparsify.kernels.gpu.operator  # noqa: F401  registers the inference operators, packed_linear and gpu_linear
from sparsify.kernels.cpu.adapters import add_by_kernel, kernel_adds
from sparsify.kernels.cpu.sampled import kernel_serves, kernel_writes, sampled_by_kernel, write_by_kernel
from sparsify.kernels.cpu.skinny import skinny_by_kernel, skinny_serves, update_by_kernel, update_serves
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.adapters import LIMIT, add_on_gpu
from sparsify.kernels.gpu.build import can_launch, kernels_take
from sparsify.ops.checks import ascending

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Up to these densities the generated CPU kernel, else PyTorch's SDDMM over a CSR support, is cheaper than the dense tile, and
# below the last one a dot product per entry is (kernels/README.md has the measurements).
KERNEL_DENSITY = 0.06
CSR_DENSITY = {"cpu": 0.03}
PER_ENTRY_DENSITY = {"cpu": 0.0, "cuda": 0.0035}
# Tokens up to which, and densities of the support, a quantised base is multiplied without being unpacked: computed, not measured
ONE_PASS_DENSITY = {1: 1.0, 16: 0.01, launch.QUANTIZED_TOKENS: 0.005}


def update_low_rank(
    y: Float[Tensor, "T n"], low: Float[Tensor, "T r"], second: Float[Tensor, "r n"], scale: float
) -> bool:
    """`y += s low second` in place, for `y (T, n)`, `low (T, r)`, `second (r, n)`; False where no kernel serves."""
    if not update_serves(y, low.shape[1]):
        return False
    update_by_kernel(y, low * scale, second)
    return True


def write_values(weight: Float[Tensor, "p q"], values: Float[Tensor, " k"], index: Int[Tensor, " k"]) -> bool:
    """`weight.view(-1)[index] = values`, past the version counter; False where no kernel serves."""
    if weight.is_contiguous() and kernels_take(weight, values):
        launch.write_values(weight.data, values, index)
    elif kernel_writes(weight, values, index):
        write_by_kernel(weight.data, values, index)
    else:
        return False
    return True


def sampled_product(
    a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"], density: float
) -> Float[Tensor, " k"] | None:
    """`(aᵀ b)[index]` for sorted, distinct positions of this density; None where no kernel serves."""
    if kernels_take(a, b) and a.dtype == b.dtype:
        if density < PER_ENTRY_DENSITY["cuda"]:
            return launch.sampled_entries(a, b, index)
        return launch.sampled_tile(a, b, launch.support_of(index, a.shape[1], b.shape[1]))
    if density <= KERNEL_DENSITY and kernel_serves(a, b, index):
        return sampled_by_kernel(a, b, index)
    return None


def quantized_serves(
    x: Float[Tensor, "*t m"], rows: int, columns: int, transposed: bool, index: Int[Tensor, " k"] | None
) -> bool:
    """Whether the kernel over the packed weight serves the forward: few tokens, so that the weight's bytes are what counts (0.5
    to 1 per weight, where unpacking reads those, writes 2 and reads 2 again), rows of whole blocks, and a support so thin
    that its entries, which several tokens make dear, cost less than the unpacking (kernels/gpu/README.md has the sums)."""
    tokens = x.numel() // max(1, columns)
    if (
        transposed
        or columns % launch.QUANTIZED_BLOCK
        or not 1 <= tokens <= launch.QUANTIZED_TOKENS
        or not kernels_take(x)
    ):
        return False
    if index is not None and not ascending(index):
        return False  # the kernel looks positions up row by row
    density = 0.0 if index is None else index.numel() / (rows * columns)
    return density <= next(most for count, most in ONE_PASS_DENSITY.items() if tokens <= count)


def quantized_product(
    packed: list[Tensor],
    format: str,
    x: Float[Tensor, "T m"],
    bias: Float[Tensor, " n"] | None,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    u: Float[Tensor, "T r"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    rows: int,
) -> Float[Tensor, "T n"]:
    """`x W'ᵀ + s u Bᵀ + bias` over the packed weight, where `quantized_serves`."""
    return launch.quantized_product(packed, format, x, bias, values, index, u, b, scale, rows)


def channel_grad_serves(device: torch.device) -> bool:
    """Whether the gradient of trained channels is worth an operator of its own, `channel_grad`: on CUDA it is summed in fp32."""
    return device.type == "cuda" or can_launch(device)


def channel_gradient(
    g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], rows: Int[Tensor, " s"] | None
) -> Float[Tensor, "s m"]:
    """`(g[:, rows])ᵀ x` in fp32: the generated kernel, which gathers as it reads, for an index; a GEMM for all rows."""
    if rows is not None and kernels_take(g, x):
        return launch.partial_grad(g, x, rows)
    return launch.contiguous_grad(g if rows is None else g.index_select(1, rows), x)


def add_adapters(
    kind: str,
    y: Float[Tensor, "*t n"],
    x: Float[Tensor, "*t m"],
    values: Float[Tensor, " V"],
    places: Int[Tensor, " P"],
    table: Int[Tensor, "S 3"],
    order: Int[Tensor, " R"],
    offs: Int[Tensor, " S1"],
) -> bool:
    """Add to a contiguous y what each token's adapter adds, in place (`sparsify.ops.adapter_tables`); False where no kernel serves."""
    if kernels_take(y, x, values) and y.dtype == x.dtype == values.dtype:
        add_on_gpu(kind, y, x, values, places, table, order, offs)
        return True
    if not kernel_adds(y, x, values):
        return False
    add_by_kernel(kind, y, x, values, places, table, order, offs)
    return True


__all__ = [
    "CSR_DENSITY",
    "KERNEL_DENSITY",
    "LIMIT",
    "ONE_PASS_DENSITY",
    "PER_ENTRY_DENSITY",
    "add_adapters",
    "channel_grad_serves",
    "channel_gradient",
    "quantized_product",
    "quantized_serves",
    "sampled_product",
    "skinny_by_kernel",
    "skinny_serves",
    "update_low_rank",
    "write_values",
]
