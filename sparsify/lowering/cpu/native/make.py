"""A lowered decoder's native step: recognised, built, and held against PyTorch on numbers before anybody may use it.

host, its program ──recognise──▶ Decoder ──bind──▶ library ──a prompt, padding, single tokens, far positions──▶ NativeStep, or why not
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsify.errors import Refusal
from sparsify.kernels.cpu.build import BuildError
from sparsify.lowering.cpu.native.layout import Unknown
from sparsify.lowering.cpu.native.recognise import recognise
from sparsify.lowering.cpu.native.step import NativeStep, NotNative
from sparsify.lowering.cpu.native.structure import describe
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.program import Program

WHERE = "native step"
CLOSE = 1e-3  # of the largest logit: float32 sums in another order
FOREVER = 1 << 30


def make_native(host: nn.Module, program: Program) -> NativeStep | Refusal:
    """The step of a lowered host, bound and checked; or why PyTorch goes on running it."""
    try:
        decoder = recognise(program)
        step = NativeStep(decoder, type(None), most_positions(host))
        step.bound(host)
        with torch.no_grad(), exact_products(host, step):
            check(host, step)
        step.structure = describe(host, decoder.linears)
        return step
    except (Unknown, BuildError, NotNative) as why:
        return Refusal(WHERE, str(why))
    except NotImplementedError as why:
        return Refusal(WHERE, f"an operator cannot be computed on the CPU: {why}")


def most_positions(host: nn.Module) -> int:
    """Tokens that the model has positions for; beyond them PyTorch decides what happens."""
    config = getattr(host, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else FOREVER


def check(host: Any, step: NativeStep) -> None:
    """Compare with the host's own forward: a prompt in two rows, one of them padded, two single tokens, and a pair of tokens far apart.

    Raises Unknown where logits differ by more than rounding, or where the host does not take what `generate` gives.
    """
    from transformers.cache_utils import DynamicCache

    vocabulary = step.decoder.outputs
    ids = torch.randint(0, vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    far = min(step.positions, 1 << 16) - 1
    caches = [DynamicCache(config=host.config), DynamicCache(config=host.config)]
    pieces = [(0, 5), (5, 6), (6, 7)]
    for start, end in pieces:
        given = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:end],
        }
        seen = mask[:, start:end].bool()
        compare(host, step, given, caches, seen)
    given = {"input_ids": ids[:1, :2], "attention_mask": mask[:1, :2], "position_ids": torch.tensor([[0, far]])}
    if far > 1:
        compare(
            host, step, given, [DynamicCache(config=host.config), DynamicCache(config=host.config)], mask[:1, :2].bool()
        )


def compare(host: Any, step: NativeStep, given: dict[str, Any], caches: list[Any], seen: torch.Tensor) -> None:
    try:
        expected = type(host).forward(host, **given, past_key_values=caches[0], use_cache=True, return_dict=True)
    except Exception as error:  # the user's own forward may ask for anything
        raise Unknown(
            f"its forward does not take what generate() gives it ({type(error).__name__}: {error})"
        ) from error
    extra = [
        name for name, value in expected.items() if value is not None and name not in ("logits", "past_key_values")
    ]
    if extra or expected.logits.dtype != torch.float32:
        raise Unknown(f"its forward returns {', '.join(extra) or f'logits in {expected.logits.dtype}'} too")
    step.output = type(expected)
    found = step(host, (), {**given, "past_key_values": caches[1], "use_cache": True})
    if found is None:
        raise Unknown(f"its cache or inputs are not known: {', '.join(step.declined)}")
    wanted, got = expected.logits[seen], found.logits[seen]
    off = float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not off <= CLOSE:
        raise Unknown(f"its logits differ from PyTorch's by {off:.1e} of the largest")


@contextmanager
def exact_products(host: nn.Module, step: NativeStep) -> Iterator[None]:
    """Without kernels that round activations to 8 bits: a number near a half rounds either way by the last bit of a float, and what
    comes of it in thirty layers is no measure of a step. Host and step call the same kernels, so the others prove it."""
    rounding = [module for module in host.modules() if isinstance(module, SparseLinear) and module.int8]
    kept = [module.choices for module in rounding]
    for module in rounding:
        module.int8, module.choices = False, {}
    try:
        yield
    finally:
        for module, choices in zip(rounding, kept, strict=True):
            module.int8, module.choices = True, choices
        if step.binding is not None:
            step.binding.tables.clear()


__all__ = ["make_native"]
