"""Rows that are read while a model trains: nothing but a window of them is in memory.

    file ─▶ rows, one after another ─▶ WINDOW of them ─▶ shuffled, or packed and shuffled ─▶ batches; then from the beginning again

The order is the seed's, and the pass's: whoever resumes passes over what was learned and goes on with the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from sparsify.console import printable
from sparsify.errors import PlanError
from sparsify.finetune.packing import best_fit, one_row
from sparsify.finetune.rows import Sample, cut_to, format_of, records, sample_of

WINDOW = 1000
LOOKED_AT = 100
"""Rows that are read before a run begins, so that what cannot be used is said at once."""


@printable
@dataclass(eq=False)
class Stream(IterableDataset[dict[str, list[int]]]):
    """An endless source of rows, each cut to `length` tokens; with `packing`, several in one. taken, learned: rows, and their learned
    tokens, that were handed out since the last iteration began (a loader may be a batch ahead of what was learned)."""

    path: str
    tokenizer: Any = field(repr=False)
    length: int
    format: str = "auto"
    split: str | None = None
    packing: bool = False
    seed: int = 0
    window: int = WINDOW
    taken: int = 0
    learned: int = 0

    def samples(self) -> Iterator[Sample]:
        """One pass, in the order of the files. Raises PlanError for a row that cannot be used, when it is reached."""
        format = self.format
        for where, record in records(Path(self.path), self.split):
            if format == "auto":
                format = format_of(where, record)
            sample = cut_to(sample_of(where, record, format, self.tokenizer), self.length)
            if sample.learned:
                yield sample

    def first(self, count: int = LOOKED_AT) -> list[Sample]:
        """The first rows. Raises PlanError where there is none."""
        found = list(itertools.islice(self.samples(), count))
        if not found:
            raise PlanError(f"{self.path}: no row that can be learned")
        return found

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        self.taken = self.learned = 0
        for number in itertools.count():
            random = torch.Generator().manual_seed((self.seed << 20) + number)
            samples, empty = self.samples(), True
            while window := list(itertools.islice(samples, self.window)):
                empty = False
                packs = best_fit(window, self.length) if self.packing else [[sample] for sample in window]
                for place in torch.randperm(len(packs), generator=random).tolist():
                    pack = packs[place]
                    self.taken += len(pack)
                    self.learned += sum(sample.learned for sample in pack)
                    yield one_row(pack) if self.packing else {"input_ids": pack[0].ids, "labels": pack[0].labels}
            if empty:
                raise PlanError(f"{self.path}: no row that can be learned")

    def __str__(self) -> str:
        return f"rows of {self.path}, read while training{', packed' if self.packing else ''}"


__all__ = ["Stream"]
