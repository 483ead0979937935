"""`generate()` of a lowered decoder with its native step: the tokens that PyTorch's path writes, whatever the strategy."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor

import sparsify
from sparsify import CpuOptions, Plan, Prune, Quantize
from sparsify.host.native_forward import NativeForward
from sparsify.kernels.cpu import build
from sparsify.lowering.cpu.native.step import NativeStep
from sparsify.lowering.cpu.sparse_linear import SparseLinear

try:
    build.find_compiler(None)
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

SMALL = CpuOptions(tokens=(1, 8), mode="small")
PRUNE = Prune(sparsity=0.5, method="magnitude")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tunings of tiny layers stay out of the user's cache."""
    from sparsify.kernels.cpu import tune

    before = tune.tune_path
    tune.tune_path = lambda: tmp_path_factory.getbasetemp() / "tune-native.json"
    tune.tuned = None
    yield
    tune.tune_path, tune.tuned = before, None


def compiled(name: str, *rules: Any, **options: Any) -> Any:
    cpu = CpuOptions(**{"tokens": (1, 8), "mode": "small", **options})
    return sparsify.compile(tiny.build(name), Plan([PRUNE, *rules], target="cpu"), cpu=cpu, progress=False)


@pytest.fixture(scope="module")
def llama() -> Any:
    """int8 weights, float activations: then both ways round alike, and tokens are the same."""
    return compiled("Llama", Quantize("int8"), int8_activations=False)


def step_of(host: Any) -> NativeStep:
    forward = host.__dict__["forward"]
    assert isinstance(forward, NativeForward)
    assert isinstance(forward.step, NativeStep)
    return forward.step


@contextmanager
def counted(host: Any) -> Iterator[list[int]]:
    """Lengths of the native calls inside of the block."""
    step, found = step_of(host), []
    run = step.run

    def count(*args: Any) -> Any:
        out = run(*args)
        found.append(out.logits.shape[1])
        return out

    step.run = count  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del step.run


@contextmanager
def by_pytorch(host: Any) -> Iterator[None]:
    forward = host.__dict__.pop("forward")
    try:
        yield
    finally:
        host.__dict__["forward"] = forward


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.4},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_strategy_writes_what_pytorch_writes(llama: Any, strategy: str, rows: int) -> None:
    if strategy == "prompt lookup" and rows > 1:
        rows = 1
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **STRATEGIES[strategy]}
    ids = tiny.tokens(rows, 9)
    mask = torch.ones_like(ids)
    if strategy != "prompt lookup":
        mask[0, :3] = 0

    def write() -> Tensor:
        torch.manual_seed(7)
        return llama.generate(ids, attention_mask=mask, **settings)

    with by_pytorch(llama):
        expected = write()
    with counted(llama) as native:
        assert torch.equal(write(), expected)
    assert bool(native) == (strategy != "static cache")


def test_gpt2_in_fp32() -> None:
    host = compiled("GPT-2")
    ids = tiny.tokens(2, 5)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with by_pytorch(host):
        expected = host.generate(ids, **settings)
    with counted(host) as native:
        assert torch.equal(host.generate(ids, **settings), expected)
    assert native == [1] * 8


def test_a_prompt_that_is_longer_is_pytorchs(llama: Any) -> None:
    ids = tiny.tokens(1, 17)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with by_pytorch(llama):
        expected = llama.generate(ids, **settings)
    step_of(llama).declined.clear()
    with counted(llama) as native:
        assert torch.equal(llama.generate(ids, **settings), expected)
    assert native == [1] * 2
    assert step_of(llama).declined == {"more than 16 tokens at once": 1}


def test_activations_of_8_bits_are_near() -> None:
    host = compiled("Llama", Quantize("int8"))
    ids = tiny.tokens(2, 6)
    with counted(host) as native:
        found = host(input_ids=ids, past_key_values=hf.DynamicCache(config=host.config)).logits
    assert native == [6]
    with by_pytorch(host):
        expected = host(input_ids=ids).logits
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())


def test_a_head_that_shares_the_embedding_in_int8() -> None:
    rules = [PRUNE, Quantize("int8", exclude=())]
    options = CpuOptions(tokens=(1, 8), mode="small", tied="copy", int8_activations=False)
    host: Any = sparsify.compile(
        tiny.llama(tie_word_embeddings=True), Plan(rules, target="cpu"), cpu=options, progress=False
    )
    assert isinstance(host.lm_head, SparseLinear)
    ids, settings = tiny.tokens(2, 6), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with by_pytorch(host):
        expected = host.generate(ids, **settings)
    with counted(host) as native:
        assert torch.equal(host.generate(ids, **settings), expected)
    assert native


def test_report_and_program_say_it(llama: Any) -> None:
    assert "native     one call for up to 16 tokens with a cache: 2 layers" in str(llama.sparsify.report)
    last = llama.sparsify.program.kernels()[-1]
    assert last.name.startswith("native_step_")
    assert last.nodes == ("the whole graph",)
    assert "append(team" in last.source
    off = compiled("Llama", native=False)
    assert "forward" not in off.__dict__
    assert "native" not in str(off.sparsify.report)


def test_a_model_that_it_does_not_know_says_why() -> None:
    host = compiled("MPT")
    assert "forward" not in host.__dict__
    assert "native     no: " in str(host.sparsify.report)


def test_copies_and_plain_models(llama: Any) -> None:
    ids, settings = tiny.tokens(1, 5), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = llama.generate(ids, **settings)
    twin = copy.deepcopy(llama)
    assert twin.__dict__["forward"].host is twin
    with counted(twin) as native:
        assert torch.equal(twin.generate(ids, **settings), expected)
    assert native
    assert step_of(twin).binding is not step_of(llama).binding
    again = pickle.loads(pickle.dumps(step_of(twin)))
    assert again.decoder == step_of(twin).decoder
    assert again.binding is None
    with torch.no_grad():
        twin.model.norm.weight.mul_(-1.0)
    with by_pytorch(twin):
        other = twin.generate(ids, **settings)
    assert torch.equal(twin.generate(ids, **settings), other)
    assert torch.equal(llama.generate(ids, **settings), expected)
    plain = llama.sparsify.plain()
    assert "forward" not in plain.__dict__
    assert torch.equal(plain.generate(ids, **settings), expected)


def test_threads_that_generate_at_once(llama: Any) -> None:
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    prompts = [tiny.tokens(1, 4 + n, seed=n) for n in range(3)]
    expected = [llama.generate(ids, **settings) for ids in prompts]
    found: dict[int, Tensor] = {}
    workers = [
        threading.Thread(target=lambda n=n: found.update({n: llama.generate(prompts[n], **settings)})) for n in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(3))


def test_training_and_gradients_are_pytorchs(llama: Any) -> None:
    ids = tiny.tokens(1, 4)
    embedded = llama.get_input_embeddings()(ids).detach().requires_grad_(True)
    llama(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    again = sparsify.analyse(llama, {"input_ids": ids})
    assert any("packed_linear" in str(node.target) for node in again.graph.nodes)
