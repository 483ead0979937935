"""Lowered linears give and take the state dict of the linear that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.kernels.cpu.formats import pack
from sparsify.kernels.gpu.formats import pack_stream
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear, can_prepack
from sparsify.lowering.cpu.sparse_linear import GatedLinear, SparseLinear
from sparsify.lowering.cuda.fuse import GatedGpuLinear
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear, pack_smallest
from sparsify.modules.rows_of_gated import RowsOfGated

OUT, IN = 24, 40


def sparse(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    return weight * (torch.rand(OUT, IN, generator=generator) < 0.3)


def half(weight: Tensor, bias: Tensor, transposed: bool) -> nn.Module:
    gate = SparseLinear(pack(weight), bias, transposed=transposed)
    up = SparseLinear(pack(sparse(7)), torch.randn(OUT), transposed=transposed)
    return RowsOfGated(GatedLinear(gate, up, "silu"), 0, gate)


def both(weight: Tensor, bias: Tensor, transposed: bool) -> nn.Module:
    linear = SparseLinear(pack(weight), bias, transposed=transposed)
    gate, up = (SparseLinear(pack(weight[rows]), bias[rows]) for rows in (slice(0, OUT // 2), slice(OUT // 2, OUT)))
    return RowsOfGated(GatedLinear(gate, up, "silu"), 0, linear)


def gpu_rows(place: int) -> Callable[[Tensor, Tensor, bool], nn.Module]:
    """gate (0) or up (1) of a gated GPU linear, or the linear that was both (2)."""

    def build(weight: Tensor, bias: Tensor, transposed: bool) -> nn.Module:
        linear = GpuSparseLinear(pack_smallest(weight, None, False), bias, transposed=transposed)
        parts, biases = [sparse(7), sparse(7)], [torch.randn(OUT), torch.randn(OUT)]
        if place < 2:
            parts[place], biases[place] = weight, bias
        else:
            parts, biases = [weight], [bias]
        whole = GatedGpuLinear(pack_stream(torch.cat(parts), gated=True), torch.cat(biases), activation="silu")
        return RowsOfGated(whole, OUT if place == 1 else 0, linear)

    return build


LOWERED: dict[str, Callable[[Tensor, Tensor, bool], nn.Module]] = {
    "cpu": lambda w, b, t: SparseLinear(pack(w), b, transposed=t),
    "half": half,
    "both": both,
    "gpu gate": gpu_rows(0),
    "gpu up": gpu_rows(1),
    "gpu gate and up": gpu_rows(2),
    "onednn": lambda w, b, t: PrepackedLinear(w, b, transposed=t),
    "gpu": lambda w, b, t: GpuSparseLinear(pack_smallest(w, None, False), b, transposed=t),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", LOWERED)
def test_state_dicts_go_out_and_in_and_what_lacks_is_named(kind, transposed):
    weight, bias = sparse(0), torch.randn(OUT)
    if kind == "onednn" and not can_prepack(weight):
        pytest.skip("this build of PyTorch has no blocked weights")
    module: Any = LOWERED[kind](weight, bias, transposed)
    state = module.state_dict()
    assert set(state) == {"weight", "bias"}
    torch.testing.assert_close(state["weight"], weight.t() if transposed else weight)
    torch.testing.assert_close(state["bias"], bias)

    fresh = {"weight": sparse(1), "bias": torch.randn(OUT)}
    stored = {**fresh, "weight": fresh["weight"].t().contiguous() if transposed else fresh["weight"]}
    for lacking in stored:
        found = module.load_state_dict({k: v for k, v in state.items() if k != lacking}, strict=False)
        assert found.missing_keys == [lacking]
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict({**stored, "weight": torch.zeros(3, 5)})
    torch.testing.assert_close(module.state_dict()["weight"], state["weight"])
    module.load_state_dict(stored)
    x = torch.randn(5, IN)
    torch.testing.assert_close(module(x), nn.functional.linear(x, fresh["weight"], fresh["bias"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 1])
def test_of_two_joined_linears_one_may_have_no_bias(place: int) -> None:
    """`act(gate x) · (up x)` as one product: the side without a bias adds nothing."""
    torch.manual_seed(0)
    weights, biases = [sparse(3), sparse(7)], [torch.randn(OUT), torch.randn(OUT)]
    given = [None if side == place else bias for side, bias in enumerate(biases)]
    gated = GatedLinear(SparseLinear(pack(weights[0]), given[0]), SparseLinear(pack(weights[1]), given[1]), "silu")
    x = torch.randn(5, IN)
    gate, up = (
        x.double() @ w.double().t() + (0 if b is None else b.double()) for w, b in zip(weights, given, strict=True)
    )
    torch.testing.assert_close(gated(x).double(), nn.functional.silu(gate) * up, atol=1e-4, rtol=1e-4)
