"""The demo on SmolLM2, step by step: fine-tune, serve adapters, prune and decode."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import sparsify
from sparsify.demo.fresh_process import ask_fresh_process
from sparsify.demo.language_decode import (
    ASKED,
    TASK_ROWS,
    calibration,
    chat_prompt,
    lower,
    measured,
    prune,
    pruning,
    recover,
)
from sparsify.demo.language_methods import METHODS
from sparsify.demo.language_results import (
    ANSWER_COLUMNS,
    DECODER_COLUMNS,
    SERVED_COLUMNS,
    TUNED_COLUMNS,
    Findings,
    Rows,
    Served,
    Stage,
    Tuned,
    answer_rows,
    decoder_note,
    decoder_rows,
    headline,
    one_line,
    served_note,
    served_rows,
    tuned_note,
    tuned_rows,
    write_report,
    write_results,
)
from sparsify.demo.language_tasks import DATES, SQL, Row, general_text
from sparsify.demo.language_training import Score, score, text_blocks, text_loss, train, training_batches, write
from sparsify.demo.methods import directory_bytes
from sparsify.demo.pretrained import smollm2
from sparsify.lowering.cpu.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TUNING_SEED = 1000


@dataclass(frozen=True)
class LanguageSettings:
    """How much work the demo does. held_out: questions; blocks: of 128 tokens of general text; calibration: of docstrings;
    shown: questions whose answers are printed, up to `answer` tokens each; tokens: that are timed."""

    methods: tuple[str, ...]
    steps: int
    second_steps: int
    held_out: int
    blocks: int
    calibration: int
    tokens: int
    seed: int
    out: Path
    batch: int = 8
    shown: int = 4
    answer: int = 32
    sparsity: float = 0.5
    fast: bool = False
    full: bool = False

    @property
    def second_held_out(self) -> int:
        """Questions of the second task, which only shows that two adapters live in one model."""
        return max(1, self.held_out // 2)

    @classmethod
    def make(
        cls, *, fast: bool, full: bool, methods: tuple[str, ...], steps: int | None, seed: int, out: Path
    ) -> LanguageSettings:
        if fast:
            return cls(methods, steps or 3, 2, 8, 1, 2, 4, seed, out, batch=4, shown=2, answer=10, fast=True)
        return cls(methods, steps or 32, 12, 64, 10, 12, 32, seed, out, full=full)


class Laps:
    """Seconds of each stage, on the wall and on the processor: `mark(name)` ends one and begins the next."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.start = self.last = (time.perf_counter(), processor_seconds())

    def mark(self, name: str) -> None:
        before, self.last = self.last, (time.perf_counter(), processor_seconds())
        self.stages.append(Stage(name, self.last[0] - before[0], self.last[1] - before[1]))


@dataclass
class Bench:
    settings: LanguageSettings
    console: Console
    base: Any
    tokenizer: PreTrainedTokenizerBase
    held_out: dict[str, list[Row]]
    blocks: Tensor
    laps: Laps

    def judge(self, model: Any) -> tuple[Score, float]:
        return score(model, self.tokenizer, self.held_out["sql"]), text_loss(model, self.blocks)

    def adapter(self, name: str) -> Path:
        return self.settings.out / "adapters" / name


def run_language_demo(settings: LanguageSettings) -> dict[str, Any]:
    """All steps; writes demo.html, results.json and the adapters under `settings.out`."""
    console = Console(highlight=False)
    laps = Laps()
    settings.out.mkdir(parents=True, exist_ok=True)
    bench, found = prepare(settings, console, laps)
    hosts = {name: fine_tune(bench, found, name) for name in settings.methods}
    show(bench, TUNED_COLUMNS, tuned_rows(found), tuned_note(found), "Fine-tuning at equal size")
    host = hosts.pop(settings.methods[0])
    hosts.clear()
    show(bench, ANSWER_COLUMNS, answer_rows(found), "", "The same questions before and after")
    serve_adapters(bench, found)
    run_sparse(bench, found, host)
    found.stages = laps.stages
    found.seconds, found.cpu_seconds = (last - first for last, first in zip(laps.last, laps.start, strict=True))
    write_report(settings.out, found, host.sparsify.program)
    document = write_results(settings.out, found)
    console.rule("[bold]In short")
    for line in headline(found):
        console.print(f"• {escape(line)}")
    page, numbers = (escape(str(settings.out / name)) for name in ("demo.html", "results.json"))
    console.print(f"\n{found.seconds:.0f} s in all ({found.cpu_seconds:.0f} processor seconds).")
    console.print(f"Report: [bold]{page}[/bold]; numbers: {numbers}")
    return document


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


# --- 1. the model and what it can do before ---


def prepare(settings: LanguageSettings, console: Console, laps: Laps) -> tuple[Bench, Findings]:
    console.rule("[bold]1. SmolLM2-135M-Instruct, and a task that it fails at")
    with console.status("opening the model (unpacked from its package the first time) …"):
        base, tokenizer = smollm2()
    base.requires_grad_(False)
    counts = ((SQL, settings.held_out), (DATES, settings.second_held_out))
    rows = {task.name: task.distinct(77, count, held_out=True) for task, count in counts}
    blocks = text_blocks(tokenizer, general_text(), settings.blocks, 128)
    bench = Bench(settings, console, base, tokenizer, rows, blocks, laps)
    questions = [prompt for prompt, _ in rows["sql"][: settings.shown]]
    with console.status("asking the pretrained model …"):
        before = write(base, tokenizer, questions, settings.answer)
        at_first, text = bench.judge(base)
    parameters = sum(p.numel() for p in base.parameters())
    console.print(
        f"{parameters / 1e6:.0f} M parameters, 30 layers. Questions and their SQL come from a seeded grammar; an eighth of "
        f"the questions is held out.\nBefore: {at_first.exact:.0%} of {settings.held_out} held-out questions right; loss on "
        f"general text {text:.3f}. For example:"
    )
    for question, answer in list(zip(questions, before, strict=True))[:2]:
        console.print(f"  [bold]{escape(one_line(question))}[/bold] {escape(one_line(answer))}")
    numbers = {
        **asdict(settings),
        "out": str(settings.out),
        "parameters": parameters,
        "second_held_out": settings.second_held_out,
    }
    laps.mark("opening and judging the pretrained model")
    standard = f"the loss on {settings.blocks} × 128 tokens of the help() topics after minus before"
    return bench, Findings(
        numbers,
        questions,
        [a for _, a in rows["sql"][: settings.shown]],
        before,
        at_first,
        text,
        settings.held_out,
        standard,
    )


# --- 2. fine-tuning ---


def fine_tune(bench: Bench, found: Findings, name: str) -> Any:
    """Train one method from the pretrained weights on the common batches; returns the host."""
    settings, method = bench.settings, METHODS[name]
    if name == settings.methods[0]:
        bench.console.print()
        bench.console.rule("[bold]2. Fine-tuning")
    with bench.console.status(f"compiling for {method.label} …"):
        host = sparsify.compile(bench.base, method.plan(settings.seed))
    bench.laps.mark(f"compiling for {method.label}")
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    bench.console.print(
        f"[bold]{method.label}[/bold]: {trained:,} parameters train, {settings.steps} steps of {settings.batch} questions, rate "
        f"{method.lr:g}"
    )
    batches = training_batches(SQL, settings.steps, settings.batch, settings.seed)
    run = train(host, bench.tokenizer, batches, lr=method.lr, name=method.label, seed=settings.seed)
    bench.laps.mark(f"training with {method.label}")
    place = fresh_folder(bench.adapter(name))
    host.sparsify.save_adapter(place)
    with bench.console.status("held-out questions and general text …"):
        result, text = bench.judge(host)
        shown = not found.tuned  # the first method's answers stand beside those from before
        answers = write(host, bench.tokenizer, found.questions, settings.answer) if shown else []
    tuned = Tuned(name, method.label, method.lr, trained, result, text, directory_bytes(place), answers, run)
    found.tuned.append(tuned)
    bench.laps.mark(f"judging {method.label}")
    bench.console.print(
        f"  {result.exact:.1%} right, general text {text - found.base_text:+.3f}; {run.seconds:.0f} s ({run.cpu_seconds:.0f} "
        "processor seconds)"
    )
    return host


def fresh_folder(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return place


# --- 3. what an adapter can do ---


def serve_adapters(bench: Bench, found: Findings) -> None:
    """The saved adapter in a process of its own, switched, and added to a second task's adapter."""
    console, settings, first = bench.console, bench.settings, found.tuned[0]
    console.print()
    console.rule("[bold]3. The adapter: saved, opened elsewhere, switched, fused")
    place = bench.adapter(first.method)
    with console.status("a fresh process opens the adapter …"):
        answers = ask_fresh_process(place, found.questions, settings.answer)
    bench.laps.mark("a fresh process with the adapter")
    found.fresh_equal, found.off_equal = answers["adapter"] == first.answers, answers["base"] == found.before
    on = "the same answers" if found.fresh_equal else "OTHER ANSWERS"
    off = "those from before" if found.off_equal else "OTHER ANSWERS than before"
    console.print(f"{first.size / 1e6:.1f} MB on disk. A fresh process gives {on}; switched off, {off}.")
    second = sparsify.compile(bench.base, METHODS[first.method].plan(settings.seed + 1))
    batches = training_batches(DATES, settings.second_steps, settings.batch, settings.seed)
    train(second, bench.tokenizer, batches, lr=first.lr, name=DATES.title, seed=settings.seed)
    second.sparsify.save_adapter(fresh_folder(bench.adapter("dates")))
    del second
    bench.laps.mark("a second task's adapter")
    served = sparsify.load(bench.base, place, name="sql")
    served.sparsify.load_adapter(bench.adapter("dates"), "dates")
    known = {"none": {"sql": found.base}, "SQL": {"sql": first.score}}
    for label, spec in (
        ("none", None),
        ("SQL", "sql"),
        ("dates", "dates"),
        ("both, fused", {"sql": 1.0, "dates": 1.0}),
    ):
        start = time.perf_counter()
        mix = served.sparsify.set_adapter(spec)
        seconds = time.perf_counter() - start
        with console.status(f"both tasks with: {label} …"):
            scores = {
                task.name: known.get(label, {}).get(task.name)
                or score(served, bench.tokenizer, bench.held_out[task.name])
                for task in (SQL, DATES)
            }
        found.served.append(Served(label, scores, seconds))
        found.shared = sum(c.shared for c in mix.conflicts)
    bench.laps.mark("adapters judged on both tasks")
    show(
        bench,
        SERVED_COLUMNS,
        served_rows(found),
        served_note(found),
        "Two adapters in one model",
    )


# --- 4. pruned and quantised ---


def run_sparse(bench: Bench, found: Findings, host: Any) -> None:
    """Prune the tuned model, compile it for this CPU; speed, memory, accuracy and text beside dense torch."""
    console, settings = bench.console, bench.settings
    console.print()
    console.rule("[bold]4. Pruned, quantised, decoding on this CPU")
    dense = host.sparsify.plain().eval()
    dense.tie_weights()
    found.asked, found.timed_tokens = ASKED, settings.tokens
    prompt = chat_prompt(bench.tokenizer)
    console.print(f"Asked: [italic]{ASKED}[/italic]")
    first = found.tuned[0]

    def add(label: str, model: Any, judge: bool = True) -> None:
        row = measured(label, model, bench.tokenizer, prompt, settings.tokens, bench.judge if judge else None)
        found.decoders.append(row)
        console.print(f"[bold]{label}[/bold], {row.speed:.1f} tokens/s: {escape(one_line(row.sample))}")

    add("dense, torch fp32", dense, judge=False)
    found.decoders[0].score, found.decoders[0].text = first.score, first.text
    half = copy.deepcopy(dense).to(torch.bfloat16)
    add("dense, torch bf16", half, judge=False)
    del half
    bench.laps.mark("decoding with dense torch")
    batches = calibration(bench.tokenizer, settings.calibration, settings.seed)
    found.notes.append(
        f"SparseGPT zeroes {settings.sparsity:.0%} of every linear of the tuned model in one shot, on "
        f"{settings.calibration} × 128 tokens of docstrings and {TASK_ROWS} of the task's training questions; the result runs in int8 on "
        "kernels that are generated and measured on this machine, layer by layer. The head is quantised, not pruned."
    )
    with console.status("SparseGPT, then kernels are generated and timed …"):
        lowered = lower(dense, settings.fast, [pruning(settings.sparsity, settings.fast)], batches)
    bench.laps.mark("SparseGPT and kernels")
    part = " (two blocks pruned, one in int8)" if settings.fast else ""
    packed = sum(isinstance(module, SparseLinear) for module in lowered.modules())
    found.notes.append(
        f"{packed} linears run on generated kernels; the others were measured to be faster dense, and stay dense."
    )
    add(f"{settings.sparsity:.0%} zeros, int8 in {packed} linears{part}", lowered)
    del lowered
    bench.laps.mark("decoding and judging the pruned model")
    if settings.full:
        sparsity = 0.75
        with console.status(f"SparseGPT at {sparsity:.0%} …"):
            student = prune(dense, sparsity, batches)
        at_once, text = bench.judge(student)
        recover(student, dense, bench.tokenizer, 2 * settings.steps, settings.batch, settings.seed)
        found.notes.append(
            f"At {sparsity:.0%} zeros in one shot: {at_once.exact:.1%} right, text loss {text:.3f}; then {2 * settings.steps} "
            "steps of cross-entropy and SquareHead against the dense model, pruned weights held at zero."
        )
        add(f"{sparsity:.0%} zeros, distilled, int8", lower(student.sparsify.plain().eval(), False))
        bench.laps.mark(f"{sparsity:.0%} zeros, distilled")
    show(bench, DECODER_COLUMNS, decoder_rows(found), decoder_note(found), "")


# --- learning rates ---


def run_language_tuning(settings: LanguageSettings) -> dict[str, dict[float, float]]:
    """Every rate of every method on a seed of its own, judged by answer loss on validation questions (training's side)."""
    console = Console(highlight=False)
    base, tokenizer = smollm2()
    base.requires_grad_(False)
    judged = SQL.distinct(TUNING_SEED + 1, settings.held_out)
    seen = set(judged)
    batches = [
        [row for row in rows if row not in seen]
        for rows in training_batches(SQL, settings.steps, settings.batch, TUNING_SEED)
    ]
    blocks = text_blocks(tokenizer, general_text(), settings.blocks, 128)
    table = Table("method", "rate", "answer loss", "right", "text loss")
    losses: dict[str, dict[float, float]] = {}
    for name in settings.methods:
        for rate in METHODS[name].rates:
            host = sparsify.compile(base, METHODS[name].plan(TUNING_SEED))
            train(host, tokenizer, batches, lr=rate, name=f"{METHODS[name].label} {rate:g}", seed=TUNING_SEED)
            result = score(host, tokenizer, judged)
            losses.setdefault(name, {})[rate] = result.loss
            cells = f"{result.loss:.4f}", f"{result.exact:.1%}", f"{text_loss(host, blocks):.3f}"
            table.add_row(METHODS[name].label, f"{rate:g}", *cells)
            console.print(METHODS[name].label, f"{rate:g}", *cells)
    console.print(table)
    return losses


def show(bench: Bench, columns: Sequence[str], rows: Rows, note: str, title: str) -> None:
    table = Table(title=f"\n{title}" if title else None, title_justify="left")
    left = columns is ANSWER_COLUMNS
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if left or not number else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    bench.console.print(table)
    if note:
        bench.console.print(note, style="dim")


__all__ = ["LanguageSettings", "run_language_demo", "run_language_tuning"]
