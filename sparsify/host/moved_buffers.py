"""Buffers that move while a model trains: running statistics, counters, anything that a user's module registers.

They belong to the trained function, so adapters hold them, switches park them, and `set_adapter(None)` and `restore` give back the
base's, bit for bit. The host's own buffers (packed weights, supports, masks) are not among them, and neither are tables that a module
derives anew (rotary frequencies, position ids): non-persistent buffers are taken only if their shape stays and nothing says
that they are derived.

In a mix a floating buffer is the weighted mean of its members (weights below zero count as zero; where they sum to less than one, the base
has the rest), which keeps variances positive. An integer or boolean buffer is that of the member with the largest weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.modules.layout import added_leaves, packed_leaves
from sparsify.modules.masked import MaskedModule, bits_name

#: what modules keep in non-persistent buffers and compute anew
DERIVED = (
    "inv_freq",
    "original_inv_freq",
    "cos",
    "sin",
    "cos_cached",
    "sin_cached",
    "position_ids",
    "token_type_ids",
    "causal_mask",
)


def is_derived(module: nn.Module, leaf: str) -> bool:
    """Whether a non-persistent buffer is a table that its module computes anew."""
    named = type(module).__name__.lower()
    return leaf in DERIVED or leaf.endswith("inv_freq") or "rotary" in named or "rope" in named


def user_buffers(host: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """`(qualified name, module, leaf, buffer)` of the buffers that may move with training, each tensor once."""
    seen: set[int] = set()
    for path, module in host.named_modules():
        own = {*added_leaves(module), *packed_leaves(module)}
        if isinstance(module, MaskedModule):
            own |= {bits_name(leaf) for leaf in module.masked_leaves}
        for leaf, buffer in module._buffers.items():
            if not isinstance(buffer, Tensor) or leaf in own or id(buffer) in seen:
                continue
            if leaf in module._non_persistent_buffers_set and is_derived(module, leaf):
                continue
            seen.add(id(buffer))
            yield f"{path}.{leaf}" if path else leaf, module, leaf, buffer


@dataclass
class Buffers:
    """`base`: every buffer's value when the host was compiled, by name, as it lies in the host."""

    base: dict[str, Tensor]

    @classmethod
    def of(cls, host: nn.Module) -> Buffers:
        return cls({name: buffer.detach().clone() for name, _, _, buffer in user_buffers(host)})

    def moved(self, host: nn.Module) -> dict[str, Tensor]:
        """Copies of the buffers that are not the base's, as they lie in the host."""
        found = {}
        for name, module, leaf, buffer in user_buffers(host):
            base = self.base.get(name)
            if base is None or buffer.is_meta or base.is_meta:
                continue
            if buffer.shape != base.shape and leaf in module._non_persistent_buffers_set:
                continue  # a cache that grew
            if buffer.shape != base.shape or not torch.equal(buffer, base.to(buffer.device, buffer.dtype)):
                found[name] = buffer.detach().clone()
        return found

    def reset(self, host: nn.Module) -> None:
        """The base's buffers are back."""
        self.write(host, {name: self.base[name] for name in self.moved(host)})

    @torch.no_grad()
    def write(self, host: nn.Module, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            module = host.get_submodule(owner)
            own = module._buffers.get(leaf)
            if isinstance(own, Tensor) and own.shape == value.shape and not own.is_inference():
                own.copy_(value)
            else:
                module._buffers[leaf] = value.clone().to(own.device if isinstance(own, Tensor) else value.device)


def mix_buffer(base: Tensor, members: Sequence[tuple[float, Tensor]]) -> Tensor:
    """One buffer of a mix; see the module docstring. One member of weight 1 gives its value, bit for bit."""
    members = [(max(float(weight), 0.0), value.to(base.device)) for weight, value in members]
    weight, largest = max(members, key=lambda member: member[0])
    if not base.is_floating_point() or (len(members) == 1 and weight == 1):
        return largest.to(base.dtype) if weight else base
    total = sum(w for w, _ in members)
    scale = max(total, 1.0)
    wide = torch.float64
    mixed = base.to(wide) * (1 - total / scale)
    for weight, value in members:
        mixed += value.to(wide) * (weight / scale)
    return mixed.to(base.dtype)
