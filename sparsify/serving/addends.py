"""An adapter as what it adds: its changes, packed once into two flat tensors that a slot takes over by one copy each.

    Adapter (column, row, sparse, lora, a bias in full)  ──▶  Image (values, places, where each lies)

What is no addend (a parameter that trained in full, a buffer, rows of an embedding, experts) refuses the adapter, never a part of it:
half of an adapter is another model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparsify.adapters import adapter as files
from sparsify.adapters import peft_format
from sparsify.adapters.adapter import Adapter, Delta
from sparsify.adapters.fuse import fuse
from sparsify.errors import AdapterError, PlanError
from sparsify.files.kinds import refuse_two_adapters
from sparsify.ops.adapter_tables import KINDS
from sparsify.plan import Plan, Quantize
from sparsify.serving.targets import Base, Target

LINE = 16  # values and places of one addend begin at a multiple of so many


@dataclass(frozen=True, eq=False)
class Image:
    """What one adapter adds. entries: (number of the weight, kind) → (first value, how many, first place), counted from 0."""

    values: Tensor
    places: Tensor
    entries: dict[tuple[int, str], tuple[int, int, int]]
    trained: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.places.nbytes

    @functools.cached_property
    def bits(self) -> int:
        """Which kinds of addends each weight gets: bit `len(KINDS) · number + k` for KINDS[k]."""
        return sum(1 << (len(KINDS) * number + KINDS.index(kind)) for number, kind in self.entries)


@dataclass(frozen=True)
class Mix:
    """A weighted sum of adapters, as one. members: weight and folder."""

    members: tuple[tuple[float, Path], ...]


def read_adapter(base: Base, folder: Path, strict: bool) -> Adapter:
    """Read an adapter folder, ours or PEFT's, and check it against the base. strict: refuse one that was trained on another base."""
    refuse_two_adapters(folder)
    if peft_format.is_peft(folder):
        loaded, strict = peft_format.read(folder, base.reading, base.shapes, base.value), False
    else:
        loaded = files.load(folder)
        loaded = loaded.called({name: first for name, first in base.canonical.items() if name != first})
    check_adapter(base, loaded, str(folder), strict)
    return loaded


def check_adapter(base: Base, loaded: Adapter, where: str, strict: bool) -> None:
    """Raise AdapterError for what is no addend, does not fit, or (strict) was trained on another base."""
    weights = [delta for _, delta in as_addends(base, loaded, where) if delta.kind != "full"]
    if strict:
        check_quantised(base, loaded, where)
    files.check_fits(replace(loaded, deltas=tuple(weights)), base.shapes, Hashes(base), where, strict)


def read_image(base: Base, source: Path | Mix, dtype: torch.dtype, strict: bool) -> Image:
    """Read, check and pack an adapter. Raises AdapterError for whatever cannot be served, saying why."""
    if isinstance(source, Path):
        return make_image(base, read_adapter(base, source, strict), str(source), dtype)
    weighted = [(weight, read_adapter(base, folder, strict)) for weight, folder in source.members]
    return make_image(base, fuse(weighted), " + ".join(f"{w:g}·{folder}" for w, folder in source.members), dtype)


def make_image(base: Base, loaded: Adapter, where: str, dtype: torch.dtype) -> Image:
    """Pack an adapter that was checked."""
    values: list[Tensor] = []
    places: list[Tensor] = []
    entries: dict[tuple[int, str], tuple[int, int, int]] = {}
    first_value = first_place = trained = 0
    for target, delta in as_addends(base, loaded, where):
        kind, count, flat, index = packed(base, target, delta)
        trained += delta.values.numel() + (0 if delta.a is None else delta.a.numel())
        flat = padded(flat.to(dtype))
        if not bool(torch.isfinite(flat).all()):
            raise AdapterError(f"{where}: {delta.param}: a value is too large for {str(dtype).removeprefix('torch.')}")
        index = padded(index.to(torch.int32))
        entries[target.number, kind] = (first_value, count, first_place)
        values.append(flat)
        places.append(index)
        first_value, first_place = first_value + flat.numel(), first_place + index.numel()
    empty = torch.empty(0)
    return Image(
        torch.cat(values) if values else empty.to(dtype),
        torch.cat(places) if places else empty.to(torch.int32),
        entries,
        trained,
    )


class Hashes(dict[str, str]):
    """Hashes of base weights, taken when they are asked for."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def get(self, param: str, default: object = None) -> str:  # type: ignore[override]
        return self.base.hash(param)


def as_addends(base: Base, loaded: Adapter, where: str) -> Iterator[tuple[Target, Delta]]:
    """The changes with the weights that they change. Raises AdapterError at the first that is no addend."""
    seen: set[tuple[str, str]] = set()
    for delta in loaded.deltas:
        if (delta.param, delta.kind) in seen:
            raise AdapterError(
                f"{where}: {delta.param} is changed twice ({delta.kind}): the file has it under two of its names in this model"
            )
        seen.add((delta.param, delta.kind))
        target = base.targets.get(delta.param)
        if delta.kind == "full" and delta.param in base.by_bias:
            own = base.shapes[delta.param]
            if delta.values.shape != own:
                raise AdapterError(
                    f"{where}: {delta.param} is {tuple(own)} here, {tuple(delta.values.shape)} in the file"
                )
            yield base.by_bias[delta.param], delta
        elif delta.kind == "full" and unchanged(base, delta):
            continue
        elif delta.kind == "full":
            raise AdapterError(f"{where}: {delta.param} trained in full, which is no addend per token; {ALONE}")
        elif delta.kind == "buffer":
            raise AdapterError(
                f"{where}: {delta.param} is a buffer that moved while training, which is one for all rows; {ALONE}"
            )
        elif delta.param not in base.shapes:
            raise AdapterError(f"{where}: the model has no parameter {delta.param!r}")
        elif target is None or delta.param in base.declined:
            raise AdapterError(f"{where}: {delta.param} takes no addend: {base.why_not(delta.param)}; {ALONE}")
        elif delta.kind not in ("column", "row", "sparse", "lora"):
            raise AdapterError(f"{where}: {delta.param} has a change of kind {delta.kind}, which is no addend; {ALONE}")
        elif delta.transposed != target.transposed and delta.kind != "lora":
            raise AdapterError(f"{where}: {delta.param} is stored in another orientation in this model")
        else:
            yield target, delta


ALONE = "serve it alone with sparsify.load, or merged"


def unchanged(base: Base, delta: Delta) -> bool:
    """Whether a parameter that trained in full is the base's, bit for bit."""
    if delta.param not in base.shapes or delta.param in base.quantize:
        return False
    own = base.value(delta.param)
    return own.shape == delta.values.shape and torch.equal(own.cpu(), delta.values.to(own.dtype))


def check_quantised(base: Base, loaded: Adapter, where: str) -> None:
    """Raise AdapterError where the file says that the base was packed otherwise while the adapter trained."""
    moved = loaded.info.get(files.MOVED)
    other = (
        next((p for p in moved if isinstance(p, str) and p in base.quantize), None) if isinstance(moved, list) else None
    )
    if other is not None:
        raise AdapterError(
            f"{where}: {other} was reordered before it was packed ({base.quantize[other]}) when the adapter trained, so that its units lie "
            "together, and here it is packed as it stands, with slightly other values: train with permute=False, or pass strict=False "
            "to add it all the same"
        )
    text = loaded.info.get("plan")
    if not isinstance(text, str):
        return
    try:
        rules = [rule for rule in Plan.from_json(text).rules if isinstance(rule, Quantize)]
    except (PlanError, ValueError):
        return  # of a newer version; the hashes still tell another base
    touched = {d.param for d in loaded.deltas if d.kind not in ("full", "buffer")}
    own = {base.quantize.get(param) for param in touched}
    if rules and own == {None}:
        raise AdapterError(
            f"{where}: the adapter was trained over a packed base ({', '.join(map(str, rules))}), and this one is dense: compile the "
            "model with that rule, and serve what comes out; or pass strict=False"
        )
    if not rules and own - {None} and loaded.bases and not loaded.info.get("packed"):
        formats = ", ".join(sorted(str(f) for f in own if f))
        if all(base.hashes.get(p) != loaded.bases.get(p) for p in touched if base.quantize.get(p)):
            return  # check_fits says it
        raise AdapterError(
            f"{where}: the adapter was trained over the dense base, and this one is packed ({formats}); pass strict=False to add it "
            "all the same"
        )


def packed(base: Base, target: Target, delta: Delta) -> tuple[str, int, Tensor, Tensor]:
    """`(kind, how many, values, places)` of one change, in logical coordinates."""
    none = torch.empty(0, dtype=torch.int32)
    if delta.kind == "full":
        own = base.value(delta.param).cpu()
        inner = torch.promote_types(torch.promote_types(own.dtype, delta.values.dtype), torch.float32)
        return "bias", 1, delta.values.to(inner) - own.to(inner), none
    if delta.values.dim() > 2:
        raise AdapterError(f"{delta.param}: a change of packed experts is no addend per token; {ALONE}")
    if delta.kind == "column":
        return "columns", delta.channels.numel(), delta.values.t().reshape(-1), delta.channels
    if delta.kind == "row":
        return "rows", delta.channels.numel(), delta.values.reshape(-1), delta.channels
    if delta.kind == "lora":
        assert delta.a is not None
        inner = torch.promote_types(delta.values.dtype, torch.float32)
        second = delta.values.to(inner).t() * delta.scale
        return "lowrank", delta.rank, torch.cat([delta.a.to(inner).reshape(-1), second.reshape(-1)]), none
    second = target.stored_shape[1]
    rows, columns = delta.channels // second, delta.channels % second
    if target.transposed:
        rows, columns = columns, rows
    order = (rows * target.shape[1] + columns).argsort()
    return "sparse", delta.channels.numel(), delta.values[order], torch.cat([rows[order], columns[order]])


def padded(flat: Tensor) -> Tensor:
    spare = -flat.numel() % LINE
    return torch.cat([flat, flat.new_zeros(spare)]) if spare else flat.contiguous()


__all__ = ["KINDS", "Image", "Mix", "make_image", "read_adapter", "read_image"]
