"""From stretches of an axis to the channels of one unit, as a `Site` writes them."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.passes.detect.axes import Axis
from sparsify.passes.detect.axis_terms import Term
from sparsify.program.structure import Role, Site

Loop = tuple[int, int]  # count, stride


@dataclass(frozen=True, order=True)
class Layout:
    """Channels of the units in one stretch, as a site writes them; `group` is an outer loop that must stay visible."""

    offset: int
    block: int
    step: int
    loops: tuple[Loop, ...]
    group: tuple[Loop, ...] = ()

    def joins(self, after: Layout) -> bool:
        """Whether `after` begins where each unit of this stretch ends."""
        same = (self.step, self.loops, self.group) == (after.step, after.loops, after.group)
        return same and self.offset + self.block == after.offset and self.block not in self.bounds

    @property
    def bounds(self) -> set[int]:
        """Block sizes at which the next channel belongs to another unit or group."""
        return {self.step, *(stride for _, stride in self.group)}

    def joined(self, after: Layout) -> Layout:
        return normal(self.offset, self.block + after.block, self.step, self.loops, self.group)

    def site(self, param: str, axis: int, role: Role) -> Site:
        stride = 0 if self.step == self.block else self.step
        return Site(param, axis, self.block, self.offset, self.group + self.loops, stride, role)


def layout(term: Term, unit: Axis | None, group: Axis | None = None) -> Layout:
    """Channels of one unit in one stretch: contiguous inner factors make the block, all others are loops."""
    step = next((stride for leaf, stride in term.factors if leaf is unit), 0)
    loops = tuple((leaf.size, stride) for leaf, stride in term.factors if leaf is not unit and leaf is not group)
    outer = tuple((leaf.size, stride) for leaf, stride in term.factors if leaf is group)
    return normal(term.offset, 1, step, loops, outer)


def normal(offset: int, block: int, step: int, loops: tuple[Loop, ...], group: tuple[Loop, ...]) -> Layout:
    """Loops that touch the block become part of it; loops that touch each other become one."""
    bounds = {step, *(stride for _, stride in group)}
    rest = sorted(loops, key=lambda loop: -loop[1])
    while rest and rest[-1][1] == block and block not in bounds:
        block *= rest.pop()[0]
    merged: list[Loop] = []
    for count, stride in rest:
        if merged and merged[-1][1] == count * stride:
            count *= merged.pop()[0]
        merged.append((count, stride))
    return Layout(offset, block, step, tuple(merged), group)


def merge(layouts: list[Layout]) -> list[Layout]:
    """Join stretches that lie side by side in every unit (the halves of a rotary head, for instance)."""
    changed = True
    while changed:
        changed, out = False, []
        for item in sorted(dict.fromkeys(layouts)):
            if out and out[-1].joins(item):
                item, changed = out.pop().joined(item), True
            out.append(item)
        layouts = out
    return layouts
