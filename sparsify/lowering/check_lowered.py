"""`Plan(check="numeric")` for lowering: the lowered host, its layers and its graph against what they were before.

    host ──lower──▶ lowered host          example through both: outputs equal to rounding, where no weight was rounded
    every replaced linear                 act(x Wᵀ + b) (· up) in float64 with the weight that stood there, within the error
                                          that is computed from x, W and the format (`error_bound`)
    program ──rewrite──▶ lowered program  example through both graphs

A layer that drifts is named; so is the pass, where no layer drifts alone. Layers that the example does not reach are tried on random
numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.errors import VerifyError
from sparsify.kernels.cpu.operator import epilogue
from sparsify.model.linears import is_plain_linear, logical_weight
from sparsify.modules.original_state import OriginalState
from sparsify.modules.rows_of_gated import RowsOfGated
from sparsify.passes.verify import check_outputs
from sparsify.program import Program
from sparsify.program.values import Inputs

SPREAD = 8.0  # of √n roundings of a sum of n terms: none of the sums of a model comes near that
STEEPEST = {"none": 1.0, "relu": 1.0, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13}  # largest slope of each activation
APPROXIMATED = 1e-6  # absolute error of the kernels' exp and erf, for results of about 1
TRIED = 8  # random tokens for a layer that the example does not reach


@dataclass(frozen=True, eq=False)
class Piece:
    """A linear as it was before lowering. weight (out, in)."""

    name: str
    weight: Tensor
    bias: Tensor | None


class LoweringCheck:
    """What a host and its program compute before lowering; `compare` afterwards. Holds the dense weights until then."""

    def __init__(self, host: nn.Module, program: Program, target: str) -> None:
        self.target, self.example = target, program.example
        self.pieces = [
            Piece(name, logical_weight(module), getattr(module, "bias", None))
            for name, module in host.named_modules()
            if is_plain_linear(module) and isinstance(module.weight, nn.Parameter)
        ]
        self.expected = run(host, self.example)
        self.expected_graph = program.run_example()

    def compare(self, host: nn.Module, program: Program) -> None:
        """Raises VerifyError naming what drifted."""
        layers = replaced(host, self.pieces)
        reached: set[int] = set()
        try:
            with watched(layers, reached):
                found = run(host, self.example)
            for layer in layers:
                if id(layer.module) not in reached:
                    layer.try_random()
            if not any(layer.rounded for layer in layers):
                compare_outputs("the lowered host, though none of its linears alone", self.expected, found)
                compare_outputs("the lowered program", self.expected_graph, program.run_example())
        except VerifyError as error:
            raise VerifyError(f"in pass 'lower-{self.target}': {error}") from error


def run(host: nn.Module, example: Inputs) -> object:
    args, kwargs = example
    with torch.no_grad():
        return host(*args, **kwargs)


def compare_outputs(what: str, expected: object, found: object) -> None:
    try:
        check_outputs(expected, found)
    except VerifyError as error:
        raise VerifyError(f"{what}: {error}") from error


@dataclass(frozen=True, eq=False)
class Layer:
    """A lowered module, and the linears that it computes, in the order of [gate; up] where it is gated."""

    module: nn.Module
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return " with ".join(piece.name for piece in self.pieces)

    @property
    def rounded(self) -> bool:
        """Whether it holds its weight in int8."""
        packed = getattr(self.module, "packed", None)
        return packed is not None and packed.value in ("s8", "int8")

    def try_random(self) -> None:
        weight = self.pieces[0].weight
        x = torch.randn(TRIED, weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            self.compare(x, self.module(x))

    def compare(self, x: Tensor, y: Tensor, residual: Tensor | None = None) -> None:
        """Raises VerifyError unless y is act(x Wᵀ + b) (· up) + residual within the error of the format."""
        x64 = x.detach().double().reshape(-1, x.shape[-1])
        if not bool(torch.isfinite(x64).all()):
            return  # NaN and Inf have no error bound
        weight = torch.cat([piece.weight for piece in self.pieces]).double()
        biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias.detach() for p in self.pieces]
        bias = torch.cat(biases).double()
        z, error = x64 @ weight.t() + bias, self.error_bound(x64, weight, bias, x.dtype)
        expected, allowed = self.after_activation(z, error, x.dtype)
        if residual is not None:
            expected = expected + residual.double().reshape(expected.shape)
            allowed = allowed + 2 * torch.finfo(x.dtype).eps * expected.abs()
        drift = (y.detach().double().reshape(expected.shape) - expected).abs()
        excess = torch.where(drift.isnan(), torch.inf, drift / allowed.clamp_min(1e-300))
        if float(excess.max()) <= 1.0:
            return
        worst = int(excess.argmax())
        token, row = divmod(worst, expected.shape[1])
        raise VerifyError(
            f"{self.name}: output {row} of token {token} drifted by {float(drift.flatten()[worst]):.2e}; its format "
            f"({self.format}) and rounding explain {float(allowed.flatten()[worst]):.2e}"
        )

    @property
    def format(self) -> str:
        packed = getattr(self.module, "packed", None)
        return "dense, blocked" if packed is None else f"packed {packed.value}"

    def error_bound(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """How far x Wᵀ + b (tokens, rows) may lie from float64's: sums in fp32, a result in `dtype`, and for int8 half a step of every
        weight, and of every activation where those are rounded too."""
        size = x.abs() @ weight.abs().t() + bias.abs()
        error = SPREAD * (math.sqrt(weight.shape[1]) + 1) * torch.finfo(torch.float32).eps * size
        error = error + 2 * torch.finfo(dtype).eps * size
        if not self.rounded:
            return error
        step = weight.abs().amax(1) / 127
        error = error + 0.501 * x.abs().sum(1, keepdim=True) * step
        if getattr(self.module, "int8", False):
            largest = weight.abs().sum(1) + weight.shape[1] * step / 2  # of the rounded weights of a row
            error = error + 0.501 * x.abs().amax(1, keepdim=True) / 127 * largest
        return error

    def after_activation(self, z: Tensor, error: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the epilogue makes of a product and of its error."""
        activation, gated = getattr(self.module, "activation", "none"), getattr(self.module, "gated", False)
        if activation == "none" and not gated:
            return z, error
        steepest, rounding = STEEPEST[activation], 2 * torch.finfo(dtype).eps
        first, second = z.chunk(2, -1) if gated else (z, None)
        first_error, second_error = error.chunk(2, -1) if gated else (error, error)
        y = epilogue(first, activation, False, None)
        y_error = steepest * first_error + APPROXIMATED * (1 + first.abs()) + rounding * y.abs()
        if second is None:
            return y, y_error
        product_error = y_error * second.abs() + y.abs() * second_error + y_error * second_error
        return y * second, product_error + rounding * (y * second).abs()


def replaced(host: nn.Module, pieces: list[Piece]) -> list[Layer]:
    """The lowered modules of a host with the linears that they stand for."""
    found: dict[int, tuple[nn.Module, list[tuple[int, Piece]]]] = {}
    for piece in pieces:
        module = host.get_submodule(piece.name)
        if isinstance(module, RowsOfGated):
            found.setdefault(id(module.whole), (module.whole, []))[1].append((module.first, piece))
        elif isinstance(module, OriginalState):
            found.setdefault(id(module), (module, []))[1].append((0, piece))
    return [
        Layer(module, tuple(piece for _, piece in sorted(parts, key=lambda part: part[0])))
        for module, parts in found.values()
    ]


@contextlib.contextmanager
def watched(layers: list[Layer], reached: set[int]) -> Iterator[None]:
    """Compare every layer whenever it runs."""

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def compare(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            reached.add(id(module))
            layer.compare(args[0], y, args[1] if len(args) > 1 else None)

        return compare

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
