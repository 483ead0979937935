"""Kernel source: `KernelSpec` → one Triton module, from the templates beside this file; deterministic, so that it can be hashed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sparsify.kernels.gpu.formats import FIRST_BITS, GAP_BITS
from sparsify.kernels.gpu.spec import KernelSpec
from sparsify.kernels.source import strict_environment

TEMPLATES = Path(__file__).parent / "templates"
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "int8": "*i8"}
READ = {**POINTERS, "bf16": "*i16"}  # bf16 that is only read goes in as 16-bit integers, see macros.jinja


def parameters(spec: KernelSpec) -> dict[str, str]:
    """Name → Triton type of every argument of the kernel, in order. Pointers are to 16-byte aligned, contiguous data."""
    return PARAMETERS[spec.op](spec)


def stream_parameters(spec: KernelSpec) -> dict[str, str]:
    paired = spec.x == "bf16" and spec.tokens > 1
    found = {
        "x_ptr": "*i32" if paired else READ[spec.x],
        "values_ptr": "*i32",
        "meta_ptr": "*i32",
        "base_ptr": "*i16",
        "start_ptr": "*i64",
    }
    if spec.format == "two_four":
        found["meta_ptr"] = "*i16"
        del found["base_ptr"]
    found["order_ptr"] = "*i32"
    if spec.value == "int8":
        found["scale_ptr"] = "*fp32"
    if spec.epilogue.bias:
        found["bias_ptr"] = READ[spec.x]
    if spec.epilogue.residual:
        found["residual_ptr"] = READ[spec.x]
    return {**found, "y_ptr": POINTERS[spec.out], "rows": "i32", "outputs": "i32", "tokens": "i32"}


def expand_parameters(spec: KernelSpec) -> dict[str, str]:
    found = {"values_ptr": "*i32", "meta_ptr": "*i32", "base_ptr": "*i16", "start_ptr": "*i64", "order_ptr": "*i32"}
    if spec.format == "two_four":
        found["meta_ptr"] = "*i16"
        del found["base_ptr"]
    if spec.value == "int8":
        found["scale_ptr"] = "*fp32"
    dense = POINTERS[spec.out] if spec.value == "int8" else "*i32" if spec.value == "fp32" else "*i16"
    return {**found, "dense_ptr": dense, "rows": "i32", "cols": "i32"}


def blocks_parameters(spec: KernelSpec) -> dict[str, str]:
    pointers = READ if spec.tokens == 1 else POINTERS
    found = {"x_ptr": pointers[spec.x], "values_ptr": pointers[spec.value], "column_ptr": "*i32", "start_ptr": "*i64"}
    if spec.value == "int8":
        found["scale_ptr"] = "*fp32"
    if spec.epilogue.bias:
        found["bias_ptr"] = READ[spec.x]
    if spec.epilogue.residual:
        found["residual_ptr"] = READ[spec.x]
    return {**found, "y_ptr": POINTERS[spec.out], "cols": "i32", "outputs": "i32", "tokens": "i32"}


def quantized_parameters(spec: KernelSpec) -> dict[str, str]:
    one = spec.tokens == 1
    if one:  # x by words, and by entries for the support
        found = {"x_ptr": "*fp32" if spec.x == "fp32" else "*i32", "entry_ptr": READ[spec.x]}
    else:
        found = {"x_ptr": POINTERS[spec.x]}
    found["data_ptr"] = "*i32"
    if not one:
        found["bytes_ptr"] = "*i8" if spec.format == "int8" else "*u8"
    if spec.format == "nf4":
        found |= {"absmax_ptr": "*u8", "nested_ptr": "*fp32", "nested_code_ptr": "*fp32", "code_ptr": "*fp32"}
        found["offset_ptr"] = "*fp32"
    else:
        found["scale_ptr"] = "*fp32"
    if spec.sparse:
        found |= {"values_ptr": "*fp32", "index_ptr": f"*i{spec.index_bits}", "first_ptr": "*i64"}
    if spec.low_rank:
        found |= {"u_ptr": READ[spec.x] if one else POINTERS[spec.x], "b_ptr": "*fp32"}
    if spec.epilogue.bias:
        found["bias_ptr"] = READ[spec.x]
    found |= {"y_ptr": POINTERS[spec.out], "cols": "i32", "outputs": "i32"}
    if not one:
        found["tokens"] = "i32"
    return found | ({"rank": "i32", "factor": "fp32"} if spec.low_rank else {})


def partial_grad_parameters(spec: KernelSpec) -> dict[str, str]:
    found = {"a_ptr": POINTERS[spec.x], "b_ptr": POINTERS[spec.x]}
    if spec.gather:
        found["index_ptr"] = "*i64"
    sizes = ("rows", "cols", "tokens", "length", "a_stride", "b_stride", "row_stride", "col_stride")
    return {**found, "out_ptr": "*fp32", **dict.fromkeys(sizes, "i32")}


def sampled_tile_parameters(spec: KernelSpec) -> dict[str, str]:
    found = {"a_ptr": POINTERS[spec.x], "b_ptr": POINTERS[spec.x], "mask_ptr": "*i32", "first_ptr": "*i64"}
    sizes = ("rows", "cols", "tokens", "words", "across_count")
    return {**found, "out_ptr": POINTERS[spec.out], **dict.fromkeys(sizes, "i32")}


def sampled_entries_parameters(spec: KernelSpec) -> dict[str, str]:
    found = {"a_ptr": READ[spec.x], "b_ptr": READ[spec.x], "index_ptr": f"*i{spec.index_bits}"}
    return {**found, "out_ptr": POINTERS[spec.out], "cols": "i32", "tokens": "i32", "count": "i32"}


def write_values_parameters(spec: KernelSpec) -> dict[str, str]:
    found = {"weight_ptr": POINTERS[spec.out], "values_ptr": POINTERS[spec.x], "index_ptr": f"*i{spec.index_bits}"}
    return {**found, "count": "i32"}


WHERE = {
    "table_ptr": "*i64",
    "order_ptr": "*i64",
    "offs_ptr": "*i64",
    **dict.fromkeys(("n", "m", "each", "slots"), "i32"),
}


def adapter_axpys_parameters(spec: KernelSpec) -> dict[str, str]:
    kind = POINTERS[spec.x]
    inputs = {"columns": {"x_ptr": kind, "places_ptr": "*i32"}, "lowrank": {"u_ptr": kind}, "bias": {}}
    limit = {"limit": "i32"} if spec.format == "lowrank" else {}
    return {**inputs[spec.format], "values_ptr": kind, "y_ptr": kind, **WHERE, **limit}


def adapter_dots_parameters(spec: KernelSpec) -> dict[str, str]:
    kind = POINTERS[spec.x]
    if spec.format == "lowrank":
        return {"x_ptr": kind, "values_ptr": kind, "u_ptr": kind, **WHERE, "limit": "i32"}
    return {"x_ptr": kind, "values_ptr": kind, "places_ptr": "*i32", "y_ptr": kind, **WHERE}


def adapter_sparse_parameters(spec: KernelSpec) -> dict[str, str]:
    kind = POINTERS[spec.x]
    return {"x_ptr": kind, "values_ptr": kind, "places_ptr": "*i32", "total_ptr": "*fp32", **WHERE, "parts": "i32"}


PARAMETERS = {
    "adapter_axpys": adapter_axpys_parameters,
    "adapter_dots": adapter_dots_parameters,
    "adapter_sparse": adapter_sparse_parameters,
    "stream": stream_parameters,
    "expand": expand_parameters,
    "blocks": blocks_parameters,
    "quantized": quantized_parameters,
    "partial_grad": partial_grad_parameters,
    "sampled_tile": sampled_tile_parameters,
    "sampled_entries": sampled_entries_parameters,
    "write_values": write_values_parameters,
}


@cache
def generate(spec: KernelSpec) -> str:
    """Source of one kernel, named `kernel`."""
    template = strict_environment(TEMPLATES).get_template(f"{spec.op}.py.jinja")
    context = stream_context(spec) if spec.op == "stream" else {}
    text = template.render(spec=spec, parameters=list(parameters(spec)), **context, **gap_context(spec))
    return f"# {spec}\n{text.strip()}\n"


def gap_context(spec: KernelSpec) -> dict[str, object]:
    return {"first_bits": FIRST_BITS, "gap_bits": GAP_BITS.get(spec.width, 0)}


def stream_context(spec: KernelSpec) -> dict[str, object]:
    """How x is read: `parts` loads per column of `lanes_x` elements each, into one sum per part, or into two where two
    bf16 tokens come as one 32-bit word; `step` elements lie between columns."""
    paired = spec.x == "bf16" and spec.tokens > 1
    at_once = spec.tokens_at_once
    parts = list(range(spec.tokens // at_once))
    if paired:
        sums = [{"first": part * at_once + half, "stride": 2} for part in parts for half in (0, 1)]
    else:
        sums = [{"first": part * at_once, "stride": 1} for part in parts]
    step = spec.tokens // 2 if paired else spec.tokens
    return {
        "paired": paired,
        "parts": parts,
        "lanes_x": at_once // 2 if paired else at_once,
        "sums": [{"name": f"sum{number}", **entry} for number, entry in enumerate(sums)],
        "step": step,
        "scaled": "" if step == 1 else f" * {step}",
    }
