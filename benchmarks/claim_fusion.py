"""One run of `claims.py` on fusion: an adapter for each of two tasks, then both in one model (S2FT, arXiv 2412.06289, fuses so).

    s2ft-disjoint   the second adapter avoids the first one's units
    s2ft-same       both train the same units
    lora            two LoRAs of the same size

Lost in fusion: loss of the fused model on each task minus that of the task's own adapter, for the sum and the mean of both.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
from benchmarks.claim_adapters import CHANNELS, HEADS, METHODS, Method, Rates, Setting, train
from benchmarks.claim_tasks import TASKS
from sparsify import S2FT
from sparsify.demo.language_training import score

KINDS = {"s2ft-disjoint": "s2ft", "s2ft-same": "s2ft", "lora": "lora"}
"""Kind → the family whose rates it takes."""


def avoiding(folder: Path) -> Method:
    """S2FT on units that the adapter in `folder` does not train."""
    rules = (
        S2FT(structure="ffn", units=CHANNELS, avoid=(str(folder),)),
        S2FT(structure="attention", units=HEADS, avoid=(str(folder),)),
    )
    return dataclasses.replace(METHODS["s2ft"], rules=lambda: rules)


def fuse(
    base: nn.Module, tokenizer: Any, kind: str, rates: Mapping[str, Rates], seed: int, setting: Setting
) -> dict[str, Any]:
    """The record of one run: losses on both tasks, of each adapter alone and of both together."""
    begun = time.process_time()
    place = Path(tempfile.mkdtemp(prefix="sparsify-fusion-"))
    judged = {name: task.distinct(77, setting.judged, held_out=True) for name, task in TASKS.items()}
    try:
        for task in TASKS:
            method = METHODS[KINDS[kind]]
            first = place / next(iter(TASKS))
            if kind == "s2ft-disjoint" and first.exists():
                method = avoiding(first)
            model, _ = train(base, tokenizer, task, method, rates[task], seed, setting, tuning=True)
            model.sparsify.save_adapter(place / task)
            del model
        names = list(TASKS)
        host = sparsify.load(base, place / names[0], name=names[0])
        host.sparsify.load_adapter(place / names[1], names[1])
        found: dict[str, dict[str, float]] = {}
        mixes: dict[str, Any] = {name: name for name in names}
        mixes |= {"sum": dict.fromkeys(names, 1.0), "mean": dict.fromkeys(names, 0.5)}
        shared = 0
        for label, spec in mixes.items():
            mix = host.sparsify.set_adapter(spec)
            shared = max(shared, sum(c.shared for c in mix.conflicts))
            found[label] = {name: score(host, tokenizer, rows).loss for name, rows in judged.items()}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    lost = {
        label: sum(found[label][name] - found[name][name] for name in names) / len(names) for label in ("sum", "mean")
    }
    return {"losses": found, "end": lost, "shared": shared, "cpu_seconds": round(time.process_time() - begun, 1)}
