"""The program as text: what is printed at every stage, and that a test can match it."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import FileCheck

import sparsify
from sparsify import S2FT, LoRA, Plan, Quantize
from sparsify.api import PIPELINE
from sparsify.passes.base import Context, run_passes
from sparsify.program import Program
from sparsify.program.capture import capture
from sparsify.program.printer import ids_text, print_program, site_text, tensor_text
from sparsify.program.structure import Site

PLAN = Plan([S2FT(structure="ffn", fraction=0.1), S2FT(structure="attention", fraction=0.3, producer_fraction=0.5)])


@pytest.fixture(scope="module")
def stages() -> list[Program]:
    """A grouped-query Llama after each pass."""
    programs = [capture(tiny.llama())]
    for step in PIPELINE:
        programs.append(run_passes(programs[-1], [step], Context(PLAN)))
    return programs


def test_every_stage_prints(stages: list[Program]) -> None:
    for program in stages:
        text = str(program)
        FileCheck().check(f"stage {program.stage.name}").check("history:").check("capture: LlamaForCausalLM").check(
            "graph(%input_ids: i64[2, 7]"
        ).check("@model.layers.0.self_attn.q_proj.weight").check("return %").run(text)


def test_captured_has_no_structures(stages: list[Program]) -> None:
    FileCheck().check_not("structures:").check_not("permuted:").check_not("»").run(str(stages[0]))


def test_structures_have_one_line_each(stages: list[Program]) -> None:
    text = str(stages[1])
    FileCheck().check("structures: 4 (2 attention, 2 ffn)").check_same("").check(
        "attention model.layers.0.self_attn: 2 KV groups of 3 heads | "
    ).check("ffn model.layers.0.mlp: 44 channels | ").run(text)
    assert sum("down down_proj.weight[1 ×1]" in line for line in text.splitlines()) == 2


def test_lowered_shows_choices_moves_slices_and_operators(stages: list[Program]) -> None:
    text = str(stages[-1])
    FileCheck().check("chosen: 4").check("of 44 channels: ").check("; in place: heads are blocks").check(
        "permuted: 2"
    ).check("down_proj.weight[1]").check("trained: ").check(
        "down_proj.weight[:, 0:4] f32[36, 4] column block, channels "
    ).run(text)
    ours = [line for line in text.splitlines() if "sparsify.partial_linear" in line]
    assert len(ours) == len(stages[-1].slices) == 6
    assert sum("sparsify.partial_linear_at(" in line for line in ours) == sum(bool(s.places) for s in stages[-1].slices)
    assert all(line.startswith("  »") and "  # trains " in line for line in ours)
    FileCheck().check("» ").check("sparsify.partial_linear(%").check("down_proj.weight, None, @").check(
        "down_proj.weight_slice, 0, 1)  # trains 4 input channels [0:4]"
    ).run(text)


def test_noise_is_hidden_and_counted(stages: list[Program]) -> None:
    short, full = print_program(stages[0]), print_program(stages[0], noise=True)
    assert "_assert_tensor_metadata" not in short
    assert "assertions not shown" in short
    assert "_assert_tensor_metadata" in full
    assert "not shown" not in full


def test_text_is_the_same_in_every_run() -> None:
    first, second = (str(tiny.lower(tiny.llama()).sparsify.program) for _ in range(2))
    assert first == second


def test_lowrank_and_quantised_weights_are_listed() -> None:
    plan = Plan([LoRA(match="*.q_proj", rank=2), Quantize(match="*.up_proj", format="int8")])
    text = str(sparsify.compile(tiny.llama(), plan, progress=False).sparsify.program)
    FileCheck().check("sparse and low-rank: 2").check("@model.layers.0.self_attn.q_proj.weight + 2·BA (rank 2)").check(
        "quantised: 2"
    ).check("@model.layers.0.mlp.up_proj.weight int8").check("sparsify.").run(text)


def test_declined_structures_give_their_reason() -> None:
    program = capture(tiny.llama())
    from sparsify.program.structure import Declined

    declined = Declined("model.layers.0.self_attn", "attention", "its heads carry slopes")
    text = str(program.evolve("by hand", declined=(declined,)))
    FileCheck().check("by hand").check("declined: 1").check("self_attn: its heads carry slopes").run(text)


def test_deep_models_print_one_layer_and_all_of_them_when_asked() -> None:
    program = sparsify.analyse(tiny.llama(num_hidden_layers=12))
    text, whole = str(program), program.text(fold=False)
    assert "model.layers.{0…11}.mlp: 44 channels" in text
    assert "    # × 12: model.layers.{0…11}, " in text
    assert "model.layers.11.mlp: 44 channels" in whole
    assert len(text.split("\n")) < 200 < 56 * 12 < len(whole.split("\n"))


def test_pieces() -> None:
    assert tensor_text(torch.empty(2, 7, dtype=torch.bfloat16)) == "bf16[2, 7]"
    assert tensor_text((torch.empty(1, dtype=torch.int8), None)) == "(i8[1], none)"
    assert ids_text(range(3), 8) == "0, 1, 2"
    assert ids_text(range(10), 3) == "0, 1, 2, … 7 more"
    site = Site("a.b.weight", 0, 8, offset=64, outer=((2, 48),), stride=24, role="q")
    assert site_text(site, "a") == "b.weight[0 ×8 +64 /24 (2@48)]"
