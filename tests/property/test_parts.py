"""Properties over random shapes, dtypes and supports: gradients are the masked dense gradient, nothing trained is the base."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsify
import sparsify.ops.sampled_product as ops
from sparsify import PaCA, Plan, RoSA
from sparsify.ops.sampled_product import oracle_sampled_product, sampled_by_tile, sampled_csr, sampled_per_entry

SIZES = st.integers(1, 9)
LEADING = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    assert found is not None
    assert found.shape == expected.shape
    scale = float(expected.abs().max().clamp_min(1.0)) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=BOUND[dtype] * scale)


@given(
    st.data(), SIZES, SIZES, LEADING, DTYPES, st.booleans(), st.integers(0, 3), st.floats(0.1, 3), st.integers(0, 2**30)
)
def test_sparse_and_low_rank_gradients_are_the_masked_dense_gradient(
    data, n, m, leading, dtype, transposed, rank, scale, seed
):
    support = data.draw(st.sets(st.integers(0, n * m - 1)))
    index = torch.tensor(sorted(support), dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    master = torch.float32 if dtype is torch.bfloat16 else dtype
    stored = random(seed, *((m, n) if transposed else (n, m)), dtype=dtype)
    x, g = random(seed + 1, *leading, m, dtype=dtype), random(seed + 2, *leading, n, dtype=dtype)
    values = (
        stored.reshape(-1)[index.long()].to(master).requires_grad_(True)
    )  # the weight's own: any weight may be written so
    a = random(seed + 3, rank, m, dtype=dtype).to(master).requires_grad_(True) if rank else None
    b = random(seed + 4, n, rank, dtype=dtype).to(master).requires_grad_(True) if rank else None
    x.requires_grad_(True)
    y = torch.ops.sparsify.sparse_lowrank_linear(x, stored.clone(), None, values, index, a, b, scale, transposed)
    y.backward(g)
    weight = (stored.t() if transposed else stored).double()
    dense = g.reshape(-1, n).double().t() @ x.detach().reshape(-1, m).double()  # of the whole weight
    close(values.grad, (dense.t() if transposed else dense).reshape(-1)[index.long()], dtype)
    if a is not None and b is not None:
        close(a.grad, scale * b.detach().double().t() @ dense, dtype)
        close(b.grad, scale * dense @ a.detach().double().t(), dtype)
        weight = weight + scale * b.detach().double() @ a.detach().double()
    close(y.detach(), x.detach().double() @ weight.t(), dtype)
    close(x.grad, g.double() @ weight, dtype)


@given(st.data(), SIZES, SIZES, LEADING, DTYPES, st.sampled_from([0, 1]), st.integers(0, 2**30))
def test_channel_gradients_are_the_masked_dense_gradient(data, n, m, leading, dtype, axis, seed):
    channels = sorted(data.draw(st.sets(st.integers(0, (n, m)[axis] - 1), min_size=1)))
    index = torch.tensor(channels)
    weight = random(seed, n, m, dtype=dtype)
    x, g = random(seed + 1, *leading, m, dtype=dtype).requires_grad_(True), random(seed + 2, *leading, n, dtype=dtype)
    master = torch.float32 if dtype is torch.bfloat16 else dtype
    block = weight.index_select(axis, index).to(master).contiguous().requires_grad_(True)
    y = torch.ops.sparsify.partial_linear_at(x, weight.clone(), None, block, index, axis)
    y.backward(g)
    dense = g.reshape(-1, n).double().t() @ x.detach().reshape(-1, m).double()
    close(block.grad, dense.index_select(axis, index), dtype)
    close(x.grad, g.double() @ weight.double(), dtype)
    close(y.detach(), x.detach().double() @ weight.double().t(), dtype)


@given(st.data(), SIZES, SIZES, st.integers(0, 6), DTYPES, st.integers(1, 200))
def test_all_sampled_products_agree(data, p, q, tokens, dtype, tile_bytes):
    support = sorted(data.draw(st.sets(st.integers(0, p * q - 1))))
    index = torch.tensor(support, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    a, b = random(1, tokens, p, dtype=dtype), random(2, tokens, q, dtype=dtype)
    expected = oracle_sampled_product(a.double(), b.double(), index)
    before, ops.TILE_BYTES = ops.TILE_BYTES, tile_bytes
    try:
        for variant in (sampled_by_tile, sampled_per_entry, sampled_csr, torch.ops.sparsify.sampled_product):
            close(variant(a, b, index), expected, dtype)
    finally:
        ops.TILE_BYTES = before


class Net(nn.Module):
    """One residual feed-forward, whose hidden channels a structure may reorder."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def loss_of(outputs: Tensor, _batch: Any) -> Tensor:
    return outputs.float().square().mean()


RULES = st.one_of(
    st.builds(
        RoSA,
        rank=st.integers(1, 3),
        density=st.floats(0, 1),
        mask=st.sampled_from(["gradient", "gradient_abs", "magnitude", "random"]),
        dropout=st.sampled_from([0.0, 0.5]),
        rslora=st.booleans(),
    ),
    st.builds(RoSA, rank=st.just(0), density=st.floats(0.01, 1), mask=st.sampled_from(["gradient", "random"])),
    st.builds(
        PaCA, rank=st.integers(1, 2), select=st.sampled_from(["random", "weight", "gradient"]), permute=st.booleans()
    ),
)


@given(RULES, st.integers(3, 8), st.integers(3, 8), st.booleans(), st.booleans(), st.integers(0, 99))
def test_before_the_first_step_every_plan_is_the_base(rule, width, hidden, bias, half, seed):
    dtype = torch.bfloat16 if half else torch.float32
    torch.manual_seed(seed)
    model, x = Net(width, hidden, bias).to(dtype), torch.randn(5, width, dtype=dtype)
    host = sparsify.compile(model, Plan([rule], seed=seed), example=x, calibration=[(x,)], loss=loss_of, progress=False)
    moved = bool(host.sparsify.program.moves)
    if moved:
        torch.testing.assert_close(host(x), model(x))
    else:
        assert torch.equal(host(x), model(x))
    state = host.sparsify.original_state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    host.train()(x).float().square().sum().backward()
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    host.sparsify.set_adapter(None)
    host.eval()
    assert torch.equal(host(x), model(x)) or moved
    restored = host.sparsify.restore()
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))
    assert torch.equal(restored(x), model(x))
