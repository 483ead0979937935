"""A PEFT user's day without a script: plan → finetune → kill → resume → eval → merge → export → load in PEFT → generate."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import small_folder
import torch
import transformers as hf
from typer.testing import CliRunner

from sparsify.cli import app
from sparsify.demo.pretrained import model_folder, why_missing
from sparsify.finetune import read_rows

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def fine(*arguments: str | Path) -> str:
    done = RUNNER.invoke(app, [os.fspath(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def kill_after_a_checkpoint(folder: Path, *arguments: str) -> int:
    """Start the run, kill it (SIGKILL) once a checkpoint is complete, and return its newest complete one's step."""
    files = [str(folder / name) for name in ("stdout", "stderr")]
    process = processes.start(
        processes.as_main, ("-m", "sparsify.cli", *arguments), dict(os.environ), str(folder), *files
    )
    try:
        deadline = time.monotonic() + 900
        while not list(folder.glob("out/checkpoints/checkpoint-*/trainer_state.json")):
            assert process.is_alive(), (folder / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()
    return max(int(p.parent.name.rpartition("-")[2]) for p in folder.glob("out/checkpoints/*/trainer_state.json"))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def the_day(model: Path, folder: Path, options: tuple[str, ...], settings: tuple[str, ...], limit: float) -> None:
    """limit: loss after training, as a share of the base's."""
    rows = small_folder.write_rows(folder / "rows.jsonl", small_folder.conversations())
    plan, out = folder / "plan.yaml", folder / "out"
    sets = [word for change in (*settings, f"output.dir={out}") for word in ("--set", change)]
    planned = json.loads(fine("plan", model, *options, "--data", rows, *sets, "-o", plan, "--json"))

    reached = kill_after_a_checkpoint(folder, "finetune", str(plan))
    assert not (out / "adapter.safetensors").exists()
    done = json.loads(fine("finetune", plan, "--resume", "--json"))
    assert 0 < done["resumed_from"] <= done["steps"]
    assert done["resumed_from"] >= reached - 2
    assert done["trainable"] == planned["trainable"]

    scores = json.loads(fine("eval", model, rows, "-a", f"mine={out}", "--json"))
    assert scores["mine"]["loss"] < limit * scores["base"]["loss"]

    fine("adapter", "verify", out, "--base", model)
    merged = folder / "merged"
    fine("adapter", "merge", model, out, "-o", merged)
    alone = json.loads(fine("eval", merged, rows, "--json"))["base"]
    assert alone["loss"] == pytest.approx(scores["mine"]["loss"], rel=1e-4)
    assert alone["exact"] == scores["mine"]["exact"]

    peft = pytest.importorskip("peft")
    fine("adapter", "export", model, out, "-o", folder / "peft")
    plain: Any = hf.AutoModelForCausalLM.from_pretrained(merged)
    theirs = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(model), folder / "peft")
    ids = torch.tensor([read_rows(rows, hf.AutoTokenizer.from_pretrained(model), length=64).samples[0].ids])
    torch.testing.assert_close(logits(theirs, ids), logits(plain, ids), atol=1e-3, rtol=1e-3)
    assert planned["lora_rank"] == json.loads((folder / "peft" / "adapter_config.json").read_text())["r"]

    texts = [json.loads(fine("generate", place, *more, "--chat", "-p", "what is the sky", "-n", "6", "--json"))["text"]
             for place, more in ((model, ["-a", str(out)]), (merged, []))]  # fmt: skip
    assert texts[0] == texts[1] != ""
    listed = {Path(row["folder"]).name: row["made_by"] for row in json.loads(fine("adapter", "ls", folder, "--json"))}
    assert listed["peft"] == "PEFT"
    assert listed["out"].startswith("sparsify")


def test_a_day_on_a_small_model(tmp_path: Path) -> None:
    model = small_folder.write_model(tmp_path / "model")
    settings = ("training.steps=12", "training.learning_rate=0.08", "training.save_every=4", "training.log_every=4")
    the_day(model, tmp_path, ("--fraction", "0.4", "-b", "4", "-l", "32"), settings, 0.5)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "it is there")
def test_a_day_on_a_real_decoder(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, in some minutes."""
    settings = ("training.steps=12", "training.learning_rate=1e-3", "training.save_every=4", "training.log_every=4")
    the_day(model_folder(), tmp_path, ("--fraction", "0.03", "-b", "2", "-l", "64"), settings, 0.7)
