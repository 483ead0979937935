"""The bitmask format: what is stored of a sparse weight, exactly and reversibly.

    W (rows, cols) ──pack──▶ masks      (panels, blocks, 4) int64  bit c of word [p, b, r]: row 4 p + r, column 64 b + c
                             values     (nnz + 96,)                stored values, in the order panel, block, row, column
                             panel_ptr  (panels + 1,) int64        first value of each panel of four rows
                             scales     (rows,) or (rows, groups) float32, for int8 values only

A panel of int8 weights of which less than an eighth is zero is stored whole, zeros too, and read without its masks.
One bit per weight and one value per nonzero: at 75 % sparsity 1.125 bytes per weight in fp32, 0.375 in int8 (dense
int4 with a scale per 32 weights takes 0.5625). N:M patterns use the same words: their popcounts are constant, which is
what a rate-fixed format would buy. Two rows advance together and 16 values are read at a time, so an empty row may be
read 80 values past its start: 96 zeros stand behind the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sparsify.errors import OperatorError
from sparsify.kernels.cpu import huge_pages

BLOCK = 64
PADDING = 96
PANEL = 4
VALUE_DTYPES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "s8",
}


class FormatError(OperatorError, ValueError):
    """Packed data is damaged, or a weight cannot be packed; no kernel has seen it."""


@dataclass(frozen=True, eq=False)
class Bitmask:
    """A packed weight of shape (rows, cols); see the module docstring. `validate()` proves that kernels may read it.

    group: columns per scale, a multiple of 64; 0 means one scale per row.
    dtype: of the weight that was packed, and of what `unpack` returns.
    followed: a view of some rows of a larger weight (`part`): the values of the next rows lie behind its own.
    """

    rows: int
    cols: int
    masks: torch.Tensor
    values: torch.Tensor
    panel_ptr: torch.Tensor
    scales: torch.Tensor | None = None
    group: int = 0
    dtype: torch.dtype = torch.float32
    followed: bool = False

    @property
    def blocks(self) -> int:
        """Mask words per row."""
        return -(-self.cols // BLOCK)

    @property
    def panels(self) -> int:
        """Groups of four rows; the last may hold rows that do not exist, with empty masks."""
        return -(-self.rows // PANEL)

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.values.numel() - PADDING

    @property
    def sparsity(self) -> float:
        """Share of weights that are not stored, 0 to 1."""
        return 1.0 - self.nnz / max(1, self.rows * self.cols)

    @property
    def value(self) -> str:
        """Name of the value type in kernel variants: f32, f16, bf16 or s8."""
        return VALUE_DTYPES[self.values.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes that a product with few tokens must read: masks, values, panel pointers, scales."""
        tensors = (self.masks, self.values, self.panel_ptr, self.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def unpack(self) -> torch.Tensor:
        """The dense weight, (rows, cols) in `dtype`; bit-equal to what was packed (−0.0 comes back as 0.0)."""
        kept = mask_bits(self.masks)  # panel, block, row, column
        stored = torch.zeros(kept.shape, dtype=self.values.dtype)
        stored[kept] = self.values[: self.nnz]
        integers = stored.transpose(1, 2).reshape(self.panels * PANEL, -1)[: self.rows, : self.cols]
        if self.scales is None:
            return integers.to(self.dtype)
        return (integers.float() * self.dense_scales()).to(self.dtype)

    def dense_scales(self) -> torch.Tensor:
        """Scales broadcast to (rows, cols) or (rows, 1), float32."""
        if self.scales is None:
            return torch.ones(self.rows, 1)
        if not self.group:
            return self.scales.view(-1, 1)
        return self.scales.repeat_interleave(self.group, dim=1)[:, : self.cols]

    def row_sums(self) -> torch.Tensor:
        """Sum of the int8 values of each row, int32: what the unsigned offset of VNNI activations contributes."""
        counts = mask_counts(self.masks)  # panel, block, row
        ends = counts.flatten().cumsum(0)
        total = torch.zeros(self.nnz + 1, dtype=torch.int64)
        torch.cumsum(self.values[: self.nnz], 0, dtype=torch.int64, out=total[1:])
        sums = (total[ends] - total[ends - counts.flatten()]).view(counts.shape).sum(1)
        return sums.flatten()[: self.rows].to(torch.int32)

    def part(self, first: int, rows: int) -> Bitmask:
        """Rows [first, first + rows) as views of this weight; both multiples of four but at the last row."""
        check(first % PANEL == 0, f"a part starts at a multiple of {PANEL} rows, not at {first}")
        check(rows % PANEL == 0 or first + rows == self.rows, f"a part of {rows} rows cuts through a panel")
        panels = slice(first // PANEL, -(-(first + rows) // PANEL))
        bounds = self.panel_ptr[panels.start : panels.stop + 1]
        start, end = int(bounds[0]), int(bounds[-1])
        return replace(
            self,
            rows=rows,
            masks=self.masks[panels],
            values=self.values[start : end + PADDING],
            panel_ptr=bounds - start,
            scales=self.scales[first : first + rows] if self.scales is not None else None,
            followed=self.followed or first + rows < self.rows,
        )

    def validate(self) -> Bitmask:
        """Refuse data that a kernel could not read safely; returns self. Raises FormatError saying what is wrong."""
        check(self.rows > 0 and self.cols > 0, f"a weight needs rows and columns, got {self.rows} × {self.cols}")
        blocks = self.blocks
        for name in ("masks", "values", "panel_ptr", *(["scales"] if self.scales is not None else [])):
            tensor = getattr(self, name)
            if not isinstance(tensor, torch.Tensor):
                raise FormatError(f"{name} is no tensor but {type(tensor).__name__}")
            check(tensor.device.type == "cpu", f"{name} is on {tensor.device}, the CPU format needs it on the CPU")
            check(tensor.is_contiguous(), f"{name} is not contiguous")
        check(self.masks.dtype == torch.int64, f"masks are {self.masks.dtype}, expected torch.int64")
        check(self.panel_ptr.dtype == torch.int64, f"panel_ptr is {self.panel_ptr.dtype}, expected torch.int64")
        check(
            self.values.dtype in VALUE_DTYPES, f"values are {self.values.dtype}, expected one of {list(VALUE_DTYPES)}"
        )
        shape = (self.panels, blocks, PANEL)
        check(tuple(self.masks.shape) == shape, f"masks have shape {tuple(self.masks.shape)}, expected {shape}")
        shape = (self.panels + 1,)
        check(
            tuple(self.panel_ptr.shape) == shape, f"panel_ptr has shape {tuple(self.panel_ptr.shape)}, expected {shape}"
        )
        check(self.values.dim() == 1 and self.nnz >= 0, f"values need {PADDING} elements of padding")
        counts = mask_counts(self.masks)
        if self.cols % BLOCK:
            beyond = -1 << (self.cols % BLOCK)
            check(not bool((self.masks[:, -1] & beyond).any()), f"a mask bit is set beyond column {self.cols}")
        check(
            not bool(counts[-1, :, self.rows - (self.panels - 1) * PANEL :].any()),
            f"a mask bit is set beyond row {self.rows}",
        )
        expected = torch.zeros(self.panels + 1, dtype=torch.int64)
        torch.cumsum(counts.sum((1, 2)), 0, out=expected[1:])
        check(bool(torch.equal(expected, self.panel_ptr)), "panel_ptr does not match the number of bits in the masks")
        check(int(expected[-1]) == self.nnz, f"{self.nnz} values are stored, the masks hold {int(expected[-1])} bits")
        padded = self.followed or not bool(self.values[self.nnz :].any())
        check(padded, "the padding behind the values is not zero")
        check(self.group % BLOCK == 0 and self.group >= 0, f"group {self.group} is not a multiple of {BLOCK}")
        if self.values.dtype.is_floating_point:
            check(bool(torch.isfinite(self.values).all()), "a weight is NaN or Inf")
            check(self.scales is None, "scales belong to int8 values")
            return self
        check(self.scales is not None, "int8 values need scales")
        assert self.scales is not None
        shape = (self.rows, -(-self.cols // self.group)) if self.group else (self.rows,)
        check(tuple(self.scales.shape) == shape, f"scales have shape {tuple(self.scales.shape)}, expected {shape}")
        check(self.scales.dtype == torch.float32, f"scales are {self.scales.dtype}, expected torch.float32")
        check(bool(torch.isfinite(self.scales).all()), "a scale is NaN or Inf")
        return self


def check(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(message)


def mask_bits(masks: torch.Tensor) -> torch.Tensor:
    """int64 words of any shape → bool of shape (…, 64), lowest bit first."""
    octets = masks.contiguous().view(torch.uint8).unflatten(-1, (masks.shape[-1], 8))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (octets.unsqueeze(-1) & weights).ne(0).flatten(-2)


def mask_counts(masks: torch.Tensor) -> torch.Tensor:
    """Set bits of each int64 word, int64."""
    per_octet = torch.tensor([bin(i).count("1") for i in range(256)], dtype=torch.uint8)
    octets = masks.contiguous().view(torch.uint8).unflatten(-1, (masks.shape[-1], 8))
    return per_octet[octets.int()].sum(-1, dtype=torch.int64)


def pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """bool of shape (…, 64) → int64 words, lowest bit first."""
    octets = kept.unflatten(-1, (8, 8)).to(torch.uint8)
    word = torch.zeros(octets.shape[:-1], dtype=torch.uint8)
    for bit in range(8):
        word |= octets[..., bit] << bit
    return word.view(torch.int64).squeeze(-1)


def pack(weight: torch.Tensor) -> Bitmask:
    """Pack a float32, float16 or bfloat16 weight (rows, cols) as it is; FormatError for NaN, Inf, other dtypes."""
    check(weight.dim() == 2, f"a weight has two axes, got shape {tuple(weight.shape)}")
    check(weight.dtype in VALUE_DTYPES and weight.dtype.is_floating_point, f"cannot pack {weight.dtype}")
    weight = weight.detach()
    check(bool(torch.isfinite(weight).all()), "a weight is NaN or Inf")
    return assemble(weight, None, 0, weight.dtype)


def quantize_int8(weight: torch.Tensor, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale per row, or per `group` columns (a multiple of 64): (integers, float32 scales)."""
    check(group % BLOCK == 0 and group >= 0, f"group {group} is not a multiple of {BLOCK}")
    weight = weight.detach().float()
    check(bool(torch.isfinite(weight).all()), "a weight is NaN or Inf")
    rows, cols = weight.shape
    if not group:
        scales = weight.abs().amax(1) / 127
        divisor = scales.view(-1, 1)
    else:
        groups = -(-cols // group)
        padded = torch.nn.functional.pad(weight, (0, groups * group - cols))
        scales = padded.view(rows, groups, group).abs().amax(2) / 127
        divisor = scales.repeat_interleave(group, dim=1)[:, :cols]
    integers = torch.round(weight / torch.where(divisor > 0, divisor, 1.0)).clamp_(-127, 127).to(torch.int8)
    return integers, scales.contiguous()


def pack_int8(
    integers: torch.Tensor, scales: torch.Tensor, group: int = 0, dtype: torch.dtype = torch.float32
) -> Bitmask:
    """Pack int8 weights (rows, cols) with their scales; `dtype` is what `unpack` returns."""
    check(integers.dtype == torch.int8 and integers.dim() == 2, "expected int8 weights of two axes")
    check(not bool((integers == -128).any()), "int8 weights are symmetric: -127 to 127")
    return assemble(integers, scales.float().contiguous(), group, dtype).validate()


def assemble(stored: torch.Tensor, scales: torch.Tensor | None, group: int, dtype: torch.dtype) -> Bitmask:
    rows, cols = stored.shape
    check(rows > 0 and cols > 0, f"a weight needs rows and columns, got {rows} × {cols}")
    panels, blocks = -(-rows // PANEL), -(-cols // BLOCK)
    padded = stored.new_zeros(panels * PANEL, blocks * BLOCK)
    padded[:rows, :cols] = stored
    ordered = padded.view(panels, PANEL, blocks, BLOCK).transpose(1, 2).contiguous()
    kept = ordered != 0
    if stored.dtype == torch.int8:
        fill_nearly_dense_panels(kept, rows, cols)
    chosen = ordered[kept]
    values = huge_pages.zeros((chosen.numel() + PADDING,), stored.dtype)
    values[: chosen.numel()] = chosen
    masks = huge_pages.in_huge_pages(pack_bits(kept))
    panel_ptr = torch.zeros(panels + 1, dtype=torch.int64)
    torch.cumsum(kept.sum((1, 2, 3)), 0, out=panel_ptr[1:])
    return Bitmask(rows, cols, masks, values, panel_ptr, scales, group, dtype)


def fill_nearly_dense_panels(kept: torch.Tensor, rows: int, cols: int) -> None:
    """Store every weight of a panel of which less than one in eight is zero: the kernel then reads no masks (an eighth of a byte
    per weight) and expands nothing. kept: (panels, blocks, 4, 64) bool, changed in place. Panels with ragged edges stay."""
    if cols % BLOCK:
        return
    whole = kept[: rows // PANEL]
    nearly = whole.sum((1, 2, 3), dtype=torch.int64) * 8 > 7 * PANEL * cols
    whole[nearly] = True


def unpack_values(packed: Bitmask) -> torch.Tensor:
    """The stored values in their places, (rows, cols) in the type of the values: integers for int8, unscaled."""
    return replace(packed, scales=None, dtype=packed.values.dtype).unpack()


def concatenate(parts: list[Bitmask], interleave: bool = False) -> Bitmask:
    """Weights over the same input as one: q, k, v below one another, or gate and up row by row (`interleave`)."""
    first = parts[0]
    for part in parts[1:]:
        same = (part.cols, part.value, part.group, part.dtype) == (first.cols, first.value, first.group, first.dtype)
        check(same, "only weights of one width, value type and group size can share a pass over the activation")
    check(not interleave or len({p.rows for p in parts}) == 1, "interleaved weights need equally many rows")

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors, 1).flatten(0, 1) if interleave else torch.cat(tensors)

    scales = [part.scales for part in parts if part.scales is not None]
    stored = join([unpack_values(part) for part in parts])
    return assemble(stored, join(scales).contiguous() if scales else None, first.group, first.dtype)
