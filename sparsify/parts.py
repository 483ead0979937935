"""Trained parts of one weight, as adapters see them: snapshot, reset to the base, to and from original coordinates.

SlicePart        whole channels: one parameter `weight_slice`                           S2FT, PaCA
LowRankPart      entries at a support and low-rank factors: sparse_values, lora_A, lora_B    RoSA, LoRA
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.adapter import Delta
from sparsify.exact import change_of, changed, correction_of, sum_dtype
from sparsify.layout import Layout
from sparsify.modules import QuantizedMixin, attach_parts, attach_slice, become, detach_parts, detach_slice
from sparsify.passes.insert_partial import kaiming_a
from sparsify.program import SparseLowRank, TrainedSlice

Snapshot = dict[str, Tensor]


def logical_moves(layout: Layout, leaf: str, transposed: bool) -> dict[int, tuple[Tensor, Tensor]]:
    """Logical axis (0 = out, 1 = in) → `(index, inverse)` of a weight's moves."""
    pairs = zip(layout.moves.get(leaf, []), layout.inverses.get(leaf, []), strict=True)
    return {(1 - axis if transposed else axis): (index, inverse) for (axis, index), (_, inverse) in pairs}


@dataclass
class SlicePart:
    """Trained channels of one weight. `base (…)` holds the values they started from, in the base's dtype, logical layout."""

    piece: TrainedSlice
    module: Any
    layout: Layout
    base: Tensor
    detached: nn.Parameter | None = None
    base_known: bool = True
    bits: Tensor | None = None

    @property
    def param(self) -> str:
        return self.piece.param

    @property
    def block(self) -> nn.Parameter:
        return self.detached if self.detached is not None else self.module.weight_slice

    def parameters(self) -> list[nn.Parameter]:
        return [self.block]

    def snapshot(self) -> Snapshot:
        return {"block": self.block.detach().clone()}

    def restore(self, snapshot: Snapshot) -> None:
        self.block.detach().copy_(snapshot["block"])

    def reset(self) -> None:
        """The base is back, in the block and (dense) in the weight."""
        self.block.detach().copy_(self.base)
        if not isinstance(self.module, QuantizedMixin):
            self.piece.write(self.module.weight.data, self.base)

    def restore_base(self, stored: Tensor) -> None:
        """Put base values under the block into a copy of the stored weight."""
        self.piece.write(stored, self.base.to(stored.device))

    def deltas(self, snapshot: Snapshot | None = None) -> list[Delta]:
        block = (self.snapshot() if snapshot is None else snapshot)["block"]
        values = change_of(block, self.base)
        exact = correction_of(block, self.base, values)
        channels = torch.tensor(self.piece.channels, dtype=torch.int64)
        values, exact = self.to_file(values), None if exact is None else self.to_file(exact)
        return [Delta(self.param, self.piece.side, channels, values, self.piece.transposed, exact=exact)]

    def to_file(self, values: Tensor) -> Tensor:
        """A tensor like the block, its other axis in original order."""
        other = 1 - self.piece.logical_axis
        moves = logical_moves(self.layout, leaf_of(self.param), self.piece.transposed)
        if other in moves:
            values = values.index_select(other, moves[other][1].to(values.device))
        return values.cpu().contiguous()

    def fits(self, deltas: Sequence[Delta]) -> bool:
        return (
            len(deltas) == 1
            and deltas[0].kind == self.piece.side
            and set(deltas[0].channels.tolist()) == set(self.piece.channels)
        )

    def from_file(self, delta: Delta, values: Tensor) -> Tensor:
        """A tensor like the values of a fitting delta, in the order and layout of the block."""
        side = self.piece.logical_axis
        place = {c: i for i, c in enumerate(delta.channels.tolist())}
        values = values.index_select(side, torch.tensor([place[c] for c in self.piece.channels]))
        moves = logical_moves(self.layout, leaf_of(self.param), self.piece.transposed)
        if 1 - side in moves:
            values = values.index_select(1 - side, moves[1 - side][0])
        return values.to(self.block.device)

    def fill(self, deltas: Sequence[Delta]) -> None:
        """Base plus a fitting delta; bit for bit the trained values on the base that they were trained on."""
        values, exact = deltas[0].values, deltas[0].exact
        exact = None if exact is None else self.from_file(deltas[0], exact)
        block = self.block.detach()
        block.copy_(changed(self.base.to(block.device), self.from_file(deltas[0], values), exact, block.dtype))

    def mix(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        """Base plus a weighted sum of fitting deltas (a packed base has nothing else to add to)."""
        self.block.detach().copy_(self.base)
        for weight, delta in weighted:
            self.block.detach().add_(self.from_file(delta, delta.values).to(self.block.dtype), alpha=weight)

    def read_back(self) -> None:
        """After deltas were added to the stored weight: take the block from it."""
        self.block.detach().copy_(self.piece.read(self.module.weight.detach()))

    def detach(self) -> None:
        self.bits = getattr(self.module, "slice_mask_bits", None)
        self.detached = detach_slice(self.module)

    def attach(self) -> None:
        become(self.module, "Quantized" if hasattr(self.module, "packed_names") else "Partial")
        assert self.detached is not None
        block, self.detached = self.detached, None
        attach_slice(self.module, self.piece, block, self.bits)


@dataclass
class LowRankPart:
    """Sparse and low-rank parts of one weight. `base (k,)` holds the weight's values at the support."""

    part: SparseLowRank
    module: Any
    layout: Layout
    base: Tensor | None
    seed: int
    detached: dict[str, Any] | None = None
    own_factors: tuple[nn.Parameter, nn.Parameter, float] | None = field(default=None)
    base_known: bool = True

    @property
    def param(self) -> str:
        return self.part.param

    def tensors(self) -> dict[str, Any]:
        """The trained parameters by leaf, wherever they are now."""
        if self.detached is not None:
            return {k: v for k, v in self.detached.items() if k != "sparse_index"}
        found = {n: self.module._parameters.get(n) for n in ("sparse_values", "lora_A", "lora_B")}
        return {n: p for n, p in found.items() if p is not None}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.tensors().values())

    def snapshot(self) -> Snapshot:
        return {name: p.detach().clone() for name, p in self.tensors().items()}

    def restore(self, snapshot: Snapshot) -> None:
        for name, parameter in self.tensors().items():
            parameter.detach().copy_(snapshot[name])

    def reset(self) -> None:
        self.drop_mixed_factors()
        tensors = self.tensors()
        if "lora_B" in tensors:
            tensors["lora_B"].detach().zero_()
            a = tensors["lora_A"]
            a.detach().copy_(kaiming_a(self.part, a.shape[1], self.seed))
        self.reset_sparse()

    def reset_sparse(self) -> None:
        """Base values back at the support, in the sparse values and (dense) in the weight."""
        values = self.tensors().get("sparse_values")
        if values is not None and self.base is not None:
            values.detach().copy_(self.base)
            if not isinstance(self.module, QuantizedMixin):
                self.restore_base(self.module.weight.data)

    def restore_base(self, stored: Tensor) -> None:
        if self.base is not None and self.part.index is not None:
            stored.view(-1).index_copy_(0, self.part.index.long().to(stored.device), self.base.to(stored))

    def deltas(self, snapshot: Snapshot | None = None) -> list[Delta]:
        values = self.snapshot() if snapshot is None else snapshot
        found = []
        if "sparse_values" in values and self.part.original is not None and self.base is not None:
            trained, base = values["sparse_values"].cpu(), self.base.cpu()
            change = change_of(trained, base)
            exact = correction_of(trained, base, change)
            places = self.part.original.long()
            found.append(Delta(self.param, "sparse", places, change, self.part.transposed, exact=exact))
        if "lora_A" in values:
            a, b = values["lora_A"], values["lora_B"]
            a, b = a.to(sum_dtype(a)), b.to(sum_dtype(b))
            moves = logical_moves(self.layout, leaf_of(self.param), self.part.transposed)
            if 1 in moves:
                a = a.index_select(1, moves[1][1].to(a.device))
            if 0 in moves:
                b = b.index_select(0, moves[0][1].to(b.device))
            empty = torch.empty(0, dtype=torch.int64)
            found.append(Delta(self.param, "lora", empty, b.cpu(), self.part.transposed, a.cpu(), self.part.scale))
        return found

    def fits(self, deltas: Sequence[Delta]) -> bool:
        kinds = {d.kind: d for d in deltas}
        expected = {*(["sparse"] if self.base is not None else []), *(["lora"] if self.part.rank else [])}
        if len(kinds) != len(deltas) or set(kinds) != expected:
            return False
        if "lora" in kinds and (kinds["lora"].rank != self.part.rank or kinds["lora"].scale != self.part.scale):
            return False
        return "sparse" not in kinds or (
            self.part.original is not None
            and kinds["sparse"].channels.numel() == self.part.original.numel()
            and torch.equal(kinds["sparse"].channels.sort().values, self.part.original.long().sort().values)
        )

    def on_support(self, delta: Delta, values: Tensor) -> Tensor:
        """A tensor like the values of a sparse delta on this support, in its order."""
        assert self.part.original is not None
        order = delta.channels.argsort()
        places = torch.searchsorted(delta.channels[order], self.part.original.long())
        return values[order][places]

    def factors_of(self, delta: Delta) -> tuple[Tensor, Tensor]:
        """`(A, B)` of a low-rank delta in current coordinates."""
        assert delta.a is not None
        a, b = delta.a, delta.values
        moves = logical_moves(self.layout, leaf_of(self.param), self.part.transposed)
        if 1 in moves:
            a = a.index_select(1, moves[1][0])
        if 0 in moves:
            b = b.index_select(0, moves[0][0])
        return a, b

    def fill(self, deltas: Sequence[Delta]) -> None:
        tensors = self.tensors()
        for delta in deltas:
            if delta.kind == "lora":
                a, b = self.factors_of(delta)
                tensors["lora_A"].detach().copy_(a)
                tensors["lora_B"].detach().copy_(b)
            else:
                values = tensors["sparse_values"].detach()
                assert self.base is not None
                exact = None if delta.exact is None else self.on_support(delta, delta.exact)
                change = self.on_support(delta, delta.values)
                values.copy_(changed(self.base.to(values.device), change, exact, values.dtype))

    def mix(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        """A weighted sum of deltas: sparse values add up, low-rank factors stand side by side."""
        tensors = self.tensors()
        if "sparse_values" in tensors and self.base is not None:
            values = tensors["sparse_values"]
            values.detach().copy_(self.base)
            for weight, delta in weighted:
                if delta.kind == "sparse":
                    change = self.on_support(delta, delta.values).to(values.device, values.dtype)
                    values.detach().add_(change, alpha=weight)
        self.mix_factors([(w, d) for w, d in weighted if d.kind == "lora"])

    def mix_factors(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        if "lora_A" not in self.tensors() or not weighted:
            return
        own_a, own_b = self.module.lora_A, self.module.lora_B
        pairs = [(w * d.scale, *self.factors_of(d)) for w, d in weighted]
        a = torch.cat([a for _, a, _ in pairs]).to(own_a)
        b = torch.cat([w * b for w, _, b in pairs], dim=1).to(own_b)
        self.own_factors = (own_a, own_b, self.module.scale)
        self.module.lora_A, self.module.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.module.scale = 1.0

    def drop_mixed_factors(self) -> None:
        if self.own_factors is not None:
            self.module.lora_A, self.module.lora_B, self.module.scale = self.own_factors
            self.own_factors = None

    def read_back(self) -> None:
        tensors = self.tensors()
        if "sparse_values" in tensors and self.part.index is not None:
            flat = self.module.weight.detach().reshape(-1)
            tensors["sparse_values"].detach().copy_(flat[self.part.index.long().to(flat.device)])

    def detach(self) -> None:
        settings = {"scale": self.module.scale, "mask_open": self.module.mask_open}
        self.detached = detach_parts(self.module)
        self.settings = settings

    def attach(self) -> None:
        become(self.module, "Quantized" if hasattr(self.module, "packed_names") else "SparseLowRank")
        assert self.detached is not None
        tensors, self.detached = self.detached, None
        attach_parts(self.module, self.part, tensors)
        self.module.scale, self.module.mask_open = self.settings["scale"], self.settings["mask_open"]


def leaf_of(param: str) -> str:
    return param.rpartition(".")[2]


Part = SlicePart | LowRankPart
