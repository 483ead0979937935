"""Permutations form a group, and expand over sites consistently; arranged selections are contiguous."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsify
from sparsify import S2FT, Plan
from sparsify.errors import SparsifyError
from sparsify.passes.base import Context
from sparsify.passes.permute_weights import permute_weights
from sparsify.program.permutation import Permutation, invert_index
from sparsify.program.selection import arrange, choose, unit_channels
from sparsify.program.structure import Site, Structure
from sparsify.program.values import UnitChoice


@st.composite
def families(draw: st.DrawFn, count: int = 3) -> list[Permutation]:
    """Permutations of one size, each with one order or one per repeat."""
    size, repeats = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    order = st.permutations(range(size)).map(tuple)
    return [Permutation(tuple(draw(order) for _ in range(draw(st.sampled_from([1, repeats]))))) for _ in range(count)]


def same(a: Permutation, b: Permutation) -> bool:
    """Equal as actions: a single order serves every repeat."""
    longest = max(len(a.orders), len(b.orders))
    return a.orders * (longest // len(a.orders)) == b.orders * (longest // len(b.orders))


@given(families())
def test_group_laws(found):
    a, b, c = found
    identity = Permutation.identity(a.size)
    assert same(a.then(identity), a)
    assert same(identity.then(a), a)
    assert a.then(a.inverse()).is_identity()
    assert a.inverse().then(a).is_identity()
    assert a.inverse().inverse() == a
    assert same(a.then(b).then(c), a.then(b.then(c)))
    assert same(a.then(b).inverse(), b.inverse().then(a.inverse()))


def test_orders_of_the_outermost_loops_serve_all_loops_inside():
    """Two groups with an order each, three loops inside a group: what an order says holds for the three of its group."""
    site = Site("w", axis=0, block=1, outer=((2, 12), (3, 4)))
    index = Permutation(((1, 0, 2, 3), (0, 1, 3, 2))).expand(site, 24).view(2, 3, 4)
    assert (index[0] - index[0, :, 1:2]).tolist() == [[1, 0, 2, 3]] * 3
    assert (index[1] - index[1, :, :1]).tolist() == [[0, 1, 3, 2]] * 3


@st.composite
def sites(draw: st.DrawFn) -> tuple[Site, int, int]:
    """A site of `units` units, somewhere on an axis of `length` channels: side by side, or strided with loops around."""
    units, block, offset = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(0, 5))
    if draw(st.booleans()):  # interleaved: (units, 3, block), as in GPT-NeoX
        stride, outer = 3 * block, ()
        length = offset + units * stride
    else:  # outer loops: (count, units, block)
        count = draw(st.integers(1, 3))
        stride, outer = 0, ((count, units * block),) if count > 1 else ()
        length = offset + count * units * block
    return Site("w", 0, block, offset, outer, stride), units, length + draw(st.integers(0, 4))


@given(sites(), st.randoms(use_true_random=False))
def test_expansion_is_a_homomorphism_and_moves_whole_blocks(found, random):
    site, units, length = found

    def draw() -> Permutation:
        order = list(range(units))
        random.shuffle(order)
        return Permutation.of(order)

    a, b = draw(), draw()
    first, second = a.expand(site, length), b.expand(site, length)
    assert torch.equal(first.sort().values, torch.arange(length))
    assert torch.equal(a.then(b).expand(site, length), first[second])
    assert torch.equal(a.inverse().expand(site, length), invert_index(first))
    x = torch.arange(length)
    moved = x.index_select(0, first)
    for new, old in enumerate(a.orders[0]):
        assert torch.equal(moved[site.channels(new)], x[site.channels(old)])
    outside = sorted(set(range(length)) - {c for u in range(units) for c in site.channels(u)})
    assert torch.equal(moved[outside], x[outside]), "channels outside the site stay"


def test_one_order_per_repeat_moves_each_group_on_its_own():
    site = Site("w", 0, 2, outer=((2, 6),))
    index = Permutation(((2, 0, 1), (0, 1, 2))).expand(site, 12)
    assert index.tolist() == [4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("orders", [(), ((0, 0),), ((0, 2),), ((0, 1), (0,)), ((-1, 0),)])
def test_what_is_no_permutation_is_refused(orders):
    with pytest.raises(SparsifyError, match="permutation"):
        Permutation(orders)


def test_a_site_past_the_end_is_refused():
    with pytest.raises(SparsifyError, match="reaches past the end of an axis of 5 channels"):
        Permutation.of([1, 0, 2]).expand(Site("w", 0, 2), 5)


def is_range(places: torch.Tensor) -> bool:
    places = places.sort().values
    return places.numel() == 0 or torch.equal(places, torch.arange(int(places[0]), int(places[0]) + places.numel()))


@given(st.integers(1, 9), st.data())
def test_both_selections_of_plain_units_are_contiguous(units, data):
    ids = st.sets(st.integers(0, units - 1))
    consumers, producers = data.draw(ids), data.draw(ids)
    structure = Structure("s", "ffn", units, (Site("w", 1, 1, role="down"),))
    order, inner = arrange(structure, sorted(consumers), sorted(producers))
    assert inner is None
    assert sorted(order) == list(range(units))
    place = {u: i for i, u in enumerate(order)}
    assert is_range(torch.tensor([place[u] for u in consumers]))
    assert is_range(torch.tensor([place[u] for u in producers]))


@given(st.integers(1, 5), st.integers(2, 4), st.data())
def test_grouped_selections_are_contiguous_with_a_partial_group(groups, heads, data):
    """Query heads as `choose` gives them (whole groups and a part of one more), KV heads free."""
    width = 2
    o = Site("o", 1, heads * width, role="o")
    fine = Site("o", 1, width, outer=((groups, heads * width),), role="o")
    structure = Structure("a", "attention", groups, (o,), Structure("a", "attention", heads, (fine,)))
    scores = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=groups * heads, max_size=groups * heads)))
    chosen = choose(scores, data.draw(st.integers(1, groups * heads)), group=heads)
    producers = data.draw(st.sets(st.integers(0, groups - 1)))
    order, inner = arrange(structure, chosen, sorted(producers))
    length = groups * heads * width
    index = Permutation.of(order).expand(o, length)
    index = index[Permutation.of(torch.tensor(inner)).expand(fine, length)]
    places = invert_index(index)[unit_channels(o, structure)[torch.tensor(chosen)].reshape(-1)]
    assert is_range(places)
    spots = {g: i for i, g in enumerate(order)}
    assert is_range(torch.tensor([spots[g] for g in producers]))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=24), st.sampled_from([1, 2, 3]), st.booleans(), st.data())
def test_choice_has_the_asked_size_and_at_most_one_partial_group(values, group, largest, data):
    values = values * group
    count = data.draw(st.integers(1, len(values)))
    chosen = choose(torch.tensor(values), count, group=group, largest=largest)
    assert len(chosen) == len(set(chosen)) == count
    per_group = [sum(c // group == g for c in chosen) for g in range(len(values) // group)]
    assert sum(0 < n < group for n in per_group) <= 1
    if group == 1:
        best = sorted(values, reverse=largest)[:count]
        assert sorted(values[c] for c in chosen) == sorted(torch.tensor(best).tolist()) or sorted(
            torch.tensor(values)[list(chosen)].tolist()
        ) == sorted(torch.tensor(best).tolist())


@pytest.mark.parametrize("heads", [(3, 5), (4, 5), (0, 2), (0, 1, 2, 4), (3, 4, 5, 2)])
def test_chosen_heads_come_together_also_when_their_group_moves(heads):
    """Groups are ordered first, then the heads inside of where a group now stands: the chosen ones lie in front."""
    program = sparsify.analyse(tiny.llama(num_hidden_layers=1))
    structure = next(s for s in program.structures if s.kind == "attention")
    assert (structure.units, structure.inner.units) == (2, 3)
    choice = UnitChoice(structure.name, 0, tuple(sorted(heads)), (), "random")
    moved = permute_weights(program.replaced(choices=(choice,)), Context(Plan([S2FT(units=1)]))).program
    indices = {(move.param, move.axis): move.index for move in moved.moves}
    (o,), (q,) = structure.with_role("o"), structure.with_role("q")
    wanted = unit_channels(o, structure)[list(choice.consumers)].flatten()
    assert sorted(indices[o.param, o.axis][: wanted.numel()].tolist()) == sorted(wanted.tolist())
    assert torch.equal(indices[o.param, o.axis], indices[q.param, q.axis])  # both have a block of 8 for each head
    assert torch.equal(moved.tensors[o.param], program.tensor(o.param).index_select(1, indices[o.param, o.axis]))


def test_a_part_of_a_group_comes_from_the_group_whose_best_units_are_best():
    """Not from the one that is best as a whole, and after the whole groups are taken."""
    scores = torch.tensor([0.9, 0.0, 0.0, 0.5, 0.5, 0.5, 0.8, 0.8, 0.1])
    assert choose(scores, 1, group=3) == (0,)
    assert choose(scores, 2, group=3) == (6, 7)
    assert choose(scores, 4, group=3) == (0, 6, 7, 8)
