"""A step bound to a host: addresses of its weights, the kernels that serve them, scratch; and whether all that still holds.

    Decoder (places) + host (modules) ──bind──▶ Binding: linears, tensors, one library; `valid()` before every step

Nothing is packed again: the kernels read the host's packed tensors where they lie. A weight in oneDNN's layout, which nothing else can
read, is kept a second time, dense; the report says how much that is.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import nn

from sparsify.kernels.cpu import huge_pages
from sparsify.kernels.cpu.build import BuildError
from sparsify.kernels.cpu.dispatch import ACTIVATIONS, LayerStruct, best_isa, bucket, serves
from sparsify.kernels.cpu.step.library import LinearStruct, StepStruct, load_step
from sparsify.kernels.cpu.step.operations import Attend, Decoder, Embed, Norm, Pointwise, Product
from sparsify.kernels.cpu.step.source import StepSource, aligned, generate_step
from sparsify.kernels.fallback import switched_on
from sparsify.lowering.cpu.native.layout import Unknown
from sparsify.lowering.cpu.native.structure import Snapshot
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.model.linears import is_conv1d, is_plain_linear

LEAST = 64  # rows that a thread takes at a time, at least
PIECES = 4  # of a product, for each thread, where it has so many rows
TRAINING = attrgetter("training")
HOOKS = (attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks"))


@dataclass
class Arena:
    """Scratch of one step: what the threads share, and each thread's own."""

    shared: torch.Tensor
    own: torch.Tensor
    own_size: int
    scores: int


@dataclass
class Binding:
    """See the module docstring. held: every tensor that the step reads."""

    host: nn.Module
    decoder: Decoder
    code: StepSource
    library: ctypes.CDLL
    modules: list[nn.Module]
    held: list[torch.Tensor] = field(default_factory=list)
    copies: list[torch.Tensor] = field(default_factory=list)
    tables: dict[tuple[int, int], ctypes.Array[LinearStruct]] = field(default_factory=dict)
    arenas: list[Arena] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tensors = [self.tensor(name) for name in self.decoder.tensors]
        self.check_shapes()
        self.addresses = (ctypes.c_void_p * max(1, len(self.tensors)))(*[t.data_ptr() for t in self.tensors])
        self.dense = {
            name: self.dense_weight(module) for name, module in zip(self.decoder.linears, self.modules, strict=True)
        }
        for module in self.modules:
            if isinstance(module, SparseLinear) and not module.as_prepared():
                module.prepare()
        self.snapshot = Snapshot(self.host)
        self.held = self.snapshot.there
        self.numbers = [(self.found(name), value) for name, value in self.decoder.numbers.items()]
        if not self.as_numbers():
            raise Unknown("a tensor of which the step was generated, and that has other values now")

    def found(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.host.get_submodule(owner), leaf)

    def as_numbers(self) -> bool:
        """Whether tensors that stand in the source as numbers have these values still; writes through `.data` have no version."""
        return all(torch.equal(tensor, value) for tensor, value in self.numbers)

    def tensor(self, name: str) -> torch.Tensor:
        found = self.found(name)
        if not plain_float(found):
            raise Unknown(f"{name} is not contiguous float32 on the CPU")
        return found.detach()

    def check_shapes(self) -> None:
        """Raises Unknown where a tensor or a linear has not the sizes that the source was made for."""
        for op in self.decoder.operations:
            fits = True
            match op:
                case Embed():
                    fits = tuple(self.tensors[op.table].shape) == (op.entries, op.out.width)
                case Norm():
                    fits = all(self.tensors[n].numel() == op.width for n in (op.weight, op.bias) if n is not None)
                case Product():
                    fits = sizes(self.modules[op.linear]) == (op.inputs, op.out.width)
                case Pointwise():
                    fits = all(self.tensors[n].numel() == op.out.width for n in op.inputs if isinstance(n, int))
            if not fits:
                raise Unknown("a weight that has another shape than when it was lowered")

    def hooks(self) -> int:
        """How many forward hooks stand on modules below the root."""
        below = self.snapshot.tree[1:]
        return sum(sum(map(len, map(hooks, below))) for hooks in HOOKS)

    def valid(self) -> bool:
        """Whether the host computes with the tensors, modules, settings and hooks that it was bound with."""
        return (
            self.snapshot.same()
            and not any(map(TRAINING, self.snapshot.tree))
            and self.hooks() == 0
            and self.as_numbers()
        )

    # --- linears --------------------------------------------------------------------------------------------------------------

    def dense_weight(self, module: nn.Module) -> torch.Tensor | None:
        """The dense weight of a linear that is not packed. Raises Unknown where it, or its bias, is not contiguous float32 on the CPU."""
        if isinstance(module, SparseLinear):
            return None
        bias = getattr(module, "bias", None)
        if bias is not None and not plain_float(bias):
            raise Unknown("a bias that is not contiguous float32 on the CPU")
        if isinstance(module, PrepackedLinear):
            if module.dtype != torch.float32:
                raise Unknown(f"a dense weight in {module.dtype}")
            weight = huge_pages.in_huge_pages(module.blocked.to_dense().contiguous())
            self.copies.append(weight)
            return weight
        weight = module.weight
        if not is_plain_linear(module) or not isinstance(weight, torch.Tensor):
            raise Unknown(f"a linear of class {type(module).__name__}")
        if not plain_float(weight):
            raise Unknown("a dense weight that is not contiguous float32 on the CPU")
        return weight.detach()

    def linears(self, tokens: int, threads: int) -> ctypes.Array[LinearStruct]:
        """The table of linears for a number of tokens."""
        key = (bucket(tokens), threads)
        if key not in self.tables:
            made = [
                self.linear(name, module, tokens, threads)
                for name, module in zip(self.decoder.linears, self.modules, strict=True)
            ]
            self.tables[key] = (LinearStruct * len(made))(*made)
        return self.tables[key]

    def linear(self, name: str, module: nn.Module, tokens: int, threads: int) -> LinearStruct:
        if isinstance(module, SparseLinear):
            if module.kernels is None:
                raise BuildError("a packed linear has no kernels")
            choice = serves(module.choice(tokens), torch.float32, tokens)
            entry = getattr(module.kernels.library, f"sparsify_{choice.kernel}")
            rows = module.packed.rows
            chunk = chunk_of(rows, threads, LEAST if choice.kernel in ("gemv", "lookup") else 2 * LEAST)
            return LinearStruct(ctypes.cast(entry, ctypes.c_void_p), module.layer, choice.row_tile, chunk, None, 0)
        weight = self.dense[name]
        assert weight is not None
        transposed = is_conv1d(module) and not isinstance(module, PrepackedLinear)
        rows, cols = weight.shape[::-1] if transposed else weight.shape
        bias = getattr(module, "bias", None)
        layer = LayerStruct(
            rows=rows, cols=cols, bias=None if bias is None else bias.data_ptr(), activation=ACTIVATIONS["none"]
        )
        return LinearStruct(None, layer, 0, chunk_of(rows, threads, LEAST), weight.data_ptr(), int(transposed))

    # --- scratch --------------------------------------------------------------------------------------------------------------

    def arena(self, rows: int, threads: int, tokens: int) -> Arena:
        """Scratch for rows of tokens and a cache of `tokens`; give it back to `arenas`."""
        try:
            found = self.arenas.pop()
        except IndexError:
            found = Arena(huge_pages.zeros((0,), torch.float32), huge_pages.zeros((0,), torch.float32), 0, 0)
        widest = max((op.width for op in self.decoder.operations if isinstance(op, Attend)), default=0)
        kept = max(op.x.width for op in self.decoder.operations if isinstance(op, Product) and op.logits)
        scores = aligned(self.code.own * rows)
        own = scores + aligned(max(aligned(widest) + tokens, kept * rows)) + aligned(16)
        if found.shared.numel() < self.code.shared * rows or found.own.numel() < own * threads:
            found.shared = huge_pages.zeros((aligned(self.code.shared * rows) + 16,), torch.float32)
            found.own = huge_pages.zeros((own * threads,), torch.float32)
        found.own_size, found.scores = own, scores
        return found

    def run(self, tokens: torch.Tensor, positions: torch.Tensor, first: torch.Tensor, cache: torch.Tensor, capacity: int, past: int,
            keep: int, logits: torch.Tensor) -> int:  # fmt: skip
        """One step: tokens, positions (batch, length), first (batch,), all int64 and contiguous; logits (batch, keep, outputs) is written.
        Returns the status (0: done)."""
        batch, length = tokens.shape
        threads = torch.get_num_threads()
        arena = self.arena(batch * length, threads, past + length)
        table = self.linears(batch * length, threads)
        call = StepStruct(
            tokens.data_ptr(), positions.data_ptr(), first.data_ptr(), cache.data_ptr(), capacity, past, batch, length, keep,
            logits.data_ptr(), ctypes.addressof(table), ctypes.addressof(self.addresses), arena.shared.data_ptr(), arena.own.data_ptr(),
            arena.own_size, arena.scores, threads, 0,
        )  # fmt: skip
        status = self.library.sparsify_step(ctypes.addressof(call))
        self.arenas.append(arena)
        return status


def plain_float(tensor: object) -> bool:
    """Whether an address and a number of floats say all of a tensor."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return False
    assert isinstance(tensor, torch.Tensor)
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear."""
    if isinstance(module, SparseLinear | PrepackedLinear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, cols = weight.shape if not is_conv1d(module) else weight.shape[::-1]
    return int(cols), int(rows)


def chunk_of(rows: int, threads: int, least: int) -> int:
    """Rows a piece: a multiple of `least`, some pieces for each thread."""
    return max(least, rows // (PIECES * threads) // least * least)


def bind(host: nn.Module, decoder: Decoder) -> Binding:
    """Raises BuildError where nothing can be built, Unknown where the host holds what the step cannot read."""
    if not switched_on():
        raise BuildError("kernels are switched off (SPARSIFY_KERNELS)")
    isa = best_isa()
    code = generate_step(decoder, isa)
    modules = [host.get_submodule(name) for name in decoder.linears]
    return Binding(host, decoder, code, load_step(code.source, isa), modules)


__all__ = ["Binding", "bind"]
