"""Masks as part of the program: weights whose pruned entries are exactly zero and stay so, whatever trains them.

    masked_linear(x, weight, bits, bias)        y = x (W∘M)ᵀ + b          dW = (gᵀ x)∘M         (transposed: W is stored (in, out))
    masked_grad(g, x, bits)                     (gᵀ x)∘M                  masked in place, in pieces that stay in cache
    apply_mask(t, bits)                         t∘M                       its own gradient

`weight` is an ordinary `nn.Parameter` with exact zeros where `M` is zero: that is the operator's precondition, so the forward is one
dense GEMM and costs nothing extra; the gradient is masked *inside* the operator, before accumulation, clipping, GradScaler and
DDP see it. Three things keep the precondition: gradients are masked, a hook after every `torch.optim` step writes the zeros again (stale
momentum, weight decay, noise, fused kernels), and loading a state dict does too. `M` is one bit per weight, in a buffer
that is not part of the state dict: a checkpoint has the dense model's names and shapes; `mask_state` and `load_mask_state` carry the masks.

`M` is packed flat and little-endian: bit `k % 8` of byte `k // 8` is entry `k` of the *stored* tensor.

Optimizer state for survivors only (`SurvivorLinear`, `survivor_linear`): the Parameter holds the surviving values alone, so gradient,
moments and master copy shrink with them, and the dense weight exists only while its layer runs.

    held between steps (weight, gradient, two Adam moments, mask or positions), fp32, bytes per weight   50 %   75 %   90 %
    nn.Linear                                                                                            16.0   16.0   16.0
    MaskedLinear                                                                                         16.1   16.1   16.1
    SurvivorLinear                                                                                       10.0    5.0    2.0

    peak inside one step of a 4096 × 4096 layer and 512 tokens, above what is held: 80 MiB, 80.5 MiB, and 200, 168, 150 MiB
    time of that step with fused AdamW over the dense one (two threads): 1, 1.06–1.23, and 1.24, 1.30, 1.15

Measured with `benchmarks/masked_step.py`. So state for survivors saves memory from 50 % on as soon as a model has a few layers (its
transient cost is one dense weight and one dense gradient, of one layer). The default is `MaskedLinear` all the same: its Parameter is the
user's own, with the user's name and shape, and its forward is exactly the dense layer's GEMM; `SurvivorLinear` is there for when
memory decides.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from sparsify.errors import SparsifyError
from sparsify.ops.checks import (
    require,
    require_floats,
    require_index,
    require_shape,
    require_together,
    require_within,
)
from sparsify.ops.library import LIBRARY
from sparsify.sharded import local, piece_of, refuse_sharded, whole

LIBRARY.define("masked_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias, bool transposed=False) -> Tensor")
LIBRARY.define("apply_mask(Tensor t, Tensor bits) -> Tensor")
LIBRARY.define("masked_grad(Tensor g, Tensor x, Tensor bits) -> Tensor")
LIBRARY.define("survivor_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, int rows) -> Tensor")

# --- bits ------------------------------------------------------------------------------------------------------------------


def pack_bits(mask: Tensor) -> Tensor:
    """Bool mask of any shape → uint8 `(ceil(numel / 8),)`; unused bits are zero."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


_TABLES: dict[torch.device, Tensor] = {}


def byte_table(device: torch.device) -> Tensor:
    """The eight bools of every byte, as one int64 each: unpacking is one gather."""
    if device not in _TABLES:
        byte = torch.arange(256, dtype=torch.int64)[:, None]
        bools = ((byte >> torch.arange(8)) & 1).to(torch.uint8)
        _TABLES[device] = bools.view(torch.int64).flatten().to(device)
    return _TABLES[device]


def unpack_bits(bits: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Inverse of `pack_bits`: bool of `shape`."""
    count = int(torch.Size(shape).numel())
    if bits.device.type == "meta" or torch.compiler.is_compiling():
        flat = _unpack_by_shifts(bits)
    else:
        flat = byte_table(bits.device).index_select(0, bits.int()).view(torch.bool)
    return flat[:count].view(shape)


def _unpack_by_shifts(bits: Tensor) -> Tensor:
    """All bits as bools, in arithmetic that compilers and torch.func can see through."""
    return ((bits[:, None] >> torch.arange(8, device=bits.device, dtype=torch.uint8)) & 1).flatten().to(torch.bool)


# --- the oracle --------------------------------------------------------------------------------------------------------------


def oracle_masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """`x (W∘M)ᵀ + b` in any precision; `mask` bool of the weight's shape `(n, m)`."""
    y = x @ torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)).transpose(0, 1)
    return y if bias is None else y + bias


def oracle_masked_linear_backward(g: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(dX, dW, db)`: `g (W∘M)`, `(gᵀ x)∘M`, `Σ g`, written out."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return g @ torch.where(mask, weight, zero), torch.where(mask, flat_g.transpose(0, 1) @ flat_x, zero), flat_g.sum(0)


# --- what is checked -----------------------------------------------------------------------------------------------------------


def _check_bits(name: str, bits: Tensor, count: Any) -> None:
    """That `bits` hold one bit for each of `count` entries; shapes only."""
    require(
        bits.dim() == 1 and bits.dtype == torch.uint8,
        lambda: f"{name}: bits are {bits.dtype} {tuple(bits.shape)}, expected uint8 in one dimension",
    )
    require(
        bits.shape[0] == (count + 7) // 8,
        lambda: f"{name}: bits {tuple(bits.shape)} do not describe {count} entries, which are {(count + 7) // 8} bytes",
    )


def _check_linear(name: str, x: Tensor, rows: Any, columns: Any, bias: Tensor | None) -> None:
    require(x.dim() >= 1, lambda: f"{name}: the input has no dimension")
    require(x.shape[-1] == columns, lambda: f"{name}: x has {x.shape[-1]} channels, the weight {columns}")
    if bias is not None:
        require_shape(name, "bias", bias, rows)


# --- apply_mask ----------------------------------------------------------------------------------------------------------------


def _apply_mask(t: Tensor, bits: Tensor) -> Tensor:
    _check_bits("apply_mask", bits, t.numel())
    require_together("apply_mask", t, bits)
    return t.masked_fill(~unpack_bits(bits, t.shape), 0).contiguous()


def _apply_mask_fake(t: Tensor, bits: Tensor) -> Tensor:
    _check_bits("apply_mask", bits, t.numel())
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _keep_bits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _apply_mask_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    (bits,) = ctx.saved_tensors
    return torch.ops.sparsify.apply_mask(g, bits), None


def _apply_mask_in_aten(t: Tensor, bits: Tensor) -> Tensor:
    _check_bits("apply_mask", bits, t.numel())
    return t.masked_fill(~_unpack_by_shifts(bits)[: t.numel()].view(t.shape), 0)


LIBRARY.impl("apply_mask", _apply_mask, "CompositeExplicitAutograd")
LIBRARY.in_aten("apply_mask", _apply_mask_in_aten)
torch.library.register_fake("sparsify::apply_mask", _apply_mask_fake, lib=LIBRARY)
torch.library.register_autograd("sparsify::apply_mask", _apply_mask_backward, setup_context=_keep_bits, lib=LIBRARY)

# --- masked_grad ---------------------------------------------------------------------------------------------------------

PIECE = 1 << 18


def _check_masked_grad(g: Tensor, x: Tensor, bits: Tensor) -> None:
    require(
        g.dim() == 2 and x.dim() == 2, lambda: f"masked_grad: g and x are matrices, not {g.dim()}-D and {x.dim()}-D"
    )
    require(g.shape[0] == x.shape[0], lambda: f"masked_grad: g has {g.shape[0]} tokens, x {x.shape[0]}")
    _check_bits("masked_grad", bits, g.shape[1] * x.shape[1])


def _masked_grad(g: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    _check_masked_grad(g, x, bits)
    require_together("masked_grad", g, x, bits)
    dense = g.t().mm(x)
    flat = dense.view(-1)
    for start in range(0, flat.numel(), PIECE):  # a multiple of 8 entries, so of whole bytes
        piece = flat[start : start + PIECE]
        part = bits[start // 8 : (start + piece.numel() + 7) // 8]
        piece.masked_fill_(~unpack_bits(part, piece.shape), 0)
    return dense


def _masked_grad_fake(g: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    _check_masked_grad(g, x, bits)
    return g.new_empty((g.shape[1], x.shape[1]))


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _masked_grad_backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    g, x, bits = ctx.saved_tensors
    kept = torch.ops.sparsify.apply_mask(outer, bits)
    need = ctx.needs_input_grad
    return x.mm(kept.t()) if need[0] else None, g.mm(kept) if need[1] else None, None


LIBRARY.impl("masked_grad", _masked_grad, "CompositeExplicitAutograd")
LIBRARY.in_aten("masked_grad", lambda g, x, bits: _apply_mask_in_aten(g.t().mm(x), bits))
torch.library.register_fake("sparsify::masked_grad", _masked_grad_fake, lib=LIBRARY)
torch.library.register_autograd(
    "sparsify::masked_grad", _masked_grad_backward, setup_context=_save_factors, lib=LIBRARY
)

# --- masked_linear ---------------------------------------------------------------------------------------------------------------


def _check_masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, transposed: bool) -> None:
    name = "masked_linear"
    require(weight.dim() == 2, lambda: f"{name}: the weight {tuple(weight.shape)} is no matrix")
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    _check_linear(name, x, rows, columns, bias)
    _check_bits(name, bits, weight.numel())


def _masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    _check_masked_linear(x, weight, bits, bias, transposed)
    require_together("masked_linear", x, weight, bits, bias)
    return F.linear(x, weight.t() if transposed else weight, bias)


def _masked_linear_fake(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, transposed: bool = False
) -> Tensor:
    _check_masked_linear(x, weight, bits, bias, transposed)
    return x.new_empty((*x.shape[:-1], weight.shape[1] if transposed else weight.shape[0]))


def _masked_linear_in_aten(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, transposed: bool = False
) -> Tensor:
    kept = _apply_mask_in_aten(weight, bits)
    return F.linear(x, kept.t() if transposed else kept, bias)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bits, bias, transposed = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None, bits)
    ctx.has_bias, ctx.transposed = bias is not None, transposed


def _masked_linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bits = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        if torch.is_grad_enabled():  # recorded: the same product, whose gradient for the weight is masked
            dx = torch.ops.sparsify.masked_linear(g, weight, bits, None, not ctx.transposed)
        else:
            dx = g.matmul(weight.t() if ctx.transposed else weight)
    if ctx.needs_input_grad[1]:
        flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (flat_x, flat_g) if ctx.transposed else (flat_g, flat_x)
        dw = torch.ops.sparsify.masked_grad(left, right, bits)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        db = g.reshape(-1, g.shape[-1]).sum(0)
    return dx, dw, None, db, None


LIBRARY.impl("masked_linear", _masked_linear, "CompositeExplicitAutograd")
LIBRARY.in_aten("masked_linear", _masked_linear_in_aten)
torch.library.register_fake("sparsify::masked_linear", _masked_linear_fake, lib=LIBRARY)
torch.library.register_autograd(
    "sparsify::masked_linear", _masked_linear_backward, setup_context=_save_linear, lib=LIBRARY
)

# --- survivor_linear: the Parameter holds only what survived -------------------------------------------------------------------


def expand_survivors(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    """Dense `(rows, columns)` from surviving values `(k,)` at flat positions `index (k,)`."""
    return values.new_zeros(rows * columns).index_put_((index,), values).view(rows, columns)


def _check_survivors(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> None:
    name = "survivor_linear"
    require_index(name, "index", index)
    require(
        values.shape == index.shape, lambda: f"{name}: {tuple(values.shape)} values but {tuple(index.shape)} positions"
    )
    _check_linear(name, x, rows, x.shape[-1], bias)


def _survivor_linear(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    name = "survivor_linear"
    _check_survivors(x, values, index, bias, rows)
    require_together(name, x, values, index, bias)
    require_floats(name, x=x, values=values, bias=bias)
    require_within(name, "index", index, rows * x.shape[-1], "weight")
    return F.linear(x, expand_survivors(values, index, rows, x.shape[-1]), bias)


def _survivor_linear_fake(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    _check_survivors(x, values, index, bias, rows)
    return x.new_empty((*x.shape[:-1], rows))


def _save_survivors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, bias, rows = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values if ctx.needs_input_grad[0] else None, index)
    ctx.rows, ctx.columns, ctx.has_bias = rows, x.shape[-1], bias is not None


def _survivor_linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, values, index = ctx.saved_tensors
    dx = dv = db = None
    if ctx.needs_input_grad[0]:
        dense = values.new_zeros(ctx.rows * ctx.columns).index_copy(0, index.long(), values)
        dx = g.matmul(dense.view(ctx.rows, ctx.columns))
    if ctx.needs_input_grad[1]:
        dv = g.reshape(-1, g.shape[-1]).t().mm(x.reshape(-1, x.shape[-1])).view(-1).index_select(0, index)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        db = g.reshape(-1, g.shape[-1]).sum(0)
    return dx, dv, None, db, None


def _survivor_linear_in_aten(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    dense = values.new_zeros(rows * x.shape[-1]).index_copy(0, index.long(), values)
    return F.linear(x, dense.view(rows, x.shape[-1]), bias)


LIBRARY.impl("survivor_linear", _survivor_linear, "CompositeExplicitAutograd")
LIBRARY.in_aten("survivor_linear", _survivor_linear_in_aten)
torch.library.register_fake("sparsify::survivor_linear", _survivor_linear_fake, lib=LIBRARY)
torch.library.register_autograd(
    "sparsify::survivor_linear", _survivor_linear_backward, setup_context=_save_survivors, lib=LIBRARY
)


def _autocast(op: Any, device: str) -> Any:
    """As in `F.linear`: activations, weight and bias go to the autocast dtype; gradients return in their own."""
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device]

    def rule(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))

    return rule


for _name in ("masked_linear", "survivor_linear"):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(_name, _autocast(getattr(torch.ops.sparsify, _name).default, _device), _key)


# --- modules that carry masks ----------------------------------------------------------------------------------------------------

_LIVE: weakref.WeakSet[MaskedModule] = weakref.WeakSet()
_STEP_HOOK: list[Any] = []


def bits_name(leaf: str) -> str:
    """Name of the buffer that holds the mask of the parameter `leaf`."""
    return f"{leaf}_mask_bits"


class MaskedModule(nn.Module):
    """Mixin: parameters of this module that have masks, by leaf name. Mixed in by `masked_class`, before the user's class.

    Invariant: where a mask is False the parameter is exactly zero after construction, every optimizer step,
    `load_state_dict` and `set_mask`.
    """

    masked_leaves: tuple[str, ...] = ()

    def attach_mask(self, leaf: str, mask: Tensor) -> None:
        """Start masking the parameter `leaf`; its data is replaced by a masked *copy* (the old tensor is not written)."""
        parameter = getattr(self, leaf)
        if mask.shape != parameter.shape or mask.dtype is not torch.bool:
            raise SparsifyError(
                f"mask of {leaf}: expected bool {tuple(parameter.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        fresh = nn.Parameter(
            parameter.detach().masked_fill(~mask.to(parameter.device), 0), requires_grad=parameter.requires_grad
        )
        setattr(self, leaf, fresh)
        self.register_buffer(bits_name(leaf), pack_bits(mask.to(parameter.device)), persistent=False)
        if leaf not in self.masked_leaves:
            self.masked_leaves = (*self.masked_leaves, leaf)
        self._watch()

    def mask(self, leaf: str = "weight") -> Tensor:
        """Survivors of a parameter, bool of its shape."""
        return unpack_bits(getattr(self, bits_name(leaf)), getattr(self, leaf).shape)

    @torch.no_grad()
    def set_mask(self, leaf: str, mask: Tensor) -> None:
        """Replace the mask in place (same buffer, so compiled code and DDP see it) and zero what it drops."""
        bits = getattr(self, bits_name(leaf))
        bits.copy_(pack_bits(mask.to(bits.device)))
        self.rezero(leaf)

    @torch.no_grad()
    def rezero(self, leaf: str) -> None:
        """Write the exact zeros again."""
        parameter, bits = getattr(self, leaf), getattr(self, bits_name(leaf))
        if "meta" not in (parameter.device.type, bits.device.type):
            local_fill(parameter, ~unpack_bits(bits, parameter.shape))

    def _watch(self) -> None:
        _LIVE.add(self)
        if not _STEP_HOOK:
            _STEP_HOOK.append(register_optimizer_step_post_hook(_after_step))
        if set(self.masked_leaves) <= set(self._operator_leaves):
            return
        hook_gradients(self)
        if (
            hook_gradients not in self._forward_pre_hooks.values()
        ):  # fully_shard brings other parameters into the forward
            self.register_forward_pre_hook(hook_gradients)

    def _unwatch(self) -> None:
        """Take the forward hook away again."""
        for key in [k for k, hook in self._forward_pre_hooks.items() if hook is hook_gradients]:
            del self._forward_pre_hooks[key]

    #: leaves whose gradient the operator masks; the others get a gradient hook
    _operator_leaves: tuple[str, ...] = ()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._watch()  # assign=True replaces Parameters
        for leaf in self.masked_leaves:
            self.rezero(leaf)

    def train(self, mode: bool = True) -> Any:
        self._watch()  # a parameter that was frozen may train now
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._watch()
        return result


def local_fill(parameter: Tensor, gone: Tensor) -> None:
    """`parameter[gone] = 0`; of a sharded parameter every rank fills its piece, without communication."""
    local(parameter).masked_fill_(piece_of(gone, parameter), 0)


_GRADIENT_HOOKS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def hook_gradients(module: MaskedModule, _args: Any = None) -> None:
    """Mask the gradients of the parameters that no operator masks, whichever stand in the module now."""
    if torch.compiler.is_compiling():
        return
    for leaf in module.masked_leaves:
        if leaf not in module._operator_leaves:
            _hook_gradient(module, leaf)


def _hook_gradient(module: MaskedModule, leaf: str) -> None:
    """Mask the gradient of a parameter that no operator masks (packed experts), before it is accumulated."""
    parameter = getattr(module, leaf)
    if parameter in _GRADIENT_HOOKS or not parameter.requires_grad:
        return
    owner = weakref.ref(module)

    def hook(gradient: Tensor) -> Tensor:
        alive = owner()
        return gradient if alive is None else torch.ops.sparsify.apply_mask(gradient, getattr(alive, bits_name(leaf)))

    _GRADIENT_HOOKS[parameter] = parameter.register_hook(hook)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After any optimizer's step: the zeros of every masked parameter that it holds are written again."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in list(_LIVE):
        for leaf in module.masked_leaves if isinstance(module, MaskedModule) else ():  # unmasked meanwhile
            if id(getattr(module, leaf)) in stepped:
                module.rezero(leaf)


class MaskedLinear(MaskedModule, nn.Linear):
    """An `nn.Linear` whose pruned entries stay zero. Same names, shapes and state dict as the dense layer."""

    _operator_leaves = ("weight",)
    weight_mask_bits: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.sparsify.masked_linear(input, self.weight, self.weight_mask_bits, self.bias)


class SurvivorLinear(nn.Linear):
    """An `nn.Linear` whose Parameter `weight_values (k,)` holds the surviving values only; `weight` is made for each use.

    Gradient, optimizer state and fp32 master copy have `k` entries, so pruned entries cannot come back through anything. State
    dicts show the dense `weight`, as for the dense layer.

    index: flat positions of the survivors, int32 `(k,)` (4 bytes each; the layer must have fewer than 2³¹ entries).
    """

    weight_index: Tensor
    weight_values: nn.Parameter

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor) -> SurvivorLinear:
        """Survivors of `linear` under `mask (n, m)`; nothing of `linear` is written, its bias is shared."""
        if mask.shape != linear.weight.shape or mask.numel() >= 2**31:
            raise SparsifyError(
                f"mask {tuple(mask.shape)} does not fit a weight {tuple(linear.weight.shape)} below 2³¹ entries"
            )
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        del made.weight
        index = mask.flatten().nonzero().flatten()
        made.weight_values = nn.Parameter(
            linear.weight.detach().reshape(-1)[index], requires_grad=linear.weight.requires_grad
        )
        made.register_buffer("weight_index", index.to(torch.int32), persistent=False)
        made.bias = linear.bias
        return made.train(linear.training)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "weight_values" in self._parameters:
            return expand_survivors(self.weight_values, self.weight_index, self.out_features, self.in_features)
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.sparsify.survivor_linear(
            input, self.weight_values, self.weight_index, self.bias, self.out_features
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        values = destination.pop(prefix + "weight_values")
        destination[prefix + "weight"] = expand_survivors(
            values, self.weight_index, self.out_features, self.in_features
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None and dense.numel() == self.out_features * self.in_features:
            state_dict[prefix + "weight_values"] = dense.reshape(-1).index_select(0, self.weight_index.to(dense.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        state_dict.pop(prefix + "weight_values", None)
        if dense is not None:
            state_dict[prefix + "weight"] = dense


_CLASSES: dict[type, type] = {nn.Linear: MaskedLinear}


def masked_class(base: type[nn.Module]) -> type[nn.Module]:
    """The masked subclass of a user's class: `isinstance` still holds. Cached; Linear and Conv1D run `masked_linear`."""
    if issubclass(base, MaskedModule):
        return base
    if base not in _CLASSES:
        body: dict[str, Any] = {"__module__": __name__, "__qualname__": f"Masked{base.__name__}", "_base": base}
        if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
            doc = "A transformers Conv1D `(in, out)` whose pruned entries stay zero."
            body |= {"forward": _conv1d_forward, "_operator_leaves": ("weight",), "__doc__": doc}
        elif issubclass(base, nn.Linear) and base.forward is nn.Linear.forward:
            body |= {"forward": MaskedLinear.forward, "_operator_leaves": ("weight",)}
        else:
            body |= {"__reduce_ex__": _reduce_dynamic}
        if issubclass(base, nn.Linear):
            body |= {"__reduce_ex__": _reduce_dynamic}
        _CLASSES[base] = type(f"Masked{base.__name__}", (MaskedModule, base), body)
    return _CLASSES[base]


def _reduce_dynamic(self: nn.Module, protocol: int) -> Any:
    return _rebuild, (type(self)._base,), self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = masked_class(base)
    return cls.__new__(cls)


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:
    """Conv1D stores `(in, out)`, and so does its mask."""
    return torch.ops.sparsify.masked_linear(x, self.weight, self.weight_mask_bits, self.bias, True)


def __getattr__(name: str) -> Any:
    if name == "MaskedConv1D":
        from transformers.pytorch_utils import Conv1D

        return masked_class(Conv1D)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mask_modules(host: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Give the parameters named in `masks` (qualified name → bool of the stored shape) masks, in the given module tree.

    The owners become their masked subclass in place (`__class__`), and the parameters become new Parameters: tensors that `host` shares
    with another module are not written. Tied parameters must not be masked (raises SparsifyError), nor sharded ones.
    """
    refuse_sharded(host, "mask_modules")
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        owner = host.get_submodule(path)
        same = [n for n, p in host.named_parameters(remove_duplicate=False) if p is getattr(owner, leaf)]
        if len(same) > 1:
            raise SparsifyError(
                f"{name} is tied to {', '.join(n for n in same if n != name)}: a tied weight cannot have a mask"
            )
        owner.__class__ = masked_class(type(owner))
        assert isinstance(owner, MaskedModule)
        owner.attach_mask(leaf, mask)


def masked_modules(host: nn.Module) -> Iterator[tuple[str, MaskedModule]]:
    """`(qualified name, module)` of every module that carries masks."""
    for name, module in host.named_modules():
        if isinstance(module, MaskedModule) and module.masked_leaves:
            yield name, module


def masked_parameters(host: nn.Module) -> Iterator[tuple[str, MaskedModule, str]]:
    """`(qualified parameter name, module, leaf)` of every masked parameter."""
    for path, module in masked_modules(host):
        for leaf in module.masked_leaves:
            yield f"{path}.{leaf}" if path else leaf, module, leaf


def mask_state(host: nn.Module) -> dict[str, Tensor]:
    """Packed masks by parameter name, to be saved next to a checkpoint (`safetensors.torch.save_file`)."""
    return {name: getattr(module, bits_name(leaf)).clone() for name, module, leaf in masked_parameters(host)}


def load_mask_state(host: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of `mask_state`, into a host that carries masks on the same parameters. Nothing is changed if it does not fit."""
    present = {name: (module, leaf) for name, module, leaf in masked_parameters(host)}
    if set(present) != set(state):
        missing, foreign = sorted(set(present) - set(state))[:3], sorted(set(state) - set(present))[:3]
        raise SparsifyError(f"masks do not fit the model: missing {missing}, unknown {foreign}")
    for name, bits in state.items():
        module, leaf = present[name]
        here = getattr(module, bits_name(leaf))
        if bits.dtype is not torch.uint8 or bits.shape != here.shape:
            raise SparsifyError(
                f"mask of {name}: expected uint8 {tuple(here.shape)}, got {bits.dtype} {tuple(bits.shape)}"
            )
    for name, bits in state.items():
        module, leaf = present[name]
        getattr(module, bits_name(leaf)).copy_(bits)
        module.rezero(leaf)


def rezero(host: nn.Module) -> None:
    """Write the exact zeros of every mask again: after code that writes weights without an optimizer (a weight average, noise)."""
    for _, module, leaf in masked_parameters(host):
        module.rezero(leaf)


def check_masks(host: nn.Module) -> None:
    """Raises SparsifyError naming the first parameter that has a nonzero pruned entry."""
    for name, module, leaf in masked_parameters(host):
        count = int((whole(getattr(module, leaf).detach()).masked_fill(module.mask(leaf), 0) != 0).sum())
        if count:
            raise SparsifyError(
                f"{name}: {count} pruned entries are not zero; call sparsify.masked_modules.rezero(model)"
            )
