"""What the demo found, as plain data, and how it is written: rows for tables, results.json, the HTML report."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from sparsify.console import in_full
from sparsify.demo.methods import METHODS
from sparsify.demo.stdlib_text import Task, describe
from sparsify.demo.training import Run, Texts
from sparsify.show.drawing import write_atomically
from sparsify.show.html_report import Chart, Section, Series, Table, write_html


@dataclass(frozen=True)
class Settings:
    """How much work the demo does. `watched`: held-out texts for the curves (the tables use all of them)."""

    classes: int
    per_class: int
    epochs: float
    watched: int
    points: int
    methods: tuple[str, ...]
    seed: int
    out: Path
    fast: bool

    @classmethod
    def make(cls, *, fast: bool, methods: tuple[str, ...], epochs: float | None, seed: int, out: Path) -> Settings:
        if fast:
            return cls(8, 30, epochs or 1.0, 60, 1, methods, seed, out, True)
        return cls(20, 120, epochs or 2.0, 256, 4, methods, seed, out, False)


@dataclass
class Result:
    """One row of the comparison."""

    method: str
    label: str
    accuracy: float
    trainable: int
    total: int
    size: int
    run: Run


@dataclass
class Bench:
    """What every step works with: texts, the linear head that all methods start from, and where to print."""

    settings: Settings
    task: Task
    train_texts: Texts
    test_texts: Texts
    watched: Texts
    head: nn.Linear
    console: Console
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def adapters(self) -> Path:
        return self.settings.out / "adapters"


def comparison_rows(bench: Bench, results: list[Result]) -> list[tuple[str, ...]]:
    base = bench.facts["head only"]
    rows = [
        ("nearest centroid", f"{bench.facts['nearest centroid']:.1%}", "", "0", "", ""),
        ("linear head only", f"{base:.1%}", "", "0", "", ""),
    ]
    for r in results:
        cost = (
            f"{r.trainable:,} ({r.trainable / r.total:.2%})",
            f"{r.run.step_seconds * 1000:.0f} ms",
            megabytes(r.size),
        )
        rows.append((r.label, f"{r.accuracy:.1%}", f"{r.accuracy - base:+.1%}", *cost))
    return rows


def fine_print(bench: Bench) -> str:
    count = len(bench.test_texts)
    p = bench.facts["head only"]
    error = (p * (1 - p) / count) ** 0.5
    tested = ", ".join(
        f"{METHODS[n].label} {'/'.join(f'{r:g}' for r in METHODS[n].rates)}" for n in bench.settings.methods
    )
    return (
        f"{count} held-out texts: one standard error is about {error:.1%}. Learning rates: the best of four for each "
        f"method, judged on a quarter of the training texts, one seed ({tested}); repeat with --tune. The head "
        f"({bench.head.weight.numel():,} "
        "weights) trains with every method and is not counted. Step: median of forward, backward and optimizer."
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def adapter_sections(encoder: Any, checks: dict[str, Any], two: list[dict[str, Any]]) -> list[Section]:
    facts = (
        ("loaded into a fresh model", f"{checks['reloaded']:.1%}"),
        ("switched off, first head", f"{checks['off']:.1%}"),
        ("switched on again", f"{checks['on']:.1%}"),
        ("slowest switch", f"{checks['switch ms']:.0f} ms"),
        ("answers unchanged by merging", f"{checks['merged answers equal']:.1%}"),
    )
    rows = tuple((r["adapter"], f"{r['even']:.1%}", f"{r['odd']:.1%}", f"{r['mean']:.1%}") for r in two)
    return [
        Section(
            "The adapter",
            (
                "An adapter holds the change of the trained channels, in the coordinates of the original model, with a "
                "hash of the base.",
            ),
            (
                Table("", ("what", "measured"), facts),
                Table(
                    "Two adapters in one model",
                    ("active adapter", "task even", "task odd", "mean"),
                    rows,
                    "Each adapter was trained on half of the modules, with the head frozen; answers are chosen among "
                    "the task's modules.",
                ),
            ),
        ),
        Section(
            "The program",
            (
                "Every box is an attention or a feed-forward of the encoder, in its present order: the chosen heads "
                "and channels stand at the front of every tensor that they run through, so that what trains is one "
                "contiguous block. Hover for the original ids.",
            ),
            program=encoder.sparsify.program,
        ),
        Section("Report of the compiler", text=in_full(encoder.sparsify.report)),
    ]


def write_report(bench: Bench, results: list[Result], sections: list[Section], seconds: float) -> None:
    rows = comparison_rows(bench, results)
    marked = tuple(i for i, row in enumerate(rows) if row[0] == "S2FT")
    curves = tuple(Series(r.label, tuple(r.run.curve)) for r in results)
    first = Section(
        "Fine-tuning",
        (
            f"The task: {describe(bench.task)}. Python {platform.python_version()}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads.",
        ),
        (
            Table(
                "",
                ("method", "accuracy", "gain", "trainable", "step", "on disk"),
                tuple(rows),
                fine_print(bench),
                marked,
            ),
        ),
        (
            Chart(
                f"Accuracy on {len(bench.watched)} of the held-out texts",
                "epochs",
                "accuracy",
                curves,
                guides=(("head only", bench.facts["head only"]),),
            ),
            Chart(
                "Training loss, mean of 16 steps",
                "step",
                "loss",
                tuple(Series(r.label, smooth(r.run.losses)) for r in results),
                percent=False,
            ),
        ),
    )
    title = "Which module does this docstring come from?"
    summary = (
        "A pretrained MiniLM encoder, fine-tuned with sparsify on the text of the Python standard library"
        + (", with a tenth of the usual work (--fast)" if bench.settings.fast else "")
        + f"; {seconds:.0f} s on this machine."
    )
    write_html(bench.settings.out / "demo.html", title, summary, [first, *sections])


def write_results(bench: Bench, results: list[Result], checks: dict[str, Any], seconds: float) -> dict[str, Any]:
    document = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": bench.settings.seed,
        "epochs": bench.settings.epochs,
        "classes": list(bench.task.classes),
        "train texts": len(bench.train_texts),
        "held-out texts": len(bench.test_texts),
        "baselines": bench.facts,
        "methods": {
            r.method: {
                "accuracy": r.accuracy,
                "trainable": r.trainable,
                "step ms": 1000 * r.run.step_seconds,
                "bytes": r.size,
                "curve": r.run.curve,
                "last loss": r.run.losses[-1],
            }
            for r in results
        },
        "adapter": checks,
        "seconds": seconds,
    }
    write_atomically(bench.settings.out / "results.json", json.dumps(document, indent=1))
    return document


def smooth(values: list[float], width: int = 16) -> tuple[tuple[float, float], ...]:
    """Means of consecutive windows, at the middle step of each."""
    chunks = [(i, values[i : i + width]) for i in range(0, len(values), width)]
    return tuple((i + len(chunk) / 2, sum(chunk) / len(chunk)) for i, chunk in chunks)
