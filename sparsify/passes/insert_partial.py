"""Insert trained parts: each chosen weight's linear becomes a sparsify operator that reads the trained parameters too.

%y = aten.linear(%x, @down_proj.weight)
──▶
%y = sparsify.partial_linear(%x, @down_proj.weight, None, @down_proj.weight_slice, start, axis)          S2FT, PaCA
%y = sparsify.partial_linear_at(%x, …, @q_proj.weight_slice, @q_proj.slice_channels, axis)               PaCA, gathered
%y = sparsify.sparse_lowrank_linear(%x, …, @….sparse_values, @….sparse_index, @….lora_A, @….lora_B, s)   RoSA, LoRA
%y = sparsify.quantized_linear(%x, [@….packed_0, …], "nf4", …)                                           Quantize
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from sparsify.adapter import tensor_hash
from sparsify.errors import VerifyError
from sparsify.graph_editor import GraphEditor, copied_inputs, fake_like  # noqa: F401  (used by lowerings)
from sparsify.masked import pack_bits
from sparsify.passes.assign_rules import is_conv1d, owner_name
from sparsify.passes.base import Context
from sparsify.permutation import invert_index
from sparsify.program import Input, LinearNode, Packed, Program, SparseLowRank, Support, TrainedSlice, UnitChoice
from sparsify.quantized import pack, packed_bytes, unpack
from sparsify.selection import generator, index_dtype, unit_channels
from sparsify.structure import Site, Structure

OPEN = -1  # every entry of the index of a mask that is still to be collected


def insert_partial(program: Program, context: Context) -> Program:
    """PERMUTED → EXPANDED."""
    by_name = {s.name: s for s in program.structures}
    slices: list[TrainedSlice] = []
    for choice in program.choices:
        slices += slices_of(program, by_name[choice.structure], choice)
    for group in program.channel_choices:
        for param in group.params:
            axis = 0 if is_conv1d(program.host.get_submodule(owner_name(param))) else 1
            channels = torch.tensor(group.channels)
            slices.append(slice_at(program, param, axis, channels, "column", rule=group.rule))
    lowranks = [part_of(program, support) for support in program.supports]
    tensors, packed, packings = dict(program.tensors), dict(program.packed), []
    hashes = {}
    for param, base in program.bases.items():  # packed before it came here: taken as it is
        hashes[param], packed[param] = base.hash(), list(base.packed)
        dense_bytes = base.shape.numel() * base.dtype.itemsize
        packings.append(Packed(param, base.format, base.shape, dense_bytes, packed_bytes(packed[param]), 0.0))
        tensors[param] = program.tensor(param)  # shape and dtype; `filled` unpacks one at a time
    for param, format in program.quantize.items():
        if param in program.bases:
            continue
        hashes[param] = base_hash(program, param)
        dense = tensors.get(param, program.tensor(param)).detach()
        packed[param] = pack(dense, format)
        back = unpack(packed[param], format, tuple(dense.shape), dense.dtype)
        error = float((back.float() - dense.float()).norm() / dense.float().norm().clamp_min(1e-30))
        dense_bytes = dense.numel() * dense.element_size()
        packings.append(Packed(param, format, dense.shape, dense_bytes, packed_bytes(packed[param]), error))
        tensors[param] = back  # selections, blocks and values start from what the packed weight really holds
    for param in dict.fromkeys([s.param for s in slices] + [p.param for p in lowranks]):
        if param not in tensors:  # entries under trained parts are scratch, so they may not be the user's own memory
            tensors[param] = program.tensor(param).detach().clone(memory_format=torch.contiguous_format)

    def filled(param: str) -> torch.Tensor:
        base = program.bases.get(param)
        return tensors[param] if base is None else base.dense()

    for piece in slices:
        tensors[piece.block_name] = block_of(filled(piece.param), piece)
        if piece.places:
            tensors[f"{owner_name(piece.param)}.slice_channels"] = torch.tensor(piece.places)
        if piece.param in program.masks:
            kept = piece.read(program.masks[piece.param]).contiguous()
            tensors[f"{owner_name(piece.param)}.slice_mask_bits"] = pack_bits(kept.to(tensors[piece.block_name].device))
    survivors = [] if context.plan.adapts else [p for p in program.masks if can_mask(program, p)]
    for param in survivors:
        tensors.setdefault(param, program.tensor(param).detach())
        bits = pack_bits(program.masks[param].to(tensors[param].device))
        tensors[f"{owner_name(param)}.weight_mask_bits"] = bits
    for part in lowranks:
        weight = filled(part.param) if part.count else tensors[part.param]
        tensors |= initial_parts(weight, part, context.plan.seed)
    program = replace(program, tensors=tensors, packed=packed, slices=tuple(slices), lowranks=tuple(lowranks))
    graph_module, inputs = rewrite(program, survivors)
    for param in program.quantize:  # the dense values are gone from here on
        del tensors[param]
    notes = [f"{len(slices)} trained slices"] if slices else []
    notes += [f"{len(lowranks)} sparse or low-rank parts"] if lowranks else []
    notes += [f"{len(survivors)} masked linears"] if survivors else []
    if packings:
        saved = sum(p.dense_bytes - p.packed_bytes for p in packings)
        notes.append(f"{len(packings)} weights packed, {saved / 2**20:.1f} MiB saved")
    return program.evolve(
        "insert: " + (", ".join(notes) or "nothing"),
        graph_module=graph_module,
        inputs=inputs,
        tensors=tensors,
        packings=tuple(packings),
        hashes=hashes,
    )


def base_hash(program: Program, param: str) -> str:
    """Hash of a weight as the user had it, from the reordered copy when the original was donated."""
    tensor = program.tensors.get(param, program.tensor(param)).detach()
    for move in reversed(program.moves):
        if move.param == param:
            tensor = tensor.index_select(move.axis, invert_index(move.index).to(tensor.device))
    return tensor_hash(tensor)


def slices_of(program: Program, structure: Structure, choice: UnitChoice) -> list[TrainedSlice]:
    """Where the chosen units of a structure ended up in each weight that trains."""
    found = []
    lies = bool(choice.in_place)
    for site in structure.consumers:
        channels = channels_of(structure, site, choice.consumers)
        place = (structure.name, choice.rule, not lies, lies)
        found.append(slice_at(program, site.param, site.axis, channels, "column", *place))
    if choice.producers:
        outer = Structure(structure.name, structure.kind, structure.units, structure.sites)
        for site in structure.with_role("v", "up"):
            channels = channels_of(outer, site, choice.producers)
            place = (structure.name, choice.rule, neighbours(site) and not lies, lies)
            found.append(slice_at(program, site.param, site.axis, channels, "row", *place))
    return found


def neighbours(site: Site) -> bool:
    """Whether neighbouring units lie side by side: not in a projection that interleaves q, k and v (GPT-NeoX)."""
    return site.step == site.block and not site.outer


def channels_of(structure: Structure, site: Site, units: tuple[int, ...]) -> torch.Tensor:
    return unit_channels(site, structure)[torch.tensor(units)].reshape(-1)


def moved_index(program: Program, param: str, axis: int) -> torch.Tensor | None:
    return next((m.index for m in program.moves if m.param == param and m.axis == axis), None)


def slice_at(
    program: Program,
    param: str,
    axis: int,
    original: torch.Tensor,
    side: Literal["column", "row"],
    structure: str = "",
    rule: int = 0,
    together: bool = True,
    gathered: bool = False,
) -> TrainedSlice:
    """Where channels given in original coordinates lie now: a contiguous range, or scattered places.

    together: the permutation must have brought a structure's channels together. gathered: units that train in place, by their places
    also where those happen to be neighbours, so that repeated blocks share one compiled graph.
    """
    moved = moved_index(program, param, axis)
    places = (original if moved is None else invert_index(moved)[original]).sort()
    start, length = int(places.values[0]), original.numel()
    contiguous = torch.equal(places.values, torch.arange(start, start + length))
    contiguous &= not gathered or length == program.tensor(param).shape[axis]
    if structure and together and not contiguous:
        raise VerifyError(f"{structure}: the chosen units in {param} are not contiguous after the permutation")
    return TrainedSlice(
        param=param,
        axis=axis,
        start=start if contiguous else -1,
        length=length,
        side=side,
        channels=tuple(original[places.indices].tolist()),
        structure=structure,
        places=() if contiguous else tuple(places.values.tolist()),
        rule=rule,
    )


def block_of(weight: torch.Tensor, piece: TrainedSlice) -> torch.Tensor:
    """Initial value of the trained block, contiguous, in fp32 over a 16-bit weight; logical layout (columns `(n, s)`, rows `(s, m)`)."""
    region = piece.read(weight.detach())
    return region.to(master_dtype(weight), copy=True, memory_format=torch.contiguous_format).contiguous()


def master_dtype(weight: torch.Tensor) -> torch.dtype:
    """Trained parameters are fp32 over a 16-bit base, and in the base's dtype else."""
    return torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype


def part_of(program: Program, support: Support) -> SparseLowRank:
    """Carry a support from original to current coordinates of its weight."""
    transposed = is_conv1d(program.host.get_submodule(owner_name(support.param)))
    index, original = support.index, support.index
    if index is not None:
        shape = program.tensor(support.param).shape
        index, original = current_index(program, support.param, index, shape)
    return SparseLowRank(
        param=support.param,
        rule=support.rule,
        rank=support.rank,
        scale=support.scale,
        dropout=support.dropout,
        count=support.count,
        mask=support.mask,
        transposed=transposed,
        index=index,
        original=original,
    )


def current_index(
    program: Program, param: str, original: torch.Tensor, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat entries of a stored weight of `shape`, original to current: `(index sorted, original in the same order)`.

    The two are one tensor where the weight stays in its order.
    """
    original = original.to(index_dtype(shape))
    if all(moved_index(program, param, axis) is None for axis in (0, 1)):
        original = original if bool((original.diff() > 0).all()) else original.sort().values
        return original, original
    places = list(torch.unravel_index(original.long(), shape))
    for axis in (0, 1):
        moved = moved_index(program, param, axis)
        if moved is not None:
            places[axis] = invert_index(moved)[places[axis]]
    flat = (places[0] * shape[1] + places[1]).sort()
    return flat.values.to(index_dtype(shape)), original[flat.indices]


def initial_parts(weight: torch.Tensor, part: SparseLowRank, seed: int) -> dict[str, torch.Tensor]:
    """Values that start at the base, `A` Kaiming-uniform (a = √5), `B` zero: the forward is the base's."""
    owner = owner_name(part.param)
    dtype = master_dtype(weight)
    n, m = reversed(weight.shape) if part.transposed else weight.shape
    found: dict[str, torch.Tensor] = {}
    if part.count:
        wide = index_dtype(weight.shape)
        index = part.index if part.index is not None else torch.full((part.count,), OPEN, dtype=wide)
        found[f"{owner}.sparse_index"] = index.to(weight.device)
        places = index.long().clamp_min(0).to(weight.device)
        found[f"{owner}.sparse_values"] = weight.detach().reshape(-1)[places].to(dtype)
    if part.rank:
        found[f"{owner}.lora_A"] = kaiming_a(part, m, seed).to(weight.device, dtype)
        found[f"{owner}.lora_B"] = torch.zeros(n, part.rank, dtype=dtype, device=weight.device)
    return found


def kaiming_a(part: SparseLowRank, width: int, seed: int) -> torch.Tensor:
    """`A (r, m)`, uniform in ±1/√m (Kaiming-uniform with a = √5), equal on every rank."""
    bound = width**-0.5
    return (torch.rand(part.rank, width, generator=generator(seed, part.param + ".lora_A")) * 2 - 1) * bound


def can_mask(program: Program, param: str) -> bool:
    """Whether a pruned weight is multiplied by its own linear (packed experts keep their mask by a gradient hook)."""
    if program.tensor(param).dim() != 2 or param.rpartition(".")[2] != "weight":
        return False
    module = program.host.get_submodule(owner_name(param))
    return type(module).forward is torch.nn.Linear.forward or is_conv1d(module)


def rewrite(program: Program, survivors: list[str]) -> tuple[fx.GraphModule, tuple[Input, ...]]:
    """A copy of the graph in which every linear over a changed weight is the sparsify operator that stands for it."""
    editor = GraphEditor(program)
    pieces = {s.param: s for s in program.slices}
    parts = {p.param: p for p in program.lowranks}
    for linear in list(program.linears()):
        param = linear.weight
        piece, part = pieces.get(param), parts.get(param)
        if param in program.quantize:
            insert_packed(editor, linear, piece, part)
        elif part is not None:
            insert_lowrank(editor, linear, part)
        elif piece is not None:
            insert_slice(editor, linear, piece)
        elif param in survivors:
            insert_mask(editor, linear)
    for name in program.quantize:  # the dense weight is no input any more
        editor.drop_input(name)
    return editor.finish()


def tensor_of(editor: GraphEditor, param: str, leaf: str) -> fx.Node | None:
    """The input for a tensor beside a weight; None where the program has no such tensor."""
    name = f"{owner_name(param)}.{leaf}"
    tensors = editor.program.tensors
    return editor.tensor_input(name, tensors[name]) if name in tensors else None


def masked_block(editor: GraphEditor, linear: LinearNode, piece: TrainedSlice) -> fx.Node | None:
    """The trained block; over a pruned base its pruned entries are held at zero."""
    block = tensor_of(editor, piece.param, piece.block_name.rpartition(".")[2])
    bits = tensor_of(editor, piece.param, "slice_mask_bits")
    if bits is None or block is None:
        return block
    return editor.call(torch.ops.sparsify.apply_mask.default, linear.node, block, t=block, bits=bits)


def lowrank_arguments(editor: GraphEditor, part: SparseLowRank) -> dict[str, Any]:
    """What both operators take of a sparse and a low-rank part; an open mask keeps the sparse one silent."""
    leaves = {"values": "sparse_values", "index": "sparse_index", "a": "lora_A", "b": "lora_B"}
    found: dict[str, Any] = {name: tensor_of(editor, part.param, leaf) for name, leaf in leaves.items()}
    if part.index is None:
        found |= {"values": None, "index": None}
    return found | {"scale": part.scale}


def insert_slice(editor: GraphEditor, linear: LinearNode, piece: TrainedSlice) -> None:
    read = editor.read(linear)
    block = masked_block(editor, linear, piece)
    weight = read.weight
    if linear.transposed:
        weight = editor.call(torch.ops.aten.t.default, linear.node, self=weight)
    given = {"x": read.x, "weight": weight, "bias": read.bias, "block": block, "axis": piece.logical_axis}
    if piece.places:
        index = tensor_of(editor, piece.param, "slice_channels")
        editor.replace(linear.node, torch.ops.sparsify.partial_linear_at.default, index=index, **given)
    else:
        editor.replace(linear.node, torch.ops.sparsify.partial_linear.default, start=piece.start, **given)


def insert_lowrank(editor: GraphEditor, linear: LinearNode, part: SparseLowRank) -> None:
    read = editor.read(linear)
    given = {"x": read.x, "weight": read.weight, "bias": read.bias, "transposed": linear.transposed}
    op = torch.ops.sparsify.sparse_lowrank_linear.default
    editor.replace(linear.node, op, **given, **lowrank_arguments(editor, part))


def insert_mask(editor: GraphEditor, linear: LinearNode) -> None:
    read = editor.read(linear)
    bits = tensor_of(editor, linear.weight, "weight_mask_bits")
    given = {"x": read.x, "weight": read.weight, "bits": bits, "bias": read.bias, "transposed": linear.transposed}
    editor.replace(linear.node, torch.ops.sparsify.masked_linear.default, **given)


def insert_packed(
    editor: GraphEditor, linear: LinearNode, piece: TrainedSlice | None, part: SparseLowRank | None
) -> None:
    program, param, owner = editor.program, linear.weight, owner_name(linear.weight)
    read = editor.read(linear)
    rows, columns = read.weight.meta["val"].shape
    given: dict[str, Any] = dict.fromkeys(("block", "channels", "values", "index", "a", "b"))
    given |= {"axis": 1, "scale": 1.0}
    packed = [editor.tensor_input(f"{owner}.packed_{i}", t) for i, t in enumerate(program.packed[param])]
    if piece is not None:
        places = piece.places or tuple(range(piece.start, piece.start + piece.length))
        program.tensors.setdefault(f"{owner}.slice_channels", torch.tensor(places))
        given["block"] = masked_block(editor, linear, piece)
        given |= {"channels": tensor_of(editor, param, "slice_channels"), "axis": piece.logical_axis}
    if part is not None:
        given |= lowrank_arguments(editor, part)
    given |= {"format": program.quantize[param], "rows": rows, "columns": columns, "transposed": linear.transposed}
    given |= {"x": read.x, "bias": read.bias, "packed": packed}
    editor.replace(linear.node, torch.ops.sparsify.quantized_linear.default, **given)


def activate_support(program: Program, param: str) -> Program:
    """The program once an open mask is chosen: the operator of `param` reads its sparse values and index."""
    editor = GraphEditor(program)
    owner = owner_name(param)
    packed = f"{owner}.packed_0"
    values, index = (editor.input(f"{owner}.{leaf}") for leaf in ("sparse_values", "sparse_index"))
    weight = editor.input(packed if packed in editor.sources else param)
    ops = torch.ops.sparsify
    for node in editor.nodes(ops.sparse_lowrank_linear.default, ops.quantized_linear.default):
        if weight in node.all_input_nodes:
            editor.change(node, values=values, index=index)
    graph_module, inputs = editor.finish()
    return replace(program, graph_module=graph_module, inputs=inputs)
