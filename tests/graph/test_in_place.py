"""In-place operations: the same structures as their functional twins, and a program without writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, Plan
from sparsify.passes.detect.find_structures import find_structures
from sparsify.program.capture import capture, read_through_scatters
from sparsify.testing import check_structure, perturbed

WIDTH, HIDDEN = 10, 14


class Network(nn.Module):
    """A residual feed-forward: norm, up, between, down, and how the residual is added."""

    def __init__(
        self, between: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor], inner: int = HIDDEN
    ):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(inner, WIDTH)
        self.between, self.join = between, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.down(self.between(self.up(self.norm(x)))), x)


def add(y: Tensor, x: Tensor) -> Tensor:
    return y + x


def iadd(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


def mask_inside(h: Tensor) -> Tensor:
    h[..., :3].mul_(0.5)
    return F.relu(h)


def through_a_view(h: Tensor) -> Tensor:
    flat = h.view(-1, HIDDEN)
    flat.relu_()
    return h


def through_two_views(h: Tensor) -> Tensor:
    a, b = h.view(-1, HIDDEN), h.transpose(0, 1)
    a.mul_(2.0)
    b.relu_()
    return h


def gated(h: Tensor) -> Tensor:
    gate, up = h[..., : HIDDEN // 2], h[..., HIDDEN // 2 :]
    F.silu(gate, inplace=True)
    up *= gate
    return up


def filled(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out.copy_(h)
    return out.relu_()


def by_index(h: Tensor) -> Tensor:
    h[:, 0] = 0.0
    return F.relu_(h)


# (in place, functional twin, in_features of down)
PAIRS = [
    (nn.ReLU(inplace=True), nn.ReLU(), HIDDEN),
    (nn.ReLU6(inplace=True), nn.ReLU6(), HIDDEN),
    (nn.SiLU(inplace=True), nn.SiLU(), HIDDEN),
    (nn.Hardswish(inplace=True), nn.Hardswish(), HIDDEN),
    (nn.Hardtanh(inplace=True), nn.Hardtanh(), HIDDEN),
    (nn.Mish(inplace=True), nn.Mish(), HIDDEN),
    (nn.ELU(inplace=True), nn.ELU(), HIDDEN),
    (nn.LeakyReLU(0.1, inplace=True), nn.LeakyReLU(0.1), HIDDEN),
    (F.relu_, F.relu, HIDDEN),
    (lambda h: torch.sigmoid_(h).mul_(2.0), lambda h: torch.sigmoid(h) * 2.0, HIDDEN),
    (lambda h: h.tanh_(), torch.tanh, HIDDEN),
    (lambda h: F.relu_(h).masked_fill_(h > 3, 0.0), lambda h: F.relu(h).masked_fill(F.relu(h) > 3, 0.0), HIDDEN),
    (lambda h: F.dropout(F.relu_(h), 0.5, training=False, inplace=True), F.relu, HIDDEN),
    (lambda h: F.relu_(h).clamp_(max=2.0), lambda h: F.relu(h).clamp(max=2.0), HIDDEN),
    (lambda h: F.relu_(h).pow_(2), lambda h: F.relu(h).pow(2), HIDDEN),
    (through_a_view, F.relu, HIDDEN),
    (through_two_views, lambda h: F.relu(h * 2.0), HIDDEN),
    (filled, F.relu, HIDDEN),
    (by_index, lambda h: F.relu(torch.cat([h[:, :1] * 0, h[:, 1:]], 1)), HIDDEN),
    (gated, lambda h: F.silu(h[..., : HIDDEN // 2]) * h[..., HIDDEN // 2 :], HIDDEN // 2),
]


def structures(model: nn.Module, x: Tensor) -> list:
    program = capture(model, (x,))
    found = find_structures(program.graph, program.tensor_names)
    twin = perturbed(model, ((x,), {}))
    for structure in (*found.structures, *found.others):
        check_structure(twin, ((x,), {}), structure, prepared=True)
    return [(s.kind, s.units, s.sites) for s in found.structures]


@pytest.mark.parametrize(("written", "twin", "inner"), PAIRS)
def test_found_as_the_functional_form(written, twin, inner):
    x = torch.randn(2, 5, WIDTH)
    model, functional = Network(written, iadd, inner), Network(twin, add, inner)
    functional.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), functional(x))
    found = structures(model, x)
    assert [kind for kind, _, _ in found] == ["ffn"]
    assert found == structures(functional, x)


def test_a_write_to_some_units_alone_is_refused():
    """A near miss: three channels are treated differently, so their order matters."""
    x = torch.randn(2, 5, WIDTH)
    program = capture(Network(mask_inside, add), (x,))
    found = find_structures(program.graph, program.tensor_names)
    for structure in found.structures:
        assert structure.units < HIDDEN
    for structure in (*found.structures, *found.others):
        check_structure(perturbed(Network(mask_inside, add), ((x,), {})), ((x,), {}), structure, prepared=True)


@pytest.mark.users_trace
def test_the_program_writes_to_nothing_and_agrees_with_the_model():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
            self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.clone())
            q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y = self.o(F.scaled_dot_product_attention(q.mul_(0.5), k, v).transpose(1, 2).flatten(2))
            y += x
            x = y.clone()
            y = self.down(F.silu(self.up(y), inplace=True))
            return y.add_(x)

    model, x = Writes().eval(), torch.randn(2, 5, 12)
    program = sparsify.analyse(model, (x,))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if t.split(".")[1:2] and t.split(".")[1].endswith("_") and "detach_" not in t]
    assert targets.count("aten.linear.default") == 6, "linears stay whole"
    assert "aten.scaled_dot_product_attention.default" in targets
    assert "aten.silu.default" in targets
    assert {s.kind for s in program.structures} == {"ffn", "attention"}
    torch.testing.assert_close(program(x), model(x))
    nodes = [n for n in program.graph.nodes if str(n.target) == "aten.linear.default"]
    assert all("nn_module_stack" in n.meta and "stack_trace" in n.meta for n in nodes)
    assert {linear.weight for linear in program.linears()} == {
        f"{n}.weight" for n in ("q", "k", "v", "o", "up", "down")
    }


@pytest.mark.parametrize("rule", [S2FT(fraction=0.3), LoRA(rank=2)])
def test_hosts_of_models_that_write_in_place(rule):
    x = torch.randn(2, 5, WIDTH)
    model = Network(nn.ReLU(inplace=True), add)
    host = sparsify.compile(model, Plan([rule], check="numeric"), example=(x,), progress=False)
    with torch.no_grad():
        torch.testing.assert_close(host(x), model(x))
        torch.testing.assert_close(host.sparsify.program(x), model(x))


def test_inputs_that_the_forward_writes_to():
    class Eats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x *= 2
            return self.down(F.relu_(self.up(x)))

    model, x = Eats(), torch.randn(3, WIDTH)
    kept = x.clone()
    program = sparsify.analyse(model, (x,))
    assert torch.equal(x, kept), "the example is not written to"
    assert [s.kind for s in program.structures] == ["ffn"]
    torch.testing.assert_close(program(x), model(kept.clone()))


@pytest.mark.parametrize(
    "read", [(0, 2), (1, 3), (2, 3), (2, 4), (2, 5), (3, 6), (4, 5), (5, 8), (0, 8), (3, 3)], ids=str
)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_read_past_a_write_is_the_same_read(read: tuple[int, int], dim: int) -> None:
    """Rows 2 to 5 are written; whatever part of them a slice reads, it reads what it read before."""

    def graph() -> torch.fx.GraphModule:
        made = torch.fx.Graph()
        base, new = made.placeholder("base"), made.placeholder("new")
        base.meta["val"], new.meta["val"] = torch.empty(8, 8), torch.empty(8, 8).narrow(0, 0, 3)
        scatter = made.call_function(torch.ops.aten.slice_scatter.default, (base, new, 0, 2, 5))
        scatter.meta["val"] = torch.empty(8, 8)
        found = made.call_function(torch.ops.aten.slice.Tensor, (scatter, dim, *read))
        found.meta["val"] = torch.empty(8, 8)[slice(*read)]
        made.output(found)
        return torch.fx.GraphModule(nn.Module(), made)

    before, after = graph(), graph()
    read_through_scatters(after.graph)
    after.recompile()
    base, new = torch.randn(8, 8), torch.randn(3, 8)
    assert torch.equal(after(base, new), before(base, new))
    left = [n for n in after.graph.nodes if n.target is torch.ops.aten.slice_scatter.default]
    through = dim == 0 and (read == (2, 5) or read[1] <= 2 or read[0] >= 5)
    assert bool(left) != through, "past the write exactly where nothing of it is read, or just that"
