"""`sparsify.autoplan`: what it says of memory is what a real step takes, units go where the gradient is, and nothing that does not fit is chosen."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner, Result

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, PlanError, Quantize, RoSA
from sparsify.adapters.vllm_check import served_rank
from sparsify.cli import app
from sparsify.plan import plan_file
from sparsify.plan.name_patterns import matches
from sparsify.planner import limits as budgets
from sparsify.planner import shallow
from sparsify.planner.candidates import Candidate, Choices, between, pattern_of, shared_out
from sparsify.planner.estimate import Step, Traces, estimate, one_step
from sparsify.planner.rank_bound import bounded
from sparsify.planner.sensitivity import field_of, measure, uniform
from sparsify.planner.shallow import Repeat, repeat_of
from sparsify.planner.step_time import assembled, measured_size

RUNNER = CliRunner(env={"COLUMNS": "220", "TERM": "dumb"})
VOCABULARY, LAYERS = 96, 5


def llama(layers: int = LAYERS, **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **changes}))


def gpt2(layers: int = LAYERS) -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=64))


def neox(layers: int = LAYERS) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": layers,
    }
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))


@pytest.fixture(autouse=True)
def _few_are_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model of five blocks is cut down to, users' models are from nine on."""
    monkeypatch.setattr(repeat_of, "__defaults__", (None, LAYERS - 1))


FAMILIES = {"llama": llama, "gpt2": gpt2, "neox": neox}


def built(family: str, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return (llama().bfloat16() if family == "bf16" else FAMILIES[family]()).eval()


def batches(count: int = 2, rows: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    found = torch.randint(3, VOCABULARY, (count, rows, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids} for ids in found]


# --- models of many equal blocks ---


@pytest.mark.parametrize(
    ("family", "rules", "checkpointing"),
    [
        ("neox", [S2FT(0.1)], True),
        ("bf16", [S2FT(0.1)], False),
        # other families, methods and bases: the cases above go the same way
        pytest.param("gpt2", [LoRA(4), Quantize("int8")], False, marks=pytest.mark.slow),
        pytest.param("llama", [S2FT(0.1)], False, marks=pytest.mark.slow),
        pytest.param("llama", [RoSA(3, density=0.02, mask="random")], False, marks=pytest.mark.slow),
        pytest.param("neox", [PaCA(6)], False, marks=pytest.mark.slow),
        pytest.param("gpt2", [S2FT(units=2)], True, marks=pytest.mark.slow),
    ],
)
def test_three_blocks_say_byte_for_byte_what_all_of_them_take(
    family: str, rules: list[Any], checkpointing: bool
) -> None:
    cut, whole = (
        estimate(
            built(family, "meta"), Plan(rules), batch=3, length=17, gradient_checkpointing=checkpointing, whole=w, world=2, sharded=True, full=family == "bf16"
        )
        for w in (False, True)
    )  # fmt: skip
    assert (cut.traced, whole.traced) == ((3, LAYERS), None)
    if cut.full is not None:
        assert cut.full.weights < cut.step.weights  # the model alone, without what was put beside it
    assert dataclasses.replace(cut, traced=None, declined=()) == dataclasses.replace(whole, declined=())


def test_models_that_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat_of, "__defaults__", (None, shallow.DEEP))
    with torch.device("meta"):
        model = llama(9)
        assert repeat_of(model) == Repeat("model.layers", 9, 3)
        for plan in (
            Plan([S2FT(0.1)]),
            Plan([LoRA(rank={"*.q_proj": 4, "*": 2})]),
            Plan([LoRA(match="model.layers.{0-8}.*")]),
        ):
            assert repeat_of(model, plan) is not None
        for plan in (
            Plan([LoRA(match="model.layers.{0-7}.*")]),
            Plan([LoRA(rank={"model.layers.8.*": 4, "*": 2})]),
            Plan([S2FT(0.1)], train=["model.layers.2.input_layernorm"]),
        ):
            assert repeat_of(model, plan) is None
        assert repeat_of(llama(8)) is None
        wider = llama(9)
        wider.model.layers[5].mlp.up_proj = torch.nn.Linear(32, 80, bias=False)
        assert repeat_of(wider) is None
        mixed = llama(9)
        mixed.config.layer_types = ["full_attention"] * 8 + ["sliding_attention"]
        assert repeat_of(mixed) is None


# --- the budget's words ---


@pytest.mark.parametrize(
    ("text", "bytes"),
    [("8GiB", 8 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), ("512", 512), (77, 77), ("3kb", 3000)],
)
def test_sizes(text: Any, bytes: int) -> None:
    assert budgets.size(text) == bytes


@pytest.mark.parametrize("text", ["8G", "0GiB", "-1GiB", "GiB", "", 0, -5, True, 1.5, "9" * 40, "8GiB8"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(PlanError, match=r"memory=.*expected bytes"):
        budgets.size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("1h30m", 5400), ("90min", 5400), ("45s", 45), (3, 3), ("1d", 86_400)]
)
def test_durations(text: Any, seconds: float) -> None:
    assert budgets.duration(text) == seconds


@pytest.mark.parametrize("text", ["2", "two h", "", "-3h", 0, float("nan"), float("inf"), "1h x", True])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(PlanError, match=r"time=.*expected seconds"):
        budgets.duration(text)


def test_budgets_of_the_command() -> None:
    assert budgets.limits(["memory=8GiB time=2h accuracy"]) == budgets.Limits(8 << 30, 7200.0, "accuracy")
    assert budgets.limits(["memory=1KiB", "time"]) == budgets.Limits(1024, None, "time")
    for words, text in (
        (["memory=1KiB", "memory=2KiB"], "is said twice"),
        (["speed=3"], "is no budget"),
        (["fast"], "is no budget"),
    ):
        with pytest.raises(PlanError, match=text):
            budgets.limits(words)


# --- where the gradient is ---


def test_the_gradient_pass_measures_the_squares_of_the_gradient() -> None:
    """Against autograd in fp64: the squared gradient of every column, summed over batches."""
    model = built("llama").double()
    field = field_of(model, repeat_of(model))
    assert len(field.shapes) == LAYERS * 7
    found = measure(model, field, batches(), progress=False)
    oracle = dict.fromkeys(field.shapes, 0.0)
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        oracle = {name: oracle[name] + model.get_parameter(name).grad.square().sum(0) for name in oracle}
    for name, columns in oracle.items():
        torch.testing.assert_close(found.columns[name], columns, rtol=1e-4, atol=1e-12)  # gradients are formed in fp32


def test_a_gpt2_is_measured_by_its_inputs() -> None:
    """Conv1D stores (inputs, outputs)."""
    model = built("gpt2")
    field = field_of(model, repeat_of(model))
    assert field.shapes["transformer.h.4.mlp.c_proj.weight"] == (32, 128)
    found = measure(model, field, batches(1), progress=False)
    model(**batches(1)[0]).loss.backward()
    name = "transformer.h.3.mlp.c_proj.weight"
    torch.testing.assert_close(
        found.columns[name].float(), model.get_parameter(name).grad.square().sum(1), rtol=1e-3, atol=1e-9
    )


def test_units_go_where_the_gradient_is() -> None:
    """One block has a hundred times the gradient of the others: it gets twice as many, and what that costs is taken elsewhere."""
    model = built("llama")
    repeat = repeat_of(model)
    field = field_of(model, repeat)
    found = uniform(field)
    found.measured = True
    generator = torch.Generator().manual_seed(0)
    for name, columns in found.columns.items():
        columns.mul_(
            torch.rand(columns.shape, generator=generator, dtype=torch.float64) * (100 if ".layers.3." in name else 1)
        )
        found.entries[name] = torch.full((100,), 0.01, dtype=torch.float64)
    choices = Choices(field, found, repeat, None, 0)
    for method, size in (("LoRA", 8.0), ("PaCA", 8.0), ("RoSA", 8.0), ("S2FT", 0.12)):
        candidate = choices.candidate(method, size, None, False)
        spread = choices.spread(candidate)
        assert spread is not None
        plan, reach = spread
        assert reach > candidate.reach
        rules: Any = plan.rules
        if method == "S2FT":
            counts = {
                b: next(r.units for r in rules if r.structure == "ffn" and r.matches(f"model.layers.{b}.mlp.down_proj"))
                for b in range(LAYERS)
            }
            one = choices.counts(size)["model.layers.0.mlp"]
        else:
            ranks: Any = plan.rules[0].rank  # type: ignore[attr-defined]
            counts = {
                b: next(r for p, r in ranks.items() if matches(p, f"model.layers.{b}.mlp.up_proj"))
                for b in range(LAYERS)
            }
            one = 8
        assert counts[3] == 2 * one
        assert sum(counts.values()) <= LAYERS * one
        assert min(counts.values()) < one


def test_reach_of_all_is_all() -> None:
    model = built("llama", "meta")
    field = field_of(model, None)
    choices = Choices(field, uniform(field), None, None, 0)
    everything = choices.gain("PaCA", 0, 1000)
    assert everything == pytest.approx(choices.whole)
    assert choices.candidate("LoRA", 16, None, False).reach < 1
    assert not choices.sizes("RoSA")
    assert "give calibration batches" in choices.why_none("RoSA")


def test_upgrades_are_bought_where_they_gain_most() -> None:
    gains = {0: [1.0, 2.0, 2.5], 1: [1.0, 5.0, 9.0], 2: [1.0, 1.1, 1.2]}
    assert shared_out(gains, (1, 2, 4), 7) == {0: 1, 1: 2, 2: 0}
    assert shared_out(gains, (1, 2, 4), 3) == {0: 0, 1: 0, 2: 0}
    assert pattern_of(Repeat("model.layers", 9, 3), [0, 1, 2, 7]) == "model.layers.{0-2,7}.*"
    assert between(2, (1, 10.0), (5, 50.0)) == 20.0
    assert (served_rank(9), served_rank(512), served_rank(513), served_rank(None)) == (16, 512, None, None)


# --- the choice ---


def tight(model: Any, **options: Any) -> int:
    """Bytes that only some of the sizes of S2FT fit into."""
    small, large = (
        estimate(built("llama", "meta"), Plan([S2FT(f)]), full=False, **options).step.peak for f in (0.03, 0.12)
    )
    assert large > small
    return (small + large) // 2


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("neox", marks=pytest.mark.slow)]
)
def test_memory_is_what_a_real_step_takes_and_within_the_budget(family: str) -> None:
    """Counted over a real step of a real host: weights, moments, gradients, what autograd keeps."""
    model = built(family)
    memory = tight(model, batch=2, length=16) if family == "llama" else "2MiB"
    arguments: Any = {"memory": memory, "batch": 2, "length": 16, "methods": ["s2ft"], "progress": False}
    found = sparsify.autoplan(model, calibration=batches(), **arguments)
    if family == "gpt2":  # the same way for the others
        assert found == sparsify.autoplan(model, calibration=batches(), **arguments)
    host: Any = sparsify.compile(model, found.plan, calibration=batches(), progress=False)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    real = one_step(host, {"input_ids": ids, "attention_mask": mask, "labels": ids}, found.recompute)
    assert found.chosen.memory is not None
    assert abs(found.chosen.memory / real.peak - 1) < 0.01  # (15 % are promised)
    assert found.estimate.step.saved == pytest.approx(real.saved, rel=0.01)
    assert real.peak <= budgets.size(memory)
    text = str(found)
    for word in ("memory:", "method: S2FT", "as LoRA: rank", "vLLM needs --max-lora-rank", "reach", "the plan"):
        assert word in text
    json.dumps(found.to_dict())
    if family == "llama":
        assert any("above the budget of memory" in c.refused for c in found.alternatives)
        assert not found.chosen.refused


def test_what_is_given_up_is_given_up_in_turn() -> None:
    """A budget below every plan over the base as it is: blocks are computed again before the base is packed."""
    model = built("llama")
    shape: Any = {"batch": 4, "length": 48, "full": False}
    plain, again = (
        estimate(built("llama", "meta"), Plan([PaCA(4)]), gradient_checkpointing=c, **shape).step.peak
        for c in (False, True)
    )
    found = sparsify.autoplan(model, memory=(plain + again) // 2, batch=4, length=48, methods=["PaCA"], progress=False)
    assert (found.recompute, found.chosen.base) == (True, None)
    assert any("blocks are computed again" in line for line in found.reasons)
    assert all(c.refused for c in found.alternatives)
    assert found.plan.rules[0].select == "random"  # type: ignore[attr-defined]


@pytest.mark.slow  # its search is the one above, its words those of the budget of time below
def test_a_batch_that_would_fit_is_named() -> None:
    peak = estimate(
        built("llama", "meta"), Plan([PaCA(4)]), gradient_checkpointing=True, batch=4, length=48, full=False
    ).step.peak
    with pytest.raises(PlanError, match=r"no plan fits the budget; the nearest is PaCA.*A batch of \d+ would fit"):
        sparsify.autoplan(built("llama"), memory=int(0.8 * peak), batch=16, length=48, methods=["PaCA"], progress=False)


def test_what_it_refuses() -> None:
    model = built("llama", "meta")
    with pytest.raises(PlanError, match="needs tokens"):
        sparsify.autoplan(model, time="2h")
    with pytest.raises(PlanError, match="meta device has no gradients"):
        sparsify.autoplan(model, memory="1GiB", calibration=batches(), progress=False)
    with pytest.raises(PlanError, match="'full' is none of S2FT"):
        sparsify.autoplan(model, methods=["full"])
    with pytest.raises(PlanError, match="'Prune' is none of .*: zeros take as much memory and time in a training step"):
        sparsify.autoplan(model, methods=["LoRA", "Prune"])
    with pytest.raises(PlanError, match="expected one of accuracy, memory, time"):
        sparsify.autoplan(model, goal="speed")
    with pytest.raises(PlanError, match="no model for causal|not a model for causal"):
        sparsify.autoplan(torch.nn.Linear(3, 3))
    with pytest.raises(PlanError, match="scattered entries are no LoRA of rank 8"):
        sparsify.autoplan(model, methods=["RoSA"], max_lora_rank=8, progress=False)


# --- the rank of an export ---


def test_an_export_stays_within_the_rank(tmp_path: Path) -> None:
    model = built("llama")
    meta = built("llama", "meta")
    traces = Traces(meta)
    for rule in (S2FT(0.5), S2FT(0.5, structure="ffn"), LoRA(32), PaCA(rank={"*.q_proj": 12, "*": 3})):
        plan = bounded(model, Plan([rule]), 8)
        assert estimate(meta, plan, batch=1, length=8, full=False, traces=traces).lora_rank == 8
    plan = bounded(model, Plan([S2FT(0.5)]), 7)  # a head has eight channels
    assert [(r.structure, r.units) for r in plan.rules] == [("ffn", 7)]  # type: ignore[attr-defined]
    assert bounded(model, Plan([S2FT(0.1), Quantize("int8")]), 512).rules == (S2FT(0.1), Quantize("int8"))
    host: Any = sparsify.compile(model, bounded(model, Plan([S2FT(0.5)]), 8), progress=False)
    host.sparsify.export_lora(tmp_path / "peft")
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert max(t.shape[0] for n, t in exported.items() if "lora_A" in n) == 8
    for rule, text in (
        (RoSA(4), "scattered entries"),
        (S2FT(0.5, producer_fraction=0.1), "rows of V and Up"),
        (S2FT(0.5, structure="attention"), "has 8 channels"),
    ):
        with pytest.raises(PlanError, match=text):
            bounded(model, Plan([rule]), 7)


# --- time ---


class Sizes(torch.nn.Module):
    """A host of three blocks by its trained numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 2, bias=False) for _ in range(3))


def test_the_middle_block_stands_for_those_that_are_not_there() -> None:
    seconds = {
        "forward tail": 1.0,
        "forward 0": 2.0,
        "forward 1": 3.0,
        "forward 2": 5.0,
        "forward head": 7.0,
        "backward head": 11.0,
    }
    seconds |= {"backward 2": 13.0, "backward 1": 17.0, "backward 0": 19.0, "optimizer": 6.0}
    found = assembled(Sizes(), Repeat("layers", 10, 3), seconds, (2, 8), 64)
    assert found.forward == 4 * (18 + 7 * 3)
    assert found.backward == 4 * (60 + 7 * 17)
    assert found.optimizer == 6 * 10 / 3
    assert found.blocks == (3, 10)
    alone = assembled(Sizes(), None, {"forward tail": 3.0, "backward head": 4.0, "optimizer": 6.0}, (8, 8), 64)
    assert (alone.forward, alone.backward, alone.optimizer, alone.blocks) == (3.0, 4.0, 6.0, None)


def test_long_rows_of_large_models_are_measured_by_shorter_ones() -> None:
    assert measured_size(1_000_000, 8, 1024, 12.0) == (8, 1024)
    rows, length = measured_size(10_000_000_000, 8, 4096, 12.0)
    assert (rows, length) == (8, 64)


def test_a_budget_of_time_refuses_what_takes_longer() -> None:
    """The clock is not asked: what is measured here, whatever it is, is far above a microsecond and far below ten years."""
    model = built("llama")
    arguments: Any = {"tokens": 64_000, "batch": 2, "length": 16, "methods": ["PaCA"], "progress": False}
    found = sparsify.autoplan(model, time="3650d", goal="time", **arguments)
    assert found.steps == 2000
    assert found.time is not None
    assert found.chosen.total == pytest.approx(2000 * found.time.seconds)
    assert any("time: 2,000 steps" in line for line in found.reasons)
    with pytest.raises(PlanError, match=r"no plan fits.*above the budget of time\. \d+ tokens would fit"):
        sparsify.autoplan(model, time=1e-6, **arguments)


# --- the command ---


def call(*arguments: Any) -> Result:
    return RUNNER.invoke(app, ["plan", *(os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given") / "model"
    path.mkdir()
    with torch.device("meta"):
        config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    (path / "config.json").write_text(json.dumps(config.to_diff_dict()))
    return path


def test_the_command_chooses_and_writes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    done = call(
        folder,
        "--budget",
        "memory=3MiB accuracy",
        "-m",
        "s2ft,rosa",
        "--max-lora-rank",
        8,
        "-b",
        2,
        "-l",
        16,
        "-o",
        out,
    )
    assert done.exit_code == 0, done.output
    for word in ("memory:", "RoSA", "scattered entries are no LoRA", "the plan", "vLLM needs --max-lora-rank 8"):
        assert word in done.stdout
    file = plan_file.read(out)
    assert estimate(built("llama", "meta"), file.plan, batch=2, length=16, full=False).lora_rank == 8
    assert (file.training.batch, file.training.length) == (2, 16)


def test_what_the_command_refuses(folder: Path) -> None:
    for options, text in (
        (["--budget", "speed=3"], "is no budget"),
        (["--budget", "memory=1MiB", "--rank", "8"], "no options of a rule"),
        (["--tokens", "5"], "belongs to a budget of time"),
        (["--budget", "time=2h"], "needs tokens"),
        (["--budget", "memory=1GiB", "-m", "full"], "'full' is none of S2FT"),
        (["--max-lora-rank", "8", "--method", "rosa"], "scattered entries"),
    ):
        done = call(folder, *options)
        assert done.exit_code == 2, done.output
        assert text in done.stderr


def test_the_estimate_takes_a_rank(folder: Path) -> None:
    done = call(folder, "--fraction", "0.5", "--max-lora-rank", "16", "--json", "-b", "1", "-l", "8")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["lora_rank"] == 16


def test_candidates_say_what_they_are() -> None:
    assert Candidate("RoSA", 16, "nf4", True, 0.1, None).what == "RoSA, rank 16, 0.64% of the entries"
    assert Candidate("RoSA", 16, "nf4", True, 0.1, None).over == "nf4, recomputing"
    assert Step(1, 2, 3, 4).peak == 4
