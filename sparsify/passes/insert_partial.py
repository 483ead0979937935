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
from sparsify.masked import pack_bits
from sparsify.names import placeholder
from sparsify.passes.assign_rules import is_conv1d, owner_name
from sparsify.passes.base import Context, PassResult
from sparsify.permutation import invert_index
from sparsify.program import Input, Packed, Program, SparseLowRank, Support, TrainedSlice, UnitChoice
from sparsify.quantized import pack, packed_bytes, unpack
from sparsify.selection import generator, index_dtype, unit_channels
from sparsify.structure import Site, Structure

OPEN = -1  # every entry of the index of a mask that is still to be collected


def insert_partial(program: Program, context: Context) -> PassResult:
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
    rounded = (
        program.quantize.keys() - program.bases.keys()
    )  # packing changes the outputs, and the report says by how much
    inserted = program.evolve(
        "insert: " + (", ".join(notes) or "nothing"),
        graph_module=graph_module,
        inputs=inputs,
        tensors=tensors,
        packings=tuple(packings),
        hashes=hashes,
    )
    return PassResult(inserted, changed=bool(notes), preserves="nothing" if rounded else None)


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
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    pieces = {s.param: s for s in program.slices}
    parts = {p.param: p for p in program.lowranks}
    inputs = copied_inputs(program, mapping)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    added: dict[str, fx.Node] = {}

    def tensor_input(name: str, value: torch.Tensor) -> fx.Node:
        nonlocal last
        if name not in added:
            with graph.inserting_after(last):
                last = placeholder(graph, f"p_{name}")
            last.meta["val"] = fake_like(program, value)
            inputs.append(Input(last.name, "parameter" if value.is_floating_point() else "buffer", name))
            added[name] = last
        return added[name]

    def optional(param: str, leaf: str) -> fx.Node | None:
        name = f"{owner_name(param)}.{leaf}"
        return tensor_input(name, program.tensors[name]) if name in program.tensors else None

    def masked_block(param: str) -> fx.Node | None:
        """The trained block; over a pruned base its pruned entries are held at zero."""
        block = optional(param, f"{param.rpartition('.')[2]}_slice")
        bits = optional(param, "slice_mask_bits")
        if bits is None or block is None:
            return block
        with graph.inserting_before(node):
            kept = graph.call_function(torch.ops.sparsify.apply_mask.default, (block, bits))
        kept.meta["val"] = block.meta["val"]
        return kept

    for linear in list(program.linears()):
        param = linear.weight
        piece, part, format = pieces.get(param), parts.get(param), program.quantize.get(param)
        masked = param in survivors and format is None
        if piece is None and part is None and format is None and not masked:
            continue
        node = mapping[linear.node]
        if node.target is torch.ops.aten.addmm.default:
            bias, x, weight = node.args[:3]
        else:
            x, weight = node.args[:2]
            bias = node.args[2] if len(node.args) > 2 else None
        stored = stored_input(weight)
        leaves = ("sparse_values", "sparse_index", "lora_A", "lora_B")
        values = tuple(optional(param, leaf) if part is not None else None for leaf in leaves)
        if part is not None and part.index is None:
            values = (None, None, *values[2:])
        scale = part.scale if part is not None else 1.0
        target: Any
        if format is not None:
            shape = list(stored.meta["val"].shape)
            packed = [tensor_input(f"{owner_name(param)}.packed_{i}", t) for i, t in enumerate(program.packed[param])]
            block = masked_block(param) if piece is not None else None
            channels, axis = None, 1
            if piece is not None:
                name = f"{owner_name(param)}.slice_channels"
                places = piece.places or tuple(range(piece.start, piece.start + piece.length))
                program.tensors.setdefault(name, torch.tensor(places))
                channels, axis = tensor_input(name, program.tensors[name]), piece.logical_axis
            target = torch.ops.sparsify.quantized_linear.default
            layout = (format, *shape, linear.transposed)
            args: tuple[Any, ...] = (x, *layout, bias, block, channels, axis, *values, scale, packed)
        elif masked:
            bits = optional(param, "weight_mask_bits")
            target = torch.ops.sparsify.masked_linear.default
            args = (x, stored, bits, bias, *([True] if linear.transposed else []))
        elif part is not None:
            target = torch.ops.sparsify.sparse_lowrank_linear.default
            args = (x, stored, bias, *values, scale, linear.transposed)
        else:
            assert piece is not None
            block = masked_block(param)
            where: Any = piece.start
            target = torch.ops.sparsify.partial_linear.default
            if piece.places:
                target = torch.ops.sparsify.partial_linear_at.default
                where = optional(param, "slice_channels")
            logical = stored
            if linear.transposed:
                with graph.inserting_before(node):
                    logical = graph.call_function(torch.ops.aten.t.default, (stored,))
            args = (x, logical, bias, block, where, piece.logical_axis)
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        above: Any = weight
        while above is not stored and not above.users:  # a transpose that nobody reads any more
            dead, above = above, above.args[0]
            graph.erase_node(dead)
    for name in program.quantize:  # the dense weight is no input any more
        drop_input(graph, inputs, name)
    graph_module = fx.GraphModule(program.graph_module, graph)
    graph_module.meta = dict(program.graph_module.meta)
    return graph_module, tuple(inputs)


def activate_support(program: Program, param: str) -> Program:
    """The program once an open mask is chosen: the operator of `param` reads its sparse values and index."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    owner = owner_name(param)
    inputs = copied_inputs(program, mapping)
    by_target = {i.target: i.name for i in inputs}
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    values, index = (nodes[by_target[f"{owner}.{leaf}"]] for leaf in ("sparse_values", "sparse_index"))
    places = {
        torch.ops.sparsify.sparse_lowrank_linear.default: (1, 3),
        torch.ops.sparsify.quantized_linear.default: (14, 9),
    }
    own = {by_target.get(param), by_target.get(f"{owner}.packed_0")}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in places:
            weight, first = places[node.target]
            source = node.args[weight][0] if isinstance(node.args[weight], list | tuple) else node.args[weight]
            if source.name in own:
                node.args = (*node.args[:first], values, index, *node.args[first + 2 :])
    graph_module = fx.GraphModule(program.graph_module, graph)
    return replace(program, graph_module=graph_module, inputs=tuple(inputs))


def copied_inputs(program: Program, mapping: dict[fx.Node, fx.Node]) -> list[Input]:
    """The table of inputs of a copied graph: a copy may rename a placeholder that is called like a Python builtin."""
    names = {node.name: mapping[node].name for node in program.graph.nodes if node.op == "placeholder"}
    return [replace(i, name=names[i.name]) for i in program.inputs]


def stored_input(weight: Any) -> fx.Node:
    """The placeholder under a transposed weight."""
    while isinstance(weight, fx.Node) and weight.op == "call_function":
        weight = weight.args[0]
    assert isinstance(weight, fx.Node)
    return weight


def drop_input(graph: fx.Graph, inputs: list[Input], target: str) -> None:
    found = next(i for i in inputs if i.target == target)
    node = next(n for n in graph.nodes if n.op == "placeholder" and n.name == found.name)
    for user in list(node.users):  # a transposed view that nobody reads any more
        if not user.users:
            graph.erase_node(user)
    if node.users:
        raise VerifyError(f"{target} is packed, but node {next(iter(node.users)).name} still reads it whole")
    graph.erase_node(node)
    inputs.remove(found)


def fake_like(program: Program, tensor: torch.Tensor) -> torch.Tensor:
    value = next((n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)), None)
    mode = getattr(value, "fake_mode", None)
    return mode.from_tensor(tensor, static_shapes=True) if mode is not None else torch.empty_like(tensor, device="meta")
