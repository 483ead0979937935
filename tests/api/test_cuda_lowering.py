"""`Plan(target="cuda")`: packed linears in the host, their fallback on the CPU, and training operators that dispatch to kernels.

Kernels run in Triton's interpreter on CPU tensors; a counting fixture proves that they ran.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton_interpreter import count_launches

import sparsify
from sparsify import S2FT, PaCA, Plan, PlanError, Prune, Quantize, RefusedError, RoSA
from sparsify.kernels.gpu.formats import pack_stream
from sparsify.lowering.cuda.fuse import GatedGpuLinear
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear, pack_smallest
from sparsify.lowering.cuda.lower import lower_model
from sparsify.lowering.fused_modules import MovedActivation
from sparsify.modules.rows_of_gated import RowsOfGated

triton = pytest.importorskip("triton")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """Kernels launched in the interpreter, by operator."""
    return count_launches(monkeypatch, tmp_path_factory.getbasetemp() / "kernels")


def sparse_linear(rows: int = 40, cols: int = 64, sparsity: float = 0.75, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(cols, rows, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand_like(linear.weight) >= sparsity)
    return linear.eval()


def pruned(linear: nn.Linear) -> GpuSparseLinear:
    return GpuSparseLinear(pack_smallest(linear.weight.detach()), linear.bias)


@pytest.mark.parametrize("tokens", [(1,), (2, 3), (3, 9)])
def test_a_layer_computes_what_it_replaces(tokens: tuple[int, ...], launched: Counter[str]) -> None:
    linear = sparse_linear()
    lowered, x = pruned(linear), torch.randn(*tokens, 64)
    torch.testing.assert_close(lowered(x), linear(x))
    assert launched == ({"stream": 1} if x.numel() // 64 <= 16 else {"expand": 1})


def test_without_kernels_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    linear = sparse_linear()
    lowered, x = pruned(linear), torch.randn(2, 3, 64)
    torch.testing.assert_close(lowered(x), linear(x))
    residual = torch.randn(2, 3, 40)
    lowered.activation = "silu"
    torch.testing.assert_close(lowered(x, residual), F.silu(linear(x)) + residual)


def test_the_format_follows_the_pattern() -> None:
    dense = torch.randn(64, 64)
    fours = dense.view(64, 16, 4)
    two_four = (fours * (fours.abs() >= fours.abs().topk(2, -1).values[..., -1:])).view(64, 64)
    tiles = dense * torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    for weight, expected in ((two_four, "two_four"), (tiles, "blocks"), (dense * (torch.rand(64, 64) < 0.2), "gaps")):
        module = GpuSparseLinear(pack_smallest(weight))
        assert module.format == expected
        assert torch.equal(module.packed.unpack(), weight)


def test_gated_layers_multiply_gate_and_up(launched: Counter[str]) -> None:
    weight = torch.randn(24, 32) * (torch.rand(24, 32) < 0.4)
    module = GpuSparseLinear(pack_stream(weight, gated=True), activation="silu")
    for count in (3, 20):
        x = torch.randn(count, 32)
        expected = F.silu(x @ weight[:12].t()) * (x @ weight[12:].t())
        torch.testing.assert_close(module(x), expected)
    assert launched == {"stream": 1, "expand": 1}


def test_gradient_in_x() -> None:
    linear = sparse_linear()
    lowered, x = pruned(linear), torch.randn(2, 64)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    tiny.probe_loss(lowered(first)).backward()
    tiny.probe_loss(linear(second)).backward()
    torch.testing.assert_close(first.grad, second.grad)
    lowered.activation = "relu"
    with pytest.raises(RefusedError, match="no gradient"):
        lowered(first)


def test_operator_passes_opcheck() -> None:
    packed = pack_stream(sparse_linear().weight.detach())
    arguments = (torch.randn(2, 64), torch.randn(40), None, "gaps", 40, 64, False, "none", packed.tensors)
    torch.library.opcheck(torch.ops.sparsify.gpu_linear.default, arguments)
    g, x = torch.randn(5, 7, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsify.channel_grad.default, (g, x, torch.tensor([6, 2])))
    torch.library.opcheck(torch.ops.sparsify.channel_grad.default, (g, x, None))


def test_one_graph(launched: Counter[str]) -> None:
    module = nn.Sequential(pruned(sparse_linear()), nn.ReLU(), pruned(sparse_linear(8, 40)))
    x = torch.randn(3, 64)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    assert launched["stream"] == 4


def test_export_keeps_the_operator(launched: Counter[str]) -> None:
    module = nn.Sequential(pruned(sparse_linear()), nn.ReLU())
    x = torch.randn(3, 64)
    exported = torch.export.export(module, (x,), strict=False)
    targets = [str(n.target) for n in exported.graph.nodes]
    assert targets.count("sparsify.gpu_linear.default") == 1
    torch.testing.assert_close(exported.module()(x), module(x))


def test_state_dict_is_the_dense_models(launched: Counter[str]) -> None:
    linear = sparse_linear()
    lowered = pruned(linear)
    for name, tensor in linear.state_dict().items():
        assert torch.equal(lowered.state_dict()[name], tensor)
    other = sparse_linear()
    lowered.load_state_dict(other.state_dict())
    x = torch.randn(2, 64)
    torch.testing.assert_close(lowered(x), other(x))
    torch.testing.assert_close(copy.deepcopy(lowered)(x), other(x))
    wrong = {"weight": torch.zeros(3, 64), "bias": torch.zeros(40)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        lowered.load_state_dict(wrong)


def test_casts_leave_packed_values_alone() -> None:
    lowered = pruned(sparse_linear())
    values = lowered.packed.values.clone()
    half = lowered.half()
    assert half.bias is not None
    assert half.bias.dtype == torch.float16
    assert torch.equal(half.packed.values, values)


def test_a_pruned_model_is_lowered(launched: Counter[str]) -> None:
    model = tiny.llama()
    plain = sparsify.compile(model, Plan([Prune(sparsity=0.75, method="magnitude")]), progress=False)
    expected = plain(tiny.tokens()).logits.detach()
    host = sparsify.compile(model, Plan([Prune(sparsity=0.75, method="magnitude")], target="cuda"), progress=False)
    assert type(host) is type(model)
    lowered = [n for n, m in host.named_modules() if isinstance(m, GpuSparseLinear)]
    assert len(lowered) == 6 * 2  # per layer: q, k, v, o; gate, up and their product; down
    assert [type(layer.mlp.gate_up) for layer in host.model.layers] == [GatedGpuLinear] * 2
    launched.clear()
    with torch.no_grad():
        torch.testing.assert_close(host(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-5)
        assert launched == {"expand": len(lowered)}
        launched.clear()
        host(tiny.tokens()[:1, :4])
        assert launched == {"stream": len(lowered)}
    report = str(host.sparsify.report)
    assert "cuda lowering" in report
    assert "computed from bytes" in report
    assert not any(p.requires_grad for p in host.parameters())
    text = str(host.sparsify.program)
    assert text.count("sparsify.gpu_linear(") == len(lowered)
    assert "q_proj.meta" in text
    assert "gate_up.meta" in text
    assert "gate_proj, up_proj, silu and product in one kernel" in report
    for name, tensor in plain.state_dict().items():
        assert torch.equal(host.state_dict()[name], tensor), name
    bare = host.sparsify.plain()
    assert {type(m) for m in bare.modules()} == {type(m) for m in model.modules()}
    tiny.assert_same(dict(bare.state_dict()), dict(plain.state_dict()))
    host.load_state_dict({n: 2 * t for n, t in host.state_dict().items()})
    torch.testing.assert_close(host.model.layers[0].mlp.up_proj.dense(), 2 * plain.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(
        host.model.layers[0].self_attn.v_proj.dense(), 2 * plain.model.layers[0].self_attn.v_proj.weight
    )


def test_quantised_layers_are_lowered(launched: Counter[str]) -> None:
    model = tiny.llama()
    host = sparsify.compile(model, Plan([Quantize(format="int8")], target="cuda"), progress=False)
    lowered = [m for m in host.modules() if isinstance(m, GpuSparseLinear)]
    assert all(m.packed.value == "int8" for m in lowered)
    assert lowered
    with torch.no_grad():
        found, expected = host(tiny.tokens()).logits, model(tiny.tokens()).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05
    with pytest.raises(PlanError, match="CUDA kernels read int8, not nf4"):
        sparsify.compile(model, Plan([Quantize(format="nf4")], target="cuda"), progress=False)


def test_layers_that_stay_dense_say_why() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.float64), sparse_linear(4, 4))
    report = lower_model(model)
    text = str(report)
    assert not report.lowered
    assert "so dense is faster" in text
    assert "the kernels read bfloat16, float16 and float32" in text
    assert "8 to 524288 columns" in text
    with pytest.raises(RefusedError, match="dense is faster"):
        lower_model(model, names=["0"])
    with pytest.raises(RefusedError, match="no linear is called 9"):
        lower_model(model, names=["9"])


# --- launches of a step -----------------------------------------------------------------------------------------------

#: per layer of a decoding step: q, k, v, o, gate with up, down; Phi-3 and GPT-2 pack q/k/v themselves
LAUNCHES = {"Llama": 6, "Qwen2": 6, "Phi-3": 4, "GPT-2": 4, "GPT-NeoX": 4}
MAGNITUDE = Prune(sparsity=0.75, method="magnitude")


# GQA with gate and up, and Conv1D with an activation; the layouts of the others are lowered in tests/e2e/test_cpu_inference.py
@pytest.mark.parametrize(
    "family", [n if n in ("Llama", "GPT-2") else pytest.param(n, marks=pytest.mark.slow) for n in LAUNCHES]
)
def test_launches_and_nodes_of_a_step(family: str, launched: Counter[str]) -> None:
    """As many launches as the program and a compiled graph have nodes, and logits of the model that is only pruned."""
    model = tiny.build(family)
    plain = sparsify.compile(model, Plan([MAGNITUDE]), progress=False)
    host = sparsify.compile(model, Plan([MAGNITUDE], target="cuda"), progress=False)
    ids = tiny.tokens()[:1, :4]
    expected = LAUNCHES[family] * host.config.num_hidden_layers
    nodes: list[int] = []

    def count(graph: torch.fx.GraphModule, _example: object) -> object:
        nodes.append(sum("gpu_linear" in str(n.target) for n in graph.graph.nodes))
        return graph.forward

    launched.clear()
    with torch.no_grad():
        found = host(ids, use_cache=False).logits
        assert launched == {"stream": expected}, str(host.sparsify.report)
        torch.testing.assert_close(found, plain(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(host, backend=count, fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, found)
    assert nodes == [expected]
    assert str(host.sparsify.program).count("sparsify.gpu_linear(") == expected


@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX"])
def test_activations_move_into_the_kernel(family: str, launched: Counter[str]) -> None:
    model = tiny.build(family)
    plain = sparsify.compile(model, Plan([MAGNITUDE]), progress=False)
    host = sparsify.compile(model, Plan([MAGNITUDE], target="cuda"), progress=False)
    moved = [m for m in host.modules() if isinstance(m, GpuSparseLinear) and m.activation != "none"]
    layers = host.config.num_hidden_layers
    assert len(moved) == len([m for m in host.modules() if isinstance(m, MovedActivation)]) == layers
    assert str(host.sparsify.report).count("in its kernel") >= layers
    text = str(host.sparsify.program)
    assert "gelu" in text
    assert "aten.gelu" not in text
    assert "aten.tanh" not in text
    with torch.no_grad():
        ids = tiny.tokens()
        torch.testing.assert_close(host(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(host(ids[:1, :3]).logits, plain(ids[:1, :3]).logits, rtol=1e-4, atol=1e-5)
    assert {type(m) for m in host.sparsify.plain().modules()} == {type(m) for m in model.modules()}


def test_an_activation_with_hooks_stays(launched: Counter[str]) -> None:
    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = sparse_linear(48, 64), nn.GELU(), sparse_linear(64, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    for hooks in (True, False):
        model, x = FeedForward(), torch.randn(2, 64)
        if hooks:
            model.act.register_forward_hook(lambda _m, _x, y: y)
        host = sparsify.compile(model, Plan([], target="cuda"), example=(x,), progress=False)
        why = "not fused  up: gelu stays apart: act has hooks"
        assert (why in str(host.sparsify.report)) == hooks
        assert isinstance(host.act, MovedActivation) != hooks
        torch.testing.assert_close(host(x), model(x))


class PackedFeedForward(nn.Module):
    """gate and up in one weight, as Phi-3 has them; 24 and 24 rows."""

    def __init__(self, up_first: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.both, self.out = sparse_linear(48, 64), sparse_linear(64, 24)
        self.up_first, self.activation = up_first, activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        if self.up_first:
            gate, up = up, gate
        return self.out(getattr(F, self.activation)(gate) * up)


def feed_forward(**options: Any) -> Any:
    """In a module around it: the analysis leaves the model itself alone."""
    return nn.Sequential(PackedFeedForward(**options))


def lowered_feed_forward(model: nn.Module, *rules: object) -> Any:
    return sparsify.compile(
        model,
        Plan(list(rules), target="cuda"),
        example=(torch.randn(3, 64),),
        progress=False,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_gate_and_up_in_one_weight_are_one_launch(activation: str, tokens: int, launched: Counter[str]) -> None:
    model, x = feed_forward(activation=activation), torch.randn(tokens, 64)
    host = lowered_feed_forward(model)
    assert type(host[0]) is not PackedFeedForward
    assert isinstance(host[0], PackedFeedForward)
    assert isinstance(host[0].gate_up, GatedGpuLinear)
    assert isinstance(host[0].both, RowsOfGated)
    assert f"both, {activation} and product in one kernel" in str(host.sparsify.report)
    text = str(host.sparsify.program)
    assert text.count("sparsify.gpu_linear(") == 2
    for gone in ("aten.chunk", "aten.split", "aten.mul", f"aten.{activation}"):
        assert gone not in text
    launched.clear()
    with torch.no_grad():
        torch.testing.assert_close(host(x), model(x))
        kind = "stream" if tokens <= 16 else "expand"
        assert launched == {kind: 2}
        torch.testing.assert_close(host[0].both(x), model[0].both(x))  # asked for alone


def test_gate_and_up_in_one_weight_copy_load_and_come_back(launched: Counter[str]) -> None:
    model, x = feed_forward(), torch.randn(2, 64)
    host = lowered_feed_forward(model)
    assert set(host.state_dict()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(host.state_dict()[name], tensor), name
    twin = pickle.loads(pickle.dumps(copy.deepcopy(host)[0].gate_up))
    other = feed_forward()
    with torch.no_grad():
        torch.testing.assert_close(twin(x), F.silu(model[0].both(x)[:, :24]) * model[0].both(x)[:, 24:])
        host.load_state_dict(other.state_dict())
        torch.testing.assert_close(host(x), other(x))
    plain = host.sparsify.plain()
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    tiny.assert_same(dict(plain.state_dict()), dict(other.state_dict()))
    rounded = lowered_feed_forward(model, Quantize(format="int8"))
    assert rounded[0].gate_up.packed.value == "int8"
    dense = feed_forward()
    dense.load_state_dict(rounded.state_dict())
    assert not torch.equal(dense[0].both.weight, model[0].both.weight)
    with torch.no_grad():
        torch.testing.assert_close(rounded(x), dense(x))


def test_gate_and_up_keep_two_four(launched: Counter[str]) -> None:
    model, x = feed_forward(), torch.randn(2, 64)
    with torch.no_grad():
        fours = torch.randn(48, 16, 4)
        model[0].both.weight.copy_((fours * (fours.abs() >= fours.abs().topk(2, -1).values[..., -1:])).flatten(1))
        host = lowered_feed_forward(model)
        assert host[0].gate_up.format == "two_four"
        torch.testing.assert_close(host(x), model(x))


def test_up_before_gate_and_hooks_stay_apart(launched: Counter[str]) -> None:
    """The kernel activates the first half: a feed-forward that activates the second keeps its product outside."""
    model, x = feed_forward(up_first=True), torch.randn(2, 64)
    host = lowered_feed_forward(model)
    assert type(host[0]) is PackedFeedForward
    torch.testing.assert_close(host(x), model(x))
    model = feed_forward()
    model[0].both.register_forward_hook(lambda _m, _x, y: y)
    host = lowered_feed_forward(model)
    why = "not fused  0: both, silu and product stay apart: 0.both has hooks"
    assert why in str(host.sparsify.report)
    torch.testing.assert_close(host(x), model(x))


def test_phi_3_multiplies_gate_and_up_in_the_kernel(launched: Counter[str]) -> None:
    model = tiny.build("Phi-3")
    plain = sparsify.compile(model, Plan([MAGNITUDE]), progress=False)
    host = sparsify.compile(model, Plan([MAGNITUDE], target="cuda"), progress=False)
    assert [type(layer.mlp.gate_up) for layer in host.model.layers] == [GatedGpuLinear] * 2
    text = str(host.sparsify.program)
    assert "aten.silu" not in text
    assert "gate_up_proj, silu and product in one kernel" in str(host.sparsify.report)
    seen: list[str] = []
    for layer in host.model.layers:
        layer.mlp.activation_fn.register_forward_hook(lambda *_: seen.append("activation"))
    with torch.no_grad():
        torch.testing.assert_close(host(tiny.tokens()).logits, plain(tiny.tokens()).logits, rtol=1e-4, atol=1e-5)
    assert not seen
    for name, tensor in plain.state_dict().items():
        assert torch.equal(host.state_dict()[name], tensor), name
    assert {type(m) for m in host.sparsify.plain().modules()} == {type(m) for m in model.modules()}


class Attention(nn.Module):
    """q, k and v of different sizes over one input; only k has a bias."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            sparse_linear(48, width, bias=False),
            sparse_linear(24, width),
            sparse_linear(40, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def lowered_attention(attention: Attention, x: Tensor, **options: object) -> nn.Module:
    return sparsify.compile(attention, Plan([], target="cuda"), example=(x,), progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("write", [lambda x: x.mul_(2.0), lambda x: x.data.mul_(2.0), lambda x: x.view(-1)[3:].zero_()])
def test_a_write_between_linears_of_one_input_is_seen(
    write: Callable[[Tensor], Tensor], mode: Callable[[], Any], launched: Counter[str]
) -> None:
    """q, k and v read one tensor; none of them may answer from what another one saw: eager, compiled and exported."""
    attention, x = Attention(), torch.randn(2, 64)
    host = lowered_attention(attention, x)
    with mode():
        x = torch.randn(2, 64)
        torch.testing.assert_close(host.q(x), attention.q(x))
        write(x)
        torch.testing.assert_close(host.k(x), attention.k(x))
        write(x)
        torch.testing.assert_close(host.v(x), attention.v(x))
    assert launched == {"stream": 3}


class Writing(Attention):
    """Writes to its input between q and k."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1.0
        q = self.q(x)
        x.mul_(2.0)
        return torch.cat([q, self.k(x), self.v(x)], -1)


def test_a_forward_that_writes_to_its_input_is_right_when_compiled(launched: Counter[str]) -> None:
    attention, x = Writing(), torch.randn(2, 64)
    host = lowered_attention(attention, x)
    expected = attention(x)
    with torch.inference_mode():
        torch.testing.assert_close(host(x), expected)
        torch.testing.assert_close(torch.compile(host, backend="aot_eager", fullgraph=True)(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(host.sparsify.program.run_example(), expected)


def test_copies_pickles_casts_and_gradients(launched: Counter[str]) -> None:
    attention, x = Attention(), torch.randn(3, 64)
    host = lowered_attention(attention, x)
    with torch.no_grad():
        twin, read = copy.deepcopy(host), pickle.loads(pickle.dumps(host.q))
        torch.testing.assert_close(read(x), attention.q(x))
        twin.load_state_dict({n: 2 * t for n, t in twin.state_dict().items()})
        torch.testing.assert_close(twin(x), 2 * attention(x))
        torch.testing.assert_close(host(x), attention(x))
    for name, tensor in attention.state_dict().items():
        assert torch.equal(host.state_dict()[name], tensor), name
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    tiny.probe_loss(host(first)).backward()
    tiny.probe_loss(attention(second)).backward()
    torch.testing.assert_close(first.grad, second.grad)
    half = host.half()
    assert half.k.bias.dtype == torch.float16
    torch.testing.assert_close(half(x.half()).float(), attention(x), rtol=1e-2, atol=1e-2)
    assert {type(m) for m in host.sparsify.plain().modules()} == {Attention, nn.Linear}


# --- training operators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "kernels"),
    [
        (S2FT(units=2, producer_fraction=0.2, budget="structure"), {"partial_grad"}),  # rows of heads in place
        (PaCA(rank=3, permute=False), set()),
        (RoSA(rank=2, density=0.05, mask="random"), {"write_values", "sampled_tile"}),
        (RoSA(rank=2, density=0.002, mask="random"), {"write_values", "sampled_entries"}),
    ],
    ids=["s2ft", "paca", "rosa", "rosa-low"],
)
def test_training_steps_agree_with_the_reference(
    rule: sparsify.plan.Rule, kernels: set[str], monkeypatch: pytest.MonkeyPatch, launched: Counter[str]
) -> None:
    def gradients() -> list[Tensor]:
        host = sparsify.compile(tiny.llama(), Plan([rule]), progress=False)
        tiny.disturb(host)
        tiny.probe_loss(host(tiny.tokens())).backward()
        return [p.grad for p in tiny.trainable(host) if p.grad is not None]

    found = gradients()
    assert set(launched) == kernels
    monkeypatch.delenv("TRITON_INTERPRET")
    for ours, reference in zip(found, gradients(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_rows_at_an_index_use_the_gathering_kernel(launched: Counter[str]) -> None:
    x, weight = torch.randn(2, 5, 12), torch.randn(9, 12)
    block, index = torch.randn(3, 12, requires_grad=True), torch.tensor([7, 0, 4])
    y = torch.ops.sparsify.partial_linear_at(x, weight, None, block, index, 0)
    g = torch.randn_like(y)
    y.backward(g)
    assert launched == {"partial_grad": 1}
    expected = (g.reshape(-1, 9).t() @ x.reshape(-1, 12))[index]
    torch.testing.assert_close(block.grad, expected)
