"""The cache folder and the compiler: nothing is loaded that is not ours and whole, and nothing that goes wrong here ends a process."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparsify.ops  # noqa: F401  (registers the operators of a training step)
from sparsify.kernels import cache, fallback
from sparsify.kernels.cpu import build, compiler, dispatch, sampled, skinny, tune
from sparsify.kernels.source import write_once

SOURCE = 'extern "C" { void sparsify_init(void*) {} int answer() { return %d; } }\n'
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
SKIP = pytest.mark.skipif(sys.platform != "linux", reason="files of Linux")


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was said, and there is no temporary folder yet."""
    monkeypatch.setattr(fallback, "said", {})
    monkeypatch.setattr(cache, "private", {})


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two libraries, whose `answer` is 41 and 42."""
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    folder, found = tmp_path_factory.mktemp("libraries"), {}
    for answer in (41, 42):
        (folder / "source.cpp").write_text(SOURCE % answer)
        found[answer] = folder / f"{answer}.so"
        command = ["g++", "-shared", "-fPIC", str(folder / "source.cpp"), "-o", str(found[answer])]
        subprocess.run(command, check=True, capture_output=True)
    return found


def make_compiler(path: Path, script: str) -> str:
    """An executable shell script: `$last` is the file that it is to write."""
    path.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1.0; exit 0; fi\nfor last; do :; done\n' + script
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def answers(tmp_path: Path, libraries: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """What the library of a source answers, built by a compiler that only copies; `calls` counts its runs."""
    copies = f'echo x >> "{tmp_path}/calls"; n=$(sed -n "s/.*return \\([0-9]*\\).*/\\1/p" "$source")\n'
    find = 'for word; do case "$word" in *.cpp) source="$word";; esac; done\n'
    folder = next(iter(libraries.values())).parent
    script = find + copies + f'cp "{folder}/$n.so" "$last"\n'
    monkeypatch.setenv("CXX", shlex.quote(make_compiler(tmp_path / "copier", script)))
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    return lambda answer: build.load_library(SOURCE % answer, (), ("answer",)).answer()


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().split())


def entry_of(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache" / "kernels").glob("*.so")
    return found


def test_a_library_is_built_once_and_kept_with_its_hash(tmp_path: Path, answers: Callable[[int], int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [answers(42), answers(42)] == [42, 42]
    assert calls(tmp_path) == 1
    entry = entry_of(tmp_path)
    assert cache.unseal(entry.name, entry.read_bytes()) is not None
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    for folder in (entry.parent, entry.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.name for p in entry.parent.iterdir()] == [entry.name]


def cut(keep: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(keep * len(path.read_bytes()))])


def fewer(count: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:-count])


def flip(place: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 1
        path.write_bytes(bytes(data))

    return change


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_full_folder(path: Path) -> None:
    as_folder(path)
    (path / "something").write_text("kept")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_link(path: Path) -> None:
    shutil.move(path, path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def as_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_suffix(".nowhere"))


def without_seal(path: Path) -> None:
    path.write_bytes(cache.unseal(path.name, path.read_bytes()) or b"")


def another_user(path: Path) -> None:
    if not ROOT:
        pytest.skip("only root gives files away")
    os.chown(path, 12345, -1)


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"cut to {share:.0%}": cut(share) for share in (0.0, 0.001, 0.3, 0.5, 0.9)},
    **{f"{count} bytes short": fewer(count) for count in (1, 32, 48)},
    **{f"a bit at {place:.0%}": flip(place) for place in (0.0, 0.4, 1.0)},
    "random bytes": lambda path: path.write_bytes(os.urandom(5000)),
    "without its hash": without_seal,
    "a folder": as_folder,
    "a folder with something in it": as_full_folder,
    "a pipe": as_pipe,
    "a link": as_link,
    "a dangling link": as_dangling_link,
    "writable by its group": lambda path: path.chmod(0o620),
    "writable by all": lambda path: path.chmod(0o602),
    "another user's": another_user,
}


@SKIP
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_odd_entry_is_built_again(damage: str, tmp_path: Path, answers: Callable[[int], int]) -> None:
    assert answers(42) == 42
    DAMAGES[damage](entry_of(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert answers(42) == 42
        assert calls(tmp_path) == 2
        assert answers(42) == 42
    assert calls(tmp_path) == 2, "the second is whole again"


def test_a_whole_library_under_another_name_is_not_loaded(tmp_path: Path, answers: Callable[[int], int]) -> None:
    assert answers(41) == 41
    first = entry_of(tmp_path)
    assert answers(42) == 42
    (second,) = set(first.parent.glob("*.so")) - {first}
    shutil.copy(first, second)
    assert answers(42) == 42


def test_a_library_that_changes_after_it_was_loaded_changes_nothing(
    tmp_path: Path, answers: Callable[[int], int]
) -> None:
    answers(42)
    library = build.load_library(SOURCE % 42, (), ("answer",))
    with open(entry_of(tmp_path), "r+b") as file:  # the same file, as a mapping would see it
        file.truncate(0)
    assert library.answer() == 42


def loose(mode: int) -> Callable[[Path], None]:
    return lambda path: path.chmod(mode)


def linked(path: Path) -> None:
    shutil.move(path, path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


def file_in_its_place(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "all may write": (loose(0o777), "others may write to it .mode 0777.; run: chmod go-w"),
    "its group may write": (loose(0o770), "others may write to it .mode 0770."),
    "another user's": (another_user, "it belongs to user 12345"),
    "a link": (linked, "it is a symbolic link"),
    "a file": (file_in_its_place, "it is not a folder"),
}


@SKIP
@pytest.mark.parametrize("where", ["kernels", ""])
@pytest.mark.parametrize("what", FOLDERS)
def test_an_unsafe_folder_is_not_read(what: str, where: str, tmp_path: Path, answers: Callable[[int], int]) -> None:
    if (what, where) == ("a link", ""):
        pytest.skip("a link of one's own to one's own folder is fine, see below")
    assert answers(42) == 42
    folder = entry_of(tmp_path).parent if where else entry_of(tmp_path).parent.parent
    change, reason = FOLDERS[what]
    change(folder)
    with pytest.warns(RuntimeWarning, match=f"in a temporary folder of this process, because .*{reason}") as said:
        assert [answers(42), answers(42)] == [42, 42]
    assert len(said) == 1, "said once"
    assert calls(tmp_path) == 2
    private = cache.private_folder()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert list((private / "kernels").glob("*.so"))


def test_a_link_of_ones_own_to_the_cache_serves(tmp_path: Path, answers: Callable[[int], int]) -> None:
    (tmp_path / "elsewhere").mkdir(0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert [answers(42), answers(42)] == [42, 42]
    assert calls(tmp_path) == 1
    assert list((tmp_path / "elsewhere" / "kernels").glob("*.so"))


def test_a_full_disk_is_no_error(
    tmp_path: Path, answers: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cache.write

    def full(path: Path, content: bytes) -> None:
        if tmp_path in path.parents:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(cache, "write", full)
    with pytest.warns(RuntimeWarning, match="cannot be written to .No space left on device.*set SPARSIFY_CACHE"):
        assert answers(42) == 42
    monkeypatch.setattr(cache, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with (
        pytest.raises(build.BuildError, match="could not be built: .*No space left on device"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        answers(41)


def test_scratch_files_of_killed_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    for name, age in (("write-old", 3 * cache.ABANDONED), ("write-new", 0.0), ("tune.json", 3 * cache.ABANDONED)):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    cache.folder()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tune.json", "write-new"]


# --- environment --------------------------------------------------------------------------------------------------------


@SKIP
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "there is no home directory"),
        ({"HOME": ""}, "there is no home directory"),
        ({"HOME": "relative", "XDG_CACHE_HOME": "relative", "SPARSIFY_CACHE": "  "}, "there is no home directory"),
        ({"HOME": "/dev/null"}, "it cannot be made (Not a directory)"),
        ({"SPARSIFY_CACHE": "/proc/nothing"}, "it cannot be made"),
        ({"SPARSIFY_CACHE": "x" * 300}, "File name too long"),
    ],
)
def test_without_a_home_a_temporary_folder_serves(
    settings: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    def unknown(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("SPARSIFY_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(RuntimeWarning, match=re.escape(expected)) as said:
        place, again = [cache.folder("kernels") for _ in range(2)]
    assert place == again
    assert len(said) == 1
    assert "set SPARSIFY_CACHE to a folder of your own" in str(said[0].message)
    assert place.parent == cache.private_folder()
    cache.remove_private(place.parent, os.getpid() + 1)
    assert place.is_dir(), "the folder of another process"
    cache.remove_private(place.parent, os.getpid())
    assert not place.exists()


def test_without_any_folder_there_is_a_build_error(
    libraries: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", full)
    monkeypatch.setenv("SPARSIFY_CACHE", "/proc/nothing")
    monkeypatch.setenv("CXX", make_compiler(tmp_path / "cc", f'cp "{libraries[42]}" "$last"\n'))
    with (
        pytest.warns(RuntimeWarning, match="it cannot be made"),
        pytest.raises(build.BuildError, match="no temporary folder can be made .No space left on device.: set TMPDIR"),
    ):
        build.load_library(SOURCE % 42, (), ("answer",))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"SPARSIFY_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"SPARSIFY_CACHE": " ", "XDG_CACHE_HOME": "/c"}, "/c/sparsify"),
        ({"XDG_CACHE_HOME": "c", "HOME": "/d"}, "/d/.cache/sparsify"),
        ({"SPARSIFY_CACHE": "~/e", "HOME": "/d"}, "/d/e"),
    ],
)
def test_settings_of_the_folder(settings: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPARSIFY_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert cache.directory() == Path(expected)


@SKIP
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 3", "failed with status 3"),
        ("printf '\\377\\376 caf\\351\\n'; exit 1", "failed with status 1:\n\N{REPLACEMENT CHARACTER}"),
        ("exit 0", "wrote no library"),
        (': > "$last"', "wrote no library"),
        ('mkdir "$last"', "wrote no library"),
        ('echo no library > "$last"', "does not load"),
        ('head -c 3000 /dev/zero > "$last"', "does not load"),
        ("sleep 60", "did not end within"),
        ("sleep 60 & sleep 60", "did not end within"),
        ("exec 1>&- 2>&-; sleep 60", "did not end within"),
        ("yes no", "did not end within"),
        ("kill -SEGV $$", "failed with status -11"),
    ],
)
def test_a_compiler_that_misbehaves_is_a_build_error(
    script: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "TIMEOUT", 0.2 if "within" in expected else 60.0)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", make_compiler(tmp_path / "odd compiler", script + "\n"))
    start = time.monotonic()
    with pytest.raises(build.BuildError, match=expected):
        build.load_library(SOURCE % 42, (), ("answer",))
    assert time.monotonic() - start < 30
    assert not list((tmp_path / "cache").glob("kernels/*")), "nothing of it is kept"


@SKIP
def test_a_wrong_library_is_a_build_error(
    libraries: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", make_compiler(tmp_path / "cc", f'cp "{libraries[42]}" "$last"\n'))
    with pytest.raises(build.BuildError, match="has no sparsify_gemv"):
        build.load_library("anything", (), ("sparsify_gemv",))


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("no-such-compiler", "tried no-such-compiler"),
        ("'", r"CXX=.*cannot be read .No closing quotation"),
        ('g++ "-x', r"CXX=.*cannot be read .No closing quotation"),
        ("/", "tried /"),
        (".", "tried ."),
        ("'' -x", "tried  -x"),
        ("/no such/folder/g++", "tried /no such/folder/g.."),
        ("\udcff", "tried"),
        ("cat -n", "'--version' ended with status|cat"),
    ],
)
def test_an_odd_cxx_is_a_build_error(
    named: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    with pytest.raises(build.BuildError, match=expected):
        build.compile_library(SOURCE % 42, ())


@SKIP
def test_a_compiler_that_hangs_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "VERSION_TIMEOUT", 0.5)
    path = tmp_path / "hangs"
    path.write_text("#!/bin/sh\nsleep 60\n")
    path.chmod(0o755)
    start = time.monotonic()
    for _ in range(5):
        with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found .*did not end within"):
            build.find_compiler(str(path))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_cxx_means_the_usual_compilers(blank: str) -> None:
    assert compiler.look_for_compiler(blank, os.environ.get("PATH", "")) == compiler.look_for_compiler(
        "", os.environ.get("PATH", "")
    )


@SKIP
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"CXX": "'"}, "cannot be read (No closing quotation)"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (tried no-such-compiler)"),
        ({"SPARSIFY_ISA": "sse9"}, "SPARSIFY_ISA='sse9': this CPU runs"),
        ({"CXX": "HANGS"}, "did not end within 1 s"),
    ],
)
def test_a_training_step_survives_it(
    settings: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "TIMEOUT", 1.0)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("HANGS", make_compiler(tmp_path / "hangs", "sleep 60\n")))
    loaders = (skinny.load_skinny, sampled.load_sampled, dispatch.best_isa)
    for remembered in loaders:
        remembered.cache_clear()
    x, rows, factor = torch.randn(1024, 256), torch.randn(4, 256), torch.randn(1024, 4)
    index = torch.arange(0, 256 * 256, 40)

    def step() -> list[torch.Tensor]:
        products = torch.ops.sparsify.skinny_products(x, rows, factor)
        return [products[0], torch.ops.sparsify.sampled_product(x, x, index)]

    try:
        with pytest.warns(RuntimeWarning, match=re.escape(expected)) as said:
            low, values = [step() for _ in range(2)][-1]
    finally:
        for remembered in loaders:
            remembered.cache_clear()
    torch.testing.assert_close(low, x @ rows.t(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values, (x.t() @ x).flatten()[index], rtol=1e-3, atol=1e-3)
    texts = [str(warning.message) for warning in said if warning.category is RuntimeWarning]
    assert texts == list(fallback.notes())
    assert len(set(texts)) == len(texts)
    assert all("PyTorch" in text for text in texts)


# --- measurements and sources -------------------------------------------------------------------------------------------


def test_a_wrong_instruction_set_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_ISA", "AVX2 ")
    dispatch.best_isa.cache_clear()
    try:
        with pytest.raises(build.BuildError, match="SPARSIFY_ISA='AVX2': this CPU runs"):
            dispatch.best_isa()
        with pytest.warns(RuntimeWarning, match="training kernels: PyTorch's own serve instead: SPARSIFY_ISA='AVX2'"):
            assert dispatch.usable_isa() is None
        assert "SPARSIFY_ISA='AVX2'" in fallback.notes()[0]
        monkeypatch.setenv("SPARSIFY_ISA", " ")
        dispatch.best_isa.cache_clear()
        assert dispatch.best_isa() == dispatch.usable_isa()
    finally:
        dispatch.best_isa.cache_clear()


HOSTILE = [
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"key": ' + b'{"a":' * 50_000,
    b'{"key": {"seconds": {"a": NaN, "b": 1.0}}}',
    b'{"key": {"seconds": {"a": Infinity}}}',
    b'{"key": {"seconds": {"a": -1.0}}}',
    b'{"key": {"seconds": {"a": 1e300}}}',
    b'{"key": {"seconds": {"a": true}}}',
    b'{"key": {"seconds": ["a"]}}',
    b'{"key": {"seconds": {"a": ' + b"9" * 10_000 + b"}}}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_measurements_are_measured_again(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "tuned", None)
    monkeypatch.setattr(tune, "checked", set())
    (tmp_path / "tune.json").write_bytes(text)
    assert tune.recorded("key") is None
    timing = tune.measured("key", {"a": lambda: None, "b": lambda: None}, budget=0.0)
    assert set(timing.seconds) == {"a", "b"}
    assert set(json.loads((tmp_path / "tune.json").read_bytes())["key"]["seconds"]) == {"a", "b"}


def machine_key() -> str:
    return f"machine/{tune.TUNE_VERSION}/{tune.cpu_name()}/{torch.get_num_threads()}"


@pytest.mark.parametrize("bandwidth", ['"many"', "0.0", "-3.0", "NaN", "null", "[]"])
def test_a_hostile_calibration_is_measured_again(
    bandwidth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "tuned", None)
    stored = f'{{{json.dumps(machine_key())}: {{"bandwidth": {bandwidth}, "clock": 2.0}}}}'
    (tmp_path / "tune.json").write_text(stored)
    monkeypatch.setattr(dispatch, "seconds_of", lambda call: 0.01)
    dispatch.calibrate.cache_clear()
    try:
        assert dispatch.calibrate().bandwidth == pytest.approx((16 << 20) * 4 / 0.01 / 1e9)
    finally:
        dispatch.calibrate.cache_clear()


@SKIP
@pytest.mark.parametrize(
    "damage", ["a pipe", "a link", "a folder", "writable by all", "random bytes", "another user's"]
)
def test_odd_files_in_the_place_of_measurements(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "tuned", None)
    path = tmp_path / "tune.json"
    path.write_text('{"key": {"seconds": {"a": 1.0}, "steady": true}}')
    DAMAGES[damage](path)
    assert tune.recorded("key") is None
    tune.remember("key", {"seconds": {"a": 2.0}, "steady": True})
    tune.tuned = None
    assert tune.recorded("key") == tune.Timing({"a": 2.0}, True)


@SKIP
@pytest.mark.parametrize("damage", ["a pipe", "a link", "a folder", "writable by all", "cut to 50%", "another user's"])
def test_generated_source_is_written_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    path = write_once("x = 1\n" * 50, ".py")
    DAMAGES[damage](path)
    assert write_once("x = 1\n" * 50, ".py") == path
    assert path.read_text() == "x = 1\n" * 50
    assert not path.is_symlink()
