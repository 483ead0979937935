"""Detection in plain modules, without a family: what is a structure, and for each a near miss with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from sparsify.passes.detect.find_structures import Detection, find_structures
from sparsify.testing import check_structure, perturbed

WIDTH, HIDDEN, HEADS, DIM = 10, 14, 3, 4


@torch.library.custom_op("sparsify_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.clone()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def analyse(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Detection:
    """Detection, with both controls run on everything that it offers."""
    example = (args, kwargs)
    detection = find_structures(*zoo.lift(model, example))
    twin = perturbed(model, example)
    for structure in (*detection.structures, *detection.others):
        check_structure(twin, example, structure, prepared=True)
    return detection


class Network(nn.Module):
    """up → between → down."""

    def __init__(self, between: Callable[[Tensor], Tensor], hidden: int = HIDDEN, inner: int | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(inner or hidden, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


class Attention(nn.Module):
    """Self-attention with `kv` key heads; `scores` changes the scores `(batch, heads, tokens, tokens)`."""

    def __init__(self, heads: int = HEADS, kv: int | None = None, scores: Callable | None = None) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv or heads
        self.q, self.k = nn.Linear(WIDTH, heads * DIM), nn.Linear(WIDTH, self.kv * DIM)
        self.v, self.o = nn.Linear(WIDTH, self.kv * DIM), nn.Linear(heads * DIM, WIDTH)
        self.change = scores

    def scores(self, s: Tensor) -> Tensor:
        return s if self.change is None else self.change(s)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (heads, DIM)).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
        )
        k, v = (t.repeat_interleave(self.heads // self.kv, dim=1) for t in (k, v))
        scores = q @ k.mT / DIM**0.5
        return self.o((self.scores(scores).softmax(-1) @ v).transpose(1, 2).flatten(2))


def x(batch: int = 2, tokens: int = 5) -> Tensor:
    return torch.randn(batch, tokens, WIDTH)


def kinds(detection: Detection) -> list[tuple[str, int]]:
    return [(s.kind, s.units) for s in detection.structures]


# ------------------------------------------------------------------------------------------------------------- found


@pytest.mark.parametrize(
    "between",
    [
        F.relu,
        lambda h: F.gelu(h).square(),
        lambda h: F.layer_norm(F.relu(h), (HIDDEN,)),
        lambda h: F.relu(h) / h.norm(dim=-1, keepdim=True),
        lambda h: F.relu(h).softmax(-1),
        lambda h: F.relu(h.clone().mul_(2.0)),
        lambda h: F.relu(h).transpose(1, 2).contiguous().transpose(1, 2),
        lambda h: F.relu(h).reshape(2, 5 * HIDDEN).view(2, 5, HIDDEN),
        lambda h: F.silu(h).roll(1, dims=1),
        lambda h: F.silu(h).cumsum(1),
        lambda h: torch.where(h > 0, h, h.exp()),
    ],
)
def test_network(between: Callable) -> None:
    detection = analyse(Network(between), x())
    assert kinds(detection) == [("ffn", HIDDEN)]
    assert [s.role for s in detection.structures[0].sites] == ["up", "vector", "down"]


def test_gated_network_packed() -> None:
    def glu(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    detection = analyse(Network(glu, 2 * HIDDEN, HIDDEN), x())
    assert [(s.role, s.offset) for s in detection.structures[0].sites] == [
        ("gate", 0),
        ("up", HIDDEN),
        ("vector", 0),
        ("vector", HIDDEN),
        ("down", 0),
    ]
    detection = analyse(Network(F.glu, 2 * HIDDEN, HIDDEN), x())
    assert [(s.role, s.offset) for s in detection.structures[0].sites[:2]] == [("up", 0), ("gate", HIDDEN)]


def test_network_in_einsum_with_weights_of_three_axes() -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, HEADS, DIM)) for _ in range(3))
            self.o = nn.Parameter(torch.randn(HEADS, DIM, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (torch.einsum("btm,mhd->bhtd", x, w) for w in (self.q, self.k, self.v))
            weights = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
            return torch.einsum("bhts,bhsd,hdm->btm", weights, v, self.o)

    detection = analyse(Einsum(), x())
    assert kinds(detection) == [("attention", HEADS)]
    assert [(s.role, s.axis, s.block) for s in detection.structures[0].sites] == [
        ("q", 1, 1),
        ("k", 1, 1),
        ("v", 1, 1),
        ("o", 0, 1),
    ]


def test_torch_modules() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    detection = analyse(encoder, torch.randn(2, 5, 12))
    assert kinds(detection) == [("attention", 3), ("ffn", 20)] * 2
    packed = [(s.role, s.block, s.offset) for s in detection.structures[0].producers]
    assert packed == [("q", 4, 0), ("k", 4, 12), ("v", 4, 24)]

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True, kdim=9, vdim=7)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v, need_weights=False)[0]

    detection = analyse(Cross(), torch.randn(2, 5, 12), torch.randn(2, 6, 9), torch.randn(2, 6, 7))
    assert kinds(detection) == [("attention", 3)]


def test_grouped_heads_may_move_inside_their_group() -> None:
    detection = analyse(Attention(6, 2), x())
    (structure,) = detection.structures
    assert (structure.units, structure.inner and structure.inner.units) == (2, 3)


def test_grouped_heads_with_a_parameter_of_the_group_index_stay() -> None:
    """A table indexed by the place inside the group alone: all groups would have to move alike."""

    class PerPlace(Attention):
        def __init__(self) -> None:
            super().__init__(6, 2)
            self.table = nn.Parameter(torch.randn(3))

        def scores(self, s: Tensor) -> Tensor:
            return (s.unflatten(1, (2, 3)) * self.table[:, None, None]).flatten(1, 2)

    (structure,) = analyse(PerPlace(), x()).structures
    assert structure.units == 2
    assert structure.inner is None


def test_heads_of_unequal_kinds_by_index() -> None:
    """Multi-query: one key head serves all; a fused operator that broadcasts groups on its own."""

    class Fused(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                layer(x).unflatten(-1, (heads, DIM)).transpose(1, 2)
                for layer, heads in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
            )
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o(out.transpose(1, 2).flatten(2))

    (structure,) = analyse(Fused(6, 2), x()).structures
    assert (structure.units, structure.inner and structure.inner.units) == (2, 3)
    (structure,) = analyse(Fused(6, 1), x()).structures
    assert (structure.units, structure.inner and structure.inner.units) == (1, 6)


def test_per_head_parameters_are_vectors() -> None:
    class Scaled(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
            self.bias = nn.Embedding(9, HEADS)
            places = torch.arange(5)
            self.register_buffer("places", (places[None] - places[:, None]) + 4)

        def scores(self, s: Tensor) -> Tensor:
            return s * self.temperature + self.bias(self.places).permute(2, 0, 1)

    (structure,) = analyse(Scaled(), x()).structures
    vectors = {(s.param, s.axis, s.block) for s in structure.with_role("vector")}
    assert {("temperature", 0, 1), ("bias.weight", 1, 1)} <= vectors


def test_head_gate_on_the_output() -> None:
    class Gated(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o((F.scaled_dot_product_attention(q, k, v) * self.gate).transpose(1, 2).flatten(2))

    (structure,) = analyse(Gated(), x()).structures
    assert "gate" in {s.param for s in structure.with_role("vector")}


def test_several_producers_and_consumers() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
            self.c, self.d = nn.Linear(HIDDEN, 7), nn.Linear(HIDDEN, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.relu(self.a(x) + self.b(x))
            return self.c(h), self.d(h)

    (structure,) = analyse(Many(), x()).structures
    assert [s.role for s in structure.sites if s.role != "vector"] == ["up", "up", "down", "down"]


def test_shared_network_is_one_structure() -> None:
    shared = Network(F.relu)
    detection = analyse(nn.Sequential(shared, nn.Tanh(), shared), x())
    assert kinds(detection) == [("ffn", HIDDEN)]


def test_experts_with_batched_products() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (
                nn.Parameter(torch.randn(3, WIDTH, HIDDEN)),
                nn.Parameter(torch.randn(3, HIDDEN, WIDTH)),
            )
            self.up_bias = nn.Parameter(torch.randn(3, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(torch.bmm(x, self.up) + self.up_bias[:, None]) @ self.down

    detection = analyse(Experts(), torch.randn(3, 5, WIDTH))
    assert kinds(detection) == [("ffn", HIDDEN)]
    assert [(s.axis, s.role) for s in detection.structures[0].sites] == [(2, "up"), (1, "down"), (1, "vector")]


def test_halves_treated_differently_are_two_structures() -> None:
    def halves(h: Tensor) -> Tensor:
        left, right = h.split([5, HIDDEN - 5], dim=-1)
        return torch.cat((left.relu(), right.tanh()), dim=-1)

    detection = analyse(Network(halves), x())
    assert kinds(detection) == [("ffn", 5), ("ffn", HIDDEN - 5)]


def test_residual_streams_are_not_offered() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(6, WIDTH), Network(F.relu), nn.Linear(WIDTH, 6)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.first(x).tanh()
            return self.last(stream + self.block(stream))

    detection = analyse(Residual(), torch.randn(2, 6))
    assert kinds(detection) == [("ffn", HIDDEN)]
    assert [s.units for s in detection.others] == [WIDTH]


def test_low_rank_pair_is_not_a_network() -> None:
    detection = analyse(Network(lambda h: h), x())
    assert not detection.structures
    assert [s.units for s in detection.others] == [HIDDEN]


def test_written_tensors_bind() -> None:
    """A buffer of zeros that is filled later is no longer uniform: what is written to it ties the axes."""

    def fill(h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        out[..., :4].copy_(h[..., 4:8].relu())
        out[..., 4:].copy_(h[..., 4:])
        return out

    detection = analyse(Network(fill), x())
    assert all(s.units != HIDDEN for s in detection.structures)


# -------------------------------------------------------------------------------------------------------- near misses


class Escapes(Network):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = self.between(self.up(x))
        return self.down(h), h


class TwoUses(Network):
    """The hidden activation also meets the input of the model."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.down(self.between(self.up(x)) + other)


class Buffered(Network):
    def __init__(self) -> None:
        super().__init__(F.relu)
        self.register_buffer("scale", torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)) * self.scale)


@pytest.mark.parametrize(
    ("model", "args", "clause"),
    [
        (lambda: Escapes(F.relu), (x(),), "'relu' (aten::relu) is an output of the model"),
        (lambda: TwoUses(F.relu), (x(), torch.randn(HIDDEN)), "'other' is an input of the model"),
        (Buffered, (x(),), "'scale' is a buffer or a constant"),
        (lambda: Network(lambda h: h.relu().cumsum(-1)), (x(),), "(aten::cumsum) depends on the order along it"),
        (lambda: Network(lambda h: h.relu().flip(-1)), (x(),), "(aten::flip) depends on the order along it"),
        (lambda: Network(lambda h: h.relu().sort(-1).values), (x(),), "(aten::sort) returns positions along it"),
        (lambda: Network(lambda h: mystery(h.relu())), (x(),), "(sparsify_tests::mystery) may depend on the order"),
        (lambda: Network(lambda h: h.relu() * torch.arange(HIDDEN)), (x(),), "(aten::arange) gives every position"),
        (lambda: Network(lambda h: h.relu()[..., torch.arange(HIDDEN).flip(0)]), (x(),), "reads it by index"),
        (lambda: Network(lambda h: h.relu().roll(3, -1)), (x(),), "(aten::roll) depends on the order"),
        (
            lambda: Network(lambda h: F.conv1d(h.relu(), torch.ones(5, 1, 3), padding=1, groups=5)),
            (x(),),
            "(aten::conv1d) slides along it",
        ),
    ],
)
def test_declined_network(model: Callable, args: tuple, clause: str) -> None:
    detection = analyse(model(), *args)
    assert not [s for s in detection.structures if s.units == HIDDEN]
    declined = next(d for d in detection.declined if d.kind == "ffn")
    assert clause in declined.reason
    assert declined.reason.startswith(f"Its {HIDDEN} channels must keep their order, because ")
    assert declined.reason.endswith(".")
    assert "up" in {site.role for site in declined.sites}


@pytest.mark.parametrize(
    ("model", "args", "clause"),
    [
        (
            lambda: Attention(scores=lambda s: s + torch.arange(HEADS)[:, None, None] * torch.arange(5)),
            (x(),),
            "(aten::arange) gives every position",
        ),
        (lambda: Attention(scores=lambda s: s + torch.tensor([0.1, 0.2, 0.3])[:, None, None] * s), (x(),), "constant"),
        (lambda: Attention(scores=lambda s: mystery(s)), (x(),), "(sparsify_tests::mystery)"),
        (lambda: Attention(scores=lambda s: s.cumsum(1)), (x(),), "(aten::cumsum) depends on the order"),
        (lambda: Attention(heads=1), (x(),), "has a single head"),
    ],
)
def test_declined_attention(model: Callable, args: tuple, clause: str) -> None:
    detection = analyse(model(), *args)
    assert not detection.structures
    (declined,) = detection.declined
    assert declined.kind == "attention"
    assert clause in declined.reason


def test_mask_per_head_from_outside_declines() -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            self.change = lambda s: s.masked_fill(mask, -1e9)
            return super().forward(x)

    detection = analyse(Masked(), x(), mask=torch.rand(2, HEADS, 5, 5) > 0.9)
    assert not detection.structures
    assert "'mask' is an input of the model" in detection.declined[0].reason
    detection = analyse(Masked(), x(), mask=torch.rand(2, 1, 5, 5) > 0.9)
    assert kinds(detection) == [("attention", HEADS)]


def test_unequal_groups_decline() -> None:
    class Unequal(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (5, DIM)).transpose(1, 2)
            k, v = (layer(x).unflatten(-1, (2, DIM)).transpose(1, 2) for layer in (self.k, self.v))
            k, v = (t[:, [0, 0, 1, 1, 1]] for t in (k, v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = Unequal(5, 1)
    model.k, model.v = nn.Linear(WIDTH, 2 * DIM), nn.Linear(WIDTH, 2 * DIM)
    detection = analyse(model, x())
    assert not detection.structures
    assert "'lifted_tensor_0' is a buffer or a constant" in detection.declined[0].reason


def test_projection_shared_with_another_place_declines() -> None:
    """The up projection is also read by the output: permuting it would show."""

    class Shared(Network):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.down(F.relu(self.up(x))), self.up(x * 2)

    detection = analyse(Shared(F.relu), x())
    assert not detection.structures
    assert "is an output of the model" in detection.declined[0].reason


def test_one_projection_for_two_networks_ties_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 6), nn.Linear(HIDDEN, 7)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(F.relu(self.up(x))), self.b(torch.tanh(self.up(x * 2)))

    (structure,) = analyse(Tied(), x()).structures
    assert {s.param for s in structure.with_role("down")} == {"a.weight", "b.weight"}


def test_regrouping_without_common_units_declines() -> None:
    class Regrouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
            self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).relu().unflatten(-1, (4, 3)) * self.a[:, None]
            return self.down((h.flatten(-2).unflatten(-1, (6, 2)) * self.b[:, None]).flatten(-2))

    detection = analyse(Regrouped(), x())
    assert not detection.structures


def test_names_stay_unique_and_parameters_can_be_given() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 6), nn.ReLU(), nn.Linear(6, 3))
    graph, named = zoo.lift(model, ((x(),), {}))
    detection = find_structures(graph, named)
    assert [s.name for s in detection.structures] == ["model", "model#2"]
    assert not find_structures(graph, named, parameters=[]).structures


def test_aliases_make_two_names_one_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Network(F.relu), Network(F.relu)
            self.b.up.weight = self.a.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    detection = analyse(Two(), x())
    (structure,) = detection.structures
    assert len(structure.with_role("down")) == 2


def test_copies_of_all_units_stand_one_behind_the_other() -> None:
    """`repeat` gives a, b, c, a, b, c and not a, a, b, b, c, c: a unit of Down is one channel in every copy."""
    detection = analyse(Network(lambda h: h.repeat(1, 1, 2), inner=2 * HIDDEN), x())
    (units,) = detection.others
    assert units.units == HIDDEN
    (down,) = (site for site in units.sites if site.param == "down.weight")
    assert (down.axis, down.block, down.outer) == (1, 1, ((2, HIDDEN),))


class Packed(nn.Module):
    """Attention over projections that are joined and cut again at the same places."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        packed = torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_slice_that_ends_where_another_projection_begins_does_not_read_it() -> None:
    detection = analyse(Packed(), x())
    assert kinds(detection) == [("attention", HEADS)]
    found = {role: {s.param for s in detection.structures[0].with_role(role)} for role in ("q", "k", "v", "o")}
    assert found == {role: {f"{role}.weight"} for role in ("q", "k", "v", "o")}
