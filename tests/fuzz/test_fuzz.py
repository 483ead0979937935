"""Everything that is read from outside, damaged in every way that the mutators know.

For each try: a SparsifyError, or the files are accepted (and, where they carry hashes, mean what they meant). Nothing else is raised; a model
is bit for bit what it was after a refusal; no try hangs; none asks for more memory than a bound above what the process had.

    pytest tests/fuzz -m slow -s        the long run, with counts of tries, refusals and acceptances
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mutators import mutated
from targets import PENDING, TARGETS, WORDS, Target, command_lines, digest

from sparsify.errors import SparsifyError

SECONDS = 60  # of one try, on a machine that is busy with other things
BYTES = 1 << 30  # of address space that one try may add


class Hang(BaseException):
    """A try took too long."""


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, time is bounded by an alarm and memory by the kernel: what asks for more fails, with an error that is not ours."""
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    before = resource.getrlimit(resource.RLIMIT_AS)

    def ring(*_: Any) -> None:
        raise Hang

    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def fuzz(target: Target, root: Path, seed: int, tries: int) -> Counter[str]:
    rng, counts = random.Random(seed), Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        valid = root / "valid"
        target.place(valid, {})
        meant = target.read(valid)
        before = [digest(model) for model in target.victims]
        for number in range(tries):
            done: list[str] = []
            changed: dict[str, bytes] = {}
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                name = rng.choice(sorted(target.files))
                how, changed[name] = mutated(rng, name, changed.get(name, target.files[name]))
                done.append(f"{how} of {name}")
            folder = root / "try"
            target.place(folder, changed)
            what = f"seed {seed}, try {number}: {', then '.join(done)}"
            try:
                with bounded():
                    found = target.read(folder)
            except SparsifyError as error:
                counts["refused"] += 1
                assert len(str(error)) < 20_000, f"{what}: the message is as long as the file"
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
            else:
                counts["accepted"] += 1
                if target.sealed and len(done) == 1:
                    assert found == meant, f"{what}: accepted, and it means something else"
            assert [digest(model) for model in target.victims] == before, f"{what}: the model changed"
            shutil.rmtree(folder)
    assert counts["refused"] or not target.refuses, "not one try was refused: the mutators or the reader do nothing"
    return counts


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in PENDING])
def test_damaged_files_are_refused_or_mean_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    target = TARGETS[name](tmp_path / "made")
    fuzz(target, tmp_path, 1, target.tries)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TARGETS if name not in PENDING])
def test_many_damaged_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made").mkdir()
    target = TARGETS[name](tmp_path / "made")
    total = Counter[str]()
    for seed in range(10, 20):
        shutil.rmtree(tmp_path / "valid", ignore_errors=True)
        total += fuzz(target, tmp_path, seed, target.tries * 5)
    with capsys.disabled():
        print(f"\n{name}: {total.total()} tries, {total['refused']} refused, {total['accepted']} accepted")


def command_line(words: list[str]) -> None:
    """Exit code 0, 1 or 2 and nothing else raised."""
    from typer.testing import CliRunner

    from sparsify.cli import app

    with bounded():
        done = CliRunner().invoke(app, words)
    if isinstance(done.exception, SystemExit) or done.exception is None:
        assert done.exit_code in (0, 1, 2), words
        return
    raise AssertionError(f"{words}: {type(done.exception).__name__}: {str(done.exception)[:300]}") from done.exception


def run_command_lines(seed: int, tries: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for words, _ in zip(command_lines(random.Random(seed)), range(tries), strict=False):
        command_line(words)


@pytest.mark.skipif("command_line" in PENDING, reason=PENDING.get("command_line", ""))
def test_words_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_command_lines(1, 30, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif("command_line" in PENDING, reason=PENDING.get("command_line", ""))
def test_many_words_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_command_lines(2, 400, tmp_path, monkeypatch)


def test_the_lists_are_complete() -> None:
    assert set(PENDING) <= {*TARGETS, "command_line"}
    assert len(set(WORDS)) == len(WORDS)
