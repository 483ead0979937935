"""`sparsify plan`: the estimate is what a real step takes, from a config alone; the file that it writes is what `finetune` reads."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import small_folder
import tiny
import torch
import transformers as hf
from typer.testing import CliRunner, Result

from sparsify import S2FT, LoRA, PaCA, Plan, RoSA
from sparsify.cli import app
from sparsify.plan import plan_file
from sparsify.planner import estimate as estimates
from sparsify.planner.estimate import estimate

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def call(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [os.fspath(a) for a in arguments])


def fine(*arguments: str | Path) -> str:
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str | Path) -> str:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and nothing else."""
    path = tmp_path_factory.mktemp("given") / "model"
    path.mkdir()
    config = small_folder.config(hidden_size=64, intermediate_size=160, architectures=["LlamaForCausalLM"])
    (path / "config.json").write_text(json.dumps(config.to_diff_dict()))
    return path


def built(device: str = "cpu") -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return hf.LlamaForCausalLM(small_folder.config(hidden_size=64, intermediate_size=160))


def padded(rows: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, -3:] = 0
    ids = torch.arange(rows * length).reshape(rows, length) % 20 + 3
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


SPARSE = RoSA(3, density=0.02, mask="magnitude")
#: all go through the same counting
RULES: list[Any] = [
    S2FT(0.1),
    pytest.param(LoRA(4), marks=pytest.mark.slow),
    pytest.param(PaCA(4), marks=pytest.mark.slow),
    pytest.param(SPARSE, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rule", RULES, ids=["S2FT", "LoRA", "PaCA", "RoSA"])
@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)]
)  # the False ones cover the counting
def test_the_estimate_is_what_a_real_step_takes(rule: Any, checkpointing: bool) -> None:
    """Byte for byte, over the same kernels: no formula and no constant of ours is in it."""
    found = estimate(
        built("meta"),
        Plan([rule]),
        batch=3,
        length=17,
        gradient_checkpointing=checkpointing,
        full=isinstance(rule, S2FT),
    )
    host: Any = tiny.lower(built(), rule)
    trainable, total = host.sparsify.count_parameters()
    real = estimates.one_step(host, padded(3, 17), checkpointing)
    assert (found.trainable, found.total) == (trainable, total)
    if isinstance(rule, RoSA):  # its mask is left open, so one gather of the backward is not made
        assert real.peak * 0.99 < found.step.peak <= real.peak
        real = dataclasses.replace(real, peak=found.step.peak)
    assert found.step == real
    for step in filter(
        None, (found.step, found.full)
    ):  # at the end of the forward AdamW's moments are there from the step before
        assert step.peak >= step.weights + 2 * step.trained + step.saved
    if found.full is not None:
        assert found.full == estimates.one_step(built(), padded(3, 17), checkpointing)


def test_checkpointing_and_rows_change_what_is_kept() -> None:
    plan = Plan([S2FT(0.1)])
    plain, less = (
        estimate(built("meta"), plan, batch=b, length=16, gradient_checkpointing=c, full=False)
        for b, c in ((2, False), (4, True))
    )
    assert less.step.saved < 0.6 * plain.step.saved  # with twice the rows
    assert plain.step.weights == less.step.weights


@pytest.mark.parametrize(
    ("rule", "rank"),
    [(S2FT(0.1), None), (LoRA(4), 4), pytest.param(PaCA(4), 4, marks=pytest.mark.slow), (SPARSE, None)],
)
def test_size_and_rank_of_the_adapter(rule: Any, rank: int | None, tmp_path: Path) -> None:
    found = estimate(built("meta"), Plan([rule]), batch=1, length=8, full=False)
    host: Any = tiny.lower(built(), rule)
    tiny.disturb(host)
    host.sparsify.save_adapter(tmp_path / "a")
    held = host.sparsify.current()
    assert found.adapter == sum(
        d.values.numel() * 4 + d.channels.numel() * 8 + (d.a.numel() * 4 if d.a is not None else 0) for d in held.deltas
    )
    assert found.adapter < (tmp_path / "a" / "adapter.safetensors").stat().st_size
    if isinstance(rule, RoSA):
        assert found.lora_rank is None
        return
    host.sparsify.export_lora(tmp_path / "peft")
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert found.lora_rank == max(t.shape[0] for n, t in exported.items() if "lora_A" in n)
    assert rank in (None, found.lora_rank)


def test_rules_that_choose_by_data_are_estimated_without_any() -> None:
    rules = [S2FT(0.1, select="activation", avoid=["x"]), PaCA(4, select="gradient"), RoSA(3, mask="fisher"), LoRA(3)]
    blind = estimates.sizes_only(Plan(rules, check="numeric", seed=3))
    assert blind == Plan([S2FT(0.1), PaCA(4), RoSA(3, mask="gradient"), LoRA(3)], seed=3)


def test_processes_share_what_they_can() -> None:
    both, pieces = (
        estimate(built("meta"), Plan([S2FT(0.1)]), batch=2, length=16, full=False, world=4, sharded=s)
        for s in (False, True)
    )
    assert both.step == pieces.step
    assert both.ranks is not None
    assert pieces.ranks is not None
    weights, trained, peak = both.step.weights, both.step.trained, both.step.peak
    assert both.ranks.memory == peak
    assert both.ranks.sent == 2 * trained * 3 // 4
    assert pieces.ranks.sent == 2 * weights * 3 // 4 + trained * 3 // 4
    host: Any = tiny.lower(built(), S2FT(0.1))
    layer = sum(p.numel() * 4 for p in host.model.layers[0].parameters())
    rest = sum(p.numel() * 4 for p in host.parameters()) - 2 * layer
    states = weights + 3 * trained
    assert pieces.ranks.memory == -(-states // 4) + 2 * layer + rest + peak - states


def test_the_command_prints_and_writes(folder: Path, tmp_path: Path) -> None:
    options = ["--fraction", "0.1", "--structure", "ffn", "-b", "2", "-l", "16", "--data", "a.jsonl"]
    arguments = [folder, *options, "-o", tmp_path / "plan.yaml"]
    done = call("plan", *arguments, "--dry-run", "--json")
    assert "would be written" in done.stderr
    first = json.loads(done.stdout)
    assert (first["dtype"], first["ranks"]) == ("float32", None)
    assert not (tmp_path / "plan.yaml").exists()
    text = fine("plan", *arguments)
    share = f"trains {first['trainable']:,} of {first['total']:,} parameters"
    for word in (
        "2 attention, 2 ffn found",
        share,
        "of Down",
        "kept for the backward",
        "expected peak",
        f"as LoRA: rank {first['lora_rank']}",
    ):
        assert word in text
    file = plan_file.read(tmp_path / "plan.yaml")
    assert file.plan == Plan([S2FT(0.1, structure="ffn")])
    assert (file.model, file.data.path, file.training.batch, file.training.length) == (str(folder), "a.jsonl", 2, 16)
    assert "is there already" in refused("plan", *arguments)
    more = ["--set", "rules.0.fraction=0.2", "--world-size", "2", "--fsdp", "--dtype", "bf16"]
    again = json.loads(fine("plan", tmp_path / "plan.yaml", "--json", *more))
    assert again["trainable"] == 2 * first["trainable"]
    assert again["ranks"]["world"] == 2
    assert again["step"]["weights"] < 0.6 * first["step"]["weights"]


def test_what_the_command_refuses(folder: Path, tmp_path: Path) -> None:
    assert "unknown rule 'lorra'; did you mean 'LoRA'" in refused("plan", folder, "--method", "lorra")
    assert "PaCA" in refused("plan", folder, "--method", "paca", "--alpha", "3")
    assert "give --world-size too" in refused("plan", folder, "--fsdp")
    assert "does not exist" in refused("plan", tmp_path / "none")
    assert "did you mean 'q_proj'" in refused("plan", folder, "--method", "lora", "--match", "qq_proj")
    assert "matches no linear" in refused("plan", folder, "--method", "lora", "--match", "*.q_prj")
    (tmp_path / "p.yaml").write_text(f"model: {folder}\nrules: [{{rule: LoRA}}]\n")
    assert "change it with --set rules.0.rank=" in refused("plan", tmp_path / "p.yaml", "--rank", "3")


def test_the_schema_is_printed() -> None:
    assert json.loads(fine("plan", "--schema")) == plan_file.schema()


def test_inspect_and_prune_speak_json_too(tmp_path: Path) -> None:
    model = small_folder.write_model(tmp_path / "model")
    found = json.loads(fine("inspect", model, "--json"))
    assert sorted(s["kind"] for s in found["structures"]) == ["attention", "attention", "ffn", "ffn"]
    assert found["structures"][0]["sites"]
    arguments = ["prune", model, "-o", tmp_path / "out", "--method", "magnitude", "--json"]
    assert json.loads(fine(*arguments, "--dry-run"))["rule"]["method"] == "magnitude"
    assert not (tmp_path / "out").exists()
    assert json.loads(fine(*arguments)) == json.loads((tmp_path / "out" / "pruning.json").read_text())
