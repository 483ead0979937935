"""The operations of a program as plain data, equal layers folded as the printed program folds them.

    graph ──split_blocks, find_runs──▶ [operation, …, {"run": "model.layers.{0…79}", "count": 80, "items": [operation, …]}, …]

An operation is `{"name", "makes", "call", "module"}` and, where there is something to say: `note` (what of it trains) with `own` (what
each layer has of its own there), `kernel` (what computes it, and how fast that was measured to be) with `timings` (by layer, where they
differ), `was` (the calls that it stands for), `new` (it stands for none, and is sparsify's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from sparsify.files.strict_json import Json
from sparsify.program import Program
from sparsify.program.printer import NOISE, GraphText, _module_of, op_name, operation_text, tensor_text
from sparsify.program.repeats import OWN, Block, Run, find_runs, numbers_text, replace_layer, split_blocks


class Operations(GraphText):
    """The tree of a program's operations."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, noise=False, fold=True)
        self.layers: dict[fx.Node, int] = {}  # of the run that is read: which layer each operation belongs to

    def tree(self) -> list[Json]:
        """Everything but placeholders and checks that compute nothing, in the order of the graph."""
        nodes = [n for n in self.program.graph.nodes if n.op != "placeholder"]
        shown = [n for n in nodes if op_name(n).rpartition(".")[2] not in NOISE]
        self.shown = frozenset(shown)
        return self.items(shown, 0)

    def items(self, nodes: Sequence[fx.Node], level: int) -> list[Json]:
        """level: how many numbers deep a layer's name may be."""
        found: list[Json] = []
        chain: list[Block] = []
        for item in [*split_blocks(nodes, _module_of, level), None]:
            if isinstance(item, Block) and (not chain or chain[-1].stack == item.stack):
                chain.append(item)
                continue
            for part in find_runs(chain, self.tensors, self.describe, self.shown) if chain else ():
                found.append(self.folded(part, level) if isinstance(part, Run) else self.single(part, level))
            chain = [item] if isinstance(item, Block) else []
            found += [self.entry(item)] if isinstance(item, fx.Node) else []
        return found

    def single(self, block: Block, level: int) -> Json:
        name = f"{block.stack}.{block.index}".lstrip(".")
        return {"run": name, "count": 1, "items": self.items(block.nodes, level + 1)}

    def folded(self, run: Run, level: int) -> Json:
        """The first repetition, with names for all of them. reads: (value outside, value of the repetition before) that each reads;
        left: (value that is read later, its name here, of which layer)."""
        units = [run.blocks[i : i + run.period] for i in range(0, len(run.blocks), run.period)]
        rows = ([node for block in unit for node in block.nodes] for unit in units)
        for same in zip(*rows, strict=True):
            self.peers[same[0]] = [peer for node in same for peer in self.peers.get(node, [node])]
        where = {node: block.index for block in run.blocks for node in block.nodes}
        self.layers |= where
        items: list[Json] = []
        for place, block in enumerate(run.first):
            indices = f"{{{numbers_text(run.indices(place))}}}"
            items += [renamed(item, run.stack, block.index, indices) for item in self.items(block.nodes, level + 1)]
        return {
            "run": f"{run.stack}.{{{numbers_text(b.index for b in run.blocks)}}}".lstrip("."),
            "count": run.count,
            "stack": run.stack,
            "period": run.period,
            "indices": [numbers_text(run.indices(place)) for place in range(run.period)],
            "layers": [block.index for block in run.blocks],
            "reads": [[outside.name, inside.name] for outside, inside in run.carried],
            "left": [[node.name, first.name, where[node]] for node, _, first in run.outside],
            "items": items,
        }

    def describe(self, node: fx.Node) -> str:
        """What two operations must also share to be the same. What was measured of a kernel is a layer's own here."""
        before, _, after = self.note(node)
        return f"{op_name(node)} {tensor_text(node.meta.get('val'))} {before}{after}"

    def entry(self, node: fx.Node) -> Json:
        makes, call = operation_text(node, self.tensors)
        name, _, kind = makes.removeprefix("%").partition(": ")
        found: dict[str, Json] = {"name": name, "makes": kind, "call": call, "module": _module_of(node)}
        before, _, after = self.note(node)
        if before or after:
            texts, found["note"] = self.by_layer(node, lambda peer: self.note(peer)[1])
            found["note"] = f"{before.removeprefix('  # ')}{found['note']}{after}"
            found |= {"own": texts} if len(texts) > 1 else {}
        if node.meta.get("kernel"):
            texts, found["kernel"] = self.by_layer(node, lambda peer: str(peer.meta.get("kernel", "")))
            found |= {"timings": texts} if len(texts) > 1 else {}
        if was := node.meta.get("was"):
            found["was"] = [str(line) for line in was]
        elif op_name(node).startswith("sparsify."):
            found["new"] = True
        return found

    def by_layer(self, node: fx.Node, text: Callable[[fx.Node], str]) -> tuple[list[Json], str]:
        """[layers, text] for every text that the layers of a run have, and the one text if it is only one."""
        found: dict[str, list[int]] = {}
        for peer in self.peers.get(node, [node]):
            found.setdefault(text(peer), []).append(self.layers.get(peer, 0))
        return [[numbers_text(where), own] for own, where in found.items()], next(iter(found)) if len(
            found
        ) == 1 else OWN


def renamed(item: Json, stack: str, index: int, by: str) -> Json:
    """All texts in an item with the names in a layer moved to `stack.by`."""
    if isinstance(item, str):
        return replace_layer(item, stack, index, by)
    if isinstance(item, list):
        return [renamed(part, stack, index, by) for part in item]
    if isinstance(item, dict):
        return {key: renamed(part, stack, index, by) for key, part in item.items()}
    return item


__all__ = ["Operations"]
