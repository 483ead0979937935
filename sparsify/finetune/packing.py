"""Several rows in one: batches with next to no padding, in which each row computes as if it were alone.

    a a a a . . .
    b b . . . . .   ──▶   a a a a b b c      positions 0 1 2 3 0 1 0
    c . . . . . .                            nothing is learned at the first token of each, as of rows by themselves

Positions that begin again tell transformers' masks where a row ends, where there is neither a mask nor a cache (Trainer turns it off).
Whether a model listens to them is tried (`check_packing`), not looked up. Rows go where the least room is left, the longest first (best
fit decreasing), which is the same for the same rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.console import printable
from sparsify.errors import PlanError
from sparsify.finetune.rows import Collator, Rows, Sample
from sparsify.pruning.collect import IGNORED

LEAK = 0.25
"""Of what a row's outputs move by when it sees the row before it: more than that is no rounding."""


@printable
@dataclass(frozen=True)
class PackedRows:
    """The rows of a source, several in one; what `Rows` says of them stays true. packs: the rows of each."""

    rows: Rows
    packs: list[list[Sample]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return one_row(self.packs[index])

    def __str__(self) -> str:
        return f"{self.rows}; packed into {len(self)}"


def pack_rows(rows: Rows, length: int) -> PackedRows:
    """The rows in as few as `best_fit` finds, each of at most `length` tokens."""
    return PackedRows(rows, best_fit(rows.samples, length))


def best_fit(samples: Iterable[Sample], length: int) -> list[list[Sample]]:
    """Packs of at most `length` tokens; none of the samples is longer."""
    packs: list[list[Sample]] = []
    waiting: dict[int, list[int]] = {}  # room that is left → packs that have it
    rooms = 0  # bit r: some pack has room r
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        size = len(sample.ids)
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            place = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
            packs[place].append(sample)
        else:
            room, place = length, len(packs)
            packs.append([sample])
        if room > size:
            waiting.setdefault(room - size, []).append(place)
            rooms |= 1 << (room - size)
    return packs


def one_row(pack: Iterable[Sample]) -> dict[str, list[int]]:
    """The samples one after another."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for sample in pack:
        ids += sample.ids
        labels += [IGNORED, *sample.labels[1:]]  # or the row before would learn how this one begins
        positions += range(len(sample.ids))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


@torch.no_grad()
def check_packing(model: nn.Module, samples: Iterable[Sample], collate: Collator) -> None:
    """Raises PlanError for a model in which packed rows see one another, from the outputs of two rows: together, alone, and joined to one.

    Two equal packs make the batch, as some kernels of attention read positions of a single one only.
    """
    named = inspect.signature(model.forward).parameters
    if "position_ids" not in named and not any(p.kind is p.VAR_KEYWORD for p in named.values()):
        raise PlanError(
            f"training.packing: {type(model).__name__} takes no position_ids, by which rows in one are told apart"
        )
    first, second = two_rows(samples)
    pack = one_row([first, second])
    start = len(first.ids)
    joined = {**pack, "position_ids": list(range(len(pack["input_ids"])))}
    alone = second_logits(model, collate([one_row([second])] * 2), 0)
    apart = float((second_logits(model, collate([pack, pack]), start) - alone).abs().max())
    seen = float((second_logits(model, collate([joined, joined]), start) - alone).abs().max())
    rounding = 16 * torch.finfo(next(p.dtype for p in model.parameters() if p.is_floating_point())).eps
    if apart > max(LEAK * seen, rounding * float(alone.abs().max())):
        raise PlanError(
            f"training.packing: in {type(model).__name__} a packed row sees the row before it (its outputs move by {apart:.2g}, and by "
            f"{seen:.2g} where the two are one): leave packing out"
        )


def two_rows(samples: Iterable[Sample]) -> tuple[Sample, Sample]:
    """The first two rows, or the first one twice; at most 32 tokens of each."""
    found: list[Sample] = []
    for sample in samples:
        found.append(Sample(sample.ids[:32], sample.labels[:32]))
        if len(found) == 2:
            break
    return found[0], found[-1]


def second_logits(model: nn.Module, batch: dict[str, Tensor], start: int) -> Tensor:
    """Outputs of a batch's last row from a position on, as a model that rests gives them."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        outputs: Any = model(**inputs, use_cache=False)
    finally:
        model.train(training)
    logits: Tensor = outputs.logits
    return logits[-1, start:].float()


__all__ = ["PackedRows", "best_fit", "check_packing", "one_row", "pack_rows"]
