"""Whether every linear sees the rows of a batch one after another: an adapter is chosen by a token's place, so that has to hold.

two rows, run again with another first row, and with another second one:   x (T, m) of every linear may differ in that half alone

What sees something else (tokens that a router has sorted, a time axis in front, positions without a batch) takes no addends; nor does
what was not called at all, for its weight may be read in another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.errors import CaptureError
from sparsify.model.module_tree import first_line
from sparsify.modules.rows_of_gated import RowsOfGated
from sparsify.program.capture import example_inputs
from sparsify.serving.targets import Target

if TYPE_CHECKING:
    from sparsify.program.values import Batch

NOT_RUN = "it did not run in the example, so its weight may be read in another way than by its forward: pass example=… that reaches it"
MIXED = "its tokens are not those of one row after another (a router, or another axis in front), so no row can have an adapter there"


def check_rows(host: nn.Module, targets: Mapping[str, Target], example: Batch | None) -> tuple[dict[str, str], str]:
    """`(weight → why it takes no addend, why nothing could be checked)`; the second is empty where the model ran."""
    try:
        args, kwargs = example_inputs(host, example)
    except CaptureError as error:
        return {}, first_line(error)
    others = [pytree.tree_map(lambda leaf, row=row: with_another(leaf, row), (args, kwargs)) for row in (0, 1)]
    leaves = [pytree.tree_leaves(inputs) for inputs in ((args, kwargs), *others)]
    if any(all(a is b for a, b in zip(leaves[0], changed, strict=True)) for changed in leaves[1:]):
        return {}, "no input has two rows that can be told apart: pass example=… with a batch of two"
    try:
        seen, *again = [run(host, targets, *inputs) for inputs in ((args, kwargs), *others)]
    except Exception as error:
        return {}, f"the example cannot be run ({type(error).__name__}: {first_line(error)}): pass example=…"
    found = {}
    for param in targets:
        if param not in seen or any(param not in other for other in again):
            found[param] = NOT_RUN
        elif not all(apart(seen[param], other[param], row) for row, other in enumerate(again)):
            found[param] = MIXED
    return found, ""


def with_another(leaf: Any, row: int) -> Any:
    """The same tensor of two rows with one of them turned round; anything else as it is."""
    if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.shape[0] != 2:
        return leaf
    rows = list(leaf.unbind())
    rows[row] = rows[row].flip(tuple(range(leaf.dim() - 1)))
    turned = torch.stack(rows)
    return leaf if torch.equal(turned, leaf) else turned


def apart(first: list[Tensor], second: list[Tensor], row: int) -> bool:
    """Whether inputs of the same calls differ, in the half of this row alone."""
    return len(first) == len(second) and all(differ_in(x, y, row) for x, y in zip(first, second, strict=True))


def differ_in(x: Tensor, y: Tensor, row: int) -> bool:
    if x.shape != y.shape or x.shape[0] % 2:
        return False
    half = x.shape[0] // 2
    own, other = (slice(half), slice(half, None))[:: 1 if row == 0 else -1]
    scale = float(x[other].abs().max()) if half else 0.0
    same = bool(((x[other] - y[other]).abs() <= 1e-4 * scale).all())
    return same and not torch.equal(x[own], y[own])


@torch.no_grad()
def run(host: nn.Module, targets: Mapping[str, Target], args: Any, kwargs: Any) -> dict[str, list[Tensor]]:
    """Weight → its inputs `(T, m)`, one for every call."""
    seen: dict[str, list[Tensor]] = {}
    with watching(targets, seen):
        host(*args, **kwargs)
    return seen


@contextmanager
def watching(targets: Mapping[str, Target], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def watch(param: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(param, []).append(x.detach().reshape(-1, x.shape[-1]).float().cpu())

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = []
    for param, target in targets.items():
        for module in target.modules:
            handles.append(watch(param, module))
            if isinstance(module, RowsOfGated):
                handles.append(watch(param, module.whole))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["check_rows"]
