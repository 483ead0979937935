"""What every benchmark here shares: interleaved timing, memory counters, the record of machine and versions, the table.

Rules that the numbers follow:

* Variants are timed in turn, A B C A B C …, in one process, so that noise of a shared machine meets all of them alike.
  What counts is a *ratio*: of medians, of minima, and the median of the ratios within each round.
* `--clock cpu --threads 1` counts the processor time of the process instead of wall time, which leaves out the time of
  others on the same cores. (With two OpenMP threads on a busy machine every parallel region may wait for a time slice,
  so wall time counts regions, not work.) Wall time is the default, and what a bar is judged by on a quiet machine.
* Peak memory of a step is counted by the allocator, not by the operating system: `max_memory_allocated` on CUDA; on CPU
  the events that PyTorch's CPU allocator reports to the profiler, one per allocation and release, summed up in order.
  That is exact to the byte and the same in every run, needs no process per variant, and also sees what compiled code
  allocates. It does not see buffers inside MKL and oneDNN, nor freed pages that malloc keeps: no property of a method.
* Bytes saved for backward are counted at `torch.autograd.graph.saved_tensors_hooks`: each storage once, in full (a
  saved view keeps its whole storage alive), parameters and buffers left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.console import adapt_streams

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "triton", "numpy")


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one per round, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    def over(self, other: Timing) -> Ratio:
        """How many times as long as `other`, which ran in the same rounds."""
        paired = [a / b for a, b in zip(self.samples, other.samples, strict=True)]
        return Ratio(self.median / other.median, self.minimum / other.minimum, statistics.median(paired))


@dataclass(frozen=True)
class Ratio:
    """Two variants compared: ratio of medians, of minima, and the median over rounds of the ratio in the round."""

    median: float
    minimum: float
    paired: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.minimum:.3f})"


def synchronize() -> None:
    """Wait for the device, so that a clock read afterwards means something."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def busy_seconds() -> float:
    """Processor seconds that the machine has spent working since it started; 0 where that can't be read."""
    with contextlib.suppress(OSError):
        fields = [int(f) for f in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def wait_for_quiet(patience: float, share: float = 0.15) -> bool:
    """Sleep until less than `share` of one processor was busy for half a second, at most `patience` seconds."""
    end = time.perf_counter() + patience
    while time.perf_counter() < end:
        before = busy_seconds()
        time.sleep(0.5)
        if busy_seconds() - before < 0.5 * share:
            return True
    return False


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 11,
    warmup: int = 2,
    seconds: float | None = None,
    clock: str = "wall",
    patience: float = 0.0,
) -> dict[str, Timing]:
    """Time the variants in turn, one call each per round; every round starts at another variant.

    rounds: timed rounds. seconds: stop early once this much time is spent, but not before three rounds.
    clock: "wall", or "cpu" for the processor time of this process (all its threads).
    patience: before each round wait, at most this many seconds, until other processes leave the processors alone.
    """
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    names = list(variants)
    if not names:
        return {}
    for name in names:
        for _ in range(warmup):
            variants[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds):
        wait_for_quiet(patience)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize()
            start = now()
            variants[name]()
            synchronize()
            samples[name].append(now() - start)
        if seconds is not None and number >= 2 and time.perf_counter() - begin > seconds:
            break
    return {name: Timing(tuple(values)) for name, values in samples.items()}


# --- memory -----------------------------------------------------------------------------------------------------------


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under `tensors`."""
    return sum(distinct_storages(tensors).values())


def distinct_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of every storage under `tensors`."""
    found: dict[int, int] = {}
    todo = list(tensors)
    while todo:
        tensor = todo.pop()
        if tensor.layout is torch.sparse_coo:
            todo += [tensor._indices(), tensor._values()]
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


@dataclass
class Saved:
    """What autograd kept: bytes of distinct storages."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextlib.contextmanager
def saved_for_backward(exclude: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Count what the operations inside the block save for backward; `exclude` are parameters, buffers and inputs.

    Keep the graph (the loss) alive until the block ends, or storages may be freed and their addresses used again.
    """
    known = set(distinct_storages(exclude))
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        for address, size in distinct_storages([tensor]).items():
            if address not in known:
                saved.storages[address] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@dataclass
class Peak:
    """Bytes above what was allocated when the block began: at the peak, and at its end."""

    peak: int = 0
    end: int = 0


@contextlib.contextmanager
def allocations(device: str | torch.device) -> Iterator[Peak]:
    """Measure the allocator over a block. On CPU, releases of memory that is older than the block are not seen:
    let nothing old die inside (gradients set to None before, optimizer state warm)."""
    result = Peak()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result.peak = torch.cuda.max_memory_allocated() - before
        result.end = torch.cuda.memory_allocated() - before
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        result.peak = max(result.peak, live)
    result.end = live


# --- the record -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine by its parts, not by its name; how busy it was."""
    record: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record


def cpu_model() -> str:
    """`model name` of /proc/cpuinfo, else what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Python and the packages that a number depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def mib(count: float) -> float:
    return count / 2**20


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a GitHub table, aligned; floats with four significant digits; a missing cell is empty."""
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    text = [[cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in text), 3) if text else len(c) for i, c in enumerate(columns)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)) + " |"]
    lines.append("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    lines += ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in text]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


@dataclass(frozen=True)
class Bar:
    """A target: `value` must be at most (or at least) `bound`.

    also: the same quantity by other estimates (ratio of minima, paired ratio). A bar is met or missed only if all
    estimates say so; on a noisy machine they part, and then the bar is undecided, whatever the median says.
    """

    name: str
    value: float
    bound: float
    at_least: bool = False
    also: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str, ratio: Ratio, bound: float, at_least: bool = False) -> Bar:
        """A bar on a measured ratio, by all its estimates."""
        return cls(name, ratio.median, bound, at_least, (ratio.minimum, ratio.paired))

    @property
    def verdict(self) -> str:
        """`met`, `MISSED` or `undecided`."""
        passed = [v >= self.bound if self.at_least else v <= self.bound for v in (self.value, *self.also)]
        return "met" if all(passed) else "undecided" if any(passed) else "MISSED"

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        more = f"; by minima {self.also[0]:.3f}, paired {self.also[1]:.3f}" if len(self.also) == 2 else ""
        return f"{self.verdict:9} {self.name}: {self.value:.3f} (bar {sign} {self.bound:g}{more})"

    def record(self) -> dict[str, Any]:
        return {**vars(self), "also": list(self.also), "verdict": self.verdict}


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark takes. What it prints is shown in some form on every console from here on."""
    adapt_streams()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--fast", action="store_true", help="a small run of a few seconds, to see that it works")
    made.add_argument(
        "--save", nargs="?", const=str(RESULTS), default=None, metavar="DIR", help="write NAME-DATE.json here"
    )
    made.add_argument("--label", default="", help="goes into the file name: NAME-LABEL-DATE.json")
    made.add_argument("--threads", type=int, default=0, help="CPU threads (0: PyTorch's choice)")
    made.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for busy machines")
    made.add_argument("--patience", type=float, default=0.0, help="seconds a round may wait for a quiet machine")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    made.add_argument("--seed", type=int, default=0)
    return made


def begin(arguments: argparse.Namespace) -> None:
    """Apply the common options."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)


def record_of(
    name: str,
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    bars: Sequence[Bar] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What is kept of a run, as JSON."""
    return {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("save", "label")},
        "rows": [dict(row) for row in rows],
        "bars": [bar.record() for bar in bars],
        "notes": list(notes),
    }


def path_of(record: Mapping[str, Any], arguments: argparse.Namespace) -> Path:
    """NAME-LABEL-DATE.json in the directory that `--save` named."""
    directory = Path(arguments.save)
    directory.mkdir(parents=True, exist_ok=True)
    return directory / ("-".join(p for p in (record["benchmark"], arguments.label, record["date"]) if p) + ".json")


def keep(
    name: str,
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    bars: Sequence[Bar] = (),
    notes: Sequence[str] = (),
) -> None:
    """Save what is measured so far as NAME-….partial.json, for a run that may be stopped; `report` removes it."""
    if arguments.save is not None:
        record = record_of(name, arguments, rows, bars, notes)
        path_of(record, arguments).with_suffix(".partial.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )


def report(
    name: str,
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    bars: Sequence[Bar] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Print table, notes, bars and, as the last line, the whole record as JSON; save it if asked to."""
    record = record_of(name, arguments, rows, bars, notes)
    print(table(rows, columns))
    for line in (*notes, *map(str, bars)):
        print(line)
    if arguments.save is not None:
        path = path_of(record, arguments)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".partial.json").unlink(missing_ok=True)
        print(f"saved {path.name}")
    print(json.dumps(record))
    return record
