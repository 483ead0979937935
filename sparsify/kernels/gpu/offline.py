"""Compile a kernel for an architecture that is not here, and read what the compiler made of it.

    KernelSpec ──triton.compile──▶ PTX, cubin ──ptxas -v, cuobjdump──▶ registers, spills, loads, instructions of the loop

A performance check that needs no GPU: it sees instructions and widths, not latency or bank conflicts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sparsify.kernels.gpu.build import import_source
from sparsify.kernels.gpu.codegen import generate, parameters
from sparsify.kernels.gpu.spec import KernelSpec

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
MULTIPLES = {"rows", "cols", "outputs", "words", "a_stride", "b_stride", "row_stride", "length"}
TARGET = re.compile(r"(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel. binary: cubin or hsaco.

    registers per thread; spills in bytes; shared memory in bytes, the static part; instructions: of the whole kernel,
    in order; loop: of its largest loop. AMD targets have no instruction list: the wheel brings no disassembler for them.
    """

    binary: bytes
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: tuple[str, ...] = ()
    loop: tuple[str, ...] = ()

    def count(self, prefix: str) -> int:
        """Instructions of the loop whose name starts so."""
        return sum(name.startswith(prefix) for name in self.loop)

    @property
    def loads(self) -> Counter[str]:
        """Global loads of the loop by name, such as LDG.E.128."""
        return Counter(name for name in self.loop if name.startswith(("LDG", "LDGSTS", "UBLKCP")))


def compile_kernel(spec: KernelSpec) -> Compiled:
    """Compile one kernel for `spec.target` with no GPU present, for sizes that are multiples of 16 (as the launcher would
    specialise them)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = parameters(spec)
    kernel = import_source(generate(spec)).kernel
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type) in enumerate(types.items())
        if type.startswith("*") or name in MULTIPLES
    }
    options = {"num_warps": spec.tile.warps, "num_stages": spec.tile.stages}
    if spec.target.startswith("gfx"):
        target = GPUTarget("hip", spec.target, 64)
        built = triton.compile(ASTSource(kernel, types, {}, aligned), target=target, options=options)
        return read_amd(built.asm["hsaco"], built.asm["amdgcn"])
    target = GPUTarget("cuda", int(spec.target.removeprefix("sm_")), 32)
    built = triton.compile(ASTSource(kernel, types, {}, aligned), target=target, options=options)
    return read_cubin(built.asm["cubin"])


def read_amd(binary: bytes, assembly: str) -> Compiled:
    """Registers and spills stand in the kernel's metadata; there is no disassembly to count."""
    usage = dict(
        re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|group_segment_fixed_size):\s*(\d+)", assembly)
    )
    spills = 4 * (int(usage["vgpr_spill_count"]) + int(usage["sgpr_spill_count"]))
    return Compiled(binary, int(usage["vgpr_count"]), spills, int(usage["group_segment_fixed_size"]))


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_cubin(cubin: bytes) -> Compiled:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        run = [tool("cuobjdump"), "-res-usage", "-sass", str(path)]
        text = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    lines = [m for m in (INSTRUCTION.match(line) for line in text.splitlines()) if m]
    addresses = [int(m[1], 16) for m in lines]
    names = tuple(m[2] for m in lines)
    spills = int(usage.get("STACK", 0)) + int(usage.get("LOCAL", 0))
    return Compiled(
        cubin, int(usage["REG"]), spills, int(usage.get("SHARED", 0)), names, largest_loop(lines, addresses, names)
    )


def largest_loop(lines: list[re.Match[str]], addresses: list[int], names: tuple[str, ...]) -> tuple[str, ...]:
    """Instructions between the target of a backward branch and the branch, for the longest that contains no other loop."""
    loops = []
    for end, match in enumerate(lines):
        found = TARGET.search(match[3]) if match[2].startswith("BRA") else None
        if found and int(found[1], 16) < addresses[end]:
            loops.append((addresses.index(int(found[1], 16)), end + 1))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    start, stop = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return tuple(name for name in names[start:stop] if not name.startswith("NOP"))
