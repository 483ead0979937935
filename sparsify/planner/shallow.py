"""A model of many equal blocks, cut down to three: what one more block adds is known from the middle one.

    model.layers = 126 × DecoderLayer    ──▶    model.layers = 3 × DecoderLayer, 123 more like model.layers.1

The first block has nothing trained below it and the last one the loss above it, so three are the fewest that hold one that is like all the
others. Blocks that differ (in class, shapes, kind of attention) or that the plan treats differently stay: the model is then taken whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsify.model.blocks import Stack, repeated_blocks
from sparsify.model.module_tree import copy_module_tree
from sparsify.plan import Plan, Rule, pattern_value
from sparsify.plan.name_patterns import matches

KEPT = 3
DEEP = 8
"""Blocks from which on a model is cut down; fewer are counted one by one."""


@dataclass(frozen=True)
class Repeat:
    """path: of the list of blocks; blocks: how many the model has; kept: how many of them the twin has, from the first on."""

    path: str
    blocks: int
    kept: int

    @property
    def more(self) -> int:
        return self.blocks - self.kept

    def block(self, number: int) -> str:
        """Qualified name of a block of the twin."""
        return f"{self.path}.{number}"

    @property
    def typical(self) -> str:
        """The block that every one which is not there is like."""
        return self.block(1)

    def inside(self, name: str) -> bool:
        """Whether a qualified name lies in the typical block."""
        return name == self.typical or name.startswith(f"{self.typical}.")


def repeat_of(model: nn.Module, plan: Plan | None = None, deep: int = DEEP) -> Repeat | None:
    """How a model can be cut down under a plan (None: whatever rules it will get, as long as they treat blocks alike); None where it
    cannot."""
    stacks = repeated_blocks(model)
    if len(stacks) != 1 or len(stacks[0]) <= max(deep, KEPT):
        return None
    stack = stacks[0]
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    if isinstance(kinds, list | tuple) and len(set(kinds)) > 1:
        return None
    if not isinstance(model.get_submodule(stack.path), nn.ModuleList) or not alike(map(shape_of, stack.modules)):
        return None
    if plan is not None and not alike(treatment(plan, stack, number) for number in range(len(stack))):
        return None
    return Repeat(stack.path, len(stack), KEPT)


def alike(values: Iterable[Hashable]) -> bool:
    return len(set(values)) == 1


def shape_of(block: nn.Module) -> Hashable:
    """Classes of everything in a block, shapes and dtypes of its tensors."""
    tensors: list[tuple[str, Tensor]] = [*block.named_parameters(), *block.named_buffers()]
    return (
        tuple((name, type(module).__qualname__) for name, module in block.named_modules()),
        tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors),
    )


def treatment(plan: Plan, stack: Stack, number: int) -> Hashable:
    """What the plan says of a block: which rule matches which of its modules, with which numbers."""
    name, block = stack.names[number], stack.modules[number]
    inside = [(below, f"{name}.{below}".rstrip(".")) for below, _ in block.named_modules()]
    leaves = [(leaf, f"{name}.{leaf}") for leaf, _ in block.named_parameters()]
    rules = tuple((below, tuple(said(rule, full) for rule in plan.rules)) for below, full in inside)
    return rules, tuple((leaf, any(matches(p, full) for p in plan.train)) for leaf, full in (*inside, *leaves))


def said(rule: Rule, module: str) -> Hashable:
    """Whether a rule matches a module, and every number that one of its tables gives it."""
    tables = {k: v for k, v in vars(rule).items() if isinstance(v, dict)}
    return rule.matches(module), tuple((k, pattern_value(v, module)) for k, v in sorted(tables.items()))


def cut(model: nn.Module, repeat: Repeat | None, memo: dict[int, object] | None = None) -> Any:
    """A copy of the model with the blocks that `repeat` keeps (all for None); tensors are shared, or what `memo` has for them."""
    twin: Any = copy_module_tree(model, dict(memo or {}), tensors="shared")
    if repeat is not None:
        above, _, name = repeat.path.rpartition(".")
        blocks = list(twin.get_submodule(repeat.path))[: repeat.kept]
        setattr(twin.get_submodule(above), name, nn.ModuleList(blocks))
    return twin


def skeleton(model: nn.Module, repeat: Repeat | None) -> Any:
    """`cut` with every tensor on the meta device: nothing of the model's memory is kept or read."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        else:
            memo[id(tensor)] = tensor.detach().to("meta")
    return cut(model, repeat, memo)


__all__ = ["DEEP", "KEPT", "Repeat", "cut", "repeat_of", "skeleton"]
