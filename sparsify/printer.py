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
from typing import Any

import torch
from torch import fx

from sparsify.console import one_line
from sparsify.names import printable as without_controls
from sparsify.program import Packed, Program, SparseLowRank, Stage, TrainedSlice
from sparsify.sharded import class_name
from sparsify.structure import Site, Structure

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


def print_program(program: Program, *, noise: bool = False, ids: int = 8, kernels: bool = False) -> str:
    """The program as text; works at every stage.

    noise: also print operations that compute nothing (`NOISE`) and storage keywords. Their number is always printed.
    ids: at most this many unit or channel ids of a selection are spelled out.
    kernels: print the source of every generated kernel too, each once; they are named in any case.
    """
    lines = [f"program {one_line(class_name(program.host))}, stage {program.stage.name}"]
    lines += _section("history:", program.history)
    lines += _structures(program)
    lines += _section(f"declined: {len(program.declined)}", (str(d) for d in program.declined))
    lines += _section(f"refused: {len(program.refusals)}", (str(r) for r in program.refusals))
    lines += _choices(program, ids)
    lines += _permuted(program, ids)
    lines += _trained(program, ids)
    lines += _section(f"sparse and low-rank: {len(program.lowranks)}", (lowrank_text(p) for p in program.lowranks))
    lines += _section(f"quantised: {len(program.packings)}", (packed_text(p) for p in program.packings))
    lines += _graph(program, noise)
    lines += _kernels(program, kernels)
    return "\n".join(without_controls(line) for line in lines)


def tensor_text(value: Any) -> str:
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


def lowrank_text(part: SparseLowRank) -> str:
    """`@w + S (1,204 entries by gradient) + 2·BA (rank 8)`."""
    text = f"@{part.param}"
    if part.count:
        text += f" + S ({part.count:,} entries by {part.mask}{', not chosen yet' if part.index is None else ''})"
    if part.rank:
        scale = "" if part.scale == 1 else f"{part.scale:g}·"
        text += f" + {scale}BA (rank {part.rank}{f', dropout {part.dropout:g}' if part.dropout else ''})"
    return text


def packed_text(packed: Packed) -> str:
    """`@w nf4, 590,000 → 160,000 bytes, error 0.080`."""
    size = f"{packed.dense_bytes:,} → {packed.packed_bytes:,} bytes"
    return f"@{packed.param} {packed.format}, {size}, error {packed.error:.3f}"


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


def _section(title: str, lines: Iterable[str]) -> list[str]:
    """An indented block, or nothing at all when it would be empty."""
    body = [f"  {one_line(line)}" for line in lines]
    return [title, *body] if body else []


def _structures(program: Program) -> list[str]:
    if not program.structures:
        return []
    kinds = Counter(s.kind for s in program.structures)
    title = f"structures: {len(program.structures)} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
    return _section(title, (structure_text(s) for s in program.structures))


def structure_text(structure: Structure) -> str:
    """One line: kind, name, units, then every site with its role."""
    sites = " | ".join(f"{s.role} {site_text(s, structure.name)}" for s in structure.sites)
    return f"{structure.kind} {structure.name}: {structure.size_text()} | {sites}"


def _choices(program: Program, ids: int) -> list[str]:
    units = {s.name: s for s in program.structures}

    def line(choice: Any) -> str:
        structure = units.get(choice.structure)
        sides = (choice.consumers, choice.producers)
        counts = structure.chosen_text(*map(len, sides)) if structure else ("", "")
        parts = [
            f"{count or len(side)}: {ids_text(side, ids)}" for count, side in zip(counts, sides, strict=True) if side
        ]
        place = f"; in place: {choice.in_place}" if choice.in_place else ""
        return f"{choice.structure} by rule {choice.rule} ({choice.method}), {'; '.join(parts) or 'nothing'}{place}"

    lines = [line(c) for c in program.choices]
    for choice in program.channel_choices:
        first, *others = choice.params
        shared = f" and {len(others)} more that share its input" if others else ""
        which = f"{len(choice.channels)} channels: {ids_text(choice.channels, ids)}"
        lines.append(f"{first}{shared} by rule {choice.rule} ({choice.method}), {which}")
    return _section(f"chosen: {len(lines)}", lines)


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
    lines = []
    for name in dict.fromkeys([*program.permutations, *moved]):
        order = ""
        if name in program.permutations:
            outer, inner = program.permutations[name]
            order = f": order {ids_text(outer.orders[0], ids)}"
            if inner is not None and not inner.is_identity():
                order += f"; inside the groups {ids_text(inner.orders[0], ids)}"
                order += f" and {len(inner.orders) - 1} more orders" if len(inner.orders) > 1 else ""
        where = f" | moved {', '.join(moved[name])}" if name in moved else " | nothing moved"
        lines.append(f"{name or '(no structure)'}{order}{where}")
    return _section(f"permuted: {len(lines)}, {len(program.moves)} moves", lines)


def _trained(program: Program, ids: int) -> list[str]:
    lines, total = [], 0
    for trained in program.slices:
        tensor, block = program.tensor(trained.param), program.tensor(trained.block_name)
        total += block.numel()
        where = f"@{slice_text(trained, tensor.dim())} {tensor_text(block)}"
        lines.append(f"{where} {trained.side} block, channels {ids_text(trained.channels, ids)}")
    count = f"{len(lines)} slice{'s' if len(lines) != 1 else ''}"
    return _section(f"trained: {count}, {total:,} parameters", lines)


def _graph(program: Program, noise: bool) -> list[str]:
    tensors = program.tensor_names
    users = [n for n in program.graph.nodes if n.op == "placeholder" and n.name not in tensors]
    header = ", ".join(f"%{n.name}: {tensor_text(n.meta.get('val'))}" for n in users)
    lines = [f"graph({header}):"]
    notes = _notes(program)
    hidden, place = 0, ""
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        if not noise and op_name(node).rpartition(".")[2] in NOISE:
            hidden += 1
            continue
        here = _module_of(node)
        if here != place and node.op != "output":
            lines.append(f"    # {one_line(here)}")
            place = here
        lines.append(_node(node, tensors, notes, noise))
    if hidden:
        lines.append(f"    # {hidden} assertions not shown")
    return lines


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


def _node(node: fx.Node, tensors: dict[str, str], notes: dict[str, str], noise: bool) -> str:
    def text(value: Any) -> str:
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
        return f"    return {', '.join(text(v) for v in node.args[0])}"  # type: ignore[union-attr]
    name = op_name(node)
    if node.op == "get_attr":
        return f"    %{node.name} = attribute {node.target}"
    args = [text(a) for a in node.args]
    args += [f"{k}={text(v)}" for k, v in node.kwargs.items() if noise or k not in NOISY_KEYWORDS]
    ours = name.startswith("sparsify.")
    kernel = node.meta.get("kernel", "")
    note = (
        next((notes[n] for n in (tensors.get(i.name) for i in node.all_input_nodes) if n in notes), "") if ours else ""
    )
    result = f"%{node.name}: {tensor_text(node.meta['val'])}" if node.meta.get("val") is not None else f"%{node.name}"
    kernel = f"  # {kernel}" if kernel else ""
    return one_line(f"  {'»' if ours else ' '} {result} = {name}({', '.join(args)}){note}{kernel}")


def _notes(program: Program) -> dict[str, str]:
    """What an operation of ours does, as a comment behind it, by the tensor that gives it away."""
    notes = {}
    for trained in program.slices:
        side = "input" if trained.side == "column" else "output"
        notes[trained.block_name] = f"  # trains {trained.length} {side} channels [{range_text(trained)}]"
    for part in program.lowranks:
        notes[part.param] = f"  # {lowrank_text(part).partition(' ')[2]}"
    return notes
