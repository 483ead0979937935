"""Host modules that carry trained parts: subclasses of what they replace, so `isinstance`, hooks and names go on working.

nn.Linear, Conv1D ──▶ Partial…        weight frozen; weight_slice trains                        `sparsify.methods.channels`
                      SparseLowRank…  weight frozen; sparse_values, lora_A, lora_B train        `sparsify.methods.sparse_lowrank`
nn.Conv1d, Conv2d ──▶ LowRankConv…    weight frozen; lora_A, lora_B train                       `sparsify.methods.lowrank_conv`
                      PartialConv…    weight frozen; weight_slice trains                        `sparsify.methods.partial_conv`
nn.Embedding      ──▶ LowRank…        weight frozen; lora_A, lora_B train                       `sparsify.methods.lowrank_embedding`
nn.Embedding      ──▶ Rows…           weight frozen; weight_slice trains                        `sparsify.methods.rows`
                      Quantized…      no weight, packed_0 … packed_n; any of the above beside   `sparsify.methods.packed`
                      …               of methods from outside                                   `sparsify.methods.register`

Here is what they share, and how a module of our own tree becomes one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8


class AdaptedMixin(nn.Module if TYPE_CHECKING else object):
    """What all adapted linears share. `conv1d` says that the stored weight is `(in, out)`.

    trained_leaves: parameters that train, by leaf. part_buffers: buffers beside them.
    placing_buffers: those of `part_buffers` that say where the part lies (not in the state dict, but in the layout's digest).
    part_settings: plain attributes. entries_of_weight: trained leaves that stand for entries of the weight, which is scratch there.
    support_leaf: the one of `part_buffers` that says which entries of the weight train, and that a state dict may bring anew.
    rates: leaf → group of `Handle.param_groups`. follows_from_weight: whether what trained can be read from the folded weight.
    """

    weight: Tensor
    bias: Tensor | None
    conv1d = False
    trained_leaves: ClassVar[tuple[str, ...]] = ()
    part_buffers: ClassVar[tuple[str, ...]] = ()
    placing_buffers: ClassVar[tuple[str, ...]] = ()
    part_settings: ClassVar[tuple[str, ...]] = ()
    entries_of_weight: ClassVar[tuple[str, ...]] = ()
    support_leaf: ClassVar[str] = ""
    rates: ClassVar[Mapping[str, str]] = {}
    follows_from_weight: ClassVar[bool] = False

    def stored_shape(self) -> torch.Size:
        return self.weight.shape

    def logical_shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        shape = self.stored_shape()[-2:]
        return (shape[1], shape[0]) if self.conv1d else (shape[0], shape[1])

    def logical(self, stored: Float[Tensor, "*experts p q"]) -> Float[Tensor, "*experts n m"]:
        """A view of a stored weight as `(out, in)`; of packed experts as `(experts, out, in)`."""
        return stored.mT if self.conv1d else stored

    def check_dtype(self, x: Tensor) -> None:
        """The same refusal as `F.linear`: without autocast, input and weight must agree in dtype."""
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                f"{type(self).__name__}: the input is {x.dtype}, the weight {self.weight.dtype}; cast one, or use autocast"
            )

    def described(self) -> str:
        n, m = self.logical_shape()
        return f"in_features={m}, out_features={n}, bias={self.bias is not None}"

    # --- the part, as state dicts, merge and layouts see it -----------------------------------------------------------------

    def added_leaves(self) -> tuple[str, ...]:
        """Leaves that the module has and the user's has not."""
        return (*self.trained_leaves, *self.part_buffers)

    def dense(self) -> Float[Tensor, "*experts p q"]:
        """The stored weight, detached; of a packed base what it stands for, with its trained channels and entries."""
        return self.weight.detach()

    def base_weight(self) -> Float[Tensor, "*experts p q"]:
        """A fresh copy of the stored weight, before `folded`."""
        return self.weight.detach().clone()

    def folded(self, weight: Float[Tensor, "*experts p q"]) -> Float[Tensor, "*experts p q"]:
        """The weight that the module computes with, in stored layout, from the base's; may write into `weight` and return it."""
        return weight

    def part_digest(self) -> bytes:
        """Where the part lies and how it is scaled, for the digest of the module's layout; shapes are in it already."""
        return b""

    def clear_trained(self, stored: Float[Tensor, "*experts p q"]) -> None:
        """Zeros where trained entries lie in a contiguous stored weight: what stands there is scratch."""

    def supports(self, tensors: Mapping[str, Tensor]) -> list[Int[Tensor, " k"]]:
        """Flat entries of the stored weight under the part that `tensors` (by leaf) are of; beside `clear_trained`."""
        return []

    def trained_masks(self) -> dict[str, UInt8[Tensor, " bytes"]]:
        """Trained leaf → packed bits (`sparsify.ops.bits`) of its entries that are no pruned ones, where the base is pruned."""
        return {}

    def support_open(self, support: Int[Tensor, " k"] | None = None) -> bool:
        """Whether the support (the module's own unless given) is still to be collected."""
        return False

    def read_settings(self) -> None:
        """Settings that follow from the tensors are theirs, after the module was given others."""

    def base_follows(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the frozen base is the folded weight outside of its scratch, if the part holds `tensors`."""
        return False

    def read_from(self, stored: Float[Tensor, "*experts p q"]) -> dict[str, Tensor]:
        """Trained leaves as a folded weight holds them, where they follow from it and their places are known."""
        return {}


KINDS: dict[str, tuple[type, type[nn.Module]]] = {}


def carries(kind: str, mixin: type, linear: type[nn.Module] | None = None) -> None:
    """Make a kind of adapted module known. linear: its class for `nn.Linear`, made here if not given."""
    KINDS[kind] = (mixin, made_class(kind, mixin, nn.Linear) if linear is None else linear)
    for classes in (conv1d_class, grouped_class, derived_class):
        classes.cache_clear()


def made_class(kind: str, mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return rebuild, (kind, base.__name__), self.__dict__

    body = {"__reduce_ex__": reduce, "__doc__": f"{base.__name__}, {kind}.", "__module__": __name__}
    body["conv1d"] = getattr(base, "conv1d", base is not nn.Linear)
    return type(f"{kind}{base.__name__}", (mixin, base), body)


def known_kind(kind: str) -> tuple[type, type[nn.Module]]:
    if kind not in KINDS:
        importlib.import_module("sparsify.methods")
    if kind not in KINDS:
        raise KeyError(f"no method registered in this process has modules of kind {kind!r}; import the one that does")
    return KINDS[kind]


@functools.cache
def conv1d_class(kind: str) -> type[nn.Module]:
    """The same for transformers' Conv1D, whose weight is stored `(in, out)`; made on first use to keep imports lean."""
    from transformers.pytorch_utils import Conv1D

    return made_class(kind, known_kind(kind)[0], Conv1D)


@functools.cache
def grouped_class(kind: str, base: str) -> type[nn.Module]:
    """The same for the weights of packed experts."""
    from sparsify.model.packed_experts import GROUPED

    return made_class(kind, known_kind(kind)[0], GROUPED[base])


@functools.cache
def derived_class(kind: str, user: type[nn.Module]) -> type[nn.Module]:
    """The same for an `nn.Embedding` of a model's own, whose forward goes on from what `super().forward` gives (scaled ones), and for
    convolutions, whose forward is replaced."""
    mixin, carrier = known_kind(kind)
    if user in carrier.__bases__:
        return carrier
    bases = (user, carrier) if issubclass(carrier, nn.Embedding) else (mixin, user)

    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return rebuild_derived, (kind, user), self.__dict__

    body = {"__reduce_ex__": reduce, "__doc__": user.__doc__, "__module__": __name__, "extra_repr": carrier.extra_repr}
    return type(f"{kind}{user.__name__}", bases, body)


def rebuild_derived(kind: str, user: type[nn.Module]) -> nn.Module:
    cls = derived_class(kind, user)
    return cls.__new__(cls)


def class_of(kind: str, base: str) -> type[nn.Module]:
    if base.endswith("GroupedLinear"):
        return grouped_class(kind, base)
    return known_kind(kind)[1] if base == "Linear" else conv1d_class(kind)


def base_name(module: nn.Module) -> str:
    """What a linear of our own tree is under its parts: `Linear`, `Conv1D`, or one of those of packed experts."""
    from sparsify.model.packed_experts import GROUPED

    grouped = next((c.__name__ for c in type(module).__mro__ if c in GROUPED.values()), None)
    return grouped or ("Linear" if isinstance(module, nn.Linear) else "Conv1D")


def rebuild(kind: str, base: str = "Conv1D") -> nn.Module:
    cls = class_of(kind, base)
    return cls.__new__(cls)


def become(module: nn.Module, kind: str) -> None:
    """Turn a linear of *our own* module tree into an adapted one, in place: hooks, name and references stay."""
    derived = isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d)
    user = module.__dict__.get("user_class", type(module))
    cls = derived_class(kind, user) if derived else class_of(kind, base_name(module))
    if not issubclass(type(module), AdaptedMixin):
        module.__dict__["user_class"] = type(module)
    module.__class__ = cls


def become_part(module: nn.Module, kind: str) -> None:
    """`become`, of a module that stays packed if it is."""
    become(module, "Quantized" if hasattr(module, "packed_names") else kind)


def make_linear(module: nn.Module) -> None:
    """A linear of a subclass of `nn.Linear` without state of its own becomes an `nn.Linear`."""
    module.__class__ = nn.Linear


def make_plain(module: nn.Module) -> None:
    """Back to the class that the user had; parameters of trained parts must be gone."""
    module.__class__ = module.__dict__.pop("user_class", type(module))


def as_parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def take_leaves(module: AdaptedMixin) -> dict[str, Tensor]:
    """Take every tensor and setting of its part from a module; returns the tensors by leaf."""
    found: dict[str, Tensor] = {}
    for leaf in module.added_leaves():
        for table in (module._parameters, module._buffers):
            tensor = table.pop(leaf, None)
            if tensor is not None:
                found[leaf] = tensor
        module._non_persistent_buffers_set.discard(leaf)
    for name in module.part_settings:
        module.__dict__.pop(name, None)
    return found


def effective_weight(module: AdaptedMixin) -> Float[Tensor, "*experts p q"]:
    """A fresh tensor: the weight that an adapted module computes with, stored layout, all trained parts folded in."""
    return module.folded(module.base_weight()).detach()


def write_folded(module: AdaptedMixin) -> None:
    """Bring the stored dense weight up to date with what the operator would compute."""
    weight = module.weight
    found = module.folded(weight.data)
    if found is not weight.data and found.data_ptr() != weight.data_ptr():
        weight.data.copy_(found)


def value_names(model: nn.Module) -> list[str]:
    """Qualified names of trained parameters that hold values of a weight's entries, not changes of them."""
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedMixin):
            leaves = [leaf for leaf in module.entries_of_weight if module._parameters.get(leaf) is not None]
            found += [f"{path}.{leaf}" if path else leaf for leaf in leaves]
    return found
