"""What each ATen operation demands of its axes. One small function per operation; no rule means: fix everything.

A rule takes a `Call`, unifies axes that must be indexed alike, fixes those along which order matters, and returns the
axes of the result (a list for several results). It must be *equivariant*: permuting the classes that it leaves free, in
all inputs alike, permutes its output alike. When a case is not modelled, raise `Refuse`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch._ops import OpOverload

from sparsify.passes.detect.axes import (
    ONE,
    AttentionCore,
    Axes,
    Axis,
    Call,
    Refuse,
    Rule,
    Value,
    concat,
    cut,
    fresh,
    product,
    unify,
    words,
)

RULES: dict[str, Rule] = {}
POINTWISE_TAG: dict[OpOverload, bool] = {}
MANY = 64  # an axis taken apart into single positions may have this many at most

# Element-wise operations that PyTorch does not tag as such. Casts and copies count: they read one element each.
ELEMENTWISE = words(
    "__and__ __or__ __xor__ __lshift__ __rshift__ floor_divide divide multiply subtract true_divide rsub neg negative "
    "masked_fill where _to_copy contiguous detach alias lift_fresh_copy lift_fresh clone copy fill zero log_sigmoid "
    "logsigmoid hardswish tanhshrink hardshrink isnan isreal polar complex real imag conj _conj resolve_conj "
    "resolve_neg nan_to_num absolute arctan greater less greater_equal less_equal not_equal special_expit special_erf "
    "special_log1p special_expm1 clamp clip softsign square float_power"
)
# In-place forms are allowed for element-wise operations and for these.
IN_PLACE = {"index_put", "copy", "fill", "zero", "masked_fill", "index_add", "relu", "clamp", "dropout"}
VIEWS = words(
    "view reshape flatten unflatten view_as reshape_as permute transpose t mT swapaxes movedim unsqueeze squeeze "
    "expand slice narrow select split split_with_sizes chunk tensor_split unbind alias detach contiguous to"
)
CONSTANT_FILL = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
CONSTANT_FILL |= {"empty", "empty_like", "new_empty", "scalar_tensor", "empty_permuted"}


def rule(*names: str):
    """Register a rule for `aten::name` (or a full `namespace::name`)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


def rule_for(target: OpOverload, op: str, mutable: bool) -> Rule | None:
    """The rule of an operator overload, or None when it has none."""
    namespace, _, name = op.partition("::")
    if mutable:
        if not name.endswith("_") or name.endswith("__"):
            return None
        name = name[:-1]
        op = f"{namespace}::{name}"
    if target not in POINTWISE_TAG:
        random = torch.Tag.nondeterministic_seeded in target.tags
        tagged = torch.Tag.pointwise in target.tags and not random
        POINTWISE_TAG[target] = tagged or (namespace == "aten" and name in ELEMENTWISE)
    if op in RULES and (not mutable or name in IN_PLACE):
        return RULES[op]
    return elementwise if POINTWISE_TAG[target] else None


# ---------------------------------------------------------------------------------------------------------- helpers


def wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def dims_of(value: int | Sequence[int] | None, rank: int) -> list[int]:
    """Normalised dims; None or empty stands for all of them."""
    if value is None or value == []:
        return list(range(rank))
    return [wrap(d, rank) for d in ([value] if isinstance(value, int) else value)]


def replace_at(axes: Axes, dim: int, *new: Axis) -> Axes:
    return (*axes[:dim], *new, *axes[dim + 1 :])


def reduced(axes: Axes, dims: list[int], keep: bool) -> Axes:
    if keep:
        return tuple(ONE if i in dims else a for i, a in enumerate(axes))
    return tuple(a for i, a in enumerate(axes) if i not in dims)


def regroup(call: Call, axes: Axes, shape: Iterable[int]) -> Axes:
    """Axes of a reshape: dims are grouped from the outermost until both sides have as many elements."""
    source = [a for a in axes if a.size != 1]
    target = list(shape)
    if any(a.size == 0 for a in source) or 0 in target:
        raise Refuse
    out: list[Axis] = []
    i = j = 0
    while j < len(target):
        if target[j] == 1:
            out.append(ONE)
            j += 1
            continue
        if i >= len(source):
            raise Refuse
        if source[i].size == target[j]:
            out.append(source[i])
            i, j = i + 1, j + 1
            continue
        left, right = [source[i]], [fresh(target[j])]
        out.append(right[-1])
        left_size, right_size = source[i].size, target[j]
        i, j = i + 1, j + 1
        while left_size != right_size:
            if left_size < right_size:
                left.append(source[i])
                left_size *= source[i].size
                i += 1
            else:
                right.append(fresh(target[j]))
                out.append(right[-1])
                right_size *= target[j]
                j += 1
        unify(product(left), product(right), call.name)
    if i != len(source):
        raise Refuse
    return tuple(out)


def shape_of(call: Call) -> tuple[int, ...]:
    shapes = call.shapes
    if len(shapes) != 1:
        raise Refuse
    return shapes[0]


# ------------------------------------------------------------------------------------------------- one element each


def elementwise(call: Call) -> Axes:
    """out[i] = f(a[i], b[i], …): axes at one place are one axis, size 1 stretches."""
    return call.broadcast(*(v.axes for v in call.tensors()))


@rule("to", "type_as", "_to_copy", "view_as_complex_copy")
def cast(call: Call) -> Axes:
    return call.tensors()[0].axes


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(call: Call) -> Axes:
    if call["train"] and call["p"]:
        raise Refuse
    return call.tensors()[0].axes  # called `input`, and `self` in place


@rule("copy")
def copy(call: Call) -> Axes:
    call.broadcast(call["self"].axes, call["src"].axes)
    return call["self"].axes


@rule("prelu")
def prelu(call: Call) -> Axes:
    x, weight = call["self"].axes, call["weight"].axes
    if weight and weight[0].size != 1:
        call.unify(x[1], weight[0])
    return x


@rule("glu")
def glu(call: Call) -> Axes:
    x, dim = call["self"].axes, wrap(call["dim"], len(call["self"].axes))
    half = x[dim].size // 2
    a, b = cut(x[dim], 0, half, call.name), cut(x[dim], half, 2 * half, call.name)
    call.unify(a, b)
    return replace_at(x, dim, a)


@rule("view_as_complex", "view_as_real")
def complex_pairs(call: Call) -> Axes:
    """The last axis of two is (real, imaginary): neither may take the other's place."""
    x = call["self"].axes
    if call.op.endswith("complex"):
        call.fix(x[-1:], "@ reads real and imaginary parts from it")
        return x[:-1]
    return (*x, fresh(2, call.constant("@ writes real and imaginary parts to it")))


# --------------------------------------------------------------------------------------------------------- creation


@rule(*CONSTANT_FILL)
def constant_fill(call: Call) -> Axes:
    """The same value everywhere: any order will do. `zeros_like(x)` reads nothing of x but its shape."""
    call.inputs = ()
    return tuple(ONE if s == 1 else Axis(s, uniform=True) for s in shape_of(call))


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "hann_window", "hamming_window")
def position_fill(call: Call) -> Axes:
    return tuple(fresh(s, call.constant("@ gives every position a value of its own")) for s in shape_of(call))


# ------------------------------------------------------------------------------------------------------ shape changes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias", "ravel")
def view(call: Call) -> Axes:
    if "dtype" in call.args:
        raise Refuse
    return regroup(call, call.tensors()[0].axes, shape_of(call))


@rule("permute")
def permute(call: Call) -> Axes:
    x = call["self"].axes
    return tuple(x[d] for d in call["dims"])


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> Axes:
    x = list(call["self"].axes)
    a, b = (call[k] for k in list(call.args)[1:3])
    x[a], x[b] = x[b], x[a]
    return tuple(x)


@rule("t", "mT", "numpy_T", "adjoint")
def last_two_swapped(call: Call) -> Axes:
    x = call["self"].axes
    return x if len(x) < 2 else (*x[:-2], x[-1], x[-2])


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Axes:
    x = call["self"].axes
    source, target = dims_of(call["source"], len(x)), dims_of(call["destination"], len(x))
    out: list[Axis | None] = [None] * len(x)
    for s, t in zip(source, target, strict=True):
        out[t] = x[s]
    rest = iter(a for i, a in enumerate(x) if i not in source)
    return tuple(a if a is not None else next(rest) for a in out)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Axes:
    x = call["self"].axes
    dim = wrap(call["dim"], len(x) + 1)
    return (*x[:dim], ONE, *x[dim:])


@rule("squeeze")
def squeeze(call: Call) -> Axes:
    x = call["self"].axes
    dims = dims_of(call.get("dim"), len(x))
    return tuple(a for i, a in enumerate(x) if i not in dims or a.size != 1)


@rule("expand", "broadcast_to", "expand_as")
def expand(call: Call) -> Axes:
    """An axis made by stretching holds one value."""
    x, shape = call["self"].axes, shape_of(call)
    padded = (ONE,) * (len(shape) - len(x)) + x
    return tuple(Axis(s, uniform=True) if a.size == 1 != s else a for a, s in zip(padded, shape, strict=True))


@rule("repeat", "tile")
def repeat(call: Call) -> Axes:
    x, shape = call["self"].axes, shape_of(call)
    padded = (ONE,) * (len(shape) - len(x)) + x
    return tuple(product((fresh(s // a.size), a)) for a, s in zip(padded, shape, strict=True))


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Axes:
    count, dim = call.get("repeats"), call.get("dim")
    if not isinstance(count, int) or dim is None:
        raise Refuse
    x = call["self"].axes
    dim = wrap(dim, len(x))
    return replace_at(x, dim, product((x[dim], fresh(count))))


@rule("slice", "narrow")
def slice_axis(call: Call) -> Axes:
    x = call["self"].axes
    dim = wrap(call["dim"], len(x))
    size = x[dim].size
    if "length" in call.args:
        if not isinstance(call["start"], int):
            raise Refuse
        start = wrap(call["start"], size)
        return replace_at(x, dim, call.cut(x[dim], start, start + call["length"]))
    start, stop, step = call.get("start") or 0, call.get("end"), call.get("step", 1)
    start = min(max(wrap(start, size), 0), size)
    stop = size if stop is None else min(max(wrap(stop, size), start), size)
    if step == 1:
        return replace_at(x, dim, call.cut(x[dim], start, stop))
    if size % step or start >= step or (stop - start + step - 1) // step != size // step:
        raise Refuse
    outer, inner = fresh(size // step), fresh(step)
    unify(x[dim], product((outer, inner)), call.name)
    call.cut(inner, start, start + 1)
    return replace_at(x, dim, outer)


@rule("slice_scatter", "select_scatter")
def slice_scatter(call: Call) -> Axes:
    x, source = call["self"].axes, call["src"].axes
    dim = wrap(call["dim"], len(x))
    size = x[dim].size
    if "index" in call.args:
        start = wrap(call["index"], size)
        stop, source = start + 1, (*source[:dim], ONE, *source[dim:])
    else:
        start, stop = call.get("start") or 0, call.get("end")
        start = min(max(wrap(start, size), 0), size)
        stop = size if stop is None else min(max(wrap(stop, size), start), size)
        if call.get("step", 1) != 1:
            raise Refuse
    place = cut(x[dim], start, stop, call.name)
    call.broadcast(replace_at(x, dim, place), source)
    return x


@rule("select")
def select(call: Call) -> Axes:
    x = call["self"].axes
    dim, index = wrap(call["dim"], len(x)), call["index"]
    if not isinstance(index, int):
        raise Refuse
    index = wrap(index, x[dim].size)
    call.cut(x[dim], index, index + 1)
    return replace_at(x, dim)


def split_at(call: Call, sizes: list[int], dim: int) -> list[Axes]:
    x = call["self"].axes
    dim = wrap(dim, len(x))
    out, start = [], 0
    for size in sizes:
        out.append(replace_at(x, dim, call.cut(x[dim], start, start + size)))
        start += size
    return out


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def split(call: Call) -> list[Axes]:
    dim = call.get("dim", 0)
    return split_at(call, [shape[dim] for shape in call.shapes], dim)


@rule("unbind")
def unbind(call: Call) -> list[Axes]:
    x = call["self"].axes
    dim = wrap(call["dim"], len(x))
    if x[dim].size > MANY:
        raise Refuse
    return [replace_at(axes, dim) for axes in split_at(call, [1] * x[dim].size, dim)]


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Axes:
    tensors = [v for v in call["tensors"] if not (len(v.axes) == 1 and v.axes[0].size == 0)]
    rank = len(tensors[0].axes)
    dim = wrap(call["dim"], rank)
    others = call.broadcast(*(replace_at(v.axes, dim, ONE) for v in tensors))
    call.join = concat([v.axes[dim] for v in tensors])
    return replace_at(others, dim, call.join)


@rule("stack")
def stack(call: Call) -> Axes:
    tensors = call["tensors"]
    dim = wrap(call["dim"], len(tensors[0].axes) + 1)
    axes = call.broadcast(*(v.axes for v in tensors))
    if len(tensors) > MANY:
        new = fresh(len(tensors), call.constant("@ stacks different tensors along it"))
    else:
        new = concat([ONE] * len(tensors))
        call.join = new
    return (*axes[:dim], new, *axes[dim:])


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Axes:
    x, widths = call["self"].axes, call["pad"]
    if call.get("mode", "constant") != "constant":
        raise Refuse
    out = list(x)
    for i in range(len(widths) // 2):
        before, after, dim = widths[2 * i], widths[2 * i + 1], len(x) - 1 - i
        if before or after:
            call.fix([x[dim]], "@ pads it")
            out[dim] = fresh(x[dim].size + before + after, call.constant("@ pads it"))
    return tuple(out)


# ------------------------------------------------------------------------------------------- order matters along a dim


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "tril", "triu", "diff", "unfold")
def sequential(call: Call) -> Axes | list[Axes]:
    """Fix the dims that the operation walks along; the others are a batch."""
    x, name = call["self"].axes, call.op.removeprefix("aten::")
    if name in ("tril", "triu"):
        dims = [len(x) - 2, len(x) - 1]
    elif name == "unfold":
        dims = [wrap(call["dimension"], len(x))]
    else:
        dims = dims_of(call.get("dim", call.get("dims")), len(x))
    text = "@ depends on the order along it"
    call.fix((x[d] for d in dims), text)
    for extra in (call.get("prepend"), call.get("append")):
        if isinstance(extra, Value):
            call.fix(extra.axes, text)

    def result(shape: tuple[int, ...]) -> Axes:
        padded = (*x, *(fresh(s, call.constant(text)) for s in shape[len(x) :]))
        changed = {d for d in dims if x[d].size != shape[d]}
        return tuple(fresh(s, call.constant(text)) if i in changed else padded[i] for i, s in enumerate(shape))

    answers = [result(shape) for shape in call.shapes]
    return answers if len(answers) > 1 else answers[0]


@rule("sort", "topk", "argsort", "kthvalue", "mode", "median", "nanmedian")
def ordering(call: Call) -> list[Axes] | Axes:
    """Positions come out, so the dim that is ranked keeps its order."""
    x = call["self"].axes
    if not x or ("dim" not in call.args):
        raise Refuse
    dim = wrap(call["dim"], len(x))
    call.fix([x[dim]], "@ returns positions along it")
    reason = call.constant("@ returns positions along it")
    out = []
    for shape in call.shapes:
        if len(shape) == len(x):
            out.append(replace_at(x, dim, x[dim] if shape[dim] == x[dim].size else fresh(shape[dim], reason)))
        else:
            out.append(replace_at(x, dim))
    return out if len(out) > 1 else out[0]


@rule("argmax", "argmin")
def argmax(call: Call) -> Axes:
    x = call["self"].axes
    dims = dims_of(call.get("dim"), len(x))
    call.fix((x[d] for d in dims), "@ returns positions along it")
    return reduced(x, dims, bool(call.get("keepdim")))


@rule("one_hot")
def one_hot(call: Call) -> Axes:
    return (*call["self"].axes, fresh(shape_of(call)[-1], call.constant("@ numbers its positions")))


# ------------------------------------------------------------------------------------------------- symmetric reductions


@rule("mean", "sum", "nansum", "nanmean", "prod", "amax", "amin", "var", "std", "any", "all", "logsumexp", "norm")
@rule("linalg_vector_norm", "count_nonzero", "var_mean", "std_mean", "aminmax")
def reduction(call: Call) -> Axes | list[Axes]:
    x = call["self"].axes
    dims = dims_of(call.get("dim"), len(x))
    call.mix(x[d] for d in dims)
    out = reduced(x, dims, bool(call.get("keepdim", False)))
    return [out] * len(call.shapes) if len(call.shapes) > 1 else out


@rule("max", "min")
def extreme(call: Call) -> Axes | list[Axes]:
    if isinstance(call.get("other"), Value):
        return elementwise(call)
    x = call["self"].axes
    if "dim" not in call.args:
        call.mix(x)
        return ()
    dim = wrap(call["dim"], len(x))
    call.fix([x[dim]], "@ returns positions along it")
    return [reduced(x, [dim], bool(call.get("keepdim")))] * 2


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "softmin", "special_softmax")
def softmax(call: Call) -> Axes:
    x = call["self"].axes
    along = call.along = x[wrap(call["dim"], len(x))]
    call.mix([along])
    return x


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Axes | list[Axes]:
    x = call["input"].axes
    rank = len(call["normalized_shape"])
    last = x[len(x) - rank :]
    for name in ("weight", "bias"):
        if isinstance(call.get(name), Value):
            call.broadcast(last, call[name].axes)
    call.mix(last)
    shapes = call.shapes
    if len(shapes) == 1:
        return x
    statistics = (*x[: len(x) - rank], *(ONE,) * rank)
    return [x, *[statistics] * (len(shapes) - 1)]


@rule("group_norm", "native_group_norm")
def group_norm(call: Call) -> Axes:
    """Groups may change places, and channels inside a group, alike in all groups."""
    x = call["input"].axes
    groups = call.get("num_groups") or call.get("group")
    if len(call.shapes) != 1:
        raise Refuse
    for name in ("weight", "bias"):
        if isinstance(call.get(name), Value):
            call.unify(x[1], call[name].axes[0])
    inner = fresh(x[1].size // groups)
    unify(x[1], product((fresh(groups), inner)), call.name)
    call.mix((inner, *x[2:]))
    return x


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> Axes | list[Axes]:
    """With the running statistics. Statistics of the batch come out empty."""
    x = call["input"].axes
    shapes = call.shapes
    if call.get("training") or call.get("use_input_stats") or any(prod(shape) for shape in shapes[1:]):
        raise Refuse
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call.get(name), Value):
            call.unify(x[1], call[name].axes[0])
    return x if len(shapes) == 1 else [x, *(tuple(fresh(s) for s in shape) for shape in shapes[1:])]


# ------------------------------------------------------------------------------------------------------ matrix products


@rule("linear")
def linear(call: Call) -> Axes:
    x, weight = call["input"], call["weight"]
    if len(weight.axes) != 2:
        raise Refuse
    out, inner = weight.axes
    call.contract(x, weight, [(x.axes[-1], inner)], left_kept=x.axes[:-1], right_kept=(out,))
    if isinstance(call.get("bias"), Value):
        call.broadcast((out,), call["bias"].axes)
    return (*x.axes[:-1], out)


def matrix_product(call: Call, left: Value, right: Value) -> Axes:
    """NumPy's matmul: batch axes broadcast, the last of the left meets the last but one of the right."""
    a, b = left.axes, right.axes
    if not a or not b:
        raise Refuse
    rows, a_inner = a[-2:-1], a[len(a) - 1]
    b_inner, columns = (b[-2], b[-1:]) if len(b) > 1 else (next(iter(b)), ())
    batch = call.broadcast(a[:-2], b[:-2])
    depth = len(batch)

    def at(axes: Axes, i: int) -> bool:
        place = i - (depth - max(len(axes) - 2, 0))
        return place >= 0 and axes[place].size != 1

    call.contract(
        left,
        right,
        [(a_inner, b_inner)],
        left_kept=(*(x for i, x in enumerate(batch) if at(a, i) and not at(b, i)), *rows),
        right_kept=(*(x for i, x in enumerate(batch) if at(b, i) and not at(a, i)), *columns),
        batch=tuple(x for i, x in enumerate(batch) if at(a, i) and at(b, i)),
    )
    return (*batch, *rows, *columns)


@rule("matmul", "mm", "bmm", "mv", "dot", "linalg_matmul", "inner", "vdot")
def matmul(call: Call) -> Axes:
    left, right = call.tensors()
    if call.op == "aten::inner":
        raise Refuse
    return matrix_product(call, left, right)


@rule("addmm", "baddbmm", "addmv")
def addmm(call: Call) -> Axes:
    names = [n for n in call.args if isinstance(call.args[n], Value)]
    extra, left, right = (call[n] for n in names)
    out = matrix_product(call, left, right)
    return call.broadcast(out, extra.axes)


@rule("einsum")
def einsum(call: Call) -> Axes:
    """Equal letters are one axis. Letters missing from the output are summed over."""
    equation, operands = call["equation"].replace(" ", ""), call["tensors"]
    if "." in equation:
        raise Refuse
    terms, arrow, out = equation.partition("->")
    sides = terms.split(",")
    if not arrow:
        counts = {letter: terms.count(letter) for letter in terms if letter != ","}
        out = "".join(sorted(letter for letter, count in counts.items() if count == 1))
    letters: dict[str, Axis] = {}
    for side, operand in zip(sides, operands, strict=True):
        for letter, axis in zip(side, operand.axes, strict=True):
            known = letters.get(letter)
            if known is None or known.size == 1:
                letters[letter] = axis
            elif axis.size != 1:
                call.unify(known, axis)
    # Operands are multiplied from left to right; every product but the last is a value of its own.
    value, names = operands[0], set(sides[0])
    for i, (side, operand) in enumerate(zip(sides[1:], operands[1:], strict=True), 1):
        later = set(out).union(*sides[i + 1 :])
        both = [x for x in side if x in names]
        record = call.contract(
            value,
            operand,
            [(letters[x], letters[x]) for x in both if x not in later],
            left_kept=tuple(letters[x] for x in sorted(names - set(side)) if x in later),
            right_kept=tuple(letters[x] for x in side if x not in names and x in later),
            batch=tuple(letters[x] for x in both if x in later),
        )
        names = (names | set(side)) & later
        if i + 1 < len(operands):
            value = record.out = call.intermediate(tuple(letters[x] for x in sorted(names)), (value, operand))
        elif i > 1:
            call.inputs = (value, operand)
    call.mix(letters[x] for x in letters if x not in out)
    return tuple(letters[x] for x in out)


@rule("_grouped_mm", "transformers::grouped_mm_fallback", "_grouped_mm_fallback")
def grouped_mm(call: Call) -> Axes:
    """Rows of the left are sorted by expert: rows and experts keep their order; each expert contracts alike."""
    left, right = call.tensors()[:2]
    if len(left.axes) != 2 or len(right.axes) != 3:
        raise Refuse
    call.fix((left.axes[0], right.axes[0]), "@ assigns tokens to experts by position")
    for value in call.tensors()[2:]:
        bias = isinstance(call.get("bias"), Value) and value is call["bias"]
        call.fix(value.axes[:1] if bias else value.axes, "@ assigns tokens to experts by position")
        if bias and len(value.axes) == 2:
            call.unify(value.axes[1], right.axes[2])
        elif bias:
            raise Refuse
    call.contract(
        left,
        right,
        [(left.axes[1], right.axes[1])],
        left_kept=left.axes[:1],
        right_kept=(right.axes[0], right.axes[2]),
    )
    return (left.axes[0], right.axes[2])


@rule("sparsify::grouped_linear")
def grouped_linear(call: Call) -> Axes:
    """As `grouped_mm`, of weights `(experts, out, in)`."""
    left, right, offsets = call["x"], call["weight"], call["offsets"]
    call.fix((left.axes[0], right.axes[0], *offsets.axes), "@ assigns tokens to experts by position")
    kept = (right.axes[0], right.axes[1])
    call.contract(left, right, [(left.axes[1], right.axes[2])], left_kept=left.axes[:1], right_kept=kept)
    return (left.axes[0], right.axes[1])


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Axes:
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    if call.get("dropout_p"):
        raise Refuse
    q, k, v = query.axes, key.axes, value.axes
    if call.get("enable_gqa") and q[-3].size != k[-3].size:
        call.unify(k[-3], v[-3])
        split_heads = product((k[-3], fresh(q[-3].size // k[-3].size)))
        call.unify(q[-3], split_heads)
        batch = (*call.broadcast(q[:-3], k[:-3], v[:-3]), q[-3])
    else:
        batch = call.broadcast(q[:-2], k[:-2], v[:-2])
    call.unify(q[-1], k[-1])
    call.unify(k[-2], v[-2])
    call.mix([k[-2]])
    call.mix([q[-1]])
    if call.get("is_causal"):
        call.fix((q[-2], k[-2]), "@ is causal along it")
    if isinstance(mask, Value):
        call.broadcast((*batch, q[-2], k[-2]), mask.axes)
    call.core = AttentionCore(call.name, query, key, value, heads=batch, features=(q[-1],))
    return (*batch, q[-2], v[-1])


# --------------------------------------------------------------------------------------------------------- convolutions


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d")
def convolution(call: Call) -> Axes:
    x, weight = call["input"], call["weight"]
    groups = call["groups"]
    transposed = "conv_transpose" in call.op or bool(call.get("transposed"))
    if len(x.axes) != len(weight.axes) or (transposed and isinstance(call.get("padding"), str)):
        raise Refuse
    first, second = weight.axes[:2]
    if transposed:
        inputs, outputs = first, (second if groups == 1 else product((fresh(groups), second)))
        if groups > 1:
            # Input groups and output groups are the same groups.
            group = fresh(groups)
            unify(first, product((group, fresh(first.size // groups))), call.name)
            outputs = product((group, second))
    elif groups == 1:
        inputs, outputs = second, first
    else:
        group = fresh(groups)
        inputs = product((group, second))
        unify(first, product((group, fresh(first.size // groups))), call.name)
        outputs = first
    pointwise = all(a.size == 1 for a in weight.axes[2:]) and tuple(shape_of(call)[2:]) == tuple(
        a.size for a in x.axes[2:]
    )
    if not pointwise:
        call.fix((*x.axes[2:], *weight.axes[2:]), "@ slides along it")
    if groups == 1:
        record = call.contract(x, weight, [(x.axes[1], inputs)], left_kept=x.axes[:1], right_kept=(outputs,))
        record.spatial = not pointwise
    else:
        call.unify(x.axes[1], inputs)
        call.mix([second])
    if isinstance(call.get("bias"), Value):
        call.unify(call["bias"].axes[0], outputs)
    return (x.axes[0], outputs, *slid(call, x.axes[2:], shape_of(call)[2:]))


def slid(call: Call, axes: Axes, shape: tuple[int, ...]) -> Axes:
    """Spatial axes after a window went over them: fixed; an unchanged size counts as the same axis, for the report."""
    reason = call.constant("@ slides along it")
    return tuple(a if a.size == s else fresh(s, reason) for a, s in zip(axes, shape, strict=True))


@rule("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
@rule("adaptive_max_pool2d", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d", "upsample_nearest1d")
@rule("upsample_linear1d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def spatial_window(call: Call) -> Axes:
    """Spatial axes keep their order; batch and channels pass."""
    x, shape = call["self" if "self" in call.args else "input"].axes, shape_of(call)
    places = 1 if "1d" in call.op else 2
    call.fix(x[-places:], "@ slides along it")
    return (*x[:-places], *slid(call, x[-places:], shape[-places:]))


# ----------------------------------------------------------------------------------------------------- reading by index


@rule("embedding")
def embedding(call: Call) -> Axes:
    table, places = call["weight"].axes, call["indices"].axes
    call.fix(table[:1], "@ reads it by index")
    return (*places, *table[1:])


@rule("index_select")
def index_select(call: Call) -> Axes:
    x, places = call["self"].axes, call["index"].axes
    dim = wrap(call["dim"], len(x))
    call.fix([x[dim]], "@ reads it by index")
    return replace_at(x, dim, places[0] if places else ONE)


def index_places(call: Call, x: Axes, indices: list[Value | None]) -> tuple[Axes, int, int]:
    """(axes of the broadcast indices, where they stand in the result, how many dims they replace)."""
    given = [i for i, v in enumerate(indices) if v is not None]
    tensors = [v for v in indices if v is not None]
    call.fix((x[i] for i in given), "@ reads it by index")
    places = call.broadcast(*(v.axes for v in tensors))
    adjacent = given == list(range(given[0], given[-1] + 1))
    return places, (given[0] if adjacent else 0), len(given)


def boolean(call: Call, name: str) -> bool:
    nodes = [n for n in call.node.args[list(call.args).index(name)] or () if n is not None]  # type: ignore[union-attr, arg-type]
    return any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in nodes)  # type: ignore[union-attr]


@rule("index", "_unsafe_index")
def index(call: Call) -> Axes:
    x, indices = call["self"].axes, call["indices"]
    if boolean(call, "indices"):
        raise Refuse
    given = [i for i, v in enumerate(indices) if v is not None]
    if len(given) == 1:
        positions = call.known(call.node.args[1][given[0]])  # type: ignore[index]
        if positions is not None and positions.dim() == 1:
            run = [wrap(int(p), x[given[0]].size) for p in positions.tolist()]
            if run == list(range(run[0], run[0] + len(run))):  # a slice in disguise
                return replace_at(x, given[0], call.cut(x[given[0]], run[0], run[-1] + 1))
    places, at, _ = index_places(call, x, indices)
    if len(given) == 1 and len(places) == 1 and places[0].size == x[given[0]].size:
        call.unify(x[given[0]], places[0])  # a reordering: one axis to the report (and fixed)
    kept = [a for i, a in enumerate(x) if i >= len(indices) or indices[i] is None]
    return (*kept[:at], *places, *kept[at:])


@rule("index_put")
def index_put(call: Call) -> Axes:
    x, indices = call["self"].axes, call["indices"]
    if boolean(call, "indices"):
        raise Refuse
    places, at, _ = index_places(call, x, indices)
    call.fix(places, "@ writes by index")
    kept = [a for i, a in enumerate(x) if i >= len(indices) or indices[i] is None]
    call.broadcast((*kept[:at], *places, *kept[at:]), call["values"].axes)
    return x


@rule("index_add")
def index_add(call: Call) -> Axes:
    x, source = call["self"].axes, call["source"].axes
    dim = wrap(call["dim"], len(x))
    call.fix([x[dim], source[dim], *call["index"].axes], "@ writes by index")
    call.broadcast(replace_at(x, dim, ONE), replace_at(source, dim, ONE))
    return x
