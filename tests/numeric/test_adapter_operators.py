"""Addends of many adapters against dense weights: every kind, ragged widths, any layout of slots, eager and by the generated kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import count_launches

from sparsify.errors import OperatorError, PositionError
from sparsify.kernels.cpu.adapters import add_by_kernel, kernel_adds
from sparsify.kernels.cpu.dispatch import usable_isa
from sparsify.ops import adapter_bias, adapter_columns, adapter_lowrank, adapter_rows, adapter_sparse

ORACLES = {
    "columns": adapter_columns.oracle,
    "rows": adapter_rows.oracle,
    "lowrank": adapter_lowrank.oracle,
    "sparse": adapter_sparse.oracle,
    "bias": adapter_bias.oracle,
}
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def operator(kind: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.sparsify, f"adapter_{kind}").default


def case(
    kind: str, m: int, n: int, slots: list[int], each: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Case, list[Tensor]]:
    """Arguments for rows with these slots, and the dense change of every slot (of a bias its vector). Widths differ, some are 0."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()  # noqa: E731
    count = max(slots, default=0) + 2
    table = torch.zeros(count, 3, dtype=torch.int64)
    values, places, dense = [torch.full((5,), float("nan")).double()], [torch.full((3,), -7)], [torch.zeros(n, m)]
    at, place = 5, 3
    for slot in range(1, count):
        width = 1 if kind == "bias" else int(torch.randint(0, min(m, n) + 1, (), generator=generator))
        change = torch.zeros(n, m, dtype=torch.float64)
        index = torch.empty(0, dtype=torch.int64)
        if kind == "columns":
            index, own = torch.randperm(m, generator=generator)[:width], random(width, n)
            change[:, index] = own.t()
        elif kind == "rows":
            index, own = torch.randperm(n, generator=generator)[:width], random(width, m)
            change[index] = own
        elif kind == "lowrank":
            a, b = random(width, m), random(width, n)
            change, own = b.t() @ a, torch.cat([a.flatten(), b.flatten()])
        elif kind == "sparse":
            flat, own = torch.randperm(m * n, generator=generator)[:width].sort().values, random(width)
            change.view(-1)[flat] = own
            index = torch.cat([flat // m, flat % m])
        else:
            own = change = random(n)
        table[slot] = torch.tensor([at, width, place])
        values.append(own.flatten())
        places.append(index)
        dense.append(change)
        at, place = at + own.numel(), place + index.numel()
    slot = torch.tensor(slots, dtype=torch.int64)
    offs = torch.zeros(count + 1, dtype=torch.int64)
    offs[1:] = torch.bincount(slot, minlength=count).cumsum(0)
    x, y = random(len(slots), each, m).to(dtype), random(len(slots), each, n).to(dtype)
    flat_values = torch.cat(values).nan_to_num(0.0).to(dtype)
    return (y, x, flat_values, torch.cat(places).int(), table, slot.argsort(stable=True), offs), dense


def expected(kind: str, arguments: Case, dense: list[Tensor], slots: list[int]) -> Tensor:
    y, x = arguments[0].double(), arguments[1].double()
    rows = [
        dense[s].expand(x.shape[1], -1) if kind == "bias" and s else x[i] @ dense[s].double().t()
        for i, s in enumerate(slots)
    ]
    return y + torch.stack(rows)


def tolerance(dtype: torch.dtype, m: int, n: int, wanted: Tensor) -> float:
    """One rounding of the result to the dtype, and of each of at most m + n sums inside, in fp32 at least, none larger than all."""
    largest = float(wanted.abs().max())
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return largest * (torch.finfo(dtype).eps + (m + n) * inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ORACLES)
def test_every_row_gets_what_its_slot_holds(kind, dtype):
    slots = [2, 0, 3, 2, 0, 1, 3]
    for m, n, each in ((7, 5, 1), (33, 50, 1), (20, 64, 3), (5, 3, 11)):
        arguments, dense = case(kind, m, n, slots, each, dtype)
        before = [t.clone() for t in arguments]
        found, wanted = operator(kind)(*arguments), expected(kind, arguments, dense, slots)
        assert found.dtype == dtype
        atol = tolerance(dtype, m, n, wanted)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)
        assert float((wanted - arguments[0].double()).abs().max()) > 10 * atol
        assert torch.equal(found[1], arguments[0][1])  # the base, bit for bit
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("kind", ORACLES)
def test_the_oracle_is_the_dense_change(kind):
    slots = [1, 0, 2, 1]
    arguments, dense = case(kind, 9, 6, slots, 2, torch.float64)
    torch.testing.assert_close(
        ORACLES[kind](*arguments), expected(kind, arguments, dense, slots), rtol=1e-13, atol=1e-13
    )


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(ORACLES)),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    slots=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    each=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_any_layout_of_slots(kind, m, n, slots, each, seed):
    arguments, dense = case(kind, m, n, slots, each, torch.float32, seed)
    wanted = expected(kind, arguments, dense, slots)
    torch.testing.assert_close(
        operator(kind)(*arguments).double(), wanted, rtol=0, atol=tolerance(torch.float32, m, n, wanted)
    )


@pytest.mark.parametrize("kind", ORACLES)
def test_the_operator_is_a_good_operator(kind):
    arguments, _ = case(kind, 7, 5, [2, 0, 1], 3, torch.float32)
    torch.library.opcheck(operator(kind), arguments)


@pytest.mark.parametrize("kind", ORACLES)
def test_gradients_of_inputs_are_right(kind):
    arguments, _ = case(kind, 4, 3, [2, 0, 1], 2, torch.float64)
    y, x, *rest = arguments
    assert torch.autograd.gradcheck(lambda y, x: operator(kind)(y, x, *rest), (y.requires_grad_(), x.requires_grad_()))


@pytest.mark.skipif(usable_isa() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("kind", ORACLES)
def test_the_kernel_answers_to_the_oracle_in_mixed_types_and_threads(kind):
    threads = torch.get_num_threads()
    for values, activations, isa in (
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, "portable"),
    ):
        slots = [3, 1, 0, 3, 3, 2, 1, 3, 3, 3]
        arguments, _ = case(kind, 37, 29, slots, 3, activations)
        y, x, held, *rest = arguments
        arguments = (y, x, held.to(values), *rest)
        wanted = ORACLES[kind](*arguments)
        found = y.clone()
        assert kernel_adds(found, x, arguments[2])
        torch.set_num_threads(2)
        try:
            add_by_kernel(kind, found, *arguments[1:], isa=isa)
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance(activations, 37, 29, wanted))


def test_what_does_not_fit_is_refused_by_name():
    arguments, _ = case("columns", 7, 5, [1, 2], 1, torch.float32)
    y, x, values, places, table, order, offs = arguments
    op = operator("columns")
    with pytest.raises(OperatorError, match="adapter_columns: y is .* all but the last axis must agree"):
        op(y[:1], x, values, places, table, order, offs)
    with pytest.raises(OperatorError, match="places is int64 .* expected int32 in one dimension"):
        op(y, x, values, places.long(), table, order, offs)
    with pytest.raises(OperatorError, match=r"table is int64 \(4, 2\), expected shape \(4, 3\)"):
        op(y, x, values, places, table[:, :2], order, offs)
    with pytest.raises(OperatorError, match=r"offs is int64 \(4,\), expected shape \(5,\)"):
        op(y, x, values, places, table, order, offs[:-1])
    with pytest.raises(OperatorError, match="2 tokens are no multiple of the 3 rows"):
        op(y, x, values, places, table, torch.tensor([0, 1, 2]), offs)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["columns", "rows", "sparse", "lowrank", "bias"])
def test_a_table_that_points_outside_reads_nothing(kind, compiled, monkeypatch):
    if not compiled:
        from sparsify.ops import adapter_tables

        monkeypatch.setattr(adapter_tables, "add_adapters", lambda *_: False)
    elif usable_isa() is None:
        pytest.skip("no C++ compiler here")
    for column, value in ((0, 10**12), (0, -1), (1, 10**12), (2, 10**9), (2, -1)):
        if (kind in ("lowrank", "bias") and column == 2) or (kind == "bias" and column == 1):
            continue
        arguments, _ = case(kind, 7, 5, [1, 2, 3], 1, torch.float32, seed=3)
        table = arguments[4].clone()
        table[1:, 1].clamp_(min=1)
        table[1:, column] = value
        with pytest.raises(PositionError, match=f"adapter_{kind}"):
            operator(kind)(*arguments[:4], table, *arguments[5:])
    for broken in ([0, 1, 2, 9], [9, 1, 2, 0]):
        arguments, _ = case(kind, 7, 5, [1, 2, 3, 1], 1, torch.float32, seed=3)
        table = arguments[4].clone()
        table[1:, 1].clamp_(min=1, max=1)
        with pytest.raises(PositionError, match=f"adapter_{kind}"):
            operator(kind)(*arguments[:4], table, torch.tensor(broken), arguments[6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ORACLES)
def test_the_gpu_kernel_answers_to_the_oracle_in_the_interpreter(kind, dtype, monkeypatch, tmp_path):
    launches = count_launches(monkeypatch, tmp_path)
    for m, n, each, slots in ((37, 70, 1, [2, 0, 3, 2, 1]), (70, 19, 9, [1, 3, 0, 1, 1])):
        arguments, _ = case(kind, m, n, slots, each, dtype)
        wanted = ORACLES[kind](*arguments)
        found = operator(kind)(*arguments)
        atol = tolerance(dtype, m, n, wanted) * (
            1 if kind != "lowrank" or dtype == torch.float32 else n
        )  # u is kept in 16 bits
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)
    assert sum(launches.values()) == (4 if kind == "lowrank" else 2)
