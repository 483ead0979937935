"""What a generated kernel is: `KernelSpec` names everything that its source depends on, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

Op = Literal[
    "stream",
    "expand",
    "blocks",
    "quantized",
    "partial_grad",
    "sampled_tile",
    "sampled_entries",
    "write_values",
    "adapter_axpys",
    "adapter_dots",
    "adapter_sparse",
]
OPS: tuple[Op, ...] = get_args(Op)
FORMATS = {
    "stream": ("gaps", "two_four"),
    "expand": ("gaps", "two_four"),
    "quantized": ("nf4", "int8", "int4"),
    "adapter_axpys": ("columns", "lowrank", "bias"),
    "adapter_dots": ("rows", "lowrank"),
}
DTYPES = ("bf16", "fp16", "fp32", "int8")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1}


def is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What happens to a result before it is stored: act(scale · y + bias) (· up) + residual.

    gated: the first half of a group's lanes is gate, the second up: the result is act(gate) · up.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}, known: {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How the work of one program is cut; which fields count depends on the operator.

    rows, cols, depth: of the tile of the result, and of the reduction axis that is read at once.
    unroll: chunks that every thread reads before the first is used (blocks, one token: stored tiles read at once).
    warps: of 32 threads (64 on AMD), one chunk each. stages: depth of software pipelining.
    """

    rows: int = 1
    cols: int = 1
    depth: int = 1
    unroll: int = 1
    warps: int = 4
    stages: int = 1

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if (
                not isinstance(value, int)
                or value < 1
                or (spec.name not in ("unroll", "stages") and not is_power(value))
            ):
                raise ValueError(f"Tile({spec.name}={value}): a power of two is needed")


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel.

    op: which template. target: the architecture, which decides tiles but not meaning.
    value, x, out: types of the stored weight, the other operand, and the result.
    format, width, group: of a packed weight (`formats.Stream`); for blocks, `width` and `group` are a tile's sides; for
        quantized, `format` is the library's ("nf4", "int8", "int4"); for adapters it is what is added, and `group` a power of two
        that no number of slots exceeds.
    tokens: columns of x that one program multiplies, a power of two up to 16 (blocks, quantized: 1, or 16 with tensor cores).
    gather: partial_grad: whether the columns of the first operand are picked by an index.
    sparse, low_rank: quantized: whether entries are replaced at a support, and whether a low-rank product is added.
    index_bits: quantized, sampled_entries, write_values: 32 or 64, of the flat index.
    """

    op: Op
    target: str
    tile: Tile
    value: str = "bf16"
    x: str = "bf16"
    out: str = "bf16"
    format: str = ""
    width: int = 8
    group: int = 16
    tokens: int = 1
    gather: bool = False
    sparse: bool = False
    low_rank: bool = False
    index_bits: int = 32
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"unknown operator {self.op!r}, known: {', '.join(OPS)}")
        for name in ("width", "group", "tokens", "index_bits"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}: {getattr(self, name)!r} is no number")
        if self.target not in TARGETS:
            raise ValueError(f"unknown target {self.target!r}, known: {', '.join(TARGETS)}")
        for name in ("value", "x", "out"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}: unknown type {getattr(self, name)!r}, known: {', '.join(DTYPES)}")
        if "int8" in (self.x, self.out):
            raise ValueError("int8 is a type of stored weights only")
        known = FORMATS.get(self.op, ("",))
        if self.format not in known:
            raise ValueError(f"unknown format {self.format!r}, known: {', '.join(known) or 'none'}")
        if self.index_bits not in (32, 64):
            raise ValueError(f"index of {self.index_bits} bits, expected 32 or 64")
        if not is_power(self.tokens) or self.tokens > 16:
            raise ValueError(f"tokens {self.tokens}: a power of two up to 16 is needed")

    @property
    def threads(self) -> int:
        """Threads of a program, and chunks that it reads at once (stream, expand)."""
        return self.tile.warps * (64 if self.target.startswith("gfx") else 32)

    @property
    def positions(self) -> int:
        """Chunks of one row that a program reads at once."""
        return self.threads // self.group

    @property
    def words(self) -> int:
        """32-bit words of values in one chunk."""
        return self.width * BYTES[self.value] // 4

    @property
    def tokens_at_once(self) -> int:
        """Columns of x in one load of at most 16 bytes per thread: a second load instead of a second thread."""
        return min(self.tokens, 16 // BYTES[self.x])
