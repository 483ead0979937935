"""Pruning SmolLM2-135M-Instruct for real: perplexity of held-out text before, after and recovered; `docs/pruning.md` is made from the records.

    one-shot    SparseGPT at 50 and 75 % zeros, uniform and allocated by sensitivity; 2:4 and 8:32 beside unstructured
    recovered   50 and 75 % by SquareHead + cross-entropy against the dense model, on its own text and on the standard library's; at 75 %
                also cross-entropy alone, and SquareHead normalised by token
    int8        every one of them again with int8 weights on the CPU kernels (speed is `cpu_decode.py`'s and the demo's business)

Two texts are held out: the `help()` topics of Python, and text that the dense model wrote from another seed. Recovery on a text of one kind
is thereby judged on both kinds. One rate, one seed. Every run is one JSON file under benchmarks/results/prune_real/; what is there is not run
again, so it can be stopped and goes on (a pruned model is made anew where its recoveries are still to come).

    python benchmarks/prune_real.py                      everything: about 7,000 processor seconds
    python benchmarks/prune_real.py --budget 3600        stop before the run that would begin after that many seconds
    python benchmarks/prune_real.py --only 50 --only 2:4 these prunings and their recoveries
    python benchmarks/prune_real.py --page               write docs/pruning.md from what is there
    python benchmarks/prune_real.py --fast --results DIR two blocks of the model and a step or two; the numbers mean nothing
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
from benchmarks.claim_squarehead import descend
from benchmarks.grid import Grid
from benchmarks.harness import RESULTS, parser, table
from sparsify import CpuOptions, Plan, Prune, Quantize
from sparsify.demo.language_tasks import calibration_text, general_text
from sparsify.demo.language_training import text_blocks, text_loss
from sparsify.train.squarehead import Distiller

FOLDER = RESULTS / "prune_real"
TURN = "<|im_start|>user\n"  # what the model writes its own text after: a question, and its answer


@dataclass(frozen=True)
class Setting:
    """What every number depends on. calibration, library, own, held_out: blocks of `length` tokens; batch: blocks of a step."""

    calibration: int = 48
    library: int = 128
    own: int = 128
    held_out: int = 16
    length: int = 128
    steps: int = 48
    batch: int = 4
    rate: float = 1e-4
    blocks: int = 30


FAST = Setting(2, 4, 4, 1, 32, 2, 2, blocks=2)


@dataclass(frozen=True)
class Kind:
    """One way to prune, and how it is recovered. recoveries: (loss, text)."""

    sparsity: float | None
    pattern: str = "unstructured"
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    recoveries: tuple[tuple[str, str], ...] = ()

    def rule(self) -> Prune:
        return Prune(sparsity=self.sparsity, pattern=self.pattern, allocation=self.allocation)


BOTH = (("sq", "library"), ("sq", "own"))
KINDS = {
    "50": Kind(0.5, recoveries=BOTH),
    "75": Kind(0.75, recoveries=(*BOTH, ("ce", "library"), ("ce", "own"), ("sq-token", "library"))),
    "50-sensitivity": Kind(0.5, allocation="sensitivity"),
    "75-sensitivity": Kind(0.75, allocation="sensitivity", recoveries=(("sq", "library"),)),
    "2:4": Kind(None, "2:4", recoveries=(("sq", "library"),)),
    "8:32": Kind(None, "8:32", recoveries=(("sq", "library"),)),
}
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"ce": 1.0, "sq": 0.0},
    "sq": {"ce": 1.0, "sq": 1.0},
    "sq-token": {"ce": 1.0, "sq": 1.0, "normalise": "token"},
}


class Bench:
    """The dense model and the texts, each made when it is first needed."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.setting: Setting = grid.setting
        self.last: tuple[str, Any] | None = None

    @cached_property
    def dense(self) -> Any:
        model = self.grid.model[0]
        if self.setting.blocks < len(model.model.layers):
            model.model.layers = model.model.layers[: self.setting.blocks]
            model.config.num_hidden_layers = self.setting.blocks
        return model

    @property
    def tokenizer(self) -> Any:
        return self.grid.model[1]

    @cached_property
    def library(self) -> tuple[Tensor, Tensor]:
        """Docstrings of the standard library: (blocks to calibrate on, other blocks to recover on)."""
        s = self.setting
        blocks = text_blocks(
            self.tokenizer, calibration_text(8 * s.length * (s.calibration + s.library)), s.calibration + s.library, s.length
        )  # fmt: skip
        every = torch.arange(len(blocks)) * s.calibration // len(blocks)
        first = torch.cat([torch.tensor([True]), every[1:] != every[:-1]])  # spread evenly over both
        return blocks[first], blocks[~first]

    def own(self, seed: int, count: int) -> Tensor:
        """`count` blocks that the dense model writes after `TURN`, sampled at temperature 1 from its 50 likeliest tokens; kept as a run."""
        s = self.setting
        facts = {"seed": seed, "count": count, "length": s.length, "after": TURN, "blocks": s.blocks}

        def make() -> dict[str, Any]:
            begun = time.process_time()
            torch.manual_seed(seed)
            start = self.tokenizer(TURN, return_tensors="pt")["input_ids"]
            pieces = []
            with torch.inference_mode():
                for low in range(0, count, 32):
                    rows = start.repeat(min(32, count - low), 1)
                    ids = self.dense.generate(
                        rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=50, temperature=1.0,
                        min_new_tokens=s.length - rows.shape[1], max_new_tokens=s.length - rows.shape[1],
                        pad_token_id=self.tokenizer.pad_token_id,
                    )  # fmt: skip
                    pieces += ids.tolist()
            return {"ids": pieces, "cpu_seconds": round(time.process_time() - begun, 1)}

        return torch.tensor(self.grid.cell(f"text-{seed}", facts, make)["ids"])

    def judge(self, model: Any) -> dict[str, float]:
        """Loss per token, in nats, of both held-out texts."""
        s = self.setting
        topics = text_blocks(self.tokenizer, general_text(), s.held_out, s.length)
        return {"topics": text_loss(model, topics), "own": text_loss(model, self.own(2, s.held_out))}

    def judged(self, model: Any) -> dict[str, Any]:
        """The same, and again with the weights in int8 on the CPU's kernels, with the bytes of both."""
        end = self.judge(model)
        plain = model.sparsify.plain().eval() if "sparsify" in model.__dict__ else model
        plain.tie_weights()
        options = CpuOptions(tokens=(32,), mode="small", tied="copy")
        packed: Any = sparsify.compile(
            plain, Plan([Quantize(format="int8")], target="cpu"), cpu=options, progress=False
        )
        size = sum({t.data_ptr(): t.nbytes for t in (*plain.parameters(), *plain.buffers())}.values())
        return {
            "end": end,
            "int8": self.judge(packed),
            "bytes": {"dense": size, "int8": packed.sparsify.cpu.bytes_after},
        }

    def pruned(self, name: str) -> Any:
        """The host of one kind; kept until another kind is asked for, for its recoveries."""
        if self.last is None or self.last[0] != name:
            self.last = None
            calibration = [
                {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in self.library[0].split(16)
            ]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = sparsify.compile(self.dense, Plan([KINDS[name].rule()]), calibration=calibration, progress=False)
            self.last = (name, made)
        return self.last[1]


def facts_of(setting: Setting, **more: Any) -> dict[str, Any]:
    return {**more, "setting": asdict(setting), "python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def dense_run(bench: Bench) -> dict[str, Any]:
    return bench.grid.cell("dense", facts_of(bench.setting), lambda: bench.judged(bench.dense))


def one_shot(bench: Bench, name: str) -> dict[str, Any]:
    kind = KINDS[name]

    def make() -> dict[str, Any]:
        begun = time.process_time()
        host = bench.pruned(name)
        layers = host.sparsify.program.pruned
        total = sum(layer.numel for layer in layers)
        return {
            **bench.judged(host),
            "zeros": sum(layer.sparsity * layer.numel for layer in layers) / total,
            "range": [min(layer.sparsity for layer in layers), max(layer.sparsity for layer in layers)],
            "error": sum(layer.error for layer in layers) / len(layers),
            "tokens": min(layer.tokens for layer in layers),
            "cpu_seconds": round(time.process_time() - begun, 1),
        }

    facts = facts_of(bench.setting, sparsity=kind.sparsity, pattern=kind.pattern, allocation=kind.allocation)
    return bench.grid.cell(f"{file_name(name)}-oneshot", facts, make)


def recovered(bench: Bench, name: str, loss: str, text: str) -> dict[str, Any]:
    """Train what survived of one kind against the dense model, on one text with one loss."""
    s, kind = bench.setting, KINDS[name]

    def make() -> dict[str, Any]:
        begun = time.process_time()
        student = copy.deepcopy(bench.pruned(name)).requires_grad_(True)
        blocks = bench.library[1] if text == "library" else bench.own(1, s.own)
        draw = torch.Generator().manual_seed(0)
        order = torch.cat(
            [torch.randperm(len(blocks), generator=draw) for _ in range(1 + s.steps * s.batch // len(blocks))]
        )
        distiller = Distiller(student, bench.dense, **LOSSES[loss])
        losses: list[float] = []

        def step(number: int) -> Tensor:
            ids = blocks[order[number * s.batch : (number + 1) * s.batch]]
            result = distiller({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
            losses.append(round(float(result.loss), 4))
            return result.loss

        descend(student, s.rate, s.steps, step, max(1, s.steps // 10))
        distiller.student_outputs.remove()
        distiller.teacher_outputs.remove()
        return {**bench.judged(student.eval()), "losses": losses, "cpu_seconds": round(time.process_time() - begun, 1)}

    facts = facts_of(
        bench.setting, sparsity=kind.sparsity, pattern=kind.pattern, allocation=kind.allocation, loss=loss, text=text
    )
    return bench.grid.cell(f"{file_name(name)}-{loss}-{text}", facts, make)


def file_name(kind: str) -> str:
    return kind.replace(":", "of")


def runs(bench: Bench, kinds: list[str]) -> Iterator[Callable[[], Any]]:
    yield lambda: dense_run(bench)
    for name in kinds:
        yield lambda name=name: one_shot(bench, name)
        for loss, text in KINDS[name].recoveries:
            yield lambda name=name, loss=loss, text=text: recovered(bench, name, loss, text)


def options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--only", action="append", choices=list(KINDS), help="only these ways to prune")
    made.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no run begins")
    made.add_argument("--results", type=Path, default=FOLDER, help="where the runs are kept")
    made.add_argument("--page", action="store_true", help="write docs/pruning.md from the records, and run nothing")
    return made.parse_args()


def main() -> None:
    from benchmarks.prune_page import rows, write_page

    given = options()
    if given.page:
        print(write_page(given.results))
        return
    if given.fast and given.results == FOLDER:
        raise SystemExit("--fast needs --results DIR: its numbers are not to lie among the others")
    if given.threads:
        torch.set_num_threads(given.threads)
    grid = Grid(given.results, FAST if given.fast else Setting(), (0,), time.monotonic() + given.budget, given.fast)
    begun = time.perf_counter()
    stopped = grid.go(runs(Bench(grid), given.only or list(KINDS)), "pruning")
    print(table(rows(given.results)))
    print(stopped or "everything is there")
    print(
        json.dumps(
            {"benchmark": "prune_real", "made": grid.made, "seconds": time.perf_counter() - begun, "note": stopped}
        )
    )


if __name__ == "__main__":
    main()
