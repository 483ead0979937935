"""What the inspector shows of a program, as plain data: structures by layer, operations before and after, what was declined, kernels.

    Program ──inspect_program──▶ {"structures": […], "rows": […], "operations": […], …} ──▶ a page (`sparsify.show.inspector`)
                                                                                          ──▶ Model Explorer (`sparsify.show.explorer`)

Everything is text, numbers, lists and tables of them (JSON). Ids of units are texts of ranges, `"5, 14, 18…20"`, and each text stands
once: structures say the number of theirs in `ids`, so that eighty layers of 28,672 channels stay a small page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparsify.console import one_line, visible
from sparsify.files.strict_json import Json, is_objects
from sparsify.model.sharded import class_name
from sparsify.program import Program, Stage
from sparsify.program.permutation import Permutation
from sparsify.program.printer import site_text, slice_text, tensor_text
from sparsify.program.repeats import numbers_text
from sparsify.program.structure import Declined, Site, Structure
from sparsify.show.layers import Looks, count_parameters, rows_by_layer, slices_of, split_layer
from sparsify.show.operations import Operations
from sparsify.version import __version__

if TYPE_CHECKING:
    from sparsify.methods.channels import TrainedSlice

FORMAT, VERSION = "sparsify-inspection", 1
MOST_BYTES = 4_000_000
"""Of the data, so that the page with its script stays under 5 MB; what would make it larger is left out, and the page says so."""


def inspect_program(program: Program) -> dict[str, Json]:
    """The program as data; works at every stage."""
    ids = Ids()
    trained, total = count_parameters(program)
    document: dict[str, Json] = {
        "format": FORMAT,
        "version": VERSION,
        "sparsify": __version__,
        "model": one_line(class_name(program.host)),
        "stage": program.stage.name,
        "trained": trained,
        "total": total,
        "moved": len({(m.param, m.axis) for m in program.moves}),
        "history": list(program.history),
        **structures_and_rows(program, ids),
        "refusals": [{"where": r.where, "reason": r.reason} for r in program.refusals],
        "pruned": [pruned_row(p) for p in program.pruned],
        "packed": [
            {"param": p.param, "format": p.format, "before": p.dense_bytes, "after": p.packed_bytes, "error": p.error}
            for p in program.packings
        ],
        "operations": Operations(program).tree(),
        "kernels": kernel_sources(program),
        "ids": list(ids.texts),
        "left_out": [],
    }
    clean = spelled_out(document)
    assert isinstance(clean, dict)
    return within(clean, MOST_BYTES)


def within(document: dict[str, Json], most: int) -> dict[str, Json]:
    """The document in at most about `most` bytes: what takes most room and is least missed goes first, and `left_out` says so."""

    def size(value: Json) -> int:
        return len(json.dumps(value, separators=(",", ":")))

    document = dict(document)
    left_out: list[Json] = []
    rest = size(document) - most
    kernels = document["kernels"]
    if rest > 0 and is_objects(kernels) and kernels:
        sources: list[Json] = [kernel | {"source": ""} for kernel in kernels]
        rest -= size(document["kernels"]) - size(sources)
        document["kernels"] = sources
        left_out.append("sources of kernels: program.text(kernels=True) prints them")
    found = document["operations"]
    if rest > 0 and isinstance(found, list):
        layers = [item for item in found if isinstance(item, dict) and item.get("count") == 1]
        gone: list[str] = []
        while rest > 0 and layers:
            layer = layers.pop()
            rest -= size(layer["items"])
            gone.append(str(layer["run"]))
            layer["items"] = []
        left_out += [f"operations of {len(gone)} layers from {gone[-1]} on: print(program) shows them"] if gone else []
    texts = document["ids"]
    if rest > 0 and isinstance(texts, list):
        longest = sorted(range(len(texts)), key=lambda place: -len(str(texts[place])))
        kept: list[Json] = list(texts)
        while rest > 0 and longest:
            place = longest.pop(0)
            rest -= len(str(kept[place]))
            kept[place] = None
        document["ids"] = kept
        left_out.append(
            f"ids of units, {sum(t is None for t in kept)} lists: program.choices and program.permutations have them"
        )
    document["left_out"] = left_out
    return document


class Ids:
    """Texts of ids, each once."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def __call__(self, ids: Iterable[int]) -> int:
        """The place of the text of `ids`, ascending, in `texts`."""
        return self.place(numbers_text(ids))

    def place(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))


def spelled_out(value: Json) -> Json:
    """All texts with control characters and the like as escapes; numbers that JSON has no word for as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [spelled_out(part) for part in value]
    if isinstance(value, dict):
        return {visible(key): spelled_out(part) for key, part in value.items()}
    return value


def structures_and_rows(program: Program, ids: Ids) -> dict[str, Json]:
    """`structures` and `declined` in order; `rows`: layers that look alike, each with the places of its structures."""
    found = Structures(program, ids)
    places = {s.name: place for place, s in enumerate(program.structures)}
    gone = {d.name: place for place, d in enumerate(program.declined)}
    by_layer = rows_by_layer(program)
    rows: list[Json] = []
    for band in (b.rows for b in found.looks.bands(by_layer, fold=True)):
        names = [[split_layer(i.name)[1] or i.name for i in by_layer[row]] for row in band]
        rows.append(
            {
                "name": layers_text(band),
                "layers": list(band),
                "parts": list(names[0]),
                "structures": [[places[i.name] for i in by_layer[row] if isinstance(i, Structure)] for row in band],
                "declined": [[gone[i.name] for i in by_layer[row] if isinstance(i, Declined)] for row in band],
            }
        )
    return {
        "structures": [found.entry(s) for s in program.structures],
        "declined": [
            {"name": d.name, "kind": d.kind, "reason": d.reason, "sites": [str(s) for s in d.sites]}
            for d in program.declined
        ],
        "rows": rows,
    }


def layers_text(rows: Sequence[str]) -> str:
    """`model.layers.{0…79}`."""
    if len(rows) == 1:
        return rows[0]
    stack = rows[0].rpartition(".")[0]
    return f"{stack}.{{{numbers_text(int(row.rpartition('.')[2]) for row in rows)}}}".lstrip(".")


class Structures:
    """Structures of one program as data."""

    def __init__(self, program: Program, ids: Ids) -> None:
        self.program, self.ids = program, ids
        self.looks = Looks(program, slices_of(program))
        self.values = {
            i.target: node.meta.get("val")
            for i, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
            if i.target is not None
        }

    def entry(self, structure: Structure) -> Json:
        view = self.looks.view(structure)
        found: dict[str, Json] = {
            "name": structure.name,
            "kind": structure.kind,
            "size": structure.size_text(),
            "units": structure.inner_units,
            "unit": structure.inner_unit,
            "per_group": view.per_group,
            "sites": [self.site(site) for site in structure.sites],
            "inner": [self.site(site) for site in structure.inner.sites] if structure.inner is not None else [],
            "consumers": self.ids(view.originals[view.consumers].tolist()),
            "producers": self.ids(view.originals[view.producers].tolist()),
            "consumers_now": self.ids(view.consumers.nonzero().flatten().tolist()),
            "producers_now": self.ids(view.producers.nonzero().flatten().tolist()),
            "trained": self.looks.words(structure),
            "slices": [self.slice(piece) for piece in self.looks.slices_in(structure)],
        }
        choices = self.looks.choices.get(structure.name, [])
        found |= {"choices": [[c.rule, c.method, c.in_place] for c in choices]} if choices else {}
        if structure.name in self.program.permutations:
            outer, inner = self.program.permutations[structure.name]
            found["order"] = self.order(outer)
            if inner is not None and not inner.is_identity():
                found["inner_order"] = [self.order(Permutation((order,))) for order in dict.fromkeys(inner.orders)]
        if structure.name in self.program.unproven:
            found["unproven"] = self.program.unproven[structure.name]
        return found

    def site(self, site: Site) -> Json:
        value = self.values.get(site.param)
        return {
            "param": site.param,
            "role": site.role,
            "where": site_text(site, site.param.rpartition(".")[0]).partition("[")[2].removesuffix("]"),
            "tensor": tensor_text(value) if value is not None else "",
            "moved": (site.param, site.axis) in self.looks.moved,
            "more": self.looks.extras(site.param).removeprefix(", "),
        }

    def slice(self, piece: TrainedSlice) -> Json:
        value = self.values.get(piece.param)
        return {
            "text": slice_text(piece, value.dim() if value is not None else 2),
            "side": piece.side,
            "count": piece.length,
            "channels": self.ids(piece.channels),
        }

    def order(self, order: Permutation) -> Json:
        """`front`: the units that were brought to the front, in their order; behind them all others stand as they stood."""
        units = order.orders[0]
        end = len(units)
        while end and (end == len(units) or units[end - 1] < units[end]):
            end -= 1
        front = units[:end]
        text = numbers_text(front) if list(front) == sorted(front) else ", ".join(map(str, front))
        return {"front": self.ids.place(text), "count": end, "units": len(units)}


def pruned_row(pruned: object) -> Json:
    """What pruning did to one weight."""
    return {
        name: getattr(pruned, name) for name in ("name", "pattern", "method", "note", "sparsity", "error", "tokens")
    }


def kernel_sources(program: Program) -> Json:
    """Generated kernels of a lowered program, each source once."""
    found = program.kernels() if program.stage is Stage.LOWERED else ()
    return [{"name": k.name, "lines": k.lines, "nodes": list(k.nodes), "source": k.source} for k in found]


__all__ = ["FORMAT", "VERSION", "inspect_program"]
