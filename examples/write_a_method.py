"""A method from outside the package: DoRA (arXiv 2402.09353), from one file, through everything that a method of sparsify does.

    y = m / ‖W + s B A‖ ⊙ (x (W + s B A)ᵀ) + b          rows of the weight, with directions by LoRA and lengths `m` of their own

The norm is a constant to the gradient, as in the paper (section 4.3) and in PEFT. What follows is all that there is to write:

    the operator     schema, kernel, shapes, gradient, autocast, the same in ATen; an oracle in fp64 that tests compare it with
    the module       which leaves train, the forward, the weight that it computes with
    the part         its first values, its node in the graph, its words
    beside it        snapshot, reset, deltas in original coordinates and back
    on disk          the tensors of a delta with their shapes; what they mean; how PEFT stores them
    the rule         what stands in a plan

    python examples/write_a_method.py          trains, saves, loads, merges and exports a small model with it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import sparsify
from sparsify.errors import PlanError, VerifyError
from sparsify.methods import (
    AdaptedMixin,
    Delta,
    DeltaKind,
    GraphEditor,
    Layout,
    LinearNode,
    LinearRule,
    LivePart,
    OperatorLibrary,
    OutsidePart,
    PeftLayer,
    Program,
    Snapshot,
    argument,
    as_parameter,
    become,
    beside,
    kaiming_a,
    master_dtype,
    register,
    require,
    require_floats,
    require_shape,
    require_together,
    take_leaves,
)

# --- the operator ------------------------------------------------------------------------------------------------------------

LIBRARY = OperatorLibrary("dora")
LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor magnitude, float scale, bool transposed) -> Tensor"
)


def oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, scale: float
) -> Tensor:
    """What the operator means, in any precision: `weight (n, m)`, `a (r, m)`, `b (n, r)`, `magnitude (n,)`."""
    direction = weight + scale * (b @ a)
    y = x @ ((magnitude / direction.detach().norm(dim=1))[:, None] * direction).t()
    return y if bias is None else y + bias


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`‖W + s B A‖` of every row of a logical weight, in fp32 or fp64, without a second dense weight.

    With `B = 0` exactly the norm of W: the two further terms are zeros.
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    weight, a, b = weight.to(wide), a.to(wide), b.to(wide)
    mixed = (2 * scale * (weight @ a.t()) + scale * scale * (b @ (a @ a.t()))) * b
    return (weight.square().sum(1) + mixed.sum(1)).clamp_min(0).sqrt()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor, transposed: bool) -> None:
    name = "dora::linear"
    require(weight.dim() == 2, lambda: f"{name}: the weight {tuple(weight.shape)} is no matrix")
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    require(x.dim() >= 1, lambda: f"{name}: the input has no dimension")
    require(x.shape[-1] == columns, lambda: f"{name}: x has {x.shape[-1]} channels, the weight {columns}")
    require(a.dim() == 2, lambda: f"{name}: a {tuple(a.shape)} is no matrix")
    require_shape(name, "a", a, a.shape[0], columns)
    require_shape(name, "b", b, rows, a.shape[0])
    require_shape(name, "magnitude", m, rows)
    if bias is not None:
        require_shape(name, "bias", bias, rows)


def _product(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`x (W + s B A)ᵀ` in the dtype of x."""
    low = torch.nn.functional.linear(x, a.to(x.dtype))
    return torch.nn.functional.linear(x, weight.to(x.dtype)) + scale * torch.nn.functional.linear(low, b.to(x.dtype))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    transposed: bool,
) -> Tensor:
    _check(x, weight, bias, a, b, magnitude, transposed)
    require_floats("dora::linear", x=x, weight=weight, bias=bias, a=a, b=b, magnitude=magnitude)
    require_together("dora::linear", x, weight, bias, a, b, magnitude)
    logical = weight.t() if transposed else weight
    ratio = magnitude / row_norms(logical, a, b, scale)
    y = _product(x, logical, a, b, scale) * ratio.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    transposed: bool,
) -> Tensor:
    _check(x, weight, bias, a, b, magnitude, transposed)
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


def _in_aten(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    transposed: bool,
) -> Tensor:
    logical = weight.t() if transposed else weight
    return oracle(x, logical.to(x.dtype), bias, a.to(x.dtype), b.to(x.dtype), magnitude.to(x.dtype), scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, a, b, magnitude, scale, transposed = inputs
    ctx.save_for_backward(x, weight, a, b, magnitude)
    ctx.scale, ctx.transposed, ctx.bias = scale, transposed, None if bias is None else bias.dtype


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """`G = g ⊙ ratio`: `dX = G V`, `dB = s Gᵀ (x Aᵀ)`, `dA = s (G B)ᵀ x`, `dm = Σ g ⊙ (x Vᵀ) / ‖V‖`; ATen alone, so it has
    derivatives too."""
    x, weight, a, b, magnitude = ctx.saved_tensors
    need, scale, dtype = ctx.needs_input_grad, ctx.scale, g.dtype
    logical = weight.t() if ctx.transposed else weight
    with torch.no_grad():
        norms = row_norms(logical, a, b, scale)
    scaled = g * (magnitude / norms).to(dtype)
    rows, inputs = scaled.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    low_a, low_b = a.to(dtype), b.to(dtype)
    down = rows @ low_b
    dx = dw = db = da = d_b = dm = None
    if need[0]:
        dx = (rows @ logical.to(dtype) + scale * (down @ low_a)).view(x.shape)
    if need[1]:
        full = rows.t() @ inputs
        dw = (full.t() if ctx.transposed else full).to(weight.dtype)
    if need[2]:
        db = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias)
    if need[3]:
        da = (scale * (down.t() @ inputs)).to(a.dtype)
    if need[4]:
        d_b = (scale * (rows.t() @ (inputs @ low_a.t()))).to(b.dtype)
    if need[5]:
        product = _product(x, logical, a, b, scale).reshape(-1, g.shape[-1])
        dm = (g.reshape(-1, g.shape[-1]) * product).sum(0).to(norms.dtype).div(norms).to(magnitude.dtype)
    return dx, dw, db, da, d_b, dm, None, None


LIBRARY.implement(
    "linear",
    kernel=_forward,
    fake=_fake,
    aten=_in_aten,
    backward=_backward,
    setup=_setup,
)
LIBRARY.autocast("linear")
OPERATOR = torch.ops.dora.linear.default


# --- the module --------------------------------------------------------------------------------------------------------------


class DoraMixin(AdaptedMixin):
    """A linear whose rows have directions by `lora_A (r, in)`, `lora_B (out, r)` and lengths `dora_magnitude (out,)`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    dora_magnitude: nn.Parameter
    scale: float
    trained_leaves = ("lora_A", "lora_B", "dora_magnitude")
    part_settings = ("scale",)
    rates = {"lora_A": "lora", "lora_B": "lora"}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        self.check_dtype(x)
        factors = (self.lora_A, self.lora_B, self.dora_magnitude)
        return torch.ops.dora.linear(x, self.weight, self.bias, *factors, self.scale, self.conv1d)

    def folded(self, weight: Tensor) -> Tensor:
        parts = (t.detach() for t in (self.lora_A, self.lora_B, self.dora_magnitude))
        return self.logical(with_dora(self.logical(weight), *parts, self.scale)).to(weight.dtype)

    def part_digest(self) -> bytes:
        return f"{self.scale!r}".encode() if self._parameters.get("lora_A") is not None else b""

    def extra_repr(self) -> str:
        return f"{self.described()}, rank={self.lora_A.shape[0]}, scale={self.scale:g}, magnitudes"


def with_dora(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """The logical weight that DoRA computes with, in fp32 or fp64."""
    ratio = magnitude / row_norms(weight, a, b, scale)
    return ratio[:, None] * (weight.to(ratio.dtype) + scale * (b.to(ratio.dtype) @ a.to(ratio.dtype)))


# --- in the program ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dora(OutsidePart):
    """One weight under DoRA."""

    param: str
    rule: int
    rank: int
    scale: float
    transposed: bool

    module_kind = "Dora"
    mixin = DoraMixin
    operators = {OPERATOR: "reference: one GEMM, two small ones, norms of the rows"}  # noqa: RUF012

    @classmethod
    def why_not(cls, rule: Any, program: Program, linear: LinearNode) -> str | None:
        largest = max(program.tensor(linear.weight).shape)
        if rule.rank > largest:
            return f"rank {rule.rank} is more than the larger side of its weight, {largest}"
        return super().why_not(rule, program, linear)

    @classmethod
    def from_rule(cls, rule: Any, index: int, program: Program, linear: LinearNode) -> Dora:
        return cls(linear.weight, index, rule.rank, rule.scale, linear.transposed)

    def initial(self, weight: Callable[[], Tensor], program: Program, seed: int) -> dict[str, Tensor]:
        stored = weight().detach()
        logical = stored.t() if self.transposed else stored
        a = kaiming_a(self.param, self.rank, logical.shape[1], seed).to(stored.device, master_dtype(stored))
        b = a.new_zeros(logical.shape[0], self.rank)
        values = {"lora_A": a, "lora_B": b, "dora_magnitude": row_norms(logical, a, b, self.scale)}
        return {beside(self.param, leaf): value for leaf, value in values.items()}

    def insert(self, editor: GraphEditor, linear: LinearNode) -> None:
        read = editor.read(linear)
        names = {"a": "lora_A", "b": "lora_B", "magnitude": "dora_magnitude"}
        factors = {name: editor.beside(self.param, leaf) for name, leaf in names.items()}
        given = {"x": read.x, "weight": read.weight, "bias": read.bias, "scale": self.scale}
        editor.replace(linear.node, OPERATOR, **given, **factors, transposed=self.transposed)

    def check_node(self, node: fx.Node) -> None:
        if (argument(node, "scale"), argument(node, "transposed")) != (self.scale, self.transposed):
            raise VerifyError(f"node {node.name} computes {self.param} with another scale or orientation")

    def text(self) -> str:
        return f"DoRA (rank {self.rank}, scale {self.scale:g})"

    def attach(self, module: Any, tensors: Mapping[str, Tensor]) -> None:
        module.scale = self.scale
        for leaf in DoraMixin.trained_leaves:
            setattr(module, leaf, as_parameter(tensors[leaf]))

    def live(self, module: Any, layout: Layout, seed: int) -> DoraBeside:
        return DoraBeside(self, module, layout, seed, module.dora_magnitude.detach().clone())


# --- beside the module -------------------------------------------------------------------------------------------------------


@dataclass
class DoraBeside(LivePart):
    """The values of one DoRA linear. `lengths (out,)`: of the base's rows, from which the magnitudes start."""

    part: Dora
    module: Any
    layout: Layout
    seed: int
    lengths: Tensor
    detached: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, nn.Parameter]:
        held = self.detached or self.module._parameters
        return {leaf: held[leaf] for leaf in DoraMixin.trained_leaves}

    def reset(self) -> None:
        own = self.tensors()
        a = own["lora_A"].detach()
        a.copy_(kaiming_a(self.param, self.part.rank, a.shape[1], self.seed))
        own["lora_B"].detach().zero_()
        own["dora_magnitude"].detach().copy_(self.lengths)

    def take_base(self, weight: Tensor) -> None:
        self.lengths = self.lengths_of(weight)

    def lengths_of(self, stored: Tensor) -> Tensor:
        own = self.tensors()
        logical = stored.t() if self.part.transposed else stored
        return row_norms(logical.detach(), own["lora_A"].detach(), torch.zeros_like(own["lora_B"]), self.part.scale)

    def deltas(self, snapshot: Snapshot | None = None) -> list[Delta]:
        held = self.snapshot() if snapshot is None else snapshot
        change = (self.param, self.part.transposed)
        a, b = self.layout.factors_to_original(*change, held["lora_A"], held["lora_B"])
        _, magnitude = self.layout.factors_to_original(*change, held["lora_A"], held["dora_magnitude"])
        more = {"A": a.cpu(), "magnitude": magnitude.cpu()}
        none = torch.empty(0, dtype=torch.int64)
        return [Delta(self.param, "dora", none, b.cpu(), self.part.transposed, scale=self.part.scale, more=more)]

    def fits(self, deltas: Sequence[Delta]) -> bool:
        return [(d.kind, d.values.shape[-1], d.scale) for d in deltas] == [("dora", self.part.rank, self.part.scale)]

    def fill(self, deltas: Sequence[Delta]) -> None:
        (delta,) = deltas
        change = (self.param, self.part.transposed)
        a, b = self.layout.factors_to_current(*change, delta.more["A"], delta.values)
        _, magnitude = self.layout.factors_to_current(*change, delta.more["A"], delta.more["magnitude"])
        self.restore({"lora_A": a, "lora_B": b, "dora_magnitude": magnitude})

    def read_back(self) -> None:
        self.tensors()["dora_magnitude"].detach().copy_(self.lengths_of(self.module.weight))

    def detach(self) -> None:
        self.detached = take_leaves(self.module)

    def attach(self) -> None:
        become(self.module, Dora.module_kind)
        tensors, self.detached = self.detached, {}
        self.part.attach(self.module, tensors)


# --- on disk -----------------------------------------------------------------------------------------------------------------


def changed_weight(base: Tensor, delta: Delta) -> Tensor:
    parts = (t.to(base.dtype) for t in (delta.more["A"], delta.values, delta.more["magnitude"]))
    return with_dora(base, *parts, delta.scale)


def for_peft(delta: Delta) -> PeftLayer:
    magnitude = {"lora_magnitude_vector": delta.more["magnitude"].float()}
    return PeftLayer(delta.more["A"].float(), delta.values.float() * delta.scale, magnitude, {"use_dora": True})


KIND = DeltaKind(
    name="dora",
    tensors={"delta": ("out", "rank"), "A": ("rank", "in"), "magnitude": ("out",)},
    change=changed_weight,
    peft=for_peft,
)


# --- the rule ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DoRA(LinearRule):
    """Weight-decomposed low-rank adaptation. alpha: None for twice the rank."""

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise PlanError(f"DoRA(rank={self.rank}): at least 1 is needed")

    @property
    def scale(self) -> float:
        return float((2 * self.rank if self.alpha is None else self.alpha) / self.rank)


register(DoRA, part=Dora, deltas=[KIND])


def main() -> None:
    """Train a small model with it, and take the result everywhere."""
    import tempfile

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    plan = sparsify.Plan([DoRA(rank=4)])
    host = sparsify.compile(model, plan, example=x)
    print(host.sparsify.report)
    optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=1e-2)
    for step in range(100):
        loss = (host(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 33 == 0:
            print(f"step {step:3}: loss {loss.item():.4f}")
    with tempfile.TemporaryDirectory() as folder:
        host.sparsify.save_adapter(folder)
        other = sparsify.load(model, folder)
        print(f"served without the part: moves by {float((other(x) - host(x)).abs().max()):.1e}")
    trained = host(x).detach()
    host.sparsify.merge()
    print(f"merged: moves by {float((host(x) - trained).abs().max()):.1e}")
    host.sparsify.restore()
    print(f"restored: the base, bit for bit: {torch.equal(host(x), model(x))}")


if __name__ == "__main__":
    main()
