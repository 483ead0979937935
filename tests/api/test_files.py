"""Files: whole or not at all, hashed, refused by name when damaged, odd, foreign or ambiguous; old formats still open."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsify
from sparsify import AdapterError, LoRA, Plan, Prune, SparsifyError
from sparsify.adapters import adapter as adapters
from sparsify.errors import PlanError
from sparsify.files import atomic, kinds, strict_json
from sparsify.files.atomic import WriteError, committing, replacing, write_bytes, write_text, writing
from sparsify.files.regular import open_regular
from sparsify.files.tensor_file import FolderTensors
from sparsify.files.tensors import CONTENT, Part, TensorFile, tensor_file, write_tensors
from sparsify.pruning.collect import View
from sparsify.pruning.on_disk import hugging_face_config, prune_on_disk
from sparsify.pruning.resume import ResumeStore
from sparsify.pruning.sparse_checkpoint import SparseCheckpointError, open_sparse, save_sparse
from sparsify.pruning.streaming import FolderMasks, file_label, shard_name
from sparsify.train.schedules import MASK_FILE, STATE_FILE, read_state, write_state
from sparsify.train.teacher import TeacherCache, TeacherStates

WANDA = Plan([Prune(sparsity=0.5, method="wanda")])


def rows(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the writer -----------------------------------------------------------------------------------------------------------


def test_the_mode_comes_from_the_umask_and_nothing_else_is_left(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            write_text(tmp_path / "a" / "b.json", "{}")
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "a" / "b.json").stat().st_mode) == mode
    assert rows(tmp_path / "a") == ["b.json"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "quota is used up"),
        (errno.EROFS, "read-only; write to another place"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EIO, "input/output error; check it"),
        (errno.EBUSY, "check the folder, or write to another place"),
    ],
)
@pytest.mark.parametrize("at", ["open", "fsync", "replace"])
def test_what_goes_wrong_names_path_cause_and_remedy(
    number: int, advice: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, at, fails)
    with pytest.raises(WriteError, match=re.escape(str(path))) as caught:
        write_text(path, "new")
    monkeypatch.undo()
    assert isinstance(caught.value, SparsifyError)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == number
    assert os.strerror(number) in str(caught.value)
    assert advice in str(caught.value)
    assert path.read_text() == "old"
    assert rows(tmp_path) == ["a.txt"]


def test_a_limit_on_the_size_of_files_is_an_error_of_ours(tmp_path: Path) -> None:
    """The kernel's own refusal in the middle of a write, as a full disk gives it."""
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors(path, {"w": torch.zeros(3)}, {})
    old = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(WriteError, match="raise the limit"):
            write_tensors(path, {"w": torch.zeros(50_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert rows(tmp_path) == ["a.safetensors"]


def in_the_way(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    return {
        "a folder": (tmp_path / "folder", "a folder of that name is in the way"),
        "a file as folder": (tmp_path / "file" / "a", "a file is where a folder is needed"),
        "a file as folder above": (tmp_path / "file" / "a" / "b", "a file is where a folder is needed"),
        "a pipe": (tmp_path / "pipe", "something that is not a file"),
        "a device": (Path("/dev/null"), "something that is not a file"),
        "a long name": (tmp_path / ("a" * 300), "the name is too long"),
        "a NUL": (tmp_path / "a\0b", "NUL character"),
        "half a pair": (tmp_path / "a\ud800b", "characters that this system cannot store"),
        "no name": (Path(""), "a folder of that name is in the way"),
        "a circle": (tmp_path / "circle" / "a", "a file is where a folder is needed"),
    }


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    cases = in_the_way(tmp_path)
    before = rows(tmp_path)
    for label, (path, text) in cases.items():
        with pytest.raises(WriteError, match=text):
            write_bytes(path, b"new")
        assert rows(tmp_path) == before, label
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    for name in ("x" * 255, "ü" * 127):  # the longest that the file system takes
        write_bytes(tmp_path / name, b"new")
    _, host = small_host()
    for path in (tmp_path / "file", tmp_path / "file" / "deep"):
        for verb in (host.sparsify.save_adapter, host.sparsify.export_lora):
            with pytest.raises(SparsifyError, match="a file is where a folder is needed"):
                verb(path)


def test_files_of_one_commit_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_text(tmp_path / name, "old")
    with pytest.raises(ZeroDivisionError), committing() as commit:
        for name in "ab":
            with commit.writing(tmp_path / name) as file:
                file.write(b"new")
        raise ZeroDivisionError
    assert [(tmp_path / n).read_text() for n in "ab"] == ["old", "old"]
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (order.append("sync"), real_sync(d))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), real_replace(a, b))[1])
    with committing() as commit:
        for name in "ab":
            with commit.writing(tmp_path / name) as file:
                file.write(b"new")
    assert order == ["sync", "sync", "a", "b", "sync"], (
        "all on disk before the first appears, and the folder after the last"
    )
    assert [(tmp_path / n).read_text() for n in "ab"] == ["new", "new"]


def test_a_path_for_code_that_opens_it_itself(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
        assert not (tmp_path / "a").exists()
        assert atomic.is_temporary(temporary.name)
    assert (tmp_path / "a").read_text() == "x"
    assert rows(tmp_path) == ["a"]


def test_threads_write_the_same_targets(tmp_path: Path) -> None:
    """No two share a temporary name; the last complete one wins; every file that a reader sees is whole."""
    tensors = [{"w": torch.full((50, 40), float(i)) * (torch.rand(50, 40) < 0.2)} for i in range(4)]
    hosts = [small_host(seed=i)[1] for i in range(4)]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                save_sparse(tensors[i], tmp_path / "model.sparse")
                open_sparse(tmp_path / "model.sparse")
                hosts[i].sparsify.save_adapter(tmp_path / "adapter")
                with warnings.catch_warnings():  # the readable copy may be another writer's
                    warnings.simplefilter("ignore")
                    adapters.load(tmp_path / "adapter")
                write_text(tmp_path / "report.html", str(i) * 10_000)
                assert len(set((tmp_path / "report.html").read_text())) == 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert rows(tmp_path) == ["adapter", "model.sparse", "report.html"]
    assert rows(tmp_path / "adapter") == ["adapter.json", "adapter.safetensors"]
    found = open_sparse(tmp_path / "model.sparse").tensor("w")
    assert any(torch.equal(found, t["w"]) for t in tensors)


def killed_in_the_middle(path: Path) -> None:
    """A child process that is killed while it writes `path`."""
    child = os.fork()
    if child == 0:
        with writing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_what_killed_writers_left_is_swept_and_living_ones_are_not(tmp_path: Path) -> None:
    killed_in_the_middle(tmp_path / "a")
    (left,) = rows(tmp_path)
    assert atomic.is_temporary(left)
    found = atomic.TEMPORARY.match(left)
    assert found is not None
    elsewhere = left.replace(found["host"], "0" * 8)
    previous = left.replace(
        f"{found['pid']}-{found['token']}", f"{os.getpid()}-{'0' * 16}"
    )  # a dead process with this one's number
    another = left.replace(f"-{found['pid']}-", f"-{os.getppid()}-")  # of a process that is alive
    for name in (elsewhere, previous, another, "mine.tmp", ".a.tmp", "a.safetensors.tmpl", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    old = elsewhere.replace("0" * 8, "1" * 8)
    (tmp_path / old).write_bytes(b"x")
    former = (
        "a.tmp4194304",
        ".a.0abcdef_",
        ".a.0abcdef_.part",
    )  # as earlier versions named theirs; no process has that number
    others = (
        f"a.tmp{os.getpid()}",
        "c.tmp4194304",
        ".a.young000",
        ".c.0abcdef_",
    )  # being written, not ours, young, not ours
    for name in (*former, *others):
        (tmp_path / name).write_bytes(b"x")
    for name in (old, *former[1:], others[3]):
        os.utime(tmp_path / name, (0, time.time() - 2 * atomic.ABANDONED_SECONDS))
    with writing(tmp_path / "b") as file:
        write_text(tmp_path / "a", "new")
        file.write(b"y")
        assert len([n for n in rows(tmp_path) if n.startswith(".b.")]) == 1, "a file that is being written stays"
    assert rows(tmp_path) == sorted(
        [*others, elsewhere, another, ".a.tmp", ".hidden", "a", "a.safetensors.tmpl", "b", "mine.tmp"]
    )
    (tmp_path / another).unlink()


# --- the reader -----------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for path, text in (
        (tmp_path / "pipe.safetensors", r"is a pipe \(FIFO\), not a file"),
        (tmp_path / "folder.safetensors", "is a folder, not a file"),
        (Path("/dev/zero"), "is a device, not a file"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "a\0b", "cannot be read"),
    ):
        with pytest.raises(SparsifyError, match=text):
            open_regular(path)
        with pytest.raises(SparseCheckpointError, match=text):
            open_sparse(path)
    (tmp_path / "folder.safetensors").rmdir()
    with pytest.raises(SparsifyError, match=r"pipe.safetensors is a pipe"):
        FolderTensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "codec can't decode"),
        (b"", "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5_000, "a whole number of 5000 digits"),
        (b"-" + b"9" * 301, "a whole number of 301 digits"),
        (b"1e999", "too large"),
        (b"[NaN]", "NaN is not a number"),
        (b"-Infinity", "-Infinity is not a number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"{'a': 1}", "Expecting property name"),
    ],
)
def test_json_that_is_no_json(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(AdapterError, match=message) as caught:
        strict_json.read(tmp_path / "a.json", AdapterError)
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: not JSON that can be read")
    assert len(str(caught.value)) < 500
    with pytest.raises(SparsifyError, match="such a file has at most 3"):
        (tmp_path / "a.json").write_bytes(b"[1,2]")
        strict_json.read(tmp_path / "a.json", limit=3)


def test_json_that_is() -> None:
    for value in (9 * 10**299, -(2**63), 1.5e308, {"a": {"a": [None, True, "ü\u2028"]}}, "\\u00e9"):
        assert strict_json.parse(json.dumps(value), "x") == value
    assert strict_json.parse(b"\xef\xbb\xbf[1]", "x") == [1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.arange(6, 12.0).view(2, 3),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "note": "ü"})
    return tmp_path / "x.safetensors"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_all(path: Path) -> dict[str, Tensor]:
    opened = TensorFile(path)
    opened.require_hashes()
    return {name: opened.read(name) for name in opened.parts}


def test_other_tools_read_what_is_written_and_the_other_way_round(file: Path, tmp_path: Path) -> None:
    ours, theirs = read_all(file), load_file(file)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    save_file(theirs, tmp_path / "y.safetensors", {"format": "pt"})
    opened = TensorFile(tmp_path / "y.safetensors")
    assert opened.hashes is None
    assert all(torch.equal(opened.read(n), t) for n, t in theirs.items())
    with pytest.raises(SparsifyError, match="content hashes are missing"):
        opened.require_hashes()
    with safe_open(file, "pt") as opened_by_theirs:
        metadata = opened_by_theirs.metadata()
    save_file(
        {n: t.clone() for n, t in theirs.items()}, tmp_path / "y.safetensors", metadata
    )  # another order of tensors and metadata
    assert all(torch.equal(t, theirs[n]) for n, t in read_all(tmp_path / "y.safetensors").items())


def test_every_bit_counts(file: Path) -> None:
    """Of header and data alike; a blank of the padding may become another blank."""
    raw = file.read_bytes()
    whole = {n: t.clone() for n, t in read_all(file).items()}
    for at in range(len(raw)):
        for bit in ((0, 3, 5, 7)[at % 4],) if 8 <= at < len(raw) - 51 else range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            file.write_bytes(bytes(changed))
            try:
                found = read_all(file)
            except SparsifyError as error:
                assert str(error).startswith(str(file)), "the file is named"
                continue
            assert all(torch.equal(found[n], t) for n, t in whole.items()), (at, bit)
            assert {chr(raw[at]), chr(changed[at])} <= set(" \t\n\r"), (at, bit)
    for length in (*range(0, len(raw), 7), len(raw) - 1):
        file.write_bytes(raw[:length])
        with pytest.raises(SparsifyError, match="damaged or not a safetensors file"):
            read_all(file)
    for extra in (b"\0", raw):
        file.write_bytes(raw + extra)
        with pytest.raises(SparsifyError, match="cut or extended"):
            read_all(file)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tensors swapped": (
        lambda h: (h["a"].update(data_offsets=h["b"]["data_offsets"]), h["b"].update(data_offsets=old_offsets(h["a"], h["b"]))),
        "tensor 'a' is not what was written|overlaps",
    ),
    "names swapped": (lambda h: h.update(a=h["b"], b=h["a"]), "tensor '[ab]' is not what was written"),
    "another shape": (lambda h: h["a"].update(shape=[3, 2]), "tensor 'a' is not what was written"),
    "another dtype": (lambda h: h["a"].update(dtype="I32"), "tensor 'a' is not what was written"),
    "a wide dtype": (lambda h: h["a"].update(dtype="F64"), "'a' needs 48 bytes and has 24"),
    "an unknown dtype": (lambda h: h["a"].update(dtype="F3"), "'a' has dtype 'F3', which this sparsify does not know"),
    "a dtype that is no text": (lambda h: h["a"].update(dtype=[]), "'a' has dtype"),
    "a huge shape": (lambda h: h["a"].update(shape=[2**40, 2**40]), "'a' has more entries than any file"),
    "a shape of huge numbers": (lambda h: h["a"].update(shape=[10**290]), "'a' has more entries than any file"),
    "a large shape": (lambda h: h["a"].update(shape=[2**50]), "'a' needs"),
    "a negative shape": (lambda h: h["a"].update(shape=[-2, -3]), "are no sizes"),
    "a shape of truth": (lambda h: h["a"].update(shape=[True, 6]), "are no sizes"),
    "a shape of fractions": (lambda h: h["a"].update(shape=[2.0, 3]), "are no sizes"),
    "many dimensions": (lambda h: h["a"].update(shape=[1] * 100 + [6]), "are no sizes"),
    "an overlap": (lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]), "gap or overlaps"),
    "offsets outside": (lambda h: h["a"].update(data_offsets=[10**6, 10**6 + 24]), "gap or overlaps"),
    "offsets reversed": (lambda h: h["a"]["data_offsets"].reverse(), "'a' needs"),
    "three offsets": (lambda h: h["a"]["data_offsets"].append(3), "are no sizes"),
    "a field more": (lambda h: h["a"].update(stride=[1]), "'a' has no dtype, shape and data_offsets"),
    "an entry that is no object": (lambda h: h.update(a=[1]), "'a' has no dtype"),
    "a name more": (lambda h: h.update(c={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "'c' is not in both"),
    "metadata changed": (lambda h: h["__metadata__"].update(note="o"), "metadata or its content hashes are not what was written"),
    "metadata more": (lambda h: h["__metadata__"].update(more="x"), "metadata or its content hashes are not"),
    "metadata of numbers": (lambda h: h["__metadata__"].update(note=1), "its metadata must map names to texts"),
    "no metadata": (lambda h: h.pop("__metadata__"), "content hashes are missing"),
    "hashes that are no JSON": (lambda h: h["__metadata__"].update({CONTENT: "{"}), "its content hashes: not JSON"),
    "hashes that are none": (lambda h: h["__metadata__"].update({CONTENT: "[]"}), "its content hashes are malformed"),
}  # fmt: skip


def old_offsets(a: dict[str, Any], b: dict[str, Any]) -> list[int]:
    start = min(a["data_offsets"][0], b["data_offsets"][0])
    return [0, 24] if start else [24, 48]


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(case: str, file: Path) -> None:
    header, data = header_of(file)
    change, text = HEADERS[case]
    change(header)
    with_header(file, header, data)
    with pytest.raises(SparsifyError, match=text) as caught:
        read_all(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_headers_that_are_no_json_are_refused(file: Path) -> None:
    header, data = header_of(file)
    text = json.dumps(header).encode()
    for changed in (
        b"[" * 100_000,
        b"[]",
        b"1",
        text[:-1],
        text.replace(b'"flag"', b'"a"'),
        text.replace(b"[2, 3]", b"[NaN]"),
    ):
        with_header(file, changed, data)
        with pytest.raises(SparsifyError, match="damaged or not a safetensors file"):
            read_all(file)


def test_truth_values_are_checked(tmp_path: Path) -> None:
    """A bool with another byte than 0 and 1 is undefined behaviour in what computes with it."""
    save_file({"flag": torch.tensor([True, False])}, tmp_path / "x.safetensors")
    header, _ = header_of(tmp_path / "x.safetensors")
    with_header(tmp_path / "x.safetensors", header, b"\x01\x07")
    with pytest.raises(SparsifyError, match="'flag' has truth values other than 0 and 1"):
        TensorFile(tmp_path / "x.safetensors").read("flag")


def test_a_file_that_changes_while_it_is_open_is_noticed(file: Path) -> None:
    opened, kept = TensorFile(file), TensorFile(file, keep_open=True)
    write_tensors(file, {"a": torch.ones(2, 3)}, {})
    with kept:
        assert torch.equal(kept.read("a"), torch.arange(6.0).view(2, 3)), "who keeps it open reads what it opened"
    with pytest.raises(SparsifyError, match="changed since it was opened; open it again"):
        opened.read("a")


def test_names_that_the_writer_refuses(tmp_path: Path) -> None:
    part = Part("w", torch.float32, (1,))
    for parts, metadata in (
        ([part, part], {}),
        ([Part("__metadata__", torch.float32, (1,))], {}),
        ([part], {CONTENT: "x"}),
    ):
        with (
            pytest.raises(SparsifyError, match="a name that the format keeps"),
            tensor_file(tmp_path / "x", parts, metadata),
        ):
            pass
    with pytest.raises(SparsifyError, match="UTF-8 cannot hold"), tensor_file(tmp_path / "x", [part], {"a": "\ud800"}):
        pass
    assert rows(tmp_path) == []


# --- adapters -------------------------------------------------------------------------------------------------------------


def small_host(seed: int = 0, plan: Plan | None = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = tiny.Mlp()
    host = sparsify.compile(model, plan or Plan([LoRA(rank=2)]), example=torch.randn(2, 12), progress=False)
    tiny.disturb(host, seed=seed + 1)
    return model, host


def sealed_again(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The document of an adapter changed, and hashed again: what only the reader's own checks can see."""
    opened = TensorFile(path / adapters.TENSORS)
    document = json.loads(opened.metadata["sparsify"])
    text = change(document)
    tensors = {name: opened.read(name) for name in opened.parts}
    write_tensors(
        path / adapters.TENSORS, tensors, {"sparsify": text if isinstance(text, str) else json.dumps(document)}
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["entries"][0].update(scale=10**400), "a whole number of 401 digits"),
        (lambda d: d["entries"][0].update(scale=float("inf")), "Infinity is not a number"),
        (lambda d: d["entries"][0].update(scale=float("nan")), "NaN is not a number"),
        (lambda d: d["entries"][0].update(shape=[10**290]), "other shapes than the document says"),
        (lambda d: d["entries"][0].update(channels=False), "other shapes than the document says"),
        (lambda d: d["entries"][0].update(kind={}), "malformed entry"),
        (lambda d: d.update(format_version=True), "format version True"),
        (lambda d: d.update(format_version=10**290), "format version 1000"),
        (lambda d: "[" * 100_000, "nested too deeply"),
        (lambda d: json.dumps(d).replace('"info"', '"bases"'), "'bases' stands twice"),
        (lambda d: json.dumps(d).replace("sparsify-adapter", "\\ud800"), "surrogates not allowed"),
    ],
)  # fmt: skip
def test_documents_with_odd_values_are_refused(change: Any, text: str, tmp_path: Path) -> None:
    _, host = small_host()
    host.sparsify.save_adapter(tmp_path)
    sealed_again(tmp_path, change)
    before = tiny.snapshot(host)
    with pytest.raises(AdapterError, match=text):
        host.sparsify.load_adapter(tmp_path, "x")
    tiny.assert_same(tiny.snapshot(host), before)


def test_a_scale_that_is_a_large_number_is_one(tmp_path: Path) -> None:
    _, host = small_host()
    host.sparsify.save_adapter(tmp_path)
    sealed_again(tmp_path, lambda d: d["entries"][0].update(scale=2**70))
    with pytest.warns(UserWarning, match=r"adapter.json is damaged or of another adapter"):
        assert adapters.load(tmp_path).deltas[0].scale == 2.0**70


def test_an_adapter_of_version_1_opens_and_its_hashes_may_not_be_dropped(tmp_path: Path) -> None:
    _, host = small_host()
    host.sparsify.save_adapter(tmp_path)
    now = adapters.load(tmp_path)
    document = json.loads((tmp_path / adapters.DOCUMENT).read_text())
    tensors = {n: t.clone() for n, t in load_file(tmp_path / adapters.TENSORS).items()}
    save_file(tensors, tmp_path / adapters.TENSORS, {"sparsify": json.dumps(document)})
    with pytest.raises(AdapterError, match="content hashes are missing, which this version of the format has"):
        adapters.load(tmp_path)
    document["format_version"] = 1  # as version 1 was written, byte for byte but for the order of its names
    save_file(tensors, tmp_path / adapters.TENSORS, {"sparsify": json.dumps(document, sort_keys=True)})
    (tmp_path / adapters.DOCUMENT).write_text(json.dumps(document, indent=1, sort_keys=True))
    old = adapters.load(tmp_path)
    assert (old.bases, old.info) == (now.bases, now.info)
    assert all(
        torch.equal(a.values, b.values) and a.scale == b.scale for a, b in zip(old.deltas, now.deltas, strict=True)
    )
    host.sparsify.load_adapter(tmp_path, "old")
    host.sparsify.set_adapter("old")


# --- what lies beside what ------------------------------------------------------------------------------------------------


def dense_beside(folder: Path) -> None:
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")


def index_beside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def sparse_beside(folder: Path) -> None:
    save_sparse({"w": torch.ones(3)}, folder / "model.sparse")


def resume_beside(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"version": 1, "fingerprint": "0"}))


def adapter_beside(folder: Path) -> None:
    small_host()[1].sparsify.save_adapter(folder)


def peft_beside(folder: Path) -> None:
    small_host()[1].sparsify.export_lora(folder)


def write_resume(folder: Path) -> None:
    x = torch.randn(4, 12)
    sparsify.compile(tiny.Mlp(), WANDA, calibration=[x], example=x, progress=False, resume_dir=folder)


def write_dense(folder: Path) -> None:
    save_sparse({"w": torch.ones(3)}, folder.parent / "other.sparse")
    open_sparse(folder.parent / "other.sparse").save_dense(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    kinds.ADAPTER: adapter_beside,
    kinds.PEFT: peft_beside,
    kinds.SPARSE: sparse_beside,
    kinds.RESUME: write_resume,
    kinds.DENSE: write_dense,
}
THERE: dict[str, tuple[Callable[[Path], None], ...]] = {
    kinds.ADAPTER: (adapter_beside,),
    kinds.PEFT: (peft_beside,),
    kinds.SPARSE: (sparse_beside,),
    kinds.RESUME: (resume_beside,),
    kinds.DENSE: (dense_beside, index_beside),
}
FINE = {(kinds.ADAPTER, kinds.DENSE), (kinds.ADAPTER, kinds.SPARSE), (kinds.SPARSE, kinds.ADAPTER)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("there", THERE)
def test_no_kind_is_written_beside_another_that_a_reader_would_take(there: str, writer: str, tmp_path: Path) -> None:
    for number, prepare in enumerate(THERE[there]):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        if there == writer and writer != kinds.DENSE:
            if writer != kinds.RESUME:
                WRITERS[writer](folder)  # over itself
            continue
        if (writer, there) in FINE:
            WRITERS[writer](folder)
        else:
            with pytest.raises(SparsifyError, match=r"choose another folder|holds a model already") as caught:
                WRITERS[writer](folder)
            assert str(folder) in str(caught.value)
        assert {n: (folder / n).read_bytes() for n in before} == before, "what was there is as it was"


def test_a_folder_with_two_adapters_is_ambiguous(tmp_path: Path) -> None:
    _, host = small_host()
    host.sparsify.export_lora(tmp_path / "peft")
    host.sparsify.save_adapter(tmp_path / "ours")
    for path in (tmp_path / "peft").iterdir():  # as earlier versions left it
        (tmp_path / "ours" / path.name).write_bytes(path.read_bytes())
    for load in (lambda: host.sparsify.load_adapter(tmp_path / "ours", "x"), lambda: adapters.load(tmp_path / "ours")):
        with pytest.raises(AdapterError, match=r"holds two adapters: adapter.safetensors .* and adapter_config.json"):
            load()
    assert adapters.load(tmp_path / "ours" / adapters.TENSORS).deltas  # the file itself is not ambiguous


def test_an_adapter_beside_a_model_is_no_part_of_it(tmp_path: Path) -> None:
    dense_beside(tmp_path)
    adapter_beside(tmp_path)
    assert set(FolderTensors(tmp_path)) == {"w"}
    assert adapters.load(tmp_path).deltas


# --- folders of tensors -----------------------------------------------------------------------------------------------------


def indexed(folder: Path, places: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model-a.safetensors", {"a": torch.ones(2)}, {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({"a": "../out.safetensors"}, "not a safetensors file of this folder"),
        ({"a": "{tmp}/out.safetensors"}, "not a safetensors file of this folder"),
        ({"a": "sub/../../out.safetensors"}, "not a safetensors file of this folder"),
        ({"a": "..\\out.safetensors"}, "not a safetensors file of this folder"),
        ({"a": "config.json"}, "not a safetensors file of this folder"),
        ({"a": ""}, "not a safetensors file of this folder"),
        ({"a": "link.safetensors"}, "is a link that leads out of its folder"),
        ({"a": "none.safetensors"}, "no such file"),
        ({"a": "pipe.safetensors"}, r"is a pipe \(FIFO\)"),
        ({"a": "a\0.safetensors"}, "cannot be read|embedded null"),
        ({"a": 3}, "'weight_map' must map tensors to files"),
        ({"a": None}, "'weight_map' must map tensors to files"),
        ([], "'weight_map' must map tensors to files"),
        ({}, "'weight_map' must map tensors to files"),
        ({"b": "model-a.safetensors"}, "'b' is said to be in model-a.safetensors, which has no such tensor"),
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_folder(places: Any, text: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "out.safetensors", {"a": torch.zeros(2)}, {})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to("../out.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    if isinstance(places, dict):
        places = {n: f.replace("{tmp}", str(tmp_path)) if isinstance(f, str) else f for n, f in places.items()}
    indexed(folder, places)
    for read in (FolderTensors, FolderMasks, lambda f: save_sparse(f, tmp_path / "x.sparse")):
        with pytest.raises(SparsifyError, match=text):
            read(folder)
    assert not (tmp_path / "x.sparse").exists()


def test_an_index_that_is_damaged_or_a_pipe(tmp_path: Path) -> None:
    for number, text in enumerate((b"", b"[]", b"{", b"\xff\xfe", b'{"weight_map": []}', b"[" * 100_000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_bytes(text)
        with pytest.raises(SparsifyError, match=r"model.safetensors.index.json"):
            FolderTensors(folder)
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(SparsifyError, match="is a pipe"):
        FolderTensors(tmp_path)


def test_the_cache_of_the_hub_keeps_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert torch.equal(FolderTensors(snapshot)["w"], torch.ones(3))
    (tmp_path / "secret").write_bytes((blobs / "0123").read_bytes())
    (snapshot / "more.safetensors").symlink_to("../../../secret")
    with pytest.raises(SparsifyError, match="leads out of its folder"):
        FolderTensors(snapshot)


def test_folders_that_are_not_complete_or_hold_two(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(SparsifyError, match="has 1 of 2 shards and no model.safetensors.index.json"):
        FolderTensors(tmp_path)
    write_tensors(tmp_path / "model-00002-of-00002.safetensors", {"b": torch.ones(2)}, {})
    assert set(FolderTensors(tmp_path)) == {"a", "b"}
    write_tensors(tmp_path / "more.safetensors", {"a": torch.zeros(2)}, {})
    with pytest.raises(
        SparsifyError, match=r"tensor 'a' is in model-00001-of-00002.safetensors and in more.safetensors"
    ):
        FolderTensors(tmp_path)
    dense_beside(indexed(tmp_path / "two", {"a": "model-a.safetensors"}))
    with pytest.raises(SparsifyError, match="holds two models"):
        FolderTensors(tmp_path / "two")


def test_expanding_that_fails_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sparse({"a": torch.ones(20), "b": torch.ones(20), "c": torch.ones(20)}, tmp_path / "a.sparse")
    found = open_sparse(tmp_path / "a.sparse")
    real = found.file.read

    def fails(name: str) -> Tensor:
        if name == "c":
            raise found.file.bad("gone")
        return real(name)

    monkeypatch.setattr(found.file, "read", fails)
    with pytest.raises(SparseCheckpointError, match="gone"):
        found.save_dense(tmp_path / "dense", shard_bytes=90)
    assert rows(tmp_path / "dense") == []


# --- sparse checkpoints ------------------------------------------------------------------------------------------------------


def test_a_value_that_changed_is_refused_when_opened_and_the_host_stays(tmp_path: Path) -> None:
    model = nn.Linear(16, 16)
    with torch.no_grad():
        model.weight.mul_(torch.rand(16, 16) < 0.25)
    save_sparse(model, tmp_path / "a.sparse")
    raw = bytearray((tmp_path / "a.sparse").read_bytes())
    opened = open_sparse(tmp_path / "a.sparse")
    for name in opened.file.parts:
        changed = raw.copy()
        changed[opened.file.offsets[name]] ^= 4
        (tmp_path / "b.sparse").write_bytes(changed)
        with pytest.raises(SparseCheckpointError, match=f"b.sparse: damaged: tensor '{name}' is not what was written"):
            open_sparse(tmp_path / "b.sparse")
    changed = raw.copy()
    changed[opened.file.offsets["bias"]] ^= 4
    (tmp_path / "a.sparse").write_bytes(changed)
    other = nn.Linear(16, 16)
    before = tiny.snapshot(other)
    with pytest.raises(SparseCheckpointError, match="changed since it was opened"):
        opened.load_into(other)
    tiny.assert_same(tiny.snapshot(other), before)


def test_a_sparse_checkpoint_of_version_1_opens(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(9, 9) * (torch.rand(9, 9) < 0.2), "b": torch.ones(3)}
    save_sparse(tensors, tmp_path / "a.sparse", base="0" * 64)
    opened = open_sparse(tmp_path / "a.sparse")
    parts = {name: opened.part(name) for name in opened.file.parts}
    save_file(parts, tmp_path / "b.sparse", {**opened.file.metadata, "version": "2"})
    with pytest.raises(SparseCheckpointError, match="content hashes are missing"):
        open_sparse(tmp_path / "b.sparse")
    save_file(parts, tmp_path / "b.sparse", {**opened.file.metadata, "version": "1"})
    old = open_sparse(tmp_path / "b.sparse", base="0" * 64)
    assert all(torch.equal(old.tensor(n), t) for n, t in tensors.items())
    with pytest.raises(SparseCheckpointError, match="the format keeps 'version' for itself"):
        save_sparse(tensors, tmp_path / "c.sparse", metadata={"version": "9"})


# --- interrupted pruning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Path], Any]]:
    """A resume folder of a whole run, and what goes on from a copy of it."""
    torch.manual_seed(0)
    model, x = tiny.Mlp(), torch.randn(7, 12)
    plan = Plan([Prune(sparsity=0.5, method="wanda", match="layers.*")])
    folder = tmp_path_factory.mktemp("resume") / "rd"

    def go_on(place: Path) -> Any:
        return sparsify.compile(model, plan, calibration=[x], example=x, progress=False, resume_dir=place)

    go_on(folder)
    return folder, go_on


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_damaged_resume_folder_is_refused_by_name(resumed: Any, tmp_path: Path) -> None:
    source, go_on = resumed
    groups = sorted(path.name for path in source.glob("group-*"))
    raw = (source / groups[0]).read_bytes()
    data = len(raw) - 40
    cases: dict[str, tuple[bytes, str]] = {
        "truncated": (raw[: len(raw) // 2], "damaged or not a safetensors file"),
        "empty": (b"", "damaged or not a safetensors file"),
        "extended": (raw + b"\0", "cut or extended"),
        "a bit": (raw[:data] + bytes([raw[data] ^ 64]) + raw[data + 1 :], "is not what was written"),
        "another group": ((source / groups[1]).read_bytes(), "belongs to other layers or to another run"),
        "no hashes": (raw.replace(CONTENT.encode(), b"x" * len(CONTENT)), "content hashes are missing"),
    }
    for number, (label, (changed, text)) in enumerate(cases.items()):
        folder = copied(source, tmp_path / str(number))
        (folder / groups[0]).write_bytes(changed)
        with pytest.raises(PlanError, match=text) as caught:
            go_on(folder)
        assert str(folder / groups[0]) in str(caught.value), label
        assert f"delete {groups[0]} to prune its layers again, or {folder} to start over" in str(caught.value)
    folder = copied(source, tmp_path / "pipe")
    (folder / groups[0]).unlink()
    os.mkfifo(folder / groups[0])
    with pytest.raises(PlanError, match="is a pipe"):
        go_on(folder)
    (folder / groups[0]).unlink()  # as the message says
    tiny.assert_same(tiny.state_of(go_on(folder)), tiny.state_of(go_on(source)))


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe",
        b"",
        b"[]",
        b"null",
        b'{"fingerprint": 3}',
        b'{"version": 2}',
        b"[" * 100_000,
        b'{"fingerprint": NaN}',
    ],
)
def test_a_damaged_state_is_refused_by_name(text: bytes, resumed: Any, tmp_path: Path) -> None:
    source, go_on = resumed
    folder = copied(source, tmp_path / "rd")
    (folder / "state.json").write_bytes(text)
    with pytest.raises(PlanError, match=f"delete {folder} to start over") as caught:
        go_on(folder)
    assert str(folder / "state.json") in str(caught.value)


def test_a_state_of_another_version(resumed: Any, tmp_path: Path) -> None:
    source, go_on = resumed
    state = json.loads((source / "state.json").read_text())
    for version in (3, True, "2", None, 10**100):
        folder = copied(source, tmp_path / f"rd{len(str(version))}{version!s:.3}")
        (folder / "state.json").write_text(json.dumps({**state, "version": version}))
        with pytest.raises(PlanError, match="this sparsify reads versions 1 to 2"):
            go_on(folder)


def test_a_resume_folder_of_version_1_goes_on(resumed: Any, tmp_path: Path) -> None:
    """As version 1 wrote it: no hashes, statistics with NaN, and nothing that says which group it is."""
    source, go_on = resumed
    folder = copied(source, tmp_path / "rd")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "version": 1}))
    for path in folder.glob("group-*"):
        opened = TensorFile(path)
        stats = json.loads(opened.metadata["stats"])
        stats[0]["error"] = float("nan")
        tensors = {name: opened.read(name) for name in opened.parts}
        save_file(tensors, path, {"stats": json.dumps(stats)})
    host = go_on(folder)
    tiny.assert_same(tiny.state_of(host), tiny.state_of(go_on(source)))
    assert any(layer.error != layer.error for layer in host.sparsify.program.pruned)
    path = sorted(folder.glob("group-*"))[0]
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    for change, text in (
        ({"values.0": tensors["values.0"].half()}, "values.0 is torch.float16"),
        ({"values.0": tensors["values.0"][1:]}, "values.0 is torch.float32"),
        ({"bits.0": tensors["bits.0"][1:]}, "bits.0 is torch.uint8"),
        ({"bits.0": tensors["bits.0"] * 0}, "is not zero where it was pruned"),
        ({"values.0": tensors["values.0"] * float("nan")}, "not zero where it was pruned, or not finite"),
        ({"more": torch.ones(1)}, "'more' is missing, or too many"),
    ):
        save_file({**tensors, **change}, path, {"stats": json.dumps(stats)})
        with pytest.raises(PlanError, match=text):
            go_on(folder)
    for text in ("", "[]", "{}", "[1]", '[{"error": 1}]', "[" * 100_000, json.dumps([{**stats[0], "tokens": "x"}])):
        save_file(tensors, path, {"stats": text})
        with pytest.raises(PlanError, match="its statistics|in its statistics"):
            go_on(folder)


def test_a_group_of_two_dtypes_comes_back(tmp_path: Path) -> None:
    views = [View("a", 0, (3, 5), (5, 1)), View("b", 0, (2, 5), (5, 1))]
    stats = {"method": "wanda", "error": float("nan"), "energy": 2.0, "tokens": 7, "seconds": 0.5, "note": "ü"}
    masks = [torch.rand(view.shape) < 0.5 for view in views]
    values = [torch.randn(3, 5) * masks[0], (torch.randn(2, 5) * masks[1]).bfloat16()]
    store = ResumeStore(tmp_path / "rd", "f")
    assert store.load(views, {}) is None
    store.save({view: (v, m, stats) for view, v, m in zip(views, values, masks, strict=True)})
    found = ResumeStore(tmp_path / "rd", "f").load(views, {"a": torch.float32, "b": torch.bfloat16})
    assert found is not None
    for view, v, m in zip(views, values, masks, strict=True):
        assert torch.equal(found[view][0], v)
        assert torch.equal(found[view][1], m)
        assert repr(found[view][2]) == repr(stats)
    with pytest.raises(PlanError, match="values.1 is torch.bfloat16"):
        store.load(views, {"a": torch.float32, "b": torch.float32})


class Blocks(nn.Module):
    """Three equal blocks, which are streamed one by one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Path], Any]]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("stream")
    (root / "dense").mkdir()
    save_file(Blocks().state_dict(), root / "dense" / "weights.safetensors")
    x = torch.randn(7, 12)

    def go_on(target: Path) -> Any:
        return prune_on_disk(
            root / "dense", target, WANDA, build=Blocks, example=x, calibration=[x], progress=False
        )  # fmt: skip

    go_on(root / "target")
    return root / "target", go_on


def copied_stream(source: Path, target: Path) -> Path:
    copied(source, target)
    copied(source / "pruning", target / "pruning")
    return target


def test_a_damaged_stream_is_refused_by_name(streamed: Any, tmp_path: Path) -> None:
    source, go_on = streamed
    record, shard = Path("pruning") / "layers.1.safetensors", Path("model-layers-1.safetensors")
    before = {n: t.clone() for n, t in FolderTensors(source).items()}
    cases: list[tuple[Path, Callable[[bytes], bytes], str]] = [
        (record, lambda b: b[:-1], "cut or extended"),
        (record, lambda b: b"", "damaged or not a safetensors file"),
        (record, lambda b: b.replace(CONTENT.encode(), b"x" * len(CONTENT)), "content hashes are missing"),
        (record, lambda b: b.replace(b'\\"method\\"', b'\\"methad\\"'), "not what was written"),
        (shard, lambda b: b[: len(b) // 2], "damaged or not a safetensors file"),
        (shard, lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:], "is not what was written"),
        (shard, lambda b: (source / "model-layers-0.safetensors").read_bytes(), "is not the shard that"),
    ]
    for number, (path, change, text) in enumerate(cases):
        target = copied_stream(source, tmp_path / str(number))
        (target / path).write_bytes(change((source / path).read_bytes()))
        with pytest.raises(SparsifyError, match=text) as caught:
            go_on(target)
        assert path.name in str(caught.value)
        assert "to prune its layers again" in str(caught.value)
        if number in (0, 4):
            (target / path).unlink()  # as the message says
            go_on(target)
            tiny.assert_same(dict(FolderTensors(target)), before)
    for text in (b"\xff", b"[]", b"{}", b'{"run": 3}', b"[" * 100_000):
        target = copied_stream(source, tmp_path / f"run{len(text)}{text[:1]!r}")
        (target / "pruning" / "run.json").write_bytes(text)
        with pytest.raises(PlanError, match=r"run.json.*is damaged; delete .* to start again"):
            go_on(target)


def test_a_stream_of_version_1_goes_on(streamed: Any, tmp_path: Path) -> None:
    source, go_on = streamed
    target = copied_stream(source, tmp_path / "target")
    run = json.loads((target / "pruning" / "run.json").read_text())
    (target / "pruning" / "run.json").write_text(json.dumps({"run": run["run"]}))
    for path in (*target.glob("*.safetensors"), *(target / "pruning").glob("*.safetensors")):
        opened = TensorFile(path)
        stats = (
            {"stats": opened.metadata["stats"].replace("null", "NaN")}
            if "stats" in opened.metadata
            else {"format": "pt"}
        )
        tensors = {name: opened.read(name) for name in opened.parts}
        save_file(tensors, path, stats)
    changed = {path: path.stat().st_mtime_ns for path in (target / "pruning").glob("layers.*")}
    assert len(go_on(target).layers) == len(go_on(source).layers)
    assert {path: path.stat().st_mtime_ns for path in changed} == changed, "nothing was pruned again"
    tiny.assert_same(dict(FolderTensors(target)), dict(FolderTensors(source)))
    masks = FolderMasks(target)
    assert masks
    assert all(torch.equal(masks[n], m) for n, m in FolderMasks(source).items())


def test_records_that_do_not_fit_the_folder(streamed: Any, tmp_path: Path) -> None:
    source, _ = streamed
    for number, (bits, text) in enumerate(
        (
            ({"nothing": torch.zeros(3, dtype=torch.uint8)}, "a mask of 'nothing', which the folder does not have"),
            ({"head.weight": torch.zeros(3, dtype=torch.uint8)}, "does not fit 60 weights"),
            ({"head.weight": torch.zeros(8)}, "is torch.float32"),
        )
    ):
        target = copied_stream(source, tmp_path / str(number))
        write_tensors(target / "pruning" / "x.safetensors", bits, {})
        with pytest.raises(SparsifyError, match=text):
            save_sparse(target, tmp_path / "x.sparse")
    target = copied_stream(source, tmp_path / "unfinished")
    (target / "model.safetensors.index.json").unlink()
    with pytest.raises(SparsifyError, match="is an unfinished prune_on_disk run"):
        FolderTensors(target)


def test_module_names_make_files_of_this_folder() -> None:
    names = ["a", "a.b", "a-b", "a/b", "../a", "/etc/a", "a\0b", "x" * 400, "", "rest", "ü", "a\ud800"]
    made = [shard_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert made[:2] == ["model-a.safetensors", "model-a-b.safetensors"], "plain names as ever"
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,140}", name) for name in (*made, *map(file_label, names[:-4])))


# --- model folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (b"\xff\xfe", "not JSON that can be read"),
        (b"[]", "a config must be a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model_type": "llama", "num_hidden_layers": 1000000000}', "models have at most 10,000 layers"),
        (b'{"model_type": "t5", "x": {"num_layers": 100000}}', "models have at most 10,000 layers"),
        (b'{"model_type": "no-such-model"}', "transformers cannot read it"),
        (b'{"model_type": 3}', "transformers cannot read it|no class"),
        (b'{"model_type": "llama", "architectures": ["AutoModel"]}', "no class AutoModel"),
        (b'{"model_type": "llama", "architectures": [3]}', "no class 3"),
        (b'{"model_type": "llama", "architectures": "LlamaForCausalLM"}', "no class none|cannot read it"),
        (b'{"model_type": "x", "auto_map": {"AutoConfig": "evil--code.Config"}}', "cannot read it"),
    ],
)  # fmt: skip
def test_configs_that_make_no_model(document: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(document)
    with pytest.raises(PlanError, match=text) as caught:
        hugging_face_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_config_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(PlanError, match="is a pipe"):
        hugging_face_config(tmp_path)


class Hungry(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1 << 30), persistent=False)


def test_a_model_that_does_not_fit_its_files_takes_no_memory(tmp_path: Path) -> None:
    save_file(Blocks().state_dict(), tmp_path / "weights.safetensors")
    x = torch.randn(3, 12)
    with pytest.raises(SparsifyError, match=r"buffers need 4.0 GiB, its files have 0.0 GiB"):
        prune_on_disk(tmp_path, tmp_path / "out", WANDA, build=Hungry, example=x, calibration=[x])

    class Wide(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 1 << 40)

    with pytest.raises(
        SparsifyError, match=r"weights.safetensors: 'head.weight' has shape \(5, 12\), the model \(1099511627776, 12\)"
    ):
        prune_on_disk(tmp_path, tmp_path / "out", WANDA, build=Wide, example=x, calibration=[x])
    assert not (tmp_path / "out").exists()


# --- what training leaves -------------------------------------------------------------------------------------------------------


def test_masks_of_gradual_pruning_are_checked(tmp_path: Path) -> None:
    state = {"sparsity": 0.25, "masks": {"w": torch.tensor([3, 7], dtype=torch.uint8)}}
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert found["sparsity"] == 0.25
    assert torch.equal(found["masks"]["w"], state["masks"]["w"])
    raw = (tmp_path / MASK_FILE).read_bytes()
    for changed in (raw[:-1], raw[:-1] + bytes([raw[-1] ^ 1])):
        (tmp_path / MASK_FILE).write_bytes(changed)
        with pytest.raises(SparsifyError, match=MASK_FILE):
            read_state(tmp_path)
    (tmp_path / MASK_FILE).write_bytes(raw)
    for text, message in (
        ("[]", "must be a number from 0 to 1"),
        ('{"sparsity": 2}', "must be a number from 0 to 1"),
        ('{"sparsity": true}', "must be a number"),
        ('{"sparsity": NaN}', "NaN"),
        ('{"sparsity": 0.5}', "says another sparsity than"),
    ):
        (tmp_path / STATE_FILE).write_text(text)
        with pytest.raises(SparsifyError, match=message):
            read_state(tmp_path)
    save_file(state["masks"], tmp_path / MASK_FILE)  # as earlier versions wrote it
    (tmp_path / STATE_FILE).write_text('{"sparsity": 0.5}')
    assert read_state(tmp_path)["sparsity"] == 0.5


def test_a_damaged_state_of_the_teacher_is_computed_again(tmp_path: Path) -> None:
    cache, batch = TeacherCache(tmp_path), {"x": torch.ones(2)}
    cache.put(batch, TeacherStates([torch.ones(2, 3), torch.zeros(2)], torch.ones(4)))
    found = cache.get(batch)
    assert found is not None
    assert found.logits is not None
    assert [t.shape for t in (*found.hidden, found.logits)] == [(2, 3), (2,), (4,)]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="the teacher's states are computed again"):
        assert cache.get(batch) is None


def test_drawings_and_reports_go_through_the_same_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.Mlp()
    program = sparsify.analyse(model, torch.randn(2, 12))
    x = torch.randn(7, 12)
    host = sparsify.compile(model, WANDA, calibration=[x], example=x, progress=False)
    (tmp_path / "a.svg").mkdir()
    for draw in (program.svg, host.sparsify.draw_pruning):
        with pytest.raises(SparsifyError, match="a folder of that name is in the way"):
            draw(str(tmp_path / "a.svg"))


@pytest.fixture(autouse=True)
def _no_litter(tmp_path: Path) -> Iterator[None]:
    yield
    left = [
        p
        for p in tmp_path.rglob("*")
        if atomic.TEMPORARY.match(p.name) and p.name.split("-")[0][-8:] not in ("00000000",)
    ]
    assert not left
