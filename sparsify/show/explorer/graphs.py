"""The inspector's data as graphs of Model Explorer: every operation a node, modules as nested groups, folded layers unfolded again.

    {"run": "model.layers.{0…79}", "items": […], "reads": […], "left": […]} ──▶ model/layers/0/mlp/down_proj · partial_linear_default
                                                                               model/layers/1/mlp/down_proj · partial_linear_default (1) …

Two graphs: "after", the program, with what trains in colour, and "before", the same with every call that was replaced. Structures say
what they are in the attributes of their group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sparsify.errors import InputError, SparsifyError
from sparsify.program import Program
from sparsify.program.repeats import numbered
from sparsify.show.inspection import inspect_program

if TYPE_CHECKING:
    from model_explorer import ModelExplorerGraphs

VALUE = re.compile(r"%([A-Za-z0-9_]+)")
TRAINED, CHANGED = "#f5b58c", "#a5d8b0"
MOST_NODES = 200_000


@dataclass(frozen=True)
class Placed:
    """One operation of the unfolded graph. layer: what its layer's number is called in texts, and the number."""

    id: str
    entry: Mapping[str, Any]
    names: Mapping[str, str]
    layers: tuple[tuple[str, str], ...]

    def text(self, text: str) -> str:
        """A text of the folded layers as it is for this one."""
        for folded, own in self.layers:
            text = text.replace(folded, own)
        return text


def explorer_graphs(source: Program | Mapping[str, Any]) -> ModelExplorerGraphs:
    """Graphs "after" and "before" of a program, or of the data of a page. Raises SparsifyError without the package `model_explorer`,
    InputError for damaged data."""
    try:
        from model_explorer import graph_builder as build
    except ImportError as error:
        raise SparsifyError('Model Explorer is not installed: pip install "sparsify-compiler[explorer]"') from error
    data: Mapping[str, Any] = dict(inspect_program(source)) if isinstance(source, Program) else source
    try:
        placed = list(islice(unfolded(data["operations"]), MOST_NODES + 1))
        attributes = group_attributes(data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"damaged data of an inspector's page: {error!r}") from error
    if len(placed) > MOST_NODES:
        raise InputError(f"more than {MOST_NODES:,} operations: too many for Model Explorer")
    graphs: list[Any] = []
    for side in ("after", "before"):
        former = {p.id: p.entry["was"] for p in placed if p.entry.get("was")} if side == "before" else {}
        nodes = [node_of(build, p, former.get(p.id)) for p in placed]
        known = {node.id for node in nodes}
        inputs = {edge.sourceNodeId for node in nodes for edge in node.incomingEdges} - known
        nodes = [build.GraphNode(id=name, label=name, namespace="inputs") for name in sorted(inputs)] + nodes
        graphs.append(build.Graph(id=side, nodes=nodes, groupNodeAttributes=attributes))
    return {"graphCollections": [build.GraphCollection(label=str(data["model"]), graphs=graphs)]}


def explorer_config(program: Program) -> Any:
    """What `model_explorer.visualize_from_config` opens. Raises SparsifyError without the package `model_explorer`."""
    graphs = explorer_graphs(program)
    from model_explorer import config

    made = config()
    made.graphs_list.append(graphs)
    made.model_sources.append({"url": f"graphs://{type(program.host).__name__}/0"})
    return made


def unfolded(
    items: Any, names: Mapping[str, str] | None = None, layers: tuple[tuple[str, str], ...] = (), suffix: str = ""
) -> Iterator[Placed]:
    """Every operation, those of folded layers once for each layer. names: value as the text has it → the node that makes it here."""
    known = dict(names or {})
    for item in items:
        if "items" not in item:
            own = f"{item['name']}{suffix}"
            yield Placed(own, item, dict(known), layers)
            known[item["name"]] = own
            continue
        if item["count"] == 1:
            for placed in unfolded(item["items"], known, layers, suffix):
                known[placed.entry["name"]] = placed.id
                yield placed
            continue
        period, before, made = item["period"], dict(known), {}
        for repeat in range(item["count"]):
            numbers = item["layers"][repeat * period : (repeat + 1) * period]
            inside = dict(known)
            for outside, carried in item["reads"] if repeat else ():
                inside[outside] = before[carried]
            more = tuple(
                (numbered(item["stack"], "{" + folded + "}"), numbered(item["stack"], number))
                for folded, number in zip(item["indices"], numbers, strict=True)
            )
            here = {}
            for placed in unfolded(item["items"], inside, (*more, *layers), f"{suffix} ({numbers[0]})"):
                here[placed.entry["name"]] = placed.id
                yield placed
            made |= {(name, number): node for name, node in here.items() for number in numbers}
            before = inside | here
        for later, own, layer in item["left"]:
            known[later] = made[own, layer]


def node_of(build: Any, placed: Placed, was: list[str] | None) -> Any:
    """A node of the viewer. was: the calls that stood there, in the graph "before"."""
    entry = placed.entry
    call = placed.text(" ; ".join(was) if was else entry["call"])
    operator = call.partition(" = ")[2].partition("(")[0] if was else entry["call"].partition("(")[0]
    made = set(re.findall(r"%([A-Za-z0-9_]+) = ", call))
    sources = dict.fromkeys(placed.names.get(n, n) for n in VALUE.findall(call) if n not in made)
    attributes = {"call": call, "makes": entry["makes"], "value": placed.id}
    if was is None:
        attributes |= {name: placed.text(str(entry[name])) for name in ("note", "kernel") if entry.get(name)}
        attributes |= {"replaces": placed.text(" ; ".join(entry["was"]))} if entry.get("was") else {}
    colour = TRAINED if entry.get("note") else CHANGED if entry.get("was") or entry.get("new") else ""
    return build.GraphNode(
        id=placed.id,
        label="output" if entry["name"] == "return" else operator or entry["name"],
        namespace=placed.text(entry["module"]).strip("()").replace("/", "∕").replace(".", "/"),
        attrs=[build.KeyValue(key=key, value=value) for key, value in attributes.items()],
        incomingEdges=[
            build.IncomingEdge(sourceNodeId=name, targetNodeInputId=str(at)) for at, name in enumerate(sources)
        ],
        outputsMetadata=[build.MetadataItem(id="0", attrs=[build.KeyValue(key="tensor_shape", value=entry["makes"])])],
        style=build.GraphNodeStyle(backgroundColor=colour) if colour else None,
    )


def group_attributes(data: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What the viewer says of the groups that are structures, of what was declined, and of the whole."""
    ids = data["ids"]
    found: dict[str, dict[str, str]] = {
        "": {
            "model": data["model"],
            "stage": data["stage"],
            "trains": f"{data['trained']:,} of {data['total']:,} parameters",
        }
    }
    for structure in data["structures"]:
        said = {"structure": f"{structure['kind']}, {structure['size']}", "trains": structure["trained"] or "nothing"}
        said |= {
            f"chosen ({side})": ids[structure[side]] for side in ("consumers", "producers") if ids[structure[side]]
        }
        said |= {f"site {site['role']}": f"{site['param']}[{site['where']}]" for site in structure["sites"]}
        said |= {"moved": "yes"} if "order" in structure else {}
        found[structure["name"].replace("/", "∕").replace(".", "/")] = said
    for declined in data["declined"]:
        found.setdefault(declined["name"].replace("/", "∕").replace(".", "/"), {})["declined"] = declined["reason"]
    return found


__all__ = ["explorer_config", "explorer_graphs"]
