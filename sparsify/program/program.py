"""The program: one ATen graph with named tensors that every pass reads and writes, stage by stage.

    CAPTURED → STRUCTURED → SELECTED → PERMUTED → EXPANDED → LOWERED

The graph is lifted: parameters, buffers and constants are placeholders tied to qualified names (`inputs`), their
current values come from `tensors` first and from the host module else. It is runnable: `program(*args, **kwargs)`
takes what the model takes (of the captured shapes) and returns what the model returns.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sparsify.console import printable
from sparsify.errors import Refusal, SparsifyError
from sparsify.ops.schema import arguments
from sparsify.program.names import LONGEST, identifier, is_safe
from sparsify.program.permutation import Permutation
from sparsify.program.structure import Declined, Structure
from sparsify.program.values import (
    Captured,
    ChannelChoice,
    Chosen,
    ConvolutionNode,
    EmbeddingNode,
    Found,
    Input,
    LinearNode,
    Move,
    Packed,
    Packing,
    Pruning,
    UnitChoice,
)

if TYPE_CHECKING:
    import networkx as nx
    from jaxtyping import Bool, Int

    from sparsify.host.quantized_bases import PackedBase
    from sparsify.lowering.kernel_texts import KernelText
    from sparsify.methods.channels import TrainedSlice
    from sparsify.methods.part import TrainedPart
    from sparsify.methods.sparse_lowrank import SparseLowRank
    from sparsify.program.unit_budget import Budget
    from sparsify.program.values import Inputs
    from sparsify.pruning.sequential import LayerStats

A = TypeVar("A")


class Stage(enum.IntEnum):
    """How far a program has come; each stage has a grammar (`sparsify.passes.verify`)."""

    CAPTURED = 0
    STRUCTURED = 1
    SELECTED = 2
    PERMUTED = 3
    EXPANDED = 4
    LOWERED = 5


@printable
@dataclass(frozen=True, eq=False)
class Program:
    """See the module docstring. Passes return a new Program (`evolve`); tensors are never written in place. Frozen.

    tensors: values that passes changed, by name, until a host has them. parts: what trains beside a frozen weight. refusals: what a rule
    matched and could not serve. history: one note a pass. The rest lies in groups, see `sparsify.program.values`.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    host: nn.Module
    captured: Captured
    stage: Stage = Stage.CAPTURED
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    found: Found = field(default_factory=Found)
    chosen: Chosen = field(default_factory=Chosen)
    parts: tuple[TrainedPart, ...] = ()
    packing: Packing = field(default_factory=Packing)
    pruning: Pruning = field(default_factory=Pruning)
    refusals: tuple[Refusal, ...] = ()
    history: tuple[str, ...] = ()

    @classmethod
    def from_export(
        cls,
        exported: torch.export.ExportedProgram,
        host: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Program:
        """The program of an export of `host`, traced with `args` and `kwargs`, at stage CAPTURED."""
        signature = exported.graph_signature
        named: dict[str, tuple[Literal["parameter", "buffer", "constant"], str]] = {}
        kinds: tuple[tuple[Mapping[str, str], Literal["parameter", "buffer", "constant"]], ...] = (
            (signature.inputs_to_parameters, "parameter"),
            (signature.inputs_to_buffers, "buffer"),
            (signature.inputs_to_lifted_tensor_constants, "constant"),
        )
        for table, kind in kinds:
            named.update({name: (kind, target) for name, target in table.items()})
        canonical = canonical_names(host)
        inputs = []
        for node in exported.graph.nodes:
            if node.op != "placeholder":
                continue
            found = named.get(node.name)
            if not is_safe(node.name) or len(node.name) > LONGEST:
                node._rename(identifier(node.name))
            node.target = node.name
            if found is not None:
                kind, target = found
                inputs.append(Input(node.name, kind, canonical.get(target, target)))
            else:
                inputs.append(Input(node.name, "user"))
        in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
        if in_spec is None or out_spec is None:  # pragma: no cover - export always sets both
            raise SparsifyError("torch.export returned no calling convention")
        tables = ("buffers_to_mutate", "user_inputs_to_mutate", "parameters_to_mutate")
        mutations = sum(len(getattr(signature, table, {})) for table in tables)
        constants = {name: value for name, value in exported.constants.items() if isinstance(value, torch.Tensor)}
        exported.graph_module.recompile()
        return cls(
            graph_module=exported.graph_module,
            inputs=tuple(inputs),
            host=host,
            captured=Captured(in_spec, out_spec, mutations, (args, kwargs), canonical, constants),
            history=(
                f"capture: {type(host).__name__}, {sum(n.op == 'call_function' for n in exported.graph.nodes)} operations",
            ),
        )

    def evolve(self, note: str, **changes: object) -> Program:
        """A new program with `changes`; `note` goes on top of the printed history."""
        return self.replaced(history=(*self.history, note), **changes)

    def replaced(self, **changes: object) -> Program:
        """A new program with `changes`, by the names of fields or of what stands in their groups."""
        whole = {name: value for name, value in changes.items() if name not in GROUP_OF}
        for group in dict.fromkeys(GROUP_OF[name] for name in changes if name in GROUP_OF):
            inside = {name: value for name, value in changes.items() if GROUP_OF.get(name) == group}
            whole[group] = replace(getattr(self, group), **inside)
        return replace(self, **whole)

    def on(self, host: nn.Module) -> Program:
        """The program over a host that holds its tensors now, packed ones too."""
        return self.replaced(host=host, tensors={}, packed={})

    def facts(self) -> dict[str, object]:
        """Every field by name, those of the groups one by one."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in GROUPS}
        return found | {name: getattr(self, name) for name in GROUP_OF}

    # --- what stands in the groups ---------------------------------------------------------------------------------------------

    @property
    def in_spec(self) -> pytree.TreeSpec:
        """Structure of the inputs."""
        return self.captured.in_spec

    @property
    def out_spec(self) -> pytree.TreeSpec:
        """Structure of the output."""
        return self.captured.out_spec

    @property
    def mutations(self) -> int:
        """How many outputs of the graph are written buffers, before the model's own."""
        return self.captured.mutations

    @property
    def example(self) -> Inputs:
        """The inputs of the trace, `(args, kwargs)`."""
        return self.captured.example

    @property
    def aliases(self) -> dict[str, str]:
        """Every name of a parameter or buffer → the first name of the same tensor."""
        return self.captured.aliases

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """Tensors of the trace that belong to no module."""
        return self.captured.constants

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Coupled structures that detection found."""
        return self.found.structures

    @property
    def declined(self) -> tuple[Declined, ...]:
        """What detection declined, with its reason."""
        return self.found.declined

    @property
    def unproven(self) -> dict[str, str]:
        """Structure → why its units are not moved."""
        return self.found.unproven

    @property
    def choices(self) -> tuple[UnitChoice, ...]:
        """Units that train, by structure."""
        return self.chosen.choices

    @property
    def channel_choices(self) -> tuple[ChannelChoice, ...]:
        """Channels that train in weights that share an input."""
        return self.chosen.channel_choices

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What rules with `fraction=` asked for, and what their whole units train."""
        return self.chosen.budgets

    @property
    def permutations(self) -> dict[str, tuple[Permutation, Permutation | None]]:
        """Structure → permutation of its units, and of the heads inside them."""
        return self.chosen.permutations

    @property
    def moves(self) -> tuple[Move, ...]:
        """Tensors that were reordered."""
        return self.chosen.moves

    @property
    def quantize(self) -> dict[str, str]:
        """Weight → the format in which it is stored."""
        return self.packing.quantize

    @property
    def packed(self) -> dict[str, list[torch.Tensor]]:
        """Weight → packed tensors, until a host has them."""
        return self.packing.packed

    @property
    def packings(self) -> tuple[Packed, ...]:
        """What packing saved and changed."""
        return self.packing.packings

    @property
    def bases(self) -> dict[str, PackedBase]:
        """Weights that came packed."""
        return self.packing.bases

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of weights before they were packed."""
        return self.packing.hashes

    @property
    def masks(self) -> dict[str, Bool[torch.Tensor, "*experts p q"]]:
        """Pruned weight → which entries survive, in the current order."""
        return self.pruning.masks

    @property
    def pruned(self) -> tuple[LayerStats, ...]:
        """What pruning did to each layer."""
        return self.pruning.pruned

    @property
    def dense_hash(self) -> str | None:
        """Hash of the model before it was pruned."""
        return self.pruning.dense_hash

    # --- asked of a program ---------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The graph that runs, with weights as placeholders."""
        return self.graph_module.graph

    @property
    def tensor_names(self) -> dict[str, str]:
        """Placeholder name → qualified name, for parameters, buffers and constants."""
        return {i.name: i.target for i in self.inputs if i.target is not None}

    @property
    def slices(self) -> tuple[TrainedSlice, ...]:
        """The parts that are whole channels (S2FT, PaCA) or rows."""
        return tuple(cast("TrainedSlice", part) for part in self.parts if part.module_kind in WHOLE_CHANNELS)

    @property
    def lowranks(self) -> tuple[SparseLowRank, ...]:
        """The sparse and low-rank parts (RoSA, LoRA)."""
        return tuple(cast("SparseLowRank", part) for part in self.parts if part.module_kind == "SparseLowRank")

    def part_at(self, node: fx.Node) -> TrainedPart | None:
        """The trained part of the weight, dense or packed, that an operator reads."""
        names = self.tensor_names
        read = {names.get(through_transpose(source)[0].name) for source in node.all_input_nodes}
        return next((p for p in self.parts if p.param in read or f"{p.owner}.packed_0".lstrip(".") in read), None)

    def moved_index(self, param: str, axis: int) -> Int[torch.Tensor, " c"] | None:
        """How a tensor was reordered on an axis, `current = original.index_select(axis, index)`; None where it was not."""
        return next((m.index for m in self.moves if m.param == param and m.axis == axis), None)

    def names_of(self, param: str) -> list[str]:
        """Every name of a tensor (tied weights and shared modules have several)."""
        return [name for name, canonical in self.aliases.items() if canonical == param]

    def placeholder(self, target: str) -> fx.Node | None:
        """The graph input that stands for the tensor `target`."""
        names = {i.target: i.name for i in self.inputs}
        name = names.get(self.aliases.get(target, target))
        return next((n for n in self.graph.nodes if n.op == "placeholder" and n.name == name), None)

    def tensor(self, target: str) -> torch.Tensor:
        """Current value of a named parameter, buffer or constant."""
        target = self.aliases.get(target, target)
        if target in self.tensors:
            return self.tensors[target]
        if target in self.constants:
            return self.constants[target]
        owner, _, leaf = target.rpartition(".")
        return getattr(self.host.get_submodule(owner), leaf)

    def value(self, target: str) -> torch.Tensor:
        """`tensor`, and of a weight that was packed before `compile` what it stands for, unpacked now (`tensor` gives a stand-in of
        its shape, filled with NaN and without memory)."""
        target = self.aliases.get(target, target)
        owner, _, leaf = target.rpartition(".")
        weight = f"{owner}.weight".lstrip(".")
        if leaf.startswith("packed_") and weight in self.packed:  # before `install` gives them to the host
            return self.packed[weight][int(leaf.removeprefix("packed_"))]
        base = self.bases.get(target)
        return self.tensor(target) if base is None or target in self.tensors else base.dense()

    def linears(self) -> Iterator[LinearNode]:
        """Every matrix product with a named weight, in graph order."""
        names = self.tensor_names
        aten = torch.ops.aten
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            grouped = is_grouped(node)
            products = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
            if not grouped and node.target not in products:
                continue
            given = arguments(node)
            if grouped:
                x, weight, bias, swapped = given["x"], given["weight"], None, False
            elif node.target is aten.linear.default:
                x, weight, bias, swapped = given["input"], given["weight"], given["bias"], False
            elif node.target is aten.addmm.default:
                x, weight, bias, swapped = given["mat1"], given["mat2"], given["self"], True
            elif node.target is aten.mm.default:
                x, weight, bias, swapped = given["self"], given["mat2"], None, True
            else:
                x, weight, bias, swapped = given["self"], given["other"], None, True
            weight, flipped = through_transpose(weight)
            if isinstance(weight, fx.Node) and weight.name in names and isinstance(x, fx.Node):
                bias = bias if isinstance(bias, fx.Node) else None
                bias_name = names.get(bias.name) if bias is not None else None
                offsets = given["offsets"] if grouped else None
                yield LinearNode(node, x, names[weight.name], bias_name, swapped != flipped, bias, offsets)

    def embeddings(self) -> Iterator[EmbeddingNode]:
        """Every look-up of rows of a named weight, in graph order."""
        names = self.tensor_names
        for node in self.graph.nodes:
            if node.op != "call_function" or node.target is not torch.ops.aten.embedding.default:
                continue
            given = arguments(node)
            weight, ids = given["weight"], given["indices"]
            if isinstance(weight, fx.Node) and weight.name in names and isinstance(ids, fx.Node):
                yield EmbeddingNode(node, ids, names[weight.name], int(given["padding_idx"]))

    def convolutions(self) -> Iterator[ConvolutionNode]:
        """Every convolution in one or two dimensions with a named weight and one group, padded evenly by zeros, in graph order."""
        names, aten = self.tensor_names, torch.ops.aten
        plain, worded = (aten.conv1d.default, aten.conv2d.default), (aten.conv1d.padding, aten.conv2d.padding)
        for node in self.graph.nodes:
            if node.op != "call_function" or node.target not in plain + worded:
                continue
            given = arguments(node)
            weight, x, bias = given["weight"], given["input"], given["bias"]
            if (
                not (isinstance(weight, fx.Node) and weight.name in names and isinstance(x, fx.Node))
                or given["groups"] != 1
            ):
                continue
            kernel = weight.meta["val"].shape[2:]
            if x.meta["val"].dim() != len(kernel) + 2:
                continue
            stride, dilation = (spread(given[name], len(kernel)) for name in ("stride", "dilation"))
            padding = given["padding"]
            if padding == "same" and any(d * (k - 1) % 2 for d, k in zip(dilation, kernel, strict=True)):
                continue
            if isinstance(padding, str):
                spans = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
                padding = spans if padding == "same" else [0]
            bias = bias if isinstance(bias, fx.Node) else None
            where = (stride, spread(padding, len(kernel)), dilation)
            yield ConvolutionNode(node, x, names[weight.name], bias, *where)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the graph. Inputs must have the structure and shapes of the captured example; so has what the model returns."""
        _, example_kwargs = self.example
        for name, value in example_kwargs.items():
            if name not in kwargs and not isinstance(value, torch.Tensor):
                kwargs[name] = value
        kwargs = {name: kwargs[name] for name in example_kwargs if name in kwargs} | kwargs
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise SparsifyError(f"the program was captured with inputs {self.in_spec}, but was called with {spec}")
        user = iter(flat)
        values = [next(user) if i.target is None else self.value(i.target) for i in self.inputs]
        outputs = self.graph_module(*values)
        return pytree.tree_unflatten(list(outputs)[self.mutations :], self.out_spec)

    def run_example(self) -> object:
        """The outputs on the example of the trace."""
        args, kwargs = self.example
        return self(*args, **kwargs)

    def coupling(self, *, declined: bool = False) -> nx.Graph:
        """Structures and the tensors that they run through as a bipartite `networkx.Graph`, with the sites on the edges.

        Nodes are `("structure", name)` and `("tensor", name)`; see `sparsify.program.coupling.coupling_graph` for their attributes
        (tied and shared tensors, conflicts). A connected component moves together. declined: also what detection declined, with its reason.
        """
        from sparsify.program.coupling import coupling_graph

        return coupling_graph(self, declined=declined)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, fold: bool = True, kernels: bool = False, noise: bool = False, ids: int = 8) -> str:
        """The program as text, as `print` shows it (`sparsify.program.printer.print_program`).

        fold: equal layers once, with "× 30" and what differs between them; False prints every layer.
        kernels: with the source of every generated kernel of a lowered program behind it, each once.
        """
        from sparsify.program.printer import print_program

        return print_program(self, fold=fold, noise=noise, ids=ids, kernels=kernels)

    def kernels(self, tokens: int | None = None) -> tuple[KernelText, ...]:
        """The generated kernels of a lowered program: name, source, and the nodes that run it. tokens: per call; None: the example's."""
        from sparsify.lowering.kernel_texts import kernel_texts

        return kernel_texts(self, tokens)

    def svg(self, path: str | os.PathLike[str] | None = None, *, fold: bool = True) -> str:
        """Draw structures, permuted sites and trainable slices; returns the SVG text, and writes it to `path`.

        fold: equal layers as one row, with "× 30" and a strip for each of the others; False draws a row for every layer.
        """
        from sparsify.show.drawing import draw_program

        return draw_program(self, path, fold=fold)

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The inspector: one HTML page to search, unfold and click through, which loads nothing; returns it, and writes it to `path`.

        Structures by layer with what trains before and after, their sites, permutations and slices; operations before and after; kernels
        with what was measured; what was declined and why. Equal layers are one, "× 30".
        """
        from sparsify.show.inspector import inspector_page

        return inspector_page(self, path)


WHOLE_CHANNELS = ("Partial", "Rows", "PartialConv")
GROUPS = {"captured": Captured, "found": Found, "chosen": Chosen, "packing": Packing, "pruning": Pruning}
#: a field of a group → the field of `Program` that holds the group
GROUP_OF = {f.name: group for group, kind in GROUPS.items() for f in fields(kind)}


def spread(values: Sequence[int], count: int) -> tuple[int, ...]:
    """One number for every axis; a single one holds for all."""
    return tuple(values) if len(values) == count else (values[0],) * count


def is_grouped(node: fx.Node) -> bool:
    """Whether a node is the product of packed experts (`sparsify.ops.grouped_linear`)."""
    return getattr(node.target, "_schema", None) is not None and node.target._schema.name == "sparsify::grouped_linear"  # type: ignore[union-attr]


def through_transpose(node: A) -> tuple[A | fx.Node, bool]:
    """The node under `t`, `transpose(0, 1)` and `permute([1, 0])`, and whether their number is odd."""
    aten = torch.ops.aten
    under: A | fx.Node = node
    flipped = False
    while isinstance(under, fx.Node) and under.op == "call_function":
        is_t = under.target is aten.t.default or under.target is aten.numpy_T.default
        is_t |= under.target is aten.transpose.int and {int(a) % 2 for a in under.args[1:3]} == {0, 1}  # type: ignore[arg-type]
        is_t |= under.target is aten.permute.default and list(under.args[1]) in ([1, 0], [-1, -2])  # type: ignore[arg-type]
        if not is_t:
            break
        under, flipped = under.all_input_nodes[0], not flipped
    return under, flipped


def canonical_names(host: nn.Module) -> dict[str, str]:
    """Every qualified name of a parameter or buffer → the first name of the same tensor (tied weights share one)."""
    first: dict[int, str] = {}
    names = {}
    for source in (host.named_parameters, host.named_buffers):
        for name, tensor in source(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names
