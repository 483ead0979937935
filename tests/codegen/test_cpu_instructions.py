"""What the compiler made of the generated source: read from the built libraries, so no processor with these instructions is needed."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from sparsify.kernels.cpu.build import BuildError, compile_library
from sparsify.kernels.cpu.codegen import Variant, generate

EXPANDS = re.compile(r"\t(vp?(?:expand|compress)\w+) +(\S.*)")
EXPECTED = {
    "f32": {"vexpandps", "vpcompressb"},
    "s8": {"vpexpandb", "vpcompressb"},
    "bf16": {"vpexpandw", "vpcompressb"},
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is x86's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.parametrize("value", [pytest.param(v, marks=[pytest.mark.slow] if v == "bf16" else []) for v in EXPECTED])
def test_no_expand_waits_for_the_one_before(value: str) -> None:
    """An expand or compress in the zeroing form into a register that others use too makes a chain of them on Zen 4, which took
    6.3 instead of 3.5 cycles per 64 int8 weights; the merging form into a register just zeroed does not. No memory form."""
    variant = Variant(isa="avx512bf16", value=value)
    try:
        library = compile_library(generate(variant), variant.flags)
    except BuildError as error:
        pytest.skip(str(error))
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True
    ).stdout
    found = [match.groups() for match in map(EXPANDS.search, listing.splitlines()) if match]
    assert EXPECTED[value] <= {name for name, _ in found}
    chained = [f"{name} {operands}" for name, operands in found if "{z}" in operands or "(%" in operands]
    assert not chained
