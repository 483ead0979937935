"""RoSA as a plan rule: masks against references, one operator and one saved input, adapters, folding, the schedule."""

from __future__ import annotations

import copy
from typing import Any

import methods
import pytest
import tiny
import torch
from methods import batches, compiled, logits, model_of, plain_with
from torch import Tensor, nn

import sparsify
from sparsify import PaCA, Plan, PlanError, RoSA
from sparsify.errors import AdapterError, SparsifyError, StateError
from sparsify.host.live_state import original
from sparsify.train.rosa import RosaCallback, collect_masks

BOTH = RoSA(rank=3, density=0.04)
RANDOM = RoSA(rank=3, density=0.04, mask="random")


def parts(host: Any) -> dict[str, Any]:
    return {p.param: p for p in host.sparsify.program.lowranks}


def reference_score(name: str, mask: str, params: list[str]) -> dict[str, Tensor]:
    """Mean over batches of dW², or |mean dW|, by plain autograd in fp64."""
    model = model_of(name, torch.float64)
    total: dict[str, Tensor] = {}
    for batch in batches(name):
        for param, g in methods.dense_gradients(model, params, lambda m, b=batch: m(**b).loss).items():
            part = g.square() if mask == "gradient" else g
            total[param] = total[param] + part if param in total else part
    return {p: t.abs() for p, t in total.items()}


# --- masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["gradient", "gradient_abs"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_gradient_masks_equal_the_reference(name, mask):
    host = compiled(RoSA(rank=3, density=0.04, mask=mask), name=name)
    found = parts(host)
    assert len(found) == (14 if name == "Llama" else 8)
    scores = reference_score(name, mask, list(found))
    overlaps = []
    for param, part in found.items():
        score = scores[param].flatten()
        assert part.index.dtype == torch.int32
        assert part.count == part.index.numel() == max(1, round(0.04 * score.numel()))
        assert torch.equal(part.index, part.index.unique())
        bound = float(score.topk(part.count).values[-1])
        assert bool((score[part.index.long()] >= bound * (1 - 1e-3)).all()), param
        other = reference_top(name, param, "gradient_abs" if mask == "gradient" else "gradient", part.count)
        overlaps.append(len(set(part.index.tolist()) & other) / part.count)
    assert min(overlaps) < 1, "the two criteria must differ somewhere"


_TOP: dict[tuple[str, str], dict[str, Tensor]] = {}


def reference_top(name: str, param: str, mask: str, count: int) -> set[int]:
    if (name, mask) not in _TOP:
        _TOP[name, mask] = reference_score(name, mask, list(parts(compiled(BOTH, name=name))))
    return set(_TOP[name, mask][param].flatten().topk(count).indices.tolist())


def test_magnitude_and_random_masks():
    host = compiled(RoSA(rank=0, density=0.04, mask="magnitude"))
    for param, part in parts(host).items():
        weight = dict(model_of().named_parameters())[param].detach().abs().flatten()
        assert set(part.index.tolist()) == set(weight.topk(part.count).indices.tolist())
    first, again, other = (parts(compiled(RANDOM, seed=s)) for s in (0, 0, 1))
    names = list(first)
    assert all(torch.equal(first[p].index, again[p].index) for p in names)
    assert not any(torch.equal(first[p].index, other[p].index) for p in names)
    assert not torch.equal(first[names[0]].index, first[names[1]].index)


def test_padding_changes_no_mask():
    """The same text with more padding that carries no loss."""
    padded = []
    for batch in batches():
        rows = batch["input_ids"].shape[0]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        padded.append({
            "input_ids": torch.cat([batch["input_ids"], torch.full((rows, 4), 7)], 1),
            "attention_mask": torch.cat([mask, torch.zeros(rows, 4, dtype=mask.dtype)], 1),
            "labels": torch.cat([batch["labels"], torch.full((rows, 4), -100)], 1),
        })  # fmt: skip
    rule = RoSA(match="*.layers.1.*", rank=0, density=0.02)
    host = compiled(rule)
    other = sparsify.compile(model_of(), Plan([rule]), calibration=padded, progress=False)
    for param, part in parts(host).items():
        shared = len(set(part.index.tolist()) & set(parts(other)[param].index.tolist()))
        assert shared >= 0.95 * part.count, param  # rounding may swap entries at the threshold


def test_collecting_leaves_model_inputs_and_flags_alone():
    model = copy.deepcopy(model_of())
    list(model.parameters())[2].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before, given = tiny.snapshot(model), batches()
    kept = [{k: v.clone() for k, v in b.items()} for b in given]
    sparsify.compile(model, Plan([BOTH]), calibration=given, progress=False)
    tiny.assert_same(tiny.snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for a, b in zip(given, kept, strict=True):
        tiny.assert_same(a, b)


def test_density_and_rank_per_pattern():
    rule = RoSA(rank={"*mlp*": 0, "*": 2}, density={"*down*": 0.05, "*q_proj": 0, "*": 0.01}, mask="random")
    host = compiled(rule)
    for param, part in parts(host).items():
        size = dict(model_of().named_parameters())[param].numel()
        density = 0.05 if "down" in param else 0 if "q_proj" in param else 0.01
        assert part.count == (max(1, round(density * size)) if density else 0)
        assert part.rank == (0 if "mlp" in param else 2)
        module = host.get_submodule(param.removesuffix(".weight"))
        assert ("sparse_values" in module._parameters) is bool(part.count)
        assert ("lora_A" in module._parameters) is bool(part.rank)
    for fields in ({"rank": {"*attn*": 1}}, {"density": {"*attn*": 0.1}}):
        with pytest.raises(PlanError, match=r"no pattern of \w+ names model\.layers\.0\.mlp\.\w+; add '\*'"):
            tiny.lower(model_of(), RoSA(mask="random", **fields))


def test_settings_out_of_range_are_refused():
    for fields, words in (
        ({"rank": -1}, "out of range"),
        ({"density": 1.5}, "out of range"),
        ({"density": {"*": -0.1}}, "out of range"),
        ({"rank": 0, "density": 0.0}, "leave nothing to train"),
        ({"dropout": 1.0}, "0 ≤ dropout < 1"),
        ({"mask": "hessian"}, "expected one of 'gradient'"),
    ):
        with pytest.raises(PlanError, match=words):
            RoSA(**fields)


def test_a_pattern_that_leaves_nothing_does_not_cost_the_others_their_training(tmp_path):
    host = compiled(RoSA(rank={"*mlp*": 0, "*": 2}, density={"*mlp*": 0, "*": 0.02}, mask="random"))
    tiny.disturb(host)
    expected = logits(host)
    host.sparsify.save_adapter(tmp_path)
    host.sparsify.load_adapter(tmp_path, "again")
    assert host.sparsify.set_adapter("again").trainable
    torch.testing.assert_close(logits(host), expected)


# --- the function --------------------------------------------------------------------------------------------------------

ZERO = {
    "both": RANDOM,
    "sparse only": RoSA(rank=0, density=0.04, mask="random"),
    "low-rank only": RoSA(rank=3, density=0.0),
    "open mask": None,
    "dropout": RoSA(rank=3, density=0.04, mask="random", dropout=0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(ZERO))
def test_before_training_the_model_is_the_base_exactly(kind, dtype):
    for name in ("Llama", "GPT-2") if kind == "both" else ("Llama",):
        host = compiled(BOTH, calibrate=False) if ZERO[kind] is None else compiled(ZERO[kind], name=name, dtype=dtype)
        base = model_of(name, torch.float32 if ZERO[kind] is None else dtype)
        assert torch.equal(logits(host, name), logits(base, name))
        if name == "Llama":  # no dropout of its own
            assert torch.equal(logits(host.train(), name), logits(base, name))
        tiny.assert_same(methods.state(host, base), dict(base.state_dict()))
        assert all(p.dtype == torch.float32 for p in tiny.trainable(host))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_function_is_the_base_plus_sparse_plus_scaled_product(name):
    host = compiled(RoSA(rank=3, alpha=6, density=0.04, mask="random"), name=name)
    tiny.disturb(host)
    plain = copy.deepcopy(model_of(name))
    changes = methods.deltas(host)
    with torch.no_grad():
        for param, change in changes.items():
            plain.get_parameter(param).add_(change)
    torch.testing.assert_close(logits(host, name), logits(plain, name), atol=1e-4, rtol=1e-4)
    for param, part in parts(host).items():
        module = host.get_submodule(param.removesuffix(".weight"))
        low = methods.logical(2.0 * module.lora_B.detach() @ module.lora_A.detach(), part.transposed)
        sparse = changes[param] - low
        outside = torch.ones(sparse.numel(), dtype=torch.bool)
        outside[part.original.long()] = False
        assert sparse.flatten()[outside].abs().max() < 1e-6
        assert sparse.flatten()[~outside].abs().min() > 0 or part.count > 50
    torch.testing.assert_close(logits(plain_with(host, name), name), logits(host, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rslora", "alpha", "scale"), [(False, None, 1.0), (False, 8.0, 2.0), (True, None, 2.0), (True, 8.0, 4.0)]
)
def test_scale(rslora, alpha, scale):
    assert RoSA(rank=4, alpha=alpha, rslora=rslora).scale(4) == scale
    host = compiled(RoSA(rank=4, alpha=alpha, rslora=rslora, density=0.0))
    assert {p.scale for p in parts(host).values()} == {scale}


def test_initial_factors_follow_the_paper_and_the_seed():
    host, again, other = (compiled(RANDOM, seed=s) for s in (0, 0, 1))
    for param in parts(host):
        owner = param.removesuffix(".weight")
        a, b = host.get_submodule(owner).lora_A, host.get_submodule(owner).lora_B
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.8 * bound
        assert not b.any()
        assert torch.equal(a, again.get_submodule(owner).lora_A)
        assert not torch.equal(a, other.get_submodule(owner).lora_A)


def test_dropout_acts_on_the_low_rank_branch_only_and_in_training_only():
    host = compiled(RoSA(rank=3, density=0.04, mask="random", dropout=0.5), name="Mlp")
    tiny.disturb(host, scale=0.3)
    layer, x = host.layers[0]["up"], torch.randn(6, 12)
    eager = layer.eval()(x)
    assert torch.equal(layer(x), eager)
    torch.manual_seed(5)
    found = layer.train()(x)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    values, index, a, b = layer.parts()
    sparse = torch.ops.sparsify.sparse_lowrank_linear(
        x, layer.weight, layer.bias, values, index, None, None, 1.0, False
    )
    torch.testing.assert_close(found, sparse + layer.scale * dropped @ a.t() @ b.t())
    assert not torch.allclose(found, eager)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (layer.sparse_values, layer.lora_A, layer.lora_B))


def test_one_saved_input_per_linear_and_no_mask_at_dropout_zero():
    host = compiled(RANDOM).train()
    layer = host.model.layers[0].mlp.up_proj
    x = torch.randn(4, 9, 36, requires_grad=True)
    constants = [*layer.parameters(), *layer.buffers()]
    assert list(methods.saved_storages(lambda: layer(x), constants)) == [x.untyped_storage().data_ptr()]
    dropping = compiled(RoSA(rank=3, density=0.04, mask="random", dropout=0.1)).train().model.layers[0].mlp.up_proj
    constants = [*dropping.parameters(), *dropping.buffers()]
    assert len(methods.saved_storages(lambda: dropping(x), constants)) > 1, "the control: with dropout a mask is kept"


def test_training_moves_support_and_factors_and_nothing_else():
    host, base = compiled(RANDOM), tiny.snapshot(model_of())
    stored = {p: host.sparsify.stored(p).detach().clone() for p in parts(host)}
    losses = tiny.train(host, steps=5)
    assert losses[-1] < losses[0]
    for param, part in parts(host).items():
        changed = (host.sparsify.stored(param) != stored[param]).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(part.index.tolist())
    for name, value in methods.state(host, model_of()).items():
        assert (name in parts(host)) is not torch.equal(value, base[name]), name
    leaves = {n.rpartition(".")[2] for n in methods.trained_names(host)}
    assert leaves == {"sparse_values", "lora_A", "lora_B"}


def test_param_groups_give_separate_learning_rates():
    host = compiled(RoSA(match="*attn*", rank=3, density=0.04, mask="random"), PaCA(match="*mlp*", rank=3))
    groups = host.sparsify.param_groups(sparse_lr=2e-4, lora_lr=7e-4, lr=1e-5)
    assert {g["name"]: g["lr"] for g in groups} == {"sparse": 2e-4, "lora": 7e-4, "values": 1e-5}
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in tiny.trainable(host))
    assert {g["name"]: g["lr"] for g in host.sparsify.param_groups(1.0, 2.0)}["values"] == 1.0
    by_name = {g["name"]: {id(p) for p in g["params"]} for g in groups}
    for name, parameter in host.named_parameters():
        leaf = name.rpartition(".")[2]
        if parameter.requires_grad:
            kind = {"sparse_values": "sparse", "lora_A": "lora", "lora_B": "lora"}.get(leaf, "values")
            assert id(parameter) in by_name[kind]
    optimizer = torch.optim.SGD(host.sparsify.param_groups(0.0, 1e-2))
    sparse = [p.detach().clone() for p in groups[0]["params"]]
    tiny.probe_loss(host(tiny.tokens())).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(sparse, groups[0]["params"], strict=True)), "a rate of zero holds it"
    assert any(g["name"] == "lora" and any(p.grad.any() for p in g["params"]) for g in optimizer.param_groups)


# --- adapters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_merge_and_unmerge_are_exact(name, dtype):
    host = compiled(RANDOM, name=name, dtype=dtype)
    tiny.disturb(host)
    expected, before = logits(host, name), [p.detach().clone() for p in tiny.trainable(host)]
    stored = {p: host.sparsify.stored(p).detach().clone() for p in parts(host)}
    host.sparsify.merge()
    assert not any(n.rpartition(".")[2] in ("sparse_values", "lora_A") for n, _ in host.named_parameters())
    assert set(host.state_dict()) == set(model_of(name).state_dict())
    torch.testing.assert_close(logits(host, name), expected, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)
    host.sparsify.unmerge()
    assert torch.equal(logits(host, name), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.trainable(host), strict=True))
    host.sparsify.set_adapter(None)
    assert torch.equal(logits(host, name), logits(model_of(name, dtype), name))
    for param, weight in stored.items():
        index = parts(host)[param].index.long()
        assert torch.equal(
            host.sparsify.stored(param).flatten().index_fill(0, index, 0), weight.flatten().index_fill(0, index, 0)
        )


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_save_and_load_with_sparse_files(name, tmp_path):
    from safetensors.torch import load_file

    host = compiled(RANDOM, name=name)
    tiny.disturb(host)
    host.sparsify.save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    for param, part in parts(host).items():
        assert tensors[f"{param}::sparse::delta"].shape == (part.count,)
        assert torch.equal(tensors[f"{param}::sparse::channels"], part.original.long())
        assert tensors[f"{param}::lora::A"].shape[0] == 3
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size < 0.6 * sum(model_of(name).get_parameter(p).numel() * 4 for p in parts(host))
    fresh = compiled(RANDOM, name=name)
    fresh.sparsify.load_adapter(tmp_path, "z")
    assert fresh.sparsify.set_adapter("z").trainable
    torch.testing.assert_close(logits(fresh, name), logits(host, name))
    foreign = compiled(PaCA(rank=4), name=name)  # another method: the same function, for inference
    foreign.sparsify.load_adapter(tmp_path, "z")
    assert not foreign.sparsify.set_adapter("z").trainable
    torch.testing.assert_close(logits(foreign, name), logits(host, name), atol=1e-4, rtol=1e-4)
    foreign.sparsify.set_adapter(None)
    tiny.assert_same(tiny.snapshot(foreign.sparsify.restore()), tiny.snapshot(model_of(name)))


def test_weighted_mix_adds_the_changes_and_names_overlaps(tmp_path):
    hosts = []
    for seed in (0, 1):
        hosts.append(compiled(RANDOM, seed=seed))
        tiny.disturb(hosts[-1], seed=seed)
        hosts[-1].sparsify.save_adapter(tmp_path / str(seed))
    changes = [methods.deltas(h) for h in hosts]
    before = model_of().state_dict()
    for server in (
        compiled(RANDOM, seed=2),
        compiled(PaCA(rank=4)),
        compiled(RoSA(rank=0, density=0.04, mask="random")),
    ):
        base = logits(server)
        for i in (0, 1):
            server.sparsify.load_adapter(tmp_path / str(i), str(i))
        mix = server.sparsify.set_adapter({"0": 0.5, "1": -2.0})
        first, second = (parts(h) for h in hosts)
        shared = {p: len(set(first[p].original.tolist()) & set(second[p].original.tolist())) for p in first}
        assert {c.param: c.shared for c in mix.conflicts} == {p: n for p, n in shared.items() if n}
        assert all(c.kind == "sparse" and "entries" in str(c) for c in mix.conflicts)
        now = methods.state(server, model_of())
        for param in changes[0]:
            torch.testing.assert_close(now[param], before[param] + 0.5 * changes[0][param] - 2 * changes[1][param])
        torch.testing.assert_close(logits(server), logits(plain_with(server)), atol=1e-4, rtol=1e-4)
        server.sparsify.set_adapter(None)
        assert torch.equal(logits(server), base)


def test_restore_gives_the_users_model_back():
    host = compiled(RANDOM)
    tiny.train(host)
    assert methods.deltas(host)
    restored = host.sparsify.restore()
    tiny.assert_same(tiny.snapshot(restored), tiny.snapshot(model_of()))
    assert set(restored.state_dict()) == set(model_of().state_dict())
    assert type(restored.model.layers[0].mlp.up_proj) is nn.Linear


def test_export_as_lora_refuses_the_sparse_part_or_folds_it_into_the_base(tmp_path):
    peft = pytest.importorskip("peft")
    host = compiled(RANDOM)
    tiny.disturb(host)
    with pytest.raises(AdapterError, match=r"has a sparse part of \d+ scattered entries, which no low-rank"):
        host.sparsify.export_lora(tmp_path / "no")
    with pytest.raises(AdapterError, match="must be 'refuse' or 'merge'"):
        host.sparsify.export_lora(tmp_path / "no", sparse="drop")
    expected = logits(host)
    host.sparsify.export_lora(tmp_path / "yes", sparse="merge")
    assert torch.equal(logits(host), expected)
    base = type(model_of()).from_pretrained(tmp_path / "yes" / "base")
    assert set(base.state_dict()) == set(model_of().state_dict())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "yes")
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_round_trip_is_exact(dtype):
    host = compiled(RANDOM, dtype=dtype)
    tiny.disturb(host, scale=0.01)
    saved = {n: t.clone() for n, t in host.state_dict().items()}
    fresh = compiled(RANDOM, dtype=dtype)
    assert not torch.equal(logits(fresh), logits(host))
    fresh.load_state_dict(saved)
    assert torch.equal(logits(fresh), logits(host))
    for a, b in zip(tiny.trainable(host), tiny.trainable(fresh), strict=True):
        assert torch.equal(a, b)
    plain = copy.deepcopy(model_of(dtype=dtype))
    plain.load_state_dict(host.sparsify.original_state_dict(saved))
    torch.testing.assert_close(logits(plain), logits(host), atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)


def test_a_checkpoint_without_the_parts_is_refused_and_not_half_loaded():
    host = compiled(RANDOM)
    with pytest.raises(RuntimeError, match="the parts cannot be told apart"):
        host.load_state_dict(model_of().state_dict(), strict=False)


def test_a_checkpoint_of_another_base_is_not_taken_silently():
    """The folded weight of the checkpoint belongs to another base: loading only the parts would compute something else."""
    host = compiled(RANDOM)
    tiny.disturb(host)
    other = tiny.lower(tiny.llama(seed=9), RANDOM)
    checkpoint = original(host, host.state_dict(), with_parts=True)  # what Trainer writes
    with pytest.raises(StateError, match="made over another base"):
        other.load_state_dict(checkpoint)
    other.load_state_dict(host.state_dict())  # the live state has its base with it
    torch.testing.assert_close(logits(other), logits(host), atol=0, rtol=0)


# --- the schedule --------------------------------------------------------------------------------------------------------


def test_warm_up_collect_restart():
    host = compiled(RoSA(rank=3, density=0.04), calibrate=False)
    assert len(host.sparsify.open_masks()) == 14
    optimizer = torch.optim.AdamW(host.sparsify.param_groups(1e-2, 1e-2))
    x = tiny.tokens()

    def step() -> None:
        host(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    for part in parts(host).values():
        module = host.get_submodule(part.param.removesuffix(".weight"))
        assert module.lora_B.any(), "the low-rank part warms up"
        assert module.mask_open
    warm = plain_with(host)  # the gradients are those of the warmed-up model
    supports = collect_masks(host, batches(), optimizer=optimizer, progress=False)
    score: dict[str, Tensor] = {}
    for batch in batches():
        for param, g in methods.dense_gradients(warm, list(supports), lambda m, b=batch: m(**b).loss).items():
            score[param] = score.get(param, torch.zeros_like(g)) + g.square()
    for param, index in supports.items():
        best = score[param].flatten().topk(index.numel()).indices
        assert len(set(best.tolist()) & set(index.tolist())) >= 0.95 * index.numel(), param
    assert host.sparsify.open_masks() == []
    assert torch.equal(logits(host), logits(model_of())), "the restart is from the base"
    assert all(p not in optimizer.state for p in tiny.trainable(host))
    fresh = compiled(RoSA(rank=3, density=0.04), calibrate=False)
    for a, b in zip(parts(host), parts(fresh), strict=True):
        owner = a.removesuffix(".weight")
        assert torch.equal(host.get_submodule(owner).lora_A, fresh.get_submodule(b.removesuffix(".weight")).lora_A)
    before = [p.detach().clone() for p in tiny.trainable(host)]
    for _ in range(2):
        step()
    assert all(not torch.equal(a, b) for a, b in zip(before, tiny.trainable(host), strict=True)), "now both parts train"
    with pytest.raises(SparsifyError, match="no mask is open"):
        collect_masks(host, batches(), progress=False)


def test_collected_masks_travel_with_adapters_and_checkpoints(tmp_path):
    host = compiled(RoSA(rank=3, density=0.04), calibrate=False)
    collect_masks(host, batches(), progress=False)
    tiny.disturb(host)
    fresh = compiled(RoSA(rank=3, density=0.04), calibrate=False)
    fresh.load_state_dict({n: t.clone() for n, t in host.state_dict().items()})
    assert fresh.sparsify.open_masks() == []
    assert torch.equal(logits(fresh), logits(host))
    tiny.train(fresh)
    host.sparsify.save_adapter(tmp_path)
    other = compiled(RoSA(rank=3, density=0.04), calibrate=False)
    other.sparsify.load_adapter(tmp_path, "z")
    other.sparsify.set_adapter("z")
    torch.testing.assert_close(logits(other), logits(host), atol=1e-4, rtol=1e-4)


class Rows(torch.utils.data.Dataset):
    """Fixed token rows."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = tiny.tokens(1, 8, seed=300 + i)[0]
        return {"input_ids": row, "labels": row}


def trainer_of(directory: Any, steps: int) -> Any:
    transformers = pytest.importorskip("transformers")
    host = compiled(RoSA(match="*.layers.1.*", rank=2, density=0.04), calibrate=False)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=2, save_steps=2, logging_steps=1, report_to=[],
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, seed=1, lr_scheduler_type="constant",
    )  # fmt: skip
    callback = RosaCallback(batches(), warmup_steps=1, progress=False)
    return transformers.Trainer(model=host, args=arguments, train_dataset=Rows(), callbacks=[callback]), host


def test_trainer_collects_trains_saves_and_resumes(tmp_path):
    trainer, host = trainer_of(tmp_path / "a", 3)
    trainer.train()
    assert host.sparsify.open_masks() == []
    assert any(host.get_submodule(p.removesuffix(".weight")).lora_B.any() for p in parts(host))
    resumed, second = trainer_of(tmp_path / "a", 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    for param, part in parts(host).items():
        assert torch.equal(parts(second)[param].index, part.index), "the supports come from the checkpoint"
    for (name, a), b in zip(host.named_parameters(), second.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
