"""The inspector: its data says what the program says, its page loads nothing and runs nothing but its own script, whatever names hold."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import sparsify
from sparsify import S2FT, LoRA, Plan, Prune, Quantize, RoSA
from sparsify.cli import app
from sparsify.program.printer import op_name, slice_text
from sparsify.program.structure import Declined
from sparsify.show.inspection import FORMAT, inspect_program, within
from sparsify.show.inspector import digest, render_inspector

PLAN = Plan(
    [
        S2FT(structure="ffn", fraction=0.1),
        S2FT(structure="attention", fraction=0.3, producer_fraction=0.5),
        RoSA(match="*.gate_proj", rank=2, density=0.01),
    ]
)
HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\u202ea\u2028b]]>")


@pytest.fixture(scope="module")
def program() -> Any:
    return sparsify.compile(tiny.llama(num_hidden_layers=4), PLAN, progress=False).sparsify.program


@pytest.fixture(scope="module")
def data(program: Any) -> Any:
    return inspect_program(program)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the texts of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open, data))

    def inside(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


def operations(items: Any, times: int = 1) -> Any:
    """Every operation of the tree with how often it stands."""
    for item in items:
        if "items" in item:
            yield from operations(item["items"], times * item["count"])
        else:
            yield item, times


def ids(text: str) -> set[int]:
    ends = [part.split("…") for part in text.split(", ")] if text else []
    return {i for pair in ends for i in range(int(pair[0]), int(pair[-1]) + 1)}


def test_structures_are_those_of_the_program(program: Any, data: Any) -> None:
    assert data["format"] == FORMAT
    assert [s["name"] for s in data["structures"]] == [s.name for s in program.structures]
    choices = {c.structure: c for c in program.choices}
    for said, structure in zip(data["structures"], program.structures, strict=True):
        assert [site["param"] for site in said["sites"]] == [site.param for site in structure.sites]
        assert said["size"] == structure.size_text()
        chosen = choices[structure.name]
        assert ids(data["ids"][said["consumers"]]) == set(chosen.consumers)
        made = {unit // said["per_group"] for unit in ids(data["ids"][said["producers"]])}
        assert made == set(chosen.producers)
        own = {slice_text(s): set(s.channels) for s in program.slices if s.structure == structure.name}
        assert {s["text"]: ids(data["ids"][s["channels"]]) for s in said["slices"]} == own
        for site in said["sites"]:
            if site["role"] == "gate":
                assert "BA (rank 2)" in site["more"]


def test_the_order_unfolds_to_the_permutation(program: Any, data: Any) -> None:
    moved = 0
    for said in data["structures"]:
        if "order" not in said:
            continue
        order = said["order"]
        front = [i for part in data["ids"][order["front"]].split(", ") for i in sorted(ids(part))]
        whole = front + [unit for unit in range(order["units"]) if unit not in set(front)]
        assert tuple(whole) == program.permutations[said["name"]][0].orders[0]
        moved += front != list(range(len(front)))
        now = ids(data["ids"][said["consumers_now"]])
        assert {whole[place] for place in now} == ids(data["ids"][said["consumers"]])
    assert moved >= 2


def test_layers_fold_and_every_structure_stands_in_one_row(data: Any) -> None:
    (row,) = [row for row in data["rows"] if len(row["layers"]) > 1]
    assert row["name"] == "model.layers.{0…3}"
    places = [place for row in data["rows"] for layer in row["structures"] for place in layer]
    assert sorted(places) == list(range(len(data["structures"])))


def test_operations_are_those_of_the_graph_with_what_they_were(program: Any, data: Any) -> None:
    calls = [n for n in program.graph.nodes if n.op == "call_function" and not op_name(n).endswith("_metadata")]
    found = list(operations(data["operations"]))
    assert sum(times for op, times in found if op["name"] != "return") == len(calls)
    changed = {op["call"].partition("(")[0]: op for op, _ in found if "was" in op}
    assert set(changed) == {
        "sparsify.partial_linear",
        "sparsify.partial_linear_at",
        "sparsify.sparse_lowrank_linear",
    }
    assert sum(times for op, times in found if "was" in op) == len(program.parts)
    down = changed["sparsify.partial_linear"]
    assert down["was"] == [f"%linear_6 = aten.linear(%mul_11, @{down['module']}.weight)"]
    assert down["module"] == "model.layers.{0…3}.mlp.down_proj"
    own = changed["sparsify.partial_linear_at"]["own"]
    assert {layer for where, _ in own for layer in ids(where)} == {0, 1, 2, 3}


def test_a_program_before_compile_has_structures_and_no_changes() -> None:
    program = sparsify.analyse(tiny.llama())
    slopes = Declined("model.layers.1.self_attn", "attention", "slopes of the heads")
    said: Any = inspect_program(program.evolve("by hand", structures=program.structures[:3], declined=(slopes,)))
    assert len(said["structures"]) == 3
    assert said["declined"][0]["reason"] == "slopes of the heads"
    assert said["rows"][-1]["declined"] == [[0]]
    assert not [op for op, _ in operations(said["operations"]) if "was" in op or "new" in op]


def test_the_page_loads_nothing_and_runs_its_own_script_alone(program: Any, data: Any, tmp_path: Path) -> None:
    text = program.html(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == text
    page = Page(text)
    assert not [tag for tag, a in page.tags if a.get("src") or (a.get("href") or "#")[0] != "#" or tag == "link"]
    block, script = page.inside("script")
    assert json.loads(block) == data
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src '{digest(script)}'" in policy
    assert f"style-src '{digest(page.inside('style')[0])}'" in policy
    assert "unsafe" not in policy
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert way not in script
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


class Named(nn.Module):
    """Feed-forwards under names that are markup, code and no text."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {
                name: nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})
                for name in HOSTILE
                if "." not in name
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = x + block["down"](torch.relu(block["up"](x)))  # type: ignore[operator,index]
        return x


def hostile_program() -> Any:
    host = sparsify.compile(Named().eval(), Plan([S2FT(0.3)]), example=torch.randn(3, 6), progress=False)
    program = host.sparsify.program
    declined = (Declined(HOSTILE[1], "other", f"because {HOSTILE[0]}"),)
    return program.evolve(f"by hand {HOSTILE[1]}", declined=declined)


def test_names_are_text_and_never_markup() -> None:
    program = hostile_program()
    text = program.html()
    page = Page(text)
    plain = Page(sparsify.analyse(tiny.llama()).html())
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags], "no tag more than any page has"
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in plain.tags]
    said = json.loads(page.inside("script")[0])
    names = [s["name"] for s in said["structures"]]
    assert len(names) == 3
    assert [sum(word in name for name in names) for word in HOSTILE[:2]] == [1, 1]
    assert any("\\u202ea\\u2028b" in name for name in names), "what reorders or breaks lines is spelled out"
    assert text.isascii() or not re.search("[\u2028\u202e]", text)


def test_a_hostile_title_is_escaped(data: Any) -> None:
    page = Page(render_inspector({**data, "model": "</title><script>alert(1)</script>"}))
    assert [tag for tag, _ in page.tags].count("script") == 2


def test_pruned_and_packed_weights_are_listed_and_what_is_no_number_is_null() -> None:
    plan = Plan(
        [
            Prune(sparsity=0.5, method="magnitude"),
            Quantize(match="*.up_proj", format="int8"),
            LoRA(match="*.q_proj", rank=2),
        ]
    )
    program = sparsify.compile(tiny.llama(), plan, calibration=[tiny.tokens()], progress=False).sparsify.program
    lost = dataclasses.replace(program.pruned[0], error=float("nan"))
    said: Any = inspect_program(program.replaced(pruned=(lost, *program.pruned[1:])))
    assert [p["name"] for p in said["pruned"]] == [p.name for p in program.pruned]
    assert said["pruned"][0]["error"] is None
    assert said["pruned"][1]["error"] == program.pruned[1].error
    assert [p["param"] for p in said["packed"]] == [p.param for p in program.packings]
    assert Page(render_inspector(said)).inside("script")
    assert {s["more"] for one in said["structures"] for s in one["sites"] if s["role"] == "up"} == {"stored as int8"}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_what_does_not_fit_is_left_out_and_said(data: Any, share: float) -> None:
    unfolded = [{"run": f"model.layers.{i}", "count": 1, "items": data["operations"][-4:]} for i in range(30)]
    full = {**data, "operations": unfolded, "kernels": [{"name": "k", "lines": 1, "nodes": [], "source": "x" * 9000}]}
    most = int(share * len(json.dumps(full)))
    cut: Any = within(json.loads(json.dumps(full)), most)
    size = len(json.dumps({**cut, "left_out": []}, separators=(",", ":")))
    assert size <= most or not any(cut["ids"])
    assert len(cut["left_out"]) == {0.9: 1, 0.5: 2, 0.1: 3}[share]
    assert cut["kernels"][0]["source"] == ""
    assert within(dict(full), 10**9) == {**full, "left_out": []}
    assert cut["structures"] == data["structures"]


def test_the_shell_writes_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["inspect", "llama", "--html", str(tmp_path / "a.html"), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(Page((tmp_path / "a.html").read_text(encoding="utf-8")).inside("script")[0])
    assert [s["name"] for s in said["structures"]] == [s["name"] for s in json.loads(done.stdout)["structures"]]
    assert CliRunner().invoke(app, ["inspect", "llama", "--html", str(tmp_path)]).exit_code == 2
