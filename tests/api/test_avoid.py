"""Disjoint selections: a new adapter leaves the units of saved ones alone, and what two share is said."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import sparsify
from sparsify import S2FT, LoRA, Plan, PlanError, RoSA
from sparsify.adapters.fuse import fuse
from sparsify.errors import AdapterError

RANDOM = RoSA(rank=2, density=0.03, mask="random")
FIRST = S2FT(units=2, producer_fraction=0.3, budget="structure")


def saved(folder: Any, rule: Any, seed: int = 0) -> Any:
    host = tiny.lower(tiny.llama(), rule, seed=seed)
    tiny.disturb(host)
    host.sparsify.save_adapter(folder)
    return host


def units(host: Any) -> dict[str, set[int]]:
    return {c.structure: set(c.consumers) for c in host.sparsify.program.choices}


@pytest.mark.parametrize("select", ["random", "weight"])
@pytest.mark.parametrize("largest", [True, False])
def test_units_of_saved_adapters_are_left_alone(select, largest, tmp_path):
    rule = S2FT(units=2, producer_fraction=0.3, select=select, largest=largest, budget="structure")
    first = saved(tmp_path / "a", rule)
    again = tiny.lower(tiny.llama(), rule)
    assert units(first) == units(again), "the control: the same rule takes the same units"
    avoiding = S2FT(
        units=2, producer_fraction=0.3, select=select, largest=largest, budget="structure", avoid=[str(tmp_path / "a")]
    )
    second = saved(tmp_path / "b", avoiding)
    assert all(not units(first)[name] & chosen and len(chosen) == 2 for name, chosen in units(second).items())
    for name in ("a", "b"):
        second.sparsify.load_adapter(tmp_path / name, name)
    assert second.sparsify.overlap("a", "b") == ()
    assert second.sparsify.set_adapter({"a": 0.5, "b": 0.5}).conflicts == ()


def test_overlap_names_what_two_adapters_share(tmp_path):
    saved(tmp_path / "a", FIRST)
    host = saved(tmp_path / "b", FIRST)
    saved(tmp_path / "c", LoRA(rank=2, match="*o_proj"))
    for name in ("a", "b", "c"):
        host.sparsify.load_adapter(tmp_path / name, name)
    found = {c.param: c for c in host.sparsify.overlap("a", "b")}
    assert set(found) == {s.param for s in host.sparsify.program.slices}
    assert all(c.shared == c.total for c in found.values())
    met = host.sparsify.overlap("a", "c")
    assert {c.param.split(".")[-2] for c in met} == {"o_proj"}
    assert all("a and c meet everywhere" in str(c) for c in met)


@pytest.mark.parametrize(
    "rules", [(FIRST, FIRST), (LoRA(rank=2), LoRA(rank=3)), (RANDOM, FIRST)], ids=["S2FT", "LoRA", "RoSA+S2FT"]
)
def test_a_fused_adapter_is_the_mix_and_can_be_saved(rules, tmp_path):
    for number, rule in enumerate(rules):
        saved(tmp_path / str(number), rule, seed=number)
    host = tiny.lower(tiny.llama(), S2FT(units=1))
    for number in range(2):
        host.sparsify.load_adapter(tmp_path / str(number), str(number))
    x = tiny.tokens()
    host.sparsify.set_adapter({"0": 0.5, "1": -0.25})
    mixed = host(x).logits
    host.sparsify.fuse_adapters({"0": 0.5, "1": -0.25}, "both")
    with pytest.raises(AdapterError, match="'both' is taken"):
        host.sparsify.fuse_adapters({"0": 1.0}, "both")
    host.sparsify.save_adapter(tmp_path / "both", "both")
    served = sparsify.load(tiny.llama(), tmp_path / "both")
    torch.testing.assert_close(served(x).logits, mixed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed, tiny.llama()(x).logits, atol=1e-3)


def test_what_has_no_sum_or_another_base_is_not_fused(tmp_path):
    host = tiny.lower(tiny.llama(), FIRST, train=["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head.weight has a change of kind full, which is no sum of changes"):
        host.sparsify.fuse_adapters({"default": 1.0}, "x")
    a, b = (tiny.lower(tiny.llama(seed=seed), FIRST).sparsify.current() for seed in (0, 1))
    with pytest.raises(AdapterError, match="trained on different bases"):
        fuse([(1.0, a), (1.0, b)])


def test_too_few_free_units_are_an_error(tmp_path):
    saved(tmp_path / "a", S2FT(structure="attention", units=4))
    with pytest.raises(PlanError, match=r"self_attn: 3 units are to train, and the adapters to avoid leave 2 of 6"):
        tiny.lower(tiny.llama(), S2FT(structure="attention", units=3, avoid=[str(tmp_path / "a")]))
    assert tiny.lower(tiny.llama(), S2FT(structure="attention", units=2, avoid=[str(tmp_path / "a")]))
    saved(tmp_path / "l", LoRA(rank=2, match="*down_proj"))
    with pytest.raises(PlanError, match=r"the adapters to avoid leave 0 of 44"):
        tiny.lower(tiny.llama(), S2FT(structure="ffn", units=1, avoid=[str(tmp_path / "l")]))
    with pytest.raises(PlanError, match=r"rule 0, avoid='.*nowhere': .*no adapter.safetensors there"):
        tiny.lower(tiny.llama(), S2FT(units=1, avoid=[str(tmp_path / "nowhere")]))


def test_a_plan_with_avoid_is_json():
    plan = Plan([S2FT(units=1, avoid=["a/", "b/"])])
    assert Plan.from_json(plan.to_json()) == plan
    assert S2FT(units=1, avoid="a/").avoid == ("a/",)
