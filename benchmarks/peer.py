"""An engine in a process of its own, in an environment of its own: asked line by line in JSON, stopped between its answers.

    peer = Peer("openvino", "ENV", "openvino_decoder.py", "llama-1b", "2")     ENV: an environment's folder, or its Python
    peer.ask(tokens=8)["seconds"]
    peer.close()

The script, one of `benchmarks/peers/`, first prints {"version": …} and then one line of JSON for each line that it reads; other lines on
its output are ignored.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
HERE = Path(__file__).resolve().parent


class Peer:
    """kind: its name in tables. python: Python of the environment, or the environment's folder. script: in `benchmarks/peers`."""

    def __init__(self, kind: str, python: str, script: str, *arguments: str) -> None:
        self.kind = kind
        executable = Path(python) / "bin" / "python" if Path(python).is_dir() else Path(python)
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [str(executable), str(HERE / "peers" / script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        self.started = self.answer()
        self.version = str(self.started["version"])
        self.stop()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"{self.kind} ended without an answer: …{self.log.read()[-2000:]}")

    def stop(self) -> None:
        """Its threads may spin on long after their work is done."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        self.stop()
        return found

    def resident(self) -> dict[str, float]:
        """MiB: now, of which pages of files (which the system may drop), and the largest so far."""
        return resident(self.process.pid)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


def die_with_parent() -> None:
    """A stopped process would outlive a parent that is killed, with all its memory. Linux only; elsewhere nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def resident(process: int | str = "self") -> dict[str, float]:
    """Memory of a process in MiB, as the system counts it: now, of which pages of files, and the largest so far."""
    fields = {"VmRSS": "resident_MiB", "RssFile": "of_files_MiB", "VmHWM": "peak_MiB"}
    found: dict[str, float] = {}
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in fields:
            found[fields[key]] = int(value.split()[0]) / 1024
    return found


def named_environments(pairs: list[str]) -> dict[str, str]:
    """["deepsparse=ENV", …] → name → environment. Raises ValueError for anything else."""
    found = {}
    for pair in pairs:
        name, equals, place = pair.partition("=")
        if not (name and equals and place):
            raise ValueError(f"--peer {pair}: expected NAME=ENVIRONMENT, the folder or the Python of its environment")
        found[name] = place
    return found
