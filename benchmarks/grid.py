"""A grid of runs that can be stopped and goes on: one JSON file a run, which says everything that its numbers depend on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import cpu_model, versions


@dataclass
class Grid:
    """The runs that are there and those that are made. folder: one JSON file a run; setting: how much work a run does; deadline: no run
    begins after it (`time.monotonic`)."""

    folder: Path
    setting: Any
    seeds: Sequence[int] = (0, 1, 2)
    deadline: float = float("inf")
    fast: bool = False
    made: int = 0
    bar: Any = field(default=None, repr=False)

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """(SmolLM2-135M-Instruct, frozen, its tokenizer), opened when the first run needs it."""
        from sparsify.demo.pretrained import smollm2

        base, tokenizer = smollm2()
        return base.requires_grad_(False).eval(), tokenizer

    def cell(self, name: str, facts: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a run: from its file, or made now and written whole. facts: everything that the numbers depend on."""
        path = self.folder / f"{name}.json"
        facts = json.loads(json.dumps(facts))
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["facts"] == facts:
                return found
        if time.monotonic() > self.deadline:
            raise OutOfTime(name)
        if self.bar is not None:
            self.bar.set_description_str(name)
        record = {"name": name, "facts": facts, **make()}
        record |= {"cpu": cpu_model(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        self.made += 1
        if self.bar is not None:
            self.bar.update()
            self.bar.write(f"{name}: {json.dumps(record.get('end'))}")
        return record

    def go(self, runs: Iterable[Callable[[], Any]], name: str) -> str:
        """Make the runs in order, with a bar; says before which it stopped, or nothing."""
        with tqdm(desc=name, unit="run", dynamic_ncols=True) as self.bar:
            for run in runs:
                try:
                    run()
                except OutOfTime as error:
                    return f"stopped before {error}"
        return ""


class OutOfTime(Exception):
    """The next run would begin after the deadline."""
