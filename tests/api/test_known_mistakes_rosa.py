"""One test for every mistake of the authors' RoSA code."""

from __future__ import annotations

import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import methods
import processes
import pytest
import tiny
import torch
from methods import batches, compiled, logits, model_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import sparsify
from sparsify import Plan, RoSA
from sparsify.methods.sparse_lowrank import SparseLowRank, initial_parts
from sparsify.ops.sampled_product import sampled_by_tile
from sparsify.train.rosa import collect_masks

RANDOM = RoSA(rank=3, density=0.04, mask="random")


def test_collection_does_not_disturb_inputs_that_linears_share():
    """Their hook zeroed the input in place, so of q, k, v (and gate, up) only one got the gradient of the real input."""
    host = compiled(RoSA(rank=0, density=0.05))
    model = model_of(dtype=torch.float64)
    shared = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    shared += [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")]
    score: dict[str, Tensor] = {}
    for batch in batches():
        for param, g in methods.dense_gradients(model, shared, lambda m, b=batch: m(**b).loss).items():
            score[param] = score.get(param, torch.zeros_like(g)) + g.square()
    index = {p.param: p.index for p in host.sparsify.program.lowranks}
    for param in shared:
        chosen = score[param].flatten()[index[param].long()]
        assert float(chosen.min()) >= float(score[param].flatten().topk(len(chosen)).values[-1]) * (1 - 1e-3), param


def allocations(call: Any) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    events = recorded.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def test_a_training_step_allocates_nothing_of_the_size_of_a_weight():
    """Theirs built the dense W + S in the forward and again in the backward. (The dense tile of dS is not used here.)"""
    model = nn.Sequential(nn.Linear(256, 192), nn.Tanh(), nn.Linear(192, 256))
    host = sparsify.compile(model, Plan([RoSA(rank=2, density=0.002, mask="random")]), example=torch.randn(2, 256))
    x = torch.randn(2, 256)

    def step() -> Tensor:
        loss = host(x).square().sum()
        loss.backward()
        return loss

    step()
    assert max(allocations(step)) < 256 * 192 * 4 / 2


def test_column_ids_above_32767():
    """int16 ids wrapped around."""
    model = nn.Sequential(nn.Linear(40_000, 3, bias=False))
    host = sparsify.compile(model, Plan([RoSA(rank=0, density=0.01, mask="magnitude")]), example=torch.randn(2, 40_000))
    layer, x = host[0], torch.randn(2, 40_000)
    columns = layer.sparse_index.long() % 40_000
    assert int(columns.max()) > 32_767
    g = torch.randn(2, 3)
    host(x).backward(g)
    torch.testing.assert_close(layer.sparse_values.grad, (g.t() @ x).flatten()[layer.sparse_index.long()])
    top = model[0].weight.detach().abs().flatten().topk(layer.sparse_index.numel()).indices
    assert set(layer.sparse_index.tolist()) == set(top.tolist())


@pytest.mark.parametrize("open_mask", [False, True])
def test_flat_positions_above_the_range_of_int32(open_mask):
    """A weight of 2³¹ entries and more needs wider positions, also while its mask is still open."""
    weight = torch.empty(65_536, 40_000, device="meta")
    index = None if open_mask else torch.arange(5, dtype=torch.int64)
    part = SparseLowRank("w.weight", 0, 0, 1.0, 0.0, 5, "gradient", False, index, index)
    assert initial_parts(weight, part, 0)["w.sparse_index"].dtype == torch.int64
    small = initial_parts(torch.empty(65_536, 100, device="meta"), part, 0)["w.sparse_index"]
    assert small.dtype == (torch.int32 if open_mask else torch.int64)


def test_no_dropout_mask_at_zero():
    host = compiled(RANDOM).train()
    layer, x = host.model.layers[0].self_attn.q_proj, torch.randn(3, 36, requires_grad=True)
    constants = [*layer.parameters(), *layer.buffers()]
    assert set(methods.saved_storages(lambda: layer(x), constants)) == {x.untyped_storage().data_ptr()}
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"


def test_density_per_module():
    host = compiled(RoSA(rank=1, density={"*q_proj": 0.1, "*mlp*": 0.0, "*": 0.01}, mask="random"))
    for param, part in {p.param: p for p in host.sparsify.program.lowranks}.items():
        size = model_of().get_parameter(param).numel()
        wanted = 0.1 if "q_proj" in param else 0.0 if "mlp" in param else 0.01
        assert part.count == round(wanted * size), param


RANKS = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, store, tests = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.insert(0, tests)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
import sparsify
from sparsify import PaCA, Plan, RoSA
from sparsify.train.rosa import collect_masks
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 8))
generator = torch.Generator().manual_seed(10 + rank)
batches = [(torch.randn(6, 12, generator=generator),) for _ in range(2)]
loss = lambda outputs, batch: (outputs * torch.linspace(-1, 2, outputs.numel()).view(outputs.shape)).sum()
found = []
for rule in (RoSA(rank=0, density=0.1), RoSA(rank=0, density=0.1, mask="gradient_abs"), RoSA(rank=2, density=0.1, mask="random"),
             PaCA(rank=3, select="gradient"), PaCA(rank=3, select="activation"), PaCA(rank=3)):
    host = sparsify.compile(model, Plan([rule]), example=batches[0][0], calibration=batches, loss=loss, progress=False)
    found += [p.index for p in host.sparsify.program.lowranks]
    found += [torch.tensor(s.channels) for s in host.sparsify.program.slices]
    found += [p.detach() for p in host.parameters() if p.requires_grad]
host = sparsify.compile(model, Plan([RoSA(rank=2, density=0.1)]), example=batches[0][0], progress=False)
found += list(collect_masks(host, batches, loss=loss, progress=False).values())
alone = model[0].weight.detach()
torch.save(found, store + f".{rank}")
dist.barrier()
"""


def test_masks_are_equal_on_all_ranks_and_come_from_all_batches(tmp_path):
    """Two processes with different batches; theirs chose different masks, and the replicas drifted apart."""
    store, tests = tmp_path / "store", Path(__file__).parents[1]
    (tmp_path / "ranks.py").write_text(textwrap.dedent(RANKS))
    with ThreadPoolExecutor(2) as pool:
        run = lambda rank: processes.run_python(str(tmp_path / "ranks.py"), str(rank), str(store), str(tests))  # noqa: E731
        runs = list(pool.map(run, (0, 1)))
    assert all(run.returncode == 0 for run in runs), runs
    first, second = (torch.load(f"{store}.{rank}") for rank in (0, 1))
    assert len(first) == len(second) > 12
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), i
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))
    score = torch.zeros(20, 12)
    for rank in (0, 1):
        generator = torch.Generator().manual_seed(10 + rank)
        for _ in range(2):
            y = model(torch.randn(6, 12, generator=generator))
            model.zero_grad()
            (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
            score += model[0].weight.grad.square()
    assert set(first[0].tolist()) == set(score.flatten().topk(24).indices.tolist())


def test_modules_that_train_in_full_stay_trainable():
    """Theirs froze `modules_to_save`."""
    model = tiny.build("BERT (classifier)")
    inputs = tiny.inputs_of(model, "BERT (classifier)")
    rule = RoSA(match="*attention*", rank=2, density=0.02)
    host = tiny.lower(model, rule, train=["classifier"])
    full = {"classifier.weight", "classifier.bias"}

    def loss(outputs: Any, _batch: Any) -> Tensor:
        return tiny.probe_loss(outputs).float()

    before = host.classifier.weight.detach().clone()
    assert full <= methods.trained_names(host)
    tiny.train(host, steps=1, **inputs)
    collect_masks(host, [inputs], loss=loss, progress=False)
    assert full <= methods.trained_names(host)
    moved = host.classifier.weight.detach().clone()
    assert not torch.equal(moved, before)
    tiny.train(host, steps=1, **inputs)
    assert not torch.equal(host.classifier.weight, moved)
    host.sparsify.set_adapter(None)
    host.sparsify.set_adapter("default")
    assert full <= methods.trained_names(host)


class Operators(TorchDispatchMode):
    """Names and result dtypes of the operators that a plain function calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, result.dtype if isinstance(result, Tensor) else None))
        return result


def test_dense_tile_is_one_product_in_the_dtype_of_the_layer_without_copies_or_host_syncs():
    """Theirs converted to fp32, transposed both factors and waited for the device twice."""
    g, x = torch.randn(4, 256).bfloat16(), torch.randn(4, 192).bfloat16()
    index = torch.randperm(256 * 192)[:50].sort().values.int()
    with Operators() as recorded:
        sampled_by_tile(g, x, index)
    names = [name for name, _ in recorded.seen]
    assert names.count("mm") == 1
    assert not {"_local_scalar_dense", "clone", "contiguous", "nonzero"} & set(names)
    assert torch.float32 not in {dtype for _, dtype in recorded.seen}
    sizes = allocations(lambda: torch.ops.sparsify.sampled_product(g, x, index))
    assert max(sizes) < 256 * 192, "on CPU a sparse support of this density needs no dense tile at all"
    assert torch.ops.sparsify.sampled_product(g, x, index).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_explicit_zeros_stay_in_the_support(name, tmp_path):
    """Theirs lost entries whose value was zero when they transposed."""
    host = compiled(RANDOM, name=name)
    with torch.no_grad():
        for param, parameter in host.named_parameters():
            if param.endswith("sparse_values"):
                parameter[::2] = 0.0
    expected = logits(host, name)
    tiny.probe_loss(host(tiny.tokens())).backward()
    for param, parameter in host.named_parameters():
        if param.endswith("sparse_values"):
            assert parameter.grad is not None
            assert (parameter.grad[::2] != 0).float().mean() > 0.9
    host.sparsify.save_adapter(tmp_path)
    fresh = compiled(RANDOM, name=name)
    fresh.sparsify.load_adapter(tmp_path, "z")
    assert fresh.sparsify.set_adapter("z").trainable
    torch.testing.assert_close(logits(fresh, name), expected)
    counts = {p.param: p.count for p in host.sparsify.program.lowranks}
    found = {d.param: d.channels.numel() for d in fresh.sparsify.get("z").deltas if d.kind == "sparse"}
    assert found == counts
