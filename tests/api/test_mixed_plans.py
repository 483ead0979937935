"""Any mix of rules in one plan: who gets which module, the gradients of every part, compilers, checkpointing, copies."""

from __future__ import annotations

import copy
from typing import Any

import methods
import pytest
import tiny
import torch
from methods import batches, compiled, logits, model_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, PlanError, Quantize, RefusedError, RoSA
from sparsify.errors import SparsifyError

EVERYTHING = (
    S2FT(structure="ffn", match="*.0.*", fraction=0.1, producer_fraction=0.1),
    PaCA(match="*.1.mlp.*", rank=4),
    RoSA(match="*.0.self_attn.*", rank=2, density=0.03),
    LoRA(match="*.1.self_attn.[qk]_proj", rank=3),
    S2FT(structure="attention", match="*.1.*", units=1),
)
PACKED = (Quantize(match="*.0.*", format="int8"), Quantize(match="*.1.mlp.*", format="nf4"), *EVERYTHING)


# --- who gets what -------------------------------------------------------------------------------------------------------


def owners(host: Any) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for things in (host.sparsify.program.slices, host.sparsify.program.lowranks):
        for thing in things:
            found.setdefault(thing.param.removeprefix("model.layers.").removesuffix(".weight"), set()).add(thing.rule)
    return found


def test_rules_for_different_modules_stand_side_by_side():
    found = owners(compiled(*EVERYTHING))
    assert found == {
        **{f"0.mlp.{n}_proj": {0} for n in ("up", "down")},
        **{f"1.mlp.{n}_proj": {1} for n in ("gate", "up", "down")},
        **{f"0.self_attn.{n}_proj": {2} for n in "qkvo"},
        **{f"1.self_attn.{n}_proj": {3} for n in "qk"},
        "1.self_attn.o_proj": {4},
    }


def test_a_weight_rule_and_a_training_rule_meet_on_one_module():
    host = compiled(*PACKED)
    assert set(owners(host)) == set(owners(compiled(*EVERYTHING)))
    formats = {
        p.removeprefix("model.layers.").removesuffix(".weight"): f for p, f in host.sparsify.program.quantize.items()
    }
    assert formats["0.mlp.gate_proj"] == "int8"  # packed, not trained
    assert formats["1.mlp.down_proj"] == "nf4"
    assert "1.self_attn.o_proj" not in formats


def test_the_first_rule_that_trains_a_module_keeps_it():
    first = compiled(LoRA(match="*.down_proj", rank=2), PaCA(match="*.mlp.*", rank=3))
    assert owners(first)["0.mlp.down_proj"] == {0}
    assert owners(first)["0.mlp.up_proj"] == {1}
    with pytest.raises(
        PlanError,
        match=r"rule 1, PaCA\(match='\*\.down_proj'.*serves nothing: rule 0 already has model.*one rule that trains",
    ):
        tiny.lower(model_of(), LoRA(match="*.mlp.*", rank=2), PaCA(match="*.down_proj", rank=3))
    with pytest.raises(PlanError, match=r"rule 1, S2FT\(.*matches nothing that is still free"):
        tiny.lower(model_of(), PaCA(match="*.mlp.*", rank=2), S2FT(structure="ffn", units=3))
    with pytest.raises(PlanError, match=r"rule 1, RoSA\(.*serves nothing"):
        tiny.lower(model_of(), S2FT(structure="ffn", units=3), RoSA(match="*.down_proj", rank=2, density=0.0))


@pytest.mark.parametrize(
    "rule",
    [PaCA(match="*.donw_proj"), LoRA(match="*.donw_proj"), RoSA(match="*.donw_proj"), Quantize(match="*.donw_proj")],
    ids=lambda r: type(r).__name__,
)
def test_a_rule_that_matches_nothing_names_the_nearest(rule):
    with pytest.raises(PlanError, match=r"matches no linear; did you mean .*down_proj|matches no linear; known are"):
        tiny.lower(model_of(), rule)


def test_a_named_module_that_cannot_serve_raises_with_the_reason():
    model = tiny.llama(tie_word_embeddings=True)
    with pytest.raises(RefusedError, match=r"lm_head|embed"):
        tiny.lower(model, LoRA(match="lm_head", rank=2, exclude=()))
    host = tiny.lower(model, LoRA(match="*", rank=2, exclude=()))
    assert any("tied" in str(r) or "also read" in str(r) for r in host.sparsify.report.declined)


def test_the_head_is_left_alone_unless_it_is_asked_for():
    assert not any("lm_head" in n for n in methods.trained_names(compiled(LoRA(rank=2))))
    assert {"lm_head.lora_A", "lm_head.lora_B"} <= methods.trained_names(compiled(LoRA(rank=2, exclude=())))


@pytest.mark.parametrize(
    "rule",
    [
        PaCA(rank={"*q*": 2, "*": 3}, select="gradient", largest=False, permute=False, exclude=("a", "b")),
        RoSA(rank={"*": 2}, alpha=3.5, density={"*": 0.1, "x": 0}, mask="gradient_abs", dropout=0.1, rslora=True),
        LoRA(rank=3, alpha=2, dropout=0.2, rslora=True),
        Quantize(format="int4", match="*.mlp.*"),
    ],
    ids=lambda r: type(r).__name__,
)
def test_plans_are_hashable_values_that_json_keeps(rule):
    plan = Plan([rule], seed=3)
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)
    assert plan in {plan: 1}
    assert list(Plan.from_json(plan.to_json()).rules[0].to_dict().items()) == list(rule.to_dict().items())


# --- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_every_part_gets_the_masked_dense_gradient(name):
    """One SGD step in fp64: each weight moves by −lr · dW on its support, and the factors by −lr · s Bᵀ dW and −lr · s dW Aᵀ."""
    if name == "Llama":
        rules = EVERYTHING
    else:
        rules = (
            S2FT(structure="ffn", match="*.0.*", units=5),
            PaCA(match="*.h.1.*", rank=4),
            RoSA(rank=2, density=0.03),
        )
    host = compiled(*rules, name=name, dtype=torch.float64)
    tiny.disturb(host)
    x, lr = tiny.tokens(), 1e-3
    before = methods.state(host, model_of(name))
    plain = methods.plain_with(host, name, torch.float64)
    params = list(host.sparsify.parts)
    gradient = methods.dense_gradients(plain, params, lambda m: tiny.probe_loss(m(x)))
    old = {(d.param, d.kind): d for d in host.sparsify.current().deltas}
    tiny.probe_loss(host(x)).backward()
    torch.optim.SGD(tiny.trainable(host), lr=lr).step()
    after = methods.state(host, model_of(name))
    new = {(d.param, d.kind): d for d in host.sparsify.current().deltas}
    kinds = set()
    for (param, kind), delta in new.items():
        kinds.add(kind)
        g = gradient[param]
        if kind == "lora":
            a, b = old[param, kind].a, old[param, kind].values
            dw = methods.logical(g, delta.transposed).to(b.dtype)
            da, db = delta.scale * b.t() @ dw, delta.scale * dw @ a.t()
            torch.testing.assert_close(delta.a - a, -lr * da, rtol=1e-2, atol=1e-6 + 1e-3 * lr * float(da.abs().max()))
            torch.testing.assert_close(
                delta.values - b, -lr * db, rtol=1e-2, atol=1e-6 + 1e-3 * lr * float(db.abs().max())
            )
            continue
        if (param, "lora") in new:
            continue  # the product of the factors moved, too; checked by the next test
        mask = torch.zeros_like(g)
        if kind == "sparse":
            mask.view(-1)[delta.channels] = 1
        else:
            mask.index_fill_(delta.axis, delta.channels, 1)
        torch.testing.assert_close(after[param] - before[param], -lr * mask * g, rtol=1e-6, atol=1e-10)
    assert kinds == {"column", "row", "sparse", "lora"} if name == "Llama" else {"column", "sparse", "lora"}


def test_sparse_values_beside_factors_get_the_dense_gradient_at_their_support():
    host = compiled(RoSA(rank=2, density=0.03), dtype=torch.float64)
    tiny.disturb(host)
    x = tiny.tokens()
    plain = methods.plain_with(host, dtype=torch.float64)
    gradient = methods.dense_gradients(plain, list(host.sparsify.parts), lambda m: tiny.probe_loss(m(x)))
    tiny.probe_loss(host(x)).backward()
    for part in host.sparsify.program.lowranks:
        module = host.get_submodule(part.param.removesuffix(".weight"))
        expected = gradient[part.param].flatten()[part.original.long()]
        torch.testing.assert_close(module.sparse_values.grad, expected, rtol=1e-5, atol=1e-5)  # folded factors are fp32


# --- PyTorch around it ---------------------------------------------------------------------------------------------------

COMPILED = {
    "paca": (PaCA(rank=3),),
    "rosa": (RoSA(rank=2, density=0.1, mask="random"),),
    "rosa, open mask": (RoSA(rank=2, density=0.1),),
    "lora, dropout": (LoRA(rank=2, dropout=0.1),),
    "int8 + paca": (Quantize(format="int8"), PaCA(rank=3)),
    "nf4 + rosa": (Quantize(format="nf4"), RoSA(rank=2, density=0.1, mask="random")),
    "int4 + s2ft": (Quantize(format="int4"), S2FT(units=4)),
}


def gradients(host: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}
    host.zero_grad()
    return found


def check_compiled(host: nn.Module, inputs: tuple[Any, ...], random: bool = False) -> None:
    host.train()
    tiny.disturb(host)
    tiny.probe_loss(host(*inputs)).backward()
    expected = gradients(host)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(host, backend=counter, fullgraph=True)
    tiny.probe_loss(fast(*inputs)).backward()
    found = gradients(host)
    assert counter.frame_count == 1
    assert set(found) == set(expected)
    if not random:
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    tiny.disturb(host, seed=9)  # new values, the same graph
    tiny.probe_loss(fast(*inputs)).backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("case", list(COMPILED))
def test_compile_gives_one_graph(case):
    host = compiled(*COMPILED[case], name="Mlp", calibrate="open" not in case)
    check_compiled(host, (torch.randn(3, 12),), random="dropout" in case)


def test_compile_gives_one_graph_for_a_mix_in_a_llama():
    check_compiled(compiled(*PACKED), (tiny.tokens(),))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    host = compiled(*PACKED).train()
    tiny.disturb(host)
    x = tiny.tokens()
    tiny.probe_loss(host(x)).backward()
    expected = gradients(host)
    host.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        host.enable_input_require_grads()
    runs = []
    host.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    tiny.probe_loss(host(x)).backward()
    assert len(runs) == 2
    found = gradients(host)
    assert set(found) == set(expected) == methods.trained_names(host)
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout_again(reentrant):
    host = compiled(LoRA(rank=2, dropout=0.5), name="Mlp").train()
    tiny.disturb(host)
    layer, x = host.layers[0]["up"], torch.randn(6, 12, requires_grad=True)
    torch.manual_seed(4)
    layer(x).square().sum().backward()
    expected = gradients(host)
    torch.manual_seed(4)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for name, g in gradients(host).items():
        torch.testing.assert_close(g, expected[name])


def test_autocast_trains_in_16_bits_with_gradients_in_32():
    host = compiled(*PACKED).train()
    tiny.disturb(host)
    x = tiny.tokens()
    exact = host(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        outputs = host(x)
        assert host.model.layers[0].mlp.up_proj(torch.randn(2, 36)).dtype == torch.bfloat16
    torch.testing.assert_close(outputs.logits.float(), exact, atol=0.15, rtol=0.1)
    tiny.probe_loss(outputs).backward()
    found = gradients(host)
    assert set(found) == methods.trained_names(host)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in found.values())


def test_accumulated_gradients_equal_those_of_the_joint_batch():
    host = compiled(*EVERYTHING, dtype=torch.float64)
    x = tiny.tokens(6)
    host(x, labels=x).loss.backward()
    joint = gradients(host)
    for part in x.split(2):
        (host(part, labels=part).loss / 3).backward()
    for name, g in gradients(host).items():
        torch.testing.assert_close(g, joint[name])


# --- the handle ----------------------------------------------------------------------------------------------------------


def test_a_mixed_adapter_saves_loads_switches_and_restores(tmp_path):
    host = compiled(*EVERYTHING)
    base = logits(host)
    losses = tiny.train(host, steps=5)
    assert losses[-1] < losses[0]
    trained = logits(host)
    host.sparsify.save_adapter(tmp_path)
    for server in (compiled(*EVERYTHING), compiled(*EVERYTHING, seed=5), compiled(LoRA(rank=2))):
        server.sparsify.load_adapter(tmp_path, "z")
        server.sparsify.set_adapter("z")
        torch.testing.assert_close(logits(server), trained, atol=1e-4, rtol=1e-4)
        server.sparsify.set_adapter(None)
        tiny.assert_same(tiny.snapshot(server.sparsify.restore()), tiny.snapshot(model_of()))
    host.sparsify.merge()
    torch.testing.assert_close(logits(host), trained, atol=1e-4, rtol=1e-4)
    with pytest.raises(SparsifyError, match="merged"):
        host.sparsify.set_adapter(None)
    host.sparsify.unmerge()
    assert torch.equal(logits(host), trained)
    host.sparsify.set_adapter(None)
    assert torch.equal(logits(host), base)
    tiny.assert_same(tiny.snapshot(host.sparsify.restore()), tiny.snapshot(model_of()))


def test_state_dict_of_a_mix_is_exact_and_in_original_layout():
    for rules in (EVERYTHING, PACKED):
        host = compiled(*rules)
        tiny.disturb(host)
        saved = {n: t.clone() for n, t in host.state_dict().items()}
        fresh = compiled(*rules)
        fresh.load_state_dict(saved)
        assert torch.equal(logits(fresh), logits(host))
        torch.testing.assert_close(logits(methods.plain_with(host)), logits(host), atol=1e-3, rtol=1e-3)


def test_the_program_computes_what_the_host_does():
    for rules in (EVERYTHING, PACKED):
        host = compiled(*rules, check="numeric" if rules is EVERYTHING else "none")
        tiny.disturb(host)
        example = host.sparsify.program.example[1]
        torch.testing.assert_close(host.sparsify.program(**example).logits, host(**example).logits)
        text = str(host.sparsify.program)
        for word in (
            ("sparse_lowrank_linear", "partial_linear_at", "partial_linear")
            if rules is EVERYTHING
            else ("quantized_linear",)
        ):
            assert word in text


def test_deepcopies_and_reports_of_a_mix():
    host = compiled(*PACKED)
    clone = copy.deepcopy(host)
    before = logits(host)
    tiny.train(clone, steps=1)
    assert torch.equal(logits(host), before)
    trainable = sum(p.numel() for p in tiny.trainable(host))
    report = host.sparsify.report
    assert report.trainable == trainable
    assert str(report)
    assert host.sparsify.count_parameters()[0] == trainable
    reference = sum(p.numel() for p in model_of().parameters())
    low = sum(p.numel() for n, p in host.named_parameters() if "lora_" in n)
    assert host.sparsify.count_parameters()[1] == reference + low


def test_weights_that_are_not_contiguous_in_memory():
    """A transposed parameter is legal; supports are flat positions, so our copy of the weight must be laid out in rows."""
    for rule in (
        RoSA(rank=2, density=0.1),
        RoSA(rank=2, density=0.1, mask="random"),
        PaCA(rank=3),
        Quantize(format="int8"),
        LoRA(rank=2),
    ):
        model = tiny.Mlp()
        for layer in model.layers:
            layer["up"].weight = nn.Parameter(torch.randn(12, 20).t())
        base = tiny.snapshot(model)
        x = torch.randn(4, 12)
        host = sparsify.compile(
            model, Plan([rule]), example=x, calibration=batches("Mlp"), loss=methods.loss_of, progress=False
        )
        torch.testing.assert_close(host(x), model(x), atol=0.2 if isinstance(rule, Quantize) else 1e-5, rtol=1e-4)
        if not isinstance(rule, Quantize):
            tiny.train(host, x=x)
            tiny.assert_same(tiny.snapshot(host.sparsify.restore()), base)
        tiny.assert_same(tiny.snapshot(model), base)


def test_every_family_takes_every_method():
    for name in ("Qwen2", "GPT-NeoX", "Phi-3", "T5 (gated)", "ViT"):
        model = tiny.build(name)
        inputs = tiny.inputs_of(model, name)
        expected = tiny.output_of(model(**inputs))
        host = tiny.lower(
            model, PaCA(match="*0.*", rank=3), RoSA(rank=2, density=0.02, mask="magnitude"), check="numeric"
        )
        assert {type(t).__name__ for t in (*host.sparsify.program.slices, *host.sparsify.program.lowranks)} == {
            "TrainedSlice",
            "SparseLowRank",
        }
        torch.testing.assert_close(tiny.output_of(host(**inputs)), expected, atol=1e-4, rtol=1e-3)
        losses = tiny.train(host, steps=2, **inputs)
        assert losses[-1] < losses[0]
        tiny.assert_same(tiny.snapshot(host.sparsify.restore()), tiny.snapshot(model))


@pytest.mark.parametrize(
    "rules",
    [[S2FT(units=3)], [PaCA(rank=2)], [RoSA(rank=2, density=0.1)], [Quantize(format="int8"), LoRA(rank=2)]],
    ids=lambda rules: type(rules[-1]).__name__,
)
def test_a_module_whose_input_is_called_input(rules):
    """`nn.Sequential` calls it so; copying the graph renames it, since Python has a builtin of that name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = torch.randn(5, 64)
    host = sparsify.compile(model, Plan(rules), example=x, progress=False)
    torch.testing.assert_close(host(x), model(x), atol=0.05 if isinstance(rules[0], Quantize) else 1e-5, rtol=0)
    torch.testing.assert_close(host.sparsify.program(x), host(x))
    for param in host.sparsify.open_masks():
        host.sparsify.set_masks({param: torch.arange(0, 64 * 128, 10)[:819]})
    host(x).sum().backward()
    assert all(p.grad is not None for p in host.parameters() if p.requires_grad)
    torch.testing.assert_close(host.sparsify.program(x), host(x))
