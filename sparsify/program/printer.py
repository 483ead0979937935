"""A program as text: history, structures, choices, permuted sites, trained slices, then one line per operation.

    program LlamaForCausalLM, stage EXPANDED
    history:
      capture: LlamaForCausalLM, 210 operations
    structures: 4 (2 attention, 2 ffn)
      ffn model.layers.0.mlp: 176 units | gate gate_proj.weight[0 ×1] | up … | down down_proj.weight[1 ×1]
    trained: 1 slice, 320 parameters
      @model.layers.0.mlp.down_proj.weight[:, 0:5] f32[64, 5] column block, channels 3, 17, 40, 99, 121
    graph(%input_ids: i64[2, 7]):
      # model.layers.0.mlp.down_proj
    » %down: f32[2, 7, 64] = sparsify.partial_linear(%mul_4, @model.layers.0.mlp.down_proj.weight, None, …)
    kernels: 1 generated; program.text(kernels=True) prints their source          (of a program lowered for "cpu" or "cuda")
      bitmask_f32_avx2: 400 lines, for %packed_linear (stream)

Made to be read by people and matched by tests (`torch.testing.FileCheck`): the order is fixed, values are named as in
the graph, tensors by their qualified names, and nothing depends on memory addresses or on the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import fx

from sparsify.console import one_line
from sparsify.model.sharded import class_name
from sparsify.program import Packed, Program, Stage, UnitChoice
from sparsify.program.names import printable as without_controls
from sparsify.program.repeats import (
    OWN,
    Block,
    Line,
    Run,
    find_runs,
    fold_lines,
    numbers_text,
    replace_layer,
    split_blocks,
)
from sparsify.program.structure import Site, Structure

if TYPE_CHECKING:
    from sparsify.methods.channels import TrainedSlice
    from sparsify.methods.part import TrainedPart

NOISE = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_guards_fn"})
"""Operations that compute nothing: checks that torch.export leaves behind."""
NOISY_KEYWORDS = frozenset({"pin_memory", "layout", "device", "memory_format"})
"""Keyword arguments that say where and how a result is stored, not what it is."""

END = 2**63 - 1  # how the exporter writes "to the end" of an axis

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def print_program(
    program: Program, *, fold: bool = True, noise: bool = False, ids: int = 8, kernels: bool = False
) -> str:
    """The program as text; works at every stage.

    fold: layers that are equal stand there once, with "× 30" and what differs between them (`sparsify.program.repeats`); False prints all.
    noise: also print operations that compute nothing (`NOISE`) and storage keywords. Their number is always printed.
    ids: at most this many unit or channel ids of a selection are spelled out.
    kernels: print the source of every generated kernel too, each once; they are named in any case.
    """
    lines = [f"program {one_line(class_name(program.host))}, stage {program.stage.name}"]
    lines += _section("history:", program.history)
    lines += _section(_structures_title(program), map(structure_text, program.structures), fold)
    lines += _section(
        f"declined: {len(program.declined)}", (Line.about(d.name, str(d)) for d in program.declined), fold
    )
    lines += _section(
        f"refused: {len(program.refusals)}", (Line.about(r.where, str(r)) for r in program.refusals), fold
    )
    chosen = _choices(program, ids)
    lines += _section(f"chosen: {len(chosen)}", chosen, fold)
    permuted = _permuted(program, ids)
    lines += _section(f"permuted: {len(permuted)}, {len(program.moves)} moves", permuted, fold)
    lines += _section(f"pruned: {len(program.pruned)}", (pruned_line(p) for p in program.pruned), fold)
    for title, body in _parts(program, ids):
        lines += _section(title, body, fold)
    lines += _section(f"quantised: {len(program.packings)}", map(packed_text, program.packings), fold)
    lines += GraphText(program, noise, fold).lines()
    lines += _kernels(program, kernels)
    return "\n".join(without_controls(line) for line in lines)


def tensor_text(value: object) -> str:
    """`bf16[2, 7, 32]` for a tensor, real or fake; lists of tensors in brackets, anything else by its type or value."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(tensor_text(v) for v in value)})"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(value)
    return "none" if value is None else type(value).__name__


def dtype_text(dtype: torch.dtype) -> str:
    """Short name of a dtype: `bf16` for torch.bfloat16."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def ids_text(values: Sequence[int], limit: int) -> str:
    """`3, 17, 40, … 23 more`."""
    shown = ", ".join(str(v) for v in values[:limit])
    return shown if len(values) <= limit else f"{shown}, … {len(values) - limit} more"


def slice_text(trained: TrainedSlice, dims: int = 2) -> str:
    """`model.layers.0.mlp.down_proj.weight[:, 0:5]`, as one would index the stored tensor."""
    index = [":"] * max(dims, trained.axis + 1)
    index[trained.axis] = range_text(trained)
    return f"{trained.param}[{', '.join(index)}]"


def range_text(trained: TrainedSlice) -> str:
    """`0:5` for a contiguous block, `{3, 17, … 12 more}` for scattered channels."""
    if trained.places:
        return f"{{{ids_text(trained.places, 4)}}}"
    return f"{trained.start}:{trained.start + trained.length}"


def packed_text(packed: Packed) -> Line:
    """`@w nf4, 590,000 → 160,000 bytes, error 0.080`."""
    size = f"{packed.dense_bytes:,} → {packed.packed_bytes:,} bytes"
    return Line.about(packed.param, f"@{packed.param} {packed.format}, {size}, error ", f"{packed.error:.3f}")


class Pruned(Protocol):
    """What the text says of one pruned weight."""

    @property
    def name(self) -> str: ...
    @property
    def pattern(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def sparsity(self) -> float: ...
    @property
    def error(self) -> float: ...


def pruned_line(pruned: Pruned, before: str = "@") -> Line:
    """`@w: 75.0% unstructured, sparsegpt, error 1.20e-02`: what pruning says of one weight (`program.pruned`)."""
    kind, note = f" {pruned.pattern}, {pruned.method}, error ", f" ({pruned.note})" if pruned.note else ""
    head, error = f"{before}{pruned.name}: ", f"{pruned.error:.2e}"
    return Line.about(pruned.name, head, f"{pruned.sparsity:.1%}", kind, error, note)


def site_text(site: Site, prefix: str = "") -> str:
    """A site in a few characters: `q_proj.weight[0 ×32 +64]`: axis 0, blocks of 32 channels from channel 64 on."""
    parts = [f"{site.axis} ×{site.block}"]
    if site.offset:
        parts.append(f"+{site.offset}")
    if site.step != site.block:
        parts.append(f"/{site.step}")
    parts += [f"({count}@{stride})" for count, stride in site.outer]
    return f"{short_name(site.param, prefix)}[{' '.join(parts)}]"


def short_name(name: str, prefix: str) -> str:
    """`name` without the leading `prefix.`, when it has it."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def _section(title: str, lines: Iterable[str], fold: bool = False) -> list[str]:
    """An indented block, or nothing at all when it would be empty."""
    body = fold_lines(list(lines)) if fold else list(lines)
    return [title, *(f"  {line}" for line in map(_keep_indent, body))] if body else []


def _keep_indent(line: str) -> str:
    """One line, with the spaces in front that say what it belongs to."""
    text = line.lstrip(" ")
    return line[: len(line) - len(text)] + one_line(text)


def _structures_title(program: Program) -> str:
    kinds = Counter(s.kind for s in program.structures)
    return f"structures: {len(program.structures)} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"


def structure_text(structure: Structure) -> Line:
    """One line: kind, name, units, then every site with its role."""
    sites = " | ".join(f"{s.role} {site_text(s, structure.name)}" for s in structure.sites)
    return Line.about(structure.name, f"{structure.kind} {structure.name}: {structure.size_text()} | {sites}")


def _choices(program: Program, ids: int) -> list[str]:
    units = {s.name: s for s in program.structures}

    def line(choice: UnitChoice) -> Line:
        structure = units.get(choice.structure)
        sides = (choice.consumers, choice.producers)
        counts = structure.chosen_text(*map(len, sides)) if structure else ("", "")
        pieces = [f"{choice.structure} by rule {choice.rule} ({choice.method}), "]
        for count, side in zip(counts, sides, strict=True):
            if side:
                pieces[-1] += f"{'; ' if len(pieces) > 1 else ''}{count or len(side)}: "
                pieces += [ids_text(side, ids), ""]
        pieces[-1] += "nothing" if len(pieces) == 1 else ""
        pieces[-1] += f"; in place: {choice.in_place}" if choice.in_place else ""
        return Line.about(choice.structure, *pieces)

    lines: list[str] = [line(c) for c in program.choices]
    for choice in program.channel_choices:
        first, *others = choice.params
        shared = f" and {len(others)} more that share its input" if others else ""
        which = f"{len(choice.channels)} channels: "
        head = f"{first}{shared} by rule {choice.rule} ({choice.method}), {which}"
        lines.append(Line.about(first, head, ids_text(choice.channels, ids)))
    return lines


def _permuted(program: Program, ids: int) -> list[str]:
    """One line per structure that moved, with its order and the tensors that were reordered with it."""
    moved: dict[str, list[str]] = {}
    owners: dict[tuple[str, int], str] = {}
    for structure in program.structures:
        for site in structure.sites:
            owners.setdefault((site.param, site.axis), structure.name)
    for move in program.moves:
        owner = owners.get((move.param, move.axis), "")
        text = f"{short_name(move.param, owner)}[{move.axis}]"
        known = moved.setdefault(owner, [])
        if text not in known:
            known.append(text)
    lines: list[str] = []
    for name in dict.fromkeys([*program.permutations, *moved]):
        pieces = [name or "(no structure)"]
        if name in program.permutations:
            outer, inner = program.permutations[name]
            order = ids_text(outer.orders[0], ids)
            if inner is not None and not inner.is_identity():
                order += f"; inside the groups {ids_text(inner.orders[0], ids)}"
                order += f" and {len(inner.orders) - 1} more orders" if len(inner.orders) > 1 else ""
            pieces = [f"{pieces[0]}: order ", order, ""]
        pieces[-1] += f" | moved {', '.join(moved[name])}" if name in moved else " | nothing moved"
        lines.append(Line.about(name, *pieces))
    return lines


def _parts(program: Program, ids: int) -> list[tuple[str, list[str]]]:
    """Title and lines for every kind of trained part."""
    kinds: dict[type[TrainedPart], list[TrainedPart]] = {}
    for part in program.parts:
        kinds.setdefault(type(part), []).append(part)
    return [kind.section(parts, program, lambda values: ids_text(values, ids)) for kind, parts in kinds.items()]


class GraphText:
    """The operations of a program as lines, runs of equal layers folded."""

    def __init__(self, program: Program, noise: bool, fold: bool) -> None:
        self.program, self.noise, self.fold = program, noise, fold
        self.tensors = program.tensor_names
        self.notes = _notes(program)
        self.place = ""
        self.peers: dict[
            fx.Node, list[fx.Node]
        ] = {}  # of the layer that is printed: the same operation in the layers that are not

    def lines(self) -> list[str]:
        nodes = [n for n in self.program.graph.nodes if n.op != "placeholder"]
        users = [n for n in self.program.graph.nodes if n.op == "placeholder" and n.name not in self.tensors]
        header = ", ".join(f"%{n.name}: {tensor_text(n.meta.get('val'))}" for n in users)
        shown = [n for n in nodes if self.noise or op_name(n).rpartition(".")[2] not in NOISE]
        self.shown = frozenset(shown)
        lines = [f"graph({header}):", *self.operations(shown, 0 if self.fold else None)]
        return [*lines, f"    # {len(nodes) - len(shown)} assertions not shown"] if len(shown) < len(nodes) else lines

    def operations(self, nodes: Sequence[fx.Node], level: int | None) -> list[str]:
        """level: how many numbers deep a layer's name may be; None folds nothing."""
        if level is None:
            return [line for node in nodes for line in self.operation(node)]
        lines: list[str] = []
        chain: list[Block] = []
        for item in [*split_blocks(nodes, _module_of, level), None]:
            if isinstance(item, Block) and (not chain or chain[-1].stack == item.stack):
                chain.append(item)
                continue
            lines += self.stack(chain, level)
            chain = [item] if isinstance(item, Block) else []
            lines += self.operation(item) if isinstance(item, fx.Node) else []
        return lines

    def stack(self, chain: list[Block], level: int) -> list[str]:
        """Blocks of one stack: runs folded, the others in full, where stacks inside them may fold."""
        lines = []
        for item in find_runs(chain, self.tensors, self.describe, self.shown):
            lines += self.run(item, level) if isinstance(item, Run) else self.operations(item.nodes, level + 1)
        return lines

    def run(self, run: Run, level: int) -> list[str]:
        """The first repetition, between a line that says how often and a line that names what is read of the others."""
        columns = zip(*(run.blocks[i :: run.period] for i in range(run.period)), strict=True)
        units = [[node for block in unit for node in block.nodes] for unit in columns]
        for same in zip(*units, strict=True):
            self.peers[same[0]] = [peer for node in same for peer in self.peers.get(node, [node])]
        everything = f"{run.stack}.{{{numbers_text(b.index for b in run.blocks)}}}".lstrip(".")
        period = f", {run.period} layers each" if run.period > 1 else ""
        head = f"    # × {run.count}: {everything}{period}, values named as in layer {run.blocks[0].index}"
        if run.carried:
            pairs = (f"%{inside.name} of the one before for %{outside.name}" for outside, inside in run.carried)
            head += f"; each reads {', '.join(pairs)}"
        body = []
        for place, block in enumerate(run.first):
            indices = f"{{{numbers_text(run.indices(place))}}}"
            lines = self.operations(block.nodes, level + 1)
            body += [replace_layer(line, run.stack, block.index, indices) for line in lines]
        where = {node: block.index for block in run.blocks for node in block.nodes}
        read = (f"%{node.name} is %{first.name} of layer {where[node]}" for node, _, first in run.outside)
        foot = f"    # end of × {run.count}: {everything}"
        self.place = ""
        return [_keep_indent(head), *body, _keep_indent(", ".join([foot, *read]))]

    def operation(self, node: fx.Node) -> list[str]:
        """A comment where the module changes, and the line of the operation."""
        lines, here = [], _module_of(node)
        if here != self.place and node.op != "output":
            lines.append(f"    # {one_line(here)}")
            self.place = here
        note = self.note(node)
        owns = {self.note(peer)[1] for peer in self.peers.get(node, [node])}
        text = f"{note[0]}{note[1] if len(owns) == 1 else OWN}{note[2]}"
        return [*lines, _node(node, self.tensors, text, self.noise)]

    def note(self, node: fx.Node) -> tuple[str, str, str]:
        """What an operation of ours does, as text that equal layers share, the layer's own, and shared again."""
        if node.op != "call_function" or op_name(node).startswith("aten."):
            return "", "", ""
        names = (self.tensors.get(i.name) for i in node.all_input_nodes)
        return next((self.notes[n] for n in names if n in self.notes), ("", "", ""))

    def describe(self, node: fx.Node) -> str:
        """What two operations must also share to be the same."""
        before, _, after = self.note(node)
        return f"{op_name(node)} {tensor_text(node.meta.get('val'))} {before}{after} {node.meta.get('kernel', '')}"


def _kernels(program: Program, sources: bool) -> list[str]:
    """One line per generated kernel of a lowered program, or its source."""
    found = program.kernels() if program.stage is Stage.LOWERED else ()
    hint = "" if sources or not found else "; program.text(kernels=True) prints their source"
    lines = _section(
        f"kernels: {len(found)} generated{hint}", (f"{k.name}: {k.lines} lines, {_runs(k.nodes)}" for k in found)
    )
    for kernel in found if sources else ():
        lines += ["", f"kernel {one_line(kernel.name)}, {_runs(kernel.nodes)}:", *kernel.source.splitlines()]
    return lines


def _runs(nodes: Sequence[str]) -> str:
    """`for %q (gemv), %k (gemv), … 30 more`."""
    shown = ", ".join(f"%{name}" for name in nodes[:6])
    return one_line(f"for {shown}" + (f", … {len(nodes) - 6} more" if len(nodes) > 6 else ""))


def op_name(node: fx.Node) -> str:
    """`aten.linear`, `sparsify.partial_linear`, `operator.getitem`; overloads are left out."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).replace("::", ".")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"hop.{target.name()}"
    if callable(target):
        return f"{getattr(target, '__module__', '').lstrip('_')}.{getattr(target, '__name__', repr(target))}"
    return str(target)


def _module_of(node: fx.Node) -> str:
    """Qualified name of the module whose forward issued the operation; the deepest one."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.partition("@")[0] or "(model)"


def operation_text(node: fx.Node, tensors: dict[str, str], noise: bool = False) -> tuple[str, str]:
    """`%linear: f32[2, 7, 48]` and `aten.linear(%x, @q_proj.weight)`: what an operation makes, and the call. tensors: placeholder name →
    qualified name. noise: with keywords that say where and how the result is stored."""

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            return f"@{tensors[value.name]}" if value.name in tensors else f"%{value.name}"
        if isinstance(value, tuple | list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, slice):
            return ":".join("" if v is None else text(v) for v in (value.start, value.stop, value.step))
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return str(value).removeprefix("torch.")
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k}: {text(v)}' for k, v in value.items())}}}"
        return "end" if value == END else repr(value)

    if node.op == "output":
        return "return", ", ".join(text(v) for v in node.args[0])  # type: ignore[union-attr]
    result = f"%{node.name}: {tensor_text(node.meta['val'])}" if node.meta.get("val") is not None else f"%{node.name}"
    if node.op == "get_attr":
        return result, f"attribute {node.target}"
    args = [text(a) for a in node.args]
    args += [f"{k}={text(v)}" for k, v in node.kwargs.items() if noise or k not in NOISY_KEYWORDS]
    return result, f"{op_name(node)}({', '.join(args)})"


def _node(node: fx.Node, tensors: dict[str, str], note: str, noise: bool) -> str:
    result, call = operation_text(node, tensors, noise)
    if node.op == "output":
        return f"    return {call}"
    if node.op == "get_attr":
        return f"    %{node.name} = {call}"
    kernel = node.meta.get("kernel", "")
    ours = call.startswith("sparsify.") or bool(note)
    kernel = f"  # {kernel}" if kernel else ""
    return one_line(f"  {'»' if ours else ' '} {result} = {call}{note}{kernel}")


def _notes(program: Program) -> dict[str, tuple[str, str, str]]:
    """What an operation of ours does, as a comment behind it, by the tensor that gives it away; the layer's own in the middle."""
    notes = {}
    for part in program.parts:
        name, text = part.note()
        before, own, after = (*(text.pieces if isinstance(text, Line) else (text,)), "", "")[:3]
        notes[name] = (f"  # {before}", own, after)
    return notes
