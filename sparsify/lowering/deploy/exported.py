"""Programs of `torch.export` for deployment: sparsify's operators lowered, weights folded, ready for AOTInductor.

    ExportedProgram ──dense packed weights──▶ ──decompose──▶ ──fold──▶ ExportedProgram of ATen operators and parameters only

    exported = lower_exported(torch.export.export(host, …))           a pass on top of torch.export
    package(host, "model.pt2", example, dynamic_shapes=…)             export, lower, compile; `torch._inductor.aoti_load_package`

A trained part is folded into its weight (`fold=True`), or stays a constant of its own that `load_constants` can exchange.
A weight packed for a generated kernel keeps it (`kernels=True`: the package calls sparsify's operator, so whoever loads it imports
sparsify first), or is unpacked (`kernels=False`: the package needs nothing but torch, and runs from C++ too).
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree

from sparsify.errors import CaptureError, SparsifyError
from sparsify.kernels.cpu.formats import Bitmask
from sparsify.kernels.gpu.operator import rebuild
from sparsify.lowering.cpu.prepacked_linear import alive
from sparsify.lowering.deploy.decompositions import decompositions
from sparsify.model.module_tree import copy_module_tree
from sparsify.model.untouched import untouched
from sparsify.ops.schema import arguments, positional
from sparsify.program.capture import evaluating, example_inputs, explain, unwrap
from sparsify.program.names import placeholder, with_safe_targets

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.node import Argument

    from sparsify.program.values import Batch

#: as `torch.export.export` takes them
DynamicShapes: TypeAlias = "dict[str, Any] | tuple[Any, ...] | list[Any]"

aten = torch.ops.aten
LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def lower_exported(exported: ExportedProgram, *, fold: bool = True, kernels: bool = True) -> ExportedProgram:
    """Lower sparsify's operators in an exported program for inference; returns a new program with the same inputs and outputs.

    fold: compute what depends on parameters alone now: trained channels, sparse values and low-rank factors go into their
        weights. False keeps them as constants under their qualified names. Weights packed by Quantize stay packed either way.
    kernels: keep `packed_linear` and `gpu_linear` (weights lowered for a target) as calls of sparsify's kernels; False unpacks
        them to dense weights.

    Raises SparsifyError for a weight that lives outside the program (a host lowered with `target="cpu"`, exported in another process).
    """
    if not isinstance(exported, ExportedProgram):
        raise SparsifyError(f"lower_exported: expected a torch.export.ExportedProgram, got {type(exported).__name__}")
    exported, _ = with_safe_targets(exported)  # what runs it writes these names into source
    with torch.no_grad():
        editor = Editor(exported)
        for node in list(editor.graph.nodes):
            if node.target is torch.ops.sparsify.prepacked_linear.default:
                unpack_prepacked(editor, node)
            elif not kernels and node.target is torch.ops.sparsify.packed_linear.default:
                unpack_packed(editor, node)
            elif not kernels and node.target is torch.ops.sparsify.gpu_linear.default:
                unpack_gpu(editor, node)
        editor = Editor(editor.finish().run_decompositions(decompositions(fold=fold)))
        if fold:
            fold_constants(editor)
        return editor.finish()


class Editor:
    """An exported program under change: its graph, and what its lifted placeholders (parameters, buffers, constants) hold."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.source = exported
        self.module = copy.deepcopy(exported.graph_module)
        self.graph = self.module.graph
        for node, own in zip(self.graph.nodes, exported.graph_module.graph.nodes, strict=True):
            node.name = (
                own.name
            )  # a copy renames what Python has a word for (`input`, `filter`), the signature does not
        self.signature = exported.graph_signature
        self.state, self.constants = dict(exported.state_dict), dict(exported.constants)
        specs = exported.graph_signature.input_specs
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.specs: dict[fx.Node, InputSpec] = dict(zip(places, specs, strict=True))
        written = set(self.signature.buffers_to_mutate.values())
        self.lifted = [n for n, s in self.specs.items() if s.kind in LIFTED and s.target not in written]

    def value(self, node: fx.Node) -> Tensor:
        """The tensor behind a lifted placeholder."""
        target = str(self.specs[node].target)
        found = self.state[target] if target in self.state else self.constants[target]
        assert isinstance(found, Tensor)  # lifted placeholders are those of parameters, buffers and constant tensors
        return found

    def add_constant(self, hint: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        """A new lifted placeholder that holds `tensor`. like: a node whose value says which fake mode the graph is in."""
        name = next(n for n in numbered(f"{hint}_lowered") if n not in self.constants and n not in self.state)
        first = next(iter(self.specs))
        with self.graph.inserting_before(first):
            node = placeholder(self.graph, f"c_{name}")
        node.meta["val"] = fake_mode_of(like).from_tensor(tensor, static_shapes=True)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name, None)
        self.specs = {node: spec, **self.specs}
        self.constants[name] = tensor
        self.lifted.append(node)
        return node

    def call(self, target: OpOverload, /, **given: Argument) -> fx.Node:
        """A call at the graph's insertion point, with arguments by the names of the operator's schema, and its fake value."""
        args, kwargs = positional(target, given)
        node = self.graph.call_function(target, args, kwargs)
        values, named = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, kwargs))
        with enable_python_dispatcher():  # composite operators may meet symbolic sizes
            node.meta["val"] = target(*values, **named)
        return node

    def drop_unused(self) -> None:
        """Remove dead calls, and lifted placeholders that nothing reads, with what they hold."""
        self.graph.eliminate_dead_code()
        for node in [n for n in self.specs if self.specs[n].kind in LIFTED and not n.users]:
            if node in self.lifted:
                target = str(self.specs.pop(node).target)
                self.graph.erase_node(node)
                if target not in {str(s.target) for s in self.specs.values()}:
                    self.state.pop(target, None)
                    self.constants.pop(target, None)

    def finish(self) -> ExportedProgram:
        """The changed program."""
        self.drop_unused()
        self.graph.lint()
        self.module.recompile()
        signature = ExportGraphSignature(list(self.specs.values()), list(self.signature.output_specs))
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state,
            range_constraints=dict(self.source.range_constraints),
            module_call_graph=self.source.module_call_graph,
            example_inputs=self.source.example_inputs,
            constants=self.constants,
            verifiers=self.source.verifiers,
        )


def numbered(name: str) -> Iterator[str]:
    """name, name_1, name_2, …"""
    yield name
    number = 0
    while True:
        number += 1
        yield f"{name}_{number}"


def fake_mode_of(node: fx.Node) -> FakeTensorMode:
    return node.meta["val"].fake_mode


# --- folding -----------------------------------------------------------------------------------------------------------------


def constant_nodes(editor: Editor) -> set[fx.Node]:
    """Lifted placeholders, and the calls that depend on nothing else."""
    found = set(editor.lifted)
    for node in editor.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        sources = node.all_input_nodes
        if node.op == "call_function" and not random and sources and all(s in found for s in sources):
            found.add(node)
    return found


def fold_constants(editor: Editor) -> int:
    """Replace calls on parameters alone by their results, where these take no more bytes than what they are computed from.

    So trained parts go into their weights, while packed weights stay packed. Returns how many results were put in.
    """
    constant = constant_nodes(editor)
    count = 0
    for node in [n for n in editor.graph.nodes if n in constant and n.op == "call_function"]:
        if all(user in constant for user in node.users) or not isinstance(node.meta.get("val"), Tensor):
            continue
        sources = sources_of(node)
        result = evaluate(editor, node)
        values = [editor.value(n) for n in sources]
        known = {t.untyped_storage().data_ptr() for t in values}
        if result.untyped_storage().data_ptr() in known or bytes_of(result) > sum(map(bytes_of, values)):
            continue
        largest = max(sources, key=lambda n: bytes_of(editor.value(n)))
        place = editor.add_constant(str(editor.specs[largest].target), result.contiguous(), node)
        node.replace_all_uses_with(place)
        count += 1
    return count


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The placeholders that a node is computed from."""
    pending, seen, found = [node], {node}, []
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            found.append(current)
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh
    return found


def evaluate(editor: Editor, node: fx.Node) -> Tensor:
    """The value of a constant node; intermediate results are dropped."""
    known: dict[fx.Node, Any] = {}  # what operators return: tensors, numbers, tuples of them

    def value(n: fx.Node) -> Any:
        if n not in known:
            if n.op == "placeholder":
                return editor.value(n).detach()
            args, kwargs = fx.map_arg((n.args, n.kwargs), value)
            known[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return known[n]

    return value(node)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- packed weights ------------------------------------------------------------------------------------------------------------


def replace_by_dense(editor: Editor, node: fx.Node, hint: str, weight: Tensor, interleaved: bool = True) -> None:
    """`node` as a dense product with its epilogue, in ATen. interleaved: gated rows alternate gate and up, else they are halves."""
    given = arguments(node)
    x, bias, activation = given["x"], given.get("bias"), given.get("activation", "none")
    dtype = x.meta["val"].dtype
    place = editor.add_constant(hint, weight.to(dtype).contiguous(), x)
    with editor.graph.inserting_before(node):
        if bias is not None and bias.meta["val"].dtype != dtype:
            bias = editor.call(aten.to.dtype, self=bias, dtype=dtype)
        y = editor.call(aten.linear.default, input=x, weight=place, bias=bias)
        second = None
        if given.get("gated"):
            width, half = weight.shape[0], weight.shape[0] // 2
            parts = ((0, width, 2), (1, width, 2)) if interleaved else ((0, half, 1), (half, width, 1))
            y, second = (
                editor.call(aten.slice.Tensor, self=y, dim=-1, start=start, end=end, step=step)
                for start, end, step in parts
            )
        y = activate(editor, activation, y)
        if second is not None:
            y = editor.call(aten.mul.Tensor, self=y, other=second)
        if given.get("residual") is not None:
            y = editor.call(aten.add.Tensor, self=y, other=given["residual"])
    node.replace_all_uses_with(y)
    editor.graph.erase_node(node)


def activate(editor: Editor, activation: str, y: fx.Node) -> fx.Node:
    if activation in ("gelu", "gelu_tanh"):
        return editor.call(aten.gelu.default, self=y, approximate="tanh" if activation == "gelu_tanh" else "none")
    calls = {"relu": aten.relu.default, "silu": aten.silu.default}
    return editor.call(calls[activation], self=y) if activation in calls else y


def unpack_prepacked(editor: Editor, node: fx.Node) -> None:
    """A weight in oneDNN's layout is no tensor of the graph: it becomes one again (Inductor packs it anew when it freezes)."""
    handle = arguments(node)["handle"]
    module = alive.get(handle)
    if module is None:
        raise SparsifyError(
            "lower_exported: this program refers to a weight of a host lowered with target='cpu' that is not in this process; "
            "lower the program where it was exported"
        )
    replace_by_dense(editor, node, f"prepacked_{handle}", module.dense())


def tensors_of(editor: Editor, value: Any) -> Any:
    """Lifted placeholders replaced by what they hold."""
    return pytree.tree_map(lambda n: editor.value(n).detach() if isinstance(n, fx.Node) else n, value)


def unpack_packed(editor: Editor, node: fx.Node) -> None:
    given = arguments(node)
    names = ("masks", "values", "panel_ptr", "scales")
    held = {name: tensors_of(editor, given[name]) for name in names}
    packed = Bitmask(given["rows"], given["cols"], **held, group=given["group"], dtype=node.meta["val"].dtype)
    replace_by_dense(editor, node, str(editor.specs[given["values"]].target), packed.unpack())


def unpack_gpu(editor: Editor, node: fx.Node) -> None:
    given = arguments(node)
    tensors = tensors_of(editor, given["packed"])
    dtype = node.meta["val"].dtype
    packed = rebuild(given["format"], given["rows"], given["cols"], given["gated"], tensors, dtype)
    replace_by_dense(editor, node, str(editor.specs[given["packed"][0]].target), packed.unpack(), interleaved=False)


# --- from a model to a package ---------------------------------------------------------------------------------------------------


def export_for_inference(
    model: nn.Module, example: Batch | None = None, dynamic_shapes: DynamicShapes | None = None
) -> ExportedProgram:
    """`torch.export` of a host in eval mode, taking tensors only and returning a tensor, a tuple, or a dict.

    example: as for `sparsify.compile`; caches are switched off. Arguments that are no tensors are fixed, and an output class of
    transformers becomes a dict, so that what is loaded later needs neither the switches nor the class.
    dynamic_shapes: as for `torch.export.export`, for the arguments that are tensors.
    """
    model = unwrap(model)
    args, kwargs = example_inputs(model, example)
    given = {name: value for name, value in kwargs.items() if holds_tensors(value)}
    fixed = {name: value for name, value in kwargs.items() if name not in given}
    with untouched(model):
        bare = as_callable(copy_module_tree(model, tensors="shared"), args, given, fixed)
        with evaluating(bare), torch.no_grad():
            try:
                return torch.export.export(bare, args, given, dynamic_shapes=dynamic_shapes, strict=False)
            except Exception as error:
                raise CaptureError(explain(model, error)) from None


def holds_tensors(value: object) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def as_callable(
    model: nn.Module, args: Sequence[object], given: Mapping[str, object], fixed: Mapping[str, object]
) -> nn.Module:
    """A view of `model` (same submodules, parameters and names) whose forward takes only `args` and `given`."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters
    positional = [p.replace(default=p.empty) for p in list(parameters.values())[: len(args)]]
    kind = inspect.Parameter.KEYWORD_ONLY
    named = [inspect.Parameter(name, kind) for name in given]

    def call(*call_args: object, **call_kwargs: object) -> object:
        return plain_output(forward(*call_args, **call_kwargs, **fixed))

    call.__signature__ = inspect.Signature([*positional, *named])  # type: ignore[attr-defined]
    view = copy.copy(model)
    view.__dict__["forward"] = call
    return view


def plain_output(value: object) -> object:
    """Mappings (the output classes of transformers) as dicts, without entries that are None."""
    if isinstance(value, Mapping):
        return {str(k): plain_output(v) for k, v in value.items() if v is not None}
    return value


def package(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example: Batch | None = None,
    *,
    dynamic_shapes: DynamicShapes | None = None,
    fold: bool = True,
    kernels: bool = True,
    options: Mapping[str, object] | None = None,
) -> Path:
    """Compile a model with AOTInductor into one file; `torch._inductor.aoti_load_package(path)` gives it back as a callable.

    model: what `sparsify.compile` returned (adapter unmerged or merged, pruned, quantised, lowered), any other module, or a
        program of `torch.export`. path: ends in `.pt2`.
    example, dynamic_shapes: see `export_for_inference`; not for a program. fold, kernels: see `lower_exported`.
    options: of Inductor, e.g. `{"max_autotune": True}`.

    The result takes the tensors of `example` and returns a tensor, a tuple or a dict. With `fold=False` the constants keep the
    parameters' names, and `loaded.load_constants({name: tensor, …}, check_full_update=False)` exchanges an adapter.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise SparsifyError(f"package: the file must end in .pt2, got {str(path)!r}")
    if isinstance(model, ExportedProgram):
        if example is not None or dynamic_shapes is not None:
            raise SparsifyError("package: an exported program has its example and dynamic shapes already")
        exported = model
    else:
        exported = export_for_inference(model, example, dynamic_shapes)
    lowered = lower_exported(exported, fold=fold, kernels=kernels)
    settings = dict(options or {})
    unpacks = any(node.target is torch.ops.sparsify.quantized_linear.default for node in exported.graph.nodes)
    if not fold and not unpacks:  # Inductor would fold packed weights to dense ones
        settings.setdefault("aot_inductor.use_runtime_constant_folding", True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        written = torch._inductor.aoti_compile_and_package(
            lowered, package_path=str(path), inductor_configs=settings or None
        )
    return Path(written)


__all__ = ["export_for_inference", "lower_exported", "package"]
