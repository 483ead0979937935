"""Other processes of a test, forked from one server that has torch, transformers and sparsify loaded, and has run nothing of them.

Starting Python and loading them takes seconds of a core, more than what most of these tests do there. A forked process has none of
the test's own modules, patches or tensors. What must see a *fresh interpreter* (which modules an import loads, what is printed at start
or exit) goes through `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

PRELOADED = [
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.export._trace",
    "networkx",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "sparsify.api",
]
multiprocessing.set_forkserver_preload(PRELOADED)
CONTEXT = multiprocessing.get_context("forkserver")


def spawn(worker: Callable[..., None], args: tuple[Any, ...] = (), nprocs: int = 1) -> None:
    """`torch.multiprocessing.spawn`: calls `worker(rank, *args)` in `nprocs` processes, and raises what one of them raised."""
    mp.start_processes(worker, args=args, nprocs=nprocs, start_method="forkserver")


def start(function: Callable[..., None], *args: Any) -> Any:
    """A started `multiprocessing.Process`."""
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def run_python(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 900,
    input: str = "",
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)` gives, for `-m module …`, `-c code …` and
    `script.py …`. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        given, *places = (Path(folder) / name for name in ("in", "out", "err"))
        given.write_text(input, encoding="utf-8")
        process = start(
            as_main,
            arguments,
            dict(os.environ if env is None else env),
            str(cwd or Path.cwd()),
            *map(str, (*places, given)),
        )
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        texts = [place.read_text(encoding="utf-8", errors="replace") if place.exists() else "" for place in places]
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def as_main(
    arguments: Sequence[str], env: Mapping[str, str], cwd: str, out: str, err: str, given: str = os.devnull
) -> None:
    """In the forked process: be `python *arguments`, with `given` as its standard input."""
    descriptor = os.open(given, os.O_RDONLY)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (multiprocessing had closed it)
    for number, place in ((1, out), (2, err)):
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tests = str(Path(__file__).parent)
    inherited = [
        p for p in sys.path if p and Path(p).resolve() != Path(tests) and Path(tests) not in Path(p).resolve().parents
    ]
    sys.path[:] = [*filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *inherited]
    first, *rest = arguments
    if first == "-m":
        sys.argv = list(rest)
        sys.path.insert(0, cwd)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, cwd)
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
