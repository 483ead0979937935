"""State dicts: the live one pairs with the modules by name, files hold the original model, and either loads where it belongs."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import methods
import pytest
import tiny
import torch
import transformers as hf
from accelerate import cpu_offload, dispatch_model, load_checkpoint_in_model
from accelerate.hooks import remove_hook_from_submodules
from methods import compiled, logits, model_of
from safetensors import safe_open
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsify import S2FT, LoRA, PaCA, Plan, Prune, Quantize, RoSA, SparsifyError
from sparsify.errors import StateError
from sparsify.host.live_state import original
from sparsify.modules.layout import MARKER

SPARSE = RoSA(rank=2, density=0.03, mask="random")
RULES: dict[str, tuple[Any, ...]] = {
    "s2ft": (S2FT(fraction=0.2, producer_fraction=0.1, budget="structure"),),
    "paca": (PaCA(rank=4),),
    "rosa": (SPARSE,),
    "lora": (LoRA(rank=3),),
    "paca over nf4": (Quantize(format="nf4"), PaCA(rank=4)),
    "rosa over int8": (Quantize(format="int8"), SPARSE),
    "prune": (Prune(sparsity=0.5, method="magnitude"),),
    "s2ft beside lora over pruned": (
        Prune(sparsity=0.5, method="magnitude"),
        S2FT(structure="ffn", fraction=0.2),
        LoRA(rank=2),
    ),
    "s2ft beside rosa": (S2FT(structure="ffn", fraction=0.2), SPARSE),
}
EVERY = pytest.mark.parametrize("method", list(RULES))


def host_of(method: str, name: str = "Llama", disturbed: bool = True, **fields: Any) -> Any:
    host = compiled(*RULES[method], name=name, calibrate=False, **fields)
    if disturbed:
        tiny.disturb(host)
    return host


def masks_kept(host: nn.Module) -> Any:
    from sparsify.modules.masked import rezero

    rezero(host)  # a disturbed pruned host has entries that no optimizer leaves
    return host


# --- by name -----------------------------------------------------------------------------------------------------------------


@EVERY
def test_state_dict_is_what_the_modules_hold_under_the_same_names(method: str) -> None:
    host = masks_kept(host_of(method))
    state = host.state_dict()
    own = {**dict(host.named_parameters(remove_duplicate=False)), **dict(host.named_buffers(remove_duplicate=False))}
    assert set(state) <= set(own)
    assert set(dict(host.named_parameters(remove_duplicate=False))) <= set(state)
    for name, tensor in state.items():
        assert tensor.data_ptr() == own[name].data_ptr(), name
        assert tensor.shape == own[name].shape, name
    expected = logits(host)
    x = tiny.tokens(2, 8, seed=77)
    with torch.no_grad():
        assert torch.equal(functional_call(host, {n: t.clone() for n, t in state.items()}, (x,)).logits, expected)
        moved = {n: t + 0.1 if t.is_floating_point() and n.endswith("norm.weight") else t for n, t in state.items()}
        assert not torch.equal(functional_call(host, moved, (x,)).logits, expected)
    assert torch.equal(logits(host), expected)


@pytest.mark.parametrize("method", ["s2ft", "paca", "rosa", "lora", "rosa over int8", "s2ft beside lora over pruned"])
def test_offload_averages_and_by_name_loaders_compute_the_same(method: str, tmp_path: Path) -> None:
    host = host_of(method)
    expected = logits(host)
    offloaded = cpu_offload(copy.deepcopy(host), execution_device=torch.device("cpu"))
    assert torch.equal(logits(offloaded), expected)
    remove_hook_from_submodules(offloaded)

    split = dispatch_model(
        copy.deepcopy(host), {"model": "cpu", "lm_head": "cpu"}, main_device=torch.device("cpu"), force_hooks=True
    )
    assert torch.equal(logits(split), expected)

    average = AveragedModel(host, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(host)
    average.update_parameters(host)
    torch.testing.assert_close(logits(average), expected, atol=1e-6, rtol=1e-5)
    again = AveragedModel(host_of(method, disturbed=False))
    again.load_state_dict(average.state_dict())
    assert torch.equal(logits(again), logits(average))

    by_name = {
        n: p.detach().clone() for n, p in host.named_parameters()
    }  # an average by name has no buffers, so no marker
    fresh = host_of(method, disturbed=False)
    assert not torch.equal(logits(fresh), expected)
    fresh.load_state_dict(by_name, strict=False)
    assert torch.equal(logits(fresh), expected)
    trained = {n: p for n, p in by_name.items() if dict(host.named_parameters())[n].requires_grad}
    fresh = host_of(method, disturbed=False)
    fresh.load_state_dict(trained, strict=False)
    assert torch.equal(logits(fresh), expected)

    torch.save(host.state_dict(), tmp_path / "pytorch_model.bin")
    for device_map in (None, {"": "cpu"}):
        fresh = host_of(method, disturbed=False)
        load_checkpoint_in_model(fresh, str(tmp_path), device_map=device_map)  # type: ignore[arg-type]
        assert torch.equal(logits(fresh), expected)


# --- live in ---------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_a_live_state_goes_into_a_host_of_the_same_layout(method: str, assign: bool) -> None:
    host = masks_kept(host_of(method))
    stream = io.BytesIO()
    torch.save(host.state_dict(), stream)
    stream.seek(0)
    fresh = host_of(method, disturbed=False)
    fresh.load_state_dict(torch.load(stream), assign=assign)
    assert torch.equal(logits(fresh), logits(host))
    tiny.assert_same(fresh.state_dict(), host.state_dict())
    tiny.assert_same(fresh.sparsify.original_state_dict(), host.sparsify.original_state_dict())
    if fresh.sparsify.parts:
        fresh.sparsify.set_adapter(None)
        assert torch.equal(logits(fresh), logits(host_of(method, disturbed=False)))
    base = host_of(method, disturbed=False)
    base.model.load_state_dict(host.model.state_dict())  # a part of the model by itself
    base.lm_head.load_state_dict(host.lm_head.state_dict())
    assert torch.equal(logits(base), logits(host))


@pytest.mark.parametrize("method", ["s2ft", "paca", "s2ft beside rosa", "paca over nf4"])
def test_a_live_state_of_another_selection_is_refused_and_nothing_is_loaded(method: str) -> None:
    host, other = host_of(method, seed=1), host_of(method, seed=2)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    shapes = [{n: t.shape for n, t in s.items() if MARKER not in n} for s in (host.state_dict(), before)]
    assert shapes[0] == shapes[1]
    for load in (other.load_state_dict, other.sparsify.original_state_dict):
        with pytest.raises(StateError, match="live state of a host with another layout.*original_state_dict"):
            load(host.state_dict())
    with pytest.raises(StateError, match="another layout"):
        other.model.load_state_dict(host.model.state_dict())
    tiny.assert_same(other.state_dict(), before)
    if method in ("s2ft", "paca"):  # whole channels over a dense base follow from the folded weight
        other.load_state_dict(host.sparsify.original_state_dict(), strict=False)
        torch.testing.assert_close(logits(other), logits(host), atol=1e-5, rtol=1e-4)


def test_scale_rank_and_merge_state_are_part_of_the_layout() -> None:
    host = host_of("lora")
    with pytest.raises(StateError, match="scale or merge state"):
        compiled(LoRA(rank=3, alpha=1.0), calibrate=False).load_state_dict(host.state_dict())
    merged = host_of("s2ft")
    merged.sparsify.merge()
    with pytest.raises(StateError, match="scale or merge state"):
        host_of("s2ft").load_state_dict(merged.state_dict())
    plain = copy.deepcopy(model_of())
    plain.load_state_dict(merged.sparsify.original_state_dict())
    torch.testing.assert_close(logits(plain), logits(merged), atol=1e-5, rtol=1e-4)


def test_what_the_handle_knows_of_the_base_does_not_survive_another_base() -> None:
    plan = Plan(list(RULES["s2ft"]))
    other: Any = tiny.lower(tiny.llama(seed=9), *plan.rules)
    tiny.disturb(other)
    host: Any = tiny.lower(tiny.llama(), *plan.rules)
    assert host.sparsify.program.slices == other.sparsify.program.slices
    host.load_state_dict(other.state_dict())
    assert torch.equal(logits(host), logits(other))
    for verb in (
        lambda: host.sparsify.set_adapter(None),
        lambda: host.sparsify.current(),
        lambda: host.sparsify.restore(),
    ):
        with pytest.raises(SparsifyError, match="brought another base for model.layers"):
            verb()
    host = tiny.lower(tiny.llama(), *plan.rules)  # weights that come after compile: the base is theirs
    base = tiny.llama(seed=9)
    host.load_state_dict(base.state_dict(), strict=False)
    tiny.disturb(host)
    host.sparsify.set_adapter(None)
    tiny.assert_same(tiny.state_of(host), dict(base.state_dict()))


# --- original in -------------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_what_trainer_writes_goes_in_again_exactly(method: str, assign: bool) -> None:
    """The form of every checkpoint that was written before state dicts were live, too."""
    host = masks_kept(host_of(method))
    file = {n: t.clone() for n, t in original(host, host.state_dict(), with_parts=True).items()}
    assert set(model_of().state_dict()) <= set(file)
    assert not any(MARKER in n or "packed_" in n for n in file)
    fresh = host_of(method, disturbed=False)
    fresh.load_state_dict(file, assign=assign)
    assert torch.equal(logits(fresh), logits(host))
    tiny.assert_same(fresh.sparsify.original_state_dict(), host.sparsify.original_state_dict())
    tiny.train(fresh, steps=1)


def test_half_a_file_is_taken_where_the_base_shows_how_it_lies_and_refused_where_not() -> None:
    host = host_of("s2ft")
    file, expected = host.sparsify.original_state_dict(), logits(host)
    names = sorted(file)
    shards = [{n: file[n] for n in names[i::3]} for i in range(3)]  # as transformers loads a sharded checkpoint
    fresh = host_of("s2ft", disturbed=False)
    for shard in shards:
        fresh.load_state_dict(shard, strict=False)
    torch.testing.assert_close(logits(fresh), expected, atol=1e-6, rtol=1e-5)
    live = {n: t.clone() for n, t in host.state_dict().items() if MARKER not in n}
    halves = [{n: t for n, t in live.items() if ("layers.0" in n) == first} for first in (True, False)]
    fresh = host_of("s2ft", disturbed=False)
    for half in halves:
        fresh.load_state_dict(half, strict=False)
    assert torch.equal(logits(fresh), expected)
    down = "model.layers.0.mlp.down_proj.weight"
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    with pytest.raises(StateError, match="neither this host's nor, in the original order, those of the model"):
        fresh.load_state_dict({down: torch.randn_like(file[down])}, strict=False)
    inconsistent = file | {"model.layers.0.mlp.down_proj.weight_slice": torch.randn_like(live[f"{down}_slice"])}
    with pytest.raises(StateError, match="do not come from one checkpoint"):
        fresh.load_state_dict(inconsistent, strict=False)
    tiny.assert_same(fresh.state_dict(), before)


def test_a_plain_checkpoint_does_not_stand_for_low_rank_parts_even_of_the_same_base() -> None:
    host = host_of("lora")
    before = logits(host)
    with pytest.raises(StateError, match="the parts cannot be told apart"):
        host.load_state_dict(model_of().state_dict(), strict=False)
    assert torch.equal(logits(host), before)


# --- save_pretrained -----------------------------------------------------------------------------------------------------------


def keys_of(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {k: tuple(opened.get_slice(k).get_shape()) for k in list(opened.keys())}
    return found


@EVERY
def test_save_pretrained_writes_the_original_names_and_nothing_else(method: str, tmp_path: Path) -> None:
    host = masks_kept(host_of(method))
    names = {n: tuple(t.shape) for n, t in model_of().state_dict().items()}
    assert list(host.sparsify.original_state_dict()) == list(names)
    copies: dict[str, Any] = {"itself": host, "copy": copy.deepcopy(host)}
    stream = io.BytesIO()
    torch.save(host, stream)
    stream.seek(0)
    copies["pickle"] = torch.load(stream, weights_only=False)
    tiny.disturb(host, seed=8)
    masks_kept(host)
    for kind, one in copies.items():
        one.save_pretrained(tmp_path / kind, max_shard_size="20KB" if kind == "copy" else "5GB")
        assert keys_of(tmp_path / kind) == names
        plain = hf.LlamaForCausalLM.from_pretrained(tmp_path / kind)
        torch.testing.assert_close(logits(plain), logits(one), atol=1e-3, rtol=1e-3)
        tiny.assert_same(dict(plain.state_dict()), one.sparsify.original_state_dict())
    assert (tmp_path / "copy" / "model.safetensors.index.json").exists()
    assert not torch.equal(logits(copies["copy"]), logits(host)), "a copy saves itself"
    if host.sparsify.parts:
        host.sparsify.set_adapter(None)
        host.save_pretrained(tmp_path / "none")
        assert keys_of(tmp_path / "none") == names


def test_save_pretrained_translates_a_state_dict_and_leaves_original_ones(tmp_path: Path) -> None:
    host = host_of("rosa")
    host.save_pretrained(tmp_path / "live", state_dict=host.state_dict())
    parts = {n for n in keys_of(tmp_path / "live") if n not in model_of().state_dict()}
    assert {n.rpartition(".")[2] for n in parts} == {"sparse_values", "sparse_index", "lora_A", "lora_B"}
    host.save_pretrained(tmp_path / "own", state_dict=host.sparsify.original_state_dict())
    assert set(keys_of(tmp_path / "own")) == set(model_of().state_dict())
    with pytest.raises(StateError, match="another layout"):
        host_of("s2ft", seed=1).save_pretrained(tmp_path / "no", state_dict=host_of("s2ft", seed=2).state_dict())
    with pytest.raises(SparsifyError, match="distributed_checkpoint=True.*get_model_state_dict"):
        host.save_pretrained(tmp_path / "no", distributed_checkpoint=True)
    restored = host.sparsify.restore()
    assert "save_pretrained" not in restored.__dict__
    assert not any(MARKER in n for n, _ in restored.named_buffers())
    restored.save_pretrained(tmp_path / "restored")
    assert set(keys_of(tmp_path / "restored")) == set(model_of().state_dict())


def test_tied_embeddings_stay_tied_in_files_and_in_plain_models(tmp_path: Path) -> None:
    model = tiny.llama(tie_word_embeddings=True)
    host: Any = tiny.lower(model, *RULES["s2ft beside rosa"])
    tiny.disturb(host)
    host.save_pretrained(tmp_path)
    assert "lm_head.weight" not in keys_of(tmp_path)
    plain = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), logits(host), atol=1e-5, rtol=1e-4)
    bare = host.sparsify.plain()
    assert bare.lm_head.weight is bare.model.embed_tokens.weight
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]


def test_plain_and_restored_models_have_no_trace_of_the_host() -> None:
    for method in ("s2ft", "rosa", "prune"):
        host = host_of(method)
        bare = host.sparsify.plain()
        for found in (bare, *([] if method == "prune" else [host.sparsify.restore()])):
            assert list(found.state_dict()) == list(model_of().state_dict())
            assert not {"sparsify", "save_pretrained", "generate", "compile", "_sparsify_hooks"} & set(found.__dict__)
            for module in found.modules():
                assert "_sparsify_layout" not in module.__dict__
                tables = (module._state_dict_hooks, module._load_state_dict_pre_hooks, module._forward_pre_hooks)
                assert not any(tables)
                assert not module._forward_hooks


def test_gpt2_conv1d_and_an_encoder_keep_their_names() -> None:
    for name in ("GPT-2", "T5 (gated)", "Phi-3"):
        for method in ("s2ft", "paca", "rosa"):
            host = host_of(method, name=name)
            assert list(host.sparsify.original_state_dict()) == list(model_of(name).state_dict())
            plain = methods.plain_with(host, name)
            inputs = tiny.inputs_of(plain, name)
            with torch.no_grad():
                a, b = (tiny.output_of(m(**inputs)) for m in (plain, host))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
