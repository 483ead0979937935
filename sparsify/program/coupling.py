"""The coupling of a program as a bipartite graph: structures on one side, tensors on the other, sites on the edges.

    ("structure", "model.layers.0.mlp") ── up:   axis 0, block 1 ──▶ ("tensor", "model.layers.0.mlp.up_proj.weight")
                                        └─ down: axis 1, block 1 ──▶ ("tensor", "model.layers.0.mlp.down_proj.weight")

A connected component of the graph is what must be reordered, and can be chosen, together. networkx is imported when a graph is asked
for, not with the package.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from sparsify.console import one_line, printable
from sparsify.program.structure import Declined, Site, Structure

if TYPE_CHECKING:
    import networkx as nx

    from sparsify.program import Program

STRUCTURE, TENSOR = "structure", "tensor"


@printable
@dataclass(frozen=True)
class SharedChannels:
    """Two structures that lie on the same channels of one axis of one tensor, so that the one cannot move without the other.

    channels: how many channels of the axis belong to both.
    """

    param: str
    axis: int
    first: str
    second: str
    channels: int

    def __str__(self) -> str:
        return one_line(
            f"{self.param}, axis {self.axis}: {self.first} and {self.second} share {self.channels} channels"
        )


def coupling_graph(program: Program, *, declined: bool = False) -> nx.Graph:
    """Structures and the tensors that they run through, as an undirected bipartite `networkx.Graph`.

    declined: also take what detection declined, with the weights that it would have reordered.

    Nodes are pairs, so that no module can be mistaken for a tensor of the same name:

    ("structure", name)   bipartite=0, kind, units, structure (the `Structure` or `Declined`), reason (why it was declined; "" else)
    ("tensor", name)      bipartite=1, shape and dtype (None where the graph does not know it), names (all qualified names of the
                          tensor; more than one: tied), tied, readers (operations of the graph that read it; more than one: shared),
                          conflicts (tuple of `SharedChannels`)

    An edge has sites (tuple of `Site`, offset order: a packed weight has several), inner (under grouped-query attention, sites of the
    query heads inside their KV group), roles (tuple of str) and axes (tuple of int). `graph.graph["conflicts"]` lists all conflicts.
    Tensors that no structure runs through are left out. A program before detection gives an empty graph.
    """
    import networkx as nx

    graph = nx.Graph()
    names: dict[str, list[str]] = {}
    for name, first in program.aliases.items():
        names.setdefault(first, []).append(name)
    readers = reading_operations(program)
    values = {
        i.target: node.meta.get("val")
        for i, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
        if i.target is not None
    }
    for item in (*program.structures, *(program.declined if declined else ())):
        refused = isinstance(item, Declined)
        key = (STRUCTURE, item.name)
        graph.add_node(
            key,
            bipartite=0,
            kind=item.kind,
            units=None if refused else item.units,
            structure=item,
            reason=item.reason if refused else "",
        )
        inner = item.inner.sites if isinstance(item, Structure) and item.inner is not None else ()
        for param in dict.fromkeys(site.param for site in (*item.sites, *inner)):
            own = [site for site in item.sites if site.param == param]
            tensor = (TENSOR, param)
            if tensor not in graph:
                value = values.get(param)
                tied = tuple(names.get(param, [param]))
                graph.add_node(
                    tensor,
                    bipartite=1,
                    shape=None if value is None else tuple(value.shape),
                    dtype=None if value is None else value.dtype,
                    names=tied,
                    tied=len(tied) > 1,
                    readers=readers[param],
                    conflicts=(),
                )
            graph.add_edge(
                key,
                tensor,
                sites=tuple(sorted(own, key=lambda site: (site.axis, site.offset))),
                inner=tuple(site for site in inner if site.param == param),
                roles=tuple(dict.fromkeys(site.role for site in own)),
                axes=tuple(dict.fromkeys(site.axis for site in own)),
            )
    conflicts = find_conflicts(program.structures)
    for conflict in conflicts:
        node = graph.nodes[TENSOR, conflict.param]
        node["conflicts"] = (*node["conflicts"], conflict)
    graph.graph.update(name=type(program.host).__name__, conflicts=conflicts)
    return graph


def find_conflicts(structures: tuple[Structure, ...]) -> tuple[SharedChannels, ...]:
    """Pairs of structures that claim the same channels of a tensor; side by side on one axis (packed weights) is no conflict."""
    claims: dict[tuple[str, int], dict[str, set[int]]] = {}
    for structure in structures:
        for site in structure.sites:
            own = claims.setdefault((site.param, site.axis), {}).setdefault(structure.name, set())
            own.update(channels_of(site, structure.units))
    found = []
    for (param, axis), owners in claims.items():
        for (first, left), (second, right) in combinations(owners.items(), 2):
            if left & right:
                found.append(SharedChannels(param, axis, first, second, len(left & right)))
    return tuple(found)


def channels_of(site: Site, units: int) -> list[int]:
    """All channels of a site on its axis."""
    return site.positions(units).flatten().tolist()


def reading_operations(program: Program) -> Counter[str]:
    """Tensor name → number of operations that read it directly."""
    names, found = program.tensor_names, Counter[str]()
    for node in program.graph.nodes:
        if node.op == "call_function":
            found.update({names[source.name] for source in node.all_input_nodes if source.name in names})
    return found
