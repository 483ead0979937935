"""Tiles measured on this GPU: bounded in time, kept per GPU, ahead of the computed table.

    tune_stream(packed, x, seconds=2.0)   time candidate tiles in turn ──▶ <cache>/gpu_tiles.json ──▶ every later launch

Nothing is measured unless it is asked for: a launch only looks up what an earlier `tune_stream` on the same model of GPU
found for the same values, form and number of tokens. The file is written whole and moved into place.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sparsify.kernels.cache import directory, folder, read, unusable, write
from sparsify.kernels.fallback import note
from sparsify.kernels.gpu.formats import Stream
from sparsify.kernels.gpu.spec import Tile

VERSION = 1  # of the kernels: measurements of other versions are not read
CANDIDATES = tuple(Tile(warps=warps, unroll=unroll) for warps in (4, 8, 16) for unroll in (1, 2, 4))
ROUNDS = 7
LARGEST_TABLE = 4 << 20  # bytes
LARGEST = Tile(rows=1024, cols=1024, depth=1024, unroll=16, warps=32, stages=8)  # no file may ask for larger kernels


def tiles_file() -> Path:
    """Where measurements are read. Raises CacheError without a home directory."""
    return directory() / "gpu_tiles.json"


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def stream_key(packed: Stream, tokens: int) -> str:
    return f"{VERSION}/stream/{packed.format}{packed.width}/{packed.value}/{packed.group}/{tokens}"


@lru_cache(maxsize=4)
def read_tiles(path: Path, stamp: float) -> dict[str, dict[str, object]]:
    """GPU name → key → tile and its time; empty when the file is missing, damaged, or not ours alone. `stamp` is its time of change."""
    if unusable(path.parent):
        return {}
    try:
        found = json.loads(read(path, LARGEST_TABLE) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return {name: table for name, table in found.items() if isinstance(table, dict)} if isinstance(found, dict) else {}


def remembered_tile(packed: Stream, tokens: int, device: torch.device) -> Tile | None:
    """What was measured to be fastest here, or None."""
    try:
        path = tiles_file()
        stamp = path.lstat().st_mtime
    except OSError:
        return None
    return tile_of(read_tiles(path, stamp).get(gpu_name(device), {}).get(stream_key(packed, tokens)))


def tile_of(entry: object) -> Tile | None:
    """The tile of one measurement; None for what no measurement can have written."""
    found = entry.get("tile") if isinstance(entry, dict) else None
    if not isinstance(found, dict) or set(found) != {spec.name for spec in fields(Tile)}:
        return None
    if any(type(value) is not int or not 1 <= value <= getattr(LARGEST, name) for name, value in found.items()):
        return None
    try:
        return Tile(**found)
    except ValueError:
        return None


def remember_tile(packed: Stream, tokens: int, device: torch.device, tile: Tile, seconds: float) -> None:
    """Add one measurement to the file; where that cannot be, a warning says so."""
    try:
        path = folder() / "gpu_tiles.json"
        table = dict(read_tiles(path, path.lstat().st_mtime) if path.exists() else {})
        entry = {"tile": asdict(tile), "us": seconds * 1e6, "date": time.strftime("%Y-%m-%d")}
        name = gpu_name(device)
        table[name] = {**table.get(name, {}), stream_key(packed, tokens): entry}
        write(path, json.dumps(table, indent=1).encode())
    except (OSError, RecursionError) as error:
        note(f"sparsify: measured tiles could not be kept: {error}")
    read_tiles.cache_clear()


def device_seconds(call: Callable[[], object]) -> float:
    """Time of one call on the current stream, by events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def tune_stream(
    packed: Stream,
    x: Tensor,
    *,
    seconds: float = 2.0,
    candidates: Sequence[Tile] = CANDIDATES,
    timer: Callable[[Callable[[], object]], float] = device_seconds,
) -> Tile:
    """Time the candidate tiles over `packed` and x (t, cols), keep the fastest for this GPU, and return it.

    Candidates take turns, medians over rounds. After `seconds` (compilation included) no further candidate or round begins;
    at least one is measured. The weight should be larger than the cache, or the cache is what is measured.
    """
    from sparsify.kernels.gpu.launch import power_above, stream_product

    start = time.perf_counter()
    ready: list[Tile] = []
    for tile in candidates:
        if ready and time.perf_counter() - start > seconds:
            break
        stream_product(packed, x, tile=tile)  # compiles
        ready.append(tile)
    samples: dict[Tile, list[float]] = {tile: [] for tile in ready}
    for number in range(ROUNDS):
        if number and time.perf_counter() - start > seconds:
            break
        for tile in ready:
            samples[tile].append(timer(lambda t=tile: stream_product(packed, x, tile=t)))
    medians = {tile: statistics.median(times) for tile, times in samples.items()}
    best = min(medians, key=lambda tile: medians[tile])
    remember_tile(packed, power_above(x.shape[0]), x.device, best, medians[best])
    return best
