"""Do the tests notice small mistakes? Make each of `mistakes.py` in a copy of the tree, and run the tests that must notice it.

    python tests/mutation/run.py --out record.json          goes on where an earlier run of the same file stopped
    python tests/mutation/run.py --check                    only whether every snippet still stands in the package once

A mistake is killed when a named test fails, survives when all pass, and is not applicable when its snippet does not stand in the
package exactly once, or when the test that failed fails without the mistake too. Ends with 1 unless all are killed.
"""

from __future__ import annotations

import argparse
import compileall
import ctypes
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mistakes import MISTAKES, Mistake

ROOT = Path(__file__).parents[2]
COPIED = ("sparsify", "tests", "examples", "benchmarks", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
SOURCES = (".py", ".jinja", ".j2", ".cpp", ".c", ".h")
PASSED, FAILED, NO_TESTS = 0, 1, 5
PRELOADED = [
    "bitsandbytes",
    "hypothesis",
    "hypothesis.strategies",
    "jinja2",
    "networkx",
    "numpy",
    "peft",
    "rich.console",
    "rich.table",
    "safetensors.torch",
    "tokenizers",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.export",
    "torch.testing",
    "torch.utils.checkpoint",
    "torchao.quantization",
    "tqdm.auto",
    "transformers",
    "transformers.pytorch_utils",
    "triton",
    "typer",
    "typer.testing",
]


def place_of(mistake: Mistake, package: Path) -> Path | str:
    """The file in which the snippet stands, or why it cannot be made."""
    texts = {path: path.read_text() for path in sorted(package.rglob("*")) if path.suffix in SOURCES}
    found = {path: text.count(mistake.before) for path, text in texts.items() if mistake.before in text}
    if mistake.before == mistake.after or sum(found.values()) != 1:
        places = ", ".join(f"{path.relative_to(package)} × {count}" for path, count in found.items())
        return f"the snippet stands {sum(found.values())} times ({places or 'nowhere'})"
    return next(iter(found))


class Watch:
    """A pytest plugin that writes down the first test that failed."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.note.exists():
            crash = getattr(report.longrepr, "reprcrash", None)
            self.note.write_text(json.dumps([report.nodeid, str(getattr(crash, "message", ""))[:200]]))


def preload() -> None:
    """What every test imports and no mistake is in: forked processes have it already."""
    for name in PRELOADED:
        importlib.import_module(name)
    for name in (
        "Llama",
        "GPT2",
        "T5",
        "Bert",
        "Mixtral",
        "ViT",
        "Phi3",
        "Qwen2",
        "GPTNeoX",
        "Falcon",
        "Bart",
        "Whisper",
        "CLIP",
    ):
        getattr(importlib.import_module("transformers"), f"{name}PreTrainedModel")
    pytest.main(["--version", "-q"])  # its plugins
    importlib.import_module("torch").set_num_threads(1)
    assert not any(name.partition(".")[0] == "sparsify" for name in sys.modules)


def run_tests(tree: Path, test: str, only: str, seconds: float) -> tuple[int, str, str]:
    """Exit status of pytest in a fork (FAILED for one that takes too long), the test that failed, and why."""
    note, output = tree / "failed.json", tree / "output.txt"
    note.unlink(missing_ok=True)
    command = ["-x", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *(["-k", only] if only else [])]
    command.append(f"tests/{test}")
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.setsid()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it must not outlive the runner
            os.chdir(tree)
            sys.path[:] = [str(tree), *(p for p in sys.path if Path(p).resolve() not in (ROOT, Path(__file__).parent))]
            os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
            status = int(pytest.main(command, plugins=[Watch(note)]))
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return FAILED, "", f"took more than {seconds:.0f} s"
        time.sleep(0.05)
    status = os.waitstatus_to_exitcode(code)
    if note.exists():
        name, message = json.loads(note.read_text())
        return status, name, message
    return status, "", " | ".join(output.read_text(errors="replace").splitlines()[-3:])[-300:]


def key_of(mistake: Mistake) -> str:
    """Changes with anything in the entry, so that an old result does not stand for a new one."""
    return hashlib.sha256(repr(mistake).encode()).hexdigest()[:12]


times = itertools.count(int(time.time()), 2)


def put(place: Path, text: str) -> None:
    """Write a source file with a time of its own, so that no compiled module of another version passes for it."""
    place.write_text(text)
    now = next(times)
    os.utime(place, (now, now))


def judge(mistake: Mistake, tree: Path, sound: dict[str, str], seconds: float) -> dict[str, object]:
    """Make one mistake in `tree`, run its tests file by file until one fails, and take it back."""
    package = tree / "sparsify"
    place = place_of(mistake, package)
    entry: dict[str, object] = {"area": mistake.area, "before": mistake.before, "after": mistake.after}
    if isinstance(place, str):
        return entry | {"result": "not applicable", "why": place}
    entry["file"] = str(place.relative_to(tree))
    text, start = place.read_text(), time.monotonic()
    result: dict[str, object] = {"result": "survived"}
    ran = 0
    for asked in mistake.tests:
        test, _, only = asked.partition(": ")
        put(place, text.replace(mistake.before, mistake.after))
        try:
            status, name, why = run_tests(tree, test, only, seconds)
        finally:
            put(place, text)
        ran += status != NO_TESTS
        if status in (PASSED, NO_TESTS):
            continue
        again = name.removeprefix("tests/") or test
        if again not in sound:
            clean, _, what = run_tests(tree, again, "", 4 * seconds)
            sound[again] = "" if clean == PASSED else f"fails without a mistake: {what}"
        if sound[again]:
            result = {"result": "not applicable", "why": f"{again} {sound[again]}"}
            continue
        result = {"result": "killed", "by": again, "why": re.sub(r"/\S*/pytest-of-\S+?/pytest-\d+/", "", why)}
        break
    if not ran:
        result = {"result": "not applicable", "why": "no test of those named was run"}
    return entry | result | {"seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON record; results in it are kept")
    parser.add_argument("--check", action="store_true", help="only look for the snippets")
    parser.add_argument("--area", nargs="*", help="only mistakes of these areas")
    parser.add_argument(
        "--part", default="0/1", help="which share: 0/2 and 1/2 are the halves (a record each; `--join` them)"
    )
    parser.add_argument(
        "--join", type=Path, nargs="*", default=[], help="records of which the results are taken over first"
    )
    parser.add_argument("--again", action="store_true", help="run survivors of the record again")
    parser.add_argument("--seconds", type=float, default=300, help="a run of tests that takes longer has noticed")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    chosen = [mistake for mistake in MISTAKES if options.area is None or mistake.area in options.area]
    chosen = chosen[part::parts]
    if options.check:
        lost = [(m, p) for m in chosen if isinstance(p := place_of(m, ROOT / "sparsify"), str)]
        for mistake, why in lost:
            print(f"{mistake.area}: {mistake.before.strip().splitlines()[0]}: {why}")
        print(f"{len(chosen) - len(lost)} of {len(chosen)} snippets stand in the package once")
        return int(bool(lost))
    known = (
        json.loads(options.out.read_text()) if options.out and options.out.exists() else {"results": {}, "sound": {}}
    )
    results, sound = known["results"], known["sound"]
    for place in options.join:
        more = json.loads(place.read_text())
        results |= more["results"]
        sound |= more["sound"]
    preload()
    with tempfile.TemporaryDirectory(prefix="mistakes-") as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            elif source.exists():
                shutil.copy(source, tree / name)
        compileall.compile_dir(tree, quiet=2)
        for number, mistake in enumerate(chosen, 1):
            key = key_of(mistake)
            old = results.get(key)
            if old is None or (options.again and old["result"] != "killed"):
                results[key] = judge(mistake, tree, sound, options.seconds)
                line = results[key]
                said = line.get("by") or line.get("why") or ""
                first = mistake.before.strip().splitlines()[0][:70]
                print(f"{number}/{len(chosen)} {mistake.area}: {line['result']}: {first} ({said})", flush=True)
                if options.out:
                    options.out.write_text(
                        json.dumps({"results": results, "sound": sound}, indent=1, ensure_ascii=False)
                    )
    found = {key_of(mistake): results[key_of(mistake)] for mistake in chosen}
    counts = {
        word: sum(r["result"] == word for r in found.values()) for word in ("killed", "survived", "not applicable")
    }
    if options.out and len(chosen) == len(MISTAKES):
        options.out.write_text(
            json.dumps({"counts": counts, "results": found, "sound": sound}, indent=1, ensure_ascii=False)
        )
    print(json.dumps(counts))
    return int(counts["killed"] < len(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
