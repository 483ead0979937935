"""Methods from outside: what `register` refuses, what files of them may hold, and the operator of the example against its oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lifecycle_cases as cases
import pytest
import tiny
import torch
import write_a_method as dora
from safetensors.torch import load_file, save_file
from torch import nn
from write_a_method import KIND, DoRA, Dora

import sparsify
from sparsify import AdapterError, LoRA, Plan, PlanError, Prune, Quantize
from sparsify.adapters import delta_kinds
from sparsify.adapters.adapter import load
from sparsify.methods import DeltaKind, LinearRule, OutsidePart, register, registry

FACTORS = (torch.float64, torch.float32)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return tiny.perturb(tiny.Mlp()).eval()


def host_of(*rules: Any) -> Any:
    return sparsify.compile(mlp(), Plan(list(rules)), example=torch.randn(3, 12), progress=False)


# --- the operator ------------------------------------------------------------------------------------------------------------


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,), "a": (2, 5), "b": (7, 2), "magnitude": (7,)}
    return {
        n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n, s in shapes.items()
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_is_its_oracle(transposed):
    given, wanted = tensors(torch.float64), tensors(torch.float64)
    want = dora.oracle(**wanted, scale=1.7)
    weight = given["weight"].t().contiguous() if transposed else given["weight"]
    found = torch.ops.dora.linear(
        given["x"], weight, given["bias"], given["a"], given["b"], given["magnitude"], 1.7, transposed
    )
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    for y in (found, want):
        tiny.probe_loss(y).backward()
    for name in given:
        torch.testing.assert_close(given[name].grad, wanted[name].grad, rtol=1e-10, atol=1e-11)


def test_the_operator_is_registered_as_torch_wants():
    given = {n: t.detach().float().requires_grad_() for n, t in tensors(torch.float32).items()}
    torch.library.opcheck(torch.ops.dora.linear.default, (*given.values(), 0.5, False))


def test_the_operator_has_transforms_and_says_what_does_not_fit():
    given = {n: t.detach() for n, t in tensors(torch.float64).items()}

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.dora.linear(x, *list(given.values())[1:], 0.5, False)

    x = given["x"][0]
    want = torch.stack([call(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(call)(x), want)
    with pytest.raises(sparsify.OperatorError, match="x has 4 channels, the weight 5"):
        call(x[:, :4])


def test_a_deployed_program_needs_neither_the_operator_nor_the_part():
    host, x = host_of(DoRA(rank=2)), torch.randn(3, 12)
    tiny.disturb(host, 0.1)
    lowered = sparsify.lower_exported(torch.export.export(host, (x,)))
    assert not [n for n in lowered.graph.nodes if "dora" in str(n.target)]
    assert not [name for name in (*lowered.state_dict, *lowered.constants) if "lora" in name]
    torch.testing.assert_close(lowered.module()(x), host(x), rtol=1e-5, atol=1e-5)


# --- register ------------------------------------------------------------------------------------------------------------------


def test_the_same_method_may_be_registered_again_and_no_other_under_its_names():
    before = dict(registry.METHODS)
    assert register(DoRA, part=Dora, deltas=[KIND]).rule is DoRA
    assert before == registry.METHODS

    taken = dataclasses.dataclass(frozen=True, kw_only=True)(type("DoRA", (LinearRule,), {"__module__": "elsewhere"}))
    with pytest.raises(PlanError, match="a rule is called 'DoRA' already"):
        register(taken, part=Dora, deltas=[])
    mine = dataclasses.dataclass(frozen=True, kw_only=True)(type("Mine", (LinearRule,), {"__module__": "elsewhere"}))
    with pytest.raises(PlanError, match="a kind of changes is called 'dora' already"):
        register(mine, part=Dora, deltas=[KIND])
    with pytest.raises(PlanError, match="a kind of changes is called 'lora' already"):
        register(mine, part=Dora, deltas=[dataclasses.replace(KIND, name="lora")])
    assert "Mine" not in sparsify.plan.RULES


def test_what_is_not_complete_is_named():
    with pytest.raises(PlanError, match="no dataclass of LinearRule"):
        register(Prune, part=Dora, deltas=[KIND])  # type: ignore[type-var]

    class Half(OutsidePart):
        module_kind = "Half"

    with pytest.raises(PlanError, match="lacks attach, from_rule, initial, insert, live, text"):
        register(DoRA, part=Half, deltas=[KIND])  # type: ignore[type-abstract]
    with pytest.raises(sparsify.SparsifyError, match="must be called 'delta'"):
        DeltaKind(name="mine", tensors={"A": ("out",)}, change=lambda base, delta: base, peft="no")
    with pytest.raises(sparsify.SparsifyError, match="an identifier is needed"):
        DeltaKind(name="a::b", tensors={"delta": ("out",)}, change=lambda base, delta: base, peft="no")


def test_a_rule_without_a_method_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Lonely(LinearRule):
        """Nobody registered it."""

    with pytest.raises(PlanError, match=r"no method is registered for Lonely; call sparsify.methods.register\(Lonely"):
        host_of(Lonely())


def test_what_the_part_cannot_serve_is_refused_with_its_reason():
    with pytest.raises(PlanError, match=r"DoRA needs the dense weight, and this one is packed \(int8\)"):
        host_of(Quantize("int8"), DoRA(rank=2))
    with pytest.raises(PlanError, match="DoRA does not keep a mask, and entries of this weight are pruned"):
        host_of(Prune(sparsity=0.5, method="magnitude"), DoRA(rank=2))
    with pytest.raises(PlanError, match="rank 99 is more than the larger side of its weight, 20"):
        host_of(DoRA(rank=99))


def test_it_stands_beside_other_rules_whose_permutation_moves_its_rows(tmp_path):
    """S2FT reorders the rows of `up`: magnitudes and factors go to files in original order."""
    rules = (sparsify.S2FT(structure="ffn", units=3), DoRA(match="*.up", rank=2))
    host, other = host_of(*rules), host_of(DoRA(match="*.up", rank=2), LoRA(match="*.down", rank=2))
    assert [m.param for m in host.sparsify.program.moves], "something moved"
    tiny.disturb(host, 0.1)
    host.sparsify.save_adapter(tmp_path)
    x = torch.randn(4, 12)
    with torch.no_grad():
        torch.testing.assert_close(sparsify.load(mlp(), tmp_path)(x), host(x), rtol=1e-5, atol=1e-5)
        other.sparsify.load_adapter(tmp_path, "a")
        other.sparsify.set_adapter("a")
        torch.testing.assert_close(other(x), host(x), rtol=1e-5, atol=1e-5)


def test_lora_and_dora_are_two_folders_for_peft(tmp_path):
    host = host_of(DoRA(match="*.up", rank=2), LoRA(match="*.down", rank=2))
    with pytest.raises(
        AdapterError, match=r"'use_dora' holds for every linear of a PEFT folder, and layers.0.down trained otherwise"
    ):
        host.sparsify.export_lora(tmp_path)


# --- files ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    host = host_of(DoRA(rank=2))
    tiny.disturb(host, 0.1)
    return host.sparsify.save_adapter(path)


def test_an_unregistered_kind_is_refused_with_its_name_and_what_to_import(folder, monkeypatch):
    monkeypatch.delitem(delta_kinds.REGISTERED, "dora")
    message = (
        r"a change of kind 'dora', which neither sparsify nor a registered method knows\. Import the module that calls "
    )
    with pytest.raises(
        AdapterError, match=message + r"sparsify.methods.register for it \(its plan has the rules DoRA\)"
    ):
        load(folder)


def damaged(folder: Path, target: Path, change: Any) -> Path:
    """A copy whose tensors were changed, as version 1, which has no content hashes."""
    from safetensors import safe_open

    name = "adapter.safetensors"
    held = load_file(folder / name)
    with safe_open(folder / name, "pt") as opened:
        document = json.loads(opened.metadata()["sparsify"]) | {"format_version": 1}
    change(held, document)
    save_file(held, target / name, {"sparsify": json.dumps(document)})
    return target


BROKEN = {
    "sizes": (lambda t: t[:-1].contiguous(), r"has (rank|out) = \d+, another tensor \d+"),
    "nan": (lambda t: torch.full_like(t, float("nan")), "not finite"),
    "integers": (lambda t: t.long(), "expected a floating type"),
    "dimensions": (lambda t: t[None].contiguous(), "expected"),
}


@pytest.mark.parametrize("tensor", ["A", "magnitude"])
@pytest.mark.parametrize("how", BROKEN)
def test_tensors_that_do_not_fit_their_schema_are_refused(folder, tmp_path, tensor, how):
    change, message = BROKEN[how]

    def apply(held: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
        key = f"layers.0.up.weight::dora::{tensor}"
        held[key] = change(held[key])

    with pytest.raises(AdapterError, match=message):
        host_of(DoRA(rank=2)).sparsify.load_adapter(damaged(folder, tmp_path, apply), "a")


def test_a_missing_tensor_and_one_too_many_are_refused(folder, tmp_path):
    def less(held: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
        del held["layers.0.up.weight::dora::magnitude"]

    def more(held: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
        held["layers.0.up.weight::dora::extra"] = torch.zeros(1)

    with pytest.raises(AdapterError, match="tensor 'layers.0.up.weight::dora::magnitude' is missing"):
        load(damaged(folder, tmp_path, less))
    with pytest.raises(AdapterError, match="unexpected tensor 'layers.0.up.weight::dora::extra'"):
        load(damaged(folder, tmp_path, more))


def test_a_copy_that_was_not_changed_is_read(folder, tmp_path):
    found = load(damaged(folder, tmp_path, lambda held, document: None))
    assert {d.kind for d in found.deltas} == {"dora"}
    assert set(found.deltas[0].more) == {"A", "magnitude"}


def test_the_list_of_methods_of_the_suite_names_its_own_module():
    assert cases.METHODS["DoRA"].module == dora.__name__


LATE = """
import dataclasses
from sparsify.methods import LinearRule, register
from write_a_method import Dora

@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(LinearRule):
    rank: int = 2
    scale: float = 1.0

register(Late, part=Dora, deltas=[])
"""


def test_an_installed_method_is_found_by_the_name_of_its_rule(tmp_path, monkeypatch):
    (tmp_path / "late_method.py").write_text(LATE)
    folder = tmp_path / "late-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[sparsify.methods]\nLate = late_method\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = json.dumps({"rules": [{"rule": "Late", "match": "*.up", "rank": 3}]})
    try:
        plan = Plan.from_json(text)
        assert str(plan.rules[0]) == "Late(match='*.up', rank=3)"
        host = host_of(*plan.rules)
        assert {part.rank for part in host.sparsify.program.parts} == {3}
    finally:
        for rule in [r for r in registry.METHODS if r.__name__ == "Late"]:
            del registry.METHODS[rule]
        sparsify.plan.RULES.pop("Late", None)
    with pytest.raises(PlanError, match="unknown rule 'Lata'"):
        Plan.from_json(text.replace("Late", "Lata"))
