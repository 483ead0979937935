"""`torch.compile(model, backend="sparsify")`: the joint graph's passes, then another backend.

    Dynamo ──▶ joint graph (forward + backward) ──share, fuse, recompute──▶ partition ──▶ Inductor, or any other compiler

Sparsify's operators stay single nodes. What the passes change is what lives between forward and backward: a saved input exists
once however many linears read it, and what can be computed again from saved products of matrices is computed again, so
that of SwiGLU only gate and up are kept and of Down's input at most the trained slice.

    torch.compile(model, backend="sparsify")                                  over Inductor
    torch.compile(model, backend="sparsify", mode="max-autotune")             Inductor's modes and options pass through
    torch.compile(model, backend=sparsify.backend("aot_eager"))               over another backend
    torch.compile(step, backend=sparsify.backend(loss_chunk=512))             a large vocabulary's logits never as a whole
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import fx

from sparsify.errors import PlanError
from sparsify.lowering.torch_compile.chunk_losses import Returned, chunk_losses
from sparsify.lowering.torch_compile.joint_passes import fuse_gradients, recompute_cheap, share_copies


def run_joint_passes(graph: fx.Graph) -> None:
    """All passes over a joint graph, in place."""
    share_copies(graph)
    fuse_gradients(graph)
    recompute_cheap(graph)
    graph.lint()


class JointPasses:
    """The passes in the form that Inductor wants: called with the graph, and with a key for its caches.

    before: a pass that the user had configured, run first.
    """

    def __init__(self, before: Callable[[fx.Graph], object] | None = None) -> None:
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        run_joint_passes(graph)

    def uuid(self) -> str:
        here = Path(__file__)
        text = here.read_text(encoding="utf-8") + (here.parent / "joint_passes.py").read_text(encoding="utf-8")
        own = getattr(self.before, "uuid", None)
        earlier = own() if own is not None else ""
        return hashlib.sha256((text + str(earlier)).encode()).hexdigest()


def inductor_pass(before: Callable[[fx.Graph], object] | None) -> JointPasses:
    """`JointPasses` as a subclass of Inductor's own class, which its caches insist on; made late to keep imports lean."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return type("JointPasses", (JointPasses, CustomGraphPass), {})(before)


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[object], mode: str | None, options: Mapping[str, object]
) -> Callable[..., object]:
    from torch import _inductor
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches = {**(_inductor.list_mode_options(mode) if mode else {}), **options}
    patches = {name.replace("-", "_"): value for name, value in patches.items()}
    before = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    patches["joint_custom_pre_pass"] = inductor_pass(before)
    return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[return-value, arg-type]


def partition(joint: fx.GraphModule, inputs: Sequence[object], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Run the passes, then split by minimal cut: of what the backward needs, save what takes the fewest bytes."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    run_joint_passes(joint.graph)
    joint.recompile()
    return min_cut_rematerialization_partition(joint, inputs, **options)


def compile_with(
    compiler: Callable[..., object], gm: fx.GraphModule, inputs: Sequence[object]
) -> Callable[..., object]:
    """AOTAutograd with our partition; `compiler(graph, inputs)` gets forward and backward separately."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=compiler, partition_fn=partition)(gm, inputs)


def run_eagerly(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
    from functorch.compile import make_boxed_func

    return make_boxed_func(gm.forward)


def find_compiler(name: str) -> Callable[..., object]:
    """The graph compiler of a registered backend."""
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    if name in ("eager", "aot_eager"):
        return run_eagerly
    if name not in list_backends(exclude_tags=None):
        raise PlanError(
            f"backend: unknown inner backend {name!r}; torch knows {', '.join(list_backends(exclude_tags=None))}"
        )
    found = lookup_backend(name)
    return getattr(found, "kwargs", {}).get("fw_compiler", found)


class Backend:
    """A Dynamo backend: our passes over `inner`, which is "inductor", a registered backend's name, or a graph compiler."""

    def __init__(
        self,
        inner: str | Callable[..., object],
        mode: str | None,
        options: Mapping[str, object],
        loss_chunk: int | None = None,
        returned_logits: Returned = "keep",
    ) -> None:
        self.inner, self.mode, self.options = inner, mode, dict(options)
        self.loss_chunk = loss_chunk
        self.returned_logits: Returned = returned_logits
        if loss_chunk is not None and (
            isinstance(loss_chunk, bool) or not isinstance(loss_chunk, int) or loss_chunk < 1
        ):
            raise PlanError(f"backend: loss_chunk={loss_chunk!r}, expected a positive number of tokens")
        if returned_logits not in get_args(Returned):
            raise PlanError(f"backend: returned_logits={returned_logits!r}, expected 'keep' or 'nan'")
        self.__name__ = "sparsify"
        if inner != "inductor" and (mode or options):
            raise PlanError(f"backend: mode and options belong to Inductor, not to {inner!r}")
        self.compiler = None if inner == "inductor" else find_compiler(inner) if isinstance(inner, str) else inner

    def __call__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[object],
        *,
        mode: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Callable[..., object]:
        if self.loss_chunk is not None:
            chunk_losses(gm, self.loss_chunk, self.returned_logits)
        if self.compiler is not None:
            if mode or options:
                raise PlanError(f"backend: mode and options belong to Inductor, not to {self.inner!r}")
            return compile_with(self.compiler, gm, inputs)
        return compile_with_inductor(gm, inputs, mode or self.mode, {**self.options, **(options or {})})


def backend(
    inner: str | Callable[..., object] = "inductor",
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    loss_chunk: int | None = None,
    returned_logits: Returned = "keep",
) -> Backend:
    """A backend for `torch.compile(model, backend=sparsify.backend(…))`.

    inner: what compiles the two graphs after our passes: "inductor", "aot_eager" or another registered name, or a function
        `(graph, inputs) → callable`. mode, options: Inductor's.
    loss_chunk: compute the loss of a head in chunks of so many tokens while training, so that of the logits `(tokens, vocabulary)`
        and of their gradient at most one chunk exists. The loss must be computed inside of what is compiled, as `cross_entropy` of
        a plain linear head; where it is not, the logits stay and a warning says why.
    returned_logits: what a graph that returns its logits beside the loss does, as transformers' models do: "keep" them, and with
        them their memory, or return "nan" of their shape, so that whatever is computed from them says so.
    Raises PlanError for an unknown inner backend and for values that are none of these.
    """
    return Backend(inner, mode, options or {}, loss_chunk, returned_logits)


def sparsify_backend(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., object]:
    """The entry point behind `backend="sparsify"`."""
    return backend()(gm, inputs, mode=mode, options=options)


def saved_tensors(forward: fx.GraphModule, outputs: int) -> list[torch.Tensor]:
    """Fake values of what a partitioned forward hands to its backward: its results after the first `outputs`."""
    results = next(n for n in forward.graph.nodes if n.op == "output").args[0]
    kept = [n for n in results[outputs:] if isinstance(n, fx.Node) and n.op != "placeholder"]
    return [n.meta["val"] for n in kept if isinstance(n.meta.get("val"), torch.Tensor)]
