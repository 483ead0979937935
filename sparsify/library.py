"""How the operators of the `sparsify` namespace are registered, so that each behaves as the plain ATen product does.

    kernel        fresh outputs      what it returns is no view, whatever views it took on the way: in-place operations may follow
    autograd      every order        formulas are made of ATen and of these operators, so a backward can be differentiated again
    transforms    in ATen            torch.func (grad, jvp, vmap, hessian) and forward-mode see the same function written in ATen

A kernel writes trained values into scratch regions of a frozen weight, behind autograd; no transform can look into that. So each
operator has a second definition in differentiable ATen (`in_aten`), which makes a dense weight of its own: it runs under
transforms only, where it gives tangents, batches and derivatives of any order. An operator without one refuses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsify.errors import RefusedError

P = ParamSpec("P")
R = TypeVar("R")

_C: Any = torch._C  # most of what is used of it has no types


def _autograd_keys() -> torch._C.DispatchKeySet:
    """The dispatch keys that an operator excludes while its kernel runs."""
    outside = _C._dispatch_tls_local_exclude_set()
    with _C._AutoDispatchBelowAutograd():
        return _C._dispatch_tls_local_exclude_set() - outside


_AUTOGRAD_KEYS = _autograd_keys()
_DEVICES = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)


def recorded(function: Callable[P, Tensor], *args: P.args, **kwargs: P.kwargs) -> Tensor:
    """`function(*args)` as part of the graph, from inside of a `setup_context`, where nothing is recorded otherwise.

    What a formula saves of an input (a slice of it) must stay connected with that input, or its second derivative is lost.
    """
    include, exclude = _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()
    with torch.enable_grad(), _C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD_KEYS):
        return function(*args, **kwargs)


def under_transform(args: tuple[object, ...]) -> bool:
    """Whether a transform of torch.func is active, or a tensor of these carries a tangent."""
    if _C._functorch.peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args)


def _fresh(kernel: Callable[..., R]) -> Callable[..., R]:
    """Views taken inside are no business of autograd's: the result (of `F.linear` in 3-D, a view) owns its memory."""

    @functools.wraps(kernel)
    def run(*args: object) -> R:
        with _C._AutoDispatchBelowADInplaceOrView():
            return kernel(*args)

    return run


#: operators of methods from outside → the same in ATen, for compilers that are to see through them
OUTSIDE: dict[torch._ops.OpOverload, Callable[..., object]] = {}


class Context(Protocol):
    """What autograd hands to an operator's `setup` and `backward`; each operator extends it with what it keeps itself."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What `save_for_backward` was given, in its order: tensors, and None where None was given."""
        ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class OperatorLibrary(torch.library.Library):
    """A fragment of a namespace; `define`, then `implement` for operators of training, or `impl` and the like as for any library.

    namespace: of the operators; a method from outside has one of its own.
    """

    def __init__(self, namespace: str = "sparsify") -> None:
        super().__init__(namespace, "FRAGMENT")
        self._forms: dict[str, Callable[..., object]] = {}
        self._kernels: dict[str, Callable[..., object]] = {}

    def implement(
        self,
        name: str,
        *,
        kernel: Callable[..., object],
        fake: Callable[..., object],
        aten: Callable[..., object],
        backward: Callable[..., object],
        setup: Callable[..., None],
    ) -> None:
        """All that a training operator is, once it is defined: what runs, on shapes alone, in differentiable ATen, and its formula."""
        self.impl(name, kernel, "CompositeExplicitAutograd")
        self.in_aten(name, aten)
        torch.library.register_fake(f"{self.ns}::{name}", fake, lib=self)
        torch.library.register_autograd(f"{self.ns}::{name}", backward, setup_context=setup, lib=self)

    def in_aten(self, name: str, form: Callable[..., object]) -> None:
        """Say what an operator means in differentiable ATen; it must not write to its arguments."""
        self._forms[name] = form
        if self.ns != "sparsify":
            OUTSIDE[getattr(getattr(torch.ops, self.ns), name).default] = form
        super().impl(name, form, "FuncTorchBatched")
        super().impl(name, form, "Batched")  # the older vmap, behind `is_grads_batched`

    def autocast(self, name: str) -> None:
        """The rule of `F.linear`: the first argument goes to the autocast dtype (fp64 stays), the others keep their own."""
        op = getattr(getattr(torch.ops, self.ns), name).default
        for device in ("cpu", "cuda"):
            super().impl(name, autocast_rule(op, device), f"Autocast{device.upper()}")

    def impl(self, op_name: str, fn: Callable[..., object], dispatch_key: str = "", **options: bool) -> None:
        if dispatch_key == "CompositeExplicitAutograd":
            self._kernels[op_name] = fn = _fresh(fn)
        elif dispatch_key == "Autograd":
            fn = self._transformable(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **options)

    def _transformable(self, name: str, kernel: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(kernel)
        def run(keyset: torch._C.DispatchKeySet, *args: object) -> object:
            if not under_transform(args):
                plain = self._kernels.get(name)
                if plain is None or (_C.is_grad_enabled() and _C._any_requires_grad(*args)):
                    return kernel(keyset, *args)
                # Nothing to record, and nobody (a tracing mode) between here and the device: skip a turn through the dispatcher.
                if (keyset & _C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in _DEVICES:
                    return plain(*args)
                return kernel(keyset, *args)
            form = self._forms.get(name)
            if form is None:
                raise RefusedError(
                    f"{self.ns}::{name} is an inference operator: it has no derivative under torch.func transforms or "
                    "forward-mode differentiation; run the model as it was before sparsify.compile for that"
                )
            return form(*args)

        return run


def autocast_rule(op: torch._ops.OpOverload, device: str) -> Callable[..., Tensor]:
    """`x` goes to the autocast dtype, as in `F.linear`; what trains keeps its precision, so its gradient arrives in it."""
    key = {"cpu": _C.DispatchKey.AutocastCPU, "cuda": _C.DispatchKey.AutocastCUDA}[device]

    def rule(x: Tensor, *rest: object) -> Tensor:
        with _C._ExcludeDispatchKeyGuard(_C.DispatchKeySet(key)):
            return op(x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)), *rest)

    return rule


LIBRARY = OperatorLibrary()
