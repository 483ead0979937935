"""2:4 weights and many tokens: PyTorch's semi-structured tensor, converted from the packed weight when it is first needed.

    Stream "two_four", 64 or more tokens ──convert, once──▶ values and indices as sparse tensor cores read them ──▶ F.linear

At decode the stream kernel reads fewer bytes and needs no padding; with many tokens the product is bound by arithmetic, where
sparse tensor cores do twice as much. Both forms are then alive, together 1.13 × the bytes of the dense weight: a model that only
decodes never pays for the second. Where the conversion fails, once and with a warning, the weight is expanded for a dense product.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparsify.kernels.checked_once import state_of
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.formats import Blocks, Stream

FEWEST_TOKENS = 64
ROWS, COLS = 32, 64  # the smallest tile of a sparse 16-bit product; weights must be whole tiles

converted: WeakIdKeyDictionary = WeakIdKeyDictionary()


def why_not(packed: Stream | Blocks) -> str:
    """Why a packed weight has no semi-structured form, or nothing; known without a GPU."""
    if isinstance(packed, Blocks) or packed.format != "two_four":
        return "it is not 2:4"
    if packed.values.dtype not in (torch.bfloat16, torch.float16):
        return f"its values are {packed.value}, sparse tensor cores here take bf16 and fp16"
    if packed.rows % ROWS or packed.cols % COLS:
        return f"{packed.rows} × {packed.cols} is not whole tiles of {ROWS} × {COLS}"
    return ""


def can_convert(device: torch.device) -> bool:
    """Whether this device has sparse tensor cores that PyTorch drives."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def semi_structured(packed: Stream) -> Tensor | None:
    """The converted weight (rows, cols), remembered as long as the packed tensors live and are not written to; None where
    PyTorch cannot convert it, which is said once per weight, and for inference tensors, whose changes nobody sees."""
    key = (packed.rows, packed.cols, *map(state_of, packed.tensors))
    if None in key:
        return None
    found = converted.get(packed.values)
    if found is None or found[0] != key:
        found = (key, convert(launch.expand_stream(packed)))
        converted[packed.values] = found
    return found[1]


def convert(weight: Tensor) -> Tensor | None:
    from torch.sparse import to_sparse_semi_structured

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*semi-structured.*prototype.*")
        try:
            return to_sparse_semi_structured(weight)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    warnings.warn(f"a 2:4 weight stays unconverted and is expanded for many tokens ({reason})", stacklevel=2)
    return None


def product(packed: Stream | Blocks, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """`x Wᵀ + bias` for x (t, cols) by sparse tensor cores, or None where they do not serve."""
    if x.shape[0] < FEWEST_TOKENS or why_not(packed) or not can_convert(x.device):
        return None
    assert isinstance(packed, Stream)
    weight = semi_structured(packed) if x.dtype == packed.values.dtype else None
    return None if weight is None else F.linear(x, weight, None if bias is None else bias.to(x.dtype))
