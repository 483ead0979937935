"""A host's forward as one native call, where the call is one that the step knows; else a reason why PyTorch runs it.

    host(input_ids (1, 1), past_key_values=cache, …) ──▶ step over the cache's own memory ──▶ the same output class, logits and cache
    anything else                                   ──▶ the user's own forward

Whether a call is known is looked at anew every time: other inputs, another cache; and, once in a call of `generate`, hooks, modules and
weights that were exchanged or written to.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere
from torch.utils._device import DeviceContext

from sparsify.console import printable
from sparsify.kernels.cpu.build import BuildError
from sparsify.kernels.cpu.dispatch import best_isa
from sparsify.kernels.cpu.step.operations import Decoder
from sparsify.lowering.cpu.native.binding import Binding, bind
from sparsify.lowering.cpu.native.cache import length_of, store_of
from sparsify.lowering.cpu.native.layout import Unknown
from sparsify.lowering.cpu.native.structure import Structure, describe, difference
from sparsify.modules.kernel_module import GeneratedKernel

MOST = 16  # rows (batch × tokens) of a native step; more are PyTorch's
KNOWN = frozenset(
    {
        "input_ids",
        "past_key_values",
        "attention_mask",
        "position_ids",
        "use_cache",
        "logits_to_keep",
        "return_dict",
        "cache_position",
    }
)
#: arguments that ask for more than logits, unless they are False
SWITCHES = frozenset({"output_attentions", "output_hidden_states", "output_router_logits"})

NEEDS_GRADIENT = attrgetter("requires_grad")
STATUS = {1: "an activation that is NaN or Inf", 2: "no memory", 3: "a token or a position that its table has not"}


class Generation(Protocol):
    """Calls that belong together. seen: the binding that their first found to hold."""

    seen: object


class NotNative(Exception):
    """A call that the step does not know; the message says why."""


@printable
@dataclass
class NativeStep:
    """A decoder's step, for one host. output: class of what the forward returns. positions: most that the model has.

    structure: what the host was when the step was checked. declined: why calls went to PyTorch, and how often. Copies and pickles are
    bound anew to what they hold.
    """

    decoder: Decoder
    output: type
    positions: int
    structure: Structure | None = None
    declined: Counter[str] = field(default_factory=Counter)
    binding: Binding | None = None

    def __str__(self) -> str:
        layers, count = len(self.decoder.layers), len(self.decoder.operations)
        meetings = "" if self.binding is None else f", threads meet {self.binding.code.meetings} times"
        copies = 0 if self.binding is None else sum(copy.nbytes for copy in self.binding.copies)
        twice = f", {copies / 2**20:.1f} MiB of dense weights kept a second time" if copies else ""
        return f"one call for up to {MOST} tokens with a cache: {layers} layers, {count} operations{meetings}{twice}"

    def generated(self) -> GeneratedKernel | None:
        """The source of the step, while it is bound."""
        if self.binding is None:
            return None
        return GeneratedKernel(f"native_step_{best_isa()}", self.binding.code.source, "step")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "binding": None, "declined": Counter()}

    def __call__(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], generation: Generation | None = None
    ) -> Any:
        """What the host's forward returns for these arguments; None where that is for PyTorch to say."""
        try:
            return self.run(host, args, kwargs, generation)
        except (NotNative, Unknown, BuildError) as why:
            if len(self.declined) < 100:
                self.declined[str(why)] += 1
            return None

    def run(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], generation: Generation | None) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        if len(args) > 1 or (args and "input_ids" in kwargs):
            raise NotNative("arguments by position")
        if type(ids) is not torch.Tensor or ids.dtype != torch.int64 or ids.dim() != 2 or ids.device.type != "cpu":
            raise NotNative("no plain (batch, tokens) of int64 token numbers")
        batch, length = ids.shape
        if not 0 < batch * length <= MOST:
            raise NotNative(f"more than {MOST} tokens at once")
        for name, value in kwargs.items():
            if name not in KNOWN and value is not None and not (value is False and name in SWITCHES):
                raise NotNative(f"an argument {name}")
        cache = kwargs.get("past_key_values")
        if cache is None or kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
            raise NotNative("no cache")
        if torch.is_autocast_enabled("cpu") or torch._C._get_tracing_state() is not None:
            raise NotNative("autocast, or a trace")
        if watched():
            raise NotNative("a mode, a transform or a hook on all modules, which would see nothing of it")
        past = length_of(cache, self.decoder.layers)
        if isinstance(past, str):
            raise NotNative(past)
        binding = self.bound(host, generation)
        if torch.is_grad_enabled() and any(map(NEEDS_GRADIENT, binding.held)):
            raise NotNative("a weight that needs its gradient")
        first = first_seen(kwargs.get("attention_mask"), batch, past + length)
        if kwargs.get("position_ids") is None and bool(first.any()):
            raise NotNative("padding without positions, which some models count from the mask")
        positions = positions_of(
            kwargs.get("position_ids"), batch, length, past, kwargs.get("attention_mask") is not None
        )
        if max(past + length, int(positions.max()) + 1) > self.positions:
            raise NotNative("more tokens than the model has positions")
        keep = kwargs.get("logits_to_keep", 0)
        if type(keep) is not int or keep < 0:
            raise NotNative("logits of chosen tokens")
        keep = length if keep == 0 else min(keep, length)
        store = store_of(cache, self.decoder.layers, batch, past, past + length)
        if isinstance(store, str):
            raise NotNative(store)
        logits = torch.empty(batch, keep, self.decoder.outputs, dtype=torch.float32, device="cpu")
        status = binding.run(ids.contiguous(), positions, first, store.memory, store.capacity, past, keep, logits)
        if status:
            raise NotNative(STATUS.get(status, "an unknown status"))
        store.length = past + length
        return self.output(logits=logits, past_key_values=cache)

    def bound(self, host: nn.Module, generation: Generation | None = None) -> Binding:
        """The binding to a host, made or made anew where something has changed since. generation: calls of which the first looks."""
        found = self.binding
        if found is not None and generation is not None and generation.seen is found:
            return found
        if found is None or found.host is not host or not found.valid():
            self.binding = None
            modules = list(host.modules())
            if any(module.training for module in modules):
                raise NotNative("a module in training mode")
            if any(module._forward_hooks or module._forward_pre_hooks for module in modules if module is not host):
                raise NotNative("hooks on modules inside of the model")
            if self.structure is not None:
                other = difference(self.structure, describe(host, self.decoder.linears))
                if other is not None:
                    raise NotNative(f"another model than was lowered ({other})")
            found = self.binding = bind(host, self.decoder)
        if generation is not None:
            generation.seen = found
        return found


def watched() -> bool:
    """Whether a transform, a mode or a hook that is no module's own wants to see each operator or module."""
    modes = torch.overrides._get_current_function_mode_stack()
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or any(type(mode) is not DeviceContext for mode in modes)
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
    )


def first_seen(mask: Any, batch: int, length: int) -> torch.Tensor:
    """The first token that each sequence sees, by a mask of zeros, then ones. Raises NotNative for another."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device="cpu")
    if type(mask) is not torch.Tensor or mask.dim() != 2 or mask.shape != (batch, length) or mask.is_floating_point():
        raise NotNative("a mask that is not (batch, tokens)")
    seen = mask.ne(0)
    if bool(seen.all()):
        return torch.zeros(batch, dtype=torch.int64, device="cpu")
    first = length - seen.sum(1)
    if bool((seen != (torch.arange(length, device="cpu") >= first[:, None])).any()):
        raise NotNative("a mask with holes, or padding on the right")
    return first


def positions_of(given: Any, batch: int, length: int, past: int, masked: bool) -> torch.Tensor:
    if given is None:
        return torch.arange(past, past + length, device="cpu").repeat(batch, 1)
    if type(given) is not torch.Tensor or given.dim() != 2 or given.dtype != torch.int64 or given.shape[1] != length:
        raise NotNative("positions that are not (batch, tokens)")
    if not masked and length > 1 and bool((given[:, 1:] - given[:, :-1] != 1).any()):
        raise NotNative("positions that begin anew")
    return given.expand(batch, length).contiguous()


__all__ = ["MOST", "NativeStep"]
