"""From the graph of a lowered decoder to the operations of its step; or why not.

    logits ◀─ linear ◀─ norm ◀─ add ◀─ linear ◀─ … ◀─ attention ◀─ linear ◀─ norm ◀─ embedding ◀─ tokens

Every node is asked for its value, from the logits back to the tokens; what it takes to compute one token of it becomes an operation.
Nothing is known of classes or names: a norm is what computes a root of mean squares, heads are what an attention's views make of a
product. A node that is none of these is the reason why the step stays PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.kernels.cpu.step.operations import (
    Attend,
    Buffer,
    Decoder,
    Embed,
    Layer,
    Norm,
    Operation,
    Pointwise,
    Product,
)
from sparsify.lowering.cpu.native.layout import (
    COS,
    JOINS,
    SAME,
    SIN,
    VIEWS,
    Layout,
    Term,
    Unknown,
    base,
    heads,
    join,
    move,
    rows_of,
    run,
    scaled,
    summed,
    turned,
)  # fmt: skip
from sparsify.lowering.cpu.native.norms import NormMatch, match_norm
from sparsify.lowering.cpu.native.pointwise import POINTWISE, expression, number
from sparsify.lowering.cpu.native.products import LinearMatch, match_linear
from sparsify.lowering.cpu.native.tables import Tables
from sparsify.lowering.cpu.native.walk import behind, leads_to_rotation, readers, reads_angles, same, through
from sparsify.ops.schema import arguments
from sparsify.program import Program

aten = torch.ops.aten


def recognise(program: Program) -> Decoder:
    """The step of a lowered decoder. Raises Unknown saying which part is not known."""
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    results = (
        [node for node in outputs if isinstance(node, fx.Node)] if isinstance(outputs, list | tuple) else [outputs]
    )
    if len(results) != 1 or not isinstance(results[0], fx.Node):
        raise Unknown(f"{len(results)} outputs instead of logits")
    return Recogniser(program).decoder(results[0])


class Recogniser:
    """One graph under way. values: node → its layout. operations: in an order in which they can run."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tables = Tables(program)
        ids = [n for n in program.graph.nodes if n.op == "placeholder" and n in self.tables.live]
        if len(ids) != 1 or ids[0].meta["val"].dim() != 2:
            raise Unknown("the input is not one (batch, tokens) of token numbers")
        self.ids = ids[0]
        self.batch, self.length = (int(size) for size in ids[0].meta["val"].shape)
        if self.length < 2:
            raise Unknown("the example has one token a sequence: give one of several")
        self.values: dict[fx.Node, Any] = {}
        self.operations: list[Operation] = []
        self.tensors: dict[str, int] = {}
        self.linears: dict[str, int] = {}
        self.layers: list[Layer] = []
        self.buffers = 0

    def decoder(self, logits: fx.Node) -> Decoder:
        node, text = self.head(same(logits))
        found = match_linear(node, self.program)
        assert found is not None  # `head` made sure
        for one in self.program.graph.nodes:  # in order, so that no walk goes deep
            if one in self.tables.live and one.op == "call_function" and one is not node and one in self.needed(node):
                self.value(one)
        out = self.product(node, found, None, logits=True).held
        self.operations += [Pointwise(out, text, ((out, 0),), logits=True)] if text != "{0}" else []
        return Decoder(
            tuple(self.operations), tuple(self.tensors), tuple(self.linears), tuple(self.layers), found.outputs,
            {"batch": self.batch, "length": self.length}, self.tables.numbers,
        )  # fmt: skip

    def head(self, logits: fx.Node) -> tuple[fx.Node, str]:
        """The linear behind the logits, and what is done to each of its outputs (scaled, capped) on the way."""

        def operand(one: fx.Node) -> str:
            source = same(one)
            if match_linear(source, self.program) is not None:
                linears.append(source)
                return "{0}"
            if source not in self.tables.live:
                return number(self.constant(source))
            return expression(source, operand)

        linears: list[fx.Node] = []
        try:
            text = operand(logits)
        except Unknown as why:
            raise Unknown(f"logits that come from {why}") from why
        if len(set(linears)) != 1:
            raise Unknown(f"logits that come from {len(set(linears))} linears")
        return linears[0], text

    def constant(self, node: fx.Node) -> float:
        """A number that is a tensor in the graph."""
        found = self.tables.value(node)
        if found.numel() != 1:
            raise Unknown("a tensor that is neither a number nor a weight")
        return float(found)

    def needed(self, node: fx.Node) -> set[fx.Node]:
        """Where a walk may start without computing what will be fused: embeddings, attentions, and what linears read."""
        if not hasattr(self, "_needed"):
            self._needed = {
                source
                for linear in self.program.graph.nodes
                if (found := match_linear(linear, self.program)) is not None
                for source in [found.x]
            } | {n for n in self.program.graph.nodes if n.target is aten.scaled_dot_product_attention.default}
        return self._needed

    # --- values ---------------------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        """The layout of a node; its operations are appended when it is first asked for."""
        if node not in self.values:
            self.values[node] = self.compute(node)
        return self.values[node]

    def compute(self, node: fx.Node) -> Any:
        if node not in self.tables.live:
            return self.table(node)
        if node.op != "call_function":
            raise Unknown(f"the tokens themselves read by {', '.join(str(u.target) for u in node.users)}")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            raise Unknown(f"{node.target} in {value.dtype}: the native step computes in float32")
        if node.target is aten.embedding.default:
            return self.embed(node)
        if node.target is aten.scaled_dot_product_attention.default:
            return self.attend(node)
        if (found := match_linear(node, self.program)) is not None:
            return self.product(node, found, None)
        if (norm := match_norm(node, self.program)) is not None:
            return self.norm(node, norm)
        moved = self.moved(node)
        if moved is None:
            moved = self.turned(node)
        if moved is not None:
            return moved
        if node.target in POINTWISE:
            return self.pointwise(node)
        raise Unknown(f"{node.target} of shape {tuple(value.shape) if isinstance(value, torch.Tensor) else value}")

    def table(self, node: fx.Node) -> Layout:
        """A node of cosines or sines of the positions, whatever was done to it since."""
        if node.target in (aten.cos.default, aten.sin.default):
            angles, frequencies = self.tables.frequencies(node.args[0], self.length)  # type: ignore[arg-type]
            shape = angles.shape
            place = torch.arange(self.length)[:, None].expand(shape).contiguous()
            which = torch.arange(shape[-1]).expand(shape).contiguous()
            kind = torch.full(shape, COS if node.target is aten.cos.default else SIN)
            return Layout(None, (Term(place, kind, which, torch.ones(shape, dtype=torch.float64)),), frequencies)
        moved = self.moved(node)
        if moved is not None:
            return moved
        if node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], int | float):
            by = float(node.args[1])
            return scaled(self.value(node.args[0]), by if node.target is aten.mul.Tensor else 1 / by)  # type: ignore[arg-type]
        if node.target is aten.neg.default:
            return scaled(self.value(node.args[0]), -1.0)  # type: ignore[arg-type]
        raise Unknown(f"a table that is made with {node.target}")

    def moved(self, node: fx.Node) -> Any:
        """The layout of a node that computes nothing: its input as it is, as a view, or beside others; None for one that does."""
        if node.target in SAME:
            return self.value(node.all_input_nodes[0])
        if node.target in VIEWS:
            source = node.all_input_nodes[0]
            self.value(source)
            return move(node, self.values, source)
        if node.target in JOINS:
            return join(node, [self.value(part) for part in node.args[0]])  # type: ignore[union-attr]
        return None

    def turned(self, node: fx.Node) -> Layout | None:
        """A part of a rotation: −x, x · table, or the sum of two such; None for what is none."""
        if node.target is aten.neg.default:
            return scaled(self.value(node.args[0]), -1.0) if leads_to_rotation(node, self.tables) else None  # type: ignore[arg-type]
        if node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in node.args):
            a, b = node.args
            static = [x for x in (a, b) if x not in self.tables.live]
            if len(static) == 1 and reads_angles(static[0]):  # type: ignore[arg-type]
                value = self.value(b if static[0] is a else a)  # type: ignore[arg-type]
                return turned(value, self.value(static[0]), self.length)  # type: ignore[arg-type]
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and all(map(self.is_turned, node.args)):
            a, b = (self.value(argument) for argument in node.args)  # type: ignore[arg-type]
            return summed(a, b if node.target is aten.add.Tensor else scaled(b, -1.0))
        return None

    def is_turned(self, node: object) -> bool:
        """Whether this is a value times a table of angles."""
        if not isinstance(node, fx.Node) or node not in self.tables.live:
            return False
        node = same(node)
        return node.target is aten.mul.Tensor and any(
            x not in self.tables.live and reads_angles(x) for x in node.all_input_nodes
        )

    # --- operations -----------------------------------------------------------------------------------------------------------

    def buffer(self, width: int, shared: bool) -> Buffer:
        self.buffers += 1
        return Buffer(self.buffers - 1, width, shared)

    def tensor(self, name: str) -> int:
        return self.tensors.setdefault(name, len(self.tensors))

    def named(self, node: object) -> str:
        """Qualified name of a parameter's node."""
        node = same(node) if isinstance(node, fx.Node) else node
        name = self.tables.names.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None
        if name is None:
            raise Unknown("a weight that is computed from others")
        return name

    def embed(self, node: fx.Node) -> Layout:
        given = arguments(node)
        return self.lookup(node, given["weight"], given["indices"])

    def lookup(self, node: fx.Node, weight: object, indices: fx.Node) -> Layout:
        name = self.named(weight)
        entries, width = (int(size) for size in self.program.value(name).shape)
        by_position = indices not in self.tables.live
        offset = 0
        if by_position:
            offset = self.tables.position_offset(indices, self.length)
        elif through(indices) is not self.ids:
            raise Unknown("tokens are changed before their embedding")
        out = self.buffer(width, shared=False)
        self.operations.append(Embed(out, self.tensor(name), entries, by_position, offset))
        return rows_of(out, (self.batch, self.length, width))

    def product(self, node: fx.Node, found: LinearMatch, residual: Buffer | None, logits: bool = False) -> Layout:
        x = self.value(found.x)
        start = run(x, f"what {found.name} reads")
        out = self.buffer(found.outputs, shared=True)
        number = self.linears.setdefault(found.name, len(self.linears))
        self.operations.append(Product(out, x.held, start, number, found.inputs, residual, logits))
        return rows_of(out, tuple(node.meta["val"].shape))

    def norm(self, node: fx.Node, found: NormMatch) -> Layout:
        x = self.value(found.x)
        index = x.terms[0].index
        width = index.shape[-1]
        inside = index % x.buffer.width
        starts = sorted(set(inside[..., 0].flatten().tolist()))
        stride = starts[1] - starts[0] if len(starts) > 1 else 0
        even = starts == [starts[0] + i * stride for i in range(len(starts))]
        if not x.plain or not even or bool((index != index[..., :1] + torch.arange(width)).any()):
            raise Unknown("a norm over what does not lie together")
        out = self.buffer(x.buffer.width, shared=False)
        weight, bias = (None if n is None else self.tensor(self.named(n)) for n in (found.weight, found.bias))
        self.operations.append(
            Norm(
                out,
                x.buffer,
                width,
                len(starts),
                starts[0],
                stride,
                found.eps,
                weight,
                bias,
                found.centred,
                found.plus_one,
            )
        )
        return base(out, index)

    def attend(self, node: fx.Node) -> Layout:
        given = arguments(node)
        if given.get("dropout_p"):
            raise Unknown("attention with dropout")
        q, k, v = (self.value(given[name]) for name in ("query", "key", "value"))
        width = q.terms[0].index.shape[-1]
        if v.terms[0].index.shape[-1] != width:
            raise Unknown("values of another width than keys")
        found = [heads(x, self.batch, self.length) for x in (q, k, v)]
        (queries, q_heads), (keys, k_heads), (_, v_heads) = found
        count, groups = len(queries), len(k_heads.starts)
        if len(set(queries)) != count or len(v_heads.starts) != groups or v_heads.rotation is not None:
            raise Unknown("query heads that share entries, or values that are turned")
        repeated = [k_heads.starts[h * groups // count] for h in range(count)]
        if count % groups or (keys != repeated and list(k_heads.starts) != keys):
            raise Unknown("key heads that do not belong to neighbouring query heads")
        if any(list(dict.fromkeys(x)) != sorted(x_heads.starts) for x, x_heads in ((keys, k_heads),)):
            raise Unknown("heads out of order")
        window = self.tables.window(given.get("attn_mask"), bool(given.get("is_causal")), self.length)
        scale = float(given["scale"]) if given.get("scale") is not None else width**-0.5
        out = self.buffer(count * width, shared=True)
        self.layers.append(Layer(groups, width, window))
        self.operations.append(Attend(out, q_heads, k_heads, v_heads, width, scale, len(self.layers) - 1, window))
        rows = torch.arange(self.batch * self.length * count * width)
        return base(out, rows.view(self.batch, self.length, count, width).transpose(1, 2))

    def pointwise(self, node: fx.Node) -> Layout:
        """An element-wise expression; a sum with a product becomes the product's residual."""
        if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            for which in (1, 0):
                product, other = (node.args[which], node.args[1 - which])
                if not (isinstance(product, fx.Node) and isinstance(other, fx.Node) and other in self.tables.live):
                    continue
                linear, alone = behind(product)
                found = match_linear(linear, self.program)
                if found is None or linear in self.values or not alone:
                    continue
                residual = self.value(other)
                if residual.buffer.width == found.outputs and run(residual, "a residual") == 0:
                    layout = self.product(linear, found, residual.buffer)
                    return rows_of(layout.held, tuple(node.meta["val"].shape))
        inputs: list[Any] = []

        def operand(one: fx.Node) -> str:
            source = same(one)
            if self.inside(source):
                return expression(source, operand)
            entry: Any
            if source in self.tables.live or source.target is aten.embedding.default:
                layout = self.value(one) if source in self.tables.live else self.embed(source)
                entry = (layout.buffer, run(layout, f"an operand of {node.target}"))
            elif source.meta["val"].numel() == 1:
                return number(self.constant(source))
            else:
                entry = self.tensor(self.named(source))
                if tuple(self.program.value(self.named(source)).shape) != (node.meta["val"].shape[-1],):
                    raise Unknown(f"{node.target} with a tensor that is no vector of channels")
            if entry not in inputs:
                inputs.append(entry)
            return f"{{{inputs.index(entry)}}}"

        width = int(node.meta["val"].shape[-1])
        if node.meta["val"].numel() != self.batch * self.length * width:
            raise Unknown(f"{node.target} over something that is no vector a token")
        text = expression(node, operand)
        cheap = all(word not in text for word in ("(x", "silu", "gelu", "exp_approx", "sigmoid", "tanh"))
        out = self.buffer(width, shared=not cheap)
        self.operations.append(Pointwise(out, text, tuple(inputs)))
        return rows_of(out, tuple(node.meta["val"].shape))

    def inside(self, node: fx.Node) -> bool:
        """Whether an element-wise node is computed inside of its only reader's expression."""
        alone = node in self.tables.live and node.target in POINTWISE and node not in self.values and readers(node) == 1
        return alone and self.turned(node) is None and match_norm(node, self.program) is None and not self.fuses(node)

    def fuses(self, node: fx.Node) -> bool:
        """Whether a sum would become the residual of a product."""
        if node.target is not aten.add.Tensor:
            return False
        return any(isinstance(a, fx.Node) and match_linear(behind(a)[0], self.program) is not None for a in node.args)


__all__ = ["recognise"]
