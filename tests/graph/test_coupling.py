"""The coupling graph: bipartite, complete, and true about grouped queries, ties, shared weights, experts and conflicts."""

from __future__ import annotations

import networkx as nx
import pytest
import tiny
import zoo
from networkx.algorithms import bipartite
from torch import Tensor, nn

import sparsify
from sparsify.program.capture import capture
from sparsify.program.coupling import SharedChannels, find_conflicts
from sparsify.program.structure import Declined, Site, Structure


def analyse(name: str) -> sparsify.program.Program:
    family = tiny.BY_NAME[name]
    model = zoo.build(family)[0]
    args, kwargs = zoo.example(family, model)
    return sparsify.analyse(model, kwargs or args)


def tensor(name: str) -> tuple[str, str]:
    return "tensor", name


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Phi-3", "T5", "BERT", "Mixtral"])
def test_the_graph_says_what_the_structures_say(name: str) -> None:
    program = analyse(name)
    graph = program.coupling()
    assert bipartite.is_bipartite(graph)
    sides = {node: data["bipartite"] for node, data in graph.nodes(data=True)}
    assert all(sides[a] != sides[b] for a, b in graph.edges)
    assert {key for key, side in sides.items() if side == 0} == {("structure", s.name) for s in program.structures}
    for structure in program.structures:
        key = "structure", structure.name
        assert graph.nodes[key]["structure"] is structure
        assert {name for _, name in graph[key]} == set(structure.params())
        sites = [site for _, param in graph[key] for site in graph.edges[key, tensor(param)]["sites"]]
        assert sorted(sites, key=str) == sorted(structure.sites, key=str)
    for (side, param), data in graph.nodes(data=True):
        if side == "tensor":
            assert data["shape"] == tuple(program.tensor(param).shape)
            assert data["dtype"] == program.tensor(param).dtype
            assert data["readers"] >= 1
    assert graph.graph["conflicts"] == ()


def test_grouped_queries_have_their_heads_on_the_inner_edge() -> None:
    graph = sparsify.analyse(tiny.llama()).coupling()
    key = "structure", "model.layers.0.self_attn"
    assert graph.nodes[key]["units"] == 2
    edge = graph.edges[key, tensor("model.layers.0.self_attn.q_proj.weight")]
    (site,), (inner,) = edge["sites"], edge["inner"]
    assert (site.axis, site.block, edge["roles"], edge["axes"]) == (0, 24, ("q",), (0,))
    assert (inner.block, inner.outer) == (8, ((2, 24),))
    assert graph.edges[key, tensor("model.layers.0.self_attn.k_proj.weight")]["inner"] == ()


def test_a_packed_weight_has_several_sites_on_one_edge() -> None:
    graph = analyse("GPT-2").coupling()
    key = "structure", "transformer.h.0.attn"
    edge = graph.edges[key, tensor("transformer.h.0.attn.c_attn.weight")]
    assert [(s.role, s.axis, s.offset) for s in edge["sites"]] == [("q", 1, 0), ("k", 1, 36), ("v", 1, 72)]
    assert edge["roles"] == ("q", "k", "v")


def test_layers_are_components_and_t5_shares_its_bias_over_them() -> None:
    llama = sparsify.analyse(tiny.llama(num_hidden_layers=3)).coupling()
    assert nx.number_connected_components(llama) == 6
    t5 = analyse("T5").coupling()
    name = next(n for side, n in t5.nodes if side == "tensor" and "relative_attention_bias" in n and "encoder" in n)
    (owner,) = t5[tensor(name)]
    layers = {n.split(".layer.")[0] for _, n in t5[owner]}
    assert {"encoder.block.0", "encoder.block.1"} <= layers, "one group runs through the layers that share the bias"


class Tied(nn.Module):
    """Two feed-forwards that share their matrices: `second` is another name for the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"up": nn.Linear(12, 20, bias=False), "down": nn.Linear(20, 12, bias=False)})
        self.second = nn.ModuleDict({"up": nn.Linear(12, 20, bias=False), "down": nn.Linear(20, 12, bias=False)})
        for name in ("up", "down"):
            self.second[name].weight = self.first[name].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = x + layer["down"](layer["up"](x).relu())
        return x


def test_tied_tensors_stand_once_under_all_their_names() -> None:
    import torch

    graph = sparsify.analyse(Tied(), (torch.randn(3, 12),)).coupling()
    names = [name for side, name in graph.nodes if side == "tensor"]
    assert sorted(names) == ["first.down.weight", "first.up.weight"]
    up = graph.nodes[tensor("first.up.weight")]
    assert up["tied"]
    assert up["names"] == ("first.up.weight", "second.up.weight")
    assert up["readers"] == 2
    assert len([n for n in graph.nodes if n[0] == "structure"]) == 1
    plain = sparsify.analyse(tiny.Mlp(), (torch.randn(3, 12),)).coupling()
    assert not any(data["tied"] for side, data in plain.nodes(data=True) if side[0] == "tensor")


def test_experts_are_sites_on_packed_tensors() -> None:
    graph = analyse("Mixtral").coupling()
    packed = [n for side, n in graph.nodes if side == "tensor" and n.endswith("experts.gate_up_proj")]
    assert len(packed) == 2
    for name in packed:
        (owner,) = graph[tensor(name)]
        edge = graph.edges[owner, tensor(name)]
        assert set(edge["roles"]) == {"gate", "up"}
        assert len(graph.nodes[tensor(name)]["shape"]) == 3


def made(name: str, *sites: Site, units: int = 4) -> Structure:
    return Structure(name, "ffn", units, sites)


def test_two_structures_on_the_same_channels_are_a_conflict() -> None:
    program = capture(tiny.llama())
    weight = "model.layers.0.mlp.up_proj.weight"
    first = made("first", Site(weight, 0, 2, role="up"))
    near = made("beside", Site(weight, 0, 2, offset=8, role="up"))
    other_axis = made("across", Site(weight, 1, 2, role="down"))
    clash = made("clash", Site(weight, 0, 2, offset=6, role="up"))
    assert find_conflicts((first, near, other_axis)) == ()
    graph = program.evolve("by hand", structures=(first, near, other_axis, clash)).coupling()
    expected = (SharedChannels(weight, 0, "first", "clash", 2), SharedChannels(weight, 0, "beside", "clash", 6))
    assert graph.graph["conflicts"] == graph.nodes[tensor(weight)]["conflicts"] == expected
    assert str(expected[0]) == f"{weight}, axis 0: first and clash share 2 channels"


def test_what_was_declined_is_there_when_asked_for() -> None:
    weight = "model.layers.0.mlp.up_proj.weight"
    refusal = Declined("model.layers.0.mlp", "ffn", "its order matters", (Site(weight, 0, 1, role="up"),))
    program = capture(tiny.llama()).evolve("by hand", declined=(refusal,))
    assert len(program.coupling()) == 0
    graph = program.coupling(declined=True)
    assert graph.nodes["structure", "model.layers.0.mlp"]["reason"] == "its order matters"
    assert list(graph["structure", "model.layers.0.mlp"]) == [tensor(weight)]


def test_a_module_and_a_tensor_of_one_name_stay_apart() -> None:
    program = capture(tiny.llama())
    weight = "lm_head.weight"
    graph = program.evolve("by hand", structures=(made(weight, Site(weight, 0, 1)),)).coupling()
    assert set(graph.nodes) == {("structure", weight), ("tensor", weight)}
