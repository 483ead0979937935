"""Insert partial linears: the chosen, now contiguous channels of each weight become a trained block.

    %y = aten.linear(%x, @down_proj.weight)
    ──▶
    %y = sparsify.partial_linear(%x, @down_proj.weight, None, @down_proj.weight_slice, start, axis)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from sparsify.errors import VerifyError
from sparsify.passes.base import Context
from sparsify.permutation import invert_index
from sparsify.program import Input, Program, TrainedSlice, UnitChoice
from sparsify.selection import unit_channels
from sparsify.structure import Site, Structure


def insert_partial(program: Program, context: Context) -> Program:
    """PERMUTED → EXPANDED."""
    by_name = {s.name: s for s in program.structures}
    slices: list[TrainedSlice] = []
    for choice in program.choices:
        structure = by_name[choice.structure]
        slices += slices_of(program, structure, choice)
    tensors = dict(program.tensors)
    for piece in slices:
        weight = tensors.get(piece.param)
        if weight is None:  # the region under the block is scratch, so it may not be the user's own memory
            weight = tensors[piece.param] = program.tensor(piece.param).detach().clone()
        tensors[piece.block_name] = block_of(weight, piece)
    graph_module, inputs = rewrite(program, slices, tensors)
    trained = sum(tensors[s.block_name].numel() for s in slices)
    note = f"insert-partial: {len(slices)} trained slices, {trained:,} parameters"
    return program.evolve(note, graph_module=graph_module, inputs=inputs, tensors=tensors, slices=tuple(slices))


def slices_of(program: Program, structure: Structure, choice: UnitChoice) -> list[TrainedSlice]:
    """Where the chosen units of a structure ended up in each weight that trains."""
    found = [slice_at(program, structure, site, choice.consumers, "column") for site in structure.consumers]
    if choice.producers:
        for site in structure.with_role("v", "up"):
            outer_only = Structure(structure.name, structure.kind, structure.units, structure.sites)
            found.append(slice_at(program, outer_only, site, choice.producers, "row"))
    return found


def slice_at(
    program: Program, structure: Structure, site: Site, units: tuple[int, ...], side: Literal["column", "row"]
) -> TrainedSlice:
    original = unit_channels(site, structure)[torch.tensor(units)].reshape(-1)
    moved = next((m.index for m in program.moves if m.param == site.param and m.axis == site.axis), None)
    places = (original if moved is None else invert_index(moved)[original]).sort()
    start, length = int(places.values[0]), original.numel()
    if not torch.equal(places.values, torch.arange(start, start + length)):
        raise VerifyError(f"{structure.name}: the chosen units of {site} are not contiguous after the permutation")
    return TrainedSlice(
        param=site.param,
        axis=site.axis,
        start=start,
        length=length,
        side=side,
        channels=tuple(original[places.indices].tolist()),
        structure=structure.name,
    )


def block_of(weight: torch.Tensor, piece: TrainedSlice) -> torch.Tensor:
    """Initial value of the trained block, contiguous, in fp32 over a 16-bit weight; logical layout (columns `(n, s)`, rows `(s, m)`)."""
    region = weight.detach().narrow(piece.axis, piece.start, piece.length)
    logical_axis = 1 if piece.side == "column" else 0
    region = region if logical_axis == piece.axis else region.t()
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return region.to(dtype, copy=True, memory_format=torch.contiguous_format).contiguous()


def rewrite(
    program: Program, slices: list[TrainedSlice], tensors: dict[str, torch.Tensor]
) -> tuple[fx.GraphModule, tuple[Input, ...]]:
    """A copy of the graph in which every linear over a sliced weight reads the block too."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, mapping)
    graph.output(output)
    by_param = {s.param: s for s in slices}
    inputs = list(program.inputs)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    blocks: dict[str, fx.Node] = {}
    for piece in slices:
        with graph.inserting_after(last):
            last = graph.placeholder("p_" + piece.block_name.replace(".", "_"))
        last.meta["val"] = fake_like(program, tensors[piece.block_name])
        blocks[piece.param] = last
        inputs.append(Input(last.name, "parameter", piece.block_name))
    for linear in list(program.linears()):
        piece = by_param.get(linear.weight)
        if piece is None:
            continue
        node = mapping[linear.node]
        with graph.inserting_before(node):
            if linear.transposed:
                bias, x, weight = node.args if len(node.args) == 3 else (None, *node.args)
                weight = graph.call_function(torch.ops.aten.t.default, (weight,))
            else:
                x, weight = node.args[:2]
                bias = node.args[2] if len(node.args) > 2 else None
            axis = 1 if piece.side == "column" else 0
            args = (x, weight, bias, blocks[piece.param], piece.start, axis)
            partial = graph.call_function(torch.ops.sparsify.partial_linear.default, args)
        partial.meta = dict(node.meta)
        node.replace_all_uses_with(partial)
        graph.erase_node(node)
    graph_module = fx.GraphModule(program.graph_module, graph)
    graph_module.meta = dict(program.graph_module.meta)
    return graph_module, tuple(inputs)


def fake_like(program: Program, tensor: torch.Tensor) -> torch.Tensor:
    value = next((n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)), None)
    mode = getattr(value, "fake_mode", None)
    return mode.from_tensor(tensor, static_shapes=True) if mode is not None else torch.empty_like(tensor, device="meta")
