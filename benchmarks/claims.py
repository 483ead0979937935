"""The papers' claims, tried on SmolLM2-135M-Instruct and on controls whose answer is known; `docs/claims.md` is made from the records.

    adapters     S2FT, PaCA, RoSA, sparse entries alone, LoRA and full fine-tuning on two tasks, at equal trained size and equal steps;
                 forgetting as the loss on general text and on the other task, at four checkpoints (claim_adapters.py, claim_tasks.py)
    squarehead   recovery after pruning when data are scarce (claim_squarehead.py)
    fusion       adapters of two tasks in one model: S2FT on disjoint and on the same units, LoRA (claim_fusion.py)

Learning rates: per task and family on a seed of its own, by loss on validation questions; three rates half a decade apart, then outwards as
long as the best lies on an edge. Then three seeds with that rate: the methods on both tasks, their variants on sorting, which is cheaper. Every run is one JSON file under benchmarks/results/claims/ that says
everything it depends on; what is there is not run again, so the grid can be stopped and goes on, also in pieces.

    python benchmarks/claims.py                      the whole grid: about 18,000 processor seconds
    python benchmarks/claims.py --budget 3600        stop before the run that would begin after that many seconds
    python benchmarks/claims.py --part squarehead --part adapters --task arithmetic --method s2ft --method lora
    python benchmarks/claims.py --page               write docs/claims.md, its pictures, and what other pages quote, from what is there
    python benchmarks/claims.py --fast --results DIR a walk through every part in a minute or two; its numbers mean nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import claim_squarehead
from benchmarks.claim_adapters import METHODS, Setting, train
from benchmarks.claim_fusion import KINDS, fuse
from benchmarks.claim_tasks import TASKS, digest
from benchmarks.grid import Grid
from benchmarks.harness import RESULTS, parser

FOLDER = RESULTS / "claims"
SEEDS = (0, 1, 2)
TUNING_SEED = 100
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
START = {"full": 1e-4, "lora": 1e-3, "s2ft": 1e-3, "paca": 1e-3, "sparse": 1e-3}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
ROWS = {name: digest(task) for name, task in TASKS.items()}
PARTS = ("squarehead", "adapters", "fusion")
SPARSITIES = (0.6, 0.75, 0.85)
VARIANTS_ON = "sorting"
FIRST = ("s2ft", "lora", "s2ft-third", "lora-third", "rosa", "sparse", "paca")
FAST = Setting(
    steps=3, tuning_steps=1, batch=2, judged=4, glance=2, blocks=1, few_blocks=1, checkpoints=2
)  # runs through everything and measures nothing


def best_on(grid: Sequence[float], start: float, loss: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """(best value, losses): three neighbours around `start`, then outwards while the best lies on an edge of what was tried."""
    place = grid.index(start)
    low, high = max(0, place - 1), min(len(grid) - 1, place + 1)
    found = {grid[i]: loss(grid[i]) for i in range(low, high + 1)}
    while True:
        best = min(found, key=found.__getitem__)
        if best == grid[low] and low > 0:
            low -= 1
            found[grid[low]] = loss(grid[low])
        elif best == grid[high] and high < len(grid) - 1:
            high += 1
            found[grid[high]] = loss(grid[high])
        else:
            return best, found


# --- adapters ---


def rates_for(grid: Grid, task: str, family: str) -> dict[str, float]:
    """The tuned rates that a method of this family needs."""
    if family == "rosa":
        rates = rates_for(grid, task, "lora") | rates_for(grid, task, "sparse")
        values, start = (FACTORS[1:4], 1.0) if grid.fast else (FACTORS, 1.0)
    else:
        rates, start = {}, START[family]
        values = tuple(v for v in GRID if start / 4 < v < 4 * start) if grid.fast else GRID

    def loss(rate: float) -> float:
        tried = {**rates, family: rate}
        facts = {
            "task": task,
            "rows": ROWS,
            "method": family,
            "rates": tried,
            "seed": TUNING_SEED,
            "setting": asdict(grid.setting),
        }

        def make() -> dict[str, Any]:
            base, tokenizer = grid.model
            return train(base, tokenizer, task, METHODS[family], tried, TUNING_SEED, grid.setting, tuning=True)[1]

        return grid.cell(f"rate-{task}-{family}-{rate:g}", facts, make)["end"]["loss"]

    best, _ = best_on(values, start, loss)
    return {**rates, family: best}


def adapter_run(grid: Grid, task: str, name: str, seed: int) -> dict[str, Any]:
    method = METHODS[name]
    rates = method.scaled(rates_for(grid, task, method.family))
    facts = {"task": task, "rows": ROWS, "method": name, "rates": rates, "seed": seed, "setting": asdict(grid.setting)}

    def make() -> dict[str, Any]:
        base, tokenizer = grid.model
        return train(base, tokenizer, task, method, rates, seed, grid.setting)[1]

    return grid.cell(f"{task}-{name}-{seed}", facts, make)


def base_run(grid: Grid, task: str) -> dict[str, Any]:
    """What the pretrained model does."""
    from benchmarks.claim_adapters import Judge

    def make() -> dict[str, Any]:
        base, tokenizer = grid.model
        judge = Judge(tokenizer, task, grid.setting, False)
        return {"end": judge.whole(base), "path": [{"step": 0, **judge.glance(base)}]}

    return grid.cell(f"{task}-base", {"task": task, "rows": ROWS, "setting": asdict(grid.setting)}, make)


def adapters(grid: Grid, tasks: Sequence[str], methods: Sequence[str]) -> Iterator[Callable[[], Any]]:
    """The runs in the order of what they tell: first the claims between methods, on the cheaper task first, then their variants."""
    first = [name for name in FIRST if name in methods]
    variants = [name for name in methods if name not in FIRST]
    for part, on in ((first, tasks[::-1]), (variants, [t for t in tasks if t == VARIANTS_ON])):
        for task in on:
            yield lambda task=task: base_run(grid, task)
            for seed in grid.seeds:
                for name in part:
                    yield lambda task=task, name=name, seed=seed: adapter_run(grid, task, name, seed)


# --- recovery, fusion ---


def squarehead(grid: Grid) -> Iterator[Callable[[], Any]]:
    def run(sparsity: float, loss: str, rate: float, seed: int, name: str) -> dict[str, Any]:
        facts = {"sparsity": sparsity, "loss": loss, "rate": rate, "seed": seed, "steps": claim_squarehead.STEPS}
        return grid.cell(name, facts, lambda: claim_squarehead.recover(sparsity, loss, rate, seed))

    def tuned(sparsity: float, loss: str) -> float:
        def judged(rate: float) -> float:
            name = f"rate-squarehead-{sparsity:g}-{loss}-{rate:g}"
            return run(sparsity, loss, rate, TUNING_SEED, name)["end"]["loss"]

        return best_on(GRID, 1e-3, judged)[0]

    for sparsity in SPARSITIES:
        for seed in grid.seeds:
            yield lambda s=sparsity, seed=seed: run(s, "none", 0.0, seed, f"squarehead-{s:g}-none-{seed}")
            for loss in claim_squarehead.LOSSES:
                yield lambda s=sparsity, seed=seed, loss=loss: run(
                    s, loss, tuned(s, loss), seed, f"squarehead-{s:g}-{loss}-{seed}"
                )


def fusion(grid: Grid) -> Iterator[Callable[[], Any]]:
    def run(kind: str, seed: int) -> dict[str, Any]:
        rates = {task: rates_for(grid, task, KINDS[kind]) for task in TASKS}
        facts = {"kind": kind, "rows": ROWS, "rates": rates, "seed": seed, "setting": asdict(grid.setting)}
        base, tokenizer = grid.model
        return grid.cell(f"fusion-{kind}-{seed}", facts, lambda: fuse(base, tokenizer, kind, rates, seed, grid.setting))

    for seed in grid.seeds:
        for kind in KINDS:
            yield lambda kind=kind, seed=seed: run(kind, seed)


def options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--part", action="append", choices=PARTS, help="only these parts")
    made.add_argument("--task", action="append", choices=list(TASKS), help="only these tasks")
    made.add_argument("--method", action="append", choices=list(METHODS), help="only these methods")
    made.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many seeds (default: {len(SEEDS)})")
    made.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no run begins")
    made.add_argument("--results", type=Path, default=FOLDER, help="where the runs are kept")
    made.add_argument("--page", action="store_true", help="write docs/claims.md from the records, and run nothing")
    return made.parse_args()


def main() -> None:
    given = options()
    if given.page:
        from benchmarks.claim_page import write_page

        print("\n".join(map(str, write_page(given.results))))
        if given.results == FOLDER:  # other pages quote rates and recoveries of these runs
            from benchmarks.pages import write

            print("\n".join(map(str, write())))
        return
    if given.fast and given.results == FOLDER:
        raise SystemExit("--fast needs --results DIR: its numbers are not to lie among the others")
    if given.threads:
        torch.set_num_threads(given.threads)
    setting, seeds = (FAST, (0,)) if given.fast else (Setting(), tuple(range(given.seeds)))
    if given.fast:
        claim_squarehead.STEPS, claim_squarehead.TEACHER_STEPS = 2, 5
    grid = Grid(given.results, setting, seeds, time.monotonic() + given.budget, given.fast)
    tasks, methods = given.task or list(TASKS), given.method or list(METHODS)
    todo: list[Callable[[], Any]] = []
    for part in given.part or PARTS:
        todo += list(
            {"squarehead": squarehead, "fusion": fusion}[part](grid)
            if part != "adapters"
            else adapters(grid, tasks, methods)
        )
    begun = time.perf_counter()
    stopped = grid.go(todo, "claims")
    if not given.fast:
        from benchmarks.claim_page import verdicts

        for verdict in verdicts(given.results):
            print(verdict.line())
    print(stopped or "the grid is complete")
    print(
        json.dumps({"benchmark": "claims", "made": grid.made, "seconds": time.perf_counter() - begun, "note": stopped})
    )


if __name__ == "__main__":
    main()
