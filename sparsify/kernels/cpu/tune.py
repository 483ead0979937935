"""What was measured on this machine: timings taken in turn, kept in a file, and checked again before they are trusted.

A timing is the smallest of several rounds in which all contestants take turns, so that a noisy moment hits all of them
alike. It is steady when each contestant came near its smallest time twice and the thread was hardly ever without a
processor; an unsteady one is kept, but measured again by the next process. A steady one that was made under load shows when
a contestant is faster today: then all are measured again.

The weights of a model that is larger than the caches come from memory in every call, however small one of its layers is. Its
layers are therefore timed cold: before each call the caches are filled with something else.
"""

from __future__ import annotations

import json
import math
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

import torch

from sparsify.kernels.cache import folder, read, write

TUNE_VERSION = 4
LARGEST_TABLE = 16 << 20  # bytes
DEFAULT_CACHE = 32 << 20  # bytes of a last-level cache that does not say its size
LARGEST_CACHE = 512 << 20
LONGEST = 1e5  # seconds of anything that was measured
AGREEMENT = 1.1  # two rounds within this ratio make a smallest time steady
PRESENCE = 0.8  # share of the time that the measuring thread must have had a processor
SHORTEST = 1e-9  # seconds that a measured call is taken to last at least: clocks may stand still
COARSE = 1e-5  # a thread's clock with longer steps says nothing about one call
IMPROVEMENT = 0.8  # a contestant that takes less than this share of its recorded time was recorded under load
tune_lock = threading.Lock()
tuned: dict[str, object] | None = None
checked: set[str] = set()


@dataclass(frozen=True)
class Timing:
    """Smallest seconds of each contestant, and whether every one of them was reached twice."""

    seconds: dict[str, float]
    steady: bool


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Model name of this CPU, as a key for measurements."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def tune_path() -> Path:
    return folder() / "tune.json"


def table_in(path: Path) -> dict[str, object]:
    """The JSON object in a file of ours; empty where it is missing, damaged, or not ours alone."""
    try:
        found = json.loads(read(path, LARGEST_TABLE) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def tuning() -> dict[str, object]:
    """Everything measured on this machine so far; read from disk once per process."""
    global tuned
    with tune_lock:
        if tuned is None:
            try:
                tuned = table_in(tune_path())
            except OSError:  # no folder at all
                tuned = {}
        return tuned


def remember(key: str, value: object) -> None:
    """Keep a measurement; written atomically, merged with what other processes wrote meanwhile. Best effort."""
    table = tuning()
    with tune_lock:
        table[key] = value
        try:
            path = tune_path()
            merged = {**table_in(path), **table}
            write(path, json.dumps(merged).encode())
        except (OSError, RecursionError):
            pass  # a read-only home: measure again in the next process


def recorded(key: str) -> Timing | None:
    """The timing kept under `key`; None when there is none, or when it is damaged."""
    stored = tuning().get(key)
    if not isinstance(stored, dict) or not isinstance(stored.get("seconds"), dict):
        return None
    seconds = stored["seconds"]
    if not seconds or not all(credible(s, LONGEST) for s in seconds.values()):
        return None
    return Timing(dict(seconds), stored.get("steady") is True)


def credible(value: object, largest: float) -> TypeGuard[float]:
    """Whether a stored value is a positive number that a measurement can have given."""
    return isinstance(value, float) and math.isfinite(value) and 0 < value <= largest


def cold_key(key: str) -> str:
    """The name of the same measurement with cold weights."""
    return f"{key}/cold"


def measured(key: str, calls: Mapping[str, Callable[[], object]], budget: float = 0.25, cold: bool = False) -> Timing:
    """The timing of `calls`: the recorded one if it can be trusted, else a new one, which is recorded.

    cold: nothing that a call reads lies in a cache when it begins.
    """
    key, before = (cold_key(key), empty_caches) if cold else (key, None)
    found = recorded(key)
    if found is not None and set(calls) <= set(found.seconds):
        if key in checked:
            return found
        if found.steady and not improved(found, calls, before):
            checked.add(key)
            return found
    timing = time_in_turn(calls, budget, before)
    if found is not None and not timing.steady:  # two noisy records: the smaller times are nearer to the truth
        both = {name: min(s, found.seconds.get(name, s)) for name, s in timing.seconds.items()}
        timing = Timing(both, False)
    remember(key, {"seconds": timing.seconds, "steady": timing.steady})
    checked.add(key)
    return timing


def improved(
    found: Timing, calls: Mapping[str, Callable[[], object]], before: Callable[[], None] | None = None
) -> bool:
    """Whether any contestant is now so much faster than recorded that the record was made under load."""
    for name, call in calls.items():
        call()
        if min(seconds_after(before, call) for _ in range(3)) < IMPROVEMENT * found.seconds[name]:
            return True
    return False


def seconds_after(before: Callable[[], None] | None, call: Callable[[], object]) -> float:
    """Seconds of a call, not of what is done before it."""
    if before is not None:
        before()
    return seconds_of(call)


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], budget: float = 0.25, before: Callable[[], None] | None = None
) -> Timing:
    """Smallest seconds of each call; the calls take turns for about `budget` seconds, up to four times that if unsteady.

    before: done before every call, and not counted (`empty_caches`).
    """
    samples = {name: [seconds_of(call)] for name, call in calls.items()}  # the first call also warms what it touches
    for call_samples, call in zip(samples.values(), calls.values(), strict=True):
        call_samples[0] = min(call_samples[0], seconds_of(call)) if before is None else seconds_after(before, call)
    start, own, rounds = time.perf_counter(), time.thread_time(), 0
    while True:
        for name, call in calls.items():
            samples[name].append(seconds_after(before, call))
        rounds += 1
        spent = time.perf_counter() - start
        steady = all(sorted(s)[1] <= AGREEMENT * min(s) for s in samples.values())
        if (
            spent > 0.01 and thread_clock_step() <= COARSE
        ):  # others took the processor away: agreeing times may all be wrong
            steady &= time.thread_time() - own > PRESENCE * spent
        if rounds >= 3 and (rounds >= 60 or spent > (1 if steady else 4) * budget):
            return Timing({name: min(s) for name, s in samples.items()}, steady)


def seconds_of(call: Callable[[], object]) -> float:
    """Wall seconds of a call, without those in which the calling thread had to wait for a processor; never 0."""
    start, own = time.perf_counter(), time.thread_time()
    call()
    wall, own = time.perf_counter() - start, time.thread_time() - own
    return max(SHORTEST, min(wall, own) if own > 0 and thread_clock_step() <= COARSE else wall)


@lru_cache(maxsize=1)
def thread_clock_step() -> float:
    """Seconds between two readings of the thread's own clock: some kernels and sandboxes advance it once a tick."""
    steps: list[float] = []
    until = time.perf_counter() + 0.05
    last = time.thread_time()
    while len(steps) < 16 and time.perf_counter() < until:
        now = time.thread_time()
        if now > last:
            steps.append(now - last)
            last = now
    return min(steps, default=math.inf)


@lru_cache(maxsize=1)
def last_level_cache() -> int:
    """Bytes of the largest cache that a core of this machine reads through; 32 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii", errors="replace").strip().upper()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
        except (OSError, ValueError):
            continue
    largest = max(sizes)
    return min(largest, LARGEST_CACHE) if largest > 0 else DEFAULT_CACHE


@lru_cache(maxsize=1)
def other_data() -> torch.Tensor:
    """Twice what fits into the last-level cache; `other_data.cache_clear()` gives it back when nothing is left to measure."""
    return torch.ones(2 * last_level_cache() // 4)


def empty_caches() -> None:
    """Read so much else that nothing of what a call will read lies in a cache of this machine's."""
    other_data().sum()
