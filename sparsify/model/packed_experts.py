"""Packed experts as modules: before a model is traced, each 3-D weight that may train becomes a module of its own.

experts.gate_up_proj  Parameter (E, n, m)      ──▶   experts.gate_up_proj  GroupedLinear, whose `weight` is that Parameter
experts.forward       of the user's class      ──▶   the same function, made of two `sparsify::grouped_linear`

So what selects, permutes, inserts, saves, merges and restores finds a module with one weight, as everywhere else; only the
weight has a leading axis, the experts. It happens in a copy of the module tree that shares all tensors; whatever leaves the host
(state dicts in original names, adapter files, PEFT folders, restored and plain models) calls the weight as the user's model does.

Two forms are known: modules that follow transformers' experts interface (`use_experts_implementation`: a batch of tokens, the
experts and the weights of each), and Llama 4's, whose rows come sorted. Other 3-D weights stay as they are, and are declined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from sparsify.errors import RefusedError
from sparsify.model.module_tree import copy_module_tree

Model = TypeVar("Model", bound=nn.Module)
T = TypeVar("T")

if TYPE_CHECKING:
    from jaxtyping import Float, Int
#: implementations of transformers' experts interface that compute what its classes' own forward does, in floats
KNOWN_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


class GroupedLinear(nn.Module):
    """Rows that are sorted by expert times the matrix of their expert. `weight (E, out, in)`.

    forward: `x (S, in)`, `offsets (E,)` the ends of the groups → `(S, out)` in the weight's dtype, as transformers' grouped product.
    """

    weight: nn.Parameter
    bias = None
    conv1d = False  # whether the weight is stored as (E, in, out)

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Float[Tensor, "S m"], offsets: Int[Tensor, " experts"]) -> Float[Tensor, "S n"]:
        weight = self.weight.transpose(1, 2) if self.conv1d else self.weight
        return torch.ops.sparsify.grouped_linear(x.to(self.weight.dtype), weight, offsets)

    def logical_shape(self) -> tuple[int, int]:
        """`(out, in)` of one expert."""
        _, first, second = self.weight.shape
        return (second, first) if self.conv1d else (first, second)

    def extra_repr(self) -> str:
        n, m = self.logical_shape()
        return f"experts={self.weight.shape[0]}, in_features={m}, out_features={n}"


class TurnedGroupedLinear(GroupedLinear):
    """`GroupedLinear` whose weight is stored as `(E, in, out)` (GPT-OSS, Llama 4)."""

    conv1d = True


GROUPED: Mapping[str, type[nn.Module]] = {c.__name__: c for c in (GroupedLinear, TurnedGroupedLinear)}


# --- the experts' forward ----------------------------------------------------------------------------------------------------


class RoutedExperts(nn.Module):
    """Made the first base of a class that follows transformers' experts interface. Tokens are sorted by expert, once."""

    # what that interface's classes have, and `write_out` gives them
    product_names: tuple[str, str]
    down_proj: GroupedLinear
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    _is_expert_parallel: bool

    def forward(
        self, hidden_states: Float[Tensor, "T m"], top_k_index: Int[Tensor, "T k"], top_k_weights: Float[Tensor, "T k"]
    ) -> Float[Tensor, "T m"]:
        if self._is_expert_parallel:
            raise RefusedError(
                "experts: parts train on experts that are whole on every rank, not under expert parallelism"
            )
        tokens, choices = top_k_index.shape
        expert, order = torch.sort(top_k_index.reshape(-1))
        first = getattr(self, self.product_names[0])
        every = torch.arange(first.weight.shape[0], device=expert.device)
        offsets = torch.searchsorted(expert, every, right=True)
        x = hidden_states.index_select(0, order // choices)
        inner = self.between(self.with_bias(self.product_names[0], first(x, offsets), expert))
        y = self.after(self.with_bias("down_proj", self.down_proj(inner, offsets), expert))
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        y = y.index_select(0, order.argsort()).view(tokens, choices, y.shape[-1]).sum(dim=1)
        return y.to(hidden_states.dtype)

    def between(self, y: Tensor) -> Tensor:
        return self._apply_gate(y) if self.has_gate else self.act_fn(y)

    def after(self, y: Tensor) -> Tensor:
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def with_bias(self, name: str, y: Tensor, expert: Tensor) -> Tensor:
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y


class SortedExperts(nn.Module):
    """Made the first base of Llama 4's experts: every expert has as many rows, one group after the other."""

    gate_up_proj: GroupedLinear
    down_proj: GroupedLinear
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Float[Tensor, "T m"]) -> Float[Tensor, "T m"]:
        experts = self.gate_up_proj.weight.shape[0]
        rows = hidden_states.shape[0] // experts
        offsets = torch.arange(1, experts + 1, device=hidden_states.device) * rows
        gate, up = self.gate_up_proj(hidden_states, offsets).chunk(2, dim=-1)
        return self.down_proj(up * self.act_fn(gate), offsets)


FORMS: Mapping[str, type[nn.Module]] = {"routed": RoutedExperts, "sorted": SortedExperts}


@functools.cache
def written_out(cls: type[nn.Module], form: str) -> type[nn.Module]:
    """The subclass of a class of experts whose forward is made of grouped linears."""

    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return rebuild, (cls, form), self.__dict__

    body = {"__reduce_ex__": reduce, "__doc__": cls.__doc__, "__module__": __name__, "written_out_of": cls}
    return type(cls.__name__, (FORMS[form], cls), body)


def rebuild(cls: type[nn.Module], form: str) -> nn.Module:
    made = written_out(cls, form)
    return made.__new__(made)


# --- there -------------------------------------------------------------------------------------------------------------------


def form_of(module: nn.Module) -> tuple[str, tuple[str, ...], bool] | None:
    """`(form, names of the weights in order of use, whether they are stored (E, in, out))`; None for other modules."""
    if type(module).__name__ == "Llama4TextExperts" and type(module).__module__.startswith("transformers."):
        form, names, turned = "sorted", ("gate_up_proj", "down_proj"), True
    elif hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate") and hasattr(module, "has_bias"):
        config = getattr(module, "config")  # noqa: B009 - nn.Module's attributes pass for tensors
        if module._is_expert_parallel or config._experts_implementation not in KNOWN_IMPLEMENTATIONS:
            return None
        form, turned = "routed", bool(module.is_transposed)
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    else:
        return None
    held = [module._parameters.get(name) for name in names]
    fits = all(t is not None and t.dim() == 3 and t.is_floating_point() for t in held)
    return (form, names, turned) if fits else None


def write_out(model: Model, wanted: Callable[[str, tuple[str, ...]], bool]) -> Model:
    """A twin of the model, over the same tensors, in which packed experts are grouped linears; the model itself without any.

    wanted: asked with the name of every module of experts, and the names of its weights in it.
    """
    found = {path: form for path, m in model.named_modules() if (form := form_of(m)) is not None}
    found = {path: form for path, form in found.items() if wanted(path, form[1])}
    if not found:
        return model
    shared = {id(t): t for m in model.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    twin = copy_module_tree(model, dict(shared))
    for path, (form, names, turned) in found.items():
        module = twin.get_submodule(path)
        if "product_names" in module.__dict__:  # a shared module
            continue
        module.__class__ = written_out(type(module), form)
        module.__dict__["product_names"] = names
        module.__dict__["parameter_order"] = tuple(module._parameters)
        for name in names:
            weight = module._parameters.pop(name)
            assert weight is not None  # `form_of` saw three dimensions
            child = (TurnedGroupedLinear if turned else GroupedLinear)(weight)
            module.add_module(name, child.train(module.training))
    return twin


# --- and back ----------------------------------------------------------------------------------------------------------------


def plain_names(host: nn.Module) -> dict[str, str]:
    """Name of a grouped linear's weight in the host → its name in the user's model."""
    modules = host.named_modules(remove_duplicate=False)
    return {f"{path}.weight": path for path, module in modules if path and isinstance(module, GroupedLinear)}


def write_back_experts(host: nn.Module) -> None:
    """Undo `write_out` in a host whose grouped linears are plain again: classes and Parameters as in the user's model."""
    for module in list(host.modules()):
        for name in module.__dict__.pop("product_names", ()):
            product = module._modules.pop(name)
            assert product is not None
            module.register_parameter(name, product.get_parameter("weight"))
        for name in module.__dict__.pop("parameter_order", ()):
            module._parameters[name] = module._parameters.pop(name)
        if hasattr(type(module), "written_out_of"):
            module.__class__ = type(module).written_out_of  # type: ignore[attr-defined]


def renamed(state: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """A mapping by tensor names with some of them replaced, in the same order."""
    return {names.get(name, name): value for name, value in state.items()}


__all__ = [
    "GROUPED",
    "GroupedLinear",
    "TurnedGroupedLinear",
    "form_of",
    "plain_names",
    "renamed",
    "write_back_experts",
    "write_out",
]
