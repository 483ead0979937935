"""Quantize as a plan rule: what it stores and saves, every method on top of every format, folding, hashes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import methods
import pytest
import tiny
import torch
from methods import compiled, logits, model_of
from torch import nn

import sparsify
import sparsify.ops.quantized_linear as ops
from sparsify import S2FT, LoRA, PaCA, PlanError, Quantize, RoSA
from sparsify.errors import AdapterError, SparsifyError
from sparsify.formats import FORMATS, pack, unpack
from sparsify.methods.packed import QuantizedMixin

METHODS = {
    "s2ft": S2FT(fraction=0.1, producer_fraction=0.1, budget="structure"),
    "paca": PaCA(rank=4),
    "rosa": RoSA(rank=2, density=0.03, mask="magnitude"),
    "lora": LoRA(rank=3),
}


def dequantised(name: str, format: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The plain model whose linears hold what the packed weights stand for (nothing reordered)."""
    model = copy.deepcopy(model_of(name, dtype))
    for param in compiled(Quantize(format=format), name=name, dtype=dtype).sparsify.program.quantize:
        weight = model.get_parameter(param)
        weight.data.copy_(unpack(pack(weight.data, format), format, tuple(weight.shape), dtype))
    return model


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("format", FORMATS)
def test_alone_it_computes_with_the_dequantised_weights(format, name):
    host = compiled(Quantize(format=format), name=name)
    assert len(host.sparsify.program.quantize) == (14 if name == "Llama" else 8)
    assert not any("lm_head" in p for p in host.sparsify.program.quantize)
    torch.testing.assert_close(logits(host, name), logits(dequantised(name, format), name), atol=1e-4, rtol=1e-4)
    assert tiny.trainable(host) == []
    assert not torch.equal(logits(host, name), logits(model_of(name), name))


@pytest.mark.parametrize("format", FORMATS)
def test_no_dense_weight_is_left_and_the_bytes_are_reported(format):
    host = compiled(Quantize(format=format))
    dense = stored = 0
    packings = {p.param: p for p in host.sparsify.program.packings}
    for param in host.sparsify.program.quantize:
        module = host.get_submodule(param.removesuffix(".weight"))
        assert isinstance(module, QuantizedMixin)
        assert isinstance(module, nn.Linear)
        assert module.weight.numel() == 0
        bytes_here = sum(t.numel() * t.element_size() for t in module.packed())
        assert packings[param].packed_bytes == bytes_here
        assert packings[param].dense_bytes == module.shape.numel() * 4
        assert 0 < packings[param].error < 0.15
        dense, stored = dense + module.shape.numel() * 4, stored + bytes_here
    assert (
        stored < (0.7 if format == "nf4" else 0.4) * dense
    )  # NF4's tables weigh 1 KiB, which is much on weights this small
    assert "weights packed" in str(host.sparsify.report)
    trainable, total = host.sparsify.count_parameters()
    assert (trainable, total) == (0, sum(p.numel() for p in model_of().parameters()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_on_top_of_every_format(method, format, tmp_path):
    host = compiled(Quantize(format=format), METHODS[method])
    base = logits(host)
    packed = {n: b.clone() for n, b in host.state_dict().items() if "packed_" in n}
    assert (base - logits(compiled(Quantize(format=format)))).abs().max() < (
        0.05 if method in ("s2ft", "paca") else 1e-4
    )
    assert all(p.dtype == torch.float32 for p in tiny.trainable(host))
    losses = tiny.train(host, steps=4)
    assert losses[-1] < losses[0]
    tiny.assert_same({n: b for n, b in host.state_dict().items() if "packed_" in n}, packed)
    trained = logits(host)
    host.sparsify.save_adapter(tmp_path)
    host.sparsify.set_adapter(None)
    assert torch.equal(logits(host), base)
    host.sparsify.set_adapter("default")
    assert torch.equal(logits(host), trained)
    fresh = compiled(Quantize(format=format), METHODS[method])
    fresh.sparsify.load_adapter(tmp_path, "z")
    assert fresh.sparsify.set_adapter("z").trainable
    torch.testing.assert_close(logits(fresh), trained, atol=1e-5, rtol=1e-4)
    mix = fresh.sparsify.set_adapter({"z": 0.5, "default": 0.5})
    assert not mix.trainable
    torch.testing.assert_close(
        methods.plain_with(fresh)(tiny.tokens()).logits, fresh(tiny.tokens()).logits, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("method", list(METHODS))
def test_gradients_are_those_of_the_dequantised_model(method):
    host = compiled(Quantize(format="int8"), METHODS[method])
    twin = sparsify.compile(dequantised("Llama", "int8"), sparsify.Plan([METHODS[method]]), progress=False)
    x = tiny.tokens()
    with torch.no_grad():
        for module, twin_module in zip(host.modules(), twin.modules(), strict=True):
            if isinstance(module, QuantizedMixin):  # packed after S2FT's co-permutation, so not bit for bit the twin's
                twin_module.weight.data.copy_(module.dense())
                for leaf in ("weight_slice", "sparse_values"):
                    if leaf in module._parameters:
                        twin_module._parameters[leaf].data.copy_(module._parameters[leaf])
    torch.testing.assert_close(host(x).logits, twin(x).logits, atol=1e-4, rtol=1e-4)
    for h in (host, twin):
        tiny.probe_loss(h(x)).backward()
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in host.named_parameters() if p.grad is not None}
    assert set(found) == set(expected) == methods.trained_names(host)
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, atol=1e-3 * float(g.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_donated_model_gives_the_same(method):
    """Once a bug: with S2FT the structures were checked against weights that had been freed."""
    kept = compiled(Quantize(), METHODS[method])
    model = copy.deepcopy(model_of())
    plan = sparsify.Plan([Quantize(), METHODS[method]])
    host = sparsify.compile(
        model, plan, calibration=methods.batches(), loss=methods.loss_of, donate=True, progress=False
    )
    tiny.assert_same(tiny.state_of(host), tiny.state_of(kept))
    assert torch.equal(logits(host), logits(kept))
    assert str(host.sparsify.report) == str(kept.sparsify.report)


def test_masks_and_selections_are_scored_on_the_dequantised_weights():
    """A 4-bit weight has other large entries, and other gradients, than the dense one that it stands for."""
    model, before = dequantised("Llama", "nf4"), tiny.snapshot(model_of())
    rules = (
        RoSA(match="*attn*", rank=0, density=0.05, mask="magnitude"),
        PaCA(match="*.gate_proj", rank=9, select="weight"),
    )
    rules = (*rules, RoSA(match="*.down_proj", rank=0, density=0.05))
    host, dense = compiled(*rules, Quantize(format="nf4")), compiled(*rules)  # Quantize may stand anywhere
    differs = 0
    for part, other in zip(host.sparsify.program.lowranks, dense.sparsify.program.lowranks, strict=True):
        differs += not torch.equal(part.index, other.index)
        if "attn" in part.param:
            score = model.get_parameter(part.param).detach().abs().flatten()
        else:
            score = torch.zeros(1)
            for batch in methods.batches():
                found = methods.dense_gradients(model, [part.param], lambda m, b=batch: m(**b).loss)
                score = score + found[part.param].square().flatten()
        chosen = score[part.index.long()]
        assert float(chosen.min()) >= float(score.topk(part.count).values[-1]) * (1 - 1e-3), part.param
    assert differs
    for piece in host.sparsify.program.slices:
        norms = model.get_parameter(piece.param).detach().norm(dim=0)
        assert set(piece.channels) == set(norms.topk(9).indices.tolist())
    tiny.assert_same(tiny.snapshot(model_of()), before)


def test_a_training_step_unpacks_one_layer_at_a_time(monkeypatch):
    """Nothing dense of an earlier layer is alive when the next one is unpacked, nor between forward and backward."""
    from torch.multiprocessing.reductions import StorageWeakRef

    host = compiled(Quantize(format="nf4"), LoRA(rank=2))
    alive: list[StorageWeakRef] = []

    def spy(*args: Any) -> Any:
        assert all(ref.expired() for ref in alive)
        dense = unpack(*args)
        alive.append(StorageWeakRef(dense.untyped_storage()))
        return dense

    monkeypatch.setattr(ops, "unpack", spy)
    loss = tiny.probe_loss(host(tiny.tokens()))
    assert len(alive) == 14
    assert all(ref.expired() for ref in alive)
    loss.backward()
    assert len(alive) > 24, "the backward unpacks again"
    assert all(ref.expired() for ref in alive)


def step_peak(layers: int) -> int:
    """Largest sum of live allocations over one warm training step of a packed chain."""
    import sparsify
    from sparsify import Plan

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(160, 160, bias=False) for _ in range(layers)))
    x = torch.randn(2, 160)
    host = sparsify.compile(model, Plan([Quantize(format="int8"), LoRA(rank=1)]), example=x, progress=False)

    def step() -> None:
        host(x).square().sum().backward()
        host.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    live = top = 0
    for event in sorted(
        (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        top = max(top, live)
    return top


def test_peak_memory_of_a_step_does_not_grow_with_the_number_of_packed_layers():
    two, eight = step_peak(2), step_peak(8)
    dense = 160 * 160 * 4
    assert two > dense, "one layer is unpacked"
    assert eight - two < dense / 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("method", ["paca", "rosa", "lora"])
def test_merge_says_by_how_much_it_moves_and_unmerge_is_exact(method, format):
    host = compiled(Quantize(format=format), METHODS[method])
    tiny.disturb(host, scale=0.1)
    expected = logits(host)
    with pytest.warns(
        UserWarning, match=r"14 packed weights were quantised again; a weight moves by up to \d+\.\d+% .*outputs by"
    ):
        host.sparsify.merge()
    note = host.sparsify.merge_note
    assert note is not None
    assert set(note.weights) == set(host.sparsify.parts)
    assert 0 < max(note.weights.values()) < 0.2
    moved = float((logits(host) - expected).abs().max() / expected.abs().max())
    assert 0 < moved < 0.6
    assert 0 < note.outputs < 1
    assert not any(p.requires_grad for p in host.parameters())
    host.sparsify.unmerge()
    assert torch.equal(logits(host), expected)


def test_restore_refuses_and_says_where_the_base_is():
    with pytest.raises(
        SparsifyError, match="packed by Quantize and its dense bits are not kept; the model that was passed"
    ):
        compiled(Quantize(), PaCA(rank=4)).sparsify.restore()
    with pytest.raises(AdapterError, match="would write the packed base as if it were dense|sparse part"):
        host = compiled(Quantize(), METHODS["rosa"])
        tiny.disturb(host)
        host.sparsify.export_lora("/nowhere", sparse="merge")


@pytest.mark.parametrize("method", list(METHODS))
def test_the_base_hash_does_not_depend_on_packing(method):
    dense = compiled(METHODS[method])
    for format in FORMATS:
        packed = compiled(Quantize(format=format), METHODS[method])
        assert packed.sparsify.current().bases == dense.sparsify.current().bases
    assert len(dense.sparsify.current().bases) >= 4


def test_adapters_move_between_packed_and_dense_bases(tmp_path):
    packed = compiled(Quantize(format="int8"), PaCA(rank=4))
    tiny.disturb(packed, scale=0.1)
    packed.sparsify.save_adapter(tmp_path)
    for other in (compiled(PaCA(rank=4)), compiled(Quantize(format="nf4"), PaCA(rank=4)), compiled(LoRA(rank=2))):
        before = logits(other)
        other.sparsify.load_adapter(tmp_path, "z")
        other.sparsify.set_adapter("z")
        now = logits(other)
        assert (now - before).abs().max() > 1e-2
        other.sparsify.set_adapter(None)
        assert torch.equal(logits(other), before)


def test_a_packed_base_refuses_an_adapter_of_other_entries(tmp_path):
    host = compiled(Quantize(format="int8"), PaCA(rank=4), seed=1)
    tiny.disturb(host)
    host.sparsify.save_adapter(tmp_path)
    other = compiled(Quantize(format="int8"), PaCA(rank=4), seed=2)
    base = logits(other)
    other.sparsify.load_adapter(tmp_path, "z")
    with pytest.raises(
        AdapterError,
        match=r"changes other entries of .* and the base is packed \(int8\); compile with the adapter's own",
    ):
        other.sparsify.set_adapter("z")
    assert torch.equal(logits(other), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_changing_the_dtype_of_the_model_leaves_the_packed_base_alone(format, dtype):
    """`model.to(bf16)` casts floating buffers; rounding the scales would move every weight."""
    host = compiled(Quantize(format=format), LoRA(rank=2))
    kept = {n: b.clone() for n, b in host.state_dict().items() if "packed_" in n}
    expected = logits(host)
    host.to(dtype)
    tiny.assert_same({n: b for n, b in host.state_dict().items() if "packed_" in n}, kept)
    torch.testing.assert_close(logits(host).float(), expected, atol=0.1 if dtype != torch.float64 else 1e-3, rtol=0)
    host.float()
    tiny.train(host, steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_bases(dtype):
    for format in FORMATS:
        host = compiled(Quantize(format=format), PaCA(rank=4), dtype=dtype)
        assert logits(host).dtype == dtype
        assert {p.dtype for p in tiny.trainable(host)} == {torch.float32}
        tiny.train(host, steps=2)


def test_state_dict_and_deepcopy_round_trips():
    for method, rule in METHODS.items():
        host = compiled(Quantize(format="nf4"), rule)
        tiny.disturb(host)
        saved = {n: t.clone() for n, t in host.state_dict().items()}
        fresh = compiled(Quantize(format="nf4"), rule)
        fresh.load_state_dict(saved)
        assert torch.equal(logits(fresh), logits(host)), method
        plain = methods.plain_with(host)
        torch.testing.assert_close(logits(plain), logits(host), atol=1e-3, rtol=1e-3)
        clone = copy.deepcopy(host)
        tiny.train(clone, steps=1)
        assert torch.equal(logits(fresh), logits(host))


def test_save_pretrained_writes_the_model_that_it_computes_with(tmp_path):
    host = compiled(Quantize(format="int8"), METHODS["rosa"])
    tiny.disturb(host)
    host.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = type(model_of()).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), logits(host), atol=1e-3, rtol=1e-3)


def test_the_first_quantize_rule_wins_and_excluded_modules_stay_dense():
    host = compiled(
        Quantize(match="*.down_proj", format="int8"), Quantize(match="*.mlp.*", format="nf4", exclude=("*.up_proj",))
    )
    formats = {p.split(".")[-2]: f for p, f in host.sparsify.program.quantize.items()}
    assert formats == {"down_proj": "int8", "gate_proj": "nf4"}
    with pytest.raises(PlanError, match=r"rule 1, Quantize\(match='\*\.down_proj'.*serves nothing"):
        tiny.lower(model_of(), Quantize(match="*.mlp.*"), Quantize(match="*.down_proj", format="int8"))


def test_a_parameter_that_trains_in_full_cannot_be_packed():
    with pytest.raises(PlanError, match="which a rule packs or trains in part"):
        tiny.lower(model_of(), Quantize(), train=["*.down_proj"])


def test_unknown_formats_are_refused_at_construction():
    with pytest.raises(PlanError, match="formats are nf4, int8, int4"):
        Quantize(format="fp8")


def test_a_module_used_twice_gets_its_own_weight_back():
    """Scored on what its packed weight stands for, under both of its names; the user's model keeps its Parameter."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
            self.again = self.first

        def forward(self, x):
            return self.last(self.again(self.first(x).relu()).relu())

    model = Twice()
    before = dict(model.named_parameters(remove_duplicate=False))
    host: Any = sparsify.compile(
        model,
        sparsify.Plan([RoSA(rank=0, density=0.05), Quantize()]),
        example=torch.randn(4, 64),
        calibration=[torch.randn(4, 64)],
        loss=lambda y, _: y.square().mean(),
        progress=False,
    )
    assert set(host.sparsify.program.quantize) == {"first.weight", "last.weight"}
    assert all(p is before[n] for n, p in model.named_parameters(remove_duplicate=False))
