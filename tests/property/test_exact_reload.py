"""Save, compile the same base anew, load: the trained values come back bit for bit, for every dtype and method."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Prune, Quantize, RoSA
from sparsify.adapters import adapter as files
from sparsify.modules.exact import change_of, changed, correction_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RULES = st.one_of(
    st.builds(
        S2FT,
        fraction=st.sampled_from([0.1, 0.4]),
        producer_fraction=st.sampled_from([0.0, 0.3]),
        structure=st.just("ffn"),
    ),
    st.builds(PaCA, rank=st.integers(1, 3), permute=st.booleans()),
    st.builds(RoSA, rank=st.sampled_from([0, 2]), density=st.sampled_from([0.05, 0.2]), mask=st.just("random")),
    st.builds(LoRA, rank=st.integers(1, 3)),
)


def disturb(host: nn.Module, seed: int, scale: float) -> None:
    """New values of all magnitudes beside the base: nearly equal, of other sign, far smaller, exactly zero and minus zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tiny.trainable(host):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            kind = torch.randint(0, 6, parameter.shape, generator=generator)
            value = parameter.double() + scale * noise
            value = torch.where(kind == 1, parameter.double() * (1 + 1e-3 * noise), value)
            value = torch.where(kind == 2, noise * 1e-9, value)
            value = torch.where(kind == 3, torch.zeros_like(value), value)
            value = torch.where(kind == 4, -torch.zeros_like(value), value)
            parameter.copy_(value)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def assert_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        if x.requires_grad:
            assert x.dtype == y.dtype
            assert torch.equal(bits(x), bits(y)), name


@settings(max_examples=10)
@given(
    rules=st.lists(RULES, min_size=1, max_size=2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-4, 0.05, 3.0]),
    base=st.sampled_from(["dense", "dense", "pruned"]),
    merged=st.booleans(),
    train=st.booleans(),
)
def test_a_reloaded_adapter_is_the_trained_one_bit_for_bit(
    rules: list[Any], dtype: torch.dtype, seed: int, scale: float, base: str, merged: bool, train: bool
) -> None:
    torch.manual_seed(seed)
    model, x = tiny.perturb(tiny.Mlp()).to(dtype).eval(), torch.randn(4, 12).to(dtype)
    rules = [Prune(sparsity=0.4, method="magnitude"), *rules] if base == "pruned" else rules
    plan = Plan(rules, seed=seed % 7, train=["head"] if train else [])

    def build() -> Any:
        return sparsify.compile(copy.deepcopy(model), plan, example=x, progress=False)

    try:
        host = build()
    except sparsify.PlanError:  # two rules want the same weights
        return
    disturb(host, seed, scale)
    expected = host(x)
    if merged and base == "dense":
        host.sparsify.merge()
    with tempfile.TemporaryDirectory() as folder:
        host.sparsify.save_adapter(folder)
        fresh = build()
        fresh.sparsify.load_adapter(folder, "a")
        raw = files.load(folder)
        fresh.sparsify.set_adapter("a")
        with tempfile.TemporaryDirectory() as again:
            fresh.sparsify.save_adapter(again)
            for one, two in zip(raw.deltas, files.load(again).deltas, strict=True):
                assert torch.equal(one.values, two.values)
                assert (one.exact is None) == (two.exact is None)
    if merged and base == "dense":
        host.sparsify.unmerge()
    assert_bits(host, fresh)
    assert torch.equal(fresh(x), expected)
    fresh.sparsify.set_adapter(None)
    assert torch.equal(fresh(x), build()(x))
    fresh.sparsify.set_adapter({"a": 1.0})
    assert_bits(host, fresh)
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rule", [S2FT(structure="ffn", units=5), PaCA(rank=3), RoSA(rank=0, density=0.1, mask="random")], ids=str
)
def test_the_adapter_of_another_plan_computes_the_trained_weights_too(
    rule: Any, dtype: torch.dtype, tmp_path: Any
) -> None:
    """On a host that trains something else the change goes into the weights, which hold the trained values, rounded once."""
    torch.manual_seed(1)
    model, x = tiny.perturb(tiny.Mlp()).to(dtype).eval(), torch.randn(4, 12).to(dtype)
    host: Any = sparsify.compile(model, Plan([rule]), example=x, progress=False)
    disturb(host, 3, 0.5)
    host.sparsify.save_adapter(tmp_path)
    server: Any = sparsify.compile(model, Plan([LoRA(match="head", rank=1)]), example=x, progress=False)
    server.sparsify.load_adapter(tmp_path, "a")
    server.sparsify.set_adapter("a")
    tiny.assert_same(server.sparsify.original_state_dict(), host.sparsify.original_state_dict())
    server.sparsify.set_adapter(None)
    tiny.assert_same(server.sparsify.original_state_dict(), dict(model.state_dict()))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_over_a_packed_base(format: Any, tmp_path: Any) -> None:
    for place, rule in enumerate((PaCA(rank=3), RoSA(rank=2, density=0.05, mask="random"))):
        hosts: list[Any] = [tiny.lower(tiny.llama(), Quantize(format=format), rule) for _ in range(2)]
        disturb(hosts[0], place, 0.3)
        hosts[0].sparsify.save_adapter(tmp_path / str(place))
        hosts[1].sparsify.load_adapter(tmp_path / str(place), "a")
        hosts[1].sparsify.set_adapter("a")
        assert_bits(*hosts)


def test_on_another_base_the_change_is_added_and_rounded_once(tmp_path: Any) -> None:
    torch.manual_seed(1)
    model, other, x = tiny.Mlp(), tiny.Mlp(), torch.randn(4, 12)
    hosts: list[Any] = [tiny.lower(m, PaCA(rank=3), example=x) for m in (model, other)]
    host, server = hosts
    disturb(host, 5, 0.3)
    host.sparsify.save_adapter(tmp_path)
    deltas = files.load(tmp_path).deltas
    assert any(d.exact is not None for d in deltas), "or the case shows nothing"
    server.sparsify.load_adapter(tmp_path, "a", strict=False)
    assert all(d.exact is None for d in server.sparsify.get("a").deltas)
    server.sparsify.set_adapter("a")
    found, base = server.sparsify.original_state_dict(), other.state_dict()
    for delta in deltas:
        expected = base[delta.param].clone()
        expected.index_add_(delta.axis, delta.channels, delta.stored())
        torch.testing.assert_close(found[delta.param], expected, rtol=0, atol=0)


@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_change_and_correction_give_any_value_back(seed: int, base_dtype: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-6, 4, (2, 50), generator=generator)
    base, trained = torch.randn(2, 50, generator=generator, dtype=torch.float64) * 10.0**powers
    base, trained = base.to(base_dtype), trained.to(dtype)
    trained[:2] = torch.tensor([0.0, -0.0])
    change = change_of(trained, base)
    found = changed(base, change, correction_of(trained, base, change), dtype)
    assert torch.equal(bits(found), bits(trained))
    near = (trained.double() / base.double() > 0.6) & (trained.double() / base.double() < 1.6)
    if base_dtype == dtype == torch.float32 and bool(near.all()):
        assert correction_of(trained, base, change) is None
