"""Training a compiled model works as usual: accumulation, clipping, scaling, checkpointing, optimizers, copies, checkpoints."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, Plan

BOTH = S2FT(fraction=0.1, producer_fraction=0.1, budget="structure")


def host_of(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    model = tiny.llama(dtype)
    return model, tiny.lower(model, BOTH, **options)


def gradients(host: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}


# --- gradients -----------------------------------------------------------------------------------------------------------


def test_only_the_slices_are_parameters_that_train():
    _, host = host_of()
    names = {n for n, p in host.named_parameters() if p.requires_grad}
    assert names
    assert all(n.endswith("_slice") for n in names)
    assert all(type(p) is nn.Parameter and p.is_leaf and p.is_contiguous() for p in tiny.trainable(host))
    tiny.probe_loss(host(tiny.tokens())).backward()
    assert set(gradients(host)) == names
    assert all(g.abs().sum() > 0 for g in gradients(host).values())


def test_accumulated_gradients_equal_those_of_the_joint_batch():
    _, host = host_of(torch.float64)
    x = tiny.tokens(6)
    host(x, labels=x).loss.backward()
    joint = gradients(host)
    host.zero_grad()
    assert gradients(host) == {}
    for part in x.split(2):
        (host(part, labels=part).loss / 3).backward()
    for name, g in gradients(host).items():
        torch.testing.assert_close(g, joint[name])


def test_clipping_sees_and_scales_the_slices():
    _, host = host_of()
    tiny.probe_loss(host(tiny.tokens())).backward()
    before = gradients(host)
    norm = torch.stack([g.norm() for g in before.values()]).norm()
    found = nn.utils.clip_grad_norm_(host.parameters(), max_norm=0.5 * float(norm))
    torch.testing.assert_close(found, norm)
    for name, g in gradients(host).items():
        torch.testing.assert_close(g, before[name] * 0.5, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_scaler_unscales_and_skips_a_step_with_inf(dtype):
    _, host = host_of(dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(tiny.trainable(host), lr=0.1)
    before = [p.detach().clone() for p in tiny.trainable(host)]
    tiny.probe_loss(host(tiny.tokens())).backward()
    plain = [p.grad.clone() for p in tiny.trainable(host)]
    optimizer.zero_grad()
    scaler.scale(tiny.probe_loss(host(tiny.tokens()))).backward()
    scaler.unscale_(optimizer)
    for p, g in zip(tiny.trainable(host), plain, strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-4, rtol=0.1 if dtype == torch.bfloat16 else 1e-4)
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(a, p) for a, p in zip(before, tiny.trainable(host), strict=True))
    after = [p.detach().clone() for p in tiny.trainable(host)]
    optimizer.zero_grad()
    scaler.scale(tiny.probe_loss(host(tiny.tokens()))).backward()
    tiny.trainable(host)[-1].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, p) for a, p in zip(after, tiny.trainable(host), strict=True))
    assert scaler.get_scale() == 2.0**11


def test_autocast_trains_a_16_bit_forward_with_32_bit_gradients():
    _, host = host_of()
    exact = host(tiny.tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = host(tiny.tokens()).logits
        assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.02, rtol=0.05)
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in tiny.trainable(host))


def test_a_dtype_mismatch_is_an_error_outside_autocast_as_in_linear():
    layer = tiny.lower(tiny.Mlp().double(), example=torch.randn(3, 12, dtype=torch.float64)).layers[0]["down"]
    with pytest.raises(RuntimeError, match=r"the input is torch\.float32, the weight torch\.float64"):
        layer(torch.randn(2, 20))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    _, host = host_of(torch.float64)
    host.train()
    tiny.probe_loss(host(tiny.tokens())).backward()
    plain = gradients(host)
    host.zero_grad()
    host.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    host.enable_input_require_grads()
    recomputed = []
    host.model.layers[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    tiny.probe_loss(host(tiny.tokens())).backward()
    assert len(recomputed) == 2, "the layer must run again in the backward"
    found = gradients(host)
    assert set(found) == set(plain)
    for name, g in plain.items():
        torch.testing.assert_close(found[name], g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_over_a_single_partial_linear(reentrant):
    host = tiny.lower(tiny.Mlp(), example=torch.randn(3, 12))
    layer = host.layers[0]["down"]
    x = torch.randn(4, 20, requires_grad=True)
    layer(x).square().sum().backward()
    expected = layer.weight_slice.grad.clone(), x.grad.clone()
    layer.weight_slice.grad = x.grad = None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(layer.weight_slice.grad, expected[0])
    torch.testing.assert_close(x.grad, expected[1])


def test_backward_stops_below_the_lowest_trained_layer():
    host = tiny.lower(tiny.llama(), S2FT(match="model.layers.1.*", fraction=0.1, budget="structure"))
    seen: dict[str, bool] = {}
    host.model.layers[0].register_forward_hook(lambda _m, _a, out: seen.update(low=out.requires_grad))
    host.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.update(high=out.requires_grad))
    inputs = []
    host.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _m, a: inputs.append(a[0].requires_grad))
    tiny.probe_loss(host(tiny.tokens())).backward()
    assert seen == {"low": False, "high": True}
    assert inputs == [False], "nothing below the lowest trained slice needs a gradient"


def test_forward_keeps_only_slices_of_linear_inputs_for_backward():
    """Against the same model with dense down-projections trained: the saved inputs shrink to the slices."""
    model = tiny.Mlp(width=16, hidden=640)
    x = torch.randn(50, 16)
    host = tiny.lower(model, S2FT(units=5), example=x)

    def kept(module: nn.Module) -> int:
        known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in known:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        on: list[bool] = []
        hooks = []
        for layer in module.layers:
            hooks.append(layer["down"].register_forward_pre_hook(lambda *_: on.append(True)))
            hooks.append(layer["down"].register_forward_hook(lambda *_: on.clear()))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t) if on else t, lambda t: t):
            module(x)
        for hook in hooks:
            hook.remove()
        return sum(sizes.values())

    assert kept(host) == 2 * 50 * 5 * 4
    for layer in model.layers:
        layer["up"].requires_grad_(False)
    assert kept(model) == 2 * 50 * 640 * 4


# --- optimizers ----------------------------------------------------------------------------------------------------------


def optimizers() -> list[tuple[str, dict[str, Any]]]:
    cases: list[tuple[str, dict[str, Any]]] = []
    for name in sorted(n for n in dir(torch.optim) if n[0].isupper()):
        cls = getattr(torch.optim, name)
        if name in ("Optimizer", "SparseAdam"):
            continue
        accepted = inspect.signature(cls).parameters
        decay = {"weight_decay": 0.1} if "weight_decay" in accepted else {}
        cases.append((name, decay))
        cases += [(name, {**decay, flag: True}) for flag in ("fused", "foreach") if flag in accepted]
    return cases


@pytest.mark.parametrize(
    ("name", "options"), optimizers(), ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
)
def test_every_optimizer_moves_the_slices_and_nothing_else(name, options):
    example = torch.randn(9, 12)
    model = tiny.Mlp()
    base = tiny.snapshot(model)
    host = tiny.lower(model, BOTH, example=example)
    start = tiny.state_of(host)
    tiny.assert_same(start, base)
    optimizer = getattr(torch.optim, name)(host.parameters() if name == "SGD" else tiny.trainable(host), **options)
    blocks = [p.detach().clone() for p in tiny.trainable(host)]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tiny.probe_loss(host(example))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert all(not torch.equal(a, b) for a, b in zip(blocks, tiny.trainable(host), strict=True)), (
        "every block must move"
    )
    found = tiny.state_of(host)
    for piece in host.sparsify.program.slices:
        channels = torch.tensor(piece.channels)
        changed = (found[piece.param] != base[piece.param]).any(dim=1 - piece.axis).nonzero().flatten()
        assert changed.numel()
        assert set(changed.tolist()) <= set(channels.tolist()), "frozen entries changed"
    touched = {s.param for s in host.sparsify.program.slices}
    for parameter, value in base.items():
        assert parameter in touched or torch.equal(found[parameter], value), parameter
    tiny.assert_same(tiny.snapshot(model), base)


def test_optimizer_steps_do_not_write_outside_the_block_of_the_stored_weight():
    """The stored weights themselves, not the state dict: a fused step on a strided view overwrote frozen entries."""
    _, host = host_of()
    stored = {s.param: host.sparsify.stored(s.param) for s in host.sparsify.program.slices}
    before = {p: w.detach().clone() for p, w in stored.items()}
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=0.1, weight_decay=0.5, fused=True)
    for _ in range(3):
        tiny.probe_loss(host(tiny.tokens())).backward()
        optimizer.step()
        optimizer.zero_grad()
    for piece in host.sparsify.program.slices:
        inside = torch.tensor(piece.places or range(piece.start, piece.start + piece.length))
        mask = torch.ones(before[piece.param].shape[piece.axis], dtype=torch.bool)
        mask[inside] = False
        rest = mask.nonzero().flatten()
        now = stored[piece.param].detach()
        assert torch.equal(now.index_select(piece.axis, rest), before[piece.param].index_select(piece.axis, rest))


def test_fp32_master_accumulates_updates_that_16_bits_would_lose():
    _, host = host_of(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in tiny.trainable(host))
    assert all(p.dtype == torch.bfloat16 for p in host.parameters() if not p.requires_grad)
    block = host.model.layers[0].mlp.down_proj.weight_slice
    with torch.no_grad():
        block.fill_(1.0)
    optimizer = torch.optim.SGD([block], lr=1.0)
    for _ in range(64):
        block.grad = torch.full_like(block, -(2.0**-12))  # below half a unit in the last place of bf16 at 1.0
        optimizer.step()
    host(tiny.tokens())
    region = host.model.layers[0].mlp.down_proj
    seen = region.weight.narrow(1, region.slice_start, block.shape[1])
    assert torch.equal(seen, torch.full_like(seen, 1.0 + 2.0**-6)), "64 updates of 2⁻¹² must arrive in the bf16 weight"
    half = torch.ones((), dtype=torch.bfloat16)
    for _ in range(64):
        half += 2.0**-12
    assert half == 1.0, "the control: in bf16 the same updates are lost"


# --- the user's model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "T5 (gated)"])
def test_the_users_model_stays_as_it_was(name):
    model = tiny.build(name)
    inputs = tiny.inputs_of(model, name)
    odd = list(model.modules())[-1]
    odd.train()
    next(model.parameters()).requires_grad_(False)
    list(model.parameters())[3].grad = torch.ones_like(list(model.parameters())[3])
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    addresses = {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    base, expected = tiny.snapshot(model), tiny.output_of(model(**inputs))
    keys = set(model.state_dict())

    host = tiny.lower(model, BOTH)
    host.train()
    tiny.train(host, **inputs)
    other = {n: torch.full_like(t, 0.25) if t.is_floating_point() else t for n, t in base.items()}
    host.load_state_dict({n: other[n] for n in model.state_dict()}, strict=False)
    with torch.no_grad():
        host.eval()
        assert not torch.allclose(tiny.output_of(host(**inputs)), expected)
    tiny.train(host, **inputs)

    tiny.assert_same(tiny.snapshot(model), base)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == addresses
    assert set(model.state_dict()) == keys
    assert torch.equal(list(model.parameters())[3].grad, torch.ones_like(list(model.parameters())[3]))
    assert "sparsify" not in model.__dict__
    assert torch.equal(tiny.output_of(model(**inputs)), expected)


def test_frozen_tensors_are_shared_with_the_users_model_and_not_copied():
    model, host = host_of()
    moved = {m.param for m in host.sparsify.program.moves} | {s.param for s in host.sparsify.program.slices}
    own = dict(model.named_parameters())
    shared = {n for n, p in host.named_parameters() if n in own and p.data_ptr() == own[n].data_ptr()}
    assert shared == set(own) - moved
    assert "model.embed_tokens.weight" in shared


def test_host_takes_the_training_mode_and_class_of_the_model():
    model = tiny.llama()
    assert not tiny.lower(model).training
    model.train()
    host = tiny.lower(model)
    assert host.training
    assert type(host) is type(model)
    assert isinstance(host.model.layers[0].mlp.down_proj, nn.Linear)


def test_hooks_of_the_user_go_on_working_on_the_host():
    model = tiny.llama()
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append("down"))
    host = tiny.lower(model)
    seen.clear()
    host(tiny.tokens())
    assert seen == ["down"]


def test_donate_frees_the_reordered_tensors_of_the_users_model():
    reference = tiny.lower(tiny.llama(), BOTH)
    model = tiny.llama()
    expected = model(tiny.tokens()).logits
    host = tiny.lower(model, BOTH, donate=True)
    torch.testing.assert_close(host(tiny.tokens()).logits, expected)
    tiny.assert_same(tiny.state_of(host), tiny.state_of(reference))
    freed = {n for n, p in model.named_parameters() if p.numel() == 0}
    assert freed == {m.param for m in host.sparsify.program.moves}


# --- copies and checkpoints ------------------------------------------------------------------------------------------------


def test_deepcopy_trains_on_its_own():
    _, host = host_of()
    tiny.disturb(host)
    clone = copy.deepcopy(host)
    before, blocks = tiny.state_of(host), [p.detach().clone() for p in tiny.trainable(host)]
    expected = host(tiny.tokens()).logits
    assert torch.equal(clone(tiny.tokens()).logits, expected)
    tiny.train(clone)
    tiny.assert_same(tiny.state_of(host), before)
    assert all(torch.equal(a, b) for a, b in zip(blocks, tiny.trainable(host), strict=True))
    assert torch.equal(host(tiny.tokens()).logits, expected)
    trained = clone(tiny.tokens()).logits
    assert not torch.equal(trained, expected)
    clone.sparsify.set_adapter(None)
    clone.sparsify.set_adapter("default")
    assert torch.equal(clone(tiny.tokens()).logits, trained)
    assert clone.sparsify.host is clone
    base = tiny.snapshot(tiny.llama())
    tiny.assert_same(tiny.snapshot(clone.sparsify.restore()), base)
    tiny.assert_same(tiny.state_of(host), before)
    tiny.assert_same(tiny.snapshot(host.sparsify.restore()), base)


def test_program_of_a_deepcopy_follows_the_copy():
    _, host = host_of()
    clone = copy.deepcopy(host)
    tiny.disturb(clone)
    x = host.sparsify.program.example[1]["input_ids"]
    torch.testing.assert_close(clone.sparsify.program(input_ids=x).logits, clone(x).logits)
    torch.testing.assert_close(host.sparsify.program(input_ids=x).logits, host(x).logits)


def test_changing_the_dtype_keeps_the_function_and_the_training():
    _, host = host_of()
    tiny.disturb(host)
    x = tiny.tokens()
    expected = host(x).logits
    host.double()
    torch.testing.assert_close(host(x).logits.float(), expected, atol=1e-5, rtol=1e-5)
    tiny.train(host)
    trained = host(x).logits
    assert not torch.allclose(trained.float(), expected)
    host.to(torch.bfloat16)
    torch.testing.assert_close(host(x).logits.double(), trained, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_round_trip_is_exact(dtype, assign):
    _, host = host_of(dtype)
    tiny.disturb(host, scale=0.01)
    state = {n: t.clone() for n, t in host.state_dict().items()}
    _, fresh = host_of(dtype)
    assert not torch.equal(fresh(tiny.tokens()).logits, host(tiny.tokens()).logits)
    fresh.load_state_dict(state, assign=assign)
    for a, b in zip(tiny.trainable(host), tiny.trainable(fresh), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in host.parameters()]
    assert torch.equal(fresh(tiny.tokens()).logits, host(tiny.tokens()).logits)
    tiny.train(fresh)


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_of_another_selection_loads(assign):
    """Original names, shapes and order: a checkpoint does not know how the host is permuted."""
    trained = tiny.lower(tiny.llama(), BOTH, seed=1)
    tiny.disturb(trained)
    state = tiny.state_of(trained)
    plain = tiny.llama(seed=9)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(tiny.tokens()).logits, trained(tiny.tokens()).logits)
    fresh = tiny.lower(tiny.llama(), BOTH, seed=2)
    missing = fresh.load_state_dict(state, strict=False, assign=assign)
    assert missing.unexpected_keys == []
    tiny.assert_same(tiny.state_of(fresh), state)
    torch.testing.assert_close(fresh(tiny.tokens()).logits, trained(tiny.tokens()).logits)


def test_assigned_checkpoint_is_not_written_to_by_training():
    """With assign=True the host takes over the checkpoint's tensors, and the region under a block is scratch."""
    model = tiny.llama()
    host = tiny.lower(model, S2FT(units=1))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    kept = {n: t.clone() for n, t in state.items()}
    host.load_state_dict(state, strict=False, assign=True)
    tiny.train(host)
    tiny.assert_same(state, kept)
    host = tiny.lower(tiny.Mlp(), S2FT(fraction=1.0), example=torch.randn(3, 12))  # everything chosen: nothing moves
    state = {n: torch.randn_like(t) for n, t in tiny.state_of(host).items()}
    kept = {n: t.clone() for n, t in state.items()}
    host.load_state_dict(state, strict=False, assign=True)
    tiny.train(host, x=torch.randn(3, 12))
    tiny.assert_same(state, kept)


def test_state_dict_speaks_the_original_layout_before_and_after_training():
    for name in tiny.FAMILIES:
        model = tiny.build(name)
        host = tiny.lower(model, BOTH)
        assert host.sparsify.program.moves
        expected = {n: t.clone() for n, t in model.state_dict().items()}
        tiny.assert_same(tiny.state_of(host), expected)


def test_save_pretrained_gives_a_plain_model(tmp_path):
    model, host = host_of()
    tiny.disturb(host)
    host.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in model.named_parameters()}
    torch.testing.assert_close(plain(tiny.tokens()).logits, host(tiny.tokens()).logits)


def test_torch_save_of_the_whole_host(tmp_path):
    """The whole module, not its state dict (what `torch.save(model)` and spawned workers need)."""
    _, host = host_of()
    tiny.disturb(host)
    torch.save(host, tmp_path / "host.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.load(tmp_path / "host.pt", weights_only=False)
    assert torch.equal(loaded(tiny.tokens()).logits, host(tiny.tokens()).logits)
    tiny.train(loaded)


def test_distributed_checkpoint_round_trip(tmp_path):
    import torch.distributed.checkpoint as dcp

    _, host = host_of()
    tiny.disturb(host)
    dcp.save(host.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    _, fresh = host_of()
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(tiny.tokens()).logits, host(tiny.tokens()).logits)


# --- heads that train in full -------------------------------------------------------------------------------------------


def test_train_patterns_add_whole_parameters_with_memory_of_their_own():
    model = tiny.build("BERT (classifier)")
    inputs = tiny.inputs_of(model, "BERT (classifier)")
    base = tiny.snapshot(model)
    host = tiny.lower(model, S2FT(fraction=0.1, structure="attention", budget="structure"), train=["classifier"])
    full = {n for n, p in host.named_parameters() if p.requires_grad and not n.endswith("_slice")}
    assert full == {"classifier.weight", "classifier.bias"}
    tiny.train(host, **inputs)
    assert not torch.equal(host.classifier.weight, base["classifier.weight"])
    tiny.assert_same(tiny.snapshot(model), base)


def test_train_pattern_that_matches_nothing_names_the_nearest():
    message = r"Plan\(train=\['clasifier'\]\) matches no parameter or module; did you mean 'classifier'"
    with pytest.raises(sparsify.PlanError, match=message):
        tiny.lower(
            tiny.build("BERT (classifier)"),
            S2FT(fraction=0.1, structure="attention", budget="structure"),
            train=["clasifier"],
        )


def test_what_trains_in_full_is_kept_from_the_rules():
    host = sparsify.compile(tiny.llama(), Plan([S2FT(units=1)], train=["*.down_proj"]), progress=False)
    assert {s.param.rpartition(".")[0].rpartition(".")[2] for s in host.sparsify.program.slices} == {"o_proj"}
    assert any("trains in full (Plan(train=…))" in refusal.reason for refusal in host.sparsify.program.refusals)
    with pytest.raises(sparsify.PlanError, match="trains in full"):
        sparsify.compile(tiny.llama(), Plan([S2FT(structure="ffn", units=1)], train=["*.down_proj"]), progress=False)
