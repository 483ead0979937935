"""`masked_linear` against its fp64 oracle, and pruned entries that stay exactly zero through everything."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsify.errors import SparsifyError
from sparsify.modules.masked import (
    MaskedLinear,
    MaskedModule,
    check_masks,
    load_mask_state,
    mask_modules,
    mask_state,
    masked_class,
    masked_parameters,
    rezero,
)
from sparsify.ops.bits import pack_bits, unpack_bits
from sparsify.ops.masked_linear import oracle_masked_linear, oracle_masked_linear_backward

SHAPES = [(5,), (2, 3), (0,), (2, 1, 4), ()]


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = torch.rand(7, 13) > 0.6
    weight = (torch.randn(7, 13, dtype=dtype) * mask).requires_grad_()
    return (
        torch.randn(*shape, 13, dtype=dtype, requires_grad=True),
        weight,
        mask,
        torch.randn(7, dtype=dtype, requires_grad=True),
    )


def small(masked: bool = True) -> tuple[nn.Sequential, dict[str, Tensor]]:
    net = nn.Sequential(nn.Linear(13, 11), nn.GELU(), nn.Linear(11, 6, bias=False), nn.LayerNorm(6))
    masks = {"0.weight": torch.rand(11, 13) > 0.7, "2.weight": torch.rand(6, 11) > 0.5}
    if masked:
        mask_modules(net, masks)
    return net, masks


def loss_of(net: nn.Module, rows: int = 8) -> Tensor:
    y = net(torch.randn(rows, 13))
    return (y * torch.linspace(-1, 1.5, y.numel()).view(y.shape)).square().mean()


@pytest.mark.parametrize("shape", [(1,), (8,), (7, 13), (3, 5, 11), (0, 4)])
def test_bits_round_trip(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack_bits(bits, shape), mask)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_operator_is_its_oracle(shape: tuple[int, ...], transposed: bool) -> None:
    x, weight, mask, bias = operands(shape)
    stored = weight.detach().t().contiguous().requires_grad_() if transposed else weight
    bits = pack_bits(mask.t() if transposed else mask)
    y = torch.ops.sparsify.masked_linear(x, stored, bits, bias, transposed)
    assert torch.allclose(y, oracle_masked_linear(x, weight, mask, bias))
    g = torch.randn_like(y)
    y.backward(g)
    dx, dw, db = oracle_masked_linear_backward(g, x, weight, mask)
    found = stored.grad.t() if transposed else stored.grad  # type: ignore[union-attr]
    for ours, theirs in ((x.grad, dx), (found, dw), (bias.grad, db)):
        assert torch.allclose(ours, theirs)  # type: ignore[arg-type]
    assert bool((found[~mask] == 0).all())


def test_opcheck_and_second_derivatives() -> None:
    x, weight, mask, bias = operands((2, 3))
    ops, bits = torch.ops.sparsify, pack_bits(mask)
    torch.library.opcheck(ops.masked_linear.default, (x, weight, bits, bias))
    torch.library.opcheck(ops.masked_linear.default, (x, weight, bits, None))
    torch.library.opcheck(ops.apply_mask.default, (weight, bits))
    g, flat = (
        torch.randn(4, 7, dtype=torch.float64, requires_grad=True),
        x.detach().reshape(-1, 13)[:4].requires_grad_(),
    )
    torch.library.opcheck(ops.masked_grad.default, (g, flat, bits))
    assert torch.autograd.gradcheck(lambda a, b: ops.masked_grad(a, b, bits), (g, flat))
    # gradcheck moves pruned entries of a plain weight, which breaks the precondition: go through apply_mask
    through = lambda x, w, b: ops.masked_linear(x, ops.apply_mask(w, bits), bits, b)  # noqa: E731
    assert torch.autograd.gradcheck(through, (x, weight, bias))
    assert torch.autograd.gradgradcheck(through, (x, weight, bias))


def test_the_gradient_is_masked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.ops.masked_grad.PIECE", 16)
    mask = torch.rand(7, 13) > 0.5
    g, x = torch.randn(5, 7), torch.randn(5, 13)
    found = torch.ops.sparsify.masked_grad(g, x, pack_bits(mask))
    assert torch.equal(found, (g.T @ x).masked_fill(~mask, 0))


def test_shapes_that_do_not_fit_are_refused_by_the_fake() -> None:
    x, weight, _mask, bias = (t.to("meta") for t in operands((3,)))
    with pytest.raises(RuntimeError, match="channels"):
        torch.ops.sparsify.masked_linear(x[:, :5], weight, torch.empty(12, dtype=torch.uint8, device="meta"), bias)
    with pytest.raises(RuntimeError, match="do not describe"):
        torch.ops.sparsify.masked_linear(x, weight, torch.empty(11, dtype=torch.uint8, device="meta"), bias)


def test_the_host_keeps_classes_names_and_the_users_tensors() -> None:
    net, masks = small(masked=False)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    shared = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    mask_modules(shared, masks)
    assert isinstance(shared[0], nn.Linear)
    assert isinstance(shared[0], MaskedLinear)
    assert list(shared.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert torch.equal(shared[0].weight, before["0.weight"] * masks["0.weight"])
    check_masks(shared)
    plain = nn.Sequential(nn.Linear(13, 11), nn.GELU(), nn.Linear(11, 6, bias=False), nn.LayerNorm(6))
    plain.load_state_dict(shared.state_dict())  # an ordinary dense checkpoint with zeros
    x = torch.randn(4, 13)
    assert torch.equal(plain(x), shared(x))


OPTIMIZERS: dict[str, Any] = {
    "sgd momentum, weight decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.3, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.3, foreach=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "noise": lambda p: Noisy(p, {"lr": 0.1}),
}


class Noisy(torch.optim.Optimizer):
    """Langevin-like: writes noise everywhere, whatever the gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=group["lr"])


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_zeros_survive_every_optimizer(name: str) -> None:
    net, masks = small()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    start = net[0].weight.detach().clone()
    for _ in range(4):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net)
            loss.backward()
            return loss

        if name == "lbfgs":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        check_masks(net)  # after every step, not only at the end of a batch or an epoch
    moved = (net[0].weight != start)[masks["0.weight"]]
    assert moved.float().mean() > 0.9


def test_momentum_from_before_pruning_does_not_bring_weights_back() -> None:
    net, masks = small(masked=False)
    mask_modules(net, {n: torch.ones_like(m) for n, m in masks.items()})
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    loss_of(net).backward()
    optimizer.step()
    for name, module, leaf in masked_parameters(net):
        module.set_mask(leaf, masks[name])
    loss_of(net).backward()
    optimizer.step()
    check_masks(net)


def test_gradients_and_moments_are_masked_before_clipping() -> None:
    """Known mistake: unmasked gradients and moments of pruned weights, so that clipping had to be disabled."""
    net, masks = small()
    loss_of(net).backward()
    for name, mask in masks.items():
        grad = net.get_parameter(name).grad
        assert bool((grad[~mask] == 0).all())  # type: ignore[index]
        assert bool((grad[mask] != 0).any())  # type: ignore[index]
    survivors = [p.grad[masks[n]] if n in masks else p.grad for n, p in net.named_parameters()]  # type: ignore[index]
    expected = torch.stack([g.norm() for g in survivors]).norm()  # type: ignore[union-attr]
    assert torch.allclose(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3), expected)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    for name, mask in masks.items():
        state = optimizer.state[net.get_parameter(name)]
        assert bool((state["exp_avg"][~mask] == 0).all())
        assert bool((state["exp_avg_sq"][~mask] == 0).all())


def test_a_survivor_that_is_zero_trains() -> None:
    """Known mistake: the mask guessed from zeros."""
    net, masks = small()
    with torch.no_grad():
        net[0].weight.zero_()
    loss_of(net).backward()
    torch.optim.SGD(net.parameters(), 0.5).step()
    assert bool((net[0].weight[masks["0.weight"]] != 0).any())
    check_masks(net)
    assert torch.equal(net[0].mask(), masks["0.weight"])


def test_accumulation_equals_the_full_batch() -> None:
    net, _ = small()
    net, x = net.double(), torch.randn(8, 13, dtype=torch.float64)  # sums that cancel say nothing in fp32
    net(x).square().sum().backward()
    full = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    net.zero_grad()
    for part in x.split(3):
        net(part).square().sum().backward()
    for p, g in zip(net.parameters(), full, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_weight_averages_copies_and_pickles() -> None:
    net, masks = small()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    for _ in range(3):
        loss_of(net).backward()
        optimizer.step()
        average.update_parameters(net)
    check_masks(average.module)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin[0].mask(), masks["0.weight"])
        other = OPTIMIZERS["noise"](list(twin.parameters()))
        other.step()
        check_masks(twin)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    check_masks(torch.load(buffer, weights_only=False))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_dense_checkpoint_keeps_the_mask(assign: bool) -> None:
    net, masks = small()
    dense = {n: torch.randn_like(t) for n, t in net.state_dict().items()}
    net.load_state_dict(dense, assign=assign)
    check_masks(net)
    assert torch.equal(net[0].weight[masks["0.weight"]], dense["0.weight"][masks["0.weight"]])
    optimizer = OPTIMIZERS["noise"](list(net.parameters()))
    optimizer.step()
    check_masks(net)


def test_resuming_continues_exactly(tmp_path: Path) -> None:
    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()

    net, _ = small()
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    steps(net, optimizer, 3, 1)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "masks": mask_state(net)}
    torch.save(copy.deepcopy(state), tmp_path / "run.pt")
    steps(net, optimizer, 3, 2)
    again, _ = small()  # other masks
    held = torch.load(tmp_path / "run.pt")
    load_mask_state(again, held["masks"])
    again.load_state_dict(held["model"])
    optimizer = torch.optim.AdamW(again.parameters(), 0.05)
    optimizer.load_state_dict(held["optimizer"])
    steps(again, optimizer, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True))


def test_masks_that_do_not_fit_change_nothing() -> None:
    net, _ = small()
    before = mask_state(net)
    with pytest.raises(SparsifyError, match=r"missing \['2.weight'\]"):
        load_mask_state(net, {"0.weight": before["0.weight"]})
    with pytest.raises(SparsifyError, match=r"mask of 2\.weight: expected uint8"):
        load_mask_state(net, {"0.weight": ~before["0.weight"], "2.weight": before["2.weight"][:3]})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), mask_state(net).values(), strict=True))
    with pytest.raises(SparsifyError, match=r"expected bool \(11, 13\)"):
        mask_modules(net, {"0.weight": torch.ones(3, 3, dtype=torch.bool)})
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(SparsifyError, match=r"tied to b\.weight"):
        mask_modules(tied, {"a.weight": torch.ones(4, 4, dtype=torch.bool)})


def test_rezero_after_writing_by_hand() -> None:
    net, _ = small()
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(SparsifyError, match=r"0\.weight: \d+ pruned entries are not zero"):
        check_masks(net)
    rezero(net)
    check_masks(net)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    net, _ = small()
    x = torch.randn(5, 13, requires_grad=True)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    net.zero_grad()
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()  # type: ignore[union-attr]
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))  # type: ignore[arg-type]


def test_autocast_and_gradient_dtypes() -> None:
    net, masks = small()
    x = torch.randn(5, 13)
    with torch.autocast("cpu", torch.bfloat16):
        y = net[0](x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    grad = net[0].weight.grad
    assert grad.dtype == torch.float32
    assert bool((grad[~masks["0.weight"]] == 0).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, nn.functional.linear(x, net[0].weight, net[0].bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_is_one_node_and_sees_new_masks(dynamic: bool) -> None:
    net, masks = small()
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=dynamic)
    x = torch.randn(5, 13)
    assert torch.equal(compiled(x), net(x))
    assert sum("masked_linear" in n for n in names) == 2
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    compiled(x).square().sum().backward()
    assert bool((net[0].weight.grad[~masks["0.weight"]] == 0).all())
    smaller = masks["0.weight"] & (torch.rand(11, 13) > 0.5)
    net[0].set_mask("weight", smaller)
    net.zero_grad()
    compiled(x).square().sum().backward()
    assert bool((net[0].weight.grad[~smaller] == 0).all())


def test_export_shows_the_operator_on_the_same_parameters() -> None:
    net, _ = small()
    program = torch.export.export(net, (torch.randn(5, 13),), strict=False)
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.sparsify.masked_linear.default]
    found = [program.graph_signature.inputs_to_parameters[n.args[1].name] for n in nodes]
    assert found == ["0.weight", "2.weight"]


def test_conv1d_keeps_its_layout_class_and_zeros() -> None:
    from transformers.pytorch_utils import Conv1D

    net = nn.Sequential(Conv1D(7, 13))
    mask = torch.rand(13, 7) > 0.5
    x = torch.randn(2, 3, 13)
    weight = net[0].weight.detach() * mask
    mask_modules(net, {"0.weight": mask})
    assert isinstance(net[0], Conv1D)
    assert type(net[0]).__name__ == "MaskedConv1D"
    assert torch.allclose(net(x), x @ weight + net[0].bias, atol=1e-6)
    net(x).square().sum().backward()
    assert bool((net[0].weight.grad[~mask] == 0).all())
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin(x), net(x))
    optimizer = OPTIMIZERS["noise"](list(twin.parameters()))
    optimizer.step()
    check_masks(twin)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,eoi->teo", x, self.up)


def test_packed_experts_have_their_gradients_masked_too() -> None:
    net = nn.Sequential(Experts())
    mask = torch.rand(3, 5, 4) > 0.5
    mask_modules(net, {"0.up": mask})
    assert isinstance(net[0], Experts)
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        model.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        grad = model[0].up.grad
        assert bool((grad[~mask] == 0).all())
        assert bool((grad[mask] != 0).all())
        torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1).step()
        check_masks(model)


def test_frozen_weights_that_train_later() -> None:
    net = nn.Sequential(Experts())
    net[0].up.requires_grad_(False)
    mask = torch.rand(3, 5, 4) > 0.5
    mask_modules(net, {"0.up": mask})
    net[0].up.requires_grad_(True)
    net.train()
    net(torch.randn(6, 4)).square().sum().backward()
    assert bool((net[0].up.grad[~mask] == 0).all())


def test_masked_classes_are_cached_and_nest() -> None:
    class Mine(nn.Linear):
        pass

    assert masked_class(nn.Linear) is MaskedLinear
    assert masked_class(MaskedLinear) is MaskedLinear
    assert masked_class(Mine) is masked_class(Mine)
    assert issubclass(masked_class(Mine), Mine)
    assert issubclass(masked_class(Mine), MaskedModule)
