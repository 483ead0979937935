"""Lowering of exported programs, and packages of AOTInductor: the host's results, its shapes still free, nothing left over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from quick_export import quick_export
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import sparsify
from sparsify import S2FT, CpuOptions, LoRA, PaCA, Plan, Prune, Quantize, RoSA, SparsifyError
from sparsify.errors import CaptureError
from sparsify.formats import pack, unpack
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear, alive
from sparsify.lowering.deploy.decompositions import unpacked
from sparsify.lowering.deploy.exported import Editor, bytes_of, export_for_inference, lower_exported, package


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here reads the Python stacks of an exported program."""
    monkeypatch.setattr(torch.export, "export", quick_export)


ANY = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
ROSA = RoSA(rank=2, density=0.02, mask="random")


def adapted(name: str, *rules: Any) -> nn.Module:
    if name == "Mlp":
        host = tiny.lower(tiny.Mlp(), *rules, example=torch.randn(3, 12)).eval()
    else:
        host = tiny.lower(tiny.llama(num_hidden_layers=1) if name == "Llama" else tiny.build(name), *rules).eval()
    tiny.disturb(host)
    return host


def operators(exported: ExportedProgram) -> list[str]:
    return [str(n.target) for n in exported.graph.nodes if str(n.target).startswith("sparsify.")]


def held_bytes(exported: ExportedProgram) -> int:
    held = [*exported.state_dict.values(), *exported.constants.values()]
    return sum(bytes_of(t) for t in {id(t): t for t in held if isinstance(t, Tensor)}.values())


def exported_of(name: str, host: nn.Module) -> ExportedProgram:
    example, shapes = (
        (torch.randn(3, 12), ({0: Dim.DYNAMIC},)) if name == "Mlp" else ({"input_ids": tiny.tokens()}, ANY)
    )
    return export_for_inference(host, example, shapes)


@torch.no_grad()
def check(lowered: ExportedProgram, host: nn.Module, atol: float = 2e-6) -> None:
    """The host's logits at a batch and a length that the export has not seen."""
    if isinstance(host, tiny.Mlp):
        x = torch.randn(7, 12)
        torch.testing.assert_close(lowered.module()(x), host(x), rtol=1e-5, atol=atol)
        return
    run = lowered.module()
    for rows, length in ((2, 5), (4, 13)):
        ids = tiny.tokens(rows, length)
        found = run(input_ids=ids)
        torch.testing.assert_close(found["logits"], host(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=atol)


RULES = {
    "s2ft": (S2FT(fraction=0.1, producer_fraction=0.1, budget="structure"),),
    "paca": (PaCA(rank=3),),
    "rosa": (ROSA,),
    "lora": (LoRA(rank=2),),
    "pruned": (Prune(sparsity=0.5, method="magnitude"),),
    "pruned s2ft": (Prune(sparsity=0.5, method="magnitude"), S2FT(fraction=0.1, budget="structure")),
    "nf4 lora": (Quantize(format="nf4"), LoRA(rank=2)),
    "int8 s2ft": (Quantize(format="int8"), S2FT(fraction=0.1, budget="structure")),
    "int4 rosa": (Quantize(format="int4"), ROSA),
}


#: "Mlp" takes all rules; packed Conv1D is unpacked alike in tests/numeric/test_quantized_linear.py
QUICK = {("Llama", "s2ft"), ("GPT-2", "rosa")}
CASES = [
    pytest.param(name, rules, marks=() if name == "Mlp" or (name, rules) in QUICK else pytest.mark.slow)
    for name in ("Mlp", "Llama", "GPT-2")
    for rules in RULES
]


@pytest.mark.parametrize(("name", "rules"), CASES)
def test_lowered_programs_compute_what_the_host_computes(name: str, rules: str) -> None:
    host = adapted(name, *RULES[rules])
    before = tiny.state_of(host)
    exported = exported_of(name, host)
    assert operators(exported)
    for fold in (True, False):
        lowered = lower_exported(exported, fold=fold)
        assert not operators(lowered)
        check(lowered, host)
        assert held_bytes(lowered) <= held_bytes(exported)
    tiny.assert_same(tiny.state_of(host), before)
    assert operators(exported)  # the program that was passed in is as it was


@pytest.mark.parametrize("rules", ["s2ft", "paca", "rosa", "lora"])
def test_folding_leaves_no_trained_tensor_and_no_product_of_its_own(rules: str) -> None:
    host = adapted("Mlp", *RULES[rules])
    trained = {n for n, p in host.named_parameters() if p.requires_grad}
    exported = exported_of("Mlp", host)
    folded, apart = lower_exported(exported), lower_exported(exported, fold=False)
    assert trained <= set(apart.state_dict)
    assert not trained & set(folded.state_dict)
    products = [sum("linear" in str(n.target) for n in e.graph.nodes) for e in (folded, apart)]
    count = len(host.sparsify.parts)
    assert products[0] == sum(isinstance(m, nn.Linear) for m in host.modules())
    assert products[1] == products[0] + (2 * count if rules in ("rosa", "lora") else 0)
    assert sum(n.op == "call_function" for n in folded.graph.nodes) < sum(
        n.op == "call_function" for n in apart.graph.nodes
    )


def test_what_is_not_lowered_stays_as_it_was() -> None:
    """A program without sparsify's operators keeps its parameters under their names."""
    model = tiny.Mlp().eval()
    x = torch.randn(3, 12)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    lowered = lower_exported(exported)
    assert set(lowered.state_dict) == set(exported.state_dict)
    y = torch.randn(7, 12)
    torch.testing.assert_close(lowered.module()(y), model(y))


def test_a_program_exported_by_the_user_in_strict_mode_too() -> None:
    host = tiny.lower(
        tiny.Mlp(), S2FT(fraction=0.1, producer_fraction=0.1, budget="structure"), example=torch.randn(3, 12)
    ).eval()
    tiny.disturb(host)
    exported = torch.export.export(host, (torch.randn(3, 12),), strict=True, dynamic_shapes=({0: Dim.DYNAMIC},))
    lowered = lower_exported(exported)
    x = torch.randn(5, 12)
    assert not operators(lowered)
    torch.testing.assert_close(lowered.module()(x), host(x))


ODD = [(70, 100), (3, 5), (24, 130), (128, 192), (33, 384), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_unpacking_in_aten_is_the_library_s(format: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = pack(torch.randn(shape, dtype=dtype), format)
    torch.testing.assert_close(unpacked(packed, format, shape, dtype), unpack(packed, format, shape, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_inductor_unpacks_the_same(format: str, shape: tuple[int, int]) -> None:
    """Last blocks that are not whole: views of blocks gave wrong scales there."""
    packed = pack(torch.randn(shape), format)
    compiled = torch.compile(lambda *tensors: unpacked(tensors, format, shape, torch.float32))
    torch.testing.assert_close(compiled(*packed), unpack(packed, format, shape, torch.float32))


SIZES = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}


def for_target(target: str, *rules: Any) -> nn.Module:
    plan = Plan([Prune(sparsity=0.75, method="magnitude"), *rules], target=target)  # type: ignore[arg-type]
    options = (
        CpuOptions(mode="small", tokens=(1, 16)) if target == "cpu" else None
    )  # pack whatever a busy machine measures
    return sparsify.compile(tiny.llama(**SIZES), plan, progress=False, cpu=options)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_packed_weights_keep_their_kernels_or_become_dense(target: str) -> None:
    host = for_target(target)
    exported = export_for_inference(host, {"input_ids": tiny.tokens()}, ANY)
    kept, dense = lower_exported(exported), lower_exported(exported, kernels=False)
    assert len(operators(kept)) == len(operators(exported)) > 0
    assert not operators(dense)
    assert held_bytes(dense) > held_bytes(kept)
    check(kept, host)
    check(dense, host, atol=1e-5)


class Prepacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PrepackedLinear(torch.randn(6, 12), torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def test_a_weight_in_onednn_s_layout_comes_back_into_the_program() -> None:
    host, x = Prepacked().eval(), torch.randn(4, 12)
    exported = torch.export.export(host, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert operators(exported) == ["sparsify.prepacked_linear.default"]
    assert not held_bytes(exported) >= 4 * 6 * 12
    lowered = lower_exported(exported)
    y = torch.randn(9, 12)
    torch.testing.assert_close(lowered.module()(y), host(y))
    alive.pop(host.linear.handle)  # as in another process
    with pytest.raises(SparsifyError, match="not in this process"):
        lower_exported(exported)


@pytest.mark.parametrize("family", ["Llama", pytest.param("T5 (gated)", marks=pytest.mark.slow)])
def test_only_tensors_remain_arguments_and_outputs_are_plain(family: str) -> None:
    host = adapted(family, LoRA(rank=2))
    names = {"input_ids": tiny.tokens()}
    if family != "Llama":
        names["decoder_input_ids"] = tiny.tokens(3, 4)
    inputs = {**names, "output_hidden_states": True}
    exported = lower_exported(export_for_inference(host, inputs))
    with torch.no_grad():
        found = exported.module()(**names)
        expected = host(**inputs, use_cache=False)
    assert type(found) is dict
    assert ("hidden_states" if family == "Llama" else "decoder_hidden_states") in found
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-5, atol=2e-6)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(SparsifyError, match=r"expected a torch.export.ExportedProgram, got Mlp"):
        lower_exported(tiny.Mlp())  # type: ignore[arg-type]
    with pytest.raises(SparsifyError, match=r"must end in \.pt2, got 'model.so'"):
        package(tiny.Mlp(), "model.so", torch.randn(2, 12))
    exported = torch.export.export(tiny.Mlp(), (torch.randn(2, 12),))
    with pytest.raises(SparsifyError, match="has its example"):
        package(exported, "model.pt2", torch.randn(2, 12))
    with pytest.raises(CaptureError, match="Mlp"):
        export_for_inference(tiny.Mlp(), torch.randn(2, 13))


def test_two_constants_with_one_hint_get_two_names() -> None:
    exported = torch.export.export(tiny.Mlp(), (torch.randn(2, 12),))
    editor = Editor(exported)
    x = next(n for n, s in editor.specs.items() if n not in editor.lifted)
    nodes = [editor.add_constant("w", torch.ones(3), x) for _ in range(2)]
    assert {str(editor.specs[n].target) for n in nodes} == {"w_lowered", "w_lowered_1"}


# --- packages ----------------------------------------------------------------------------------------------------------------

FRESH = """
import sys, torch
if {sparsify}:
    import sparsify
loaded = torch._inductor.aoti_load_package({path!r})
def logits(found):
    assert type(found) is dict
    return found["logits"]
for x, expected in torch.load({reference!r}):
    found = {call}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
assert {sparsify} or "sparsify" not in sys.modules
print("equal")
"""


@torch.no_grad()
def references(host: nn.Module) -> list[tuple[Tensor, Tensor]]:
    batches = [tiny.tokens(rows, length) for rows, length in ((2, 5), (4, 13), (3, 9))]
    return [(ids, host(input_ids=ids, use_cache=False).logits) for ids in batches]


def in_a_fresh_process(
    path: Path, expected: Any, *, needs_sparsify: bool, call: str = "logits(loaded(input_ids=x))"
) -> subprocess.CompletedProcess[str]:
    reference = path.with_suffix(".ref")
    torch.save(expected, reference)
    script = FRESH.format(path=str(path), reference=str(reference), sparsify=needs_sparsify, call=call)
    found = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": found}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


@pytest.mark.slow  # in place of the C++ compiler: lifecycle/test_register.py::test_a_deployed_program_needs_neither_the_operator_nor_the_part
def test_a_program_as_one_file_runs_without_sparsify(tmp_path: Path) -> None:
    """Compiled ahead of time, and its adapter exchanged afterwards; the tests below do so with a transformer of any length."""
    host, x = adapted("Mlp", LoRA(rank=2)), torch.randn(3, 12)
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # most of the time is the C++ compiler's
    path = package(host, tmp_path / "model.pt2", x, fold=False, options=quick)
    with torch.no_grad():
        first = host(x)
        reference = [(x, first)]
    result = in_a_fresh_process(path, reference, needs_sparsify=False, call="loaded(x)")
    assert result.stdout.strip() == "equal", result.stderr
    loaded = torch._inductor.aoti_load_package(str(path))
    tiny.disturb(host, scale=0.3, seed=8)
    loaded.load_constants(
        {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}, check_full_update=False
    )
    with torch.no_grad():
        assert not torch.allclose(host(x), first, atol=1e-2)
        torch.testing.assert_close(loaded(x), host(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["s2ft", "rosa", "pruned", "nf4 lora", "int8 s2ft", "int4 rosa"])
def test_a_package_runs_without_sparsify(rules: str, tmp_path: Path) -> None:
    host = adapted("Llama", *RULES[rules])
    path = package(host, tmp_path / "model.pt2", {"input_ids": tiny.tokens()}, dynamic_shapes=ANY)
    result = in_a_fresh_process(path, references(host), needs_sparsify=False)
    assert result.stdout.strip() == "equal", result.stderr


@pytest.mark.slow
def test_a_package_exchanges_its_adapter(tmp_path: Path) -> None:
    host = adapted("Llama", S2FT(fraction=0.1, budget="structure"), RoSA(rank=2, density=0.02, mask="random"))
    first = references(host)
    path = package(host, tmp_path / "model.pt2", {"input_ids": tiny.tokens()}, dynamic_shapes=ANY, fold=False)
    loaded = torch._inductor.aoti_load_package(str(path))
    tiny.disturb(host, scale=0.3, seed=8)
    second = references(host)
    adapter = {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}
    for ids, expected in first:
        torch.testing.assert_close(loaded(input_ids=ids)["logits"], expected, rtol=1e-4, atol=1e-5)
    loaded.load_constants(adapter, check_full_update=False)
    for (ids, expected), (_, before) in zip(second, first, strict=True):
        assert (expected - before).abs().max() > 1e-2
        torch.testing.assert_close(loaded(input_ids=ids)["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_package_calls_the_generated_kernels(tmp_path: Path) -> None:
    host = for_target("cpu")
    path = package(host, tmp_path / "model.pt2", {"input_ids": tiny.tokens()}, dynamic_shapes=ANY)
    expected = references(host)
    result = in_a_fresh_process(path, expected, needs_sparsify=True)
    assert result.stdout.strip() == "equal", result.stderr
    result = in_a_fresh_process(path, expected, needs_sparsify=False)
    assert "sparsify::packed_linear" in result.stderr


class Builtin(nn.Module):
    """Arguments that Python has words for, as nn.Sequential's own `input` is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, input: Tensor, filter: Tensor) -> Tensor:
        return self.down(nn.functional.relu(self.up(input))) * filter


@pytest.mark.parametrize("fold", [True, False])
def test_arguments_named_like_builtins(fold: bool) -> None:
    x, y = torch.randn(3, 12), torch.randn(3, 12)
    host = tiny.lower(Builtin(), LoRA(rank=2), example=(x, y)).eval()
    tiny.disturb(host)
    exported = torch.export.export(host, (x, y))
    assert [n.name for n in exported.graph.nodes if n.op == "placeholder"][-2:] == ["input", "filter"]
    lowered = lower_exported(exported, fold=fold)
    assert not operators(lowered)
    torch.testing.assert_close(lowered.module()(x, y), host(x, y), rtol=1e-5, atol=2e-6)
