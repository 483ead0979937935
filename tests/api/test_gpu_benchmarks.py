"""The GPU benchmarks run without a GPU on small sizes, and the script that runs them fits its time. Times are not tested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_decode, gpu_linear, saved_bytes  # noqa: E402


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
