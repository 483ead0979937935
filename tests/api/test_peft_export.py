"""What `export_lora` writes, PEFT loads to the same outputs (merged and not), and so do we; what PEFT cannot compute is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, AdapterError, LoRA, PaCA, Plan, Prune, Quantize, RoSA
from sparsify.adapters import peft_export
from sparsify.adapters.adapter import Adapter, Delta

peft = pytest.importorskip("peft")


class Named(nn.Module):
    """Names whose ends other modules have, names that are regular expressions, a normalisation with buffers, a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({key: nn.Linear(12, 12) for key in ("a+b", "x(y", "head")})
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        self.mid = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = x + torch.tanh(block(x)) * self.scale
        return self.head(self.mid(x))


class Shared(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = self.first
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("tied "):
        model = tiny.build(name.removeprefix("tied "))
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.lm_head.weight = model.get_input_embeddings().weight
        return model
    plain = {"Named": Named, "Shared": Shared, "Mlp": tiny.Mlp}
    if name not in plain:
        return tiny.build(name)
    model = plain[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def example(name: str) -> Any:
    if name in ("Named", "Shared", "Mlp"):
        return torch.randn(7, 12, generator=torch.Generator().manual_seed(4))
    return tiny.inputs_of(build(name), name.removeprefix("tied "))


def outputs(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return tiny.output_of(model.eval()(batch) if isinstance(batch, Tensor) else model.eval()(**batch))


Q = LoRA(match="q_proj", rank=4)
CASES: list[tuple[str, list[Any], list[str]]] = [
    ("tied Qwen2", [Q], ["model.embed_tokens"]),
    ("tied Qwen2", [S2FT(0.2, budget="structure")], ["lm_head"]),
    ("tied Qwen2", [Q], ["lm_head", "*.bias", "model.norm"]),
    ("Qwen2", [Q], ["*q_proj.bias"]),
    ("Qwen2", [Q], ["*k_proj.bias"]),
    ("Qwen2", [Q], ["*.bias"]),
    ("Qwen2", [Q], ["v_proj", "*k_proj.weight"]),
    ("Llama", [S2FT(0.3, producer_fraction=0.2, budget="structure")], ["lm_head", "*norm*"]),
    ("Llama", [LoRA(match="o_proj", rank=2), PaCA(match="gate_proj", rank=3), S2FT(0.2, structure="ffn")], ["model.embed_tokens"]),
    ("GPT-2", [LoRA(match=["c_attn", "mlp.c_fc"], rank=3)], ["*c_attn.bias", "transformer.ln_f", "transformer.wpe"]),
    ("tied GPT-2", [S2FT(0.2, budget="structure")], ["transformer.wte"]),
    ("BERT (classifier)", [LoRA(match="query", rank=3)], ["classifier"]),
    ("BERT (classifier)", [LoRA(match="query", rank=3)], ["classifier.bias", "bert.embeddings.LayerNorm", "*word_embeddings"]),
    ("T5 (gated)", [LoRA(match=["q", "wo"], rank=3)], ["shared", "*.final_layer_norm"]),
    ("ViT", [LoRA(match="re:.*(query|q_proj)", rank=3)], ["*cls_token", "classifier.weight"]),
    ("Named", [LoRA(match="blocks.head", rank=3)], ["blocks.a+b.weight", "head"]),
    ("Named", [LoRA(match="blocks.head", rank=3)], ["scale", "mid.1.bias", "head.bias"]),
    ("Named", [LoRA(match="head", rank=3)], ["mid.1"]),
    ("Mlp", [LoRA(match="*.down", rank=3)], ["layers.0.up.weight", "head"]),
    ("Shared", [LoRA(match="head", rank=3, exclude=[])], ["first"]),
]  # fmt: skip


#: the rest is marked slow
QUICK = {0, 3, 4, 9, 14, 16, 19}
MARKED = [pytest.param(*c, marks=[] if i in QUICK else [pytest.mark.slow]) for i, c in enumerate(CASES)]


@pytest.mark.parametrize(("name", "rules", "train"), MARKED, ids=[f"{n} {' '.join(t)}" for n, _, t in CASES])
def test_peft_loads_the_same_function(name, rules, train, tmp_path):
    batch = example(name)
    host = sparsify.compile(build(name), Plan(rules, train=train), example=batch, progress=False)
    tiny.disturb(host, 0.1)
    want, plain = outputs(host, batch), outputs(build(name), batch)
    assert float((want - plain).abs().max()) > 1e-3
    host.sparsify.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path)
    torch.testing.assert_close(outputs(theirs, batch), want, rtol=2e-5, atol=2e-5)
    lazily = peft.PeftModel.from_pretrained(build(name), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(outputs(lazily, batch), want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(outputs(theirs.merge_and_unload(), batch), want, rtol=2e-5, atol=2e-5)
    ours = sparsify.load(build(name), tmp_path)
    torch.testing.assert_close(outputs(ours, batch), want, rtol=2e-5, atol=2e-5)


def test_a_sum_of_adapters_of_two_kinds_is_one_pair_of_factors(tmp_path):
    """Columns of one and low-rank factors of another on the same weights, with weights of their own."""
    hosts = [
        tiny.lower(build("Llama"), rule, seed=s) for s, rule in enumerate((S2FT(0.2, budget="structure"), LoRA(rank=3)))
    ]
    for number, host in enumerate(hosts):
        tiny.disturb(host, 0.1, seed=number)
        host.sparsify.save_adapter(tmp_path / "ab"[number])
    served = sparsify.load(build("Llama"), {n: tmp_path / n for n in "ab"}, active={"a": 0.7, "b": -0.4})
    kinds = served.sparsify.fuse_adapters({"a": 0.7, "b": -0.4}, "sum").deltas
    assert len({d.param for d in kinds}) < len(kinds)
    served.sparsify.export_lora(tmp_path / "peft", "sum")
    batch = tiny.inputs_of(served)
    theirs = peft.PeftModel.from_pretrained(build("Llama"), tmp_path / "peft")
    torch.testing.assert_close(outputs(theirs, batch), outputs(served, batch), rtol=2e-5, atol=2e-5)


def test_only_what_trained_is_trained_in_peft(tmp_path):
    """A whole module of its own goes to modules_to_save, so that PEFT can switch it off again; nothing else is written."""
    host = tiny.lower(build("Llama"), Q, train=["lm_head"])
    tiny.disturb(host)
    host.sparsify.export_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"]) == (["lm_head"], "none")
    theirs = peft.PeftModel.from_pretrained(build("Llama"), tmp_path)
    batch = tiny.inputs_of(host)
    with theirs.disable_adapter():
        torch.testing.assert_close(outputs(theirs, batch), outputs(build("Llama"), batch))
    names = {k.removeprefix("base_model.model.") for k in load_file(tmp_path / "adapter_model.safetensors")}
    assert {n for n in names if "lora" not in n} == {"lm_head.weight"}


def test_no_other_module_is_adapted_because_its_name_ends_alike(tmp_path):
    host = sparsify.compile(build("Named"), Plan([LoRA(match="re:head", rank=3, exclude=[])]), example=example("Named"))
    host.sparsify.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("Named"), tmp_path)
    adapted = [n for n, _ in theirs.named_modules() if n.endswith("lora_A")]
    assert adapted == ["base_model.model.head.lora_A"]


def test_names_that_are_regular_expressions(tmp_path):
    """PEFT takes keys of rank_pattern for expressions; ours are escaped and anchored."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    empty = torch.empty(0, dtype=torch.int64)
    ranks = {"blocks.a+b": 3, "blocks.x(y": 2, "head": 1}
    deltas = [
        Delta(f"{m}.weight", "lora", empty, draw(5 if m == "head" else 12, r), False, draw(r, 12))
        for m, r in ranks.items()
    ]
    model, batch = build("Named"), example("Named")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    peft_export.export(Adapter(tuple(deltas), {}), model, shapes, model.get_parameter, None).write(tmp_path)
    with torch.no_grad():
        for delta in deltas:
            assert delta.a is not None
            model.get_parameter(delta.param).add_(delta.values @ delta.a)
    theirs = peft.PeftModel.from_pretrained(build("Named"), tmp_path)
    torch.testing.assert_close(outputs(theirs, batch), outputs(model, batch))
    torch.testing.assert_close(outputs(sparsify.load(build("Named"), tmp_path), batch), outputs(model, batch))


def test_what_peft_cannot_compute_is_refused(tmp_path):
    host = sparsify.compile(build("Shared"), Plan([LoRA(match="first", rank=3)]), example=example("Shared"))
    with pytest.raises(AdapterError, match=r"stands in several places of the model \(first\.weight, second\.weight\)"):
        host.sparsify.export_lora(tmp_path)
    assert not list(tmp_path.iterdir())
    host = tiny.lower(build("Llama"), Quantize("int8", match="q_proj"), train=["lm_head"])
    with pytest.raises(AdapterError, match="nothing low-rank was trained"):
        host.sparsify.export_lora(tmp_path, changed_base="keep")
    with pytest.raises(AdapterError, match="changed_base must be"):
        host.sparsify.export_lora(tmp_path, changed_base="yes")


def test_an_adapter_of_a_changed_base_belongs_to_it(tmp_path):
    """Over the packed or pruned base PEFT computes the same; over the dense one it would not, so it is said."""
    batch = tiny.inputs_of(build("Llama"))
    for number, rule in enumerate((Quantize("int8"), Prune(0.5, method="magnitude"))):
        host = tiny.lower(build("Llama"), Q, rule)
        tiny.disturb(host)
        if isinstance(rule, Prune):
            with pytest.raises(AdapterError, match=r"Prune changed the base.*changed_base='keep'"):
                host.sparsify.export_lora(tmp_path / str(number))
        else:
            with pytest.warns(UserWarning, match=r"Quantize changed the base.*changed_base='keep'"):
                host.sparsify.export_lora(tmp_path / str(number))
        host.sparsify.export_lora(tmp_path / str(number), changed_base="keep")
        base = build("Llama")
        if isinstance(rule, Prune):
            state = {k: v for k, v in host.state_dict().items() if k in base.state_dict()}
            base.load_state_dict(state | {k: host.sparsify.base_original(k) for k in state if "q_proj" in k})
        else:
            for name, module in host.named_modules():
                if hasattr(module, "packed_names"):
                    base.get_submodule(name).weight.data.copy_(module.dense())
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / str(number))
        torch.testing.assert_close(outputs(theirs, batch), outputs(host, batch), rtol=1e-4, atol=1e-4)


def test_sparse_parts_beside_low_rank_ones(tmp_path):
    batch = tiny.inputs_of(build("Llama"))
    host = tiny.lower(build("Llama"), RoSA(match="q_proj", rank=3, density=0.02, mask="random"), train=["model.norm"])
    tiny.disturb(host)
    with pytest.raises(AdapterError, match="has a sparse part"):
        host.sparsify.export_lora(tmp_path / "no")
    host.sparsify.export_lora(tmp_path / "yes", sparse="merge")
    base = type(host).from_pretrained(tmp_path / "yes" / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "yes")
    torch.testing.assert_close(outputs(theirs, batch), outputs(host, batch), rtol=2e-5, atol=2e-5)


def test_bfloat16_keeps_its_bits(tmp_path):
    """What trained in full is written in its own dtype, and is in PEFT what it was here."""
    model = tiny.build("Llama", torch.bfloat16)
    host = tiny.lower(copy.deepcopy(model), Q, train=["lm_head"])
    tiny.disturb(host)
    host.sparsify.export_lora(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(theirs.base_model.model.lm_head.modules_to_save["default"].weight, host.lm_head.weight)
