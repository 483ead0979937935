"""Verdicts on the claims, and the page with its pictures, from the records of `claims.py`; nothing is typed in by hand.

A difference is paired: the same seed, that is the same batches, on both sides. "better": holds when the mean difference is beyond two
standard errors of zero in the claim's direction, "does not" when beyond two in the other. "no worse": the same around a margin of 5 % of
what the other method learned (base loss − its loss). Everything between, and whatever has fewer than three pairs, is open.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
LEAST = 3  # pairs
MARGIN = 0.05
Record = Mapping[str, Any]
Verdict_ = Literal["holds", "does not", "open"]


@dataclass(frozen=True)
class Verdict:
    """statement: the claim; where: task or setting; difference: mean paired difference ± its standard error (negative: as claimed)."""

    statement: str
    where: str
    verdict: Verdict_
    pairs: int
    difference: float = math.nan
    error: float = math.nan
    unit: str = "nats per answer token"

    def line(self) -> str:
        return f"{self.verdict:9} {self.statement} ({self.where}): {self.numbers()}"

    def numbers(self) -> str:
        if not self.pairs:
            return "no pairs yet"
        spread = f" ± {self.error:.4f}" if self.pairs > 1 else ""
        return f"{self.difference:+.4f}{spread} {self.unit}, {self.pairs} pairs"


def decide(differences: Sequence[float], margin: float = 0.0) -> tuple[Verdict_, float, float]:
    """(verdict, mean, standard error) of differences that are negative where the claim is right."""
    if not differences:
        return "open", math.nan, math.nan
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    if len(differences) < LEAST:
        return "open", mean, error
    if mean + 2 * error < margin:
        return "holds", mean, error
    return ("does not" if mean - 2 * error > margin else "open"), mean, error


def read_runs(folder: Path) -> dict[str, Record]:
    """Name → record of every finished run."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}


def seeds_of(runs: Mapping[str, Record], prefix: str) -> dict[int, Record]:
    """Seed → record of the runs `PREFIX-SEED`."""
    found = {}
    for name, record in runs.items():
        head, _, tail = name.rpartition("-")
        if head == prefix and tail.isdigit():
            found[int(tail)] = record
    return found


def end(key: str) -> Callable[[Record], float]:
    return lambda record: float(record["end"][key])


def compare(
    runs: Mapping[str, Record],
    statement: str,
    where: str,
    ours: str,
    theirs: str,
    value: Callable[[Record], float],
    *,
    no_worse: float | None = None,
    unit: str = "nats per answer token",
) -> Verdict:
    """Paired by seed: `value` of the runs OURS-SEED minus that of THEIRS-SEED. no_worse: the base's value, for a claim of equality."""
    a, b = seeds_of(runs, ours), seeds_of(runs, theirs)
    shared = sorted(set(a) & set(b))
    margin = 0.0
    if no_worse is not None and shared:
        margin = MARGIN * max(0.0, no_worse - statistics.mean(value(b[s]) for s in shared))
    verdict, mean, error = decide([value(a[s]) - value(b[s]) for s in shared], margin)
    return Verdict(statement, where, verdict, len(shared), mean, error, unit)


def text_at(path: Sequence[Record], start: Record, loss: float) -> float:
    """Change of the loss on general text when a run first reaches a task loss, between checkpoints by the logarithm of the loss."""
    before = start
    for point in path:
        if point["loss"] <= loss:
            span = math.log(before["loss"]) - math.log(point["loss"])
            share = (math.log(before["loss"]) - math.log(loss)) / span if span > 0 else 1.0
            return before["text"] + min(1.0, max(0.0, share)) * (point["text"] - before["text"]) - start["text"]
        before = point
    return before["text"] - start["text"]


def forgetting(runs: Mapping[str, Record], task: str, ours: str, theirs: str, statement: str) -> Verdict:
    """Text loss gained by each when both have the task loss that the worse of the two ends with.

    What a method forgets depends on its rate as much as on the method: each has the better of its runs at the tuned rate and at a third of it.
    """
    unit = "nats per token of general text, at equal task loss"
    start = runs.get(f"{task}-base")
    names = (ours, f"{ours}-third"), (theirs, f"{theirs}-third")
    sides = [[seeds_of(runs, f"{task}-{name}") for name in side] for side in names]
    shared = sorted(set.intersection(*(set(found) for side in sides for found in side))) if start else []
    differences = []
    for seed in shared:
        assert start is not None
        first = start["path"][0]
        paths = [[found[seed]["path"] for found in side] for side in sides]
        level = max(min(p["loss"] for path in side for p in path) for side in paths)
        gained = [
            min(text_at(path, first, level) for path in side if min(p["loss"] for p in path) <= level) for side in paths
        ]
        differences.append(gained[0] - gained[1])
    verdict, mean, error = decide(differences)
    return Verdict(statement, task, verdict, len(shared), mean, error, unit)


def verdicts(folder: Path) -> list[Verdict]:
    """Every statement on every task, in the order of the page."""
    from benchmarks.claim_tasks import TASKS
    from benchmarks.claims import VARIANTS_ON

    runs = read_runs(folder)
    found: list[Verdict] = []
    for task in TASKS:
        base = runs.get(f"{task}-base")
        start = float(base["end"]["loss"]) if base else None

        def better(statement: str, ours: str, theirs: str, task: str = task) -> Verdict:
            return compare(runs, statement, task, f"{task}-{ours}", f"{task}-{theirs}", end("loss"))

        def equal(statement: str, ours: str, theirs: str, task: str = task, start: float | None = start) -> Verdict:
            return compare(runs, statement, task, f"{task}-{ours}", f"{task}-{theirs}", end("loss"), no_worse=start)

        found += [
            equal("S2FT learns no less than LoRA", "s2ft", "lora"),
            forgetting(runs, task, "s2ft", "lora", "S2FT forgets less than LoRA"),
            better("RoSA learns more than LoRA", "rosa", "lora"),
            better("RoSA learns more than sparse entries alone", "rosa", "sparse"),
            better("LoRA learns more than sparse entries alone", "lora", "sparse"),
            equal("PaCA learns no less than LoRA", "paca", "lora"),
        ]
        if task != VARIANTS_ON:
            continue
        found += [
            equal("S2FT on the units of smallest activation learns no less than on random ones", "s2ft-small", "s2ft"),
            better("… and more than on those of largest activation", "s2ft-small", "s2ft-large"),
            equal("S2FT in the upper third of the layers learns no less than in all", "s2ft-upper", "s2ft"),
            better("RoSA with the warm-up inside the budget learns more than LoRA", "rosa-inside", "lora"),
            better("A gradient mask is better than a random one (RoSA)", "rosa", "rosa-random"),
            equal("QPaCA learns no less than PaCA", "paca-nf4", "paca"),
            equal("QRoSA learns no less than RoSA", "rosa-nf4", "rosa"),
        ]
    for sparsity in ("0.6", "0.75", "0.85"):
        for other, label in (("ce", "cross-entropy"), ("ce+kl", "cross-entropy + KL")):
            found.append(
                compare(
                    runs, f"SquareHead recovers more than {label}", f"{sparsity} zeros, 48 rows",
                    f"squarehead-{sparsity}-ce+sq", f"squarehead-{sparsity}-{other}", lambda r: -float(r["end"]["exact"]),
                    unit="share of wrong answers",
                )
            )  # fmt: skip
    for other, label in (("lora", "LoRAs"), ("s2ft-same", "S2FT adapters on the same units")):
        found.append(
            compare(
                runs, f"Fusing S2FT adapters on disjoint units loses less than fusing {label}", "both tasks",
                "fusion-s2ft-disjoint", f"fusion-{other}", lambda r: min(r["end"].values()),
            )
        )  # fmt: skip
    return found


# --- the page ---


def spread(values: Sequence[float], digits: int = 3, scale: float = 1.0, sign: bool = False) -> str:
    mean = statistics.mean(values) * scale
    shown = f"{mean:{'+' if sign else ''}.{digits}f}"
    if len(values) < 2:
        return f"{shown} (1 run)"
    return f"{shown} ± {scale * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def task_table(runs: Mapping[str, Record], task: str) -> str:
    from benchmarks.claim_adapters import METHODS

    base = runs.get(f"{task}-base")
    if base is None:
        return ""
    start = base["end"]
    rows: list[dict[str, str]] = [
        {"method": "the pretrained model", "task loss": f"{start['loss']:.3f}", "right": f"{start['exact']:.1%}"}
    ]
    for name, method in METHODS.items():
        found = list(seeds_of(runs, f"{task}-{name}").values())
        if found:
            ends = [run["end"] for run in found]
            rows.append(
                {
                    "method": method.label,
                    "runs": str(len(found)),
                    "trained": f"{found[0]['trained']:,}",
                    "rates": ", ".join(f"{k} {v:g}" for k, v in found[0]["facts"]["rates"].items()),
                    "task loss": spread([e["loss"] for e in ends]),
                    "right": spread([e["exact"] for e in ends], 1, 100) + " %",
                    "general text": spread([e["text"] - start["text"] for e in ends], 3, 1, True),
                    "other task": spread([e["other"] - start["other"] for e in ends], 3, 1, True),
                }
            )
    columns = ("method", "runs", "trained", "rates", "task loss", "right", "general text", "other task")
    return table(rows, columns)


def squarehead_table(runs: Mapping[str, Record]) -> str:
    rows: list[dict[str, str]] = []
    for sparsity in ("0.6", "0.75", "0.85"):
        for loss in ("none", "ce", "ce+kl", "ce+sq"):
            found = list(seeds_of(runs, f"squarehead-{sparsity}-{loss}").values())
            if found:
                fits = [run["fit"] for run in found if "fit" in run]
                rows.append(
                    {
                        "zeros": sparsity,
                        "recovered with": "nothing" if loss == "none" else loss,
                        "runs": str(len(found)),
                        "right": spread([r["end"]["exact"] for r in found], 1, 100) + " %",
                        "loss": spread([r["end"]["loss"] for r in found]),
                        "loss on the 48 rows": spread(fits, 4) if fits else "",
                    }
                )
    return table(rows, ("zeros", "recovered with", "runs", "right", "loss", "loss on the 48 rows"))


def draw_forgetting(runs: Mapping[str, Record], task: str, place: Path) -> bool:
    """Change of the general-text loss against the task loss along every run; False where there is none."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    from benchmarks.claim_adapters import METHODS

    base = runs.get(f"{task}-base")
    shown = ("s2ft", "lora", "s2ft-third", "lora-third", "rosa", "sparse", "paca", "full")
    if base is None or not any(seeds_of(runs, f"{task}-{name}") for name in shown):
        return False
    with pyplot.rc_context({"svg.hashsalt": "sparsify", "svg.fonttype": "none", "font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.6))
        first = base["path"][0]
        for number, name in enumerate(shown):
            for turn, run in enumerate(seeds_of(runs, f"{task}-{name}").values()):
                points = [first, *run["path"]]
                label = METHODS[name].label if turn == 0 else None
                xs, ys = [p["loss"] for p in points], [p["text"] - first["text"] for p in points]
                axes.plot(xs, ys, color=f"C{number}", marker="o", markersize=3, linewidth=1, label=label)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("loss on held-out questions (learnt: to the right)")
        axes.set_ylabel("general text: loss gained, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
        figure.tight_layout()
        figure.savefig(place, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return True


def write_page(folder: Path, docs: Path = DOCS) -> list[Path]:
    """Write docs/claims.md and docs/claims/*.svg; returns what was written."""
    from benchmarks.claim_tasks import TASKS

    runs = read_runs(folder)
    pictures = docs / "claims"
    pictures.mkdir(parents=True, exist_ok=True)
    written = []
    for task in TASKS:
        place = pictures / f"{task}.svg"
        if draw_forgetting(runs, task, place):
            written.append(place)
    page = docs / "claims.md"
    page.write_text(page_text(folder, [p.stem for p in written]), encoding="utf-8")
    return [page, *written]


def page_text(folder: Path, pictures: Sequence[str]) -> str:
    from benchmarks.claim_tasks import TASKS

    runs = read_runs(folder)
    found = verdicts(folder)
    count = {word: sum(v.verdict == word for v in found) for word in ("holds", "does not", "open")}
    dates = sorted({run["date"] for run in runs.values() if "date" in run})
    lines = [
        "# The papers' claims, tried",
        "",
        "<!-- made by `python benchmarks/claims.py --page` from benchmarks/results/claims/; do not edit -->",
        "",
        f"{count['holds']} hold, {count['does not']} do not, {count['open']} are open, on {len(runs)} runs"
        + (f" of {dates[0]} to {dates[-1]}." if dates else "."),
        "",
        "SmolLM2-135M-Instruct, 40 steps of 8 rows drawn from 400, the same batches for every method; 1,831,680 trained parameters in each "
        "(PaCA 1.9 % more, full fine-tuning all 134.5 million); learning rates per task and method from a grid that is widened while its "
        "best lies on an edge. A difference is paired by seed and given with its standard error; negative is what the claim says. *holds*: beyond two "
        "standard errors; *no less*: beyond two standard errors above a loss that is worse by 5 % of what the other method learnt; *open*: "
        "neither, or fewer than three pairs. What 135 million parameters and 40 steps show need not be what 7 billion show.",
        "",
        table(
            [{"verdict": f"**{v.verdict}**", "claim": v.statement, "on": v.where, "difference": v.numbers()} for v in found],
            ("verdict", "claim", "on", "difference"),
        ),
        "",
    ]  # fmt: skip
    for task in TASKS:
        text = task_table(runs, task)
        if text:
            lines += [f"## {TASKS[task].title}", "", text, ""]
            if task in pictures:
                lines += [f"![General text against task loss, {task}](claims/{task}.svg)", ""]
    text = squarehead_table(runs)
    if "\n" in text and runs:
        lines += [
            "## Recovery when data are scarce",
            "",
            "A decoder of 3 layers that sorts seven digits, pruned by SparseGPT, recovered on 48 rows in 150 steps (`claim_squarehead.py`). Where "
            "nothing was lost, nothing can be recovered.",
            "",
            text,
            "",
        ]
    lines += [
        "## Controls",
        "",
        "One linear whose true change is sparse + rank 4 (`tests/numeric/test_robust_pca.py`, run with every test run): RoSA finds it, LoRA and "
        "sparse entries of the same size do not. So where RoSA gains nothing above, it is not because the method computes something else.",
        "",
    ]
    return "\n".join(lines)
