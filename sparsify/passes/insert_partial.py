"""Insert trained parts: each chosen weight's linear becomes a sparsify operator that reads the trained parameters too.

%y = aten.linear(%x, @down_proj.weight)
──▶
%y = sparsify.partial_linear(%x, @down_proj.weight, None, @down_proj.weight_slice, start, axis)          S2FT, PaCA
%y = sparsify.partial_linear_at(%x, …, @q_proj.weight_slice, @q_proj.slice_channels, axis)               PaCA, gathered
%y = sparsify.sparse_lowrank_linear(%x, …, @….sparse_values, @….sparse_index, @….lora_A, @….lora_B, s)   RoSA, LoRA
%y = sparsify.partial_embedding(%ids, @….weight, @….weight_slice, @….slice_channels, padding)             Tokens
%y = sparsify.quantized_linear(%x, [@….packed_0, …], "nf4", …)                                           Quantize
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import fx

from sparsify.adapters.adapter import tensor_hash
from sparsify.formats import pack, packed_bytes, unpack
from sparsify.methods.channels import slice_at, slices_of
from sparsify.methods.part import TrainedPart, beside
from sparsify.model.linears import is_conv1d, owner_name
from sparsify.ops.bits import pack_bits
from sparsify.passes.base import Context, PassResult
from sparsify.program import Input, LinearNode, Packed, Program
from sparsify.program.graph_editor import GraphEditor
from sparsify.program.permutation import invert_index

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from torch.fx.node import Argument


def rounding(dense: Float[Tensor, "p q"], back: Float[Tensor, "p q"]) -> float:
    """Relative error of a packed weight in the Frobenius norm; NaN on the meta device, which has no values."""
    if dense.is_meta:
        return math.nan
    return float((back.float() - dense.float()).norm() / dense.float().norm().clamp_min(1e-30))


def insert_partial(program: Program, context: Context) -> PassResult:
    """PERMUTED → EXPANDED."""
    parts = placed_parts(program)
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
        error = rounding(dense, back)
        dense_bytes = dense.numel() * dense.element_size()
        packings.append(Packed(param, format, dense.shape, dense_bytes, packed_bytes(packed[param]), error))
        tensors[param] = back  # selections, blocks and values start from what the packed weight really holds
    for param in dict.fromkeys(part.param for part in parts):
        if param not in tensors:  # entries under trained parts are scratch, so they may not be the user's own memory
            tensors[param] = program.tensor(param).detach().clone(memory_format=torch.contiguous_format)

    def filled(param: str) -> torch.Tensor:
        base = program.bases.get(param)
        return tensors[param] if base is None else base.dense()

    program = program.replaced(tensors=tensors, packed=packed, parts=tuple(parts))
    for part in parts:
        tensors |= part.initial(partial(filled, part.param), program, context.plan.seed)
    survivors = [] if context.plan.adapts else [p for p in program.masks if can_mask(program, p)]
    for param in survivors:
        tensors.setdefault(param, program.tensor(param).detach())
        bits = pack_bits(program.masks[param].to(tensors[param].device))
        tensors[beside(param, "weight_mask_bits")] = bits
    graph_module, inputs = rewrite(program, survivors)
    for param in program.quantize:  # the dense values are gone from here on
        del tensors[param]
    notes = []
    for kind in dict.fromkeys(type(part) for part in parts):
        notes.append(kind.counted(sum(type(part) is kind for part in parts)))
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


def placed_parts(program: Program) -> list[TrainedPart]:
    """Every part that the rules chose, where it lies in the permuted weights: whole channels first."""
    by_name = {s.name: s for s in program.structures}
    parts: list[TrainedPart] = []
    for choice in program.choices:
        parts += slices_of(program, by_name[choice.structure], choice)
    for group in program.channel_choices:
        for param in group.params:
            axis = 0 if is_conv1d(program.host.get_submodule(owner_name(param))) else 1
            axis += program.tensor(param).dim() - 2
            parts.append(slice_at(program, param, axis, torch.tensor(group.channels), "column", rule=group.rule))
    return parts + [part.placed(program) for part in program.parts]


def base_hash(program: Program, param: str) -> str:
    """Hash of a weight as the user had it, from the reordered copy when the original was donated."""
    tensor = program.tensors.get(param, program.tensor(param)).detach()
    for move in reversed(program.moves):
        if move.param == param:
            tensor = tensor.index_select(move.axis, invert_index(move.index).to(tensor.device))
    return tensor_hash(tensor)


def can_mask(program: Program, param: str) -> bool:
    """Whether a pruned weight is multiplied by its own linear (packed experts keep their mask by a gradient hook)."""
    if program.tensor(param).dim() != 2 or param.rpartition(".")[2] != "weight":
        return False
    module = program.host.get_submodule(owner_name(param))
    return type(module).forward is torch.nn.Linear.forward or is_conv1d(module)


def rewrite(program: Program, survivors: list[str]) -> tuple[fx.GraphModule, tuple[Input, ...]]:
    """A copy of the graph in which every linear over a changed weight is the operator that stands for it."""
    editor = GraphEditor(program)
    parts = {part.param: part for part in program.parts}
    for linear in list(program.linears()):
        part = parts.get(linear.weight)
        if linear.weight in program.quantize:
            insert_packed(editor, linear, part)
        elif part is not None:
            part.insert(editor, linear)
        elif linear.weight in survivors:
            insert_mask(editor, linear)
    for lookup in list(program.embeddings()):
        if lookup.weight in parts:
            parts[lookup.weight].insert_lookup(editor, lookup)
    for convolution in list(program.convolutions()):
        if convolution.weight in parts:
            parts[convolution.weight].insert_convolution(editor, convolution)
    for name in program.quantize:  # the dense weight is no input any more
        editor.drop_input(name)
    return editor.finish()


def insert_mask(editor: GraphEditor, linear: LinearNode) -> None:
    read = editor.read(linear)
    bits = editor.beside(linear.weight, "weight_mask_bits")
    given = {"x": read.x, "weight": read.weight, "bits": bits, "bias": read.bias, "transposed": linear.transposed}
    editor.replace(linear.node, torch.ops.sparsify.masked_linear.default, **given)


def insert_packed(editor: GraphEditor, linear: LinearNode, part: TrainedPart | None) -> None:
    """Over a packed base one operator computes the base and any part beside it."""
    program, param = editor.program, linear.weight
    read = editor.read(linear)
    rows, columns = read.weight.meta["val"].shape
    given: dict[str, Argument] = dict.fromkeys(("block", "channels", "values", "index", "a", "b"))
    given |= {"axis": 1, "scale": 1.0, "transposed": linear.transposed}
    packed = [editor.tensor_input(beside(param, f"packed_{i}"), t) for i, t in enumerate(program.packed[param])]
    if part is not None:
        given |= part.packed_arguments(editor, linear)
    given |= {"x": read.x, "bias": read.bias, "packed": packed}
    given |= {"format": program.quantize[param], "rows": rows, "columns": columns}
    editor.replace(linear.node, torch.ops.sparsify.quantized_linear.default, **given)
