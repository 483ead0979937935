"""Models whose linears are quantised already (QLoRA's habit): the packed base is taken as it is, bit for bit.

    bitsandbytes Linear4bit (NF4, FP4)   ──▶  stand-in nn.Linear           ──▶  sparsify's Quantized… module
    bitsandbytes Linear8bitLt                 right shape and dtype,             over the same packed tensors,
    torchao weight-only tensors               NaN without memory                 trained parts beside
    the user's model, untouched               in a twin: trace and select        in the host

`dense_twin` copies the module tree (every other tensor is shared) and puts a stand-in where a quantised linear was, so that the
trace and all passes see plain linears. A stand-in's weight is one NaN, expanded: it takes no memory, and a pass that
read it by mistake could not go unnoticed. Selections that look at weights unpack them for as long as they look
(`select_units.dequantised`); `insert` takes the packed tensors over. Nothing is quantised a second time.

What cannot be taken (GPTQ, AWQ, HQQ, fp8, quantised activations, offloaded weights, a forward under autocast) is refused by
name, with what to do instead.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsify.errors import AdapterError, CaptureError, PlanError
from sparsify.formats import unpack
from sparsify.formats.foreign_tensors import flatten_tensor, register_format, torchao_name
from sparsify.formats.four_bit import four_bit_format
from sparsify.formats.libraries import bitsandbytes
from sparsify.formats.nf4 import BLOCK, NESTED_BLOCK
from sparsify.model.module_tree import copy_module_tree
from sparsify.plan import Plan, Rule
from sparsify.pruning.rule import Prune

Model = TypeVar("Model", bound=nn.Module)

INSTEAD = "load the model in bfloat16 and pack it here, with a rule Quantize(format='nf4') or 'int8' before the others"
HALVES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class PackedBase:
    """One weight as its library packed it. format: for `quantized.unpack`. shape: `(out, in)`. dtype: that the layer computes in.

    The packed tensors are the user's own and are never written; copies of a module share them.
    """

    library: str
    format: str
    packed: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """What the packed weight stands for, a fresh tensor."""
        return unpack(list(self.packed), self.format, tuple(self.shape), self.dtype)

    def hash(self) -> str:
        """Of the packed data: the same base packed the same way, whatever it is computed in."""
        from sparsify.adapters.adapter import tensor_hash

        digest = hashlib.sha256(f"{self.format} {tuple(self.shape)}".encode())
        for tensor in self.packed:
            digest.update(tensor_hash(tensor).encode())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict[int, object]) -> PackedBase:
        return self


class StandIn(nn.Linear):
    """A plain linear that computes in its weight's dtype, whatever its input has, and gives the input's dtype back (bitsandbytes).

    `forward` is `nn.Linear`'s own, by which passes know a plain linear; the casts stand around it.
    """

    def __call__(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        return super().__call__(x) if x.dtype == dtype else super().__call__(x.to(dtype)).to(x.dtype)


# --- finding what is packed ------------------------------------------------------------------------------------------------


class QuantState(Protocol):
    """bitsandbytes' account of a weight in 4 bits; `state2` says the same of its scales, and is None for plain ones."""

    absmax: Tensor
    shape: tuple[int, ...]
    code: Tensor
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested: bool
    state2: QuantState
    offset: Tensor
    original_dtype: torch.dtype
    original_nested: bool


class FourBitLinear(Protocol):
    """bitsandbytes' `Linear4bit`; the state is an attribute of the weight, or of the module."""

    weight: Tensor
    compute_dtype: torch.dtype


class EightBitState(Protocol):
    """Codes and scales of a row; of a weight, and of the state of a `Linear8bitLt` that ran."""

    CB: Tensor | None
    SCB: Tensor | None


class EightBitWeight(EightBitState, Protocol):
    def detach(self) -> Tensor: ...


class EightBitLinear(Protocol):
    """bitsandbytes' `Linear8bitLt`."""

    weight: EightBitWeight
    state: EightBitState


def library_of(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def packed_base(module: nn.Module, name: str, default: torch.dtype) -> PackedBase | None:
    """The packed weight of a linear of bitsandbytes or torchao; None for every other module.

    default: the dtype that activations have where the layer does not name one. Raises CaptureError for a layer of theirs that
    cannot be taken.
    """
    own: Any = module  # of a library without types
    kind = type(module).__name__
    if any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in type(module).__mro__):
        return four_bit(own, name, default)
    if any(c.__name__ == "Linear8bitLt" and c.__module__.startswith("bitsandbytes") for c in type(module).__mro__):
        return eight_bit(own, name, default)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and isinstance(weight, Tensor) and torchao_name(weight) is not None:
        return torchao_base(weight, name, kind)
    return None


def four_bit(module: FourBitLinear, name: str, default: torch.dtype) -> PackedBase:
    weight = module.weight
    state: QuantState | None = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise unpacked_yet(name, module)
    dtype = module.compute_dtype if getattr(module, "compute_type_is_set", True) else None
    dtype = dtype if dtype in HALVES else default if default in HALVES else state.dtype
    data, absmax, shape = weight.detach(), state.absmax, torch.Size(state.shape)
    nested, stored = bool(state.nested), state.dtype
    if getattr(state, "packing_format_for_cpu", False):  # laid out for AVX-512 by an earlier forward: undo it in a copy
        data, absmax, nested, stored = plain_layout(data, state)
    tensors = [data.contiguous().view(torch.uint8).reshape(-1, 1), absmax]
    if nested:
        tensors += [state.state2.absmax, state.state2.code, state.code, state.offset.reshape(1)]
    ours = (state.quant_type, state.blocksize, nested and state.state2.blocksize) == ("nf4", BLOCK, NESTED_BLOCK)
    if ours and stored == dtype and shape[1] % BLOCK == 0:
        return PackedBase("bitsandbytes", "nf4", tuple(tensors), shape, dtype)
    nesting = state.state2.blocksize if nested else 0
    format = four_bit_format(state.quant_type, state.blocksize, stored, nesting)
    if not nested:
        tensors.append(state.code)
    return PackedBase("bitsandbytes", format, tuple(tensors), shape, dtype)


def plain_layout(data: Tensor, state: QuantState) -> tuple[Tensor, Tensor, bool, torch.dtype]:
    """`(data, absmax, nested, dtype)` of a weight that bitsandbytes has laid out for its CPU kernel; nothing is written."""
    twin = copy.copy(state)
    twin.original_nested = False  # the scales stay as they are now; quantising them again would move the base
    data, _ = bitsandbytes()._convert_weight_packed_for_cpu_inverse(data, twin)
    return data, state.absmax.t().reshape(-1).float(), False, state.original_dtype


def eight_bit(module: EightBitLinear, name: str, default: torch.dtype) -> PackedBase:
    weight, state = module.weight, module.state
    if getattr(state, "has_fp16_weights", False):
        raise CaptureError(
            f"{name} is a bitsandbytes Linear8bitLt with has_fp16_weights=True, which packs its weight anew in every forward: make it "
            "with has_fp16_weights=False, or use nn.Linear"
        )
    data = state.CB if state.CB is not None else weight.CB if weight.CB is not None else weight.detach()
    scales = state.SCB if state.SCB is not None else weight.SCB
    if scales is None or data.dtype != torch.int8:
        raise unpacked_yet(name, module)
    dtype = default if default in HALVES else torch.float32
    return PackedBase("bitsandbytes", "int8", (data.detach(), scales.detach()), data.shape, dtype)


def unpacked_yet(name: str, module: object) -> CaptureError:
    return CaptureError(
        f"{name} is a bitsandbytes {type(module).__name__} whose weight is not packed yet: bitsandbytes packs it when the model goes "
        "to its device, so call model.to('cuda') (or 'cpu') first"
    )


def torchao_base(weight: Tensor, name: str, kind: str) -> PackedBase:
    tensors, spec = flatten_tensor(weight)
    if spec.quantises_activations:
        raise CaptureError(
            f"{name} is quantised by torchao (class {kind}, weight {torchao_name(weight)}) with quantised activations, whose gradient "
            f"is not defined here: use a weight-only config such as Int8WeightOnlyConfig, or {INSTEAD}"
        )
    format = register_format(spec)
    try:
        unpack(list(tensors), format, tuple(weight.shape), weight.dtype)
    except Exception as error:
        raise CaptureError(
            f"{name} is quantised by torchao (class {kind}, weight {torchao_name(weight)}), which cannot be unpacked on "
            f"{weight.device}: {error}; {INSTEAD}"
        ) from error
    return PackedBase("torchao", format, tuple(tensors), weight.shape, weight.dtype)


FOREIGN: dict[str, tuple[str, ...]] = {
    "GPTQ": ("auto_gptq", "gptqmodel", "optimum"),
    "AWQ": ("awq", "autoawq"),
    "HQQ": ("hqq",),
    "EETQ": ("eetq",),
    "AQLM": ("aqlm",),
    "VPTQ": ("vptq",),
    "Quanto": ("quanto",),
    "compressed-tensors": ("compressed_tensors",),
    "Quark": ("quark",),
    "PyTorch's eager quantisation": ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.qat"),
}
FLOAT8 = tuple(
    getattr(torch, n) for n in dir(torch) if n.startswith("float8_") and isinstance(getattr(torch, n), torch.dtype)
)


def foreign_library(module: nn.Module) -> str | None:
    """Which quantiser a linear-like module is of that cannot be taken; None for every other module."""
    if type(module).__module__.startswith("sparsify.") or looks_packed(module):
        return None
    place = f"{type(module).__module__}."
    kind = type(module).__name__
    if not any(word in kind.lower() for word in ("linear", "conv1d", "gemm")):
        return None
    for library, prefixes in FOREIGN.items():
        if any(place.startswith(f"{p}.") or f".{p}." in place for p in prefixes):
            return library
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    weight = tensors.get("weight")
    if weight is not None and weight.dtype in FLOAT8:
        return f"8-bit floats ({weight.dtype})"
    if "qweight" in tensors:
        return "GPTQ or AWQ"
    if hasattr(module, "W_q"):
        return "HQQ"
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    if sized and weight is not None and not weight.is_floating_point() and not weight.is_complex():
        return f"{library_of(module)} ({weight.dtype})"
    return None


# --- before the trace ------------------------------------------------------------------------------------------------------


def check_host(model: nn.Module) -> None:
    """Raises CaptureError for a model that hides its linears from the trace: offloaded, wrapped in autocast, or packed in a form
    that cannot be taken. Says which module it is, by what, and what to do."""
    name = type(model).__name__
    forward = model.__dict__.get("forward")
    if "_original_forward" in model.__dict__ or under_autocast(forward):
        raise CaptureError(
            f"{name}: its forward is wrapped for mixed precision (accelerate's prepare, or torch.autocast around forward), which hides "
            "the layers: call sparsify.compile first and accelerator.prepare on what it returns, or unwrap the model "
            "(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    for path, module in model.named_modules():
        if offloaded(module):
            raise CaptureError(
                f"{path or name} is offloaded by accelerate: its weights are on disk or in CPU memory and come only while it runs, so "
                "they can be neither chosen nor trained; load the model without offloading (device_map={'': 0} or 'cpu', in fewer bits "
                "if it does not fit), or prune it from its files with sparsify.pruning.on_disk"
            )
        library = foreign_library(module)
        if library is not None:
            raise CaptureError(
                f"{path or name} is quantised by {library} (class {type(module).__name__}), whose packed weights cannot be trained "
                f"beside: {INSTEAD}; bitsandbytes (Linear4bit, Linear8bitLt) and torchao's weight-only tensors are taken as they are"
            )


def under_autocast(forward: object) -> bool:
    """Whether a forward set on the instance is a wrapper that enters autocast."""
    seen = 0
    while forward is not None and seen < 8:
        code = getattr(getattr(forward, "__func__", forward), "__code__", None)
        name = getattr(code, "co_name", "") + type(forward).__name__
        if "autocast" in name.lower() or "ConvertOutputsToFp32" in name:
            return True
        forward, seen = getattr(forward, "__wrapped__", None) or getattr(forward, "model_forward", None), seen + 1
    return False


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches the module's weights when it runs (they are on the meta device between)."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return any(bool(getattr(h, "offload", False)) for h in hooks) and any(
        p.device.type == "meta" for p in module.parameters()
    )


def activation_dtype(model: nn.Module, packed: set[int]) -> torch.dtype:
    """The dtype of the model's first floating parameter outside of its quantised linears; float32 when there is none."""
    for module in model.modules():
        if id(module) not in packed:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and type(parameter) is nn.Parameter:
                    return parameter.dtype
    return torch.float32


def looks_packed(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    names = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("bitsandbytes")}
    return bool(names & {"Linear4bit", "Linear8bitLt"}) or (weight is not None and torchao_name(weight) is not None)


def dense_twin(model: Model) -> tuple[Model, dict[str, PackedBase]]:
    """`(twin, bases)`: the model with a stand-in for every quantised linear, and what those stand for, by weight name.

    A model without quantised linears is returned itself, or one that a quantiser left dense (GGUF) without its marks. The twin shares
    every other tensor; the user's model is not written to.
    """
    packed = {name: module for name, module in model.named_modules() if looks_packed(module)}
    if not packed:
        return without_marks(model), {}
    default = activation_dtype(model, {id(module) for module in packed.values()})
    memo: dict[int, object] = {}
    bases: dict[str, PackedBase] = {}
    for name, module in packed.items():
        base = packed_base(module, name or type(model).__name__, default)
        if base is None:
            continue
        bases[f"{name}.weight" if name else "weight"] = base
        memo[id(module)] = stand_in(module, base)
    for module in model.modules():
        if id(module) not in memo:
            memo |= {id(t): t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    twin = copy_module_tree(model, memo)
    forget_quantiser(twin)
    return twin, bases


def stand_in(module: nn.Module, base: PackedBase) -> nn.Linear:
    """A plain linear of the right shape, dtype and bias, with the hooks of `module`; its weight is NaN and takes no memory."""
    casts = library_of(module) == "bitsandbytes"
    twin = (StandIn if casts else nn.Linear)(1, 1, bias=False, device="meta")
    twin.out_features, twin.in_features = base.shape
    nothing = torch.full((), float("nan"), dtype=base.dtype, device=base.packed[0].device).expand(base.shape)
    twin.weight = nn.Parameter(nothing, requires_grad=False)
    bias = getattr(module, "bias")  # noqa: B009  for nn.Module's types it cannot be None
    if bias is not None and bias.dtype != base.dtype:
        bias = nn.Parameter(bias.detach().to(base.dtype), requires_grad=bias.requires_grad)
    twin.register_parameter("bias", bias)
    twin.training = module.training
    for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(twin, table).update(getattr(module, table))
    return twin


MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def without_marks(model: Model) -> Model:
    """A twin over the same tensors that says of no quantiser; the model itself where it has none.

    transformers opens GGUF files as dense weights, and leaves marks of a quantiser on the model for which it refuses to save it.
    """
    if all("hf_quantizer" not in module.__dict__ for module in model.modules()):
        return model
    memo: dict[int, object] = {}
    for module in model.modules():
        memo |= {id(t): t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    twin = copy_module_tree(model, memo)
    forget_quantiser(twin)
    return twin


def forget_quantiser(model: nn.Module) -> None:
    """The twin holds no module of the quantiser any more: Hugging Face's marks of one would misinform savers and trainers."""
    for module in model.modules():
        for mark in MARKS:
            module.__dict__.pop(mark, None)
        config = module.__dict__.get("config")
        if config is not None and "quantization_config" in getattr(config, "__dict__", {}):
            del config.quantization_config


def refuse_packed(model: nn.Module) -> None:
    """Raises AdapterError where changes would be added to dense weights and there are none (`sparsify.load`)."""
    check_host(model)
    for name, module in model.named_modules():
        if looks_packed(module):
            where = f"{name or type(model).__name__} came packed by {library_of(module)} ({type(module).__name__})"
            raise AdapterError(
                f"load: {where}, and load adds changes to dense weights: compile the model with the plan that the adapter was trained "
                "with, then call model.sparsify.load_adapter"
            )


def check_plan(plan: Plan, bases: dict[str, PackedBase]) -> None:
    """Raises PlanError for plans that a packed base cannot serve."""
    if not bases:
        return
    name, base = next(iter(bases.items()))
    where = f"{name.rpartition('.')[0] or name} is quantised by {base.library} ({base.format})"
    if plan.for_inference:
        raise PlanError(
            f"Plan(target={plan.target!r}): {where}, and the kernels are made from dense weights: load the model in bfloat16 and add "
            "a rule Quantize(format='int8')"
        )
    if plan.rules and all(isinstance(rule, Prune) for rule in plan.rules):
        return  # what is not packed may still be pruned, and each weight that is packed says so
    if not any(isinstance(rule, Rule) and rule.phase == "adapt" for rule in plan.rules):
        raise PlanError(f"{where} already; add a rule that trains something beside it (LoRA, PaCA, RoSA)")
