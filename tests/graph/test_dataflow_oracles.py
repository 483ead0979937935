"""Walks over the graph that are written by hand, against networkx: post-dominators for fusions, components for shared inputs."""

from __future__ import annotations

from itertools import combinations

import networkx as nx
import pytest
import tiny
import torch
from torch import Tensor, fx, nn

import sparsify
from sparsify.lowering.fuse_linears import GatedProduct, find_joins, users_of
from sparsify.passes.select_linears import VIEWS, first_linears, input_root
from sparsify.program import Program


def program_of(name: str) -> Program:
    model = tiny.build(name)
    return sparsify.analyse(model, tiny.inputs_of(model, name))


def gated_products(program: Program) -> list[GatedProduct]:
    return [join for join in find_joins(program)[0] if isinstance(join, GatedProduct)]


def post_dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Node → the first operation that every path from it to the output goes through."""
    flow = nx.DiGraph()
    for node in graph.nodes:
        flow.add_edges_from((user, node) for user in users_of(node))
    return nx.immediate_dominators(flow, next(n for n in graph.nodes if n.op == "output"))


def chain(parents: dict[fx.Node, fx.Node], node: fx.Node) -> list[fx.Node]:
    """The post-dominators of a node, nearest first."""
    found = []
    while parents.get(node) not in (None, node):
        node = parents[node]
        found.append(node)
    return found


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral"])
def test_a_gated_product_is_where_gate_and_up_meet(name: str) -> None:
    program = program_of(name)
    parents = post_dominators(program.graph)
    linears = {n.removesuffix(".weight"): linear.node for n, linear in first_linears(program).items()}
    found = gated_products(program)
    assert len(found) == sum(s.kind == "ffn" for s in program.structures)
    for gated in found:
        ups = set(chain(parents, linears[gated.up]))
        assert next(node for node in chain(parents, linears[gated.gate]) if node in ups) is gated.product


class Leaking(nn.Module):
    """Its activated gate is read a second time, so that not every path from the gate goes through the product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.nn.functional.silu(self.gate(x))
        return self.down(gate * self.up(x)), gate.sum()


def test_a_gate_that_is_read_elsewhere_is_not_fused() -> None:
    program = sparsify.analyse(nn.Sequential(Leaking()), (torch.randn(8, 12),))
    gate = next(linear.node for name, linear in first_linears(program).items() if "gate" in name)
    product = next(n for n in program.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    assert product not in chain(post_dominators(program.graph), gate)
    assert not gated_products(program)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT (classifier)", "ViT"])
def test_linears_share_an_input_when_views_alone_lie_between(name: str) -> None:
    program = program_of(name)
    same = nx.Graph()
    for node in program.graph.nodes:
        same.add_node(node)
        if node.op == "call_function" and getattr(node.target, "overloadpacket", None) in VIEWS:
            same.add_edge(node, node.args[0])
    home = {node: number for number, part in enumerate(nx.connected_components(same)) for node in part}
    linears = list(first_linears(program).values())
    assert any(input_root(a.x) is input_root(b.x) for a, b in combinations(linears, 2)) or name == "GPT-2"
    for a, b in combinations(linears, 2):
        assert (input_root(a.x) is input_root(b.x)) == (home[a.x] == home[b.x])
