"""Every script in benchmarks/ can be imported and explains itself; what it measures is tested by `-m benchmarks`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.name for p in (ROOT / "benchmarks").glob("*.py") if 'if __name__ == "__main__"' in p.read_text())


def test_there_are_scripts() -> None:
    assert {"cpu_linear.py", "train_step.py", "gpu_quantized.py", "claims.py", "real_model.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert stopped.value.code in (0, None)
    shown = capsys.readouterr().out
    assert shown.lstrip().lower().startswith("usage")
    assert script in shown
    assert "--" in shown.partition("--help")[2], "an option of its own"
