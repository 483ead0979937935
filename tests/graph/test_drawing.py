"""The program as a picture: well-formed, complete, small enough, true to the moves, written whole or not at all."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import tiny
import torch
import zoo

import sparsify
from sparsify import S2FT, LoRA, Plan, Quantize
from sparsify.api import PIPELINE
from sparsify.passes.base import Context, run_passes
from sparsify.program.capture import capture
from sparsify.program.structure import Declined
from sparsify.show import drawing
from sparsify.show.drawing import View, count_parameters, draw_program, shared_parts, split_layer, write_atomically

PLAN = Plan([S2FT(structure="ffn", fraction=0.1), S2FT(structure="attention", fraction=0.3, producer_fraction=0.5)])


def test_every_stage_draws_well_formed_svg() -> None:
    program = capture(tiny.llama())
    assert "no structures yet" in draw_program(program)
    for step in PIPELINE:
        program = run_passes(program, [step], Context(PLAN))
        root = ET.fromstring(draw_program(program))
        assert root.tag.endswith("svg")
        text = " ".join(root.itertext())
        assert "LlamaForCausalLM" in text
        assert f"stage: {program.stage.name.lower()}" in text
        assert "2 attention, 2 feed-forward" in text


def test_title_counts_what_trains() -> None:
    model = tiny.llama()
    total = sum(p.numel() for p in model.parameters())
    host = sparsify.compile(model, PLAN, progress=False)
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    assert count_parameters(host.sparsify.program) == (trained, total)
    assert f"{trained:,} of {total:,} parameters train" in host.sparsify.program.svg()


def test_counts_include_low_rank_parts_and_quantised_weights() -> None:
    model = tiny.llama()
    plan = Plan([LoRA(match="*.q_proj", rank=2), Quantize(match="*.up_proj", format="int8")])
    host = sparsify.compile(model, plan, progress=False)
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    assert count_parameters(host.sparsify.program)[0] == trained
    assert "low-rank, sparse or quantised" in host.sparsify.program.svg()


def test_cells_show_original_units_and_what_trains() -> None:
    """Read back from the tensors: the unit drawn at a place is the one whose weights stand there."""
    model = tiny.llama(num_attention_heads=6, num_key_value_heads=2)
    host = sparsify.compile(model, PLAN, progress=False)
    program = host.sparsify.program
    slices: dict = {}
    for piece in program.slices:
        slices.setdefault((piece.param, piece.axis), []).append(piece)
    for structure in program.structures:
        cells = View(program, structure, slices).cells
        choice = next(c for c in program.choices if c.structure == structure.name)
        assert sorted(c.original for c in cells) == list(range(len(cells)))
        assert {c.original for c in cells if c.consumer} == set(choice.consumers)
        group = structure.inner.units if structure.inner is not None else 1
        assert {c.original // group for c in cells if c.producer} == set(choice.producers)
        site = structure.with_role("q", "up")[0]
        width = site.block // group
        before, after = model.get_parameter(site.param), program.tensor(site.param)
        for place, cell in enumerate(cells):
            assert after[place * width].equal(before[cell.original * width])


def test_trained_ranges_are_contiguous() -> None:
    host = sparsify.compile(tiny.llama(), Plan([S2FT(structure="ffn", fraction=0.2)], seed=3), progress=False)
    program = host.sparsify.program
    slices = {(s.param, s.axis): [s] for s in program.slices}
    for structure in (s for s in program.structures if s.kind == "ffn"):
        on = [i for i, cell in enumerate(View(program, structure, slices).cells) if cell.consumer]
        assert len(on) > 1
        assert on == list(range(on[0], on[0] + len(on)))


def test_declined_structures_are_grey_with_their_reason() -> None:
    reason = "slopes <of> the heads & more"
    program = capture(tiny.llama()).evolve(
        "by hand", declined=(Declined("model.layers.1.self_attn", "attention", reason),)
    )
    root = ET.fromstring(draw_program(program))
    group = next(g for g in root.iter() if g.get("class") == "declined")
    title = next(e for e in group if e.tag.endswith("title"))
    assert reason in (title.text or "")


def test_deep_model_is_readable_and_small() -> None:
    host = sparsify.compile(tiny.llama(num_hidden_layers=8), PLAN, progress=False)
    text, whole = host.sparsify.program.svg(), host.sparsify.program.svg(fold=False)
    assert re.findall(r">(layers\.\d+)</text>", whole) == [f"layers.{i}" for i in range(8)]
    assert re.findall(r">(layers\.[^<]*)</text>", text) == ["layers.{0…7}"]
    assert ">× 8</text>" in text
    assert len(text) < 150_000
    assert 3 * len(text) < len(whole) < 50_000 * 8  # a deep model's picture stays one that a browser opens


def test_a_folded_row_shows_what_every_layer_trains() -> None:
    host = sparsify.compile(tiny.llama(num_hidden_layers=5), PLAN, progress=False)
    program = host.sparsify.program
    root = ET.fromstring(program.svg())
    titles = [next(e.text or "" for e in g) for g in root.iter() if g.get("class") == "strip"]
    assert len(titles) == 10
    for choice in program.choices:
        title = next(t for t in titles if t.startswith(f"{choice.structure}: "))
        ids = {int(i) for i in title.rpartition("s ")[2].split(", ")}
        assert set(choice.consumers) <= ids
    assert 'class="strip"' not in program.svg(fold=False)
    assert 'class="strip"' not in sparsify.analyse(tiny.llama(num_hidden_layers=5)).svg(), "nothing differs, no strips"


@pytest.mark.parametrize("rule", [S2FT(structure="ffn", fraction=0.01), S2FT(structure="ffn", fraction=0.2)])
def test_chosen_channels_are_wide_enough_to_see(rule: S2FT) -> None:
    host = sparsify.compile(tiny.llama(num_hidden_layers=5, intermediate_size=2500), Plan([rule]), progress=False)
    program = host.sparsify.program
    text = program.svg()
    paths = re.findall(r'<path d="((?:M[\d.]+ [\d.]+H[\d.]+v[\d.]+H[\d.]+z)+)"', text)
    marks = [(float(left), float(right)) for d in paths for left, right in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)v", d)]
    assert len(marks) > 50
    assert min(right - left for left, right in marks) > 4.8
    block = re.findall(r'<rect x="([\d.]+)" width="([\d.]+)" y="\d+" height="16" fill="#e8590c"', text)
    assert block
    assert min(float(width) for _, width in block) >= 5
    assert len(text) < 40_000, "as many marks as fit, not one for each of 500 channels"


def test_scattered_channels_stay_inside_their_bar() -> None:
    ids = torch.randperm(900, generator=torch.Generator().manual_seed(1))[:300]
    marks = drawing._marks(ids, 900, 10.0, 0.0, 400, 16, "red")
    spans = [tuple(map(float, span)) for line in marks for span in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)v", line)]
    assert min(left for left, _ in spans) >= 10
    assert max(right for _, right in spans) <= 410
    covered = {int((place * 80) // 900) for place in ids.tolist()}
    assert sum(round((right - left) / 5) for left, right in spans) == len(covered)
    assert drawing._marks(ids[:0], 900, 10.0, 0.0, 400, 16, "red") == []
    assert "fill-opacity" not in drawing._marks(ids[:1], 900, 10.0, 0.0, 400, 16, "red")[0]


def test_a_layer_that_looks_different_has_its_own_row() -> None:
    program = sparsify.analyse(tiny.llama(num_hidden_layers=5))
    kept = tuple(s for s in program.structures if s.name != "model.layers.2.mlp")
    declined = (Declined("model.layers.2.mlp", "ffn", "its order matters"),)
    text = program.evolve("by hand", structures=kept, declined=declined).svg()
    assert re.findall(r">(layers\.[^<]*)</text>", text) == ["layers.{0, 1, 3, 4}", "layers.2"]
    assert "its order matters" in text
    host = sparsify.compile(
        tiny.llama(num_hidden_layers=5),
        Plan([LoRA(match="*.q_proj", rank={"*.1.*": 3, "*": 2}, alpha=4)]),
        progress=False,
    )
    assert re.findall(r">(layers\.[^<]*)</text>", host.sparsify.program.svg()) == ["layers.{0, 2…4}", "layers.1"]


def test_two_layers_are_drawn_as_before() -> None:
    program = sparsify.compile(tiny.llama(), PLAN, progress=False).sparsify.program
    assert program.svg() == program.svg(fold=False)


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "T5", "Whisper", "BERT", "ViT", "Mixtral"])
def test_families_draw(name: str) -> None:
    family = next(f for f in zoo.FAMILIES if f.name == name)
    model = zoo.build(family)[0]
    args, kwargs = zoo.example(family, model)
    program = sparsify.analyse(model, kwargs or args)
    root = ET.fromstring(draw_program(program))
    groups = [g for g in root.iter() if g.get("class") in ("attention", "ffn", "other")]
    assert len(groups) == len(program.structures)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "graph.svg"
    program = sparsify.analyse(tiny.llama())
    assert program.svg(str(target)) == target.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    old = target.read_text()
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "half")
    assert target.read_text() == old
    assert list(target.parent.iterdir()) == [target]


def test_names() -> None:
    assert split_layer("model.layers.3.mlp") == ("model.layers.3", "mlp")
    assert split_layer("head.mlp") == ("head.mlp", "")
    assert shared_parts(["model.encoder.layers.0", "model.decoder.layers.0"]) == 1
    assert shared_parts([]) == 0
