"""The demo, step by step: data, baselines, training, and what one can do with the adapter afterwards."""

from __future__ import annotations

import copy
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import sparsify
from sparsify.demo.methods import METHODS, directory_bytes, s2ft_plan, trainable
from sparsify.demo.minilm import Classifier, load_encoder, load_tokenizer
from sparsify.demo.results import (
    Bench,
    Result,
    Settings,
    adapter_sections,
    comparison_rows,
    fine_print,
    megabytes,
    write_report,
    write_results,
)
from sparsify.demo.sparse_inference import show_sparse_inference
from sparsify.demo.stdlib_text import describe, docstring_task
from sparsify.demo.training import (
    Texts,
    accuracy,
    features,
    nearest_centroid,
    predictions,
    tokenise,
    train,
    train_head,
)
from sparsify.show.html_report import Section

BATCH = 16
HEAD_LR = 1e-3


def run_demo(settings: Settings) -> dict[str, Any]:
    """All steps; writes demo.html, graph.svg, results.json and the adapters under `settings.out`."""
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
        checks["sparse inference"], inference = show_sparse_inference(bench, encoder, head)
        first, *rest = adapter_sections(encoder, checks, two)
        sections = [first, *inference, *rest]
        encoder.sparsify.program.svg(settings.out / "graph.svg")
    seconds = time.perf_counter() - started
    document = write_results(bench, results, checks, seconds)
    write_report(bench, results, sections, seconds)
    console.rule("[bold]done")
    console.print(
        f"{seconds:.0f} s in all. Report: [bold]{escape(str(settings.out / 'demo.html'))}[/bold]; "
        f"numbers: {escape(str(settings.out / 'results.json'))}"
    )
    return document


# --- 1. data and baselines ---


def prepare(settings: Settings, console: Console) -> Bench:
    console.rule("[bold]1. The task: which module does this docstring come from?")
    with console.status("reading the standard library …"):
        task = docstring_task(settings.classes, most=settings.per_class, least=30)
    console.print(f"Python {platform.python_version()}: {describe(task)}.")
    console.print("The module's own name is taken out of its texts. Two held-out examples:")
    for text, label in list(zip(task.test_texts, task.test_labels, strict=True))[:2]:
        console.print(
            f"  [italic]{escape(shorten(text, 100))}[/italic]  → [bold]{task.classes[label]}[/bold]", highlight=False
        )
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


# --- 2. the comparison ---


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
        f"[bold]{method.label}[/bold]: {count:,} of {total:,} encoder parameters train ({count / total:.2%}), "
        f"learning rate {method.lr:g}"
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
    torch.save(model.head.state_dict(), head_file(bench, name))
    bench.console.print(
        f"  held-out accuracy {score:.1%}, {run.step_seconds * 1000:.0f} ms per step, {megabytes(size)} on disk"
    )
    return Result(name, method.label, score, count, total, size, run)


def head_file(bench: Bench, name: str) -> Path:
    """Where a method's head is kept; it is a plain module, so `torch.save` of its state will do."""
    folder = bench.settings.out / "heads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.pt"


def show_comparison(bench: Bench, results: list[Result]) -> None:
    table = Table(title="\nHeld-out accuracy, and what it costs", title_justify="left")
    columns = ("method", "accuracy", "gain", "trainable", "step", "on disk")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in comparison_rows(bench, results):
        table.add_row(*row, style="bold" if row[0] == "S2FT" else None)
    bench.console.print(table)
    bench.console.print(fine_print(bench), style="dim")


# --- 3. what an adapter can do ---


def load_trained(bench: Bench) -> tuple[Any, nn.Linear]:
    """A *fresh* model, compiled anew, with the adapter and the head that the training run saved."""
    encoder = sparsify.compile(load_encoder(), s2ft_plan(bench.settings.seed))
    encoder.sparsify.load_adapter(bench.adapters / "s2ft", "docstrings")
    encoder.sparsify.set_adapter("docstrings")
    head = copy.deepcopy(bench.head)
    head.load_state_dict(torch.load(head_file(bench, "s2ft"), weights_only=True))
    return encoder.eval(), head


def show_adapter(bench: Bench, encoder: Any, head: nn.Linear, result: Result) -> dict[str, Any]:
    """Reload, switch, merge, export; every claim is measured."""
    console, handle = bench.console, encoder.sparsify
    console.rule("[bold]3. What the S2FT adapter can do")
    model = Classifier(encoder, head)
    reloaded = accuracy(model, bench.test_texts)
    console.print(
        f"Saved ({megabytes(result.size)}), then loaded into a fresh model: {reloaded:.1%} "
        f"(after training: {result.accuracy:.1%})."
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
    console.print(f"Exported as a PEFT LoRA folder: {escape(str(lora))} ({megabytes(directory_bytes(Path(lora)))}).\n")
    return {
        "reloaded": reloaded,
        "off": off,
        "on": on,
        "switch ms": 1000 * max(on_seconds, off_seconds),
        "merged answers equal": same,
    }


def fuse_two_tasks(bench: Bench) -> list[dict[str, Any]]:
    """Two adapters for two tasks, each trained on half of the modules, then both in one model at once.

    The head stays as it is and an answer is chosen among the modules of the task, so the difference is the encoder's
    alone. The two plans have different seeds, hence other heads and channels: little overlaps, and they may be added.
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
        title="Held-out accuracy on two tasks (frozen head; answers among the modules of the task)",
        title_justify="left",
    )
    for column in ("active adapter", "task even", "task odd", "mean"):
        table.add_column(column, justify="left" if column == "active adapter" else "right")
    for row in rows:
        table.add_row(row["adapter"], f"{row['even']:.1%}", f"{row['odd']:.1%}", f"{row['mean']:.1%}")
    console.print(table)
    console.print(
        f"The two adapters share {rows[-1]['shared channels']} trained channels; the rest lies side by side in the "
        "weights.",
        style="dim",
    )
    return rows


# --- learning rates ---


def run_tuning(settings: Settings) -> dict[str, dict[float, float]]:
    """Every rate of every method for half of the epochs, judged on the last quarter of the training texts."""
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
                epochs=settings.epochs / 2,
                batch=BATCH,
                seed=settings.seed,
                name=label,
            )
            scores.setdefault(name, {})[rate] = accuracy(model, judge)
            table.add_row(METHODS[name].label, f"{rate:g}", f"{scores[name][rate]:.1%}")
    console.print(table)
    return scores


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


__all__ = ["Settings", "run_demo", "run_tuning"]
