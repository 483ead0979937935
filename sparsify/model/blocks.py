"""The repeated blocks of a model (decoder layers, encoder layers), found from the module tree and not from names.

    model.layers = ModuleList[DecoderLayer × 32]                     one stack of 32 blocks
    encoder.block, decoder.block = ModuleList[T5Block × 6] each      two stacks

A stack is an outermost `ModuleList` (or a `Sequential` of one class) whose children hold matrices; lists inside of blocks
(experts, sub-layers) belong to their block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stack:
    """Blocks that follow each other. path: of the list; names: qualified names of the blocks, in order."""

    path: str
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.modules)


def holds_matrix(module: nn.Module) -> bool:
    """Whether any parameter could be the weight of a linear (two or three axes; convolutions and embeddings do not count)."""
    for child in module.modules():
        if isinstance(child, nn.modules.conv._ConvNd | nn.Embedding | nn.RNNBase):
            continue
        if hasattr(child, "in_features") or any(p.dim() in (2, 3) for p in child.parameters(recurse=False)):
            return True
    return False


def repeated_blocks(model: nn.Module) -> list[Stack]:
    """The outermost stacks, in the order of the module tree. A model without any gives an empty list."""
    stacks: list[Stack] = []

    def visit(path: str, module: nn.Module) -> None:
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        uniform = len(children) > 1 and len({type(child) for _, child in children}) == 1
        is_list = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and uniform)
        plain = bool(children) and all(isinstance(child, nn.Linear) for _, child in children)
        if is_list and children and not plain and all(holds_matrix(child) for _, child in children):
            stacks.append(Stack(path, tuple(n for n, _ in children), tuple(c for _, c in children)))
            return
        for name, child in children:
            visit(name, child)

    visit("", model)
    return stacks
