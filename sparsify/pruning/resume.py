"""Finished groups of a pruning run on disk, so that an interrupted run goes on where it stopped.

    resume_dir/state.json                   format version and the fingerprint of the run: rules, layers, weights, seed, calibration
    resume_dir/group-<views>.safetensors    values.<i> and bits.<i> of each weight of a group, statistics, fingerprint; hashed

A file that is damaged, of another run or of another group is refused by name, with what to delete. Version 1 had no hashes; its folders
go on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias, TypedDict, TypeGuard

import torch
from torch import Tensor

from sparsify.errors import PlanError
from sparsify.files import kinds, strict_json
from sparsify.files.atomic import shown, sweep, write_bytes
from sparsify.files.strict_json import Json
from sparsify.files.tensors import TensorFile, write_tensors
from sparsify.ops.bits import pack_bits, unpack_bits
from sparsify.pruning.collect import View

STATE_VERSION = 2
READABLE_VERSIONS = (1, 2)
STATE = "state.json"


class ViewStats(TypedDict):
    """What happened to one rectangle of a weight; see `LayerStats`, which adds those of a weight up. energy: of the layer's output."""

    method: str
    error: float
    energy: float
    tokens: int
    seconds: float
    note: str


STATS = {"method": str, "error": float, "energy": float, "tokens": int, "seconds": float, "note": str}
#: rectangle of a weight → values, survivors, statistics
Written: TypeAlias = dict[View, tuple[Tensor, Tensor, ViewStats]]


class ResumeStore:
    """One safetensors file for each finished group. Raises PlanError for a folder of another run, or a damaged one."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint, self.version = folder, fingerprint, STATE_VERSION
        kinds.refuse_beside(folder, kinds.RESUME, STATE, PlanError)
        state = folder / STATE
        if os.path.lexists(state):
            self.version = self.checked_version(state)
            sweep(folder)
        else:
            write_bytes(state, json.dumps({"version": STATE_VERSION, "fingerprint": fingerprint}).encode())

    def checked_version(self, state: Path) -> int:
        try:
            found = strict_json.read(state, PlanError, limit=1 << 16)
        except PlanError as error:
            raise PlanError(f"{error}: it is damaged; delete {shown(self.folder)} to start over") from error
        if not isinstance(found, dict) or not isinstance(found.get("fingerprint"), str):
            raise PlanError(
                f"{shown(state)} is damaged: it has no fingerprint; delete {shown(self.folder)} to start over"
            )
        if found["fingerprint"] != self.fingerprint:
            raise PlanError(
                f"{shown(self.folder)} holds another pruning run (other rules, layers, seed or calibration): choose another "
                f"resume_dir, or delete it (should it be the same run, {STATE} is damaged)"
            )
        version = found.get("version")
        if type(version) is not int or version not in READABLE_VERSIONS:
            raise PlanError(
                f"{shown(state)} has version {str(version)[:40]}; this sparsify reads versions 1 to {STATE_VERSION}: delete "
                f"{shown(self.folder)} to start over"
            )
        return version

    def path(self, views: list[View]) -> Path:
        return self.folder / f"group-{hashlib.sha256(repr(views).encode()).hexdigest()[:24]}.safetensors"

    def save(self, written: Written) -> None:
        tensors: dict[str, Tensor] = {}
        for place, (values, mask, _) in enumerate(written.values()):
            tensors[f"values.{place}"], tensors[f"bits.{place}"] = values.contiguous(), pack_bits(mask)
        views = list(written)
        metadata = {
            "stats": stats_text([stats for _, _, stats in written.values()]),
            "group": repr(views),
            "fingerprint": self.fingerprint,
        }
        write_tensors(self.path(views), tensors, metadata)

    def load(self, views: list[View], dtypes: Mapping[str, torch.dtype]) -> Written | None:
        """What was saved for these views, None when nothing was. dtypes: of their parameters. Raises PlanError for anything else."""
        path = self.path(views)
        if not views or not os.path.lexists(path):
            return None
        try:
            with TensorFile(path, PlanError, keep_open=True) as file:
                return self.checked(file, views, dtypes)
        except PlanError as error:
            raise PlanError(
                f"{error}; delete {path.name} to prune its layers again, or {shown(self.folder)} to start over"
            ) from error

    def checked(self, file: TensorFile, views: list[View], dtypes: Mapping[str, torch.dtype]) -> Written:
        if self.version > 1:
            file.require_hashes()
        if file.hashes is not None and (
            file.metadata.get("group") != repr(views) or file.metadata.get("fingerprint") != self.fingerprint
        ):
            raise file.bad("belongs to other layers or to another run")
        expected = {f"{leaf}.{place}" for place in range(len(views)) for leaf in ("values", "bits")}
        if differing := sorted(expected ^ set(file.parts)):
            raise file.bad(f"damaged: tensor {differing[0]!r} is missing, or too many")
        stats = self.statistics(file, len(views))
        found: Written = {}
        for place, view in enumerate(views):
            values, bits = file.parts[f"values.{place}"], file.parts[f"bits.{place}"]
            size, dtype = (math.prod(view.shape) + 7) // 8, dtypes[view.param]
            if values.dtype != dtype or values.shape != tuple(view.shape):
                raise file.bad(
                    f"damaged: {values.name} is {values.dtype} {values.shape}, the weight {dtype} {tuple(view.shape)}"
                )
            if bits.dtype != torch.uint8 or bits.shape != (size,):
                raise file.bad(f"damaged: {bits.name} is {bits.dtype} {bits.shape}, expected torch.uint8 {(size,)}")
            mask, kept = unpack_bits(file.read(bits.name), view.shape), file.read(values.name)
            finite = file.hashes is not None or bool(torch.isfinite(kept).all())
            if bool((kept[~mask] != 0).any()) or not finite:
                raise file.bad(f"damaged: {values.name} is not zero where it was pruned, or not finite")
            found[view] = (kept, mask, stats[place])
        return found

    def statistics(self, file: TensorFile, count: int) -> list[ViewStats]:
        listed = parsed_stats(file)
        if len(listed) != count:
            raise file.bad("damaged: its statistics are not one for each weight")
        found: list[ViewStats] = []
        for stats in listed:
            if set(stats) != set(STATS):
                raise file.bad("damaged: its statistics are incomplete")
            for name, value in stats.items():
                if STATS[name] is float and value is None:
                    stats[name] = math.nan
                elif STATS[name] is float and type(value) is int:
                    stats[name] = float(value)
                elif type(value) is not STATS[name]:
                    raise file.bad(f"damaged: {name!r} in its statistics is {str(value)[:40]!r}")
            if is_stats(stats):
                found.append(stats)
        return found


def is_stats(stats: Mapping[str, object]) -> TypeGuard[ViewStats]:
    return set(stats) == set(STATS) and all(type(value) is STATS[name] for name, value in stats.items())


def stats_text(listed: Iterable[Mapping[str, object]]) -> str:
    """Statistics as JSON, in which NaN (no calibration token came) is null."""
    nan = lambda value: isinstance(value, float) and not math.isfinite(value)  # noqa: E731
    return json.dumps([{name: None if nan(value) else value for name, value in stats.items()} for stats in listed])


def parsed_stats(file: TensorFile) -> list[dict[str, Json]]:
    """The statistics in a file's metadata. Version 1 wrote NaN as such."""
    text = file.metadata.get("stats", "")
    if file.hashes is None:
        text = text.replace("NaN", "null")
    listed = strict_json.parse(text, f"{shown(file.path)}: damaged: its statistics", file.error)
    if not strict_json.is_objects(listed):
        raise file.bad("damaged: its statistics are no list of objects")
    return listed
