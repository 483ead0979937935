"""Every GPU kernel compiled for architectures that are not here: no spills, wide loads, registers, and instructions per
nonzero under a ceiling, read from the machine code. The default run compiles what decode and training use most; the rest is slow.

The budget that the ceilings answer to: an H200 issues 29.6 T lane-instructions/s and reads 4.3 TB/s, so at the roofline a
stream of 2.5 bytes per nonzero leaves 17 instructions per nonzero, of 3 bytes 20 and of 1.5 bytes (int8) 10.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from sparsify.kernels.gpu.launch import blocks_tile, quantized_tile
from sparsify.kernels.gpu.offline import Compiled, compile_kernel
from sparsify.kernels.gpu.spec import Epilogue, KernelSpec
from sparsify.kernels.gpu.tiles import choose_tile

FULL = Epilogue(bias=True, activation="silu", residual=True)
#: instructions of the loop per nonzero on sm_90, by tokens (measured in the machine code, plus at most 5 %)
CEILING = {1: 11.0, 2: 13.2, 4: 18.0, 8: 26.4, 16: 44.0}
REGISTERS = {1: 40, 2: 40, 4: 40, 8: 48, 16: 72}


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def stream(
    target: str, tokens: int = 1, value: str = "bf16", width: int = 8, form: str = "gaps", **rest: object
) -> KernelSpec:
    tile = choose_tile("stream", tokens, target)
    x = str(rest.pop("x", "bf16" if value == "int8" else value))
    fields = {"value": value, "x": x, "out": x, "format": form, "width": width, "tokens": tokens, **rest}
    return KernelSpec(op="stream", target=target, tile=tile, **fields)  # type: ignore[arg-type]


def per_nonzero(compiled: Compiled, spec: KernelSpec) -> float:
    return len(compiled.loop) / (spec.tile.unroll * spec.width)


def check_stream(spec: KernelSpec, ceiling: float) -> None:
    compiled = compile_kernel(spec)
    assert compiled.spills == 0
    assert compiled.registers <= REGISTERS[spec.tokens]
    assert per_nonzero(compiled, spec) <= ceiling
    assert not any(compiled.count(name) for name in ("LDS", "STS", "SHFL", "BAR", "LDL", "STL"))
    chunk = {16: "LDG.E.128", 8: "LDG.E.64", 4: "LDG.E"}[spec.words * 4]
    assert compiled.loads[chunk] >= spec.tile.unroll
    gathers = spec.tile.unroll * spec.width * max(1, spec.tokens // spec.tokens_at_once)
    others = 3 if spec.format == "gaps" else 2  # values, meta, base
    assert sum(compiled.loads.values()) == gathers + others * spec.tile.unroll


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(("value", "form"), [("bf16", "gaps"), ("int8", "gaps"), ("bf16", "two_four")])
def test_stream_on_hopper(tokens: int, value: str, form: str) -> None:
    check_stream(stream("sm_90", tokens, value, form=form), CEILING[tokens])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize(
    ("value", "x", "width", "form"),
    [
        ("bf16", "bf16", 8, "gaps"),
        ("fp16", "fp16", 8, "gaps"),
        ("int8", "bf16", 8, "gaps"),
        ("int8", "fp16", 8, "gaps"),
        ("bf16", "bf16", 8, "two_four"),
        ("fp16", "fp16", 8, "two_four"),
        ("int8", "bf16", 8, "two_four"),
    ],
)
def test_every_stream_on_hopper(tokens: int, group: int, value: str, x: str, width: int, form: str) -> None:
    check_stream(stream("sm_90", tokens, value, width, form, x=x, group=group), CEILING[tokens])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("value", ["bf16", "fp16", "int8", "fp32"])
def test_chunks_of_four_on_hopper(tokens: int, value: str) -> None:
    """Fewer values carry the decoding of a chunk, up to three instructions more each; fp32 needs no widening."""
    check_stream(stream("sm_90", tokens, value, 4), CEILING[tokens] + 3.1)


def test_the_ceiling_is_felt() -> None:
    """The same kernel with one extra instruction per nonzero breaks the ceiling: the count is of the right loop."""
    spec = stream("sm_90")
    compiled = compile_kernel(spec)
    assert compiled.count("FFMA") == spec.tile.unroll * spec.width
    assert CEILING[1] - per_nonzero(compiled, spec) < 1


@pytest.mark.parametrize("tokens", [1, 2])
def test_epilogues_stay_outside_of_the_loop(tokens: int) -> None:
    plain = compile_kernel(stream("sm_90", tokens))
    spec = stream("sm_90", tokens, epilogue=replace(FULL, gated=True))
    fused = compile_kernel(spec)
    assert fused.spills == 0
    assert abs(len(fused.loop) - len(plain.loop)) <= 2  # a move more or less
    assert len(fused.instructions) > len(plain.instructions)


def others(target: str) -> dict[str, KernelSpec]:
    """One spec per operator and shape class besides the streams."""

    def spec(op: str, count: int = 1, x: str = "bf16", **fields: object) -> KernelSpec:
        tile = choose_tile(op, count, target, x)  # type: ignore[arg-type]
        if op == "blocks":
            tile = blocks_tile(count, target, int(str(fields["group"])), int(str(fields["width"])))
        return KernelSpec(op=op, target=target, tile=tile, x=x, **fields)  # type: ignore[arg-type]

    return {
        "expand": spec("expand", format="gaps"),
        "expand two_four int8": spec("expand", format="two_four", value="int8"),
        "blocks 16": spec("blocks", width=16, group=16, epilogue=FULL),
        "blocks 64": spec("blocks", width=64, group=64, epilogue=FULL),
        "blocks 64 batch": spec("blocks", 16, width=64, group=64, tokens=16, epilogue=FULL),
        "blocks 64 int8 batch": spec("blocks", 16, width=64, group=64, tokens=16, value="int8", epilogue=FULL),
        "blocks 64 prefill": spec("blocks", 999, width=64, group=64, tokens=16, epilogue=FULL),
        "partial_grad": spec("partial_grad", gather=True, out="fp32"),
        "partial_grad fp32": spec("partial_grad", x="fp32", gather=True, out="fp32"),
        "sampled_tile": spec("sampled_tile", out="fp32"),
        "sampled_tile fp32": spec("sampled_tile", x="fp32", out="fp32"),
        "sampled_entries": spec("sampled_entries", out="fp32"),
        "write_values": spec("write_values", x="fp32", out="bf16"),
        **{f"adapter {f}": spec("adapter_axpys", format=f, group=64) for f in ("columns", "lowrank", "bias")},
        "adapter columns fp32": spec("adapter_axpys", x="fp32", value="fp32", out="fp32", format="columns", group=64),
        **{f"adapter dots {f}": spec("adapter_dots", format=f, group=64) for f in ("rows", "lowrank")},
        "adapter dots fp32": spec("adapter_dots", x="fp32", value="fp32", out="fp32", format="rows", group=64),
        "adapter sparse": spec("adapter_sparse", group=64),
    }


# --- quantised bases --------------------------------------------------------------------------------------------------


#: instructions of the loop per weight on sm_90, by format and tokens (measured in the machine code, plus at most 5 %)
QUANTIZED_CEILING = {
    ("nf4", 1): 6.4, ("int4", 1): 5.4, ("int8", 1): 3.7,
    ("nf4", 16): 9.4, ("int4", 16): 7.2, ("int8", 16): 8.5,
    ("nf4", 64): 10.6, ("int4", 64): 8.8, ("int8", 64): 9.0,
}  # fmt: skip


def quantized(target: str, format: str, tokens: int, x: str = "bf16", parts: bool = True) -> KernelSpec:
    """Over 4096 columns; parts: with a support, a low-rank part and a bias."""
    tile = quantized_tile(tokens, 4096, target, x, format)
    fields = {"format": format, "tokens": min(tokens, 16), "sparse": parts, "low_rank": parts}
    return KernelSpec(op="quantized", target=target, tile=tile, x=x, out=x, epilogue=Epilogue(bias=parts), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("format", "tokens"), list(QUANTIZED_CEILING))
def test_quantized_bases_on_hopper(format: str, tokens: int) -> None:
    """One token: a thread reads 16 bytes of every row, and the parts stay outside of the loop. More: tensor cores."""
    spec = quantized("sm_90", format, tokens, parts=False)
    compiled = compile_kernel(spec)
    lanes = 32 * spec.tile.warps
    read = (16 if format == "int8" else 32) if tokens == 1 else 64 / lanes
    assert compiled.spills == 0
    assert compiled.registers <= (104 if tokens < 64 else 128)
    assert len(compiled.loop) / (spec.tile.rows * read) <= QUANTIZED_CEILING[format, tokens]
    lookups = {1: 32 * spec.tile.rows, 16: 32, 64: 32}[tokens] if format == "nf4" else 0
    assert compiled.loads["LDG.E"] >= lookups
    if tokens == 1:
        assert compiled.loads["LDG.E.128"] >= spec.tile.rows
        assert not any(compiled.count(name) for name in ("LDS", "STS", "BAR", "LDL", "STL"))
        whole = compile_kernel(quantized("sm_90", format, tokens))
        assert whole.spills == 0
        assert abs(len(whole.loop) - len(compiled.loop)) <= 0.05 * len(compiled.loop)
    else:
        assert compiled.count("HGMMA") or compiled.count("HMMA")
        assert not any(name.startswith("LDGSTS") for name in compiled.loads if format == "nf4")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("format", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
def test_quantized_bases_everywhere(target: str, tokens: int, format: str, x: str) -> None:
    compiled = compile_kernel(quantized(target, format, tokens, x))
    assert compiled.spills == 0
    assert 0 < compiled.registers <= 240


MOST_REGISTERS = 208
MANY_REGISTERS = {"sm_80": 96, "sm_100": 96, "sm_120": 96, "gfx942": 160}  # of streams; gfx942 has 512 per lane
TENSOR_CORES = {"sm_80": ("HMMA",), "sm_90": ("HMMA", "HGMMA"), "sm_100": ("HMMA", "UTCHMMA")}
QUICK = ("expand", "blocks 16", "blocks 64 batch", "partial_grad", "sampled_tile", "sampled_entries", "write_values",
         "adapter columns", "adapter dots rows", "adapter sparse")  # fmt: skip


def check_other(name: str, target: str) -> Compiled:
    compiled = compile_kernel(others(target)[name])
    assert compiled.spills == 0, name
    assert 0 < compiled.registers <= MOST_REGISTERS, name
    assert len(compiled.binary) > 1000
    if target in TENSOR_CORES and "fp32" not in name and ("batch" in name or name in ("partial_grad", "sampled_tile")):
        assert any(compiled.count(unit) for unit in TENSOR_CORES[target]), name
    return compiled


@pytest.mark.parametrize("name", QUICK)
def test_kernels_on_hopper(name: str) -> None:
    compiled = check_other(name, "sm_90")
    widest = {
        "expand": "LDG.E.128",
        "blocks 16": "LDG.E.128",
        "blocks 64 batch": "LDGSTS.E.BYPASS.128",
        "partial_grad": "LDGSTS.E.BYPASS.128",
        "sampled_tile": "LDGSTS.E.BYPASS.128",
    }
    if name in widest:
        assert compiled.loads[widest[name]] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("name", list(others("sm_90")))
def test_kernels_everywhere(target: str, name: str) -> None:
    check_other(name, target)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_stream_elsewhere(target: str) -> None:
    compiled = compile_kernel(stream(target, 8, epilogue=FULL))
    assert compiled.spills == 0
    assert 0 < compiled.registers <= MANY_REGISTERS[target]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
@pytest.mark.parametrize(
    ("value", "form"), [("bf16", "gaps"), ("fp16", "gaps"), ("int8", "gaps"), ("bf16", "two_four")]
)
def test_every_stream_elsewhere(target: str, tokens: int, value: str, form: str) -> None:
    compiled = compile_kernel(stream(target, tokens, value, form=form))
    assert compiled.spills == 0
    assert 0 < compiled.registers <= MANY_REGISTERS[target]
