"""Kernel source: one translation unit per (instruction set, value type), from the templates beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Isa = Literal["avx512vnni", "avx512", "avx2", "portable"]
ISAS: tuple[Isa, ...] = ("avx512vnni", "avx512", "avx2", "portable")
LANES: dict[Isa, int] = {"avx512vnni": 16, "avx512": 16, "avx2": 8, "portable": 4}
VECTORS: dict[Isa, int] = {"avx512vnni": 4, "avx512": 4, "avx2": 2, "portable": 2}
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
FLAGS: dict[Isa, tuple[str, ...]] = {
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
        return (*common, "vnni") if self.isa == "avx512vnni" and self.value == "s8" else common


@cache
def environment() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(str(TEMPLATES))
    return jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


@cache
def generate(variant: Variant) -> str:
    """C++ source of one variant; deterministic, so that it can key the build cache."""
    template = environment().get_template("bitmask.cpp.jinja")
    isa = variant.isa
    return template.render(
        isa=isa,
        value=variant.value,
        lanes=LANES[isa],
        max_vectors=VECTORS[isa],
        activation_bytes=ACTIVATION_BYTES,
    )
