"""Convolutions that can carry a part: `nn.Conv1d`, `nn.Conv2d`, and classes of theirs that keep the forward.

What is padded otherwise than by zeros is padded before; then the convolution itself has no padding.
"""

from __future__ import annotations

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def why_not_convolution(module: nn.Module) -> str | None:
    """Why a convolution cannot carry a low-rank part; None if it can."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return f"{type(module).__name__} has no partial form here: Conv1d and Conv2d have"
    base = next((c for c in CONVOLUTIONS if isinstance(module, c)), None)
    if (
        base is None
        or type(module).forward is not base.forward
        or getattr(type(module), "_conv_forward", None) is not base._conv_forward
    ):
        return f"the forward of {type(module).__name__} does more than a convolution"
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if module.groups != 1:
        return f"it has {module.groups} groups, and a low-rank change of all channels would fill the zeros between them"
    if isinstance(module.padding, str) and symmetric_padding(module) is None:
        return f"padding={module.padding!r} with kernels of even span pads one side more than the other"
    return None


def symmetric_padding(module: nn.Conv1d | nn.Conv2d) -> list[int] | None:
    """Zeros on each side, by axis; None where the two sides differ."""
    if not isinstance(module.padding, str):
        return list(module.padding)
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "valid":
        return [0] * len(spans)
    return [span // 2 for span in spans] if all(span % 2 == 0 for span in spans) else None


def padded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, list[int]]:
    """`(x, zeros on each side)` such that a convolution of the result is the module's."""
    zeros = symmetric_padding(module)
    assert zeros is not None  # `why_not_convolution` saw to that
    if module.padding_mode == "zeros":
        return x, zeros
    return nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), [0] * len(zeros)


__all__ = ["CONVOLUTIONS", "padded", "symmetric_padding", "why_not_convolution"]
