"""A program in Model Explorer: unfolded layers are the program's graph again, operation by operation; its adapter opens inspector pages."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import tiny

import sparsify
from sparsify import S2FT, Plan
from sparsify.errors import InputError, SparsifyError
from sparsify.program.printer import NOISE, op_name
from sparsify.show.explorer.graphs import VALUE, explorer_graphs, unfolded
from sparsify.show.inspection import inspect_program
from sparsify.show.inspector import read_inspector

pytestmark = pytest.mark.filterwarnings("ignore:The hashes produced for directed graphs")
needs_explorer = pytest.mark.skipif(
    importlib.util.find_spec("model_explorer") is None,
    reason='Model Explorer is an optional package: pip install "sparsify-compiler[explorer]"',
)


@pytest.fixture(scope="module", params=["Llama", "alternating"])
def program(request: pytest.FixtureRequest) -> Any:
    """Layers that are all alike, and local and global ones in turn (a period of two)."""
    if request.param == "Llama":
        plan = Plan([S2FT(structure="ffn", fraction=0.1), S2FT(structure="attention", fraction=0.3)])
        return sparsify.compile(tiny.llama(num_hidden_layers=4), plan, progress=False).sparsify.program
    plan = Plan([sparsify.LoRA(match="*.q_proj", rank={f"*.{i}.*": 2 + i % 2 for i in range(6)} | {"*": 1}, alpha=2)])
    return sparsify.compile(tiny.llama(num_hidden_layers=6), plan, progress=False).sparsify.program


def hashed(nodes: dict[str, str], edges: set[tuple[str, str]]) -> str:
    graph = nx.DiGraph()
    graph.add_nodes_from((name, {"label": label}) for name, label in nodes.items())
    graph.add_edges_from(edges)
    return nx.weisfeiler_lehman_graph_hash(graph, node_attr="label", iterations=8)


def of_program(program: Any) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """The graph without checks that compute nothing and without tensors of the model."""
    tensors = program.tensor_names
    kept = [n for n in program.graph.nodes if n.name not in tensors and op_name(n).rpartition(".")[2] not in NOISE]
    used = {source for n in kept for source in n.all_input_nodes if n.op != "placeholder"}
    kept = [n for n in kept if n.op != "placeholder" or n in used]
    label = {n.name: "output" if n.op == "output" else n.name if n.op == "placeholder" else op_name(n) for n in kept}
    return label, {(s.name, n.name) for n in kept for s in n.all_input_nodes if s.name not in tensors}


def test_what_is_unfolded_is_the_graph(program: Any) -> None:
    data = inspect_program(program)
    assert any("items" in item and item["count"] > 1 for item in data["operations"]), "nothing was folded"
    nodes, edges = {}, set()
    for placed in unfolded(data["operations"]):
        assert placed.id not in nodes
        call = placed.entry["call"]
        nodes[placed.id] = "output" if placed.entry["name"] == "return" else call.partition("(")[0]
        edges |= {(placed.names.get(name, name), placed.id) for name in VALUE.findall(call)}
    nodes |= {name: name for name, _ in edges if name not in nodes}
    wanted = of_program(program)
    assert len(nodes) == len(wanted[0])
    assert len(edges) == len(wanted[1])
    assert hashed(nodes, edges) == hashed(*wanted)


@needs_explorer
def test_the_adapter_opens_a_page(program: Any, tmp_path: Path) -> None:
    from model_explorer.extension_manager import ExtensionManager

    program.html(tmp_path / "a.html")
    manager = ExtensionManager(["sparsify.show.explorer"])
    manager.load_extensions()
    command = {"cmdId": "convert", "extensionId": "sparsify", "modelPath": str(tmp_path / "a.html"), "settings": {}}
    (collection,) = manager.run_cmd(command | {"deleteAfterConversion": False})["graphCollections"]
    after, before = collection["graphs"]
    nodes = {node["id"]: node["label"] for node in after["nodes"]}
    edges = {(edge["sourceNodeId"], node["id"]) for node in after["nodes"] for edge in node["incomingEdges"]}
    assert hashed(nodes, edges) == hashed(*of_program(program))
    ours = [node for node in after["nodes"] if node["label"].startswith("sparsify.")]
    assert len(ours) == len(program.parts)
    assert all(re.match(r"model/layers/\d+/(mlp|self_attn)/\w+_proj$", node["namespace"]) for node in ours)
    assert not [node for node in before["nodes"] if node["label"].startswith("sparsify.")]
    was = {node["id"]: node for node in before["nodes"]}
    assert {was[node["id"]]["label"] for node in ours} == {"aten.linear"}
    groups = after["groupNodeAttributes"]
    assert {s.name.replace(".", "/") for s in program.structures} <= set(groups)
    json.dumps(collection)


@needs_explorer
def test_python_opens_a_program(program: Any) -> None:
    from sparsify.show.explorer.graphs import explorer_config

    config = explorer_config(program)
    assert config.model_sources == [{"url": "graphs://LlamaForCausalLM/0"}]
    assert config.get_model_explorer_graphs(0)["graphCollections"][0].label == "LlamaForCausalLM"


def test_without_the_package_the_error_says_what_to_install(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_explorer", None)
    with pytest.raises(SparsifyError, match=r'pip install "sparsify-compiler\[explorer\]"'):
        explorer_graphs(program)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html></html>", "not a page of sparsify's inspector"),
        ('<script type="application/json" id="data">{"format": 1}</script>', "not a page of sparsify's inspector"),
        (
            '<script type="application/json" id="data">{"format": "sparsify-inspection", "version": 99}</script>',
            "a page of version 99",
        ),
        ('<script type="application/json" id="data">{"a": NaN}</script>', "not JSON that can be read"),
        (
            f'<script type="application/json" id="data">{"[" * 100}{"]" * 100}</script>',
            "nested",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_inspector(tmp_path / "a.html")


@needs_explorer
def test_damaged_data_is_refused(program: Any) -> None:
    data: Any = inspect_program(program)
    for damage in ({"operations": [{"items": [], "count": 3}]}, {"operations": 7}, {"structures": [{}]}, {"ids": None}):
        with pytest.raises(InputError, match="damaged data"):
            explorer_graphs({**data, **damage})
    run: Any = next(item for item in data["operations"] if item.get("count", 1) > 1)
    endless = {**run, "count": 10**9, "layers": [0] * run["period"], "reads": [], "left": []}
    with pytest.raises(InputError, match=r"damaged data|too many"):
        explorer_graphs({**data, "operations": [endless]})
