"""Compiled hosts of every method on tiny models, cached: a test gets a copy of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import Plan

_CACHE: dict[tuple[str, torch.dtype, str], nn.Module] = {}


@functools.cache
def model_of(name: str = "Llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A shared model; never write to it."""
    if name == "Mlp":
        torch.manual_seed(0)
        return tiny.perturb(tiny.Mlp()).to(dtype).eval()
    return tiny.build(name, dtype)


def batches(name: str = "Llama", dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Two calibration batches; the second has padding (on the right, without loss)."""
    if name == "Mlp":
        return [{"x": torch.randn(5, 12, generator=torch.Generator().manual_seed(s)).to(dtype)} for s in (1, 2)]
    first, second = tiny.tokens(2, 7, seed=21), tiny.tokens(3, 6, seed=22)
    mask = torch.ones_like(second)
    mask[0, 4:] = 0
    return [
        {"input_ids": first, "labels": first},
        {"input_ids": second, "attention_mask": mask, "labels": second.masked_fill(mask == 0, -100)},
    ]


def loss_of(outputs: Any, batch: Any) -> Tensor:
    """The loss of calibration: the model's own, or the probe's."""
    return tiny.probe_loss(outputs).float() if isinstance(outputs, Tensor) else outputs.loss


def compiled(
    *rules: Any, name: str = "Llama", dtype: torch.dtype = torch.float32, calibrate: bool = True, **fields: Any
) -> Any:
    """`sparsify.compile` of the shared model, remembered; returns a deep copy."""
    plan = Plan(list(rules), **fields)
    key = (name, dtype, plan.to_json() + str(calibrate))
    if key not in _CACHE:
        options: dict[str, Any] = {"example": torch.randn(3, 12, dtype=dtype)} if name == "Mlp" else {}
        calibration = batches(name, dtype) if calibrate else None
        _CACHE[key] = sparsify.compile(
            model_of(name, dtype), plan, calibration=calibration, loss=loss_of, progress=False, **options
        )
    return copy.deepcopy(_CACHE[key])


def logits(model: nn.Module, name: str = "Llama") -> Tensor:
    """Output on a fixed input, without a graph."""
    with torch.no_grad():
        if name == "Mlp":
            x = torch.randn(4, 12, generator=torch.Generator().manual_seed(77))
            return model(x.to(next(model.parameters()).dtype))
        return tiny.output_of(model(tiny.tokens(2, 8, seed=77)))


def state(host: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """The state dict in original names, shapes and order, of a host or of what `restore` made of it."""
    found = host.sparsify.original_state_dict() if "sparsify" in host.__dict__ else host.state_dict()
    assert set(found) == set(like.state_dict())
    return {n: t.detach().clone() for n, t in found.items()}


def plain_with(host: nn.Module, name: str = "Llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A plain model that holds the host's weights, trained parts folded in."""
    plain = copy.deepcopy(model_of(name, dtype))
    plain.load_state_dict(state(host, plain))
    return plain


def dense_gradients(model: nn.Module, names: list[str], call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """`dL/dW` of whole weights by plain autograd; the shared model is left alone."""
    twin = copy.deepcopy(model).requires_grad_(False)
    parameters = dict(twin.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    call(twin).backward()
    return {name: parameters[name].grad.detach().clone() for name in names}  # type: ignore[union-attr]


def logical(weight: Tensor, transposed: bool) -> Tensor:
    """A stored weight or gradient as `(out, in)`."""
    return weight.t() if transposed else weight


def trained_names(host: nn.Module) -> set[str]:
    return {n for n, p in host.named_parameters() if p.requires_grad}


def saved_storages(call: Callable[[], Any], constants: Mapping[str, Tensor] | list[Tensor]) -> dict[int, int]:
    """Address → bytes of the storages that autograd keeps, without those of `constants`."""
    tensors = constants.values() if isinstance(constants, Mapping) else constants
    known = {t.untyped_storage().data_ptr() for t in tensors}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = call()
    del kept
    return found


def deltas(host: Any) -> dict[str, Tensor]:
    """The dense change of every weight by the host's active adapter, stored layout, from its saved form alone."""
    found: dict[str, Tensor] = {}
    for delta in host.sparsify.current().deltas:
        shape = host.sparsify.shapes()[delta.param]
        change = found.setdefault(delta.param, torch.zeros(tuple(shape)))
        if delta.kind == "sparse":
            change.view(-1)[delta.channels] += delta.values
        elif delta.kind == "lora":
            change += logical(delta.scale * delta.values @ delta.a, delta.transposed)
        else:
            change.index_add_(delta.axis, delta.channels, delta.stored().float())
    return found
