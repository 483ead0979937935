"""The GPU benchmarks run without a GPU on small sizes, and the script that runs them fits its time. Times are not tested."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import require_interpreter

pytestmark = [pytest.mark.benchmarks, pytest.mark.slow]  # `test_benchmark_scripts` is the smoke test of the default run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_decode, gpu_linear, gpu_quantized, harness, saved_bytes, train_step  # noqa: E402
from sparsify.formats import FORMATS, unpack  # noqa: E402


def test_gpu_linear_runs_and_checks_every_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    record = gpu_linear.main(["--fast", "--device", "cpu"])
    kernels = {row["kernel"] for row in record["rows"]}
    assert {"dense", "stream", "stream int8", "2:4"} <= kernels
    exact = [row["error"] for row in record["rows"] if row["kernel"] in ("stream", "2:4")]
    assert max(exact) < 0.01
    assert all(row["error"] < 0.03 for row in record["rows"])
    assert all(row["us"] > 0 for row in record["rows"])
    assert any("semi-structured: RuntimeError: needs a CUDA device" in note for note in record["notes"])
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"benchmark": "gpu_linear"')


@pytest.mark.parametrize("format", FORMATS)
def test_random_bases_are_laid_out_as_the_library_lays_them_out(format: str) -> None:
    pytest.importorskip("bitsandbytes" if format == "nf4" else "torch")
    packed = gpu_quantized.random_base(format, 70, 320, "cpu")
    found = gpu_quantized.unpack_by_formula(packed, format, 70, 320, torch.float64)
    torch.testing.assert_close(found.float(), unpack(packed, format, (70, 320), torch.float32))


def test_gpu_quantized_runs_and_checks_every_contestant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the interpreter the generated kernel takes part; without it only the unpacking contestants do."""
    pytest.importorskip("bitsandbytes")
    require_interpreter()
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    without = {"dense", "unpack", "unpack (library)"}
    for value, expected in (("1", without | {"one pass", "base only"}), ("0", without)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        record = gpu_quantized.main(["--fast", "--device", "cpu"])
        assert {row["kernel"] for row in record["rows"]} == expected
        assert {row["format"] for row in record["rows"]} == set(FORMATS)
        assert max(row["error"] for row in record["rows"]) < 1e-5


def test_what_is_measured_is_kept_as_it_goes(tmp_path: Path) -> None:
    arguments = gpu_linear.options(["--fast", "--save", str(tmp_path), "--label", "x"])
    harness.keep("gpu_linear", arguments, [{"us": 1.0}], notes=["half"])
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("gpu_linear-x-")
    assert kept.name.endswith(".partial.json")
    assert json.loads(kept.read_text())["rows"] == [{"us": 1.0}]
    harness.report("gpu_linear", arguments, [{"us": 2.0}])
    (whole,) = tmp_path.iterdir()
    assert json.loads(whole.read_text())["rows"] == [{"us": 2.0}]
    assert gpu_linear.main(["--fast", "--device", "cpu"])["rows"]


def test_gpu_decode_runs() -> None:
    record = gpu_decode.main(["--fast", "--device", "cpu"])
    models = {row["model"] for row in record["rows"]}
    assert models == {"dense", "50%", "75%", "75% int8"}
    dense, sparse = (next(r["MiB"] for r in record["rows"] if r["model"] == m) for m in ("dense", "75%"))
    assert sparse < dense


def test_the_sparse_decoder_computes_the_dense_one() -> None:
    """With nothing pruned, packed and fused layers give the same tokens and nearly the same hidden states."""
    shape = gpu_decode.Shape(width=64, hidden=96, heads=4, groups=2, vocabulary=101, layers=2)
    with torch.no_grad():
        dense = gpu_decode.build(shape, 2, 16, "cpu", torch.float32)
        sparse = gpu_decode.sparsified(dense, 0.0, False)
        x = torch.randn(2, 1, 64)
        turn, mask = dense.turns[:, 8:9], dense.mask[8:9]
        place = torch.tensor([8])
        for ours, theirs in zip(sparse.layers, dense.layers, strict=True):
            torch.testing.assert_close(ours(x, turn, place, mask), theirs(x, turn, place, mask))


@pytest.mark.slow
def test_saved_bytes_are_counted_and_fewer() -> None:
    (row,) = saved_bytes.main(["--fast", "--device", "cpu"])["rows"]
    assert row["sparsify MiB"] < row["aot_eager MiB"] < row["eager MiB"]


def test_copies_are_more_than_the_cache_holds() -> None:
    for nbytes in (4 << 20, 33 << 20, 200 << 20):
        assert gpu_linear.copies_for(nbytes, "cuda") * nbytes >= 150e6
    assert gpu_linear.copies_for(33 << 20, "cpu") == 1


def test_the_script_fits_ten_minutes_and_is_sound() -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    steps = re.findall(r"^[\w-]+ *\| *(\d+) \|(.*)$", script.read_text(), flags=re.M)
    assert sum(int(seconds) for seconds, _ in steps) < 600
    for _, command in steps:
        found = re.search(r"benchmarks/\w+\.py", command)
        assert "pytest" in command or (found and (ROOT / found[0]).exists())
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def run_script(out: Path, **environment: str) -> tuple[int, str, str]:
    """Exit status, output and summary of gpu.sh on this machine's CPU."""
    import os

    settings = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "DRY": "1", **environment}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=280
    )
    return done.returncode, done.stdout, (out / "summary.txt").read_text()


def test_the_script_stops_at_its_deadline(tmp_path: Path) -> None:
    """No step begins when no time is left, each is named, and that is a failure."""
    status, output, summary = run_script(tmp_path, DEADLINE="0")
    assert status == 1
    assert "failed; logs are in" in output
    names = re.findall(r"^([\w-]+) *\| *\d+ \|", (ROOT / "benchmarks" / "gpu.sh").read_text(), flags=re.M)
    assert re.findall(r"^([\w-]+) +0 s  SKIPPED", summary, flags=re.M) == names


@pytest.mark.slow
def test_steps_run_apart_and_save_json(tmp_path: Path) -> None:
    wanted = "gpu-roofline gpu-tune gpu-quantized layouts"
    status, output, summary = run_script(tmp_path, STEPS_ONLY=wanted)
    assert status == 0, output
    assert re.findall(r"^([\w-]+) +\d+ s  passed", summary, flags=re.M) == [
        "gpu-roofline",
        "gpu-quantized",
        "gpu-tune",
        "layouts",
    ]
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    assert [name[: name.index("-20")] for name in names] == [
        "gpu_linear-roofline",
        "gpu_quantized",
        "gpu_tune",
        "layouts",
    ]
    assert all(json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json"))


def test_every_bar_of_a_gpu_is_judged() -> None:
    """Which comparisons train_step judges on a GPU, from invented times."""
    names = ["floor", "floor_cut", "s2ft", "paca", "rosa", "lora", "miss", "full"]
    both = [*names, *(f"{name}+compile" for name in names if name != "floor_cut")]
    times = {name: harness.Timing((1.0, 1.0, 1.0)) for name in both}
    rows = [{"method": name, "saved MiB": 1.0, "held MiB": 1.0, "peak MiB": 1.0} for name in both]
    found = {bar.name: (bar.bound, bar.at_least) for bar in train_step.bars(rows, times, "cuda")}
    expected = {
        "time of s2ft / floor": (1.05, False),
        "time of paca / floor": (1.05, False),
        "time of lora / s2ft": (1.25, True),
        "time of lora / paca": (1.25, True),
        "time of lora+compile / s2ft+compile": (1.1, True),
        "time of lora+compile / paca+compile": (1.1, True),
        "peak bytes of s2ft / miss": (1.0, False),
        "time of full / s2ft": (1.8, True),
        "peak bytes of s2ft / full": (1 / 3, False),
        "time of rosa / lora": (1.0, False),
    }
    assert expected.items() <= found.items()
    assert ("time of lora / s2ft", (1.3, True)) in {
        bar.name: (bar.bound, bar.at_least) for bar in train_step.bars(rows, times, "cpu")
    }.items()


def test_a_step_that_runs_long_keeps_what_it_has(tmp_path: Path) -> None:
    record = train_step.main(["--fast", "--device", "cpu", "--methods", "floor", "s2ft", "--build-seconds", "0"])
    assert record is not None
    assert record["rows"] == []
    assert any("s2ft left out: building took more than 0 s" in note for note in record["notes"])
    arguments = train_step.options().parse_args(["--fast", "--save", str(tmp_path)])
    kept: list[list[dict[str, object]]] = []
    case = train_step.Case(train_step.PRESETS["tiny"], torch.float32, "cpu")
    options = {"compiled": None, "eager": True, "rounds": 3, "seconds": 1.0, "clock": "wall", "patience": 0.0}
    train_step.run(case, ["floor", "s2ft"], kept=kept.append, **options)
    assert [[row["method"] for row in rows] for rows in kept] == [["floor"], ["floor", "s2ft"]]
    assert arguments.build_seconds > 1e9
