"""The `torch.compile` backend: the same gradients, one graph, fewer bytes between forward and backward, and it composes."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, PlanError, RoSA
from sparsify.lowering.torch_compile.backend import JointPasses, backend, run_joint_passes
from sparsify.lowering.torch_compile.joint_passes import fuse_gradients, recompute_cheap, share_copies

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_step(host: nn.Module, how: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, gradients, and what was saved for backward (distinct storages, parameters and inputs left out)."""
    run: Callable[..., Any] = host if how is None else torch.compile(host, backend=how, fullgraph=True)
    known = {t.untyped_storage().data_ptr() for t in [*host.parameters(), *host.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = tiny.tokens()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = run(input_ids=inputs, use_cache=False).logits
        loss = (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()
    kept = list(saved.values())
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in tiny.trainable(host) if p.grad is not None], kept


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


RULES = [
    S2FT(units=2),
    RoSA(rank=2, density=0.02, mask="random"),
    pytest.param(PaCA(rank=3), marks=pytest.mark.slow),
    pytest.param(LoRA(rank=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_gradients_are_the_eager_ones_with_fewer_bytes(rule: Any) -> None:
    host = tiny.lower(tiny.llama(num_hidden_layers=1), rule)
    tiny.disturb(host)
    loss, expected, eager = compiled_step(host, None)
    for parameter in tiny.trainable(host):
        parameter.grad = None
    found_loss, found, saved = compiled_step(host, backend("aot_eager"))
    torch.testing.assert_close(found_loss, loss)
    assert len(found) == len(expected) > 0
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert bytes_of(saved) < 0.95 * bytes_of(eager)


class Gated(nn.Module):
    """A SwiGLU feed-forward in a residual block."""

    def __init__(self, width: int = 24, hidden: int = 80) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def feed_forward(*rules: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Gated())
    return sparsify.compile(model, Plan(list(rules)), example=torch.randn(2, 7, 24), progress=False)


def saved_shapes(host: nn.Module, x: Tensor, how: Any) -> list[tuple[int, ...]]:
    run: Callable[..., Any] = host if how is None else torch.compile(host, backend=how, fullgraph=True)
    known = {t.untyped_storage().data_ptr() for t in [*host.parameters(), *host.buffers(), x]}
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(x)
    y.square().sum().backward()
    return list(found.values())


def test_of_swiglu_only_gate_and_up_are_saved() -> None:
    """Eager keeps four tensors of the hidden width per block, the joint graph two; Down's input is not among them."""
    host, x = feed_forward(S2FT(structure="ffn", units=4)), torch.randn(2, 7, 24, requires_grad=True)
    wide = [s for s in saved_shapes(host, x, None) if s[-1] == 80]
    assert len(wide) >= 6
    x.grad = None
    shapes = saved_shapes(host, x, backend("aot_eager"))
    assert len([s for s in shapes if s[-1] == 80]) == 4  # gate and up of two blocks
    assert len([s for s in shapes if s[-1] == 4]) <= 2  # at most the trained slice of Down's input


def test_a_shared_input_is_saved_once() -> None:
    """Gate and up train rows: both need the normed input whole, which is one tensor or computed again from x."""
    host, x = (
        feed_forward(S2FT(structure="ffn", units=4, producer_fraction=0.1)),
        torch.randn(2, 7, 24, requires_grad=True),
    )
    eager = [s for s in saved_shapes(host, x, None) if s[-1] == 24]
    ours = [s for s in saved_shapes(host, x, backend("aot_eager")) if s[-1] == 24]
    assert len(eager) == 3
    assert len(ours) == 1  # the residual stream between the blocks; both normed inputs follow from it and from x


def test_repeated_heads_are_saved_once() -> None:
    """Six query heads over two KV groups: the backward of attention reads k and v repeated, which are not kept so."""
    host = tiny.lower(tiny.llama(num_hidden_layers=1), PaCA(rank=3))
    _, _, saved = compiled_step(host, "aot_eager")
    _, _, ours = compiled_step(host, fresh_backend())
    heads = [sum(t.numel() == 3 * 6 * 9 * 8 for t in tensors) for tensors in (saved, ours)]
    groups = [sum(t.numel() == 3 * 2 * 9 * 8 for t in tensors) for tensors in (saved, ours)]
    assert heads == [4, 2]  # q, k, v and the result; q and the result
    assert groups[1] == groups[0] + 2


class Normed(nn.Module):
    """A feed-forward behind a LayerNorm, with the tanh form of GELU written out, as GPT-2 does."""

    def __init__(self, width: int = 24, hidden: int = 80) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        return x + self.down(0.5 * h * (1 + torch.tanh(0.8 * (h + 0.045 * h.pow(3)))))


def test_norms_and_activations_in_parts_are_computed_again() -> None:
    """LoRA reads the normed input and Down's input whole: what is kept is the norm's input and Up's output, per block."""
    torch.manual_seed(0)
    model = nn.Sequential(Normed(), Normed())
    host = sparsify.compile(model, Plan([LoRA(rank=2)]), example=torch.randn(2, 7, 24), progress=False)
    tiny.disturb(host)
    x = torch.randn(2, 7, 24, requires_grad=True)
    theirs = saved_shapes(host, x, "aot_eager")
    expected = [p.grad.clone() for p in tiny.trainable(host)]
    host.zero_grad()
    ours = saved_shapes(host, x, fresh_backend())
    assert [sum(s[-1] == width for s in theirs) for width in (80, 24)] == [6, 3]
    assert [sum(s[-1] == width for s in ours) for width in (80, 24)] == [2, 1]
    for parameter, reference in zip(tiny.trainable(host), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_keeps_what_the_eager_compiler_keeps() -> None:
    """Inductor decomposes norms and activations before the passes see them: their parts are computed again all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(Normed(), Normed())
    host = sparsify.compile(model, Plan([LoRA(rank=2)]), example=torch.randn(2, 7, 24), progress=False)
    tiny.disturb(host)
    x = torch.randn(2, 7, 24, requires_grad=True)
    host(x).square().sum().backward()
    expected = [p.grad.clone() for p in tiny.trainable(host)]
    host.zero_grad()
    ours = saved_shapes(host, x, backend())
    assert [sum(s[-1] == width for s in ours) for width in (80, 24)] == [2, 1]
    for parameter, reference in zip(tiny.trainable(host), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-5)


FAMILIES = {"GPT-2": 0.9, "BERT (classifier)": 0.9, "T5 (gated)": 0.9, "Llama": 0.8}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_less_than_torch_s_own_partition(name: str) -> None:
    host = tiny.lower(tiny.build(name), LoRA(rank=2))
    tiny.disturb(host)
    inputs = tiny.inputs_of(host, name)
    known = {
        t.untyped_storage().data_ptr()
        for t in [*host.parameters(), *host.buffers(), *inputs.values()]
        if isinstance(t, Tensor)
    }
    counted, gradients = [], []
    for how in ("aot_eager", backend("aot_eager")):
        torch._dynamo.reset()
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = tiny.output_of(torch.compile(host, backend=how, fullgraph=True)(**inputs))
        counted.append(bytes_of(list(saved.values())))
        tiny.probe_loss(y).backward()
        gradients.append([p.grad.clone() for p in tiny.trainable(host)])
        host.zero_grad()
    assert counted[1] < FAMILIES[name] * counted[0]
    for ours, reference in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def fresh_backend() -> Any:
    torch._dynamo.reset()
    return backend("aot_eager")


@pytest.mark.slow
def test_over_inductor() -> None:
    host, x = feed_forward(S2FT(structure="ffn", units=4)), torch.randn(2, 7, 24, requires_grad=True)
    host(x).square().sum().backward()
    expected = [p.grad.clone() for p in tiny.trainable(host) if p.grad is not None]
    for parameter in tiny.trainable(host):
        parameter.grad = None
    for how in (backend(), backend("inductor", mode="reduce-overhead")):
        torch._dynamo.reset()
        torch.compile(host, backend=how, fullgraph=True)(x).square().sum().backward()
        for parameter, reference in zip(tiny.trainable(host), expected, strict=True):
            torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-5)
            parameter.grad = None


def test_inference_and_dynamic_shapes() -> None:
    host = feed_forward(S2FT(structure="ffn", units=4))
    run = torch.compile(host, backend=backend("aot_eager"), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (9, 12, 17):
            x = torch.randn(2, length, 24)
            torch.testing.assert_close(run(x), host(x))


def test_a_compiler_of_ones_own() -> None:
    seen: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        seen.append(gm)
        return make_boxed_func(gm.forward)

    host, x = feed_forward(S2FT(structure="ffn", units=4)), torch.randn(2, 7, 24, requires_grad=True)
    torch.compile(host, backend=backend(compiler))(x).sum().backward()
    assert len(seen) == 2  # one forward, one backward
    forward, backward = (str(gm.graph) for gm in seen)
    assert forward.count("sparsify.partial_linear.default") == 2
    assert "sparsify.partial_linear_dx" in backward


def test_repeated_blocks_share_one_graph() -> None:
    """Regional compilation: every block is compiled by itself, and all of them are one graph."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated() for _ in range(4)))
    host = sparsify.compile(
        model, Plan([S2FT(units=4, structure="ffn")]), example=torch.randn(2, 7, 24), progress=False
    )
    x = torch.randn(2, 7, 24)
    host(x).square().sum().backward()
    expected = [p.grad.clone() for p in tiny.trainable(host) if p.grad is not None]
    host.zero_grad()
    torch._dynamo.reset()  # what other tests compiled counts no more
    torch._dynamo.utils.counters.clear()
    how = backend("aot_eager")  # one object: Dynamo keeps apart what different backends compile
    for block in host.children():
        block.compile(backend=how, fullgraph=True)
    host(x.requires_grad_()).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for parameter, reference in zip(tiny.trainable(host), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference)


# attention at several lengths is compiled in `test_blocks_of_a_model_share_one_graph_at_every_length`, GPT-2's Conv1D in
# `test_one_graph_with_every_partial_linear_in_it`
@pytest.mark.parametrize(
    "name", ["feed-forward", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Llama", "GPT-2"))]
)
def test_training_at_many_lengths_takes_two_graphs(name: str) -> None:
    """The first length is compiled as it is, the second once for all: Dynamo's default, with no mark from the user."""
    rule = S2FT(fraction=0.1, producer_fraction=0.1, budget="structure")
    host: Any
    if name == "feed-forward":
        host = feed_forward(rule)
    else:
        host = tiny.lower(tiny.llama(num_hidden_layers=1) if name == "Llama" else tiny.build(name), rule)
    tiny.disturb(host)
    torch._dynamo.utils.counters.clear()
    run: Any = torch.compile(host, backend=backend("aot_eager"), fullgraph=True)
    graphs = []
    for length in (5, 8, 11, 13):
        inputs = {"input_ids": tiny.tokens(3, length), "use_cache": False}
        if name == "feed-forward":
            inputs = {"input": torch.randn(3, length, 24)}
        tiny.probe_loss(host(**inputs)).backward()
        expected = [p.grad.clone() for p in tiny.trainable(host)]
        host.zero_grad()
        tiny.probe_loss(run(**inputs)).backward()
        for parameter, reference in zip(tiny.trainable(host), expected, strict=True):
            torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-5)
        host.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]


def test_dynamic_shapes_save_no_more() -> None:
    """The passes know the example's sizes: with symbolic lengths the same tensors are kept."""
    host, x = feed_forward(S2FT(structure="ffn", units=4)), torch.randn(2, 7, 24, requires_grad=True)
    fixed = saved_shapes(host, x, backend("aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 1)
    assert sorted(saved_shapes(host, x, backend("aot_eager"))) == sorted(fixed)


@pytest.mark.parametrize("training", [False, True])
def test_blocks_of_a_model_share_one_graph_at_every_length(training: bool) -> None:
    """Four decoder layers, each compiled by itself: one graph, and a second for all other lengths.

    In training twice as many: the first layer's input comes from a frozen embedding and needs no gradient.
    """
    host: Any = tiny.lower(tiny.llama(num_hidden_layers=4), S2FT(fraction=0.1, budget="structure")).eval()
    lengths = (5, 8, 11)
    torch._dynamo.utils.counters.clear()
    graphs = []
    with torch.set_grad_enabled(training):
        expected = [host(tiny.tokens(3, length), use_cache=False).logits for length in lengths]
        how = backend("aot_eager")
        for block in host.model.layers:
            block.compile(backend=how, fullgraph=True)
        for length, reference in zip(lengths, expected, strict=True):
            torch.testing.assert_close(host(tiny.tokens(3, length), use_cache=False).logits, reference)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == ([2, 4, 4] if training else [1, 2, 2])


def test_nested_regions_keep_the_gradients() -> None:
    """`torch.compiler.nested_compile_region`: one graph of the whole model, in which the repeated block stands once."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated() for _ in range(3)))
    host: Any = sparsify.compile(model, Plan([LoRA(rank=2)]), example=torch.randn(2, 7, 24), progress=False)
    tiny.disturb(host)
    x = torch.randn(2, 7, 24)
    host(x).square().sum().backward()
    expected = [p.grad.clone() for p in tiny.trainable(host)]
    host.zero_grad()
    blocks = list(host)

    @torch.compiler.nested_compile_region
    def block(module: nn.Module, h: Tensor) -> Tensor:
        return module(h)

    def whole(h: Tensor) -> Tensor:
        for module in blocks:
            h = block(module, h)
        return h

    torch._dynamo.utils.counters.clear()
    torch.compile(whole, backend=backend("aot_eager"), fullgraph=True)(x.requires_grad_()).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for parameter, reference in zip(tiny.trainable(host), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-5, atol=1e-5)


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: fx.GraphModule, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    x = torch.randn(3)
    torch.compile(torch.sin, backend=backend(mode="max-autotune-no-cudagraphs"))(x)
    torch._dynamo.reset()
    torch.compile(torch.sin, backend=backend(), options={"max-fusion-size": 7})(x)
    assert seen[0]["max_autotune"] is True
    assert seen[1]["max_fusion_size"] == 7
    assert all(isinstance(patches["joint_custom_pre_pass"], JointPasses) for patches in seen)


def test_errors_name_the_way_out() -> None:
    with pytest.raises(PlanError, match="unknown inner backend 'nonsense'"):
        backend("nonsense")
    with pytest.raises(PlanError, match="belong to Inductor, not to 'aot_eager'"):
        backend("aot_eager", mode="max-autotune")


def test_the_entry_point_leads_to_the_backend() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["sparsify"].partition(":")
    assert callable(getattr(import_module(module), name))
    assert isinstance(sparsify.backend("aot_eager"), type(backend("aot_eager")))


LOOKUP = """
from torch._dynamo.backends.registry import list_backends, lookup_backend
from sparsify.lowering.torch_compile.backend import sparsify_backend
found = lookup_backend("sparsify")
assert found is sparsify_backend, found
assert "sparsify" in list_backends()
"""


def test_torch_finds_the_backend_by_name(tmp_path: Path) -> None:
    """With the entry points of pyproject.toml installed (here: as a distribution of their own), the name is known to torch."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    info = tmp_path / "sparsify_entry-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsify-entry\nVersion: 0\n")
    points = project["entry-points"]["torch_dynamo_backends"]
    lines = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines]))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    result = processes.run_python("-c", LOOKUP, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr


# --- the passes by themselves ---------------------------------------------------------------------------------------------


def joint(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The joint graph of forward and backward that AOTAutograd hands to a partitioner."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        from torch._functorch.partitioners import default_partition

        found.append(gm)
        return default_partition(gm, joint_inputs, **options)

    from functorch.compile import make_boxed_func

    how = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward), partition_fn=keep)
    torch.compile(function, backend=how, fullgraph=True)(*inputs)
    return found[0]


def test_equal_slices_become_one_and_different_ones_do_not() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(aten.slice.Tensor, (x, 1, 0, 4))
    b = graph.call_function(aten.slice.Tensor, (x, 1, 0, 4))
    c = graph.call_function(aten.slice.Tensor, (x, 1, 0, 5))
    graph.output((graph.call_function(aten.clone.default, (a,)), graph.call_function(aten.clone.default, (b,)), c))
    assert share_copies(graph) == 2
    assert [n.target for n in graph.nodes].count(aten.slice.Tensor) == 2
    assert share_copies(graph) == 0


def test_randomness_and_products_are_never_shared() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(2):
        graph.call_function(aten.mm.default, (x, x))
        graph.call_function(aten.bernoulli.default, (x,))
    graph.output(x)
    assert share_copies(graph) == 0


def test_what_is_cheap_is_marked_and_what_is_not_stays() -> None:
    w = torch.randn(6, 6)

    def function(x: Tensor) -> Tensor:
        return (F.silu(x @ w) * (x @ w.t())).sum(0).exp()

    gm = joint(function, torch.randn(4, 6, requires_grad=True))
    marked = recompute_cheap(gm.graph)
    policies = {n.target: "recompute" in n.meta for n in gm.graph.nodes if n.op == "call_function"}
    assert marked >= 1
    assert policies[aten.silu.default]
    assert not policies[aten.mm.default]
    assert not policies[aten.sum.dim_IntList]


def products_with(graph: fx.Graph) -> list[int]:
    """Rows of every product `gᵀ x`, and of every other `mm`."""
    factors = [
        n for n in graph.nodes if n.target is torch.ops.sparsify.skinny_products.default and n.args[2] is not None
    ]
    found = [n for n in graph.nodes if n.target is aten.mm.default]
    return [n.meta["val"].shape[0] for n in found] + [n.meta["val"][1].shape[0] for n in factors]


def backward_of(host: nn.Module, x: Tensor, how: Callable[[Any], Any]) -> fx.GraphModule:
    seen: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        seen.append(gm)
        return make_boxed_func(gm.forward)

    torch.compile(host, backend=how(compiler), fullgraph=True)(x).square().sum().backward()
    return seen[-1]


def test_gradients_that_share_an_input_are_one_product() -> None:
    """The factors A of Gate and Up have two rows each: their gradients are one product of four rows. Down's stays alone."""
    from torch._dynamo.backends.common import aot_autograd

    host = feed_forward(LoRA(rank=2))
    tiny.disturb(host)
    x = torch.randn(2, 7, 24, requires_grad=True)
    plain = backward_of(host, x, lambda compiler: aot_autograd(fw_compiler=compiler))
    expected = [p.grad.clone() for p in tiny.trainable(host)]
    host.zero_grad()
    torch._dynamo.reset()
    ours = backward_of(host, x, backend)
    assert [products_with(plain.graph).count(rows) for rows in (2, 4)] == [12, 0]
    assert [products_with(ours.graph).count(rows) for rows in (2, 4)] == [8, 2]
    for parameter, reference in zip(tiny.trainable(host), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-5, atol=1e-5)


def gradient_graph(
    second_input: bool = False, used: bool = False, permute: tuple[int, ...] = (1, 0), width: int = 5
) -> fx.Graph:
    graph, values = fx.Graph(), {}
    for name, shape in (("x", (6, width)), ("z", (6, width)), ("g", (6, 2)), ("h", (6, 3)), ("t", (3, 3))):
        values[name] = graph.placeholder(name)
        values[name].meta["val"] = torch.randn(shape)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    square = permute != (1, 0)
    first = call(aten.mm.default, call(aten.t.default, values["g"]), values["x"])
    early = call(aten.neg.default, first)
    left = call(aten.permute.default, values["h"], list(permute)) if not square else values["t"]
    if square:
        left = call(aten.permute.default, left, list(permute))
        values["z"].meta["val"] = torch.randn(3, width)
    second = call(aten.mm.default, left, values["z" if second_input or square else "x"])
    other = call(aten.mm.default, second, call(aten.t.default, second)) if used else second
    graph.output((early, second, other))
    return graph


def test_joined_products_are_equal_and_in_order() -> None:
    graph = gradient_graph()
    inputs = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
    expected = fx.GraphModule(nn.Module(), graph)(*inputs)
    assert fuse_gradients(graph) == 1
    graph.lint()  # uses of the first product stand behind the joined one
    assert [n.target for n in graph.nodes].count(aten.mm.default) == 1
    found = fx.GraphModule(nn.Module(), graph)(*inputs)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference)
    assert fuse_gradients(graph) == 0


@pytest.mark.parametrize("miss", [{"second_input": True}, {"used": True}, {"permute": (0, 1)}, {"width": 4}], ids=str)
def test_products_that_are_not_joined(miss: dict[str, Any]) -> None:
    """Another input; a result that something else reads; a left side that is no transposition; gradients wider than x."""
    assert fuse_gradients(gradient_graph(**miss)) == 0


def test_a_graph_without_backward_is_left_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.exp.default, (x,)))
    run_joint_passes(graph)
    assert not any("recompute" in n.meta for n in graph.nodes)


def test_passes_have_a_cache_key() -> None:
    class Before:
        def uuid(self) -> str:
            return "before"

    assert JointPasses().uuid() == JointPasses().uuid()
    assert JointPasses().uuid() != JointPasses(Before()).uuid()
