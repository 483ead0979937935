"""One regression test for each mistake of the authors' S2FT code, named after it."""

from __future__ import annotations

import copy
import time

import pytest
import tiny
import torch
from torch import Tensor, nn

from sparsify import S2FT
from sparsify.program.selection import arrange, choose
from sparsify.program.structure import Site, Structure

BOTH = S2FT(fraction=0.1, producer_fraction=0.1, budget="structure")


def layer(rows: bool = False, width: int = 12, hidden: int = 20) -> tuple[nn.Module, nn.Module]:
    """A host, and its first linear with a trained block of columns or rows."""
    host = tiny.lower(tiny.Mlp(width, hidden), S2FT(units=5, producer_fraction=0.2), example=torch.randn(3, width))
    return host, host.layers[0]["up" if rows else "down"]


def saved(call) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize("rows", [False, True])
def test_backward_axes_swapped(rows):
    """The block's gradient is (gᵀ X) on its own axis: columns of the input for Down, rows of the output for Up."""
    _, module = layer(rows)
    x = torch.randn(7, module.weight.shape[1])
    g = torch.randn(7, module.weight.shape[0])
    module(x).backward(g)
    end = module.slice_start + 5 if not rows else module.slice_start + module.weight_slice.shape[0]
    full = g.t() @ x
    expected = full[module.slice_start : end] if rows else full[:, module.slice_start : end]
    assert module.weight_slice.grad.shape == expected.shape
    torch.testing.assert_close(module.weight_slice.grad, expected)


def test_whole_input_saved():
    """A column block keeps `s` of the input's `m` channels."""
    _, module = layer(hidden=640)
    x = torch.randn(50, 640)
    weights = {module.weight.data_ptr(), module.weight_slice.data_ptr()}
    kept = [t for t in saved(lambda: module(x)) if t.data_ptr() not in weights]
    assert sum(t.untyped_storage().nbytes() for t in kept) == 50 * 5 * 4


def test_slice_saved_as_a_view():
    """A view would keep all of the input alive: what is saved has memory of its own."""
    _, module = layer()
    x = torch.randn(7, 20)
    address = x.untyped_storage().data_ptr()
    kept = saved(lambda: module(x))
    assert all(t.untyped_storage().data_ptr() != address for t in kept)


def test_second_gemm_with_a_second_copy_of_the_block():
    """One matrix product forward."""
    _, module = layer()
    x = torch.randn(7, 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        module(x)
    assert sum(e.name in ("aten::mm", "aten::addmm") for e in recorded.events()) == 1


def test_gradient_parked_in_a_side_attribute():
    """It stands in `.grad` of a Parameter: accumulated, zeroed, clipped, scaled, kept under saved-tensor hooks."""
    host, module = layer()
    x = torch.randn(7, 20)
    block = module.weight_slice
    assert isinstance(block, nn.Parameter)
    assert any(p is block for p in host.parameters())
    module(x).square().sum().backward()
    once = block.grad.clone()
    module(x).square().sum().backward()
    torch.testing.assert_close(block.grad, 2 * once)
    nn.utils.clip_grad_norm_(host.parameters(), 1e-3)
    assert float(block.grad.norm()) <= 1.01e-3
    host.zero_grad()
    assert block.grad is None
    with torch.autograd.graph.save_on_cpu():
        module(x).square().sum().backward()
    torch.testing.assert_close(block.grad, once)
    block.grad = None
    torch.utils.checkpoint.checkpoint(module, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(block.grad, once)


def test_weight_decay_applied_to_frozen_entries():
    model = tiny.llama()
    base = tiny.snapshot(model)
    host = tiny.lower(model, BOTH)
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        tiny.probe_loss(host(tiny.tokens())).backward()
        optimizer.step()
    found = tiny.state_of(host)
    trained = {s.param: s for s in host.sparsify.program.slices}
    for name, value in base.items():
        if name not in found:
            continue
        frozen = torch.ones_like(value, dtype=torch.bool)
        if name in trained:
            frozen.index_fill_(trained[name].axis, torch.tensor(trained[name].channels), False)
            assert not torch.equal(found[name], value)
        assert torch.equal(found[name][frozen], value[frozen])


@pytest.mark.parametrize("kv", [1, 2, 3, 6])
def test_index_error_on_grouped_query_attention(kv):
    """Query heads and KV heads differ: any number of heads, with and without rows of V."""
    model = tiny.llama(num_key_value_heads=kv)
    expected = model(tiny.tokens()).logits
    for heads in range(1, 7):
        host = tiny.lower(model, S2FT(structure="attention", units=heads, producer_fraction=0.5), check="numeric")
        torch.testing.assert_close(host(tiny.tokens()).logits, expected, atol=1e-6, rtol=1e-5)
        o = [s for s in host.sparsify.program.slices if s.side == "column"]
        assert [s.length for s in o] == [8 * heads] * 2


@pytest.mark.parametrize("name", ["OPT", "GPT-2", "GPT-NeoX", "BERT (classifier)", "ViT"])
def test_biases_not_permuted(name):
    model = tiny.build(name)
    inputs = tiny.inputs_of(model, name)
    expected = tiny.output_of(model(**inputs))
    host = tiny.lower(model, BOTH)
    biases = [m.param for m in host.sparsify.program.moves if m.param.endswith("bias")]
    assert biases, "the family must have biases that move"
    permuted = float((tiny.output_of(host(**inputs)) - expected).abs().max())
    assert permuted <= 1e-5 * float(expected.abs().max())
    still = copy.deepcopy(host)
    with torch.no_grad():  # the control: with the biases left in their old order the output changes
        for bias in biases:
            still.get_parameter(bias).copy_(model.get_parameter(bias))
    assert float((tiny.output_of(still(**inputs)) - expected).abs().max()) > 20 * max(permuted, 1e-7)


@pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20)], ids=str)
def test_only_three_dimensional_inputs(shape):
    _, module = layer()
    x = torch.randn(shape, requires_grad=True)
    weight = module.weight.detach().clone()
    weight[:, module.slice_start : module.slice_start + 5] = module.weight_slice.detach()
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, module.bias))
    module(x).sum().backward()
    assert module.weight_slice.grad.shape == (12, 5)


def test_global_random_draw_leaves_layers_without_heads():
    host = tiny.lower(tiny.llama(num_hidden_layers=8), S2FT(structure="attention", fraction=0.02, budget="structure"))
    assert [len(c.consumers) for c in host.sparsify.program.choices] == [1] * 8
    host = tiny.lower(tiny.llama(num_hidden_layers=8), S2FT(structure="attention", fraction=0.2))  # 1.2 heads in each
    assert [len(c.consumers) for c in host.sparsify.program.choices] == [1] * 8


def test_unfuse_outside_no_grad():
    """Switching and folding leave no graph behind and need no `no_grad` of the user."""
    _, host = None, tiny.lower(tiny.llama(), BOTH)
    tiny.disturb(host)
    with torch.enable_grad():
        for change in (
            lambda s: s.merge(),
            lambda s: s.unmerge(),
            lambda s: s.set_adapter(None),
            lambda s: s.set_adapter("default"),
        ):
            change(host.sparsify)
            assert all(p.grad_fn is None and p.is_leaf for p in host.parameters())
    tiny.train(host)


def test_permutation_and_indices_never_saved(tmp_path):
    """An adapter of one selection is switched, fused and compared on a host of another."""
    model = tiny.llama()
    first, second = (tiny.lower(model, BOTH, seed=s) for s in (1, 2))
    tiny.disturb(first)
    first.sparsify.save_adapter(tmp_path)
    second.sparsify.load_adapter(tmp_path, "first")
    second.sparsify.set_adapter("first")
    torch.testing.assert_close(second(tiny.tokens()).logits, first(tiny.tokens()).logits, atol=1e-5, rtol=1e-4)
    channels = {d.param: set(d.channels.tolist()) for d in second.sparsify.get("first").deltas}
    assert channels == {s.param: set(s.channels) for s in first.sparsify.program.slices}


def test_quadratic_order_building():
    """Sixteen times the units take far less than 256 times as long (linear: about 16)."""

    def seconds(units: int) -> float:
        structure = Structure("s", "ffn", units, (Site("w", 1, 1, role="down"),))
        chosen = choose(torch.rand(units), units // 3)
        producers = choose(torch.rand(units), units // 3)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            arrange(structure, chosen, producers)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(16_000) < 80 * max(seconds(1_000), 1e-4)
