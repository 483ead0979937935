"""Weights of other libraries that are tensor subclasses (torchao): taken apart into plain tensors, and put together to be unpacked.

    Int8Tensor ──flatten_tensor──▶ [qdata, scale, …] + spec ──register_format──▶ "torchao/Int8Tensor/3f…"
    unpack_foreign([qdata, scale, …], "torchao/Int8Tensor/3f…") ──▶ the library's own dequantize()

An operator's arguments are plain tensors and strings, so the parts travel as a list and the rest (class, block size, …) stays in
this process under the format's name, which is a hash of it: equal on every rank, and after the same model is loaded again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.formats.format import Format

LIBRARY = "torchao"


@dataclass(frozen=True, eq=False)
class Spec:
    """How a tensor is put together. parts: names of its inner tensors, each with its own spec (None: a plain tensor)."""

    cls: type
    parts: tuple[tuple[str, Spec | None], ...]
    context: object
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def quantises_activations(self) -> bool:
        words = ("act_quant_kwargs", "activation_quantization", "input_quant_func")
        context = self.context if isinstance(self.context, dict) else {}
        own = any(context.get(word) is not None for word in words) or "Activation" in self.cls.__name__
        return own or any(inner is not None and inner.quantises_activations for _, inner in self.parts)

    def describe(self) -> str:
        inner = ", ".join(f"{name}={'' if part is None else part.describe()}" for name, part in self.parts)
        return f"{self.cls.__module__}.{self.cls.__qualname__}({inner}; {self.context!r}; {tuple(self.shape)})"


SPECS: dict[str, Spec] = {}


def torchao_name(tensor: Tensor) -> str | None:
    """Class of a packed torchao tensor; None for every other tensor."""
    kind = type(tensor)
    packed = kind.__module__.partition(".")[0] == LIBRARY and hasattr(tensor, "__tensor_flatten__")
    return kind.__name__ if packed else None


def flatten_tensor(tensor: Tensor) -> tuple[list[Tensor], Spec]:
    """Plain tensors in order, and how they make the whole."""
    names, context = getattr(tensor, "__tensor_flatten__")()  # noqa: B009  torch's types do not have the protocol
    tensors: list[Tensor] = []
    parts: list[tuple[str, Spec | None]] = []
    for name in names:
        inner = getattr(tensor, name)
        if hasattr(inner, "__tensor_flatten__"):
            found, spec = flatten_tensor(inner)
            tensors += found
            parts.append((name, spec))
        else:
            tensors.append(inner.detach())
            parts.append((name, None))
    return tensors, Spec(type(tensor), tuple(parts), context, tensor.shape, tuple(tensor.stride()))


def rebuild(spec: Spec, tensors: list[Tensor]) -> Tensor:
    """The tensor of the library again; takes its parts from the front of `tensors`."""
    inner = {name: tensors.pop(0) if part is None else rebuild(part, tensors) for name, part in spec.parts}
    return spec.cls.__tensor_unflatten__(inner, spec.context, spec.shape, spec.stride)


def register_format(spec: Spec) -> str:
    name = f"{LIBRARY}/{spec.cls.__name__}/{hashlib.sha256(spec.describe().encode()).hexdigest()[:12]}"
    SPECS[name] = spec
    return name


@dataclass(frozen=True)
class Foreign(Format):
    """A weight in its library's own parts; the library unpacks it, checks it, and has no way to pack a changed one alike."""

    name: str
    packs_again: ClassVar[bool] = False

    def pack(self, weight: Tensor) -> list[Tensor]:
        raise SparsifyError(
            f"a weight that came packed as {self.name} cannot be packed again: keep what trains beside it as an adapter"
        )

    def unpack(self, packed: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        spec = SPECS.get(self.name)
        if spec is None:
            raise SparsifyError(
                f"a weight is packed as {self.name}, which this process has not seen: compile the quantised model here instead of "
                "unpickling"
            )
        whole = rebuild(spec, list(packed))
        if hasattr(whole, "dequantize"):
            dense = whole.dequantize()
        else:  # the library only multiplies: its product with the identity
            eye = torch.eye(spec.shape[1], dtype=whole.dtype, device=packed[0].device)
            dense = torch.nn.functional.linear(eye, whole).t()
        return dense.to(dtype=dtype, memory_format=torch.contiguous_format, copy=dense.dtype == dtype)

    def tensors(self, rows: int, columns: int) -> None:
        return None
