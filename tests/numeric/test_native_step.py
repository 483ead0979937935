"""A decoder's native step: its logits against the model in fp64, for families, prompts, paddings, long caches; what it declines and why."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sparsify.errors import Refusal
from sparsify.host.native_forward import NativeForward
from sparsify.kernels.cpu import build
from sparsify.kernels.cpu.codegen import ISAS
from sparsify.kernels.cpu.step.operations import Product, reads
from sparsify.kernels.cpu.step.schedule import schedule
from sparsify.kernels.cpu.step.source import generate_step
from sparsify.lowering.cpu.native import binding
from sparsify.lowering.cpu.native.make import make_native
from sparsify.lowering.cpu.native.recognise import recognise
from sparsify.lowering.cpu.native.step import MOST, NativeStep
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear
from sparsify.program.capture import capture

try:
    build.find_compiler(None)
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

#: ragged sizes: heads of 20, six of them in two groups, a feed-forward and a vocabulary that fill no vector
SIZES = {
    "hidden_size": 60, "intermediate_size": 93, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 101,
    "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "hidden_size": 120}
GPT = {"n_embd": 60, "n_layer": 2, "n_head": 3, "vocab_size": 101, "n_positions": 512}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "Mistral, window": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "Qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 24}),
    "GPT-2": ("GPT2Config", GPT),
    "GPT-NeoX": ("GPTNeoXConfig", {**SIZES, "hidden_size": 96}),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Phi-3": ("Phi3Config", GROUPED),
    "Phi": ("PhiConfig", {**SIZES, "hidden_size": 96}),
    "Gemma": ("GemmaConfig", {**GROUPED, "head_dim": 24}),
    "Gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 24, "sliding_window": 6}),
    "OLMo2": ("Olmo2Config", GROUPED),
    "StableLM": ("StableLmConfig", {**GROUPED, "hidden_size": 192}),
    "OPT": ("OPTConfig", {
        "hidden_size": 60, "ffn_dim": 93, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 101, "word_embed_proj_dim": 60,
        "max_position_embeddings": 512,
    }),
    "Granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 3.0, "residual_multiplier": 0.7}),
    "Starcoder2": ("Starcoder2Config", GROUPED),
    "SmolLM3": ("SmolLM3Config", GROUPED),
}  # fmt: skip
#: every kind of norm, of rotation, of projection and of cache; the others repeat them in another order
QUICK = ("Llama", "Mistral, window", "Qwen3", "GPT-2", "GPT-NeoX")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def build_model(name: str, **changes: Any) -> Any:
    kind, sizes = FAMILIES[name]
    torch.manual_seed(3)
    config = getattr(hf, kind)(**{**sizes, **changes})
    return tiny.perturb(hf.AutoModelForCausalLM.from_config(config)).eval().requires_grad_(False)


def native(model: Any, example: Any = None) -> NativeStep:
    """The step of a dense model, which is the host itself here."""
    found = make_native(model, capture(model, example))
    assert isinstance(found, NativeStep), found
    return found


@pytest.fixture(scope="module")
def llama() -> tuple[Any, NativeStep]:
    model = build_model("Llama")
    return model, native(model)


def cache(model: Any) -> Any:
    return hf.DynamicCache(config=model.config)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(step: NativeStep, model: Any, pieces: list[int], ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of all tokens, fed `pieces` tokens at a time: those of up to MOST rows natively, others by PyTorch into the same cache."""
    held, found, start = cache(model), [], 0
    for size in pieces:
        end = start + size
        given = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions(mask)[:, start:end],
        }
        out = step(model, (), {**given, "past_key_values": held})
        assert (out is None) == (ids.shape[0] * size > MOST), step.declined
        out = model(**given, past_key_values=held) if out is None else out
        assert out.past_key_values is held
        assert held.get_seq_length() == end
        found.append(out.logits)
        start = end
    return torch.cat(found, 1)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def agree(found: Tensor, model: Any, ids: Tensor, mask: Tensor) -> None:
    """Within a few times the error that PyTorch's own fp32 forward makes against fp64."""
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    exact = copy.deepcopy(model).double()(**given).logits[mask.bool()]
    bound = 8 * float((model(**given).logits[mask.bool()].double() - exact).abs().max()) + 1e-6 * float(
        exact.abs().max()
    )
    assert float((found[mask.bool()].double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_family_are_those_of_fp64(name: str) -> None:
    model = build_model(name)
    step = native(model)
    ids, mask = tokens(3, 19), torch.ones(3, 19, dtype=torch.int64)
    mask[0, :4], mask[2, :7] = 0, 0  # padding on the left
    with torch.no_grad():
        for pieces in ([5, 1, 1, 4, 1, 1, 5, 1], [12, 1, 1, 1, 1, 1, 1, 1]):
            agree(run(step, model, pieces, ids, mask), model, ids, mask)
        agree(run(step, model, [16, 1, 1, 1], ids[:1], mask[1:2]), model, ids[:1], mask[1:2])


def test_the_portable_source_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "best_isa", lambda: "portable")
    model = build_model("Mistral, window")
    step = native(model)
    assert "isa=portable" in step.bound(model).code.source
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        agree(run(step, model, [6, 1, 1, 4, 1], ids, mask), model, ids, mask)


def test_a_cache_that_grows_and_threads_of_every_number(llama: tuple[Any, NativeStep]) -> None:
    model, step = llama
    ids, mask = tokens(1, 271), torch.ones(1, 271, dtype=torch.int64)
    pieces = [*[16] * 16, *[1] * 6, 9]
    before, found = torch.get_num_threads(), []
    try:
        with torch.no_grad():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(step, model, pieces, ids, mask))
    finally:
        torch.set_num_threads(before)
    agree(found[0], model, ids, mask)
    for other in found[1:]:  # every number is one thread's, whoever it is
        assert torch.equal(other, found[0])
    with torch.no_grad():  # PyTorch's prompt, native tokens, PyTorch again
        agree(run(step, model, [249, *[1] * 5, 17], ids, mask), model, ids, mask)


def test_caches_and_python_threads_do_not_meet(llama: tuple[Any, NativeStep]) -> None:
    model, step = llama
    mask = torch.ones(1, 40, dtype=torch.int64)
    expected = [run(step, model, [1] * 40, tokens(1, 40, seed), mask) for seed in range(3)]
    held = [cache(model) for _ in range(3)]
    logits: list[list[Tensor]] = [[], [], []]
    for place in range(40):  # interleaved, and by threads
        for seed in range(3):
            out = step(
                model, (), {"input_ids": tokens(1, 40, seed)[:, place : place + 1], "past_key_values": held[seed]}
            )
            logits[seed].append(out.logits)
    for seed in range(3):
        assert torch.equal(torch.cat(logits[seed], 1), expected[seed])
    found: dict[int, Tensor] = {}
    workers = [
        threading.Thread(target=lambda s=s: found.update({s: run(step, model, [1] * 40, tokens(1, 40, s), mask)}))
        for s in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))


def test_what_others_do_with_the_cache_is_seen(llama: tuple[Any, NativeStep]) -> None:
    model, step = llama
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)

    def go_on(held: Any, ids: Tensor) -> Tensor:
        return step(model, (), {"input_ids": ids, "past_key_values": held}).logits

    with torch.no_grad():
        held = cache(model)
        go_on(held, ids[:, :6])
        kept = copy.deepcopy(held)
        swapped = copy.deepcopy(held)
        swapped.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(go_on(held, ids[:, 6:]).flip(0), go_on(swapped, ids[:, 6:].flip(0)))
        held.crop(-3)
        agree(
            torch.cat([torch.zeros(2, 5, 101), go_on(held, ids[:, 5:])], 1)[:, 5:],
            Tail(model, ids[:, :5]),
            ids[:, 5:],
            mask[:, 5:],
        )
        one = model(input_ids=ids[:, 6:], past_key_values=kept).logits  # PyTorch goes on with what the step has left
        agree(torch.cat([torch.zeros(2, 6, 101), one], 1)[:, 6:], Tail(model, ids[:, :6]), ids[:, 6:], mask[:, 6:])


class Tail(nn.Module):
    """A model after some tokens, for `agree`."""

    def __init__(self, model: Any, before: Tensor) -> None:
        super().__init__()
        self.model, self.before = model, before

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        out = self.model(input_ids=torch.cat([self.before, input_ids], 1))
        out.logits = out.logits[:, self.before.shape[1] :]
        return out


# --- what is declined ------------------------------------------------------------------------------------------------------------


def test_calls_that_are_pytorchs(llama: tuple[Any, NativeStep]) -> None:
    model, step = llama
    ids = tokens(1, 3)
    holes = torch.tensor([[1, 0, 1]])
    reasons = {
        "no cache": {"input_ids": ids},
        "an argument is_causal": {"input_ids": ids, "is_causal": False, "past_key_values": cache(model)},
        "an argument labels": {"input_ids": ids, "labels": ids, "past_key_values": cache(model)},
        "an argument inputs_embeds": {"input_ids": ids, "inputs_embeds": torch.zeros(1, 3, 120), "past_key_values": cache(model)},
        "an argument output_attentions": {"input_ids": ids, "output_attentions": True, "past_key_values": cache(model)},
        "a mask with holes": {"input_ids": ids, "attention_mask": holes, "past_key_values": cache(model)},
        "a mask that is not": {"input_ids": ids, "attention_mask": torch.zeros(1, 1, 3, 3), "past_key_values": cache(model)},
        "positions that begin anew": {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0]]), "past_key_values": cache(model)},
        "more than 16 tokens": {"input_ids": tokens(1, 17), "past_key_values": cache(model)},
        "more tokens than the model has positions": {"input_ids": ids, "past_key_values": filled(model, 510)},
        "more tokens than the model has": {"input_ids": ids[:, :1], "position_ids": torch.tensor([[512]]), "past_key_values": cache(model)},
        "a cache of class StaticCache": {"input_ids": ids, "past_key_values": hf.StaticCache(config=model.config, max_cache_len=8)},
        "a token or a position that its table has not": {"input_ids": ids + 100, "past_key_values": cache(model)},
        "no plain (batch, tokens)": {"input_ids": ids.int(), "past_key_values": cache(model)},
    }  # fmt: skip
    for reason, kwargs in reasons.items():
        step.declined.clear()
        assert step(model, (), kwargs) is None, reason
        assert any(found.startswith(reason) for found in step.declined), (reason, step.declined)
    weight = model.model.norm.weight.requires_grad_(True)
    assert step(model, (), {"input_ids": ids, "past_key_values": cache(model)}) is None
    assert "a weight that needs its gradient" in step.declined
    weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert step(model, (), {"input_ids": ids, "past_key_values": cache(model)}) is None


def filled(model: Any, length: int) -> Any:
    held = cache(model)
    for layer in range(2):
        held.update(torch.zeros(1, 2, length, 20), torch.zeros(1, 2, length, 20), layer)
    return held


def test_changes_of_the_model_are_seen() -> None:
    model = build_model("Llama")
    step = native(model)
    ids, mask = tokens(1, 4), torch.ones(1, 4, dtype=torch.int64)

    def same() -> None:
        agree(run(step, model, [3, 1], ids, mask), model, ids, mask)

    with torch.no_grad():
        twin = copy.deepcopy(model)
        own = copy.deepcopy(step)
        model.lm_head.weight.mul_(0.5)
        same()
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.randn(93, 120), requires_grad=False)
        same()
        model.model.layers[1].input_layernorm.weight.data = torch.randn(120)
        same()
        model.model.layers[0].self_attn.q_proj = nn.Linear(120, 120, bias=True).requires_grad_(False).eval()
        same()
        agree(run(own, twin, [3, 1], ids, mask), twin, ids, mask)
        model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.randn(120), requires_grad=False)
        same()
        blocked = PrepackedLinear(model.model.layers[0].self_attn.o_proj.weight, None).eval()
        model.model.layers[0].self_attn.o_proj = blocked
        same()
        assert "kept a second time" in str(step)
        blocked.take(torch.randn(120, 120), None)
        same()
        hook = model.model.layers[0].register_forward_hook(lambda *_: None)
        assert step(model, (), {"input_ids": ids, "past_key_values": cache(model)}) is None
        assert "hooks on modules inside of the model" in step.declined
        hook.remove()
        same()
        model.model.layers[0].mlp.train()
        assert step(model, (), {"input_ids": ids, "past_key_values": cache(model)}) is None
        model.eval()
        same()
        model.model.layers[0].mlp.up_proj = nn.Linear(120, 92, bias=False).eval()
        assert step(model, (), {"input_ids": ids, "past_key_values": cache(model)}) is None
        assert "a weight that has another shape than when it was lowered" in step.declined


def other_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: 2 * inner(x)


def other_norm(model: Any) -> None:
    model.model.norm = nn.LayerNorm(120).eval().requires_grad_(False)


def other_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU().eval()


def parametrised(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.model.norm, "weight", nn.Sigmoid())
    model.eval().requires_grad_(False)


#: what a host may be given behind the step's back: no weight of it, and yet other logits
CHANGES: dict[str, Callable[[Any], Any]] = {
    "frequencies, where they are": lambda m: m.model.rotary_emb.inv_freq.data.mul_(0.3),
    "frequencies, new": lambda m: m.model.rotary_emb.register_buffer("inv_freq", m.model.rotary_emb.inv_freq * 2, persistent=False),
    "a norm's epsilon": lambda m: setattr(m.model.norm, "variance_epsilon", 3.0),
    "a scale of attention": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 2.0),
    "an activation": other_activation,
    "a norm of another class": other_norm,
    "a norm's parametrisation": parametrised,
    "a forward of a module's own": other_forward,
    "an embedding's largest norm": lambda m: setattr(m.model.embed_tokens, "max_norm", 0.01),
    "a config that asks for more": lambda m: setattr(m.config, "output_hidden_states", True),
}  # fmt: skip


def test_changes_besides_weights_are_pytorchs(llama: tuple[Any, NativeStep]) -> None:
    for what, change in CHANGES.items():
        model, step = copy.deepcopy(llama)
        given = {"input_ids": tokens(1, 4)}
        with torch.no_grad():
            assert step(model, (), {**given, "past_key_values": cache(model)}) is not None, step.declined
            change(model)
            assert step(model, (), {**given, "past_key_values": cache(model)}) is None, what
        assert sum(step.declined.values()) == 1


def test_a_bias_that_was_none_is_seen() -> None:
    model = build_model("Llama", num_hidden_layers=1)
    step = native(model)
    ids, mask = tokens(1, 4), torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        run(step, model, [4], ids, mask)
        model.lm_head.bias = nn.Parameter(torch.randn(101), requires_grad=False)
        agree(run(step, model, [3, 1], ids, mask), model, ids, mask)


def test_who_watches_operators_or_modules_sees_them(llama: tuple[Any, NativeStep]) -> None:
    model, step = llama
    given = {"input_ids": tokens(1, 3), "past_key_values": cache(model)}
    with FlopCounterMode(display=False):
        assert step(model, (), given) is None
    with forward_ad.dual_level():
        assert step(model, (), given) is None
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert step(model, (), given) is None
    finally:
        hook.remove()
    assert torch.func.vmap(lambda x: x * (step(model, (), given) is None))(torch.ones(1)).all()
    held = cache(model)
    for layer in range(2):
        held.update(torch.zeros(1, 2, 3, 20, requires_grad=True), torch.zeros(1, 2, 3, 20), layer)
    assert step(model, (), {**given, "past_key_values": held}) is None
    assert "keys or values that need their gradient" in step.declined


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_torch_change_nothing(llama: tuple[Any, NativeStep], dtype: torch.dtype) -> None:
    model, step = llama
    ids = tokens(1, 5)
    expected = step(model, (), {"input_ids": ids, "past_key_values": cache(model)}).logits
    held = cache(model)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = step(model, (), {"input_ids": ids, "past_key_values": held}).logits
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_positions_counted_from_the_mask_are_pytorchs() -> None:
    model = build_model("OPT")
    step = native(model)
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0
    assert step(model, (), {"input_ids": ids, "attention_mask": mask, "past_key_values": cache(model)}) is None
    assert any(why.startswith("padding without positions") for why in step.declined)


def test_scores_that_are_no_numbers_are_pytorchs() -> None:
    model = build_model("Llama", num_hidden_layers=1)
    step = native(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 0] = float("nan")
    ids = torch.tensor([[5, 7, 9]])
    assert step(model, (), {"input_ids": ids, "past_key_values": cache(model)}) is None
    assert "an activation that is NaN or Inf" in step.declined


def test_a_layer_that_is_copied_goes_on_by_itself(llama: tuple[Any, NativeStep]) -> None:
    model, step = llama
    ids = tokens(1, 6)
    with torch.no_grad():
        held = cache(model)
        step(model, (), {"input_ids": ids[:, :4], "past_key_values": held})
        twin = cache(model)
        twin.layers = [copy.copy(layer) for layer in held.layers]
        step(model, (), {"input_ids": ids[:, 5:], "past_key_values": held})
        assert twin.get_seq_length() == 4
        found = step(model, (), {"input_ids": ids[:, 4:5], "past_key_values": twin}).logits
    agree(torch.cat([torch.zeros(1, 4, 101), found], 1)[:, 4:], Tail(model, ids[:, :4]), ids[:, 4:5], torch.ones(1, 1))


class Doubled(hf.LlamaForCausalLM):
    """Says something else as soon as there is a cache, which a trace without one does not see."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        out: Any = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            out.logits = out.logits * 2
        return out


class Counts(hf.LlamaForCausalLM):
    """Reads the tokens' numbers a second time."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        out: Any = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits + input_ids[..., None]
        return out


def of_class(kind: type) -> Any:
    sizes: Any = {**GROUPED, "num_hidden_layers": 1}
    return kind(hf.LlamaConfig(**sizes)).eval()


#: reason → model
REFUSED = {
    "an embedding of something that is neither": lambda: tiny.build("BERT (classifier)"),
    "the native step computes in float32": lambda: build_model("Llama").bfloat16(),
    "aten.matmul.default": lambda: build_model("Llama", attn_implementation="eager"),
    "differ from PyTorch's": lambda: of_class(Doubled),
    "logits that come from": lambda: of_class(Counts),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_are_pytorchs(reason: str) -> None:
    model = REFUSED[reason]()
    found = make_native(
        model, capture(model, tiny.inputs_of(model, "BERT (classifier)") if "neither" in reason else None)
    )
    assert isinstance(found, Refusal)
    assert reason in found.reason, found.reason


def test_without_kernels_or_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("Llama", num_hidden_layers=1, intermediate_size=77)
    program = capture(model)
    monkeypatch.setenv("SPARSIFY_KERNELS", "off")
    found = make_native(model, program)
    assert isinstance(found, Refusal)
    assert "switched off" in found.reason
    monkeypatch.setenv("SPARSIFY_KERNELS", "on")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    found = make_native(model, program)
    assert isinstance(found, Refusal)
    assert "no C++ compiler found" in found.reason


def test_a_host_with_hooks_is_refused_and_not_an_error() -> None:
    model = build_model("Llama", num_hidden_layers=1, intermediate_size=61)
    program = capture(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    found = make_native(model, program)
    assert isinstance(found, Refusal)
    assert "hooks on modules inside of the model" in found.reason
    handle.remove()
    assert isinstance(make_native(model, program), NativeStep)


# --- source ------------------------------------------------------------------------------------------------------------------


def test_source_holds_numbers_only_and_is_the_same_again() -> None:
    model = build_model("Llama", num_hidden_layers=1)
    program = capture(model)
    decoder = recognise(program)
    for isa in ISAS:
        text = generate_step(decoder, isa).source
        assert text == generate_step(recognise(program), isa).source
        assert not any(word in text for word in ("q_proj", "layers", "Llama", "model."))


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX"])
def test_nobody_reads_what_another_thread_may_still_write(name: str) -> None:
    decoder = recognise(capture(build_model(name)))
    plan = schedule(decoder)
    written: dict[int, int] = {}  # shared buffer → meetings before it was complete
    meetings = 0
    owner: list[tuple[int, int, int, int]] = []  # offset, end, buffer, meeting of its last reader
    last = {b.number: i for i, op in enumerate(decoder.operations) for b in reads(op)}
    for place, (operation, meets) in enumerate(zip(decoder.operations, plan.meets, strict=True)):
        meetings += meets
        for buffer in reads(operation):
            if buffer.shared:
                assert written[buffer.number] < meetings, "read before all threads met"
        meetings += type(operation).__name__ == "Attend"
        out = operation.out
        if out.shared and not (isinstance(operation, Product) and operation.logits):
            start = plan.offsets[out.number]
            for begin, end, other, _ in owner:
                if begin < start + out.width and start < end:
                    readers = [i for i, op in enumerate(decoder.operations) if other in {b.number for b in reads(op)}]
                    assert max(readers) < place
                    between = sum(plan.meets[max(readers) + 1 : place + 1])
                    between += sum(type(op).__name__ == "Attend" for op in decoder.operations[max(readers) : place + 1])
                    assert between, "written while another thread may still read"
            owner.append((start, start + out.width, out.number, last.get(out.number, place)))
            written[out.number] = meetings
    assert any(plan.meets)


def test_forward_says_what_the_class_says(llama: tuple[Any, NativeStep]) -> None:
    model, step = llama
    forward = NativeForward(model, step)
    ids = tokens(1, 3)
    with torch.no_grad():
        expected = type(model).forward(model, input_ids=ids, past_key_values=cache(model))
        found = forward(ids, past_key_values=cache(model))
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    with torch.no_grad():
        assert torch.equal(forward(input_ids=ids).logits, type(model).forward(model, input_ids=ids).logits)
