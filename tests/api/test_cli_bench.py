"""`sparsify bench`: its help, what it refuses, and that its figures belong to the models that it says it timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import zoo
from typer.testing import CliRunner

from sparsify.cli import app
from sparsify.cli.bench import load_model, make_inputs, prune_rows

RUNNER = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    hf.BertModel(hf.BertConfig(**dict[str, Any](zoo.ENCODER))).save_pretrained(path)
    return path


def test_help_names_every_option() -> None:
    result = RUNNER.invoke(app, ["bench", "--help"])
    assert result.exit_code == 0
    for option in ("--model", "--batch", "--seq", "--sparsity", "--dtype", "--threads", "--seconds", "--report"):
        assert option in result.output
    assert "bench" in RUNNER.invoke(app, ["--help"]).output


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_bench_prints_a_table_and_json(folder: Path, dtype: str) -> None:
    options = ["--batch", "2", "--seq", "7", "--sparsity", "0.9", "--dtype", dtype, "--seconds", "0", "--report"]
    result = RUNNER.invoke(app, ["bench", "--model", str(folder), *options])
    assert result.exit_code == 0, result.output
    lines = result.output.strip().splitlines()
    summary = json.loads(lines[-1])
    assert set(summary["ms"]) == {"dense", f"packed {dtype}"}
    assert (summary["batch"], summary["seq"], summary["sparsity"], summary["dtype"]) == (2, 7, 0.9, dtype)
    linears = sum(type(m).__name__ == "Linear" for m in load_model(str(folder)).modules())
    assert summary["lowered"] + summary["dense_layers"] == linears
    assert any(line.split()[:1] == ["dense"] and "items/s" in line for line in lines)
    assert "encoder.layer.1.output.dense" in result.output


def test_json_alone(folder: Path) -> None:
    result = RUNNER.invoke(app, ["bench", "--model", str(folder), "--seq", "7", "--seconds", "0", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["seq"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-model"], "neither a folder nor a model type"),
        (["--model", "whisper"], "takes input_features"),
        (["--model", "FOLDER", "--dtype", "fp8"], "expected fp32 or int8"),
        (["--model", "FOLDER", "--seq", "20"], "has 19 positions"),
    ],
)
def test_bench_refuses(folder: Path, options: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["bench", *(o.replace("FOLDER", str(folder)) for o in options)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_encoder_decoders_get_tokens_on_both_sides_and_rows_are_pruned(tmp_path: Path) -> None:
    hf.T5Model(hf.T5Config(**dict[str, Any](zoo.T5))).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    inputs = make_inputs(model, "t5", 2, 5)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {
        "input_ids": (2, 5),
        "decoder_input_ids": (2, 5),
    }
    prune_rows(model, 0.5)
    weight = model.encoder.block[0].layer[0].SelfAttention.q.weight
    assert bool(((weight == 0).sum(1) == weight.shape[1] // 2).all())
    assert not bool((model.shared.weight == 0).all(1).any())
