"""The demo's second half: the fine-tuned encoder is pruned, recovers by distillation, and runs on generated CPU kernels."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table as ConsoleTable
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import sparsify
from sparsify import CpuOptions, Plan, Prune, Quantize
from sparsify.demo.minilm import Classifier, mean_pool
from sparsify.demo.results import Bench, megabytes
from sparsify.demo.training import Texts, accuracy
from sparsify.plan import Rule
from sparsify.show.html_report import Section, Table
from sparsify.train.squarehead import Distiller

SPARSITY = 0.75
LEARNING_RATE = 3e-4
BATCH = 16
BATCHES = (1, 32)  # sentences per call
TOKENS = (16, 32, 256)  # numbers of tokens in such calls: a short sentence, a long one, many
ROUNDS = 4


def show_sparse_inference(bench: Bench, encoder: Any, head: nn.Linear) -> tuple[dict[str, Any], list[Section]]:
    """Prune, distil, compile for the CPU; accuracy and sentences per second of every step, beside the dense model."""
    console = bench.console
    console.rule("[bold]5. Pruned for fast inference")
    teacher = encoder.sparsify.plain().eval()
    calibration = [inputs for inputs, _ in bench.train_texts.sorted_batches(BATCH)[::4]]
    with console.status(f"SparseGPT removes {SPARSITY:.0%} of every linear …"):
        student = sparsify.compile(teacher, Plan([Prune(sparsity=SPARSITY)]), calibration=calibration, progress=False)
    dense_head, head = head, copy.deepcopy(head)
    pruned = accuracy(Classifier(student, head), bench.test_texts)
    console.print(f"SparseGPT removed {SPARSITY:.0%} of every linear's weights in one shot: {pruned:.1%}.")
    seconds = distil(bench, student, head, teacher)
    recovered = accuracy(Classifier(student, head), bench.test_texts)
    console.print(
        f"Distilled from the dense model with SquareHead for {seconds:.0f} s, pruned weights held at zero: {recovered:.1%}."
    )
    rows = measure(bench, (teacher, dense_head), (student, head))
    table = ConsoleTable(title="Inference on this CPU", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for row in table_rows(rows):
        table.add_row(*row)
    console.print(table)
    facts = {"one shot": pruned, "distilled": recovered, "distillation s": seconds, "inference": rows}
    return facts, [section_of(facts, rows)]


def distil(bench: Bench, student: Any, head: nn.Linear, teacher: nn.Module) -> float:
    """Train the surviving weights and the head on cross-entropy and SquareHead; returns seconds."""
    distiller = Distiller(student, teacher, ce=0.0, sq=1.0)
    generator = torch.Generator().manual_seed(bench.settings.seed)
    plan: list[list[int]] = []
    for _ in range(max(1, round(bench.settings.epochs))):
        plan += bench.train_texts.shuffled(BATCH, generator)
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    parameters = [p for p in student.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, len(plan) // 20), 1 - step / len(plan))
    )
    student.train()
    start = time.perf_counter()
    for positions in tqdm(plan, desc="distillation", unit="step", leave=False, dynamic_ncols=True):
        inputs, labels = bench.train_texts.take(positions)
        step = distiller(inputs)
        logits = head(mean_pool(step.outputs.last_hidden_state, inputs["attention_mask"]))
        (F.cross_entropy(logits, labels) + step.loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    student.eval()
    return time.perf_counter() - start


def measure(bench: Bench, dense: tuple[nn.Module, nn.Linear], pruned: tuple[Any, nn.Linear]) -> list[dict[str, Any]]:
    """Accuracy, bytes and sentences per second of the dense (encoder, head) and of what the CPU lowering makes of both."""
    options = CpuOptions(tokens=TOKENS)
    teacher, sparse = dense[0], pruned[0].sparsify.plain().eval()
    encoders: dict[str, nn.Module] = {"dense, torch": teacher}
    nothing: list[Rule] = []
    for name, source, rules in (
        ("dense, compiled", teacher, nothing),
        (f"{SPARSITY:.0%} sparse, fp32", sparse, nothing),
        (f"{SPARSITY:.0%} sparse, int8", sparse, [*nothing, Quantize(format="int8")]),
    ):
        with bench.console.status(f"compiling: {name} …"):
            encoders[name] = sparsify.compile(source, Plan(rules, target="cpu"), cpu=options, progress=False)
    heads = {name: dense[1] if name.startswith("dense") else pruned[1] for name in encoders}
    speeds = {batch: sentences_per_second(encoders, bench.watched, batch) for batch in BATCHES}
    rows = []
    for name, encoder in encoders.items():
        lowered = encoder.__dict__["sparsify"].cpu if "sparsify" in encoder.__dict__ else None
        rows.append(
            {
                "encoder": name,
                "accuracy": accuracy(Classifier(encoder, heads[name]), bench.test_texts),
                "bytes": lowered.bytes_after if lowered else 4 * sum(p.numel() for p in encoder.parameters()),
                "packed": len(lowered.lowered) if lowered else 0,
                **{f"per second, {batch} a call": speeds[batch][name] for batch in BATCHES},
            }
        )
    return rows


def sentences_per_second(encoders: dict[str, nn.Module], texts: Texts, batch: int) -> dict[str, float]:
    """Every encoder over the same texts in turn, `ROUNDS` times; the fastest round of each."""
    batches = texts.sorted_batches(batch)
    batches = batches[:: max(1, len(batches) // 64)]
    count = sum(len(labels) for _, labels in batches)
    best = dict.fromkeys(encoders, float("inf"))
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for name, encoder in encoders.items():
                start = time.perf_counter()
                run_all(encoder, batches)
                if turn:  # the first turn warms up
                    best[name] = min(best[name], time.perf_counter() - start)
    return {name: count / seconds for name, seconds in best.items()}


def run_all(encoder: Callable[..., Any], batches: list[tuple[dict[str, Tensor], Tensor]]) -> None:
    for inputs, _ in batches:
        encoder(**inputs)


COLUMNS = ("encoder", "accuracy", *(f"sentences/s, {batch} at once" for batch in BATCHES), "memory")


def table_rows(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
    """Rows of the table, speeds with their ratio to the first row."""
    first = rows[0]

    def speed(row: dict[str, Any], batch: int) -> str:
        value = row[f"per second, {batch} a call"]
        return f"{value:.0f} ({value / first[f'per second, {batch} a call']:.2f} ×)"

    return tuple(
        (r["encoder"], f"{r['accuracy']:.1%}", *(speed(r, batch) for batch in BATCHES), megabytes(r["bytes"]))
        for r in rows
    )


def section_of(facts: dict[str, Any], rows: list[dict[str, Any]]) -> Section:
    return Section(
        "Pruned, distilled, compiled for the CPU",
        (
            f"SparseGPT removes {SPARSITY:.0%} of every linear's weights in one shot (accuracy {facts['one shot']:.1%}); the "
            "surviving ones and the head are then trained against the dense model's hidden states (SquareHead) for "
            f"{facts['distillation s']:.0f} s (accuracy {facts['distilled']:.1%}). The result is compiled for this CPU: packed "
            "weights and generated kernels where they are measured to be faster than torch, layer by layer.",
        ),
        (
            Table(
                "",
                COLUMNS,
                table_rows(rows),
                f"Speeds: the encoder alone, fastest of {ROUNDS} rounds in turn, {torch.get_num_threads()} threads. "
                "Memory: the encoder's tensors, embeddings included.",
            ),
        ),
    )
