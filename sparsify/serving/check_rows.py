"""Whether every linear sees the rows of a batch one after another: an adapter is chosen by a token's place, so that has to hold.

two rows, run again with another first row, and with another second one:   x (T, m) of every linear may differ in that half alone
and again with one row that says the same all along:                      its shape may not change either

What sees something else (tokens that a router has sorted, a time axis in front, positions without a batch) takes no addends; nor does
what was not called at all, for its weight may be read in another way, and what was read by something else than its own linear. An
expert gets as many tokens of one row as of the other now and then, by chance; of a row that says one thing it gets all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.errors import CaptureError
from sparsify.model.module_tree import first_line
from sparsify.modules.rows_of_gated import RowsOfGated
from sparsify.program.capture import example_inputs
from sparsify.serving.targets import Target

if TYPE_CHECKING:
    from sparsify.program.values import Batch

NOT_RUN = "it did not run in the example, so its weight may be read in another way than by its forward: pass example=… that reaches it"
MIXED = "its tokens are not those of one row after another (a router, or another axis in front), so no row can have an adapter there"
READ = "it is read outside of its linear's own forward as well, where no addend can stand"


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
    reads = Reads(targets)
    try:
        with reads:
            seen = run(host, targets, args, kwargs)
        again = [run(host, targets, *inputs) for inputs in others]
    except Exception as error:
        return {}, f"the example cannot be run ({type(error).__name__}: {first_line(error)}): pass example=…"
    found = {}
    for param in targets:
        if param not in seen or any(param not in other for other in again):
            found[param] = NOT_RUN
        elif not all(apart(seen[param], other[param], row) for row, other in enumerate(again)):
            found[param] = MIXED
        elif param in reads.outside:
            found[param] = READ
    for row in (0, 1):
        flat = pytree.tree_map(lambda leaf, row=row: with_one_word(leaf, row), (args, kwargs))
        try:
            other = run(host, targets, *flat)
        except (
            Exception
        ):  # a model may refuse such a row (a classifier without an end of the text): then it says nothing
            continue
        for param in set(targets) - set(found):
            if not apart(seen[param], other.get(param, []), row, changed=False):
                found[param] = MIXED
    return found, ""


def with_another(leaf: Any, row: int) -> Any:
    """The same tensor of two rows with one of them turned round; anything else as it is."""
    if not has_rows(leaf):
        return leaf
    rows = list(leaf.unbind())
    rows[row] = rows[row].flip(tuple(range(leaf.dim() - 1)))
    turned = torch.stack(rows)
    return leaf if torch.equal(turned, leaf) else turned


def with_one_word(leaf: Any, row: int) -> Any:
    """The same tensor of two rows, one of which repeats what it begins with; anything else as it is."""
    if not has_rows(leaf):
        return leaf
    rows = list(leaf.unbind())
    rows[row] = rows[row][:1].expand_as(rows[row]) if rows[row].numel() else rows[row]
    return torch.stack(rows)


def has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() >= 2 and leaf.shape[0] == 2


def apart(first: list[Tensor], second: list[Tensor], row: int, changed: bool = True) -> bool:
    """Whether inputs of the same calls are equal but for the half of this row, which is another one where it was changed."""
    return len(first) == len(second) and all(differ_in(x, y, row, changed) for x, y in zip(first, second, strict=True))


def differ_in(x: Tensor, y: Tensor, row: int, changed: bool) -> bool:
    if x.shape != y.shape or x.shape[0] % 2:
        return False
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    half = x.shape[0] // 2
    own, other = (slice(half), slice(half, None))[:: 1 if row == 0 else -1]
    scale = float(x[other].abs().max()) if half else 0.0
    same = bool(((x[other] - y[other]).abs() <= 1e-4 * scale).all())
    return same and not (changed and torch.equal(x[own], y[own]))


@torch.no_grad()
def run(host: nn.Module, targets: Mapping[str, Target], args: Any, kwargs: Any) -> dict[str, list[Tensor]]:
    """Weight → its inputs `(rows, …, m)`, one for every call."""
    seen: dict[str, list[Tensor]] = {}
    with watching(targets, seen):
        host(*args, **kwargs)
    return seen


@contextmanager
def watching(targets: Mapping[str, Target], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def watch(param: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(param, []).append((x if x.dim() > 1 else x[None]).detach().float().cpu())

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


class Reads(TorchDispatchMode):
    """Which weights are read while none of their own linears runs. outside: their names."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        super().__init__()
        self.targets, self.outside = targets, set[str]()
        self.inside: dict[str, int] = dict.fromkeys(targets, 0)
        self.stretches: dict[int, list[tuple[int, int, str]]] = {}
        for param, target in targets.items():
            weight = target.modules[0]._parameters.get("weight")
            if (
                type(weight) is nn.Parameter and weight.layout is torch.strided
            ):  # what is packed has none that could be read
                first = weight.data_ptr()
                own = self.stretches.setdefault(weight.untyped_storage().data_ptr(), [])
                own.append((first, first + weight.nbytes, param))

    def __enter__(self) -> Self:
        self.handles = [
            handle
            for param, target in self.targets.items()
            for module in target.modules
            for handle in (
                module.register_forward_pre_hook(lambda *_, param=param: self.count(param, 1)),
                module.register_forward_hook(lambda *_, param=param: self.count(param, -1), always_call=True),
            )
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def count(self, param: str, change: int) -> None:
        self.inside[param] += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})):
            if type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and leaf.device.type != "meta":
                for first, end, param in self.stretches.get(leaf.untyped_storage().data_ptr(), ()):
                    if not self.inside[param] and first <= leaf.data_ptr() < end:
                        self.outside.add(param)
        return func(*args, **(kwargs or {}))


__all__ = ["check_rows"]
