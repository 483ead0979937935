"""Capture: any `nn.Module` → a `Program` at stage CAPTURED, without writing to the module.

    model (nn.Module) ──torch.export (non-strict, eval, caches off)──▶ ATen graph; every tensor a named input

Hugging Face models need no example: dummy inputs are made from the config. Whole operators (`aten.linear`,
`aten.scaled_dot_product_attention`) survive, and every parameter keeps its qualified name.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import sparsify.ops  # noqa: F401  (registers the operators that a host may already contain)
from sparsify.errors import CaptureError
from sparsify.program import Program, Stage
from sparsify.sharded import back_to_pieces

CACHE_SWITCHES = ("use_cache",)


def capture(model: nn.Module, example: Any = None) -> Program:
    """Trace `model` into a `Program`.

    example: positional inputs as a tuple or list, keyword inputs as a mapping (a batch from a data loader), or one
        tensor. None is enough for Hugging Face models.

    Raises CaptureError with the line of the model that stopped the trace and what to try.
    """
    model = unwrap(model)
    args, kwargs = example_inputs(model, example)
    with evaluating(model), torch.no_grad():
        try:
            exported = torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            raise CaptureError(explain(model, error)) from error
    return Program.from_export(exported, model, args, kwargs)


def capture_training(program: Program) -> Program:
    """The same model and example traced in train mode: for what differs there, never for transforming.

    Raises whatever the trace raises.
    """
    model = shadow_of(program.host)
    model.train()
    args, kwargs = program.example
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        exported = torch.export.export(model, args, kwargs, strict=False)
    return Program.from_export(exported, model, args, kwargs)


def shadow_of(model: nn.Module, copy_tensors: bool = False) -> nn.Module:
    """The module tree again, over the same tensors or copies: what a forward sets, registers or swaps stays in the shadow."""
    made: dict[int, nn.Module] = {}
    tensors: dict[int, Any] = {}

    def shared(tensor: Any) -> Any:
        if tensor is None or not copy_tensors:
            return tensor
        if id(tensor) not in tensors:
            fresh = tensor.detach().clone()
            tensors[id(tensor)] = (
                nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh
            )
        return tensors[id(tensor)]

    def again(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        twin = made[id(module)] = module.__class__.__new__(module.__class__)
        twin.__dict__.update(module.__dict__)
        for table in ("_parameters", "_buffers"):
            twin.__dict__[table] = {n: shared(t) for n, t in module.__dict__[table].items()}
        twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        twin.__dict__["_modules"] = {n: None if m is None else again(m) for n, m in module._modules.items()}
        return twin

    return again(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under `torch.compile` and DistributedDataParallel; other wrappers are refused."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return unwrap(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise CaptureError(
            f"{type(model).__name__} wraps the model: call sparsify.compile on the model first, "
            "then wrap what it returns, so that only the trainable slices are synchronised"
        )
    if isinstance(model, nn.Module) and back_to_pieces(model):
        raise CaptureError(
            "fully_shard has cut the model's parameters into pieces: call sparsify.compile on the model first, then fully_shard "
            "the blocks of what it returns and what it returns itself"
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python forward to trace: pass the original nn.Module")
    return model


def example_inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one forward call, caches switched off, tensors on the model's device."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    if example is None:
        kwargs = dummy_inputs(model)
        args: tuple[Any, ...] = ()
    elif isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, torch.Tensor):
        args, kwargs = (example,), {}
    elif isinstance(example, tuple | list):
        args, kwargs = tuple(example), {}
    else:
        raise CaptureError(f"example: expected a mapping, a tuple, or a tensor, got {type(example).__name__}")
    kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "return_loss")}
    accepted = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    for switch in CACHE_SWITCHES:
        if switch in accepted or (open_ended and hasattr(getattr(model, "config", None), switch)):
            kwargs[switch] = False
    move = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    args, kwargs = pytree.tree_map(move, (args, kwargs))
    return args, kwargs


def dummy_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Small inputs of a Hugging Face model, from its config: two rows, seven tokens (pairwise different sizes)."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise CaptureError(
            f"{type(model).__name__} is not a Hugging Face model: pass example=… (a batch as a mapping, or a tuple "
            "of positional inputs)"
        )
    accepted = inspect.signature(model.forward).parameters
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config", "audio_config"))]

    def setting(*names: str) -> Any:
        for part in parts:
            for name in names:
                value = getattr(part, name, None) if part is not None else None
                if value is not None:
                    return value
        return None

    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}

    def tokens(length: int) -> torch.Tensor:
        high = int(setting("vocab_size") or 32)
        limit = setting("max_position_embeddings", "n_positions")
        length = min(length, int(limit)) if isinstance(limit, int) and limit > 0 else length
        return torch.randint(min(3, high - 1), high, (2, length), generator=generator).to(device)

    if "input_ids" in accepted and model.main_input_name != "input_features":
        inputs["input_ids"] = tokens(7)
    if "pixel_values" in accepted and setting("image_size") is not None:
        size = setting("image_size")
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, setting("num_channels") or 3, height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(device, dtype)
    if "input_features" in accepted and setting("num_mel_bins") is not None:
        frames = 2 * int(setting("max_source_positions") or 50)
        shape = (2, int(setting("num_mel_bins")), frames)
        inputs["input_features"] = torch.randn(shape, generator=generator).to(device, dtype)
    if "input_values" in accepted:
        inputs["input_values"] = torch.randn(2, 800, generator=generator).to(device, dtype)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens(5)
    if not inputs:
        raise CaptureError(
            f"cannot make inputs for {type(model).__name__} from its config (its main input is "
            f"'{model.main_input_name}'): pass example=…"
        )
    return inputs


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the trace (no dropout in the graph); every module's own flag is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def explain(model: nn.Module, error: Exception) -> str:
    """Which line of the model stopped the trace, in which submodule's class, and what to try."""
    files = {}
    for module in model.modules():
        with contextlib.suppress(TypeError, OSError):
            files[inspect.getsourcefile(type(module))] = type(module).__name__
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files and "/torch/" not in f.filename]
    where = f" at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: `{own[-1].line}`" if own else ""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    data_dependent = "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__
    hint = (
        "the code branches on the values of a tensor: branch on shapes or config instead, or use torch.where"
        if data_dependent
        else "call the model once with the same example outside sparsify; if that works, pass a more typical batch "
        "as example=…, or replace the line by tensor operations that torch.export can trace"
    )
    return f"in stage 'capture': {type(model).__name__} could not be traced{where}\n  {type(error).__name__}: {reason}\n  try: {hint}"


__all__ = ["Stage", "capture", "dummy_inputs", "evaluating", "example_inputs", "unwrap"]
