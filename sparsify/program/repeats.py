"""Repeated blocks: thirty equal layers read as one layer and "× 30", with what differs between them.

Two forms, one promise: what is folded can be unfolded again, so nothing that differs is hidden.

* Lines (`fold_lines`): lines that are equal but for the number of their layer become one, `model.layers.{0…29}.mlp: …  × 30`. What is each
  layer's own (the ids that were chosen, an error that was measured) stands as ⟨…⟩ in the line and is listed below it by layer.
* Operations (`find_runs`): the blocks of a stack get a Weisfeiler–Lehman hash each (Shervashidze et al., JMLR 2011: operations, shapes
  and constants as labels, dataflow as edges, names left out); a run of equal hashes, also of period two to eight (local and global
  layers in turn), is a candidate. A hash is a filter and no proof: a run folds when its blocks agree operation by operation and
  argument by argument, each reading the one before it as the first reads what comes before the stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass, field

from torch import fx
from torch.fx.node import Target

from sparsify.console import one_line

FEWEST = 3
"""Fewer equal blocks are not folded: two layers read faster than one with a footnote."""
LONGEST_PERIOD = 8
OWN = "⟨…⟩"
"""Stands where each layer has text of its own, listed below."""


def layer_of(name: str, level: int = 0) -> tuple[str, int] | None:
    """`model.layers.3.mlp` → (`model.layers`, 3): what stands before the first number (the second at level 1, …), and that number."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isascii() and part.isdigit()]
    if len(numbers) <= level:
        return None
    place = numbers[level]
    return ".".join(parts[:place]), int(parts[place])


def numbered(stack: str, index: int | str) -> str:
    """`model.layers.3`; a stack may be the model itself."""
    return f"{stack}.{index}" if stack else str(index)


def replace_layer(text: str, stack: str, index: int, by: str) -> str:
    """`text` with every name in layer `index` of `stack` moved to `stack.by`."""
    if stack:
        pattern = rf"(?<![\w.]){re.escape(stack)}\.{index}(?!\w)"
    else:  # a layer of the model itself: `3.weight`, and never the number of a size
        pattern = rf"(?<![\w.]){index}(?=\.[^\W\d])|(?<=# ){index}$"
    return re.sub(pattern, lambda _: numbered(stack, by), text)


def numbers_text(numbers: Iterable[int]) -> str:
    """`0…16, 18…29`, `0, 2, 4`: runs of three and more as a range."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] + 1 == number:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}…{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in found)


# --- lines ---------------------------------------------------------------------------------------------------------------


class Line(str):
    """A line of text that knows what it is about: `Line.about("model.layers.3.mlp", "chosen: ", "3, 17", " of 44")`.

    pieces: text that equal layers share, and between every two of them text that is the layer's own, in turn.
    """

    name: str
    pieces: tuple[str, ...]

    @classmethod
    def about(cls, name: str, *pieces: str) -> Line:
        clean = tuple(map(one_line, pieces))
        line = cls("".join(clean))
        line.name, line.pieces = name, clean
        return line


def fold_lines(lines: Sequence[str], least: int = FEWEST) -> list[str]:
    """Lines of equal layers as one, at the place of the first, with what differs listed by layer; others stay as they are.

    Only `Line`s fold; `least` or more of them make a group.
    """
    groups: dict[Hashable, list[tuple[int, Line]]] = {}
    keys: list[Hashable] = []
    for line in lines:
        layer = layer_of(line.name) if isinstance(line, Line) else None
        if layer is None:
            keys.append(None)
            continue
        assert isinstance(line, Line)
        stack, index = layer
        shared = tuple(replace_layer(piece, stack, index, "{}") for piece in line.pieces[::2])
        occurrence, key = 0, (stack, shared, 0)
        while any(known == index for known, _ in groups.get(key, ())):
            occurrence += 1
            key = (stack, shared, occurrence)
        groups.setdefault(key, []).append((index, line))
        keys.append(key)
    folded: list[str] = []
    done: set[Hashable] = set()
    for line, key in zip(lines, keys, strict=True):
        if key is None or len(groups[key]) < least:
            folded.append(str(line))
        elif key not in done:
            done.add(key)
            folded += fold_group(groups[key])
    return folded


def fold_group(group: list[tuple[int, Line]]) -> list[str]:
    """One line for all, then one for every different set of own texts."""
    index, first = group[0]
    layer = layer_of(first.name)
    assert layer is not None
    columns = list(zip(*(line.pieces[1::2] for _, line in group), strict=True))
    differs = [len(set(column)) > 1 for column in columns]
    indices = "{" + numbers_text(i for i, _ in group) + "}"
    pieces = []
    for place, piece in enumerate(first.pieces):
        if place % 2:
            pieces.append(OWN if differs[place // 2] else piece)
        else:
            pieces.append(replace_layer(piece, layer[0], index, indices))
    text = "".join(pieces)
    lines = [f"{text}  × {len(group)}"]
    own: dict[str, list[int]] = {}
    for i, line in group:
        values = [value for value, wanted in zip(line.pieces[1::2], differs, strict=True) if wanted]
        if values:
            own.setdefault(" | ".join(values), []).append(i)
    return lines + [f"  {numbers_text(where)}: {value}" for value, where in own.items()]


# --- operations ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Block:
    """The operations of one layer, in the order of the graph."""

    stack: str
    index: int
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """`count` times the same `period` blocks one after the other.

    blocks: all of them, in order. carried: (value outside that the first repetition reads, value of the repetition before that
    every other reads in its place, named as in the first). outside: values of the run that later operations read → (which
    repetition made it, its name in the first).
    """

    stack: str
    period: int
    count: int
    blocks: tuple[Block, ...]
    carried: tuple[tuple[fx.Node, fx.Node], ...]
    outside: tuple[tuple[fx.Node, int, fx.Node], ...] = field(default=())

    @property
    def first(self) -> tuple[Block, ...]:
        return self.blocks[: self.period]

    def indices(self, place: int) -> list[int]:
        """Numbers of the layers that stand at one place of the period."""
        return [block.index for block in self.blocks[place :: self.period]]


Describe = Callable[[fx.Node], str]
Form = tuple[Target, str, tuple[Hashable, Hashable]]  # what an operation calls, its line, its arguments


def split_blocks(nodes: Sequence[fx.Node], place: Callable[[fx.Node], str], level: int) -> list[Block | fx.Node]:
    """Operations by layer, in the order of the graph; what belongs to no layer stands for itself.

    Operations between two layers of one stack count as the end of the first.
    """
    found: list[Block | fx.Node] = []
    where = [layer_of(place(node), level) for node in nodes]
    at = 0
    while at < len(nodes):
        layer = where[at]
        if layer is None:
            found.append(nodes[at])
            at += 1
            continue
        end = at + 1
        while end < len(nodes):
            following = next((i for i in range(end, len(nodes)) if where[i] is not None), None)
            other = None if following is None else where[following]
            if following is None or other is None or other[0] != layer[0]:
                break
            if other != layer:
                end = following
                break
            end = following + 1
        found.append(Block(*layer, tuple(nodes[at:end])))
        at = end
    return found


def find_runs(
    blocks: Sequence[Block], tensors: dict[str, str], describe: Describe, shown: Set[fx.Node]
) -> list[Run | Block]:
    """A chain of blocks of one stack, those that repeat as runs.

    tensors: placeholder name → qualified name. describe: what an operation shows beside its name and arguments.
    shown: operations that may read values of a run (checks that compute nothing are left out).
    """
    hashes = [block_hash(block, tensors, describe) for block in blocks]
    found: list[Run | Block] = []
    at = 0
    while at < len(blocks):
        best: Run | None = None
        for period in range(1, min(LONGEST_PERIOD, (len(blocks) - at) // FEWEST) + 1):
            count = 1
            while hashes[at + count * period : at + (count + 1) * period] == hashes[at : at + period]:
                count += 1
            if count >= FEWEST and (best is None or count * period > best.count * best.period):
                best = longest_run(blocks[at : at + count * period], period, tensors, describe, shown) or best
        found.append(best or blocks[at])
        at += best.count * best.period if best else 1
    return found


def block_hash(block: Block, tensors: dict[str, str], describe: Describe) -> str:
    """Weisfeiler–Lehman hash of a block's dataflow: equal for isomorphic blocks, whatever their values are called."""
    import networkx as nx

    graph = nx.Graph()  # a filter: which of two operations comes first is for the proof
    inside = set(block.nodes)
    for node in block.nodes:
        form = argument_form(node, tensors, [block], {}, {})
        literal = repr(pytree_map(form, lambda leaf: "·" if isinstance(leaf, Ref) else leaf))
        graph.add_node(node, label=ascii(f"{node.target} {relative(describe(node), [block])} {literal}"))
    for node in block.nodes:
        for slot, source in enumerate(node.all_input_nodes):
            if source in inside:
                graph.add_edge(source, node, slot=str(slot))
    return nx.weisfeiler_lehman_graph_hash(graph, node_attr="label", edge_attr="slot", iterations=3)


@dataclass(frozen=True)
class Ref:
    """A value that an operation reads: by its position in the same repetition ("here"), or in the one before ("before")."""

    kind: str
    at: int


@dataclass(frozen=True)
class Outside:
    """A value that an operation reads: a node outside of all repetitions."""

    at: fx.Node


def argument_form(
    node: fx.Node,
    tensors: dict[str, str],
    blocks: Sequence[Block],
    here: dict[fx.Node, int],
    before: dict[fx.Node, int],
) -> tuple[Hashable, Hashable]:
    """Arguments with values by position and layers by their distance from the first: equal for equal operations of a run."""

    def form(value: object) -> Hashable:
        if isinstance(value, fx.Node):
            if value.name in tensors:
                return "@" + relative(tensors[value.name], blocks)
            if value in here:
                return Ref("here", here[value])
            return Ref("before", before[value]) if value in before else Outside(value)
        if isinstance(value, tuple | list):
            return tuple(map(form, value))
        if isinstance(value, dict):
            return tuple((key, form(v)) for key, v in value.items())
        if isinstance(value, slice):
            return ("slice", form(value.start), form(value.stop), form(value.step))
        return (type(value).__name__, repr(value))

    return form(node.args), form(node.kwargs)


def relative(text: str, blocks: Sequence[Block]) -> str:
    """Names in these blocks by their place among them: `model.layers.{+0}.mlp`."""
    for place, block in enumerate(blocks):
        text = replace_layer(text, block.stack, block.index, f"{{+{place}}}")
    return text


def pytree_map(value: object, change: Callable[[object], object]) -> object:
    return tuple(pytree_map(v, change) for v in value) if type(value) is tuple else change(value)


def longest_run(
    blocks: Sequence[Block], period: int, tensors: dict[str, str], describe: Describe, shown: Set[fx.Node]
) -> Run | None:
    """The longest run of at least FEWEST repetitions that starts with the first block and agrees in every argument."""
    units = [tuple(blocks[i : i + period]) for i in range(0, len(blocks), period)]
    numbers = [block.index for block in blocks]
    positions = [{node: i for i, node in enumerate(n for block in unit for n in block.nodes)} for unit in units]
    forms: list[list[Form]] = []
    for k, unit in enumerate(units):
        before = positions[k - 1] if k else {}
        forms.append(
            [
                (node.target, relative(describe(node), unit), argument_form(node, tensors, unit, positions[k], before))
                for node in positions[k]
            ]
        )
    count = 2
    while count < len(units) and forms[count] == forms[1]:
        count += 1
    while count >= FEWEST and numbers[: count * period] != list(range(numbers[0], numbers[0] + count * period)):
        count -= 1
    carried = carried_values(forms[0], forms[1])
    if count < FEWEST or carried is None:
        return None
    order = list(positions[0])
    chosen = tuple(block for unit in units[:count] for block in unit)
    members = {node for block in chosen for node in block.nodes}
    outside = []
    for k in range(count):
        for node, at in positions[k].items():
            if any(user not in members for user in node.users if user in shown):
                outside.append((node, k, order[at]))
    pairs = tuple((source, order[at]) for at, source in carried.items())
    return Run(blocks[0].stack, period, count, chosen, pairs, tuple(outside))


def carried_values(first: list[Form], second: list[Form]) -> dict[int, fx.Node] | None:
    """What the first repetition reads where the others read the one before: position there → value outside.

    None when the two differ in anything else, or when one could not tell from the first which reads are carried.
    """
    carried: dict[int, fx.Node] = {}
    fixed: set[fx.Node] = set()

    def agree(a: object, b: object) -> bool:
        if isinstance(a, Ref) and isinstance(b, Ref):
            return a == b
        if isinstance(a, Outside) and isinstance(b, Ref) and b.kind == "before":
            return carried.setdefault(b.at, a.at) is a.at
        if isinstance(a, Ref | Outside) and isinstance(b, Outside):
            fixed.add(b.at)
            return a == b
        if type(a) is tuple and type(b) is tuple:
            return len(a) == len(b) and all(agree(x, y) for x, y in zip(a, b, strict=True))
        return a == b

    if len(first) != len(second) or not all(agree(a, b) for a, b in zip(first, second, strict=True)):
        return None
    sources = list(carried.values())
    return None if len(set(sources)) < len(sources) or fixed & set(sources) else carried
