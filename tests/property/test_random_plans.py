"""A plan drawn at random, from compile to restore: bit-exact wherever the documentation says so.

Five plans by default, eight with -m slow; a thousand with `./test.sh -m slow tests/property/test_random_plans.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import processes
import pytest
import random_plans
import tiny
import torch

import sparsify

CHUNK = 50
#: every kind of part, over a packed base and in 16 bits too, on two transformers (three plans share a trace) and plain modules
FEW = (10, 19, 22, 30, 57)


def life(number: int, folder: Path) -> str | None:
    """Train, switch, merge, unmerge, save and restore one plan. Returns the digest of the trained outputs; None for a refused plan."""
    drawn = random_plans.draw(number)
    try:
        host, base, inputs = random_plans.compiled(drawn)
    except sparsify.SparsifyError:
        return None  # the draw matches nothing here; what it says is tested elsewhere
    handle, wide = host.sparsify, drawn.dtype is torch.float32
    before = tiny.snapshot(base)
    untrained = random_plans.outputs(host.eval(), inputs)
    if drawn.exact:
        error = (untrained.double() - random_plans.outputs(base, inputs).double()).abs().max()
        assert error <= (1e-4 if wide else 0.1) * untrained.double().abs().max(), (
            f"{number}: compile moved the outputs by {error}"
        )
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    for _ in range(2):
        result = host(**inputs) if isinstance(inputs, dict) else host(*inputs)
        tiny.probe_loss(result).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = random_plans.outputs(host, inputs)
    assert not torch.equal(trained, untrained), f"{number}: training changed nothing"
    handle.save_adapter(folder / str(number))
    handle.set_adapter(None)
    none = random_plans.outputs(host, inputs)
    fresh, _, _ = random_plans.compiled(drawn)
    fresh.sparsify.set_adapter(None)
    assert torch.equal(none, random_plans.outputs(fresh.eval(), inputs)), (
        f"{number}: without an adapter it is not the base"
    )
    handle.set_adapter("default")
    assert torch.equal(random_plans.outputs(host, inputs), trained), f"{number}: switched back to other bits"
    if drawn.exact:
        handle.merge()
        merged = random_plans.outputs(host, inputs)
        error = (merged.double() - trained.double()).abs().max()
        assert error <= (1e-4 if wide else 0.1) * trained.double().abs().max(), (
            f"{number}: merge moved the outputs by {error}"
        )
        handle.unmerge()
        assert torch.equal(random_plans.outputs(host, inputs), trained), f"{number}: unmerge gave other bits"
        plain: Any = handle.restore()
        tiny.assert_same(tiny.snapshot(plain), before)
    tiny.assert_same(tiny.snapshot(base), before)
    return random_plans.digest(trained)


def run(numbers: Iterable[int], folder: Path) -> int:
    """How many of the numbers made a plan that serves something; each went through its life and a fresh process."""
    expected = {str(n): found for n in numbers if (found := life(n, folder)) is not None}
    script = Path(random_plans.__file__)
    path = os.pathsep.join([str(script.parent), str(script.parent.parent), str(script.parent.parent.parent)])
    done = processes.run_python(str(script), str(folder), *expected, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    wrong = [n for n in expected if found[n] != expected[n]]
    assert not wrong, f"loaded in a fresh process, these plans give other bits: {wrong}"
    return len(expected)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_few_random_plans(tmp_path: Path) -> None:
    assert run(FEW, tmp_path) >= 4


def test_eight_random_plans(tmp_path: Path) -> None:
    assert run(range(8), tmp_path) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(28))
def test_a_thousand_random_plans(chunk: int, tmp_path: Path) -> None:
    """28 chunks of 50 draws, of which at least 36 serve something: a thousand plans."""
    assert run(range(1000 + CHUNK * chunk, 1000 + CHUNK * (chunk + 1)), tmp_path) >= 36
