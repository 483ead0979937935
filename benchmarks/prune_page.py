"""The table of `prune_real.py` and the page `docs/pruning.md`, from its records alone; nothing is typed in by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.claim_page import DOCS, Record, read_runs
from benchmarks.harness import table

KINDS = {
    "50": "50 %",
    "50-sensitivity": "50 %, by sensitivity",
    "2of4": "2:4",
    "8of32": "8:32 (75 %)",
    "75": "75 %",
    "75-sensitivity": "75 %, by sensitivity",
}
RECOVERIES = {
    "oneshot": "nothing",
    "ce-library": "cross-entropy, library",
    "ce-own": "cross-entropy, own text",
    "sq-library": "SquareHead, library",
    "sq-own": "SquareHead, own text",
    "sq-token-library": "SquareHead by token, library",
}
COLUMNS = (
    "zeros",
    "recovered with",
    "topics",
    "own text",
    "topics, int8",
    "own text, int8",
    "int8 size",
    "processor s",
)
BEARABLE = 1.5
"""Perplexity at most that many times the dense model's: a model that one might still use."""


def rows(folder: Path) -> list[dict[str, Any]]:
    """Perplexities of every run that is there, in the page's order."""
    runs = read_runs(folder)
    found = [row_of("none", "", runs["dense"])] if "dense" in runs else []
    for kind, label in KINDS.items():
        for recovery, words in RECOVERIES.items():
            run = runs.get(f"{kind}-{recovery}")
            if run is not None:
                found.append(row_of(label, words, run))
    return found


def row_of(zeros: str, words: str, run: Record) -> dict[str, Any]:
    return {
        "zeros": zeros,
        "recovered with": words,
        "topics": perplexity(run["end"]["topics"]),
        "own text": perplexity(run["end"]["own"]),
        "topics, int8": perplexity(run["int8"]["topics"]),
        "own text, int8": perplexity(run["int8"]["own"]),
        "int8 size": f"{run['bytes']['int8'] / run['bytes']['dense']:.2f} ×",
        "processor s": f"{run['cpu_seconds']:.0f}" if "cpu_seconds" in run else "",
    }


def perplexity(loss: float) -> str:
    """With three digits that count; a destroyed model's as a power of ten."""
    if loss > 14:
        return f"10^{loss / math.log(10):.0f}"
    value = math.exp(loss)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def expectations(runs: Mapping[str, Record]) -> list[str]:
    """What a user of a model of this size may expect, as sentences that follow from the numbers."""
    if "dense" not in runs:
        return ["Nothing has been run yet."]
    dense = runs["dense"]["end"]["topics"]

    def factor(name: str) -> float | None:
        return math.exp(runs[name]["end"]["topics"] - dense) if name in runs else None

    lines = []
    for kind in ("50", "75"):
        label, once = KINDS[kind], factor(f"{kind}-oneshot")
        if once is None:
            continue
        back = {
            words: value for key, words in RECOVERIES.items() if key != "oneshot" and (value := factor(f"{kind}-{key}"))
        }
        line = f"At {label} zeros one-shot pruning multiplies the perplexity of the topics by {once:.2f}"
        if back:
            best = min(back, key=back.__getitem__)
            line += f"; the best recovery ({best}) brings that to {back[best]:.2f}"
            once = min(once, back[best])
        verdict = "bearable" if once <= BEARABLE else "not good enough to use as it is"
        lines.append(f"{line}: {verdict} (bearable: at most {BEARABLE:g}).")
    for kind in ("50", "75"):
        moved, uniform = factor(f"{kind}-sensitivity-oneshot"), factor(f"{kind}-oneshot")
        if moved is not None and uniform is not None:
            lines.append(
                f"Moving zeros between layers by sensitivity changes {KINDS[kind]} from {uniform:.2f} to {moved:.2f} times the dense perplexity."
            )
    for kind, beside in (("2of4", "50"), ("8of32", "75")):
        fixed, free = factor(f"{kind}-oneshot"), factor(f"{beside}-oneshot")
        if fixed is not None and free is not None:
            lines.append(
                f"{KINDS[kind].split()[0]} costs {fixed:.2f} times the dense perplexity where unstructured costs {free:.2f}."
            )
    added = [math.exp(run["int8"]["topics"] - run["end"]["topics"]) - 1 for run in runs.values() if "int8" in run]
    if added:
        lines.append(f"int8 on top changes the perplexity by {min(added):+.1%} to {max(added):+.1%}.")
    return lines


def page_text(folder: Path) -> str:
    runs = {name: run for name, run in read_runs(folder).items() if not name.startswith("text-")}
    head = [
        "# Pruning a small model for real",
        "",
        "<!-- made by `python benchmarks/prune_real.py --page` from benchmarks/results/prune_real/; do not edit -->",
        "",
    ]
    if "dense" not in runs:
        return "\n".join([*head, *expectations(runs), ""])
    setting = runs["dense"]["facts"]["setting"]
    length = setting["length"]
    every = 1 + sum(recovery == "oneshot" or known(kind, recovery) for kind in KINDS for recovery in RECOVERIES)
    missing = every - len(runs)
    return "\n".join(
        [
            *head,
            f"SmolLM2-135M-Instruct; SparseGPT on {setting['calibration']} × {length} tokens of docstrings, every linear of the "
            f"{setting['blocks']} blocks, the embedding and the head not. Recovered: {setting['steps']} steps of {setting['batch']} × {length} "
            f"tokens against the dense model, rate {setting['rate']:g} for all, the zeros held; on other docstrings of the standard library, or "
            f"on text that the dense model wrote itself. Perplexity on {setting['held_out']} × {length} tokens of text that none of this saw: "
            "the `help()` topics of Python, and what the dense model wrote from another seed (which it likes by construction). One seed, one "
            "rate, short recoveries; a larger model loses less.",
            "",
            *(f"- {line}" for line in expectations(runs)),
            "",
            table(rows(folder), COLUMNS),
            "",
            *([f"{missing} runs are still to be made.", ""] if missing > 0 else []),
        ]
    )


def known(kind: str, recovery: str) -> bool:
    """Whether the grid has such a recovery."""
    from benchmarks.prune_real import KINDS as PRUNED
    from benchmarks.prune_real import file_name

    pairs = {f"{file_name(name)}-{loss}-{text}" for name, made in PRUNED.items() for loss, text in made.recoveries}
    return f"{kind}-{recovery}" in pairs


def write_page(folder: Path, docs: Path = DOCS) -> Path:
    """Write docs/pruning.md."""
    page = docs / "pruning.md"
    page.write_text(page_text(folder), encoding="utf-8")
    return page
