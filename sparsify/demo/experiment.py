"""The demo, step by step: data, baselines, training, then what one can do with the adapter; terminal output and HTML report."""

from __future__ import annotations

import copy
import json
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsify
from sparsify.demo.methods import METHODS, directory_bytes, s2ft_plan, trainable
from sparsify.demo.minilm import Classifier, load_encoder, load_tokenizer
from sparsify.demo.stdlib_text import Task, describe, docstring_task
from sparsify.demo.training import Run, Texts, accuracy, features, nearest_centroid, predictions, tokenise, train, train_head
from sparsify.drawing import write_atomically
from sparsify.html_report import Chart, Section, Series, write_html
from sparsify.html_report import Table as HtmlTable

BATCH = 16
HEAD_LR = 1e-3


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
            return cls(10, 40, epochs or 0.5, 60, 1, methods, seed, out, True)
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


def run_demo(settings: Settings) -> dict[str, Any]:
    """All steps; writes report.html, graph.svg, results.json and the adapters under `settings.out`; returns the results."""
    console = Console(highlight=False)
    started = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    bench = prepare(settings, console)
    results = [compare(bench, name) for name in settings.methods]
    show_comparison(bench, results)
    sections: list[Section] = []
    checks: dict[str, Any] = {}
    if "s2ft" in settings.methods:
        encoder, head = load_trained(bench)
        checks |= show_adapter(bench, encoder, head, next(r for r in results if r.method == "s2ft"))
        two = fuse_two_tasks(bench)
        checks["two tasks"] = two
        sections = adapter_sections(encoder, checks, two)
        encoder.sparsify.program.svg(settings.out / "graph.svg")
    seconds = time.perf_counter() - started
    document = write_results(bench, results, checks, seconds)
    write_report(bench, results, sections, seconds)
    console.rule("[bold]done")
    console.print(
        f"{seconds:.0f} s in all. Report: [bold]{settings.out / 'report.html'}[/bold]; numbers: {settings.out / 'results.json'}"
    )
    return document


# --- 1. data and baselines -----------------------------------------------------------------------------------------------


def prepare(settings: Settings, console: Console) -> Bench:
    console.rule("[bold]1. The task: which module does this docstring come from?")
    with console.status("reading the standard library …"):
        task = docstring_task(settings.classes, most=settings.per_class, least=30)
    console.print(f"Python {platform.python_version()}: {describe(task)}.")
    console.print("The module's own name is taken out of its texts. Two held-out examples:")
    for text, label in list(zip(task.test_texts, task.test_labels, strict=True))[:2]:
        console.print(f"  [italic]{shorten(text, 100)}[/italic]  → [bold]{task.classes[label]}[/bold]", highlight=False)
    tokenizer, encoder = load_tokenizer(), load_encoder()
    train_texts = tokenise(tokenizer, task.train_texts, task.train_labels)
    test_texts = tokenise(tokenizer, task.test_texts, task.test_labels)
    watched = Texts(test_texts.ids[: settings.watched], test_texts.labels[: settings.watched], test_texts.pad)
    size = sum(p.numel() for p in encoder.parameters())
    console.print(f"\nEncoder: all-MiniLM-L6-v2, a BERT with 6 layers and {size / 1e6:.1f} M parameters, mean-pooled.")
    with console.status("baselines: embedding all texts with the frozen encoder …"):
        embedded = features(encoder, train_texts), features(encoder, test_texts)
        centroid = nearest_centroid(*embedded, len(task.classes))
        head = train_head(embedded[0], len(task.classes), settings.seed)
        x, y = embedded[1]
        head_only = (head(x).argmax(-1) == y).float().mean().item()
    console.print(
        f"Before fine-tuning: nearest centroid {centroid:.1%}; a linear head on the frozen encoder {head_only:.1%}."
    )
    console.print(
        "Every method below starts from that head and trains it further, together with its own part of the encoder.\n"
    )
    bench = Bench(settings, task, train_texts, test_texts, watched, head, console)
    bench.facts = {"nearest centroid": centroid, "head only": head_only}
    return bench


# --- 2. the comparison ---------------------------------------------------------------------------------------------------


def compare(bench: Bench, name: str) -> Result:
    """Train one method from the pretrained weights and the common head."""
    settings, method = bench.settings, METHODS[name]
    if name == next(iter(settings.methods)):
        bench.console.rule("[bold]2. Fine-tuning")
    encoder = load_encoder()
    total = sum(p.numel() for p in encoder.parameters())
    model = Classifier(method.prepare(encoder, settings.seed), copy.deepcopy(bench.head))
    count = trainable(model.encoder)
    bench.console.print(
        f"[bold]{method.label}[/bold]: {count:,} of {total:,} encoder parameters train ({count / total:.2%}), lr {method.lr:g}"
    )
    run = train(
        model,
        bench.train_texts,
        lr=method.lr,
        head_lr=HEAD_LR,
        epochs=settings.epochs,
        batch=BATCH,
        seed=settings.seed,
        name=method.label,
        watch=lambda: accuracy(model, bench.watched),
        points=settings.points,
    )
    score = accuracy(model, bench.test_texts)
    place = bench.adapters / name
    shutil.rmtree(place, ignore_errors=True)
    method.save(model.encoder, place)
    size = directory_bytes(place)
    torch.save(model.head.state_dict(), bench.settings.out / f"head-{name}.pt")
    bench.console.print(
        f"  held-out accuracy {score:.1%}, {run.step_seconds * 1000:.0f} ms per step, {megabytes(size)} on disk"
    )
    return Result(name, method.label, score, count, total, size, run)


def show_comparison(bench: Bench, results: list[Result]) -> None:
    table = Table(title="\nHeld-out accuracy, and what it costs", title_justify="left")
    columns = ("method", "accuracy", "gain", "trainable", "step", "on disk")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in comparison_rows(bench, results):
        table.add_row(*row, style="bold" if row[0] == "S2FT" else None)
    bench.console.print(table)
    bench.console.print(fine_print(bench), style="dim")


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
        f"{count} held-out texts: one standard error is about {error:.1%}. Learning rates: the best of four for each method on a "
        f"quarter of the training texts, tried once, one seed ({tested}); repeat with --tune. The head ({bench.head.weight.numel():,} "
        "weights) trains with every method and is not counted. Step: median of forward, backward and optimizer."
    )


# --- 3. what an adapter can do -------------------------------------------------------------------------------------------


def load_trained(bench: Bench) -> tuple[Any, nn.Linear]:
    """A *fresh* model, compiled anew, with the adapter and the head that the training run saved."""
    encoder = sparsify.compile(load_encoder(), s2ft_plan(bench.settings.seed))
    encoder.sparsify.load_adapter(bench.adapters / "s2ft", "docstrings")
    encoder.sparsify.set_adapter("docstrings")
    head = copy.deepcopy(bench.head)
    head.load_state_dict(torch.load(bench.settings.out / "head-s2ft.pt", weights_only=True))
    return encoder.eval(), head


def show_adapter(bench: Bench, encoder: Any, head: nn.Linear, result: Result) -> dict[str, Any]:
    """Reload, switch, merge, export; every claim is measured."""
    console, handle = bench.console, encoder.sparsify
    console.rule("[bold]3. What the S2FT adapter can do")
    model = Classifier(encoder, head)
    reloaded = accuracy(model, bench.test_texts)
    console.print(
        f"Saved, then loaded into a fresh model: {reloaded:.1%} (after training: {result.accuracy:.1%}), {megabytes(result.size)}."
    )
    start = time.perf_counter()
    handle.set_adapter(None)
    off_seconds = time.perf_counter() - start
    off = accuracy(Classifier(encoder, bench.head), bench.test_texts)
    start = time.perf_counter()
    handle.set_adapter("docstrings")
    on_seconds = time.perf_counter() - start
    on = accuracy(model, bench.test_texts)
    console.print(
        f"Switched off in {off_seconds * 1000:.0f} ms: {off:.1%} with the first head (the base again, before: "
        f"{bench.facts['head only']:.1%}); on again in {on_seconds * 1000:.0f} ms: {on:.1%}."
    )
    expected, _ = predictions(model, bench.watched)
    handle.merge()
    merged, _ = predictions(model, bench.watched)
    handle.unmerge()
    same = (expected == merged).float().mean().item()
    console.print(
        f"Merged into plain weights (no cost at inference): {same:.1%} of the answers are the same; unmerged again."
    )
    lora = handle.export_lora(bench.adapters / "s2ft-as-lora")
    console.print(f"Exported as a PEFT LoRA folder: {lora} ({megabytes(directory_bytes(Path(lora)))}).\n")
    return {
        "reloaded": reloaded,
        "off": off,
        "on": on,
        "switch ms": 1000 * max(on_seconds, off_seconds),
        "merged answers equal": same,
    }


def fuse_two_tasks(bench: Bench) -> list[dict[str, Any]]:
    """Two adapters for two tasks, each trained on half of the modules, then both in one model at once.

    The head stays as it is and an answer is chosen among the modules of the task, so the difference is the encoder's alone. The two
    plans have different seeds, hence other heads and channels: little overlaps, and adapters may be added.
    """
    settings, console = bench.settings, bench.console
    console.rule("[bold]4. Two adapters, one model")
    names = bench.task.classes
    halves = {"even": names[0::2], "odd": names[1::2]}
    tokenizer = load_tokenizer()
    parts: dict[str, tuple[Texts, Texts, list[int]]] = {}
    for number, (half, classes) in enumerate(halves.items()):
        task = bench.task.subset(classes)
        allowed = [names.index(c) for c in classes]
        learn = tokenise(tokenizer, task.train_texts, task.train_labels)
        test = tokenise(tokenizer, task.test_texts, task.test_labels)
        parts[half] = (learn, test, allowed)
        encoder = sparsify.compile(load_encoder(), s2ft_plan(settings.seed + 1 + number))
        train(
            Classifier(encoder, bench.head),
            learn,
            lr=METHODS["s2ft"].lr,
            head_lr=None,
            epochs=settings.epochs / 2,
            batch=BATCH,
            seed=settings.seed,
            name=f"adapter '{half}'",
            allowed=allowed,
        )
        encoder.sparsify.save_adapter(bench.adapters / half)
    served = sparsify.compile(load_encoder(), s2ft_plan(settings.seed))
    for half in halves:
        served.sparsify.load_adapter(bench.adapters / half, half)
    model = Classifier(served, bench.head)
    rows = []
    for title, spec in (
        ("none", None),
        ("even", "even"),
        ("odd", "odd"),
        ("fused, 0.5 + 0.5", {"even": 0.5, "odd": 0.5}),
        ("fused, 1 + 1", {"even": 1.0, "odd": 1.0}),
    ):
        mix = served.sparsify.set_adapter(spec)
        scores = {half: accuracy(model, test, allowed) for half, (_, test, allowed) in parts.items()}
        overlap = sum(c.shared for c in getattr(mix, "conflicts", ()))
        rows.append({"adapter": title, **scores, "mean": sum(scores.values()) / 2, "shared channels": overlap})
    table = Table(
        title="Held-out accuracy on two tasks (frozen head; answers among the ten modules of the task)",
        title_justify="left",
    )
    for column in ("active adapter", "task even", "task odd", "mean"):
        table.add_column(column, justify="left" if column == "active adapter" else "right")
    for row in rows:
        table.add_row(row["adapter"], f"{row['even']:.1%}", f"{row['odd']:.1%}", f"{row['mean']:.1%}")
    console.print(table)
    console.print(
        f"The two adapters share {rows[-1]['shared channels']} trained channels; the rest lies side by side in the weights.",
        style="dim",
    )
    return rows


# --- 5. written results --------------------------------------------------------------------------------------------------


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
                "An adapter holds the change of the trained channels, in the coordinates of the original model, with a hash of the base.",
            ),
            (
                HtmlTable("", ("what", "measured"), facts),
                HtmlTable(
                    "Two adapters in one model",
                    ("active adapter", "task even", "task odd", "mean"),
                    rows,
                    "Each adapter was trained on half of the modules, with the head frozen; answers are chosen among the task's modules.",
                ),
            ),
        ),
        Section(
            "The program",
            (
                "Every box is an attention or a feed-forward of the encoder, in its present order: the chosen heads and channels stand at "
                "the front of every tensor that they run through, so that what trains is one contiguous block. Hover for the original ids.",
            ),
            program=encoder.sparsify.program,
        ),
        Section("Report of the compiler", text=str(encoder.sparsify.report)),
    ]


def write_report(bench: Bench, results: list[Result], sections: list[Section], seconds: float) -> None:
    rows = comparison_rows(bench, results)
    marked = tuple(i for i, row in enumerate(rows) if row[0] == "S2FT")
    curves = tuple(Series(r.label, tuple(r.run.curve)) for r in results)
    first = Section(
        "Fine-tuning",
        (
            f"The task: {describe(bench.task)}. Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads.",
        ),
        (
            HtmlTable(
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
    write_html(bench.settings.out / "report.html", title, summary, [first, *sections])


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


# --- learning rates ------------------------------------------------------------------------------------------------------


def run_tuning(settings: Settings) -> dict[str, dict[float, float]]:
    """Every rate of every method, judged on the last quarter of the training texts."""
    console = Console(highlight=False)
    bench = prepare(settings, console)
    cut = len(bench.train_texts) * 3 // 4
    ids, labels, pad = bench.train_texts.ids, bench.train_texts.labels, bench.train_texts.pad
    learn, judge = Texts(ids[:cut], labels[:cut], pad), Texts(ids[cut:], labels[cut:], pad)
    head = train_head(features(load_encoder(), learn), len(bench.task.classes), settings.seed)
    table = Table("method", "learning rate", "accuracy on a quarter of the training texts")
    scores: dict[str, dict[float, float]] = {}
    for name in settings.methods:
        for rate in METHODS[name].rates:
            model = Classifier(METHODS[name].prepare(load_encoder(), settings.seed), copy.deepcopy(head))
            label = f"{METHODS[name].label} {rate:g}"
            train(
                model,
                learn,
                lr=rate,
                head_lr=HEAD_LR,
                epochs=settings.epochs,
                batch=BATCH,
                seed=settings.seed,
                name=label,
            )
            scores.setdefault(name, {})[rate] = accuracy(model, judge)
            table.add_row(METHODS[name].label, f"{rate:g}", f"{scores[name][rate]:.1%}")
    console.print(table)
    return scores


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


__all__ = ["Settings", "run_demo", "run_tuning"]
