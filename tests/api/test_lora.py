"""LoRA as a plan rule, and PEFT's adapter directory read and written: the same logits both ways."""

from __future__ import annotations

import copy
import json
from typing import Any

import methods
import pytest
import tiny
import torch
from methods import compiled, logits, model_of
from safetensors.torch import load_file, save_file
from torch import nn

from sparsify import LoRA, PaCA, PlanError, Quantize, RoSA
from sparsify.errors import AdapterError

peft = pytest.importorskip("peft")


def parts(host: Any) -> dict[str, Any]:
    return {p.param: p for p in host.sparsify.program.lowranks}


def test_lora_is_rosa_without_a_sparse_part():
    lora, rosa = compiled(LoRA(rank=3, alpha=3)), compiled(RoSA(rank=3, density=0.0))
    for host in (lora, rosa):
        assert {n.rpartition(".")[2] for n in methods.trained_names(host)} == {"lora_A", "lora_B"}
    inputs = {"input_ids": tiny.tokens()}
    assert tiny.train(lora, **inputs) == tiny.train(rosa, **inputs)
    for a, b in zip(tiny.trainable(lora), tiny.trainable(rosa), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [({}, 2.0), ({"alpha": 4}, 1.0), ({"rslora": True}, 4.0), ({"rslora": True, "alpha": 4.0}, 2.0)],
    ids=str,
)
def test_scale(fields, scale):
    assert LoRA(rank=4, **fields).scale(4) == scale


def test_wrong_settings_are_refused():
    for fields, words in (
        ({"rank": 0}, "out of range"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank": {"*": 0}}, "out of range"),
    ):
        with pytest.raises(PlanError, match=words):
            LoRA(**fields)
    with pytest.raises(PlanError, match=r"no pattern of rank names"):
        tiny.lower(model_of(), LoRA(rank={"*attn*": 2}))


CASES = {
    "plain": LoRA(rank=3),
    "alpha": LoRA(rank=3, alpha=5),
    "rslora": LoRA(rank=4, alpha=6, rslora=True),
    "ranks": LoRA(rank={"*.q_proj": 2, "*c_attn": 2, "*mlp*": 5, "*": 3}, alpha=4),
    "some": LoRA(match="*.mlp.*", rank=3),
}


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("case", list(CASES))
def test_what_we_write_peft_reads(case, name, tmp_path):
    host = compiled(CASES[case], name=name)
    tiny.disturb(host, scale=0.1)
    host.sparsify.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model_of(name)), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, name), logits(host, name), atol=1e-4, rtol=1e-4)
    assert (logits(host, name) - logits(model_of(name), name)).abs().max() > 1e-2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["fan_in_fan_out"] is (name == "GPT-2")
    assert len(config["target_modules"]) == len(parts(host))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for param, part in parts(host).items():
        key = f"base_model.model.{param.removesuffix('.weight')}.lora_A.weight"
        assert tensors[key].shape[0] == part.rank, "no padding to the largest rank"


def peft_model(name: str, directory: Any, **fields: Any) -> nn.Module:
    torch.manual_seed(3)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "fan_in_fan_out": name == "GPT-2", **fields}
    model = peft.get_peft_model(
        copy.deepcopy(model_of(name)), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    ).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    model.save_pretrained(directory)
    return model


LEAF = {"Llama": ("q_proj", "down_proj"), "GPT-2": ("c_attn", "mlp.c_proj")}


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns"])
def test_what_peft_writes_we_read(kind, name, tmp_path):
    fields: dict[str, Any] = {"use_rslora": kind == "rslora"}
    if kind == "patterns":
        first, second = LEAF[name]
        fields |= {"rank_pattern": {first: 2, rf".*1\..*{second}": 6}, "alpha_pattern": {second: 9}}
    theirs = peft_model(name, tmp_path, **fields)
    for rule in (LoRA(rank=3, alpha=5), PaCA(rank=4)):  # beside the factors, or added to the dense weight
        host = compiled(rule, name=name)
        base = logits(host, name)
        host.sparsify.load_adapter(tmp_path, "peft")
        mix = host.sparsify.set_adapter("peft")
        assert mix.trainable is (isinstance(rule, LoRA) and kind == "plain")
        torch.testing.assert_close(logits(host, name), logits(theirs, name), atol=1e-4, rtol=1e-4)
        host.sparsify.set_adapter({"peft": 0.0})
        torch.testing.assert_close(logits(host, name), base, atol=1e-4, rtol=1e-4)
        host.sparsify.set_adapter(None)
        assert torch.equal(logits(host, name), base)


def test_there_and_back_again(tmp_path):
    """PEFT's file → ours → a PEFT directory → ours: every factor is the same up to the scale that is folded in."""
    peft_model("Llama", tmp_path / "a")
    host = compiled(LoRA(rank=3, alpha=5))
    host.sparsify.load_adapter(tmp_path / "a", "one")
    host.sparsify.export_lora(tmp_path / "b", "one")
    host.sparsify.load_adapter(tmp_path / "b", "two")
    one, two = (host.sparsify.get(n).deltas for n in ("one", "two"))
    for a, b in zip(one, sorted(two, key=lambda d: [x.param for x in one].index(d.param)), strict=True):
        torch.testing.assert_close(a.scale * a.values @ a.a, b.scale * b.values @ b.a)
    tiny.train(host)  # loading touched nothing
    host.sparsify.set_adapter("one")
    assert tiny.trainable(host)


def test_what_is_no_plain_low_rank_change_is_refused(tmp_path):
    host = compiled(LoRA(rank=3))

    def spoiled(number: int, **config: Any) -> Any:
        directory = tmp_path / str(number)
        peft_model("Llama", directory)
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return directory

    with pytest.raises(AdapterError, match="use_dora is set"):
        host.sparsify.load_adapter(spoiled(1, use_dora=True))
    with pytest.raises(AdapterError, match="type 'LOHA'; only LORA"):
        host.sparsify.load_adapter(spoiled(2, peft_type="LOHA"))
    directory = spoiled(3)
    tensors = load_file(directory / "adapter_model.safetensors")
    first = next(k for k in tensors if "lora_A" in k)
    save_file({k: v for k, v in tensors.items() if k != first}, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="missing or do not fit"):
        host.sparsify.load_adapter(directory)
    save_file({k.replace("q_proj", "z_proj"): v for k, v in tensors.items()}, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="no module"):
        host.sparsify.load_adapter(directory)
    save_file(
        {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match=r"factors make"):
        host.sparsify.load_adapter(directory)
    (directory / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(AdapterError, match="not a readable PEFT adapter"):
        host.sparsify.load_adapter(directory)
    assert torch.equal(logits(host), logits(model_of()))


def test_a_lora_adapter_over_a_packed_base_saves_and_exports(tmp_path):
    host = compiled(Quantize(format="int8"), LoRA(rank=3))
    tiny.disturb(host, scale=0.1)
    host.sparsify.save_adapter(tmp_path / "ours")
    with pytest.warns(UserWarning, match="Quantize changed the base, and the adapter belongs to it"):
        host.sparsify.export_lora(tmp_path / "peft")
    expected = logits(host) - logits(compiled(Quantize(format="int8"), LoRA(rank=3)))
    dense = compiled(LoRA(rank=3))
    base = logits(dense)
    for directory in ("ours", "peft"):
        dense.sparsify.load_adapter(tmp_path / directory, directory)
        dense.sparsify.set_adapter(directory)
        torch.testing.assert_close(logits(dense) - base, expected, atol=0.05, rtol=0.1)
        dense.sparsify.set_adapter(None)


def test_training_moves_the_factors_only():
    host = compiled(LoRA(rank=3), name="GPT-2")
    stored = {p: host.sparsify.stored(p).detach().clone() for p in parts(host)}
    losses = tiny.train(host, steps=5)
    assert losses[-1] < losses[0]
    for param, weight in stored.items():
        assert torch.equal(host.sparsify.stored(param), weight)


def test_rank_beside_a_dense_adapter_of_another_rank_mixes():
    """Factors of different ranks stand side by side; their weighted sum is the sum of the changes."""
    host = compiled(LoRA(rank=3))
    tiny.disturb(host, scale=0.1)
    own = methods.deltas(host)
    host.sparsify.adapters["five"] = (lambda h: (tiny.disturb(h, scale=0.1, seed=8), h.sparsify.current())[1])(
        compiled(LoRA(rank=5), seed=4)
    )
    other = {d.param: d.scale * d.values @ d.a for d in host.sparsify.get("five").deltas}
    host.sparsify.set_adapter({"default": 2.0, "five": -1.0})
    assert host.model.layers[0].mlp.up_proj.lora_A.shape[0] == 8
    now, base = methods.state(host, model_of()), model_of().state_dict()
    for param in own:
        torch.testing.assert_close(now[param], base[param] + 2 * own[param] - other[param])
    host.sparsify.set_adapter("default")
    assert host.model.layers[0].mlp.up_proj.lora_A.shape[0] == 3
    assert tiny.train(host)
