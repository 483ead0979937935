"""Check controls: the positive and the negative control of every structure that is about to be permuted (`Plan(check="numeric")`).

all sites of a structure in a random order of its units     ──▶ the example's outputs stay    (positive: the structure is sound)
all sites but one                                           ──▶ they change                   (negative: the structure is complete)

Both run the program's own graph, in the widest precision that it takes, on perturbed values, so that biases of zero and norms of
one hide nothing. A site whose values do not matter to the outputs at all has no negative control.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sparsify.errors import VerifyError
from sparsify.program import Program
from sparsify.program.selection import generator
from sparsify.program.structure import Site, Structure
from sparsify.testing import difference, levels, random_permutation

LARGEST_WIDE = 2**31  # bytes of a model up to which it is checked in double precision


def check_controls(program: Program, progress: bool = True) -> None:
    """Raise VerifyError for the first structure of `program` (stage SELECTED) whose controls fail. Structures in place are left out."""
    by_name = {s.name: s for s in program.structures}
    names = list(dict.fromkeys(c.structure for c in program.choices if not c.in_place))
    if not names:
        return
    tensors, bound = widened(program)
    for name in tqdm(names, desc="check: controls", disable=not progress or len(names) < 8, leave=False):
        check_structure(program, by_name[name], tensors, bound)


def widened(program: Program) -> tuple[dict[str, Tensor], float]:
    """Every tensor of the program, floating ones in the widest precision that the graph runs in, and the bound for a change."""
    tensors = {t: program.tensor(t) for t in dict.fromkeys(program.tensor_names.values())}
    floating = [t for t in tensors.values() if isinstance(t, Tensor) and t.is_floating_point()]
    small = sum(t.numel() for t in floating) * 8 <= LARGEST_WIDE
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        if not small and dtype is torch.float64:
            continue
        wide = {n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        try:
            run(program, wide, dtype)
        except (RuntimeError, TypeError):  # a precision is written into the graph
            continue
        return wide, bound
    dtype = floating[0].dtype if floating else torch.float32
    return {n: t.detach() for n, t in tensors.items()}, 64 * torch.finfo(dtype).eps


def run(program: Program, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Floating outputs of the example with other values of the program's tensors."""
    args, kwargs = program.example
    if dtype is None:
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    args, kwargs = pytree.tree_map(cast, (args, kwargs))
    constants = {n: tensors.get(n, c) for n, c in program.constants.items()}
    with torch.no_grad():
        outputs = program.replaced(tensors=tensors, constants=constants)(*args, **kwargs)
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def check_structure(program: Program, structure: Structure, tensors: dict[str, Tensor], bound: float) -> None:
    base = dict(tensors)
    for param in structure.params():
        value = tensors[param]
        noise = torch.randn(value.shape, generator=generator(1, param), dtype=torch.float64)
        spread = max(float(value.double().std()) if value.numel() > 1 else 0.0, 0.02)
        base[param] = value + (0.5 * spread * noise).to(value)
    before = run(program, base)
    for level, repeats in levels(structure):
        change = difference(before, run(program, base | permuted(base, level, None, repeats)))
        if not change <= bound:
            raise VerifyError(
                f"{structure.name}: permuting all its sites changed the example's outputs by {change:.1e} (bound {bound:.0e}), "
                f"so it is not a structure of interchangeable units:\n{level}"
            )
        for site in level.sites:
            change = difference(before, run(program, base | permuted(base, level, site, repeats)))
            if change <= 10 * bound and matters(program, base, before, site, level.units, bound):
                raise VerifyError(
                    f"{structure.name}: leaving {site} out of a permutation changed the outputs by {change:.1e} only, so that site "
                    f"does not belong to it:\n{level}"
                )


def permuted(tensors: dict[str, Tensor], structure: Structure, skip: Site | None, repeats: int) -> dict[str, Tensor]:
    """New values of the structure's tensors, its units in a random order, without the site `skip`."""
    permutation = random_permutation(structure.units, repeats, seed=0)
    found: dict[str, Tensor] = {}
    for site in structure.sites:
        if site != skip:
            old = found.get(site.param, tensors[site.param])
            found[site.param] = old.index_select(
                site.axis, permutation.expand(site, old.shape[site.axis]).to(old.device)
            )
    return found


def matters(
    program: Program, tensors: dict[str, Tensor], before: list[Tensor], site: Site, units: int, bound: float
) -> bool:
    """Whether the outputs depend on the values at a site at all (a key's bias cancels in the softmax)."""
    value = tensors[site.param].clone()
    places = site.positions(units).reshape(-1).to(value.device)
    noise = torch.randn(
        value.index_select(site.axis, places).shape, generator=generator(2, site.param), dtype=torch.float64
    )
    value.index_add_(site.axis, places, noise.to(value))
    return difference(before, run(program, tensors | {site.param: value})) > 10 * bound
