"""The loss of a language model's head, in chunks of tokens, so that its logits `(T, v)` never exist as a whole.

    chunked_loss(x, weight, bias, target, gain, cap, ignore, chunk, …)      Σ_t −log softmax(z_t)[target_t],   z = f(x Wᵀ + b)

`x (t, k)`, `weight (v, k)`, `bias (v)`, `target (t,)` numbers of classes, `ignore` the number that counts nothing. `f` is
`gain · y`, or where `cap` is not 0 `cap · tanh(gain · y)` (Gemma 2's soft cap); logits and loss are fp32 (fp64 for fp64) whatever
the dtype of `x`. The sum and its gradients come of one walk over the chunks: a chunk's logits make its share of the loss, then of
the gradients, and are gone. So the backward is a product with the gradient of the sum, at no further product with the head; at
most `chunk · v` logits exist at a time. The same idea as in Liger Kernel (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009).

    d_x, d_weight    whether the gradient of x, and of weight and bias, is made on the way; what was not is made in the backward
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.checks import require, require_floats, require_together

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NAME = "chunked_loss"
LIBRARY.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor target, float gain, float cap, int ignore, int chunk, "
    "bool d_x, bool d_weight) -> (Tensor loss, Tensor d_x, Tensor d_weight, Tensor d_bias)"
)
Results = tuple[Tensor, Tensor, Tensor, Tensor]


# --- the oracle --------------------------------------------------------------------------------------------------------------


def oracle_chunked_loss(
    x: Float[Tensor, "t k"],
    weight: Float[Tensor, "v k"],
    bias: Float[Tensor, " v"] | None,
    target: Int[Tensor, " t"],
    gain: float,
    cap: float,
    ignore: int,
) -> Float[Tensor, ""]:
    """Eager definition of the loss, by all logits at once."""
    z = gain * (x @ weight.t() + (0 if bias is None else bias))
    if cap:
        z = cap * torch.tanh(z)
    counted = target != ignore
    own = z[counted].gather(1, target[counted, None])[:, 0]
    return (z[counted].logsumexp(1) - own).sum()


def oracle_chunked_loss_backward(
    x: Float[Tensor, "t k"],
    weight: Float[Tensor, "v k"],
    bias: Float[Tensor, " v"] | None,
    target: Int[Tensor, " t"],
    gain: float,
    cap: float,
    ignore: int,
) -> tuple[Float[Tensor, "t k"], Float[Tensor, "v k"], Float[Tensor, " v"]]:
    """`(dx, dW, db)` of the sum, written out: with one-hot targets `H`, `G = (softmax(z) − H) f'(y)`; `dx = G W`, `dW = Gᵀ x`."""
    y = x @ weight.t() + (0 if bias is None else bias)
    bent = torch.tanh(gain * y)
    z, slope = (cap * bent, cap * gain * (1 - bent * bent)) if cap else (gain * y, torch.full_like(y, gain))
    g = torch.softmax(z, 1)
    counted = target != ignore
    g[counted, target[counted]] -= 1
    g = g * counted[:, None] * slope
    return g @ weight, g.t() @ x, g.sum(0)


# --- the operator ------------------------------------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int) -> None:
    require(x.dim() == weight.dim() == 2, lambda: f"{NAME}: expected two matrices, x and weight")
    require(
        target.dtype == torch.int64 and target.dim() == 1,
        lambda: (
            f"{NAME}: target is {target.dtype} of {target.dim()} dimensions, expected int64 numbers of classes (t,)"
        ),
    )
    floats = {"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias}
    require_floats(NAME, **floats)
    require(
        x.shape[1] == weight.shape[1]
        and x.shape[0] == target.shape[0]
        and (bias is None or bias.shape == weight.shape[:1]),
        lambda: (
            f"{NAME}: x {tuple(x.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)} do not fit together"
        ),
    )
    require(chunk > 0, lambda: f"{NAME}: chunk={chunk}, expected a positive number of tokens")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits and losses of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(
    x: Float[Tensor, "c k"], weight: Float[Tensor, "v k"], bias: Float[Tensor, " v"] | None, gain: float, cap: float
) -> Float[Tensor, "c v"]:
    made = torch.nn.functional.linear(x, weight, bias).to(wide(x.dtype))
    made = made if gain == 1.0 else made * gain
    return torch.tanh(made) * cap if cap else made


def _kernel(
    x: Float[Tensor, "t k"],
    weight: Float[Tensor, "v k"],
    bias: Float[Tensor, " v"] | None,
    target: Int[Tensor, " t"],
    gain: float,
    cap: float,
    ignore: int,
    chunk: int,
    d_x: bool,
    d_weight: bool,
) -> Results:
    _check(x, weight, bias, target, chunk)
    require_together(NAME, weight, x, target, bias)
    loss, for_x, for_weight, for_bias = _fake(x, weight, bias, target, gain, cap, ignore, chunk, d_x, d_weight)
    for made in (loss, for_x, for_weight, for_bias):
        made.zero_()
    head, shift = weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype)
    counted, rows = target != ignore, None
    if x.device.type == "cpu" and not bool(counted.all()):  # elsewhere the device would have to be waited for
        rows = counted.nonzero()[:, 0]
        x, target, counted = x[rows], target[rows], counted[rows]
    target = torch.where(counted, target, 0)[:, None]
    counted = counted[:, None]
    own_gradients = for_x if rows is None or not d_x else x.new_empty(x.shape)
    for start in range(0, x.shape[0], chunk):
        now = slice(start, start + chunk)
        z = logits(x[now], head, shift, gain, cap)
        top, own = z.amax(1, keepdim=True), z.gather(1, target[now])
        slope = gain * cap * (1 - (z / cap).square_()) if cap and (d_x or d_weight) else gain
        z = z.sub_(top).exp_()  # from here on what the logits become lies in their memory: exp, softmax, gradient
        total = z.sum(1, keepdim=True)
        loss += torch.where(counted[now], total.log() + top - own, 0).sum()
        if not (d_x or d_weight):
            continue
        g = z.mul_(torch.where(counted[now], 1 / total, 0))
        g.scatter_add_(1, target[now], -counted[now].to(g.dtype))
        g = (g if cap == 0 and gain == 1 else g.mul_(slope)).to(x.dtype)
        if d_x:
            torch.mm(g, head, out=own_gradients[now])
        if d_weight:
            for_weight += g.t() @ x[now]
            if bias is not None:
                for_bias += g.sum(0, dtype=for_bias.dtype)
        del z, g  # before the next chunk's take their place
    if d_x and rows is not None:
        for_x.index_copy_(0, rows, own_gradients)
    return loss, for_x, for_weight, for_bias


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    gain: float,
    cap: float,
    ignore: int,
    chunk: int,
    d_x: bool,
    d_weight: bool,
) -> Results:
    _check(x, weight, bias, target, chunk)
    kind = wide(weight.dtype)
    return (
        x.new_empty((), dtype=wide(x.dtype)),
        x.new_empty(x.shape if d_x else (0,)),
        weight.new_empty(weight.shape if d_weight else (0,), dtype=kind),
        weight.new_empty(weight.shape[:1] if d_weight and bias is not None else (0,), dtype=kind),
    )


def _summed(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, gain: float, cap: float, ignore: int
) -> Float[Tensor, ""]:
    """The loss in differentiable ATen."""
    z = logits(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), gain, cap)
    return torch.nn.functional.cross_entropy(z, target, ignore_index=ignore, reduction="sum")


def _in_aten(
    x: Float[Tensor, "t k"],
    weight: Float[Tensor, "v k"],
    bias: Float[Tensor, " v"] | None,
    target: Int[Tensor, " t"],
    gain: float,
    cap: float,
    ignore: int,
    chunk: int,
    d_x: bool,
    d_weight: bool,
) -> Results:
    empty = x.new_empty((0,))
    return _summed(x, weight, bias, target, gain, cap, ignore), empty, empty, empty


class _Saved(Context, Protocol):
    """What the backward keeps beside the tensors."""

    numbers: tuple[float, float, int]
    made: tuple[bool, bool]

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def _setup(
    ctx: _Saved,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, float, float, int, int, bool, bool],
    output: Results,
) -> None:
    x, weight, bias, target, gain, cap, ignore, _, d_x, d_weight = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, target, *output[1:])
    ctx.numbers, ctx.made = (gain, cap, ignore), (d_x, d_weight)


def _backward(ctx: _Saved, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that were made, times g. What was not made, and what is to be differentiated again, is computed from all logits."""
    none = (None,) * 10
    if g is None:
        return none
    x, weight, bias, target, *made = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    (d_x, d_weight) = ctx.made
    ready = (d_x or not need[0]) and (d_weight or not (need[1] or need[2]))
    if ready and not torch.is_grad_enabled():
        own = (x, weight, bias)
        found = [(m * g).to(t.dtype) if n and t is not None else None for m, t, n in zip(made, own, need, strict=True)]
        return (*found, *none[3:])
    again = torch.is_grad_enabled()

    def leaf(tensor: Tensor, needed: bool) -> Tensor:
        return tensor if again else tensor.detach().requires_grad_(needed)

    with torch.enable_grad():
        x, weight = leaf(x, need[0]), leaf(weight, need[1])
        bias = None if bias is None else leaf(bias, need[2])
        loss = _summed(x, weight, bias, target, *ctx.numbers)
        asked = [t for t, n in zip((x, weight, bias), need, strict=True) if n and t is not None]
        grads = iter(torch.autograd.grad(loss, asked, g, create_graph=again))
    return (*(next(grads) if n else None for n in need), *none[3:])


LIBRARY.implement(NAME, kernel=_kernel, fake=_fake, aten=_in_aten, backward=_backward, setup=_setup)
LIBRARY.autocast(NAME)


def chunked_cross_entropy(
    x: Float[Tensor, "*t k"],
    weight: Float[Tensor, "v k"],
    target: Int[Tensor, "*t"],
    *,
    bias: Float[Tensor, " v"] | None = None,
    chunk: int = 512,
    ignore_index: int = -100,
    reduction: str = "mean",
    gain: float = 1.0,
    softcap: float = 0.0,
) -> Float[Tensor, ""]:
    """`cross_entropy(linear(x, weight, bias), target)` of which at most `chunk` tokens' logits exist at a time.

    x: inputs of the head. weight, bias: the head. target: numbers of classes (int64), `ignore_index` where a token counts nothing.
    reduction: "mean" over the tokens that count (NaN if none does, as in torch), or "sum". gain: a factor of the logits.
    softcap: `c` of `c · tanh(logits / c)`, 0 for none (`gain` applies inside). The loss is fp32, or fp64 for fp64.
    Time is that of the ordinary loss: the gradients are made in the forward, when one is needed at all.
    Raises RuntimeError for shapes that do not fit and for targets that are no int64, ValueError for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"chunked_cross_entropy: reduction={reduction!r}, expected 'mean' or 'sum'")
    rows, own = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    recorded = torch.is_grad_enabled()
    needs = (
        recorded and x.requires_grad,
        recorded and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )
    inner = gain / softcap if softcap else gain
    loss = torch.ops.sparsify.chunked_loss(rows, weight, bias, own, inner, softcap, ignore_index, chunk, *needs)[0]
    return loss / (own != ignore_index).sum() if reduction == "mean" else loss


__all__ = ["chunked_cross_entropy", "oracle_chunked_loss", "oracle_chunked_loss_backward"]
