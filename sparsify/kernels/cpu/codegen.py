"""Kernel source: one translation unit per (instruction set, value type), from the templates beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sparsify.kernels.source import strict_environment

Isa = Literal["avx512vbmi2", "avx512vnni", "avx512", "avx2", "portable"]
ISAS: tuple[Isa, ...] = ("avx512vbmi2", "avx512vnni", "avx512", "avx2", "portable")
LANES: dict[Isa, int] = {"avx512vbmi2": 16, "avx512vnni": 16, "avx512": 16, "avx2": 8, "portable": 4}
VECTORS: dict[Isa, int] = {"avx512vbmi2": 8, "avx512vnni": 8, "avx512": 8, "avx2": 2, "portable": 2}
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
FLAGS: dict[Isa, tuple[str, ...]] = {
    "avx512vbmi2": (*AVX512_FLAGS, "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2"),
    "avx512vnni": (*AVX512_FLAGS, "-mavx512vnni"),
    "avx512": AVX512_FLAGS,
    "avx2": AVX2_FLAGS,
    "portable": (),
}
ACTIVATION_BYTES = 384 << 10  # packed activations that a range of columns may take: they stay in L2
TEMPLATES = Path(__file__).parent / "templates"


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
        integers = ("vnni",) if self.vnni and self.value == "s8" else ()
        return (*common, *integers, "lookup") if self.isa == "avx512vbmi2" else (*common, *integers)

    @property
    def vnni(self) -> bool:
        """Whether bytes are multiplied four at a time."""
        return self.isa in ("avx512vbmi2", "avx512vnni")


@cache
def generate(variant: Variant) -> str:
    """C++ source of one variant; deterministic, so that it can key the build cache."""
    template = strict_environment(TEMPLATES).get_template("bitmask.cpp.jinja")
    isa = variant.isa
    return template.render(
        isa=isa,
        avx512=isa.startswith("avx512"),
        vnni=variant.vnni,
        vbmi2=isa == "avx512vbmi2",
        value=variant.value,
        lanes=LANES[isa],
        max_vectors=VECTORS[isa],
        activation_bytes=ACTIVATION_BYTES,
    )
