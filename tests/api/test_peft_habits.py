"""What PEFT's users type: fields of LoraConfig that say nothing, layers by number, and the handle's verbs under PEFT's names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import sparsify
from sparsify import S2FT, AdapterError, CaptureError, LoRA, Plan, PlanError, SparsifyError
from sparsify.host.habits import WORDS
from sparsify.host.handle import Handle
from sparsify.plan.name_patterns import PatternError, check_pattern, matches, ranged

NAMES = [
    f"model.layers.{n}.{m}"
    for n in range(32)
    for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.xq_proj")
]


def taken(pattern: str) -> set[str]:
    return {name for name in NAMES if matches(pattern, name)}


@pytest.mark.parametrize(
    ("pattern", "layers", "end"),
    [
        ("model.layers.{0-15}.*.q_proj", range(16), ".q_proj"), ("layers.{3}.mlp.down_proj", [3], ".down_proj"), ("*.{1,30-31}.*v_proj", [1, 30, 31], ".v_proj"),
        ("model.layers.{0-9}.self_attn.[q]_proj", range(10), ".q_proj"), ("*.{7}.self_attn.[!q]_proj", [7], ".v_proj"), ("*.{10-11}.mlp.d?wn_proj", [10, 11], ".down_proj"),
    ],
)  # fmt: skip
def test_layers_are_written_as_ranges(pattern: str, layers: Any, end: str) -> None:
    check_pattern(pattern)
    assert taken(pattern) == {n for n in NAMES if n.endswith(end) and int(n.split(".")[2]) in layers}


def test_a_range_that_is_none_is_refused_and_other_braces_are_letters() -> None:
    for pattern, word in (("layers.{5-2}.a", "ends before it begins"), ("layers.{0-9999}.a", "more than 512 numbers")):
        with pytest.raises(PatternError, match=word):
            check_pattern(pattern)
        with pytest.raises(PlanError, match=word):
            LoRA(match=pattern)
    assert matches("a{b}", "x.a{b}")
    assert ranged("a.{2-3}") == r"(?:.*\.)?a\.(?:2|3)"


SAME: list[tuple[dict[str, Any], LoRA]] = [
    (
        {
            "r": 4,
            "task_type": "CAUSAL_LM",
            "bias": "none",
            "inference_mode": False,
            "use_dora": False,
            "init_lora_weights": True,
            "modules_to_save": None,
        },
        LoRA(4),
    ),
    ({"r": 4, "fan_in_fan_out": False, "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}}, LoRA(4)),
    ({"r": 4, "rank_pattern": {"q_proj": 2}}, LoRA({"q_proj": 2, "*": 4})),
    (
        {"r": 4, "target_modules": ["v_proj", "q_proj"], "layers_to_transform": [1, 0], "layers_pattern": "layers"},
        LoRA(4, match=r"re:(.*\.)?(layers)\.(0|1)\.(.*\.)?(q_proj|v_proj)"),
    ),
    ({"r": 4, "target_modules": "q_proj", "layers_to_transform": 3}, LoRA(4, match=r"re:.*\.(3)\.(.*\.)?(q_proj)")),
]


@pytest.mark.parametrize(("written", "meant"), SAME, ids=str)
def test_a_lora_config_is_a_rule(written: dict[str, Any], meant: LoRA) -> None:
    assert LoRA(**written) == meant


def test_layers_to_transform_takes_what_peft_takes() -> None:
    rule: Any = LoRA(4, target_modules=["q_proj"], layers_to_transform=[0, 31])  # type: ignore[call-arg]
    assert taken(rule.match) == {"model.layers.0.self_attn.q_proj", "model.layers.31.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ({"bias": "all"}, "biases that train"), ({"use_dora": True}, "DoRA is a method from outside"), ({"modules_to_save": ["lm_head"]}, "modules that train in full"),
        ({"init_lora_weights": "pissa"}, "other beginnings"), ({"layers_to_transform": [0]}, "into match: 'model.layers.{0-3}"), ({"rank_pattern": {"q_proj": 2}}, "write rank="),
        ({"task_type": 3}, "leave it out"), ({"target_modules": r".*\.q", "layers_to_transform": [0]}, "into match"),
    ],
)  # fmt: skip
def test_what_would_say_something_else_is_answered(written: dict[str, Any], word: str) -> None:
    with pytest.raises(PlanError, match=word):
        LoRA(**written)


# --- the handle ---


def logits(host: Any) -> torch.Tensor:
    with torch.no_grad():
        return host(input_ids=tiny.tokens()).logits


@pytest.mark.parametrize("rule", [S2FT(0.2, structure="ffn"), LoRA(2)], ids=["s2ft", "lora"])
def test_adapters_come_go_and_rest(rule: Any) -> None:
    base = tiny.llama()
    host: Any = tiny.lower(base, rule)
    h = host.sparsify
    plain = logits(host)
    tiny.disturb(host, 0.3)
    first = logits(host)
    assert not torch.equal(first, plain)
    assert h.active_adapters == ["default"]
    with h.disable_adapter():
        assert h.active_adapters == []
        assert torch.equal(logits(host), plain)
        assert not any(p.requires_grad for p in host.parameters())
    assert torch.equal(logits(host), first)
    assert h.active.trainable

    h.add_adapter("second")
    assert h.active_adapters == ["second"]
    torch.testing.assert_close(logits(host), plain, atol=1e-6, rtol=1e-6)
    tiny.disturb(host, 0.3, seed=9)
    second = logits(host)
    assert not torch.allclose(second, first)
    with pytest.raises(AdapterError, match="'second' is taken"):
        h.add_adapter("second")
    with pytest.raises(AdapterError, match="compile another plan"):
        h.add_adapter({"r": 8})
    h.set_adapter("default")
    assert torch.equal(logits(host), first)
    with pytest.raises(RuntimeError, match="inside"), h.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(host), first)
    h.set_adapter({"default": 0.5, "second": 0.5})
    mixed = logits(host)
    with h.disable_adapter():
        torch.testing.assert_close(logits(host), plain, atol=1e-6, rtol=1e-6)
    assert torch.equal(logits(host), mixed)
    assert sorted(h.active_adapters) == ["default", "second"]
    merged = h.merge_and_unload()
    assert type(merged) is type(base)
    assert "sparsify" not in merged.__dict__
    torch.testing.assert_close(logits(merged), mixed, atol=1e-5, rtol=1e-5)
    h.delete_adapter("second")
    with pytest.raises(AdapterError, match="no adapter is called 'second'"):
        h.set_adapter("second")


def test_a_row_for_every_layer_that_trains() -> None:
    host: Any = tiny.lower(tiny.llama(), LoRA(2, match="q_proj"), S2FT(0.2, structure="ffn"), train=["model.norm"])
    h = host.sparsify
    rows = h.get_layer_status()
    assert {row.name for row in rows} == {part.param.rpartition(".")[0] for part in h.program.parts} | {
        "model.norm.weight"
    }
    assert sum(row.numbers for row in rows) == h.count_parameters()[0]
    assert all(
        (row.enabled, row.active, row.available, row.merged, row.requires_grad)
        == (True, ("default",), ("default",), False, True)
        for row in rows
    )
    assert "model.layers.0.self_attn.q_proj: + 2·BA (rank 2)" in "\n".join(map(str, rows))
    h.set_adapter(None)
    assert all(
        (row.enabled, row.active, row.available, row.requires_grad) == (False, (), ("default",), False)
        for row in h.get_layer_status()
    )
    h.set_adapter("default")
    h.merge()
    assert all(row.merged for row in h.get_layer_status())
    with pytest.raises(SparsifyError, match="merged"), h.disable_adapter():
        pass


def test_words_of_peft_that_the_handle_has_not_are_answered() -> None:
    h: Any = tiny.lower(tiny.llama(), LoRA(2)).sparsify
    for word, here in WORDS.items():
        with pytest.raises(AttributeError, match=f"has no '{word}'; here it is"):
            getattr(h, word)
        name = here.partition("(")[0].partition(",")[0].partition(":")[0]
        assert name == "sparsify.load" or hasattr(Handle, name) or name in Handle.__dataclass_fields__, name
    with pytest.raises(AttributeError, match="has no 'nothing'$"):
        h.nothing  # noqa: B018
    assert not hasattr(h, "__array__")


# --- whole configs, arguments of verbs, verbs of the model ---


def test_a_whole_config_of_peft_is_a_rule_and_is_answered_where_a_plan_belongs() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type=peft.TaskType.CAUSAL_LM)
    assert LoRA(**config.to_dict()) == LoRA(4, alpha=8, match=["q_proj"])
    dora = peft.LoraConfig(r=4, use_dora=True)
    with pytest.raises(PlanError, match="DoRA is a method from outside"):
        LoRA(**dora.to_dict())
    with pytest.raises(PlanError, match="unknown field 'lora_bias'"):
        LoRA(4, lora_bias=True)  # type: ignore[call-arg]
    model: Any = tiny.llama()
    for wrong in (lambda: Plan([config]), lambda: Plan(config), lambda: sparsify.compile(model, config)):
        with pytest.raises(PlanError, match=r"write Plan\(\[LoRA\(\*\*config.to_dict\(\)\)\]\)"):
            wrong()


def test_the_door_answers_peft_s_names() -> None:
    door: Any = sparsify
    with pytest.raises(AttributeError, match=r"no attribute 'get_peft_model'; here it is sparsify.compile"):
        door.get_peft_model  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'$"):
        door.nothing  # noqa: B018
    folder: Any = "model/"
    for call in (lambda: sparsify.load(folder, "adapter/"), lambda: sparsify.compile(folder, Plan([LoRA(2)]))):
        with pytest.raises(CaptureError, match=r"load it first: AutoModelForCausalLM.from_pretrained\('model/'\)"):
            call()


def test_verbs_take_peft_s_arguments(tmp_path: Path) -> None:
    host: Any = tiny.lower(tiny.llama(), LoRA(2, match="q_proj"))
    h = host.sparsify
    tiny.disturb(host, 0.3)
    first = logits(host)
    h.save_adapter(save_directory=tmp_path / "a", safe_serialization=True, selected_adapters=None)
    h.load_adapter(model_id=tmp_path / "a", adapter_name="second", is_trainable=False)
    h.set_adapter(adapter_name="second")
    assert h.active_adapters == ["second"]
    torch.testing.assert_close(logits(host), first, atol=1e-6, rtol=1e-6)
    h.set_adapter(["default", "second"])
    assert h.active.weights == {"default": 1.0, "second": 1.0}
    h.set_adapter(["default"])
    assert (h.active_adapters, h.active.trainable) == (["default"], True)
    assert torch.equal(logits(host), first)
    merged = h.merge_and_unload(progressbar=True, safe_merge=True, adapter_names=None)
    torch.testing.assert_close(logits(merged), first, atol=1e-5, rtol=1e-5)
    h.delete_adapter(adapter_name="second")
    loaded: Any = sparsify.load(tiny.llama(), tmp_path / "a", adapter_name="x", is_trainable=False)  # type: ignore[call-arg]
    assert loaded.sparsify.active_adapters == ["x"]


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda h: h.load_adapter("a", is_trainable=True),
        "load_adapter: no argument 'is_trainable'; what is loaded trains once",
    ),
    (lambda h: h.merge(adapter_names=["a"]), r"merge: no argument 'adapter_names'; set_adapter\(…\) first"),
    (lambda h: h.add_adapter("a", object()), "for other units compile another plan"),
    (lambda h: h.save_adapter("a", safe_serialization=False), "files are safetensors"),
    (lambda h: h.save_adapter("a", nam="b"), "no argument 'nam'; did you mean 'name'"),
    (lambda h: h.load_adapter("a", name="b", adapter_name="c"), "name is given twice"),
    (lambda h: h.set_adapter([]), "expected names of adapters"),
    (lambda h: h.set_adapter(3), "expected a name, weights by name, or None, got int"),
]


@pytest.mark.parametrize(("call", "word"), WRONG, ids=[word[:40] for _, word in WRONG])
def test_arguments_that_mean_nothing_here_are_answered(call: Callable[[Any], Any], word: str) -> None:
    h: Any = tiny.lower(tiny.llama(num_hidden_layers=1), LoRA(2, match="q_proj")).sparsify
    with pytest.raises(SparsifyError, match=word):
        call(h)


def test_verbs_of_the_model_lead_to_the_handle(capsys: pytest.CaptureFixture[str]) -> None:
    host: Any = tiny.lower(tiny.llama(), LoRA(2, match="q_proj"))
    before = {name: type(module) for name, module in host.named_modules()}
    other = copy.deepcopy(host)
    tiny.disturb(other, 0.3)
    host.print_trainable_parameters()
    assert f"trainable params: {host.sparsify.count_parameters()[0]:,} ||" in capsys.readouterr().out
    torch.testing.assert_close(logits(other.merge_and_unload()), logits(other), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(other), logits(host)), "the copy's verb is the copy's"
    with pytest.raises(SparsifyError, match=r"are sparsify's, not PEFT's: call model.sparsify.set_adapter\(None\)"):
        host.disable_adapters()
    for word, argument in (("add_adapter", object()), ("load_adapter", "folder"), ("set_adapter", "default")):
        with pytest.raises(SparsifyError, match=f"call model.sparsify.{word}"):
            getattr(host, word)(argument)
    assert {name: type(module) for name, module in host.named_modules()} == before
    base = host.sparsify.restore()
    assert not hasattr(base, "print_trainable_parameters")
    with pytest.raises(ValueError, match="No adapter loaded"):  # transformers' own again
        base.set_adapter("default")


def test_zero_3_is_named() -> None:
    """DeepSpeed leaves empty parameters in a model whose pieces it has; it is not needed to say so."""
    host: Any = tiny.lower(tiny.llama(), LoRA(2, match="q_proj"))
    model: Any = tiny.llama()
    for weight in (host.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight):
        weight.ds_id = 0
        weight.data = torch.empty(0)
    with pytest.raises(
        SparsifyError, match=r"save_adapter: model.layers.0.self_attn.q_proj.weight lies in pieces of DeepSpeed"
    ):
        host.sparsify.save_adapter("nowhere")
    with pytest.raises(CaptureError, match="then deepspeed.initialize"):
        sparsify.compile(model, Plan([LoRA(2)]))
