"""How commands end: one line on stderr, exit code 0, 1, 2, 130 or 141, and no traceback, whatever they are given."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import sparsify
from sparsify.cli import app
from sparsify.cli.rule import RuledCommand, RuledGroup, line_of, reading, run, verdict
from sparsify.errors import AdapterError, CaptureError, InputError, PlanError, SparsifyError, VerifyError

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
TEXT = "the cat sat on a mat and saw dogs " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's folder without a tokenizer."""
    path = tmp_path_factory.mktemp("given") / "llama"
    tiny.build("Llama").save_pretrained(path)  # type: ignore[operator]
    return path


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy"


def call(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [os.fspath(a) for a in arguments])


def refused(done: Result, code: int = 2) -> str:
    """The one line that a refusal prints."""
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert len(line) < 1200
    return line.removeprefix("error: ")


# --- the rule itself ---


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("x is damaged"), 2, "error: x is damaged"),
        (PlanError("a plan\nof two lines"), 2, "error: a plan of two lines"),
        (AdapterError("\x1b[31mred"), 2, r"error: \x1b[31mred"),
        (CaptureError("no trace"), 1, "error: no trace"),
        (VerifyError("a bug"), 1, "error: a bug"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 1, "error: out: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "error: a: No such file"),
        (OSError("odd"), 1, "error: OSError: odd (unexpected: SPARSIFY_DEBUG=1 shows where)"),
        (MemoryError(), 1, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory (Def"),
        (ModuleNotFoundError("No module named 'timm'"), 1, "error: No module named 'timm'"),
        (TypeError("a bug"), 1, "error: TypeError: a bug (unexpected: SPARSIFY_DEBUG=1 shows where)"),
        (KeyError("w"), 1, "error: KeyError: no 'w' (unexpected"),
        (RecursionError("deep"), 1, "error: RecursionError: deep (unexpected"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.BadParameter("wrong."), 2, "error: Invalid value: wrong"),
    ],
)
def test_every_kind_of_error_has_its_code_and_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise error

    assert run(body) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_full_disk_behind_another_error_is_no_bad_input() -> None:
    def wrapped(cause: Exception) -> SparsifyError:
        try:
            try:
                raise cause
            except Exception as error:
                raise SparsifyError("cannot be written") from error
        except SparsifyError as error:
            return error

    assert verdict(wrapped(OSError(errno.ENOSPC, "full")))[0] == 1
    assert verdict(wrapped(OSError(errno.EACCES, "no")))[0] == 2
    with pytest.raises(OSError, match="full"), reading("it"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(InputError, match="^it: no 'w'$"), reading("it"):
        raise KeyError("w")
    with pytest.raises(ImportError), reading("it"):
        raise ImportError("timm")


def test_long_lines_are_cut_in_the_middle() -> None:
    assert line_of("a\n\n b") == "a b"
    cut = line_of("begin " + "x" * 10_000 + " end")
    assert cut.startswith("begin ")
    assert cut.endswith(" end")
    assert " … " in cut
    assert len(cut) < 900


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise PlanError("the words")

    for value, shown in (("1", True), ("", False), ("0", False)):
        monkeypatch.setenv("SPARSIFY_DEBUG", value)
        assert run(body) == 2
        err = capsys.readouterr().err
        assert ("Traceback" in err) is shown
        assert err.endswith("error: the words\n")


def test_our_warnings_are_lines_and_others_wait(capsys: pytest.CaptureFixture[str]) -> None:
    before, disabled = warnings.showwarning, logging.root.manager.disable

    def body() -> int:
        warnings.warn_explicit("too little\ncalibration", UserWarning, os.path.join(sparsify.__path__[0], "x.py"), 1)
        warnings.warn_explicit("use the new one", DeprecationWarning, "/elsewhere/x.py", 1)
        logging.getLogger("other").warning("loud")
        return 0

    assert run(body) == 0
    assert capsys.readouterr().err == "warning: too little calibration\n"
    assert (warnings.showwarning, logging.root.manager.disable) == (before, disabled)


def test_an_app_of_one_command_and_a_caller_that_wants_exceptions() -> None:
    single, group = typer.Typer(), typer.Typer(cls=RuledGroup)

    def fail(word: str) -> None:
        raise {"type": TypeError("a"), "key": KeyboardInterrupt(), "plan": PlanError("b")}[word]

    single.command(cls=RuledCommand)(fail)
    group.command()(fail)
    group.callback()(lambda: None)
    for given, command in (([], single), (["fail"], group)):
        assert RUNNER.invoke(command, [*given, "type"]).exit_code == 1
        assert RUNNER.invoke(command, [*given, "key"]).exit_code == 130
        assert RUNNER.invoke(command, [*given, "plan"]).exit_code == 2
        assert RUNNER.invoke(command, [*given]).exit_code == 2
        for word, kind in (("plan", PlanError), ("key", KeyboardInterrupt)):
            with pytest.raises(kind):
                typer.main.get_command(command).main([*given, word], standalone_mode=False)


# --- words and numbers ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["inspect"], "Missing argument"),
        (["inspect", "bert", "--nope"], "No such option: --nope"),
        (["inspect", ""], "'' is neither a folder nor a model type"),
        (["inspect", "no-such-model"], "nothing is downloaded"),
        (["inspect", "org/name"], "neither a folder"),
        (["inspect", "[red]x[/red]"], "'[red]x[/red]' is neither"),
        (["inspect", "x" * 5000], "is neither a folder"),
        (["inspect", "\x1b[2J"], r"'\x1b[2J' is neither"),
        (["inspect", os.fsdecode(b"\xff\xfe")], r"'\udcff\udcfe' is neither"),
        (["inspect", "/dev/zero"], "/dev/zero: a device, not a folder"),
        (["inspect", "encoder-decoder"], "model type 'encoder-decoder'"),
        (["bench", "-m", "no-such-model"], "neither a folder"),
        (["bench", "-m", ""], "neither a folder"),
        (["bench", "-m", "bert", "--batch", "0"], "--batch"),
        (["bench", "-m", "bert", "--batch", "9" * 30], "--batch"),
        (["bench", "-m", "bert", "--seq", "x"], "--seq"),
        (["bench", "-m", "bert", "--sparsity", "nan"], "--sparsity"),
        (["bench", "-m", "bert", "--sparsity", "1.5"], "--sparsity"),
        (["bench", "-m", "bert", "--seconds", "inf"], "--seconds"),
        (["bench", "-m", "bert", "--seconds", "nan"], "--seconds"),
        (["bench", "-m", "bert", "--threads", "1000000000"], "--threads"),
        (["bench", "-m", "bert", "--dtype", "fp8"], "expected fp32 or int8"),
        (["adapter", "no-such-folder"], "no-such-folder: not there"),
        (["adapter", "/dev/null"], "/dev/null: a device"),
        (["adapter", "x" * 5000], "File name too long"),
        (["checkpoint", "no-such-file"], "no-such-file: not there"),
        (["checkpoint", "/dev/zero"], "/dev/zero: a device"),
        (["prune", "no-such-folder", "-o", "out"], "'no-such-folder' does not exist"),
        (["prune", "MODEL"], "Missing option"),
        (["prune", "MODEL", "-o", "out", "--method", "best"], "expected one of"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--sparsity", "nan"], "sparsity"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--sparsity", "1e999"], "sparsity"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--sparsity", "-1"], "sparsity"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--seed", "-1"], "--seed"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--seed", str(1 << 64)], "--seed"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--allocation", "x"], "expected one of"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--dtype", "\u202e"], r"--dtype \u202e"),
        (["prune", "MODEL", "-o", "out", "--method", "magnitude", "--match", ""], "empty pattern"),
        (["prune", "MODEL", "-o", "", "--method", "magnitude"], "give the folder a name"),
        (["prune", "MODEL", "-o", "/dev/null", "--method", "magnitude"], "/dev/null is there already"),
        (["prune", "MODEL", "-o", "/dev/null/out", "--method", "magnitude"], "/dev/null"),
        (["prune", "MODEL", "-o", "out", "--samples", "0"], "--samples"),
        *((["prune", "MODEL", "-o", "out", "--method", "magnitude", "--pattern", pattern], "pattern") for pattern in (
            "nonsense", "", "2:", ":4", "4:2", "0:0", "-1:4", "2:4:8", "16x", "0x0", "２:４", "9" * 30 + ":" + "9" * 31, "1e3:4e3", "nan:4",
        )),
    ],
)  # fmt: skip
def test_words_that_cannot_be_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(call(*(str(model) if a == "MODEL" else a for a in arguments)))
    assert message in line
    assert not list(tmp_path.iterdir())


# --- model folders ---


def write_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


def write_index(folder: Path, document: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")


def damage_weights(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)


def pickle_something(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"w": print}, folder / "pytorch_model.bin")


def fifo(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def link_to_device(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")


def listen(folder: Path) -> None:
    place = socket.socket(socket.AF_UNIX)
    place.bind(os.fspath(folder / "s"))
    place.close()


def other_shapes(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    save_file({name: torch.ones(3) for name in found}, folder / "model.safetensors", {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "empty config": (lambda f: (f / "config.json").write_bytes(b""), "config.json: not JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\x80\x00\xff"), "config.json: not JSON"),
    "list config": (lambda f: (f / "config.json").write_bytes(b"[]"), "expected a JSON object, found a list"),
    "deep config": (lambda f: (f / "config.json").write_bytes(b"[" * 100_000), "config.json: not JSON"),
    "folder config": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json: a folder"),
    "foreign config": (lambda f: (f / "config.json").write_bytes(b'{"a": 1}'), "config.json"),
    "unknown type": (lambda f: write_config(f, model_type="nothing"), "nothing"),
    "odd type": (lambda f: write_config(f, model_type=7), "copy"),
    "odd sizes": (lambda f: write_config(f, hidden_size="wide"), "copy"),
    "negative sizes": (lambda f: write_config(f, hidden_size=-4), "copy"),
    "endless layers": (lambda f: write_config(f, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "code": (lambda f: write_config(f, model_type="own", auto_map={"AutoConfig": "c.C", "AutoModel": "c.M"}), "brings code of its own"),
    "peft": (lambda f: (f / "adapter_config.json").write_bytes(b"{}"), "holds a PEFT adapter"),
    "fifo config": (lambda f: fifo(f, "config.json"), "config.json: a pipe (FIFO)"),
    "fifo weights": (lambda f: fifo(f, "model.safetensors"), "model.safetensors: a pipe (FIFO)"),
    "fifo tokenizer": (lambda f: fifo(f, "tokenizer.json"), "tokenizer.json: a pipe (FIFO)"),
    "fifo generation": (lambda f: fifo(f, "generation_config.json"), "generation_config.json: a pipe (FIFO)"),
    "device": (lambda f: link_to_device(f, "tokenizer_config.json"), "tokenizer_config.json: a device"),
    "socket": (listen, "s: a socket"),
    "empty weights": (lambda f: damage_weights(f, b""), "copy"),
    "garbage weights": (lambda f: damage_weights(f, b"\xff" * 999), "copy"),
    "cut weights": (lambda f: damage_weights(f, (f / "model.safetensors").read_bytes()[:-9]), "copy"),
    "foreign weights": (lambda f: save_file({"a": torch.ones(2)}, f / "model.safetensors", {"format": "pt"}), "tensor"),
    "other shapes": (other_shapes, "copy"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "copy"),
    "pickled code": (pickle_something, "copy"),
    "index outside": (lambda f: write_index(f, {"weight_map": {"a": "../x.safetensors"}}), "outside of the folder"),
    "index absolute": (lambda f: write_index(f, {"weight_map": {"a": "/etc/passwd"}}), "outside of the folder"),
    "index of windows": (lambda f: write_index(f, {"weight_map": {"a": r"c:\x"}}), "outside of the folder"),
    "index of nothing": (lambda f: write_index(f, {"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors: not there"),
    "index of the folder": (lambda f: write_index(f, {"weight_map": {"a": "."}}), "a folder, not a file"),
    "list index": (lambda f: write_index(f, []), "expected a JSON object"),
    "index without map": (lambda f: write_index(f, {}), "expected a 'weight_map'"),
    "index of numbers": (lambda f: write_index(f, {"weight_map": {"a": 3}}), "expected a 'weight_map'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_that_cannot_be_used(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Every command that takes a model, on the same damaged folder; nothing is left behind, nothing hangs."""
    change, message = DAMAGES[damage]
    monkeypatch.chdir(copy)  # sockets have short names
    change(Path("."))
    monkeypatch.chdir(tmp_path)
    looks = [] if damage == "no weights" else [["inspect"]]  # a config alone has a graph too
    for arguments in (*looks, ["bench", "--seconds", "0", "-m"], ["prune", "-o", "out", "--method", "magnitude"]):
        assert message in refused(call(*arguments, copy)).replace(str(tmp_path), "")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    "damage", ["fifo config", "fifo weights", "empty weights", "index outside", "list index", "device", "pickled code"]
)
def test_checkpoint_looks_at_damaged_folders(copy: Path, damage: str) -> None:
    change, _ = DAMAGES[damage]
    change(copy)
    refused(call("checkpoint", copy))


def test_a_damaged_tokenizer_is_named(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    for name, data in (("tokenizer.json", b"{"), ("tokenizer_config.json", b"[]"), ("tokenizer.model", b"\xff\x00")):
        (copy / name).write_bytes(data)
        line = refused(call("prune", copy, "-o", tmp_path / "out", "--calibration", tmp_path / "a.txt"))
        assert "tokenizer cannot be read" in line
        (copy / name).unlink()
    assert not (tmp_path / "out").exists()


# --- outputs ---


def test_outputs_that_are_in_the_way(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x", encoding="utf-8")
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "d.partial")
    for out, message in (
        ("file", "is there already"), ("link", "is a link"), ("full", "is there already"), ("fifo", "is there already"),
        ("d", "d.partial is in the way"), ("file/out", "file"), ("x" * 300, "File name too long"),
    ):  # fmt: skip
        assert message in refused(call("prune", model, "--out", tmp_path / out, "--method", "magnitude"))
    for svg, message in (
        (".", "a folder; give the name of a file"), ("fifo", "is not a file"), ("file/x.svg", "is not a folder"),
    ):  # fmt: skip
        assert message in refused(call("inspect", model, "--svg", tmp_path / svg))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "locked" in refused(call("prune", model, "--out", tmp_path / "locked" / "out", "--method", "magnitude"))


def test_names_that_are_not_utf8_are_shown(model: Path, tmp_path: Path) -> None:
    """The reader of safetensors takes no such name, and says so; a pickled file is read."""
    odd = tmp_path / os.fsdecode(b"m\xff[red]")
    shutil.copytree(model, odd)
    for arguments in (["checkpoint"], ["inspect"], ["prune", "-o", tmp_path / "out", "--method", "magnitude"]):
        assert r"m\udcff[red]" in refused(call(*arguments, odd))
    torch.save(load_file(model / "model.safetensors"), odd / "pytorch_model.bin")
    (odd / "model.safetensors").unlink()
    done = call("checkpoint", odd)
    assert done.exit_code == 0, done.output
    assert "21 tensors" in done.stdout
    assert r"m\udcff[red]" in refused(call("prune", model, "-o", tmp_path / "out", "--calibration", odd))


# --- processes ---


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sparsify.cli", *map(os.fspath, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_reader_that_stops_reading_is_no_fault(model: Path) -> None:
    """`sparsify checkpoint … | head -1`, also when everything fits into the pipe's buffer."""
    process = start("checkpoint", model, "--layers")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(120) == 141


@pytest.mark.slow
def test_output_that_cannot_be_written_is_said(model: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sparsify.cli", "checkpoint", model],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


@pytest.mark.slow
def test_control_c_ends_with_130(model: Path) -> None:
    process = start("bench", "-m", model, "--seconds", "300", "--seq", "7")
    assert process.stdout is not None
    process.stdout.readline()  # the report of the lowering: what follows is measuring
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == b"interrupted\n"


@pytest.mark.slow
def test_console_script_and_module_end_alike(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "sparsify"
    commands = [[sys.executable, "-m", "sparsify.cli"], [sys.executable, "-c", "from sparsify.cli import app; app()"]]
    commands += [[os.fspath(script)]] if script.exists() else []
    for command in commands:
        done = subprocess.run(
            [*command, "adapter", tmp_path], capture_output=True, timeout=120, text=True, encoding="utf-8"
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {tmp_path}: no adapter.safetensors")
        assert done.stderr.count("\n") == 1


def test_version_and_help() -> None:
    assert call("--version").stdout == f"sparsify {sparsify.__version__}\n"
    for command in ([], ["inspect"], ["adapter"], ["checkpoint"], ["prune"], ["bench"]):
        short, long = call(*command, "-h"), call(*command, "--help")
        assert short.exit_code == 0
        assert short.stdout == long.stdout != ""
    assert call().stdout == call("-h").stdout
    assert call().exit_code == 0
