"""How the tensors of one host module lie: what was reordered, where the trained parts stand, and the weight they stand for.

live        the tensors as torch's own `state_dict()` gives them: reordered weights, `weight_slice`, `sparse_values`, `lora_A` …
original    names, shapes and order of the model that was compiled; trained parts folded into their weight

`digest` names a live layout in 32 bytes. It stands in the module as the buffer `sparsify_layout`, so that whoever has a live
state dict can tell whose it is: two selections give tensors of equal names and shapes in another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsify.model.sharded import whole
from sparsify.modules.adapted import AdaptedMixin, effective_weight
from sparsify.program.permutation import invert_index

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

MARKER = "sparsify_layout"
Module = TypeVar("Module", bound=nn.Module)


class Adopts(Protocol):
    """Takes a support that differs from the module's own (a mask collected before a checkpoint was written)."""

    def __call__(self, index: Int[Tensor, " k"]) -> None: ...

    def known(self) -> Int[Tensor, " k"] | None:
        """The support that the handle has, or None while the mask is open."""
        ...


class BaseLoaded(Protocol):
    """Told when a state dict brings another base than the host was compiled from; `weight` is that base as it lies, None if the
    trained parts were in it, so that its values in their places are not known."""

    def __call__(self, weight: Float[Tensor, "*experts p q"] | None) -> None: ...


@dataclass
class Layout:
    """What was reordered in one module.

    moves: per tensor of the module, `(axis, index)` pairs with `current = original.index_select(axis, index)`.
    adopt, base_loaded: called while a state dict with another support, or another base, is loaded.
    lead: axes of the module's weight before its two: 1 of packed experts.
    verdict: what the host's own load hook found out about this module's entries before anything was loaded:
        `(id of one of its tensors, whether they are live)`.
    """

    moves: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    adopt: Adopts | None = None
    verdict: tuple[int, bool] | None = None
    last_digest: bytes = b""
    base_loaded: BaseLoaded | None = None
    lead: int = 0
    inverses: dict[str, list[tuple[int, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        self.inverses = {leaf: [(a, invert_index(i)) for a, i in moves] for leaf, moves in self.moves.items()}

    def to_original(self, leaf: str, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        for axis, inverse in reversed(self.inverses.get(leaf, [])):
            tensor = tensor.index_select(axis, inverse.to(tensor.device))
        return tensor

    def to_current(self, leaf: str, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        for axis, index in self.moves.get(leaf, []):
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor

    def logical_moves(self, leaf: str, transposed: bool) -> dict[int, tuple[Int[Tensor, " c"], Int[Tensor, " c"]]]:
        """Logical axis (0 = out, 1 = in) → `(index, inverse)` of a weight's moves."""
        pairs = zip(self.moves.get(leaf, []), self.inverses.get(leaf, []), strict=True)
        found = {axis - self.lead: (index, inverse) for (axis, index), (_, inverse) in pairs}
        return {(1 - axis if transposed else axis): move for axis, move in found.items()}

    def factors_to_original(
        self, param: str, transposed: bool, a: Float[Tensor, "*experts r m"], b: Tensor
    ) -> tuple[Float[Tensor, "*experts r m"], Tensor]:
        """Low-rank factors `a (r, in)`, `b (out, r)` of a weight, perhaps of every expert, from current to original coordinates;
        `b` may be a vector over the outputs too, as DoRA's magnitude is."""
        moves = self.logical_moves(param.rpartition(".")[2], transposed)
        a = a.index_select(self.lead + 1, moves[1][1].to(a.device)) if 1 in moves else a
        return a, b.index_select(self.lead, moves[0][1].to(b.device)) if 0 in moves else b

    def factors_to_current(
        self, param: str, transposed: bool, a: Float[Tensor, "*experts r m"], b: Tensor
    ) -> tuple[Float[Tensor, "*experts r m"], Tensor]:
        """The inverse of `factors_to_original`."""
        moves = self.logical_moves(param.rpartition(".")[2], transposed)
        a = a.index_select(self.lead + 1, moves[1][0].to(a.device)) if 1 in moves else a
        return a, b.index_select(self.lead, moves[0][0].to(b.device)) if 0 in moves else b

    def digest(self, module: nn.Module) -> bytes:
        """SHA-256 over the moves, the places of the trained channels, the shapes and scale of the parts, and the packed format."""
        placed = [module._buffers.get(n) for n in getattr(module, "placing_buffers", ())]
        if self.last_digest and any(t is not None and t.is_meta for t in placed):
            return self.last_digest  # of the same module before it went to the meta device
        digest = hashlib.sha256()
        for leaf, moves in sorted(self.moves.items()):
            for axis, index in moves:
                digest.update(f"{leaf} {axis} ".encode() + bytes_of(index))
        if isinstance(module, AdaptedMixin):
            held = {n: p for n, p in sorted(module._parameters.items()) if p is not None}
            digest.update(str({n: tuple(p.shape) for n, p in held.items() if n in module.trained_leaves}).encode())
            digest.update(module.part_digest())
        self.last_digest = digest.digest()
        return self.last_digest

    def mark(self, module: nn.Module) -> None:
        """Bring the module's marker up to date; a module that lies as the user's own does has none."""
        if not self.moves and not isinstance(module, AdaptedMixin):
            module._buffers.pop(MARKER, None)
            return
        value = torch.frombuffer(bytearray(self.digest(module)), dtype=torch.uint8)
        own = module._buffers.get(MARKER)
        if own is None:
            device = next((t.device for t in module._parameters.values() if t is not None), None)
            module.register_buffer(MARKER, value.to(device))
        elif not own.is_meta and not torch.equal(own.cpu(), value):
            own.copy_(value)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def added_leaves(module: nn.Module) -> tuple[str, ...]:
    """Leaves that a module of a host has and the user's module has not, packed tensors left out."""
    return (*module.added_leaves(), MARKER) if isinstance(module, AdaptedMixin) else (MARKER,)


def packed_leaves(module: nn.Module) -> tuple[str, ...]:
    """Leaves of a packed base (parameters where they are integers, else buffers); none of a dense one."""
    found: tuple[str, ...] = getattr(module, "packed_names", ())
    return found


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module of a host, or None where it lies as the user's own does."""
    found = module.__dict__.get("_sparsify_layout")
    return found if isinstance(found, Layout) else None


def stand_in(module: Module, tensors: Mapping[str, Tensor]) -> Module:
    """A module like `module` that holds `tensors` by leaf. Nothing of `module` is written: others may be running it."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {n: tensors.get(n, t) for n, t in module._parameters.items()}
    twin.__dict__["_buffers"] = {n: tensors.get(n, t) for n, t in module._buffers.items()}
    return twin


def fold(module: AdaptedMixin, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*experts p q"]:
    """The weight that an adapted module would compute with if it held `tensors` (by leaf; pieces are gathered)."""
    held = {n: tensors.get(n, t) for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    device = whole(held["weight"]).device
    twin = stand_in(module, {n: whole(t).detach().to(device) for n, t in held.items()})
    twin.read_settings()  # those of the tensors, not of the module
    return effective_weight(twin)
