"""The system's C++ compiler: found, asked for its version, and run, whatever `CXX` says and however it behaves.

    CXX="ccache g++" │ "/opt/my compilers/g++" │ unset ──find_compiler──▶ (command, version) or BuildError

A compiler that is missing, hangs, prints what is no text, or writes nothing is a reason to compute without kernels; it is
never an error of another kind.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import lru_cache

from sparsify.errors import SparsifyError

TIMEOUT = 300.0  # seconds for one translation unit
VERSION_TIMEOUT = 20.0
OUTPUT = 64 << 10  # bytes of a compiler's output that are kept, its last
WINDOWS = os.name == "nt"
hung: set[tuple[str, ...]] = set()  # compilers that did not come back: they are not asked again


class BuildError(SparsifyError, RuntimeError):
    """Kernels cannot be built on this machine; the dense path serves instead."""

    exit_code = 1


def find_compiler(named: str | None) -> tuple[tuple[str, ...], str]:
    """The C++ compiler as a command, and the first line of its version. Raises BuildError when there is none.

    named: what `CXX` says; None or blank for the usual names."""
    if WINDOWS:
        raise BuildError("kernels are built on Linux and macOS, not on Windows; linears stay dense")
    found = look_for_compiler(named or "", os.environ.get("PATH", ""))
    if isinstance(found, str):
        raise BuildError(found)
    return found


@lru_cache(maxsize=8)
def look_for_compiler(named: str, path: str) -> tuple[tuple[str, ...], str] | str:
    """`find_compiler`, remembered with its failures; path: of the search, which `shutil.which` reads from the environment."""
    candidates = [("g++",), ("c++",), ("clang++",)]
    if named.strip():
        try:
            candidates = [(named.strip(),) if shutil.which(named.strip()) else tuple(shlex.split(named))]
        except ValueError as error:
            return f"no C++ compiler found: CXX={named!r} cannot be read ({error}); linears stay dense"
    reasons = []
    for command in candidates:
        program = shutil.which(command[0]) if command else None
        if program is None:
            reasons.append(" ".join(command))
            continue
        full = (os.path.abspath(program), *command[1:])
        try:
            status, text = run([*full, "--version"], VERSION_TIMEOUT)
        except BuildError as error:
            reasons.append(f"{' '.join(command)}: {error}")
            continue
        if status == 0:
            return full, next((line for line in text.splitlines() if line.strip()), command[0])[:200]
        reasons.append(f"{' '.join(command)}: '--version' ended with status {status}")
    tried = ", ".join(reasons)
    return f"no C++ compiler found (tried {tried}): install g++ or clang++, or set CXX; linears stay dense"


def run(command: Sequence[str], timeout: float) -> tuple[int, str]:
    """Exit status and the end of what a program printed. Killed, with its children, after `timeout` seconds: BuildError, as for a
    program that does not start."""
    if tuple(command[:1]) in hung:
        raise BuildError(f"{command[0]} did not answer before")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    assert process.stdout is not None
    with process.stdout as pipe:
        output = drain(process, pipe.fileno(), time.monotonic() + timeout)
    if output is None:
        hung.add(tuple(command[:1]))
        raise BuildError(f"{command[0]} did not end within {timeout:.0f} s and was killed")
    return process.wait(), output.decode(errors="replace")


def drain(process: subprocess.Popen[bytes], pipe: int, end: float) -> bytes | None:
    """What a process prints until it ends; None if that is not before `end`. A child of its own may keep the pipe open: not waited for."""
    output = bytearray()
    os.set_blocking(pipe, False)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            ready = selector.select(0 if ended else min(0.05, max(0.0, end - time.monotonic())))
            chunk = os.read(pipe, 1 << 16) if ready else None
            if chunk:
                output = (output + chunk)[-OUTPUT:]
            if ended and not chunk:
                return bytes(output)
            if time.monotonic() > end:
                stop(process)
                return None
            if chunk == b"":  # closed its output, but still at work
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and the children that it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
