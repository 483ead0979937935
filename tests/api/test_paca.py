"""PaCA as a plan rule: shared index sets, co-permuted columns, selections against references, adapters, exact LoRA export."""

from __future__ import annotations

from typing import Any

import methods
import pytest
import tiny
import torch
from methods import batches, compiled, logits, model_of, plain_with
from torch import Tensor, nn

from sparsify import PaCA, PlanError
from sparsify.model.linears import is_conv1d

LLAMA_GROUPS = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"o_proj"}]


def leaf(param: str) -> str:
    return param.split(".")[-2]


def slices(host: Any) -> dict[str, Any]:
    return {s.param: s for s in host.sparsify.program.slices}


# --- which columns -------------------------------------------------------------------------------------------------------


def test_linears_that_share_an_input_share_one_index_set():
    program = compiled(PaCA(rank=5)).sparsify.program
    groups = [{leaf(p) for p in c.params} for c in program.channel_choices]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, LLAMA_GROUPS * 2))
    for choice in program.channel_choices:
        layers = {p.split(".")[2] for p in choice.params}
        assert len(layers) == 1
        assert {slices(compiled(PaCA(rank=5)))[p].channels for p in choice.params} == {choice.channels}
        assert len(set(choice.channels)) == 5
    assert len({c.channels for c in program.channel_choices}) > 1, "different inputs draw different columns"


def test_every_linear_but_the_head_trains_rank_columns():
    for name, count in (("Llama", 14), ("GPT-2", 8)):
        host = compiled(PaCA(rank=5), name=name)
        found = slices(host)
        assert len(found) == count
        for param, piece in found.items():
            module = host.get_submodule(param.rpartition(".")[0])
            assert piece.length == 5
            assert piece.side == "column"
            assert module.weight_slice.shape == (module.logical_shape()[0], 5)
            assert module.conv1d == (name == "GPT-2")
        assert not any("lm_head" in p for p in found)
    assert methods.trained_names(host) == {s.block_name for s in host.sparsify.program.slices}


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_down_is_contiguous_by_co_permutation_and_needs_no_gather(name):
    host = compiled(PaCA(rank=5), name=name)
    downs = [p for p in slices(host) if "down_proj" in p or "mlp.c_proj" in p]
    assert len(downs) == 2
    for param, piece in slices(host).items():
        module = host.get_submodule(param.rpartition(".")[0])
        gathered = param not in downs
        assert ("slice_channels" in module._buffers) is gathered, param
        assert (module.slice_start < 0) is gathered
        assert bool(piece.places) is gathered
    targets = [str(n.target) for n in host.sparsify.program.graph.nodes if n.op == "call_function"]
    assert targets.count("sparsify.partial_linear.default") == 2
    assert targets.count("sparsify.partial_linear_at.default") == len(slices(host)) - 2


def test_without_permutation_every_linear_gathers_the_same_columns():
    host, fixed = compiled(PaCA(rank=5)), compiled(PaCA(rank=5, permute=False))
    assert fixed.sparsify.program.moves == ()
    assert host.sparsify.program.moves
    assert all(s.places for s in slices(fixed).values())
    for param, piece in slices(fixed).items():
        assert set(piece.channels) == set(slices(host)[param].channels)


def test_permuted_and_fixed_hosts_exchange_adapters(tmp_path):
    """The file speaks original coordinates."""
    host, fixed = compiled(PaCA(rank=5)), compiled(PaCA(rank=5, permute=False))
    tiny.train(host)
    host.sparsify.save_adapter(tmp_path)
    fixed.sparsify.load_adapter(tmp_path, "other")
    assert fixed.sparsify.set_adapter("other").trainable
    torch.testing.assert_close(logits(fixed), logits(host))


def test_rank_per_pattern():
    host = compiled(PaCA(rank={"*.o_proj": 2, "*self_attn*": 7, "*": 4}))
    wanted = {"o_proj": 2, "q_proj": 7, "k_proj": 7, "v_proj": 7}
    assert {p: s.length for p, s in slices(host).items()} == {p: wanted.get(leaf(p), 4) for p in slices(host)}


def test_linears_of_one_input_with_different_ranks_choose_apart():
    host = compiled(PaCA(match="*.layers.0.self_attn.?_proj", rank={"*.q_proj": 2, "*": 4}))
    groups = {tuple(sorted(map(leaf, c.params))): len(c.channels) for c in host.sparsify.program.channel_choices}
    assert groups == {("q_proj",): 2, ("k_proj", "v_proj"): 4, ("o_proj",): 4}


def test_wrong_ranks_are_refused_in_words():
    with pytest.raises(PlanError, match=r"no pattern of rank names model\.layers\.0\.mlp\.gate_proj; add '\*'"):
        tiny.lower(model_of(), PaCA(rank={"*attn*": 3}))
    with pytest.raises(PlanError, match=r"rank 36 for model\.layers\.0\.self_attn\.q_proj, which has 36 input columns"):
        tiny.lower(model_of(), PaCA(match="*.q_proj", rank=36))
    for rank in (0, {"*": 0}, -1):
        with pytest.raises(PlanError, match="out of range"):
            PaCA(rank=rank)


def test_seed_decides_the_random_choice():
    first, again, other = (compiled(PaCA(rank=5), seed=s).sparsify.program.channel_choices for s in (0, 0, 1))
    assert first == again
    assert [c.channels for c in first] != [c.channels for c in other]


def reference_scores(name: str, select: str, group: list[str]) -> Tensor:
    """Straight from the definition, with plain hooks and autograd in fp64."""
    model = model_of(name, torch.float64)
    conv = is_conv1d(model.get_submodule(group[0].rpartition(".")[0]))
    parameters = dict(model.named_parameters())
    weight = sum(methods.logical(parameters[p].detach(), conv).square().sum(0) for p in group).sqrt()
    total, count = torch.zeros(()), 0
    for batch in batches(name):
        if select == "gradient":
            found = methods.dense_gradients(model, group, lambda m, b=batch: m(**b).loss)
            total = total + sum(methods.logical(g, conv).square().sum(0) for g in found.values())
            count += 1
            continue
        seen: list[Tensor] = []
        hook = model.get_submodule(group[0].rpartition(".")[0]).register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0].detach())
        )
        model(**batch)
        hook.remove()
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        total, count = total + seen[0][keep].square().sum(0), count + int(keep.sum())
    scores = {"weight": weight, "activation": (total / max(count, 1)).sqrt()}
    scores["product"] = scores["weight"] * scores["activation"]
    scores["gradient"] = scores["activation"]
    return scores[select]


@pytest.mark.parametrize("select", ["weight", "activation", "product", "gradient"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_selections_equal_the_reference(name, select):
    largest = name == "Llama" or select != "gradient"
    host = compiled(PaCA(rank=5, select=select, largest=largest), name=name)
    program = host.sparsify.program
    groups = [(list(c.params), set(c.channels)) for c in program.channel_choices]
    for choice in program.choices:
        (piece,) = [s for s in program.slices if s.structure == choice.structure]
        groups.append(([piece.param], set(piece.channels)))
    assert len(groups) == 8
    for params, chosen in groups:
        score = reference_scores(name, select, params)
        order = score.topk(5, largest=largest)
        bound = float(order.values[-1])
        for channel in chosen:  # up to ties in rounding
            value = float(score[channel])
            assert value >= bound * (1 - 1e-4) if largest else value <= bound * (1 + 1e-4), (params, channel)


def test_data_driven_choice_without_batches_is_refused():
    for select in ("activation", "product", "gradient"):
        with pytest.raises(PlanError, match=rf"select='{select}', needs calibration batches"):
            tiny.lower(model_of(), PaCA(rank=2, select=select))


# --- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_before_the_first_step_the_model_is_the_base(name, dtype):
    """Every bit of every weight; and, where nothing is reordered, every bit of the output."""
    base = model_of(name, dtype)
    for permute in (True, False):
        host = compiled(PaCA(rank=5, permute=permute), name=name, dtype=dtype)
        tiny.assert_same(methods.state(host, base), {n: t for n, t in base.state_dict().items()})
        assert all(p.dtype == torch.float32 for p in tiny.trainable(host))
        if not permute:
            assert torch.equal(logits(host), logits(base))
        else:
            torch.testing.assert_close(
                logits(host), logits(base), atol=0.05 if dtype != torch.float32 else 1e-4, rtol=0
            )


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_training_changes_the_chosen_columns_and_nothing_else(name):
    host, base = compiled(PaCA(rank=5), name=name), model_of(name)
    losses = tiny.train(host, steps=5)
    assert losses[-1] < losses[0]
    now, before = methods.state(host, base), base.state_dict()
    pieces = slices(host)
    for param, value in before.items():
        changed = now[param] != value
        if param not in pieces:
            assert not changed.any(), param
            continue
        rows = changed.any(dim=1 - pieces[param].axis).nonzero().flatten()
        assert set(rows.tolist()) == set(pieces[param].channels)
    torch.testing.assert_close(logits(plain_with(host, name), name), logits(host, name), atol=1e-5, rtol=1e-4)


def test_backward_keeps_rank_columns_of_the_input():
    host = compiled(PaCA(rank=5))
    layer = host.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 9, 36, requires_grad=True)
    constants = [*layer.parameters(), *layer.buffers()]
    assert list(methods.saved_storages(lambda: layer(x), constants).values()) == [4 * 9 * 5 * 4]


# --- adapters ------------------------------------------------------------------------------------------------------------


def trained(seed: int, name: str = "Llama") -> Any:
    host = compiled(PaCA(rank=4), name=name, seed=seed)
    tiny.disturb(host, seed=seed + 50)
    return host


def test_fused_adapters_of_two_selections_add_their_changes(tmp_path):
    hosts = [trained(s) for s in (0, 1)]
    changes = [methods.deltas(h) for h in hosts]
    for i, host in enumerate(hosts):
        host.sparsify.save_adapter(tmp_path / str(i))
    server = trained(2)
    base = logits(compiled(PaCA(rank=4), seed=2))
    for i in (0, 1):
        server.sparsify.load_adapter(tmp_path / str(i), str(i))
    mix = server.sparsify.set_adapter({"0": 0.25, "1": -1.5})
    overlap = sum(
        len(set(a.channels) & set(b.channels))
        for a, b in zip(hosts[0].sparsify.program.slices, hosts[1].sparsify.program.slices, strict=True)
    )
    assert sum(c.shared for c in mix.conflicts) == overlap
    now, before = methods.state(server, model_of()), model_of().state_dict()
    for param in changes[0]:
        expected = before[param] + 0.25 * changes[0][param] - 1.5 * changes[1][param]
        torch.testing.assert_close(now[param], expected)
    server.sparsify.set_adapter(None)
    assert torch.equal(logits(server), base)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_merge_is_the_same_function_in_plain_modules_and_unmerge_exact(name):
    host = trained(0, name)
    expected, blocks = logits(host, name), [p.detach().clone() for p in tiny.trainable(host)]
    host.sparsify.merge()
    assert not any(n.endswith("_slice") for n, _ in host.named_parameters())
    assert type(host.get_submodule(host.sparsify.program.slices[0].param.rpartition(".")[0])).forward in (
        nn.Linear.forward,
        *([] if name == "Llama" else [type(model_of(name).transformer.h[0].attn.c_attn).forward]),
    )
    torch.testing.assert_close(logits(host, name), expected)
    host.sparsify.unmerge()
    assert torch.equal(logits(host, name), expected)
    assert all(torch.equal(a, b) for a, b in zip(blocks, tiny.trainable(host), strict=True))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_export_as_lora_gives_the_same_logits_in_peft(name, tmp_path):
    import copy

    peft = pytest.importorskip("peft")
    host = trained(0, name)
    host.sparsify.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model_of(name)), tmp_path)
    torch.testing.assert_close(logits(theirs, name), logits(host, name), atol=1e-4, rtol=1e-4)
    assert (logits(host, name) - logits(model_of(name), name)).abs().max() > 1e-2


def test_restore_gives_the_users_model_back():
    host = trained(0)
    tiny.assert_same(tiny.snapshot(host.sparsify.restore()), tiny.snapshot(model_of()))
