"""`sparsify inspect` with a plan: the page and the numbers are those of what `finetune` would train, before and after side by side."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_folder
from typer.testing import CliRunner, Result

import sparsify
from sparsify import S2FT, Plan
from sparsify.cli import app
from sparsify.cli.model_folder import load_model
from sparsify.cli.prune import model_class
from sparsify.show.inspector import read_inspector

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def call(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [os.fspath(a) for a in arguments])


def fine(*arguments: str | Path) -> Any:
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*arguments: str | Path) -> str:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, train.jsonl, and plan.yaml, which chooses by gradients on them."""
    folder = tmp_path_factory.mktemp("given")
    small_folder.write_model(folder / "model")
    small_folder.write_rows(folder / "train.jsonl", small_folder.pairs())
    (folder / "plan.yaml").write_text(
        f"model: {folder / 'model'}\nrules: [{{rule: S2FT, units: 3, structure: ffn, select: gradient}}]\n"
        f"data: {folder / 'train.jsonl'}\ntraining: {{batch: 4, length: 32}}\n"
    )
    return folder


def operations(items: Any) -> list[Any]:
    return [o for item in items for o in (operations(item["items"]) if "items" in item else [item])]


def test_the_page_of_a_method_shows_each_operation_before_and_after(given: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    said = fine(
        "inspect", given / "model", "--method", "s2ft", "--units", "3", "--structure", "ffn", "--html", page, "--json"
    )
    model = load_model(given / "model", model_class(given / "model"))[0]
    host: Any = sparsify.compile(model, Plan([S2FT(units=3, structure="ffn")]), progress=False)
    program = host.sparsify.program
    assert [c["structure"] for c in said["chosen"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [tuple(c["consumers"]) for c in said["chosen"]] == [c.consumers for c in program.choices]
    assert (said["trainable"], said["total"]) == host.sparsify.count_parameters()
    data: Any = read_inspector(page)
    assert data["stage"] == "LOWERED"
    assert data["trained"] == said["trainable"]
    changed = [o for o in operations(data["operations"]) if o.get("was")]
    assert changed
    assert all("sparsify.partial_linear(" in o["call"] and "aten.linear(" in " ".join(o["was"]) for o in changed)
    assert [data["ids"][s["consumers_now"]] for s in data["structures"] if s["kind"] == "ffn"] == ["0…2", "0…2"]


def test_without_a_plan_nothing_is_chosen(given: Path, tmp_path: Path) -> None:
    said = fine("inspect", given / "model", "--html", tmp_path / "a.html", "--json")
    assert {"chosen", "trainable"}.isdisjoint(said)
    data: Any = read_inspector(tmp_path / "a.html")
    assert data["stage"] == "STRUCTURED"
    assert not any(o.get("was") for o in operations(data["operations"]))
    assert said["structures"][0]["name"].startswith("model.layers.0"), "the names of training"


def test_a_plan_file_chooses_by_its_rows_and_may_stand_for_the_model(given: Path) -> None:
    said = fine("inspect", given / "model", "--plan", given / "plan.yaml", "--json")
    assert {c["method"] for c in said["chosen"]} == {"gradient"}
    assert fine("inspect", given / "plan.yaml", "--json") == said
    drawn = fine("inspect", given / "plan.yaml", "--set", "rules.0.select=random", "--json")
    assert [c["consumers"] for c in drawn["chosen"]] != [c["consumers"] for c in said["chosen"]]
    more = fine("inspect", given / "plan.yaml", "--set", "rules.0.units=5", "--json")
    assert {len(c["consumers"]) for c in more["chosen"]} == {5}


def test_of_a_config_alone_the_sizes_are_known_and_what_is_random_is_said(given: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(given / "model" / "config.json", tmp_path / "model")
    done = call("inspect", tmp_path / "model", "--plan", given / "plan.yaml", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["trainable"] == fine("inspect", given / "plan.yaml", "--json")["trainable"]
    assert "holds no weights" in done.stderr
    assert "chosen at random" in done.stderr


def test_the_report_is_printed(given: Path) -> None:
    done = call("inspect", given / "model", "-m", "lora", "--rank", "2", "--match", "q_proj")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("sparsify report: LlamaForCausalLM")
    assert "q_proj" in done.stdout


def test_what_it_refuses(given: Path, tmp_path: Path) -> None:
    model, plan = given / "model", given / "plan.yaml"
    assert "--rank belongs to a plan: give --method, or --plan FILE" in refused("inspect", model, "--rank", "2")
    assert "--set belongs to a plan" in refused("inspect", model, "--set", "rules.0.rank=2")
    assert "says what trains: change it with --set rules.0.units=" in refused(
        "inspect", model, "--plan", plan, "--units", "2"
    )
    assert "says what trains: change it with --set rules.0.rule=" in refused("plan", plan, "--method", "lora")
    assert "is a plan file already" in refused("inspect", plan, "--plan", plan)
    assert "did you mean 'LoRA'" in refused("inspect", model, "--method", "lorra")
    assert "matches no linear" in refused("inspect", model, "--method", "lora", "--match", "*.q_prj")
    assert "gone.jsonl" in refused("inspect", plan, "--set", f"data.path={tmp_path / 'gone.jsonl'}")
    assert "calibration" in refused("inspect", model, "--method", "s2ft", "--select", "gradient")
    (model / "tokenizer.json").rename(tmp_path / "a.json")
    (model / "tokenizer_config.json").rename(tmp_path / "b.json")
    assert "has no tokenizer, and the plan chooses by its rows" in refused("inspect", plan)
