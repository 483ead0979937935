"""Text on consoles that are not UTF-8, names that hold what is no text, and files that are read and written as UTF-8."""

from __future__ import annotations

import ast
import importlib
import io
import os
import pkgutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import sparsify
from sparsify import S2FT, LoRA, Plan, Prune, Quantize
from sparsify.console import PLAIN, SHOWS, adapt_streams, fitting, in_full, markup, one_line, printable, visible
from sparsify.errors import PlanError, Refusal, SparsifyError
from sparsify.host.handle import Conflict, Mix
from sparsify.program.structure import Declined, Site, Structure
from sparsify.show.html_report import Section, Table, render_html

ENCODINGS = ("ascii", "cp1252", "cp932", "cp437", "latin-1", "koi8-r", "utf-8", "utf-16")
ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b[31mred\x07\r\u202e\u2028\x85\udcff[bold]<b>&é→🎉"


class Console(io.TextIOWrapper):
    """A strict stdout of some encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")

    def text(self) -> str:
        self.flush()
        buffer: Any = self.buffer
        return buffer.getvalue().decode(self.encoding)


@pytest.fixture(scope="module")
def things() -> dict[str, Any]:
    """One of every object that a user prints."""
    host = tiny.lower(tiny.llama(), S2FT(structure="both", fraction=0.3, producer_fraction=0.5))
    pruned = tiny.lower(tiny.llama(), Prune(method="magnitude"))
    lora = tiny.lower(tiny.llama(), LoRA(match="*.q_proj", rank=2))
    packed = tiny.lower(tiny.llama(), Quantize(match="*.up_proj", format="int8"))
    program = host.sparsify.program
    found: dict[str, Any] = {
        "report": host.sparsify.report, "program": program, "handle": host.sparsify, "mix": host.sparsify.active,
        "structure": program.structures[0], "sites": program.structures[0].sites, "pruned report": pruned.sparsify.report,
        "stats": pruned.sparsify.program.pruned[0], "lora": lora.sparsify.program, "packed": packed.sparsify.report,
        "refusal": Refusal("a → b", "‖W‖ ≤ 2 × 3 …"), "declined": Declined("x", "ffn", "√2 ≠ 1"), "list": [Refusal("→", "×")],
        "error": PlanError("no → here"), "error in a list": [SparsifyError("·")], "mixed": Mix({"a": 0.5, "b": 2.0}),
        "conflict": Conflict("w…", ("→", "b"), 1, 2), "plan": Plan([S2FT(units=2)]),
    }  # fmt: skip
    return found


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_a_user_prints_is_shown_on_every_console(
    things: dict[str, Any], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, thing in things.items():
        full = in_full(thing)
        console = Console(encoding)
        monkeypatch.setattr(sys, "stdout", console)
        print(thing)
        print(f"{thing!s}")
        monkeypatch.undo()
        shown = console.text()
        assert shown.count("\n") == 2 * (full.count("\n") + 1), name
        if encoding in ("utf-8", "utf-16"):
            assert shown == f"{full}\n{full}\n", name
        else:
            assert fitting(full, encoding) in shown, name


def test_words_take_the_place_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Refusal("w", "W → 2 × 3 ≤ ‖x‖ …, naïve")
    console = Console("ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert str(refusal) == r"w: W -> 2 x 3 <= ||x|| ..., na\xefve"
    assert in_full(refusal) == "w: W → 2 × 3 ≤ ‖x‖ …, naïve"
    assert repr(refusal) == r"Refusal(where='w', reason='W -> 2 x 3 <= ||x|| ..., na\xefve')"
    monkeypatch.setattr(sys, "stdout", Console("cp1252"))
    assert str(refusal) == "w: W -> 2 × 3 <= ||x|| …, naïve"
    for stdout in (None, io.StringIO(), object()):  # no console at all, or one that takes everything
        monkeypatch.setattr(sys, "stdout", stdout)
        assert str(refusal) == in_full(refusal)
    monkeypatch.undo()
    assert fitting("→", "no-such-encoding") == "→"
    assert all(words.isascii() for words in PLAIN.values())


def test_every_class_with_a_text_of_its_own_is_printable() -> None:
    """Whoever writes a `__str__` in the package gets the console's characters by `@printable`; reasons of axes are parts of texts."""
    for module in pkgutil.walk_packages(sparsify.__path__, "sparsify."):
        if module.name.startswith("sparsify.demo"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:  # an extra of its own
            assert missing.name in ("fastapi", "model_explorer", "prometheus_client", "starlette", "uvicorn"), missing
    left = []
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("sparsify."):
            continue
        own = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == name]
        texts = [(cls, vars(cls)["__str__"]) for cls in own if "__str__" in vars(cls)]
        left += [f"{name}.{cls.__qualname__}" for cls, text in texts if not hasattr(text, SHOWS)]
    assert left == ["sparsify.passes.detect.axes.Reason"]


def test_a_subclass_of_a_printable_error_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnError(SparsifyError, LookupError):
        pass

    @printable
    class Own:
        def __str__(self) -> str:
            return "→"

    monkeypatch.setattr(sys, "stdout", Console("ascii"))
    assert str(OwnError("a → b")) == "a -> b"
    assert str(Own()) == "->"
    assert str(printable(printable(Own))()) == "->"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "cp932"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_script_writes_into_a_pipe(environment: dict[str, str]) -> None:
    """A real process: report, program, warnings and a progress bar, under cp932 and under the C locale."""
    code = """
import torch, sparsify, warnings
from torch import nn
from tqdm import tqdm
class Net(nn.Module):
    def __init__(s):
        super().__init__(); s.up, s.down = nn.Linear(12, 20), nn.Linear(20, 12)
    def forward(s, x): return x + s.down(torch.relu(s.up(x)))
h = sparsify.compile(Net(), sparsify.Plan([sparsify.S2FT(structure='ffn', fraction=.3)]), example=(torch.randn(3, 12),), progress=False)
print(h.sparsify.report); print(h.sparsify.program); print(h.sparsify); print(h.sparsify.active)
warnings.warn('\\u2192 \\xd7'); list(tqdm(range(2), desc='\\u2192'))
raise sparsify.PlanError('the \\u2192 end')
"""
    known = {name: value for name, value in os.environ.items() if name not in ("LANG", "LC_CTYPE", "PYTHONUTF8")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=known | environment, timeout=300)
    assert done.returncode == 1
    assert b"UnicodeEncodeError" not in done.stderr, done.stderr
    arrow = "→".encode("cp932") if "PYTHONIOENCODING" in environment else b"->"
    assert arrow + b" down.weight[columns 0:" in done.stdout
    assert b"sparsify.errors.PlanError: the " + arrow + b" end" in done.stderr


def test_streams_of_our_programs_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console("cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", None)
    adapt_streams()
    print("→ ─ \udcff 🎉 ×")
    assert console.text() == "-> - \\udcff \\U0001f389 ×\n"


# --- names ---


def test_what_is_no_text_is_spelled_out() -> None:
    assert visible("a\tb\nc é 🎉 ‍") == "a\tb\nc é 🎉 ‍"
    assert visible(HOSTILE) == r"a\x1b[31mred\x07\r\u202e\u2028\x85\udcff[bold]<b>&é→🎉"
    assert one_line("a\nb\tc") == r"a\nb\tc"
    assert markup("<\x00>") == r"&lt;\x00&gt;"


class Named(nn.Module):
    """A feed-forward under a name that would colour a console, break a line, and open a tag."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    "name", ["\x1b[2Jgone", "one\ntwo", "[red]x[/red]", "<script>&", "\u202eback", "naïve→", "\udcff"]
)
def test_names_of_modules_are_shown_and_never_obeyed(name: str) -> None:
    try:
        program = sparsify.analyse(Named(name), (torch.randn(3, 12),))
    except SparsifyError as error:  # a name that cannot be traced is refused in words
        assert visible(str(error)) == str(error)
        return
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    (structure,) = program.structures
    assert shown in str(structure)
    for text in (str(program), str(structure), str(structure.sites[0]), program.svg()):
        assert visible(text) == text
        text.encode("utf-8")
    assert len(str(structure).split("\n")) == 1 + len(structure.sites)
    svg = program.svg()
    ElementTree.fromstring(svg)  # control characters and tags would not parse
    page = render_html(
        name,
        name,
        [Section(name, (name,), (Table(name, (name,), ((name,),), name),), text=str(program), program=program)],
    )
    assert "<script>" not in page
    assert visible(page) == page
    assert ("[red]" in page) == ("[red]" in name)


def test_a_site_and_a_refusal_stay_on_their_line() -> None:
    site = Site("a\nb.weight", 1, 1, role="down")
    structure = Structure("a\nb", "ffn", 3, (site,))
    assert str(structure).split("\n") == [r"ffn a\nb: 3 channels", r"  a\nb.weight[axis 1, block 1] down"]
    assert "\n" not in str(Refusal("a\nb", "c")) + str(Declined("a\nb", "ffn", "c"))


# --- files ---

TEXT_CALLS = {"read_text", "write_text", "open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text without saying its encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in TEXT_CALLS or any(k.arg in ("encoding", None) for k in call.keywords):
        return False
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name == "open" and isinstance(owner, ast.Name) and owner.id in ("os", "webbrowser"):
        return False  # a file descriptor
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    words += [k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
    modes = [w for w in words if isinstance(w, str) and set(w) <= set("rwabxt+") and w]
    default = "w+b" if name.endswith("TemporaryFile") else "r"
    return "b" not in (modes[0] if modes else default)


def test_files_are_opened_as_utf8() -> None:
    """No file of ours is read or written in whatever encoding the machine prefers."""
    found = []
    for folder in ("sparsify", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and opens_text(node)
            ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open(p)", True), ("open(p, 'w')", True), ("open(p, 'rb')", False), ("open(p, encoding='utf-8')", False),
        ("p.read_text()", True), ("p.write_text(t)", True), ("p.write_text(t, 'utf-8')", False), ("os.open(p, 1)", False),
        ("NamedTemporaryFile('w')", True), ("NamedTemporaryFile()", False), ("os.fdopen(1, 'w')", True), ("f.open('wb')", False),
    ],
)  # fmt: skip
def test_the_search_for_encodings_finds_them(code: str, expected: bool) -> None:
    call = ast.parse(code).body[0].value  # type: ignore[attr-defined]
    assert opens_text(call) is expected
