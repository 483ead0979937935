"""Buffers that move in training belong to the adapter: saved, switched, mixed, restored; tables that are derived do not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import Tensor, nn

import sparsify
import sparsify.adapters.adapter
from sparsify import S2FT, AdapterError, LoRA, PaCA, Plan, RoSA
from sparsify.host.moved_buffers import mix_buffer


class Scale(nn.Module):
    """A running scale, persistent or not, and a counter of steps that is in no state dict."""

    scale: Tensor
    steps: Tensor

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=persistent)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(x.detach().std(), alpha=0.1)
                self.steps += 1
        return x / self.scale


def net(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12), norm, nn.Linear(12, 5)).eval()


NORMS: dict[str, Any] = {
    "BatchNorm": lambda: nn.BatchNorm1d(12),
    "BatchNorm, average": lambda: nn.BatchNorm1d(12, momentum=None),
    "scale": Scale,
    "scale in no state dict": lambda: Scale(persistent=False),
}
RULES: dict[str, Any] = {
    "s2ft": S2FT(structure="ffn", units=3),
    "paca": PaCA(rank=3),
    "rosa": RoSA(rank=2, density=0.05, mask="random"),
    "lora": LoRA(rank=2),
}
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(5)) * 3 + 1


def compiled(base: nn.Module, rule: Any, seed: int = 0) -> Any:
    return sparsify.compile(copy.deepcopy(base), Plan([rule], seed=seed), example=(X,), progress=False)


def train(host: Any, steps: int = 4) -> None:
    host.train()
    optimizer = torch.optim.SGD([p for p in host.parameters() if p.requires_grad], 0.01)
    for step in range(steps):
        host(X + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    host.eval()


@pytest.mark.parametrize("method", list(RULES))
@pytest.mark.parametrize("norm", list(NORMS))
def test_buffers_are_saved_switched_and_restored_with_the_adapter(norm: str, method: str, tmp_path: Path) -> None:
    base = net(NORMS[norm]())
    host = compiled(base, RULES[method])
    start, want = tiny.snapshot(base), host(X)
    train(host)
    trained = host(X)
    assert not torch.allclose(trained, want, atol=1e-2)
    host.sparsify.save_adapter(tmp_path)
    saved = {d.param: d for d in host.sparsify.current().deltas if d.kind == "buffer"}
    assert set(saved) == {n for n, _ in base.named_buffers()}, "all of them moved"
    fresh = compiled(base, RULES[method])
    fresh.sparsify.load_adapter(tmp_path, "a")
    fresh.sparsify.set_adapter("a")
    assert torch.equal(fresh(X), trained)
    fresh.sparsify.set_adapter(None)
    assert torch.equal(fresh(X), want)
    host.sparsify.set_adapter(None)
    assert torch.equal(host(X), want)
    host.train()
    host(X)  # drifts while nothing is active
    host.eval()
    host.sparsify.set_adapter("default")
    assert torch.equal(host(X), trained)
    tiny.assert_same(tiny.snapshot(host.sparsify.restore()), start)
    other = compiled(base, RULES["paca" if method == "s2ft" else "s2ft"], seed=3)  # an adapter of another plan
    other.sparsify.load_adapter(tmp_path, "a")
    other.sparsify.set_adapter("a")
    torch.testing.assert_close(other(X), trained, atol=1e-5, rtol=1e-5)
    tiny.assert_same(tiny.snapshot(other.sparsify.restore()), start)


def test_only_what_moved_is_written_and_old_adapters_load(tmp_path: Path) -> None:
    base = net(nn.BatchNorm1d(12))
    host = compiled(base, RULES["lora"])
    tiny.disturb(host)
    host.sparsify.save_adapter(tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as opened:
        assert not any("buffer" in key for key in list(opened.keys()))
    train(host)
    host.sparsify.load_adapter(tmp_path, "still")
    host.sparsify.set_adapter("still")
    assert torch.equal(host[3].running_mean, base[3].running_mean)  # type: ignore[index]


def test_a_mix_takes_weighted_means_and_the_larger_members_counters(tmp_path: Path) -> None:
    base = net(nn.BatchNorm1d(12))
    host = compiled(base, RULES["lora"])
    h = host.sparsify
    found = {}
    for name, steps in (("a", 2), ("b", 5)):
        h.set_adapter(None) if found else None
        h.set_adapter("default") if found else None
        train(host, steps)
        h.save_adapter(tmp_path / name)
        h.load_adapter(tmp_path / name, name)
        found[name] = {n: b.clone() for n, b in host[3].named_buffers()}
    start = dict(base[3].named_buffers())  # type: ignore[index]
    h.set_adapter({"a": 0.25, "b": 0.5})
    for leaf in ("running_mean", "running_var"):
        expected = 0.25 * start[leaf].double() + 0.25 * found["a"][leaf].double() + 0.5 * found["b"][leaf].double()
        torch.testing.assert_close(host[3].get_buffer(leaf).double(), expected, atol=1e-6, rtol=1e-6)
    assert host[3].num_batches_tracked == found["b"]["num_batches_tracked"]
    h.set_adapter({"a": 3.0, "b": 1.0})
    expected = 0.75 * found["a"]["running_var"] + 0.25 * found["b"]["running_var"]
    torch.testing.assert_close(host[3].running_var, expected)
    h.set_adapter({"a": 1.0, "b": -1.0})
    assert torch.equal(host[3].running_var, found["a"]["running_var"])
    h.set_adapter({"a": 1.0})
    assert all(torch.equal(host[3].get_buffer(n), t) for n, t in found["a"].items())


def test_mix_buffer_keeps_variances_positive_and_types() -> None:
    base, a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.1, 4.0]), torch.tensor([0.2, 1.0])
    for weights in ((1.0, 1.0), (2.0, -1.0), (0.3, 0.1), (-1.0, -1.0)):
        mixed = mix_buffer(base, list(zip(weights, (a, b), strict=True)))
        low, high = torch.stack([base, a, b]).amin(0), torch.stack([base, a, b]).amax(0)
        assert bool(((mixed >= low - 1e-6) & (mixed <= high + 1e-6)).all())
    flag = mix_buffer(torch.tensor(False), [(0.4, torch.tensor(True)), (0.6, torch.tensor(False))])
    assert flag.dtype == torch.bool
    assert not flag
    assert mix_buffer(torch.tensor(3), [(-1.0, torch.tensor(9))]) == 3


def test_tables_that_a_module_derives_are_no_state_and_foreign_buffers_are_refused(tmp_path: Path) -> None:
    host: Any = tiny.lower(tiny.llama(), LoRA(rank=2))
    assert not host.sparsify.buffers.base
    host.model.rotary_emb.inv_freq.mul_(0.5)
    tiny.disturb(host)
    assert {d.kind for d in host.sparsify.current().deltas} == {"lora"}
    trained = compiled(net(nn.BatchNorm1d(12)), RULES["lora"])
    train(trained)
    trained.sparsify.save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"the model has no parameter .3\.running_mean"):
        compiled(net(nn.Identity()), RULES["lora"]).sparsify.load_adapter(tmp_path, "a")
    with pytest.raises(AdapterError, match=r"3\.running_mean is \(12,\) here, \(20,\) in the file"):
        wide = sparsify.adapters.adapter.load(tmp_path)
        deltas = [replace(d, values=torch.ones(20)) if d.param == "3.running_mean" else d for d in wide.deltas]
        sparsify.adapters.adapter.save(replace(wide, deltas=tuple(deltas)), tmp_path / "wide")
        compiled(net(nn.BatchNorm1d(12)), RULES["lora"]).sparsify.load_adapter(tmp_path / "wide", "a")
    with pytest.raises(
        AdapterError, match=r"the buffer 3\.running_mean moved in training, and a PEFT adapter has no place"
    ):
        trained.sparsify.export_lora(tmp_path / "peft")


def test_checkpoints_and_copies_carry_buffers() -> None:
    base = net(nn.BatchNorm1d(12))
    host = compiled(base, RULES["s2ft"])
    train(host)
    trained = host(X)
    for state in (host.state_dict(), host.sparsify.original_state_dict()):
        fresh = compiled(base, RULES["s2ft"])
        fresh.load_state_dict(state, strict=False)
        torch.testing.assert_close(fresh(X), trained, atol=1e-6, rtol=1e-6)
    clone = copy.deepcopy(host)
    host.sparsify.set_adapter(None)
    assert torch.equal(clone(X), trained)
    plain = clone.sparsify.plain()
    torch.testing.assert_close(plain(X), trained, atol=1e-5, rtol=1e-5)
    clone.sparsify.set_adapter(None)
    assert torch.equal(clone(X), host(X))
