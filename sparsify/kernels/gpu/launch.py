"""Launchers: tensors in, one generated kernel each. Nothing here waits for the device or reads a value back.

stream_product, blocks_product   y = act(x Wᵀ + b) (· up) + residual over packed weights
expand_stream                    the dense weight of a stream, for GEMMs with many tokens
quantized_product                y = x W'ᵀ + s u Bᵀ + bias over an NF4, int8 or int4 base, entries replaced at a support
partial_grad, contiguous_grad    the weight gradient of some channels, fp32
sampled_tile, sampled_entries    the weight gradient on a sparse support
write_values                     the trained values of a support into the merged weight
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsify.kernels.checked_once import checked_once
from sparsify.kernels.gpu.build import TritonError, launch, target_of
from sparsify.kernels.gpu.formats import VALUES, Blocks, Stream
from sparsify.kernels.gpu.spec import Epilogue, KernelSpec, Tile
from sparsify.kernels.gpu.tiles import choose_tile
from sparsify.kernels.gpu.tune import remembered_tile

MAX_TOKENS = 16
QUANTIZED_TOKENS = 64
QUANTIZED_BLOCK = 64  # weights per scale; rows must be whole blocks
SUPPORT_TILE = 64  # columns of every sampled tile


def check_positions(what: str, index: Tensor, limit: int) -> None:
    """Refuse positions outside of 0 to `limit`; looked at once per state of `index`, so that later launches wait for nothing."""

    def inside() -> None:
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < limit):
            raise TritonError(f"{what}: a position lies outside of 0 to {limit - 1}")

    if index.dtype not in (torch.int32, torch.int64):
        raise TritonError(f"{what}: positions are {index.dtype}, expected int32 or int64")
    checked_once(("positions", limit), (index,), inside)


def version_of(index: Tensor) -> int | None:
    """Rises when a tensor is written to; None for inference tensors, which do not count: what is made of them is not remembered."""
    return None if index.is_inference() else index._version


def x_type(x: Tensor) -> str:
    name = VALUES.get(x.dtype, "int8")
    if name == "int8":
        raise TritonError(f"kernels take bf16, fp16 and fp32 activations, not {x.dtype}")
    return name


def power_above(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def columns_first(x: Tensor, tokens: int) -> Tensor:
    """x (t, cols) as (cols, tokens), filled up with zeros, so that a thread reads all tokens of a column at once."""
    if tokens == 1:
        return x.contiguous()
    if tokens == x.shape[0]:
        return x.t().contiguous()
    turned = x.new_zeros(x.shape[1], tokens)
    turned[:, : x.shape[0]] = x.t()
    return turned


def stream_spec(
    packed: Stream, x: Tensor, out: torch.dtype, tokens: int, epilogue: Epilogue, tile: Tile | None
) -> KernelSpec:
    target = target_of(x.device)
    return KernelSpec(
        op="stream",
        target=target,
        tile=tile or remembered_tile(packed, tokens, x.device) or choose_tile("stream", tokens, target),
        value=packed.value,
        x=x_type(x),
        out=VALUES[out],
        format=packed.format,
        width=packed.width,
        group=packed.group,
        tokens=tokens,
        epilogue=epilogue,
    )


def stream_product(
    packed: Stream,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """x (t, cols) with 1 ≤ t ≤ 16 → (t, outputs) in `out`, x's dtype by default. bias and residual in x's dtype.

    tile: instead of what was measured on this GPU (`tune.py`), or the table's.
    """
    count = x.shape[0]
    if not 1 <= count <= MAX_TOKENS:
        raise TritonError(f"the stream kernel multiplies 1 to {MAX_TOKENS} tokens, got {count}")
    tokens = power_above(count)
    epilogue = Epilogue(bias=bias is not None, activation=activation, residual=residual is not None, gated=packed.gated)
    spec = stream_spec(packed, x, out or x.dtype, tokens, epilogue, tile)
    y = torch.empty(count, packed.outputs, dtype=out or x.dtype, device=x.device)
    arguments = {"x_ptr": columns_first(x, tokens), "values_ptr": packed.values, "meta_ptr": packed.meta}
    if packed.format == "gaps":
        arguments["base_ptr"] = packed.base
    arguments |= {"start_ptr": packed.start, "order_ptr": packed.order}
    if packed.scales is not None:
        arguments["scale_ptr"] = packed.scales
    if bias is not None:
        arguments["bias_ptr"] = bias.to(x.dtype).contiguous()
    if residual is not None:
        arguments["residual_ptr"] = residual.to(x.dtype).contiguous()
    arguments |= {"y_ptr": y, "rows": packed.rows, "outputs": packed.outputs, "tokens": count}
    launch(spec, (packed.groups,), arguments)
    return y


def stored_type(packed: Stream, out: torch.dtype) -> torch.dtype:
    """What the expansion kernel writes for a dense weight in `out`."""
    return out if packed.scales is not None else packed.values.dtype


def expand_spec(packed: Stream, stored: torch.dtype) -> KernelSpec:
    target = target_of(packed.values.device)
    return KernelSpec(
        op="expand",
        target=target,
        tile=choose_tile("expand", 1, target),
        value=packed.value,
        x=VALUES[stored],
        out=VALUES[stored],
        format=packed.format,
        width=packed.width,
        group=packed.group,
    )


def expand_stream(packed: Stream, out: torch.dtype | None = None) -> Tensor:
    """The dense weight (rows, cols) of a stream, in a fresh tensor; int8 values are scaled. For GEMMs with many tokens."""
    out = out or packed.dtype
    stored = stored_type(packed, out)
    dense = torch.zeros(packed.rows, packed.cols, dtype=stored, device=packed.values.device)
    spec = expand_spec(packed, stored)
    arguments = {"values_ptr": packed.values, "meta_ptr": packed.meta}
    if packed.format == "gaps":
        arguments["base_ptr"] = packed.base
    arguments |= {"start_ptr": packed.start, "order_ptr": packed.order}
    if packed.scales is not None:
        arguments["scale_ptr"] = packed.scales
    arguments |= {"dense_ptr": dense, "rows": packed.rows, "cols": packed.cols}
    launch(spec, (packed.groups,), arguments)
    return dense.to(out)


def blocks_tile(tokens: int, target: str, height: int, width: int) -> Tile:
    """The table's tile; with one token a program reads 4096 weights at once, however small the stored tiles are."""
    tile = choose_tile("blocks", tokens, target)
    return replace(tile, unroll=max(1, 4096 // (height * width))) if tokens == 1 else tile


def blocks_spec(packed: Blocks, x: Tensor, out: torch.dtype, epilogue: Epilogue) -> KernelSpec:
    target = target_of(x.device)
    return KernelSpec(
        op="blocks",
        target=target,
        tile=blocks_tile(x.shape[0], target, packed.height, packed.width),
        value=packed.value,
        x=x_type(x),
        out=VALUES[out],
        width=packed.width,
        group=packed.height,
        tokens=1 if x.shape[0] == 1 else 16,
        epilogue=epilogue,
    )


def blocks_product(
    packed: Blocks,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out: torch.dtype | None = None,
) -> Tensor:
    """x (t, cols), any t ≥ 1 → (t, rows). Float tiles must be in x's dtype."""
    count = x.shape[0]
    if packed.value != "int8" and packed.values.dtype != x.dtype:
        raise TritonError(f"blocks: values are {packed.values.dtype}, x is {x.dtype}")
    epilogue = Epilogue(bias=bias is not None, activation=activation, residual=residual is not None)
    spec = blocks_spec(packed, x, out or x.dtype, epilogue)
    y = torch.empty(count, packed.rows, dtype=out or x.dtype, device=x.device)
    arguments = {"x_ptr": x.contiguous(), "values_ptr": packed.values}
    arguments |= {"column_ptr": packed.column, "start_ptr": packed.start}
    if packed.scales is not None:
        arguments["scale_ptr"] = packed.scales
    if bias is not None:
        arguments["bias_ptr"] = bias.to(x.dtype).contiguous()
    if residual is not None:
        arguments["residual_ptr"] = residual.to(x.dtype).contiguous()
    arguments |= {"y_ptr": y, "cols": packed.cols, "outputs": packed.rows, "tokens": count}
    launch(spec, (packed.rows // packed.height, 1 if count == 1 else -(-count // spec.tile.cols)), arguments)
    return y


def product_spec(packed: Stream | Blocks, x: Tensor, bias: bool, activation: str) -> KernelSpec:
    """The kernel that `operator.packed_product` launches for x (t, cols): a product, or the expansion before a library's."""
    if isinstance(packed, Blocks):
        return blocks_spec(packed, x, x.dtype, Epilogue(bias=bias, activation=activation))
    if x.shape[0] > MAX_TOKENS:
        return expand_spec(packed, stored_type(packed, x.dtype))
    epilogue = Epilogue(bias=bias, activation=activation, gated=packed.gated)
    return stream_spec(packed, x, x.dtype, power_above(x.shape[0]), epilogue, None)


def quantized_product(
    packed: list[Tensor],
    format: str,
    x: Tensor,
    bias: Tensor | None = None,
    values: Tensor | None = None,
    index: Tensor | None = None,
    u: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    rows: int | None = None,
) -> Tensor:
    """x (t, cols), 1 ≤ t ≤ 64 → (t, rows): `x W'ᵀ + scale · u bᵀ + bias` in one launch, W' never unpacked to memory.

    packed, format: as `sparsify.formats.pack` gives them, for a weight (rows, cols) with whole blocks of 64 per row.
    values, index: W' is W with `values (k,)` at the sorted flat positions `index (k,)`. u (t, r) in x's dtype is `x Aᵀ`,
    which the caller takes from the library's GEMM: inside, every program would read all of A. b (rows, r).
    rows: of the weight, where `packed` does not tell (nf4).
    """
    (count, cols), target = x.shape, target_of(x.device)
    rows = rows or packed[0].shape[0]
    if not 1 <= count <= QUANTIZED_TOKENS or cols % QUANTIZED_BLOCK:
        raise TritonError(
            f"quantized: {count} tokens and {cols} columns; takes 1 to 64 tokens, whole blocks of 64 columns"
        )
    tile = quantized_tile(count, cols, target, x_type(x), format)
    sparse = values is not None and index is not None
    if values is not None and index is not None:
        check_positions("quantized", index, rows * cols)
        if values.shape != index.shape:
            raise TritonError(f"quantized: {tuple(values.shape)} values for {tuple(index.shape)} positions")
    spec = KernelSpec(
        op="quantized",
        target=target,
        tile=tile,
        x=x_type(x),
        out=x_type(x),
        format=format,
        tokens=1 if count == 1 else 16,
        sparse=sparse,
        low_rank=u is not None,
        index_bits=index.element_size() * 8 if index is not None else 32,
        epilogue=Epilogue(bias=bias is not None),
    )
    x, y = x.contiguous(), torch.empty(count, rows, dtype=x.dtype, device=x.device)
    data, *scales = [aligned(t.reshape(-1)) for t in packed]
    arguments: dict[str, object] = {"x_ptr": x}
    arguments |= {"entry_ptr": x, "data_ptr": data} if count == 1 else {"data_ptr": data, "bytes_ptr": data}
    names = ("absmax_ptr", "nested_ptr", "nested_code_ptr", "code_ptr", "offset_ptr")
    arguments |= dict(zip(names, scales, strict=True)) if format == "nf4" else {"scale_ptr": scales[0].float()}
    if values is not None and index is not None:
        first = row_starts(index, rows, cols)
        arguments |= {"values_ptr": values.float(), "index_ptr": index.contiguous(), "first_ptr": first}
    if u is not None and b is not None:
        arguments |= {"u_ptr": u.contiguous(), "b_ptr": b.float().contiguous()}
    if bias is not None:
        arguments["bias_ptr"] = bias.to(x.dtype).contiguous()
    arguments |= {"y_ptr": y, "cols": cols, "outputs": rows}
    arguments |= {} if count == 1 else {"tokens": count}
    arguments |= {"rank": b.shape[1], "factor": scale} if b is not None else {}
    launch(spec, (-(-rows // tile.rows), 1 if count == 1 else -(-count // tile.cols)), arguments)
    return y


def aligned(t: Tensor) -> Tensor:
    """A tensor whose data begin at a multiple of 64 bytes, as all fresh ones do; the table of nf4 is addressed so."""
    return t if t.data_ptr() % 64 == 0 else t.clone()


def quantized_tile(count: int, cols: int, target: str, x: str, format: str) -> Tile:
    """The table's tile; with one token, no more warps than a row's 16-byte loads fill. nf4 is not pipelined: what it looks up
    would go through shared memory."""
    tile = choose_tile("quantized", count, target, x)
    if count > 1:
        return replace(tile, stages=1) if format == "nf4" else tile
    loads = cols // (16 if format == "int8" else 32)
    return replace(tile, warps=max(1, min(tile.warps, power_above(loads) // 32)))


starts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def row_starts(index: Tensor, rows: int, cols: int) -> Tensor:
    """How many of the sorted flat positions lie before each row, (rows + 1,) int64; remembered as `support_of` is."""
    key = (rows, cols, version_of(index))
    found = starts.get(index)
    if found is None or found[0] != key or key[-1] is None:
        edges = torch.arange(rows + 1, device=index.device, dtype=torch.int64) * cols
        found = (key, torch.searchsorted(index.long(), edges))
        starts[index] = found
    return found[1]


# --- training -----------------------------------------------------------------------------------------------------------


def partial_grad(a: Tensor, b: Tensor, index: Tensor, transpose: bool = False) -> Tensor:
    """`a[:, index]ᵀ b`, fp32, with the gather inside: a (t, p), b (t, q), index (s,) → (s, q), or (q, s) if `transpose`.

    For channels that lie side by side use `contiguous_grad`: a view needs no gather, and then cuBLAS is the better GEMM.
    """
    tokens, count, cols = a.shape[0], index.numel(), b.shape[1]
    check_positions("partial_grad", index, a.shape[1])
    target = target_of(a.device)
    tile = choose_tile("partial_grad", tokens, target, x_type(a))
    spec = KernelSpec(op="partial_grad", target=target, tile=tile, x=x_type(a), out="fp32", gather=True)
    down, across = -(-count // tile.rows), -(-cols // tile.cols)
    splits = split_tokens(tokens, down * across, tile.depth)
    length = -(-tokens // splits)
    out = torch.empty(splits, *((cols, count) if transpose else (count, cols)), dtype=torch.float32, device=a.device)
    a, b = unit_columns(a), unit_columns(b)
    arguments: dict[str, Tensor | int] = {"a_ptr": a, "b_ptr": b, "index_ptr": index.to(torch.int64), "out_ptr": out}
    arguments |= {"rows": count, "cols": cols, "tokens": tokens, "length": length}
    arguments |= {"a_stride": a.stride(0), "b_stride": b.stride(0)}
    arguments |= {"row_stride": 1 if transpose else cols, "col_stride": count if transpose else 1}
    launch(spec, (down, across, splits), arguments)
    return out[0] if splits == 1 else out.sum(0)


def unit_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def split_tokens(tokens: int, programs: int, depth: int, wanted: int = 264) -> int:
    """Parts of the token axis, each summed apart and added in a fixed order, so that small results fill the device."""
    return max(1, min(wanted // max(1, programs), tokens // (8 * depth), 16))


def contiguous_grad(a: Tensor, b: Tensor) -> Tensor:
    """`aᵀ b` by the library GEMM, 16-bit inputs to fp32; a and b may be column views. cuBLAS stores its fp32 sums as they are."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a.t().mm(b)
    return torch.mm(a.t(), b, out_dtype=torch.float32) if a.is_cuda else a.t().mm(b).float()


def sampled_tile(a: Tensor, b: Tensor, support: Support, out: torch.dtype | None = None) -> Tensor:
    """`(aᵀ b)` at a support by dense tiles with a sampled epilogue: a (t, p), b (t, q) → (k,) in order of the support."""
    target = target_of(a.device)
    tile = choose_tile("sampled_tile", a.shape[0], target, x_type(a))
    spec = KernelSpec(op="sampled_tile", target=target, tile=tile, x=x_type(a), out=VALUES[out or a.dtype])
    assert tile.cols == SUPPORT_TILE
    rows, cols = a.shape[1], b.shape[1]
    values = torch.empty(support.count, dtype=out or a.dtype, device=a.device)
    arguments: dict[str, Tensor | int] = {"a_ptr": a.contiguous(), "b_ptr": b.contiguous(), "mask_ptr": support.mask}
    arguments |= {"first_ptr": support.first, "out_ptr": values, "rows": rows, "cols": cols, "tokens": a.shape[0]}
    arguments |= {"words": support.mask.shape[1], "across_count": support.first.shape[1]}
    launch(spec, (-(-rows // tile.rows), -(-cols // tile.cols)), arguments)
    return values


@dataclass(frozen=True, eq=False)
class Support:
    """Sorted flat positions in a (p, q) matrix as `sampled_tile` reads them. count: of positions.

    mask (p, ⌈q / 32⌉) int32: bit c % 32 of word c / 32. first (p, ⌈q / tile⌉) int64: positions before a row's tile.
    """

    count: int
    mask: Tensor
    first: Tensor


def make_support(index: Tensor, rows: int, cols: int, tile: int) -> Support:
    """From sorted, distinct flat positions; on the device of `index`, without waiting for it but when it is first seen."""
    check_positions("sampled_tile", index, rows * cols)
    flat = index.long()
    row, col = flat // cols, flat % cols
    words = -(-cols // 32)
    bits = (1 << (col % 32)).to(torch.int64)
    mask = torch.zeros(rows * words, dtype=torch.int64, device=index.device)
    mask.index_add_(0, row * words + col // 32, bits)
    signed = torch.where(mask >= 1 << 31, mask - (1 << 32), mask).to(torch.int32).view(rows, words)
    starts = torch.arange(rows, device=index.device)[:, None] * cols
    starts = starts + torch.arange(0, cols, tile, device=index.device)
    first = torch.searchsorted(flat, starts.flatten()).view(starts.shape)
    return Support(index.numel(), signed, first.contiguous())


supports: WeakIdKeyDictionary = WeakIdKeyDictionary()


def support_of(index: Tensor, rows: int, cols: int) -> Support:
    """`make_support`, remembered as long as `index` lives and is not written to."""
    tile = SUPPORT_TILE
    key = (rows, cols, tile, version_of(index))
    found = supports.get(index)
    if found is None or found[0] != key or key[-1] is None:
        found = (key, make_support(index, rows, cols, tile))
        supports[index] = found
    return found[1]


def sampled_entries(a: Tensor, b: Tensor, index: Tensor, out: torch.dtype | None = None) -> Tensor:
    """`(aᵀ b)` at flat positions, one dot product each: a (t, p), b (t, q), index (k,) → (k,). For very few entries."""
    check_positions("sampled_entries", index, a.shape[1] * b.shape[1])
    target = target_of(a.device)
    tile = choose_tile("sampled_entries", a.shape[0], target)
    values = torch.empty(index.numel(), dtype=out or a.dtype, device=a.device)
    spec = KernelSpec(
        op="sampled_entries",
        target=target,
        tile=tile,
        x=x_type(a),
        out=VALUES[values.dtype],
        index_bits=index.element_size() * 8,
    )
    arguments: dict[str, Tensor | int] = {"a_ptr": a.t().contiguous(), "b_ptr": b.t().contiguous()}
    arguments |= {"index_ptr": index.contiguous(), "out_ptr": values}
    arguments |= {"cols": b.shape[1], "tokens": a.shape[0], "count": index.numel()}
    launch(spec, (-(-index.numel() // tile.rows),), arguments)
    return values


def write_values(weight: Tensor, values: Tensor, index: Tensor) -> None:
    """`weight.view(-1)[index] = values`, with the cast inside; weight contiguous, positions distinct."""
    check_positions("write_values", index, weight.numel())
    if values.shape != index.shape:
        raise TritonError(f"write_values: {tuple(values.shape)} values for {tuple(index.shape)} positions")
    target = target_of(weight.device)
    tile = choose_tile("write_values", 1, target)
    spec = KernelSpec(
        op="write_values",
        target=target,
        tile=tile,
        x=x_type(values),
        out=x_type(weight),
        index_bits=index.element_size() * 8,
    )
    arguments: dict[str, Tensor | int] = {"weight_ptr": weight, "values_ptr": values.contiguous()}
    arguments |= {"index_ptr": index.contiguous(), "count": index.numel()}
    launch(spec, (-(-index.numel() // tile.rows),), arguments)
