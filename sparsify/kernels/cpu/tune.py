"""What was measured on this machine: timings taken in turn, kept in a file, and checked again before they are trusted.

A timing is the smallest of several rounds in which all contestants take turns, so that a noisy moment hits all of them
alike. It is steady when each contestant came near its smallest time twice and the thread was hardly ever without a
processor; an unsteady one is kept, but measured again by the next process. A steady one that was made under load shows when
a contestant is faster today: then all are measured again.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsify.kernels.source import cache_directory

TUNE_VERSION = 4
AGREEMENT = 1.1  # two rounds within this ratio make a smallest time steady
PRESENCE = 0.8  # share of the time that the measuring thread must have had a processor
IMPROVEMENT = 0.8  # a contestant that takes less than this share of its recorded time was recorded under load
tune_lock = threading.Lock()
tuned: dict[str, Any] | None = None
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
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def tune_path() -> Path:
    return cache_directory() / "tune.json"


def tuning() -> dict[str, Any]:
    """Everything measured on this machine so far; read from disk once per process."""
    global tuned
    with tune_lock:
        if tuned is None:
            try:
                stored = json.loads(tune_path().read_text())
                tuned = stored if isinstance(stored, dict) else {}
            except (OSError, ValueError):
                tuned = {}
        return tuned


def remember(key: str, value: Any) -> None:
    """Keep a measurement; written atomically, merged with what other processes wrote meanwhile. Best effort."""
    table = tuning()
    with tune_lock:
        table[key] = value
        path = tune_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                stored = json.loads(path.read_text())
            except (OSError, ValueError):
                stored = {}
            merged = {**(stored if isinstance(stored, dict) else {}), **table}
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
                json.dump(merged, file)
            os.replace(file.name, path)
        except OSError:
            pass  # a read-only home: measure again in the next process


def recorded(key: str) -> Timing | None:
    """The timing kept under `key`; None when there is none, or when it is damaged."""
    stored = tuning().get(key)
    if not isinstance(stored, dict) or not isinstance(stored.get("seconds"), dict):
        return None
    seconds = stored["seconds"]
    if not seconds or not all(isinstance(s, float) and s > 0 for s in seconds.values()):
        return None
    return Timing(dict(seconds), bool(stored.get("steady")))


def measured(key: str, calls: Mapping[str, Callable[[], Any]], budget: float = 0.25) -> Timing:
    """The timing of `calls`: the recorded one if it can be trusted, else a new one, which is recorded."""
    found = recorded(key)
    if found is not None and set(calls) <= set(found.seconds):
        if key in checked:
            return found
        if found.steady and not improved(found, calls):
            checked.add(key)
            return found
    timing = time_in_turn(calls, budget)
    if found is not None and not timing.steady:  # two noisy records: the smaller times are nearer to the truth
        both = {name: min(s, found.seconds.get(name, s)) for name, s in timing.seconds.items()}
        timing = Timing(both, False)
    remember(key, {"seconds": timing.seconds, "steady": timing.steady})
    checked.add(key)
    return timing


def improved(found: Timing, calls: Mapping[str, Callable[[], Any]]) -> bool:
    """Whether any contestant is now so much faster than recorded that the record was made under load."""
    for name, call in calls.items():
        call()
        if min(seconds_of(call) for _ in range(3)) < IMPROVEMENT * found.seconds[name]:
            return True
    return False


def time_in_turn(calls: Mapping[str, Callable[[], Any]], budget: float = 0.25) -> Timing:
    """Smallest seconds of each call; the calls take turns for about `budget` seconds, up to four times that if unsteady."""
    samples = {name: [seconds_of(call)] for name, call in calls.items()}  # the first call also warms what it touches
    for call_samples, call in zip(samples.values(), calls.values(), strict=True):
        call_samples[0] = min(call_samples[0], seconds_of(call))
    start, own, rounds = time.perf_counter(), time.thread_time(), 0
    while True:
        for name, call in calls.items():
            samples[name].append(seconds_of(call))
        rounds += 1
        spent = time.perf_counter() - start
        steady = all(sorted(s)[1] <= AGREEMENT * min(s) for s in samples.values())
        if spent > 0.01:  # others took the processor away: agreeing times may all be wrong
            steady &= time.thread_time() - own > PRESENCE * spent
        if rounds >= 3 and (rounds >= 60 or spent > (1 if steady else 4) * budget):
            return Timing({name: min(s) for name, s in samples.items()}, steady)


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall seconds of a call, without those in which the calling thread had to wait for a processor."""
    start, own = time.perf_counter(), time.thread_time()
    call()
    return min(time.perf_counter() - start, time.thread_time() - own)
