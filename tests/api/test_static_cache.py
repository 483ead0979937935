"""Decoding with transformers' static cache under `torch.compile`: one graph for the prompt, one for every further token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sparsify
from sparsify import S2FT, CpuOptions, Plan, Prune, RoSA
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.lowering.torch_compile.backend import backend

STEPS = 6
ROSA = RoSA(rank=2, density=0.02, mask="random")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(name: str, rule: Any) -> nn.Module:
    model = tiny.llama(num_hidden_layers=1) if name == "Llama" else tiny.build(name)
    host = tiny.lower(model, rule).eval()
    tiny.disturb(host)
    return host


def wide(name: str) -> nn.Module:
    """A model whose layers are wide enough to be packed."""
    torch.manual_seed(0)
    if name == "Llama":
        sizes = {"num_hidden_layers": 1, "hidden_size": 192, "intermediate_size": 256, "head_dim": 32}
        return tiny.llama(**sizes, eos_token_id=None)  # the loop below writes on where generate would not say the end
    sizes = {"vocab_size": tiny.VOCABULARY, "n_embd": 192, "n_layer": 1, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **ends, loss_type="ForCausalLMLoss")).eval()


def lowered(name: str) -> nn.Module:
    plan = Plan([Prune(sparsity=0.75, method="magnitude")], target="cpu")
    host = sparsify.compile(wide(name), plan, progress=False, cpu=CpuOptions(mode="small", tokens=(1, 16)))
    assert any(isinstance(module, SparseLinear) for module in host.modules())
    return host


def settings(host: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Greedy, exactly STEPS new tokens."""
    mask = torch.ones_like(ids)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": STEPS,
        "min_new_tokens": STEPS,
        "do_sample": False,
    }


@torch.no_grad()
def eager(host: Any, ids: Tensor) -> Tensor:
    return host.generate(**settings(host, ids), pad_token_id=0)


HOSTS = [
    pytest.param("Llama", S2FT(fraction=0.1, budget="structure"), id="Llama S2FT"),
    pytest.param("GPT-2", ROSA, id="GPT-2 RoSA"),
    pytest.param("Llama", "cpu", id="Llama cpu"),
    pytest.param("GPT-2", "cpu", id="GPT-2 cpu", marks=pytest.mark.slow),
    pytest.param("Llama", ROSA, id="Llama RoSA", marks=pytest.mark.slow),
    pytest.param("GPT-2", S2FT(fraction=0.1, budget="structure"), id="GPT-2 S2FT", marks=pytest.mark.slow),
]


# the adapted Llama decodes in one graph in the test below
@pytest.mark.parametrize(
    ("name", "rule"), [pytest.param(*HOSTS[0].values, marks=pytest.mark.slow, id=HOSTS[0].id), *HOSTS[1:]]
)
@torch.no_grad()
def test_one_graph_for_the_prompt_and_one_for_every_token(name: str, rule: Any) -> None:
    host: Any = lowered(name) if rule == "cpu" else adapted(name, rule)
    ids = tiny.tokens(2, 6)
    expected = eager(host, ids)
    run = torch.compile(host, backend=backend("aot_eager"), fullgraph=True)
    cache = hf.StaticCache(config=host.config, max_cache_len=16)
    step, positions, found, graphs = ids, torch.arange(6), [ids], []
    for _ in range(STEPS):
        logits = run(input_ids=step, past_key_values=cache, use_cache=True, position_ids=positions[None]).logits
        step, positions = logits[:, -1:].argmax(-1), positions[-1:] + 1
        found.append(step)
        graphs.append(counters["stats"]["unique_graphs"])
    assert torch.equal(torch.cat(found, 1), expected)
    assert graphs == [1] + [2] * (STEPS - 1)
    assert not counters["graph_break"]


@pytest.mark.parametrize(("name", "rule"), HOSTS[:1] + HOSTS[2:])
@torch.no_grad()
def test_generate_decodes_in_one_graph(name: str, rule: Any) -> None:
    """`generate` runs the prompt eagerly and compiles the step; a longer prompt means a longer cache: one graph more, and the last."""
    host: Any = lowered(name) if rule == "cpu" else adapted(name, rule)
    compiling = hf.CompileConfig(backend=backend("aot_eager"), fullgraph=True, mode=None)  # type: ignore[arg-type]
    compiling._compile_all_devices = True  # generate leaves the CPU alone otherwise
    for length, graphs in ((6, 1), (9, 2), (11, 2), (6, 2)):
        ids = tiny.tokens(2, length)
        found = host.generate(
            **settings(host, ids), pad_token_id=0, cache_implementation="static", compile_config=compiling
        )
        assert torch.equal(found, eager(host, ids))
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@torch.no_grad()
def test_switching_adapters_back_and_forth_compiles_twice_at_most() -> None:
    """No more than once while the adapter trains, and once for the frozen base, where Dynamo guards `requires_grad`."""
    host: Any = adapted("Llama", S2FT(fraction=0.1, budget="structure"))
    compiling = hf.CompileConfig(backend=backend("aot_eager"), fullgraph=True, mode=None)  # type: ignore[arg-type]
    compiling._compile_all_devices = True
    ids = tiny.tokens(2, 6)
    for active in ("default", None, "default", None):
        host.sparsify.set_adapter(active)
        found = host.generate(
            **settings(host, ids), pad_token_id=0, cache_implementation="static", compile_config=compiling
        )
        assert torch.equal(found, eager(host, ids))
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
