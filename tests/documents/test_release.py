"""The package as it is released: one version, one name, and wheels that work where only they are installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparsify
from sparsify import version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_there_is_one_version_and_one_name() -> None:
    assert "version" in PROJECT["dynamic"]
    assert sparsify.__version__ == version.__version__
    assert f"\nversion: {sparsify.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert PROJECT["name"] == version.DISTRIBUTION
    assert PROJECT["scripts"] == {"sparsify": "sparsify.cli:app"}


def test_every_extra_is_of_this_distribution_and_on_the_page() -> None:
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    for name, needs in EXTRAS.items():
        for need in needs:
            assert not need.startswith("sparsify["), "that is another project"
        if name not in ("test", "dev", "notebooks"):
            assert f"| `{name}` |" in page, name


def test_hints_name_the_distribution() -> None:
    texts = {
        p: p.read_text(encoding="utf-8") for folder in ("sparsify", "examples") for p in (ROOT / folder).rglob("*.py")
    }
    assert not [p for p, text in texts.items() if re.search(r"\bsparsify\[\w+\]", text)]
    named = {extra for text in texts.values() for extra in re.findall(r"sparsify-compiler\[(\w+)\]", text)}
    assert named
    assert named <= set(EXTRAS)


def installed(folder: Path, name: str, number: str, files: list[str]) -> None:
    place = folder / f"{name}-{number}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")
    (place / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")


def test_the_other_project_of_that_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "sparsify", "1.7.0", ["sparsify/__init__.py", "sparsify/version.py"])
    monkeypatch.syspath_prepend(tmp_path)
    assert "the distribution 'sparsify' 1.7.0 is installed beside 'sparsify-compiler'" in version.other_sparsify()


@pytest.mark.slow  # covered by the test above; the import itself takes seconds
def test_the_import_says_so(tmp_path: Path) -> None:
    installed(tmp_path, "sparsify", "1.7.0", ["sparsify/__init__.py", "sparsify/version.py"])
    done = subprocess.run(
        [sys.executable, "-c", "import sparsify"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert "run `pip uninstall sparsify sparsify-compiler`" in done.stderr


def test_an_old_checkout_of_ours_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "sparsify", "0.1.0", ["__editable__.sparsify-0.1.0.pth", "sparsify-0.1.0.dist-info/RECORD"])
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert version.other_sparsify() == ""


# --- built and installed: covered in the default run by the tests above and by test_console.py, which imports every module ----


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, source distribution), made from a copy of the files that git knows."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, (os.fsdecode(f) for f in files)):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for kind in ("sdist", "wheel"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    return next(target.glob("*.whl")), next(target.glob("*.tar.gz"))


def setuptools_is_new() -> bool:
    if find_spec("setuptools") is None:
        return False
    import setuptools

    return int(setuptools.__version__.split(".")[0]) >= 77


needs_setuptools = pytest.mark.skipif(not setuptools_is_new(), reason="wheels are built with setuptools 77 or later")


@pytest.mark.slow
@needs_setuptools
def test_wheel_and_source_hold_what_they_must(built: tuple[Path, Path]) -> None:
    wheel, source = built
    number = sparsify.__version__
    assert wheel.name == f"sparsify_compiler-{number}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(wheel).namelist())
    data = [p for p in (ROOT / "sparsify").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.relative_to(ROOT).as_posix() for p in data} <= inside
    assert {"sparsify/py.typed", f"sparsify_compiler-{number}.dist-info/licenses/LICENSE"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/", "docs/"))]
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "tests/conftest.py",
        "docs/index.md",
        "benchmarks/pages.py",
        "constraints.txt",
        "test.sh",
        "mkdocs.yml",
    } <= names


def fresh(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """(Python, site-packages) of a fresh environment in which the wheel is installed, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=300)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    return python, next(folder.glob("lib/python*/site-packages"))


@pytest.fixture(scope="module")
def elsewhere(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of such an environment, with every library of this one."""
    python, site = fresh(tmp_path_factory.mktemp("fresh") / "env", built[0])
    ours = {str(Path(spec.origin).parents[1]) for n in ("torch", "numpy") if (spec := find_spec(n)) and spec.origin}
    (site / "dependencies.pth").write_text("\n".join(sorted(ours)) + "\n", encoding="utf-8")
    return python


def needed(names: list[str]) -> set[str]:
    """Distributions that these requirements bring, and what those bring in turn; extras left out."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        if wanted.name not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            found.add(wanted.name)
            todo += [Requirement(text) for text in metadata.requires(wanted.name) or ()]
    return found


@pytest.fixture(scope="module")
def lean(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of such an environment, with what the package needs and no extra."""
    python, site = fresh(tmp_path_factory.mktemp("lean") / "env", built[0])
    for name in needed(PROJECT["dependencies"]):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)
    return python


def run(python: Path, *arguments: str, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LEAN = """
import importlib.util
import sparsify, torch
from sparsify import Plan, S2FT
print(sparsify.__file__)
print([name for name in ("transformers", "accelerate", "yaml", "bitsandbytes", "trl", "peft", "pytest") if importlib.util.find_spec(name)])
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))
x = torch.randn(3, 8)
host = sparsify.compile(torch.nn.Sequential(Block(), Block()), Plan([S2FT(structure="ffn", fraction=0.2)]), example=(x,), progress=False)
host(x).sum().backward()
host.sparsify.save_adapter("adapter")
print(host.sparsify.report)
"""


@pytest.mark.slow
@needs_setuptools
def test_the_wheel_works_without_any_extra(lean: Path, tmp_path: Path) -> None:
    printed = run(lean, "-c", LEAN, folder=tmp_path)
    place, others = printed.splitlines()[:2]
    assert Path(place).is_relative_to(lean.parents[1])
    assert others == "[]"
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
    assert run(lean, "-m", "sparsify.cli", "--version", folder=tmp_path).split()[-1] == sparsify.__version__


@pytest.mark.slow
@needs_setuptools
def test_the_wheel_has_the_command_and_what_it_reads(elsewhere: Path, tmp_path: Path) -> None:
    assert (
        run(elsewhere, str(elsewhere.parent / "sparsify"), "--version", folder=tmp_path).split()[-1]
        == sparsify.__version__
    )
    assert "attention" in run(elsewhere, str(elsewhere.parent / "sparsify"), "inspect", "llama", folder=tmp_path)


@pytest.mark.slow
@needs_setuptools
@pytest.mark.parametrize("extra", [name for name in EXTRAS if name not in ("ray", "explorer")])  # large downloads
def test_an_extra_resolves_beside_the_torch_that_is_there(built: tuple[Path, Path], extra: str) -> None:
    """Nothing is installed; needs the package index where something of the extra is not here."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", "-c", str(ROOT / "constraints.txt"), f"{built[0]}[{extra}]"],
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = {item["metadata"]["name"].lower() for item in json.loads(done.stdout)["install"]}
    assert "torch" not in wanted, "a plain torch would replace the one that is there"
