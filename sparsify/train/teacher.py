"""The teacher's side of distillation: its states for a batch, a cache of them, and an int8 copy of the model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.errors import SparsifyError
from sparsify.files.tensors import TensorFile, write_tensors
from sparsify.model.module_tree import copy_module_tree

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass
class TeacherStates:
    """Block outputs `(batch, tokens, hidden)` each, and logits when KL asks for them."""

    hidden: list[Tensor]
    logits: Tensor | None


def batch_key(batch: Mapping[str, object]) -> str:
    """A hash of every tensor in a batch, names and shapes included."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor):
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                if value.numel()
                else b""
            )
        else:
            digest.update(f"{name}={value!r}".encode())
    return digest.hexdigest()


class TeacherCache:
    """The teacher's states by batch content, in memory or as one safetensors file per batch in `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.memory: dict[str, TeacherStates] = {}
        self.hits = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, batch: Mapping[str, object]) -> TeacherStates | None:
        key = batch_key(batch)
        found = self.memory.get(key)
        if found is None and self.folder is not None and (path := self.folder / f"{key}.safetensors").exists():
            found = read_states(path)
        self.hits += found is not None
        return found

    def put(self, batch: Mapping[str, object], states: TeacherStates) -> None:
        key = batch_key(batch)
        if self.folder is None:
            self.memory[key] = states
            return
        tensors = {f"hidden.{i}": hidden for i, hidden in enumerate(states.hidden)}
        if states.logits is not None:
            tensors["logits"] = states.logits
        write_tensors(self.folder / f"{key}.safetensors", tensors, {})


def read_states(path: Path) -> TeacherStates | None:
    """States from a file; None, with a warning, when it is damaged: the teacher computes them again."""
    try:
        file = TensorFile(path)
        names = [f"hidden.{i}" for i in range(len(file.parts) - ("logits" in file.parts))]
        return TeacherStates(
            [file.read(name) for name in names], file.read("logits") if "logits" in file.parts else None
        )
    except SparsifyError as error:
        warnings.warn(f"the teacher's states are computed again: {error}", stacklevel=4)
        return None


class Int8Linear(nn.Module):
    """`y = x (s · Q)ᵀ + b` with int8 `Q (n, m)` and one scale per output row `s (n, 1)`; no gradient."""

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = weight.abs().amax(1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("values", (weight.float() / scale).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))
        self.bias = linear.bias

    @property
    def weight(self) -> Int[Tensor, "n m"]:
        """The int8 values: models that look at `weight.dtype` (T5) then leave activations as they are."""
        return self.values

    def forward(self, input: Float[Tensor, "*t m"]) -> Float[Tensor, "*t n"]:
        return F.linear(input, (self.values.to(self.scale.dtype) * self.scale).to(input.dtype), self.bias)


def int8_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree with int8 weights in every `nn.Linear` (tied output layers excepted); other tensors are shared."""
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    made = copy_module_tree(model, memo)
    counts: dict[int, int] = {}
    for _, parameter in made.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and counts[id(child.weight)] == 1:
                setattr(parent, name, Int8Linear(child))
    return made
