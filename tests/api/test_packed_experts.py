"""Packed experts train in part: every family of them by every rule, against the dense gradient of the user's own model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA
from sparsify.errors import AdapterError
from sparsify.methods.channels import TrainedSlice
from sparsify.methods.sparse_lowrank import SparseLowRank
from sparsify.model.packed_experts import GroupedLinear

TOKENS = 53
#: pairwise different, and multiples of 8: transformers' own grouped product wants rows of 16 bytes
SIZES = {
    "vocab_size": TOKENS, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ONE = {"num_hidden_layers": 1}  # no test looks for what differs between layers, except between DeepSeek-V3's
SMALL = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {**ONE, "num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen3Moe": {**SMALL, **ONE, "num_experts": 3, "decoder_sparse_step": 1},
    "DeepseekV3": {**SMALL, **LATENT},
    "GptOss": {**ONE, "num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["full_attention"]},
    "Olmoe": {**ONE, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 12},
    "GraniteMoe": {**ONE, "num_local_experts": 3, "num_experts_per_tok": 2},
    "Llama4": {**ONE, "num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
}  # fmt: skip
CONFIGS = {"Llama4": "Llama4TextConfig"}
RULES = {
    "S2FT": S2FT(0.1, match="*.experts", producer_fraction=0.0),
    "S2FT in place": S2FT(0.1, match="*.experts", permute=False),
    "PaCA": PaCA(rank=3, match="*.experts.*"),
    "RoSA": RoSA(rank=2, density=0.05, mask="random", match="*.experts.*"),
    "LoRA": LoRA(rank=3, match="*.experts.*"),
}


def build(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {**SIZES, **FAMILIES[family], **more}
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # zeros and ones would hide mistakes
        parameter.data.copy_(torch.randn(parameter.shape) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.to(dtype)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, TOKENS, (2, 9), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def perturb(host: Any) -> None:
    """Trained values that are not the base's, so that a part which does nothing shows."""
    torch.manual_seed(3)
    for parameter in host.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


def compiled(family: str, rule: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    model = build(family, dtype)
    return model, sparsify.compile(model, Plan([RULES[rule]]), progress=False)


def dense_gradients(model: nn.Module, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the user's own class, in fp64-free PyTorch alone, with the host's weights."""
    plain: Any = copy.deepcopy(model)
    plain.load_state_dict(state)
    plain.requires_grad_(True)
    loss = plain(**batch()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def wanted(host: Any, part: Any, dense: Tensor) -> dict[str, Tensor]:
    """The gradients of one part's parameters, from the dense gradient of its weight in original order."""
    live = host.sparsify.parts[part.param]
    stored = live.layout.to_current("weight", dense)
    if isinstance(part, TrainedSlice):
        return {"weight_slice": part.read(stored)}
    assert isinstance(part, SparseLowRank)
    logical = stored.mT if part.transposed else stored
    module = live.module
    found = {
        "lora_A": part.scale * module.lora_B.detach().mT.to(dense.dtype) @ logical,
        "lora_B": part.scale * logical @ module.lora_A.detach().mT.to(dense.dtype),
    }
    if part.index is not None:
        found["sparse_values"] = stored.reshape(-1)[part.index.long()]
    return found


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of the sums that two orders of the same products give."""
    scale = float(expected.double().norm() / max(1, expected.numel()) ** 0.5)
    error = float((found.double() - expected.double()).norm() / max(1, expected.numel()) ** 0.5)
    bound = 64 * torch.finfo(dtype).eps
    assert error <= bound * max(scale, 1e-12), f"relative error {error / max(scale, 1e-12):.1e} of {bound:.1e}"


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_is_the_masked_dense_gradient(family: str, rule: str) -> None:
    model, host = compiled(family, rule)
    experts = [p for p in host.sparsify.program.parts if host.sparsify.stored(p.param).dim() == 3]
    assert experts, "no packed weight trains"
    names = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.dim() == 3 and "down_proj" in n}
    assert {p.param.rpartition(".")[0].rpartition(".")[0] for p in experts} == names
    perturb(host)
    host.train()
    loss = host(**batch()).loss
    loss.backward()
    expected, dense = dense_gradients(model.train(), host.sparsify.original_state_dict())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    for part in experts:
        gradients = wanted(host, part, dense[part.param.removesuffix(".weight")])
        assert host.sparsify.stored(part.param).grad is None
        for leaf, value in gradients.items():
            found = host.sparsify.parts[part.param].tensors()[leaf].grad
            assert found is not None
            assert bool(found.any())
            close(found, value, torch.float32)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_the_life_of_an_adapter(family: str, rule: str, tmp_path: Any) -> None:
    model, host = compiled(family, rule)
    inputs = {"input_ids": batch()["input_ids"]}
    model.eval()
    host.eval()
    base = model(**inputs).logits.detach()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.testing.assert_close(host(**inputs).logits.detach(), base, rtol=1e-4, atol=1e-5)
    perturb(host)
    handle = host.sparsify
    trained = host(**inputs).logits.detach()
    assert float((trained - base).abs().max()) > 1e-3
    handle.save_adapter(tmp_path / "a")
    # onto another selection, onto the same one, onto the plain model
    other: Any = sparsify.compile(model, Plan([RULES[rule]], seed=7), progress=False).eval()
    other.sparsify.load_adapter(tmp_path / "a", "a")
    other.sparsify.set_adapter("a")
    torch.testing.assert_close(other(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    same: Any = sparsify.compile(model, Plan([RULES[rule]]), progress=False).eval()
    same.sparsify.load_adapter(tmp_path / "a", "a")
    same.sparsify.set_adapter("a")
    assert torch.equal(same(**inputs).logits.detach(), trained)
    served: Any = sparsify.load(model, tmp_path / "a")
    torch.testing.assert_close(served(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    # switch, mix, fold, go back
    handle.set_adapter(None)
    torch.testing.assert_close(host(**inputs).logits.detach(), base, rtol=1e-4, atol=1e-5)
    handle.set_adapter({"default": 0.5})
    assert not torch.equal(host(**inputs).logits.detach(), trained)
    handle.set_adapter("default")
    assert torch.equal(host(**inputs).logits.detach(), trained)
    live = copy.deepcopy(host.state_dict())
    plain = handle.plain()
    assert type(plain) is type(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(plain(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    original = handle.original_state_dict()
    assert set(original) == set(before)
    handle.merge()
    torch.testing.assert_close(host(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    handle.unmerge()
    assert torch.equal(host(**inputs).logits.detach(), trained)
    handle.set_adapter(None)
    handle.set_adapter("default")
    host.load_state_dict(live)
    assert torch.equal(host(**inputs).logits.detach(), trained)
    if rule.startswith(("S2FT", "PaCA")):  # the channels follow from a folded weight
        fresh: Any = sparsify.compile(model, Plan([RULES[rule]]), progress=False).eval()
        fresh.load_state_dict(original)
        torch.testing.assert_close(fresh(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(host)
    assert torch.equal(copied(**inputs).logits.detach(), trained)
    back = handle.restore()
    assert not any(isinstance(m, GroupedLinear) for m in back.modules())
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_peft_computes_the_same_from_target_parameters(family: str, tmp_path: Any) -> None:
    """There and back: our folder in PEFT, and the folder that PEFT writes here."""
    peft = pytest.importorskip("peft")
    model = build(family).eval()
    plan = Plan([LoRA(rank=2, match="*.experts.down_proj"), LoRA(rank=3, match=["*.experts.gate_up_proj", "*.q_proj"])])
    if family == "DeepseekV3":
        plan = Plan(
            [LoRA(rank=2, match="*.experts.down_proj"), LoRA(rank=3, match=["*.experts.gate_up_proj", "*.q_a_proj"])]
        )
    host: Any = sparsify.compile(model, plan, progress=False).eval()
    perturb(host)
    inputs = {"input_ids": batch()["input_ids"]}
    trained = host(**inputs).logits.detach()
    host.sparsify.export_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(theirs(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    served: Any = sparsify.load(model, tmp_path / "lora")
    torch.testing.assert_close(served(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "again"))
    host.sparsify.load_adapter(tmp_path / "again", "again")
    host.sparsify.set_adapter("again")
    torch.testing.assert_close(host(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)


def test_what_peft_has_no_form_for_is_refused(tmp_path: Any) -> None:
    _, host = compiled("Mixtral", "PaCA")
    perturb(host)
    with pytest.raises(AdapterError, match=r"trained columns of packed experts.*low-rank factors alone"):
        host.sparsify.export_lora(tmp_path / "lora")
    _, host = compiled("Mixtral", "RoSA")
    with pytest.raises(AdapterError, match="sparse part"):
        host.sparsify.export_lora(tmp_path / "lora")


@pytest.mark.parametrize("rule", ["S2FT", "PaCA", "RoSA", "LoRA"])
@pytest.mark.parametrize("training", [True, False])
def test_sixteen_bits_train_in_fp32_beside_the_base(rule: str, training: bool) -> None:
    """Over bfloat16 the trained parameters are fp32; gradients are the dense ones up to the rounding of 16 bits."""
    model, host = compiled("Mixtral", rule, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in host.parameters() if p.requires_grad)
    host.train(training)
    loss = host(**batch()).loss
    loss.backward()
    expected, dense = dense_gradients(model.train(training), host.sparsify.original_state_dict())
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-2, atol=2e-2)
    for part in host.sparsify.program.parts:
        gradients = wanted(host, part, dense[part.param.removesuffix(".weight")].float())
        for leaf, value in gradients.items():
            found = host.sparsify.parts[part.param].tensors()[leaf].grad
            if leaf == "lora_A":  # B is zero
                assert not bool(found.any())
            else:
                close(found, value, torch.bfloat16)


def test_a_rule_for_other_linears_leaves_the_experts_alone() -> None:
    model = build("Mixtral")
    host: Any = sparsify.compile(model, Plan([LoRA(rank=2, match="*.q_proj")]), progress=False)
    assert [type(m) for m in host.model.layers[0].mlp.experts.modules()] == [
        type(m) for m in model.model.layers[0].mlp.experts.modules()
    ]
    assert "model.layers.0.mlp.experts.gate_up_proj" in dict(host.named_parameters())


def test_the_program_agrees_with_its_host_and_says_what_trains() -> None:
    _, host = compiled("Mixtral", "S2FT")
    perturb(host)
    host.eval()
    program = host.sparsify.program
    args, kwargs = program.example
    kwargs = {k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask")} or kwargs
    torch.testing.assert_close(program.run_example()["logits"], host(*args, **kwargs).logits, rtol=1e-4, atol=1e-5)
    text = program.text(fold=False)
    assert text.count("sparsify.partial_grouped_linear") == 1
    assert "channels of every expert" in text
    assert "moves nothing" not in str(host.sparsify.report)


def test_gradient_scores_see_every_expert_by_itself() -> None:
    """Squares of the experts' own gradients, which a sum over experts would cancel."""
    model = build("Mixtral")
    rule = PaCA(rank=3, match="*.experts.down_proj", select="gradient", permute=False)
    host: Any = sparsify.compile(model, Plan([rule]), calibration=[batch()], progress=False)
    _, dense = dense_gradients(model.eval(), model.state_dict())
    for choice in host.sparsify.program.channel_choices:
        (param,) = choice.params
        scores = dense[param.removesuffix(".weight")].square().sum((0, 1))
        best = scores.topk(3, largest=rule.largest).indices.sort().values.tolist()
        assert list(choice.channels) == best
    assert len(host.sparsify.program.channel_choices) == 1


def test_quantize_leaves_experts_dense_and_says_so() -> None:
    from sparsify import Quantize

    model = build("Mixtral")
    host: Any = sparsify.compile(model, Plan([Quantize("nf4"), LoRA(rank=2)]), progress=False)
    assert any("packed experts are not quantised" in str(r) for r in host.sparsify.report.declined)
    host(**batch()).loss.backward()
    assert host.sparsify.parts["model.layers.0.mlp.experts.down_proj.weight"].tensors()["lora_B"].grad is not None


@pytest.mark.parametrize("rule", ["S2FT in place", "LoRA"])
def test_checkpoints_are_the_users(rule: str, tmp_path: Any) -> None:
    """transformers writes packed experts one by one; what trains beside them must not be taken for one of them."""
    from transformers import MixtralForCausalLM

    _, host = compiled("Mixtral", rule)
    perturb(host)
    host.eval()
    inputs = {"input_ids": batch()["input_ids"]}
    trained = host(**inputs).logits.detach()
    host.save_pretrained(tmp_path / "plain")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(again(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)
    host.save_pretrained(tmp_path / "checkpoint", state_dict=host.state_dict())
    again = MixtralForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    torch.testing.assert_close(again(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)


def test_a_rank_that_saw_no_batch_adds_zeros_of_every_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over ranks need one shape: the other ranks hold `(experts, out, in)`."""
    from sparsify.calibration import statistics

    monkeypatch.setattr(statistics, "require_seen", lambda *_: None)  # another rank ran them
    monkeypatch.setattr(statistics, "require_gradients", lambda *_: None)
    modules = {"a": GroupedLinear(torch.nn.Parameter(torch.randn(3, 5, 4))), "b": torch.nn.Linear(7, 6)}
    found: dict[str, Any] = {}
    statistics.gradient_statistics(
        torch.nn.ModuleDict(modules), modules, [], lambda name, g: found.setdefault(name, g), progress=False
    )
    assert {name: tuple(g.shape) for name, g in found.items()} == {"a": (3, 5, 4), "b": (6, 7)}
    x = torch.randn(8, 4)
    offsets = torch.tensor([2, 2, 8], dtype=torch.int32)
    assert statistics.weight_gradient(x, torch.randn(8, 5), None, offsets).shape == found["a"].shape  # type: ignore[union-attr]
