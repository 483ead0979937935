"""Soundness over random modules: whatever detection offers can be permuted without changing the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify.passes.detect.axes import Axis, concat, factors, find, fix, leaves, pieces, product, unify
from sparsify.passes.detect.find_structures import find_structures
from sparsify.testing import difference, levels, outputs, permute_state, perturbed

SIZES = st.sampled_from([4, 6, 8, 12])
ACTIONS = st.one_of(
    st.tuples(st.just("linear"), SIZES),
    st.tuples(st.sampled_from(["relu", "silu", "norm", "softmax", "cumsum", "flip", "table", "residual"]), st.just(0)),
    st.tuples(
        st.sampled_from(["split", "swap", "glu", "regroup", "weigh", "half", "stack", "repeat"]),
        st.sampled_from([2, 3, 4]),
    ),
)


class Chain(nn.Module):
    """A random chain of operations on the last axis of `(batch, width)`."""

    def __init__(self, actions: list[tuple[str, int]], width: int = 6) -> None:
        super().__init__()
        self.actions: list[tuple[str, int]] = []
        self.layers = nn.ModuleDict()
        self.tables = nn.ParameterDict()
        start = width
        for i, (name, size) in enumerate([*actions, ("linear", 5)]):
            if name == "linear":
                self.layers[str(i)] = nn.Linear(width, size)
                width = size
            elif name in ("split", "swap", "regroup", "weigh") and width % size:
                continue
            elif name in ("glu", "half"):
                if width % 2:
                    continue
                width //= 2
            elif name == "table":
                self.tables[str(i)] = nn.Parameter(torch.randn(width))
            elif name == "weigh":
                self.tables[str(i)] = nn.Parameter(torch.randn(size))
            elif name in ("stack", "repeat"):
                if width * size > 48:
                    continue
                width *= size
            elif name == "residual" and width != start:
                continue
            self.actions.append((name, size))
            if name != "linear":
                self.layers[str(i)] = nn.Identity()
        self.keys = list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for key, (name, size) in zip(self.keys, self.actions, strict=True):
            if name == "linear":
                x = self.layers[key](x)
            elif name in ("relu", "silu"):
                x = getattr(F, name)(x)
            elif name == "norm":
                x = F.layer_norm(x, x.shape[-1:])
            elif name == "softmax":
                x = x.softmax(-1)
            elif name == "cumsum":
                x = x.cumsum(-1)
            elif name == "flip":
                x = x.flip(-1)
            elif name == "table":
                x = x * self.tables[key]
            elif name == "residual":
                x = x + start
            elif name == "split":
                first, *rest = x.split(x.shape[-1] // size, dim=-1)
                x = torch.cat([first.tanh(), *rest], dim=-1)
            elif name == "swap":
                x = torch.cat(x.chunk(size, dim=-1)[::-1], dim=-1)
            elif name == "glu":
                left, right = x.chunk(2, dim=-1)
                x = left.sigmoid() * right
            elif name == "half":
                x = x[..., ::2] + x[..., 1::2]
            elif name == "regroup":
                x = x.unflatten(-1, (size, -1)).mT.flatten(-2)
            elif name == "weigh":
                x = (x.unflatten(-1, (size, -1)) * self.tables[key][:, None]).flatten(-2)
            elif name == "stack":
                x = torch.stack([x * (i + 1) for i in range(size)], dim=-1).flatten(-2)
            elif name == "repeat":
                x = x.repeat_interleave(size, dim=-1)
        return x


@given(st.lists(ACTIONS, min_size=2, max_size=9), st.integers(0, 3))
def test_whatever_is_offered_is_exact(actions: list[tuple[str, int]], seed: int) -> None:
    model = Chain(actions)
    example = ((torch.randn(3, 6),), {})
    detection = find_structures(*zoo.lift(model, example))
    twin = perturbed(model, example)
    before = outputs(twin, example)
    for structure in (*detection.structures, *detection.others):
        for level, repeats in levels(structure):
            state = permute_state(twin, level, seed, repeats=repeats)
            assert difference(before, outputs(twin, example, state)) < 1e-9, f"{model.actions}\n{level}"


HEADS = st.sampled_from([(2, 1), (4, 2), (6, 2), (6, 3), (4, 4), (6, 1)])


@given(HEADS, st.booleans(), st.booleans(), st.sampled_from(["plain", "fused", "expand", "repeat"]), st.integers(0, 3))
def test_attention_layouts(heads: tuple[int, int], packed: bool, interleaved: bool, core: str, seed: int) -> None:
    """Packed, interleaved and separate projections, with every way to share keys among queries."""
    count, kv = heads
    group, dim, width = count // kv, 4, 10

    class Layout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(width, (count + 2 * kv) * dim)
            self.o = nn.Linear(count * dim, width)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            if interleaved:
                y = self.qkv(x).view(b, t, kv, group + 2, dim)
                q, k, v = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
            elif packed:
                q, k, v = self.qkv(x).split([count * dim, kv * dim, kv * dim], dim=-1)
                q, k, v = q.view(b, t, count, dim), k.view(b, t, kv, dim), v.view(b, t, kv, dim)
            else:
                q, k, v = self.qkv(x).view(b, t, count + 2 * kv, dim).split([count, kv, kv], dim=2)
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            if core == "fused":
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                if core == "expand":
                    k, v = (z[:, :, None].expand(b, kv, group, t, dim).reshape(b, count, t, dim) for z in (k, v))
                elif core == "repeat":
                    k, v = (z.repeat(1, group, 1, 1) for z in (k, v))
                else:
                    k, v = (z.repeat_interleave(group, dim=1) for z in (k, v))
                out = (q @ k.mT).softmax(-1) @ v
            return self.o(out.transpose(1, 2).flatten(2))

    model, example = Layout(), ((torch.randn(2, 5, width),), {})
    detection = find_structures(*zoo.lift(model, example))
    if core == "repeat" and interleaved and kv > 1 and group > 1:
        # Query i of group j meets key (j·g + i) mod kv: heads and groups are one axis twice, which no site describes.
        assert all(s.units != kv for s in detection.structures)
        return
    (structure,) = detection.structures
    sizes = sorted((structure.units, structure.inner.units if structure.inner else 1))
    assert structure.units == kv or core == "repeat"
    assert sizes == sorted((kv, group)) or (core == "repeat" and kv == group)
    twin = perturbed(model, example)
    before = outputs(twin, example)
    for found in (structure, *detection.others):
        for level, repeats in levels(found):
            state = permute_state(twin, level, seed, repeats=repeats)
            assert difference(before, outputs(twin, example, state)) < 1e-9, str(level)


# ------------------------------------------------------------------------------------------------------------ algebra


def spread(axis: Axis, orders: dict[int, list[int]]) -> list[int]:
    """The permutation of all positions of `axis` that permuting its leaves gives."""
    root = find(axis)
    if root.form is None:
        return orders.setdefault(
            id(root), torch.randperm(root.size).tolist() if root.fixed is None else list(range(root.size))
        )
    if root.form == "concat":
        out: list[int] = []
        for part in root.parts:
            base = len(out)
            out += [base + i for i in spread(part, orders)]
        return out
    places = [0]
    for part in root.parts:
        inner = spread(part, orders)
        places = [p * part.size + i for p in places for i in inner]
    return places


def tree(draw: st.DrawFn, size: int, depth: int = 3) -> Axis:
    """A random decomposition of an axis."""
    divisors = [d for d in range(2, size) if size % d == 0]
    form = draw(st.sampled_from(["leaf", "product", "concat"])) if depth else "leaf"
    if form == "product" and divisors:
        outer = draw(st.sampled_from(divisors))
        return product((tree(draw, outer, depth - 1), tree(draw, size // outer, depth - 1)))
    if form == "concat" and size > 2:
        at = draw(st.integers(1, size - 1))
        return concat((tree(draw, at, depth - 1), tree(draw, size - at, depth - 1)))
    return Axis(size) if size > 1 else product(())


@given(st.data(), st.sampled_from([6, 8, 12, 24]))
def test_unified_axes_are_permuted_alike(data: st.DataObject, size: int) -> None:
    """After `unify`, permuting the leaves moves both axes in the same way, whatever their decompositions were."""
    a, b, c = (tree(data.draw, size) for _ in range(3))
    shapes = [a, b, c]
    parts = [(axis.form, axis.parts) for axis in shapes]
    unify(a, b)
    unify(b, c)
    torch.manual_seed(size)
    orders: dict[int, list[int]] = {}
    expected = spread(a, orders)
    assert sorted(expected) == list(range(size))
    for form, children in parts:
        if form is not None:
            rebuilt = product(children) if form == "product" else concat(children)
            assert spread(rebuilt, orders) == expected


def test_common_refinements() -> None:
    a, b = product((Axis(6), Axis(4))), product((Axis(2), Axis(12)))
    unify(a, b)
    assert [f.size for f in factors(find(a))] == [2, 3, 4]
    a, b = concat((Axis(5), Axis(7))), concat((Axis(3), Axis(9)))
    unify(a, b)
    assert [p.size for p in pieces(find(b))] == [3, 2, 7]
    a, b = product((Axis(6), Axis(4))), concat((Axis(8), Axis(16)))
    unify(a, b)
    assert [leaf.size for leaf in leaves(b)] == [2, 4, 4, 4]


def test_fixing_a_whole_fixes_its_parts_now_and_later() -> None:
    from sparsify.passes.detect.axes import Reason

    outer, inner = Axis(3), Axis(4)
    whole = product((outer, inner))
    fix(whole, Reason("it is a test"))
    assert find(outer).fixed is not None
    late = product((Axis(2), Axis(2)))
    unify(inner, late)
    assert all(leaf.fixed is not None for leaf in leaves(late))
