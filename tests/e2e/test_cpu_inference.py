"""Whole models through `sparsify.compile(…, Plan(target="cpu"))`: generate, forward, compile, threads, checkpoints."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import sparsify
from sparsify import CpuOptions, Plan, PlanError, Prune, Quantize
from sparsify.kernels.cpu import build
from sparsify.kernels.cpu.codegen import Variant
from sparsify.kernels.cpu.dispatch import best_isa
from sparsify.kernels.cpu.formats import FormatError, pack, pack_int8, quantize_int8
from sparsify.lowering.cpu.sparse_linear import GatedLinear, SparseLinear
from sparsify.modules.rows_of_gated import RowsOfGated
from sparsify.program import Stage

SMALL = CpuOptions(tokens=(1, 8), mode="small")
PRUNE = Prune(sparsity=0.5, method="magnitude")
DECODERS = ("Llama", "Qwen2", "GPT-2", "MPT", "Phi-3")
ENCODER_DECODERS = ("T5", "T5 (gated)", "Whisper")
ENCODERS = ("BERT", "BERT (classifier)", "DistilBERT", "ViT")

try:
    build.find_compiler(None)
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tunings of tiny layers stay out of the user's cache."""
    from sparsify.kernels.cpu import tune

    before = tune.tune_path
    tune.tune_path = lambda: tmp_path_factory.getbasetemp() / "tune.json"
    tune.tuned = None
    yield
    tune.tune_path, tune.tuned = before, None


def lowered(name: str, *rules: Any, options: CpuOptions = SMALL) -> tuple[Any, Any, dict[str, Any]]:
    """(lowered host, the same pruned model as plain modules, example inputs)."""
    model = tiny.build(name)
    inputs = tiny.inputs_of(model, name)
    rules = rules or (PRUNE,)
    host: Any = sparsify.compile(model, Plan(list(rules), target="cpu"), cpu=options, example=inputs, progress=False)
    pruned: Any = sparsify.compile(model, Plan([PRUNE]), example=inputs, progress=False)
    pruned = pruned.sparsify.plain().eval()
    assert any(isinstance(m, SparseLinear) for m in host.modules())
    return host, pruned, inputs


def close(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    a, b = tiny.output_of(found), tiny.output_of(expected)
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate_what_the_dense_model_does(name: str) -> None:
    host, pruned, _ = lowered(name)
    assert type(host).__name__ == type(pruned).__name__
    for rows, length in ((1, 4), (3, 7)):
        ids = tiny.tokens(rows, length)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0  # left padding
        settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = pruned.generate(ids, **settings)
        assert torch.equal(host.generate(ids, **settings), expected)
        if name in ("Llama", "Qwen2"):
            static = host.generate(ids, cache_implementation="static", disable_compile=True, **settings)
            assert torch.equal(static, expected)
    beams = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    ids = tiny.tokens(2, 5)
    assert torch.equal(host.generate(ids, **beams), pruned.generate(ids, **beams))


@pytest.mark.parametrize(
    "name", [pytest.param("T5", marks=pytest.mark.slow), *ENCODER_DECODERS[1:]]
)  # gated does all that T5 does
def test_encoder_decoders_generate_what_the_dense_model_does(name: str) -> None:
    host, pruned, inputs = lowered(name)
    first = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "input_features")}
    settings = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    expected = pruned.generate(**first, **settings)
    assert torch.equal(host.generate(**first, **settings), expected)


#: every kind of linear and of stack; the others repeat one of them
QUICK = ("Llama", "GPT-2", "Phi-3", "T5 (gated)", "BERT (classifier)", "ViT")
FAMILIES = [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in (*DECODERS, *ENCODER_DECODERS, *ENCODERS)
]


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_program_and_recapture_agree(name: str) -> None:
    host, pruned, inputs = lowered(name)
    program = host.sparsify.program
    with torch.inference_mode():
        expected = pruned(**inputs)
        close(host(**inputs), expected)
        with torch.no_grad():
            close(host(**inputs), expected)
    close(program.run_example(), expected)
    assert program.stage is Stage.LOWERED
    text = str(program)
    operators = [line for line in text.splitlines() if "sparsify.packed_linear(" in line]
    assert all("predicted" in line and "us" in line for line in operators)
    again = sparsify.analyse(host, inputs)
    packed = torch.ops.sparsify.packed_linear.default
    calls = [[n for n in p.graph.nodes if n.target is packed] for p in (program, again)]
    reads = [
        [[p.tensor_names[a.name] for a in n.all_input_nodes if a.name in p.tensor_names] for n in found]
        for p, found in zip((program, again), calls, strict=True)
    ]
    assert reads[0] == reads[1]
    assert len(calls[0]) == len(operators) > 0


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT (classifier)", "T5 (gated)"])
def test_batch_and_length_may_change(name: str) -> None:
    host, pruned, _ = lowered(name)
    with torch.inference_mode():
        for rows, length in ((1, 1), (2, 9), (5, 13), (3, 18)):
            ids = tiny.tokens(rows, length)
            extra = {"decoder_input_ids": ids} if name.startswith("T5") else {}
            close(host(input_ids=ids, **extra), pruned(input_ids=ids, **extra))


def test_int8_follows_its_own_integers() -> None:
    """With fp32 activations the error is rounding alone, against a model that holds what the integers stand for."""
    options = CpuOptions(tokens=(1,), mode="small", int8_activations=False)
    host, pruned, inputs = lowered("Llama", PRUNE, Quantize(format="int8"), options=options)
    pruned.load_state_dict(host.state_dict())
    report = str(host.sparsify.report)
    assert "bitmask s8" in report
    with torch.inference_mode():
        close(host(**inputs), pruned(**inputs))
    quick, _, _ = lowered("Llama", PRUNE, Quantize(format="int8"))
    with torch.inference_mode():
        exact, found = tiny.output_of(host(**inputs)), tiny.output_of(quick(**inputs))
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.03
    assert error > 0 or not Variant(isa=best_isa(), value="s8").vnni  # int8 activations, where VNNI serves them


@pytest.mark.parametrize("name", ["Phi-3", "GPT-2", "T5 (gated)", "BERT (classifier)"])
def test_a_whole_model_slower_than_dense_comes_back_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is said to be fast alone and the model slow: packed, fused and moved parts all become what they were."""
    from sparsify.kernels.cpu import dispatch
    from sparsify.kernels.cpu.tune import Timing
    from sparsify.lowering.cpu import fuse as fuse_cpu
    from sparsify.lowering.cpu import lower as cpu
    from sparsify.lowering.cpu import whole_model

    def measured(key: str, calls: dict[str, Any], budget: float = 0.25, cold: bool = False) -> Timing:
        return Timing({n: 4.0 if n in ("torch", "onednn", "apart") else 1.0 for n in calls}, True)

    def time_in_turn(calls: dict[str, Any], budget: float) -> Timing:
        outputs = [tiny.output_of(call()) for call in calls.values()]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4 * float(outputs[1].abs().max()))
        return Timing({"lowered": 2.0, "dense": 1.0}, True)

    for module in (dispatch, cpu, fuse_cpu):
        monkeypatch.setattr(module, "measured", measured)
    monkeypatch.setattr(whole_model, "time_in_turn", time_in_turn)
    model = tiny.build(name)
    inputs = tiny.inputs_of(model, name)
    host: Any = sparsify.compile(model, Plan([PRUNE], target="cpu"), example=inputs, progress=False)
    pruned: Any = sparsify.compile(model, Plan([PRUNE]), example=inputs, progress=False).sparsify.plain().eval()  # type: ignore[union-attr]
    assert [type(m).__name__ for m in host.modules()] == [type(m).__name__ for m in pruned.modules()]
    assert "0 linears packed" in str(host.sparsify.report)
    assert "the whole dense model is 2.00 × as fast" in str(host.sparsify.report)
    tiny.assert_same(host.state_dict(), pruned.state_dict())
    with torch.inference_mode():
        close(host(**inputs), pruned(**inputs))
        close(host.sparsify.program.run_example(), pruned(**inputs))


@pytest.mark.parametrize(
    "name", ["Llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("BERT (classifier)", "GPT-2"))]
)
def test_torch_compile_sees_one_graph(name: str) -> None:
    host, pruned, inputs = lowered(name)
    torch._dynamo.reset()
    compiled = torch.compile(host, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        close(compiled(**inputs), pruned(**inputs))
        ids = tiny.tokens(4, 11)
        close(compiled(input_ids=ids), pruned(input_ids=ids))


@pytest.mark.slow
def test_inductor_agrees() -> None:
    host, pruned, inputs = lowered("Llama")
    torch._dynamo.reset()
    with torch.inference_mode():
        close(torch.compile(host, fullgraph=True)(**inputs), pruned(**inputs))


def test_threads_may_share_a_model() -> None:
    """Each thread has inputs of its own; a shared pass over the input must never hand one thread's part to another."""
    host, pruned, _ = lowered("Llama")
    inputs = [tiny.tokens(rows, 6, seed=rows) for rows in (1, 2, 3, 4)]
    with torch.inference_mode():
        expected = [tiny.output_of(pruned(input_ids=ids)) for ids in inputs]
    wrong: list[str] = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(8):
                y = tiny.output_of(host(input_ids=inputs[index]))
                if not torch.allclose(y, expected[index], rtol=1e-3, atol=1e-5):
                    wrong.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["Llama", "BERT (classifier)", "GPT-2"])
def test_checkpoints_and_copies(name: str, tmp_path: Path) -> None:
    host, pruned, inputs = lowered(name)
    tiny.assert_same(host.state_dict(), pruned.state_dict())
    host.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = pruned(**inputs)
        close(type(pruned).from_pretrained(tmp_path).eval()(**inputs), expected)
        duplicate = copy.deepcopy(host)
        bare = copy.deepcopy(host)
        del bare.__dict__["sparsify"]  # the handle holds the graph, which no pickle takes
        for other in (duplicate, pickle.loads(pickle.dumps(bare))):
            close(other(**inputs), expected)
        with torch.no_grad():
            changed = copy.deepcopy(pruned)
            for parameter in changed.parameters():
                parameter.mul_(1.25)
        host.load_state_dict(changed.state_dict())
        close(host(**inputs), changed(**inputs))
        close(duplicate(**inputs), expected)


@pytest.mark.parametrize("name", ["Llama", "BERT (classifier)", "GPT-2"])
def test_plain_gives_the_dense_model_back(name: str) -> None:
    host, pruned, inputs = lowered(name)
    plain: Any = host.sparsify.plain()
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in pruned.named_modules()]
    tiny.assert_same(plain.state_dict(), pruned.state_dict())
    with torch.inference_mode():
        close(plain(**inputs), pruned(**inputs), rtol=1e-6)
        close(host(**inputs), pruned(**inputs))
    again = sparsify.compile(host, Plan([], target="cpu"), cpu=SMALL, example=inputs, progress=False)
    with torch.inference_mode():
        close(again(**inputs), pruned(**inputs))


def test_gated_feed_forwards_become_one_kernel() -> None:
    host, pruned, _ = lowered("Llama")
    feed_forward: Any = host.model.layers[0].mlp
    plain: Any = pruned.model.layers[0].mlp
    assert isinstance(feed_forward, type(plain))
    assert isinstance(feed_forward.gate_up, GatedLinear)
    assert feed_forward.gate_up.activation == "silu"
    assert isinstance(feed_forward.gate_proj, RowsOfGated)
    assert isinstance(feed_forward.up_proj, RowsOfGated)
    x = torch.randn(2, 3, 36)
    with torch.inference_mode():
        close(feed_forward(x), plain(x))
        close(feed_forward.up_proj(x), plain.up_proj(x))
        close(feed_forward.gate_proj(x), plain.gate_proj(x))
    assert torch.equal(feed_forward.up_proj.dense(), plain.up_proj.weight)


def test_gate_and_up_in_one_weight_become_one_kernel() -> None:
    host, pruned, inputs = lowered("Phi-3")
    feed_forward = host.model.layers[0].mlp
    assert type(feed_forward).__name__ == "Phi3MLP"
    assert isinstance(feed_forward.gate_up, GatedLinear)
    assert isinstance(feed_forward.gate_up_proj, RowsOfGated)
    weight = pruned.model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(host.state_dict()["model.layers.0.mlp.gate_up_proj.weight"], weight)
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(feed_forward.gate_up_proj(x), x @ weight.t(), rtol=1e-4, atol=1e-5)
    calls: list[Any] = []
    for module in (feed_forward.gate_up, feed_forward.gate_up_proj):
        module.register_forward_hook(lambda m, _, __: calls.append(type(m)))
    with torch.inference_mode():
        close(feed_forward(x), pruned.model.layers[0].mlp(x))
        assert calls == [GatedLinear]
        doubled = {name: tensor * 2 if "gate_up" in name else tensor for name, tensor in pruned.state_dict().items()}
        host.load_state_dict(doubled)
        pruned.load_state_dict(doubled)
        close(host(**inputs), pruned(**inputs))
    assert "gate_up_proj, silu and product in one kernel" in str(host.sparsify.report)


def doubled_in_place(x: torch.Tensor) -> None:
    x.mul_(2.0)


def written_through_data(x: torch.Tensor) -> None:
    x.data.mul_(2.0)


def written_through_numpy(x: torch.Tensor) -> None:
    x.numpy()[:] *= 2.0


def written_through_a_view(x: torch.Tensor) -> None:
    x.view(-1)[3:].mul_(2.0)


def written_through_the_storage(x: torch.Tensor) -> None:
    torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).zero_()  # type: ignore[arg-type]


WRITES = [
    doubled_in_place,
    written_through_data,
    written_through_numpy,
    written_through_a_view,
    written_through_the_storage,
]


@pytest.fixture(scope="module")
def shared_attention() -> tuple[Any, Any]:
    host, pruned, _ = lowered("Llama")
    return host.model.layers[0].self_attn, pruned.model.layers[0].self_attn


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_linears_of_one_input_is_seen(write: Any, mode: Any, shared_attention: tuple[Any, Any]) -> None:
    """q, k and v read one tensor; none of them may answer from what another one saw."""
    attention, plain = shared_attention
    with mode():
        x = torch.randn(2, 36)
        close(attention.q_proj(x), plain.q_proj(x))
        write(x)
        close(attention.k_proj(x), plain.k_proj(x))
        write(x)
        close(attention.v_proj(x), plain.v_proj(x))


def test_no_forward_keeps_anything(shared_attention: tuple[Any, Any]) -> None:
    """Another tensor of the same address, another mode, another thread, a copy: results depend on arguments alone."""
    attention, plain = shared_attention
    before = {name: set(vars(module)) for name, module in attention.named_modules()}
    for number in range(20):  # freed and allocated again: the same address, often the same id
        with torch.inference_mode(number % 2 == 0):
            x = torch.full((2, 36), float(number))
            attention.q_proj(x)
            del x
            x = torch.full((2, 36), float(-number))
            close(attention.k_proj(x), plain.k_proj(x))
    x = torch.randn(2, 36)
    with torch.inference_mode():
        attention.q_proj(x)
    k = attention.k_proj(x.requires_grad_())
    assert not k.is_inference()
    k.square().sum().backward()
    assert x.grad is not None
    x = x.detach()
    attention.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.k_proj(x).dtype == torch.float32  # packed products run in the input's type
    twin = copy.deepcopy(attention)
    x.mul_(3.0)
    with torch.no_grad():
        close(twin.k_proj(x), plain.k_proj(x))
    weak = weakref.ref(x)
    attention.q_proj(x)
    del x
    assert weak() is None, "an input is not kept alive"
    assert {name: set(vars(module)) for name, module in attention.named_modules()} == before


def test_threads_share_linears_but_no_parts(shared_attention: tuple[Any, Any]) -> None:
    attention, plain = shared_attention
    x = torch.randn(2, 36)
    wrong: list[str] = []
    gate = threading.Barrier(3)

    def work(number: int) -> None:
        with torch.inference_mode():
            mine = x.clone() * number
            expected = [p(mine) for p in (plain.q_proj, plain.k_proj, plain.v_proj)]
            gate.wait()
            for _ in range(50):
                for linear, y in zip((attention.q_proj, attention.k_proj, attention.v_proj), expected, strict=True):
                    if not torch.allclose(linear(mine), y, rtol=1e-4, atol=1e-5):
                        wrong.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_buffer_that_is_replaced_or_written_to_is_seen() -> None:
    """The kernels read by addresses; a layer whose tensors are no longer those is looked at anew, and damaged ones are refused."""
    torch.manual_seed(0)
    weight = torch.randn(8, 70) * (torch.rand(8, 70) < 0.4)
    layer, x = SparseLinear(pack(weight), torch.randn(8)), torch.randn(3, 70)
    with torch.inference_mode():
        layer.bias = torch.ones(8)
    torch.testing.assert_close(layer(x), x @ weight.t() + 1.0, rtol=1e-4, atol=1e-5)
    layer.values.mul_(2.0)
    torch.testing.assert_close(layer(x), 2 * x @ weight.t() + 1.0, rtol=1e-4, atol=1e-5)
    layer.bias = None
    torch.testing.assert_close(layer(x), 2 * x @ weight.t(), rtol=1e-4, atol=1e-5)
    layer.bias = torch.ones(3)
    with pytest.raises(FormatError, match=r"bias has shape \(3,\), the weight 8 rows"):
        layer(x)
    layer.bias = None
    layer.masks[0, 0, 0] = -1
    with pytest.raises(FormatError, match="panel_ptr does not match"):
        layer(x)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.update(bias=torch.zeros(3)), r"size mismatch for bias: got \(3,\), expected \(8,\)"),
        (lambda s: s.update(bias=torch.zeros(8, 1)), "size mismatch for bias"),
        (lambda s: s.update(weight=torch.zeros(70, 8)), r"size mismatch for weight: got \(70, 8\)"),
        (lambda s: s.update(weight=torch.zeros(8)), "size mismatch for weight"),
        (lambda s: s.update(weight=torch.zeros(8, 70, dtype=torch.int64)), "weight is torch.int64"),
        (lambda s: s.update(weight=torch.zeros(8, 70, device="meta")), "weight is torch.float32 on meta"),
        (lambda s: s.update(weight=torch.full((8, 70), float("nan"))), "weight cannot be packed: a weight is NaN"),
        (lambda s: s.update(weight=[1.0]), "weight is a list"),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(int8: bool, change: Any, expected: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 70) * (torch.rand(8, 70) < 0.4)
    packed = pack_int8(*quantize_int8(weight)) if int8 else pack(weight)
    layer, x = SparseLinear(packed, torch.randn(8), int8=False), torch.randn(3, 70)
    before, state = layer(x), layer.state_dict()
    change(state)
    with pytest.raises((RuntimeError, TypeError), match=expected):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)


def test_activations_move_into_kernels_and_gradients_pass() -> None:
    host, pruned, _ = lowered("BERT (classifier)")
    layer: Any = host.bert.encoder.layer[0]
    assert layer.intermediate.dense.activation == "gelu"
    assert isinstance(layer.intermediate.intermediate_act_fn, nn.Identity)
    grads = []
    for model in (host, pruned):
        x = torch.ones(1, 5, 36, requires_grad=True)
        tiny.output_of(model(inputs_embeds=x)).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_a_module_that_does_more_is_left_alone() -> None:
    class Odd(nn.Module):
        """A gated feed-forward that returns more than its output, another whose product is used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(36, 48), nn.Linear(36, 48), nn.Linear(48, 36)
            self.twice = False

        def forward(self, x: torch.Tensor) -> Any:
            h = nn.functional.silu(self.gate(x)) * self.up(x)
            y = self.down(h)
            return (y + h.sum()) if self.twice else (y, None)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Odd(), Odd()
            self.second.twice = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[0])

    model = Model().eval()
    x = torch.randn(2, 7, 36)
    host: Any = sparsify.compile(model, Plan([PRUNE], target="cpu"), cpu=SMALL, example=x, progress=False)
    report = str(host.sparsify.report)
    assert "first returns a tuple" in report
    assert not any(isinstance(m, GatedLinear) for m in host.modules())
    trained: Any = sparsify.compile(model, Plan([PRUNE]), example=x, progress=False)
    pruned = trained.sparsify.plain()
    with torch.inference_mode():
        close(host(x), pruned(x))


def test_activation_that_two_layers_share_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()
            self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(36, 36), "act": self.act}) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer["act"](layer["up"](x))
            return x

    model, x = Model().eval(), torch.randn(4, 36)
    host: Any = sparsify.compile(model, Plan([PRUNE], target="cpu"), cpu=SMALL, example=x, progress=False)
    assert isinstance(host.act, nn.GELU)
    assert "used under several names" in str(host.sparsify.report)
    trained: Any = sparsify.compile(model, Plan([PRUNE]), example=x, progress=False)
    pruned = trained.sparsify.plain()
    with torch.inference_mode():
        close(host(x), pruned(x))


def test_half_precision_models_keep_their_dtype() -> None:
    model = tiny.build("Llama", dtype=torch.bfloat16)
    host: Any = sparsify.compile(model, Plan([PRUNE], target="cpu"), cpu=SMALL, progress=False)
    assert any(isinstance(m, SparseLinear) and m.packed.value == "bf16" for m in host.modules())
    ids = tiny.tokens(2, 6)
    with torch.inference_mode():
        found = host(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    trained: Any = sparsify.compile(model, Plan([PRUNE]), progress=False)
    pruned = trained.sparsify.plain()
    with torch.inference_mode():
        exact = pruned.float()(input_ids=ids).logits
    assert float((found.float() - exact).norm() / exact.norm()) < 0.03


def test_without_a_compiler_nothing_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "loaded", {})
    model = tiny.build("Llama")
    host: Any = sparsify.compile(model, Plan([PRUNE], target="cpu"), cpu=CpuOptions(tokens=(1,)), progress=False)
    assert "no C++ compiler found (tried no-such-compiler)" in str(host.sparsify.report)
    assert not any(isinstance(m, SparseLinear) for m in host.modules())
    trained: Any = sparsify.compile(model, Plan([PRUNE]), progress=False)
    pruned = trained.sparsify.plain()
    ids = tiny.tokens(2, 5)
    with torch.inference_mode():
        close(host(input_ids=ids), pruned(input_ids=ids))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(host.generate(ids, **settings), pruned.generate(ids, **settings))


def test_damaged_packed_data_is_refused_before_a_kernel_sees_it() -> None:
    host, _, _ = lowered("Llama")
    layer: Any = host.model.layers[0].mlp.down_proj
    packed = layer.packed
    for field, change in (
        ("values", lambda t: t[:-1]),
        ("masks", lambda t: t.neg()),
        ("panel_ptr", lambda t: t + 1),
        ("masks", lambda t: t[:1]),
        ("values", lambda t: torch.full_like(t, float("inf"))),
    ):
        damaged = replace(packed, **{field: change(getattr(packed, field)).contiguous()})
        with pytest.raises(FormatError):
            SparseLinear(damaged)


def test_options_are_checked() -> None:
    with pytest.raises(PlanError, match=r"CpuOptions\(tokens=\(\)\)"):
        CpuOptions(tokens=())
    with pytest.raises(PlanError, match="mode='tiny'"):
        CpuOptions(mode="tiny")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="tied='drop'"):
        CpuOptions(tied="drop")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"belongs to Plan\(target='cpu'\)"):
        sparsify.compile(tiny.llama(), Plan([PRUNE]), cpu=SMALL, progress=False)


def test_an_unpruned_model_is_not_packed() -> None:
    model = tiny.llama()
    host: Any = sparsify.compile(model, Plan([], target="cpu"), cpu=CpuOptions(tokens=(1,)), progress=False)
    assert not any(isinstance(m, SparseLinear) for m in host.modules())
    ids = tiny.tokens(2, 6)
    with torch.inference_mode():
        close(host(input_ids=ids), model(input_ids=ids))
