"""What the language model demo found, as plain data; its tables, results.json and HTML report."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsify.demo.language_training import Run, Score
from sparsify.demo.results import smooth
from sparsify.show.drawing import write_atomically
from sparsify.show.html_report import Chart, Section, Series, Table, write_html

Rows = tuple[tuple[str, ...], ...]


@dataclass
class Tuned:
    """One method's fine-tuning. `text`: loss on general text; `size`: bytes of the saved adapter; `answers`: to the
    questions that are shown, of the first method alone."""

    method: str
    label: str
    lr: float
    trained: int
    score: Score
    text: float
    size: int
    answers: list[str]
    run: Run


@dataclass
class Served:
    """One adapter, or a mix, on both tasks; `switch` in seconds."""

    label: str
    scores: dict[str, Score]
    switch: float = 0.0


@dataclass
class Decoder:
    """One way to run the tuned model: tokens per second, bytes of its tensors, and what it writes."""

    label: str
    speed: float
    size: int
    score: Score | None
    text: float | None
    sample: str


@dataclass
class Stage:
    """What one step of the demo took, on the wall and on the processor (with processes that it started)."""

    name: str
    seconds: float
    cpu_seconds: float


@dataclass
class Findings:
    """Everything, in the order in which it was found."""

    settings: dict[str, Any]
    questions: list[str]
    expected: list[str]
    before: list[str]
    base: Score
    base_text: float
    held_out: int
    standard: str
    tuned: list[Tuned] = field(default_factory=list)
    fresh_equal: bool = False
    off_equal: bool = False
    served: list[Served] = field(default_factory=list)
    shared: int = 0
    asked: str = ""
    decoders: list[Decoder] = field(default_factory=list)
    timed_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def headline(found: Findings) -> tuple[str, ...]:
    """The result in up to three sentences, from the numbers alone."""
    first = found.tuned[0]
    share, steps = first.trained / found.settings["parameters"], found.settings["steps"]
    lines = [
        f"{first.label} trained {share:.1%} of SmolLM2-135M for {steps} short steps: "
        f"{found.base.exact:.0%} → {first.score.exact:.0%} of {found.held_out} held-out questions right."
    ]
    others = [
        f"{t.label}: {t.score.exact:.0%} right, {t.text - found.base_text:+.2f}" for t in found.tuned if t is not first
    ]
    beside = f" ({'; '.join(others)})" if others else ""
    lines.append(
        f"What it forgot: the loss on other text moved by {first.text - found.base_text:+.2f} nats{beside}, at "
        "the same number of trained parameters and the same batches."
    )
    if len(found.decoders) > 1:
        dense, last = found.decoders[0], found.decoders[-1]
        lines.append(
            f"{last.label}: {last.speed:.1f} tokens per second where dense torch has {dense.speed:.1f} "
            f"({last.speed / dense.speed:.2f} ×), in {last.size / dense.size:.2f} of the memory."
        )
    return tuple(lines)


ANSWER_COLUMNS = ("question", "before", "after", "expected")


def answer_rows(found: Findings) -> Rows:
    after = found.tuned[0].answers
    return tuple(
        (question_of(q), one_line(b), one_line(a), one_line(e))
        for q, b, a, e in zip(found.questions, found.before, after, found.expected, strict=True)
    )


def question_of(prompt: str) -> str:
    return prompt.split("\n")[0].removeprefix("Question: ")


def one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


TUNED_COLUMNS = ("method", "right", "answer loss", "text loss", "forgot", "trained", "step", "adapter")


def tuned_rows(found: Findings) -> Rows:
    rows = [
        ("before", f"{found.base.exact:.1%}", f"{found.base.loss:.3f}", f"{found.base_text:.3f}", "", "", "", ""),
    ]
    for t in found.tuned:
        rows.append(
            (
                t.label,
                f"{t.score.exact:.1%}",
                f"{t.score.loss:.3f}",
                f"{t.text:.3f}",
                f"{t.text - found.base_text:+.3f}",
                f"{t.trained:,}",
                f"{t.run.step_seconds:.2f} s",
                f"{t.size / 1e6:.1f} MB",
            )
        )
    return tuple(rows)


def tuned_note(found: Findings) -> str:
    p = max((t.score.exact for t in found.tuned), default=0.0)
    error = (max(p * (1 - p), 0.25 / found.held_out) / found.held_out) ** 0.5
    rates = ", ".join(f"{t.label} {t.lr:g}" for t in found.tuned)
    return (
        f"Right: the whole answer, of {found.held_out} held-out questions (one standard error: about {error:.1%}); loss: nats "
        f"per token; forgot: {found.standard}. One seed; the same batches for all; learning rates from a pilot: {rates}. Forgetting "
        "depends on the rate as much as on the method: --tune tries more rates."
    )


SERVED_COLUMNS = ("active adapter", "SQL right", "dates right", "SQL loss", "dates loss", "switch")


def served_rows(found: Findings) -> Rows:
    return tuple(
        (
            s.label,
            f"{s.scores['sql'].exact:.1%}",
            f"{s.scores['dates'].exact:.1%}",
            f"{s.scores['sql'].loss:.3f}",
            f"{s.scores['dates'].loss:.3f}",
            f"{s.switch * 1000:.0f} ms",
        )
        for s in found.served
    )


def served_note(found: Findings) -> str:
    return (
        f"The second adapter was trained for {found.settings['second_steps']} steps and is judged on "
        f"{found.settings['second_held_out']} held-out dates. "
        f"Fused: both changes added; they share {found.shared} trained channels."
    )


STAGE_COLUMNS = ("step", "seconds", "processor seconds")


def stage_rows(found: Findings) -> Rows:
    return tuple((s.name, f"{s.seconds:.0f}", f"{s.cpu_seconds:.0f}") for s in found.stages)


DECODER_COLUMNS = ("model", "tokens/s", "", "memory", "right", "text loss")


def decoder_rows(found: Findings) -> Rows:
    first = found.decoders[0]
    return tuple(
        (
            d.label,
            f"{d.speed:.1f}",
            f"{d.speed / first.speed:.2f} ×",
            f"{d.size / 1e6:.0f} MB",
            "" if d.score is None else f"{d.score.exact:.1%}",
            "" if d.text is None else f"{d.text:.3f}",
        )
        for d in found.decoders
    )


def decoder_note(found: Findings) -> str:
    return f"Greedy decoding of one text, {found.timed_tokens} tokens after the prompt, fastest of two, {torch.get_num_threads()} threads."


def write_report(out: Path, found: Findings, program: Any) -> None:
    sections = [
        Section(
            "The same questions before and after",
            tables=(
                Table(
                    "", ANSWER_COLUMNS, answer_rows(found), "Greedy decoding; none of them was trained on.", prose=True
                ),
            ),
        ),
        Section(
            "Fine-tuning",
            tables=(Table("", TUNED_COLUMNS, tuned_rows(found), tuned_note(found), marked=(1,)),),
            charts=(
                Chart(
                    "Training loss, mean of 5 steps",
                    "step",
                    "loss",
                    tuple(Series(t.label, smooth(t.run.losses, 5)) for t in found.tuned),
                    percent=False,
                ),
            ),
        ),
    ]
    if found.served:
        sections.append(
            Section(
                "The adapter",
                (
                    f"Opened by a process of its own on the pretrained model: "
                    f"{'the same answers' if found.fresh_equal else 'OTHER ANSWERS'}; switched off there: "
                    f"{'the answers from before' if found.off_equal else 'OTHER ANSWERS than before'}.",
                ),
                (
                    Table(
                        "Two adapters in one model",
                        SERVED_COLUMNS,
                        served_rows(found),
                        served_note(found),
                    ),
                ),
            )
        )
    if found.decoders:
        samples = tuple((d.label, one_line(d.sample)) for d in found.decoders)
        sections.append(
            Section(
                "Pruned, quantised, decoding",
                tuple(found.notes),
                (
                    Table("", DECODER_COLUMNS, decoder_rows(found), decoder_note(found)),
                    Table(f"What it answers to: {found.asked}", ("model", "the first tokens"), samples, prose=True),
                ),
            )
        )
    sections.append(Section("The program", program=program))
    spent = (
        f"{found.seconds:.0f} s in all on this machine: {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}."
    )
    sections.append(Section("Where the time went", (spent,), (Table("", STAGE_COLUMNS, stage_rows(found)),)))
    first, *rest = headline(found)
    sections.insert(0, Section("In short", tuple(rest)))
    little = " (With --fast: a fraction of the usual work, too little to judge by.)" if found.settings["fast"] else ""
    write_html(out / "demo.html", "A small language model learns SQL", first + little, sections)


def write_results(out: Path, found: Findings) -> dict[str, Any]:
    document = {"python": platform.python_version(), "torch": torch.__version__, **asdict(found)}
    write_atomically(out / "results.json", json.dumps(document, indent=1))
    return document
