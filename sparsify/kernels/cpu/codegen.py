"""Kernel source: one translation unit per (instruction set, value type), from the templates beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sparsify.kernels.source import strict_environment

Isa = Literal["avx512bf16", "avx512vbmi2", "avx512vnni", "avx512", "avx2", "portable"]
ISAS: tuple[Isa, ...] = ("avx512bf16", "avx512vbmi2", "avx512vnni", "avx512", "avx2", "portable")
WIDE: tuple[Isa, ...] = ("avx512bf16", "avx512vbmi2", "avx512vnni", "avx512")
LANES: dict[Isa, int] = {**dict.fromkeys(WIDE, 16), "avx2": 8, "portable": 4}
VECTORS: dict[Isa, int] = {**dict.fromkeys(WIDE, 8), "avx2": 2, "portable": 2}
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
VBMI2_FLAGS = (*AVX512_FLAGS, "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2")
FLAGS: dict[Isa, tuple[str, ...]] = {
    "avx512bf16": (*VBMI2_FLAGS, "-mavx512bf16"),
    "avx512vbmi2": VBMI2_FLAGS,
    "avx512vnni": (*AVX512_FLAGS, "-mavx512vnni"),
    "avx512": AVX512_FLAGS,
    "avx2": AVX2_FLAGS,
    "portable": (),
}
BF16_KERNELS = ("dot", "pairs")  # these read and write bf16, all others fp32
INT8_KERNELS = ("vnni", "bytes")  # these round activations to 8 bits, by token
ACTIVATION_BYTES = 384 << 10  # packed activations that a range of columns may take: they stay in L2
TEMPLATES = Path(__file__).parent / "templates"


def exchanges(lanes: int) -> list[tuple[int, list[int], list[int]]]:
    """Steps of a transposition of `lanes × lanes` in registers: `(distance, low, high)` for every power of two.

    Of two rows that lie `distance` apart, `low` and `high` are the elements (counted through both rows) of the new rows."""
    found = []
    for distance in (d for d in (1, 2, 4, 8, 16) if d < lanes):
        low = [i if not i & distance else lanes + i - distance for i in range(lanes)]
        found.append((distance, low, [i + distance if not i & distance else lanes + i for i in range(lanes)]))
    return found


def rotations(lanes: int) -> list[list[int]]:
    """Rotations of a vector by 1, 2, 4, … elements: adding each in turn leaves the sum in every element."""
    return [[(i + distance) % lanes for i in range(lanes)] for distance, *_ in exchanges(lanes)]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Which source to generate. isa: instruction set; value: type of the stored values (f32, f16, bf16, s8)."""

    isa: Isa
    value: str

    def __post_init__(self) -> None:
        if self.isa not in ISAS:
            raise ValueError(f"unknown instruction set {self.isa!r}, known: {', '.join(ISAS)}")
        if self.value not in ("f32", "f16", "bf16", "s8"):
            raise ValueError(f"unknown value type {self.value!r}, known: f32, f16, bf16, s8")

    @property
    def flags(self) -> tuple[str, ...]:
        """Compiler flags that enable the instruction set."""
        return FLAGS[self.isa]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Entry points that the source exports, as `sparsify_<name>`."""
        common = ("gemv", "stream", "decompress")
        integers = ("vnni",) if self.vnni and self.value == "s8" else ("bytes",) if self.bytes else ()
        lookup = ("lookup",) if self.vbmi2 else ()
        return (*common, *integers, *lookup, *BF16_KERNELS) if self.dot else (*common, *integers, *lookup)

    @property
    def vnni(self) -> bool:
        """Whether bytes are multiplied four at a time."""
        return self.vbmi2 or self.isa == "avx512vnni"

    @property
    def bytes(self) -> bool:
        """Whether bytes are multiplied in pairs."""
        return self.isa == "avx2" and self.value == "s8"

    @property
    def vbmi2(self) -> bool:
        """Whether bytes and words are expanded and compressed in one instruction."""
        return self.isa in ("avx512bf16", "avx512vbmi2")

    @property
    def dot(self) -> bool:
        """Whether bf16 values are multiplied in pairs with bf16 activations."""
        return self.isa == "avx512bf16" and self.value == "bf16"


@cache
def generate(variant: Variant) -> str:
    """C++ source of one variant; deterministic, so that it can key the build cache."""
    template = strict_environment(TEMPLATES).get_template("bitmask.cpp.jinja")
    isa = variant.isa
    return template.render(
        isa=isa,
        avx512=isa.startswith("avx512"),
        vnni=variant.vnni,
        bytes=variant.bytes,
        vbmi2=variant.vbmi2,
        dot=variant.dot,
        value=variant.value,
        lanes=LANES[isa],
        max_vectors=VECTORS[isa],
        activation_bytes=ACTIVATION_BYTES,
    )
