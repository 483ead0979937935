"""State dicts of a host: the live one is torch's own; files speak original names, shapes and order; both go in again.

    host.state_dict()                     live: what named_parameters() and named_buffers() say, under the same names
    host.sparsify.original_state_dict()   original: what the compiled model's own state_dict() would say, parts folded in
    host.save_pretrained(dir)             writes the original one (`SavePretrained`)
    host.save_pretrained(dir, state_dict=live or None)   original, and the trained parts beside it in full precision: what
                                          Trainer's checkpoints hold, so that a resumed run goes on exactly (`with_parts`)
    host.load_state_dict(state)           takes any of them: a marker in each module (`layout.MARKER`) tells them apart

A dict without markers is compared with the frozen tensors of the host. One that fits neither way (a checkpoint of another
base) is taken as original if it holds every original tensor of the modules that it names, and refused otherwise.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError, StateError
from sparsify.methods.packed import QuantizedMixin
from sparsify.model.packed_experts import GroupedLinear, plain_names, renamed
from sparsify.model.sharded import cut_like, is_sharded, local, replicated, whole, whole_parameters
from sparsify.modules.adapted import AdaptedMixin
from sparsify.modules.layout import MARKER, Layout, added_leaves, fold, layout_of, packed_leaves

State = dict[str, object]

# --- out -------------------------------------------------------------------------------------------------------------------


@dataclass
class SaveHook:
    """After torch has filled a module's entries: its marker is up to date, and beside pieces its buffers are DTensors, too.

    Tools that walk a sharded state dict (accelerate's efficient loading) take every entry for a DTensor. An object, because
    torch sets attributes on hooks, and so that it deep-copies with its layout.
    """

    layout: Layout

    def __call__(self, module: nn.Module, state: State, prefix: str, _metadata: object) -> None:
        self.layout.mark(module)
        reference = next((p for p in module._parameters.values() if is_sharded(p)), None)
        if reference is not None:
            own = (*added_leaves(module), *packed_leaves(module))
            for name in (prefix + leaf for leaf in own):
                value = state.get(name)
                if name.rpartition(".")[2] in module._buffers and isinstance(value, Tensor):
                    state[name] = replicated(value, reference)


def modules_with_layout(host: nn.Module) -> Iterator[tuple[str, nn.Module, Layout]]:
    """`(prefix, module, layout)` under every name that a module has."""
    for path, module in host.named_modules(remove_duplicate=False):
        layout = layout_of(module)
        if layout is not None and MARKER in module._buffers:
            yield f"{path}." if path else "", module, layout


def original(
    host: nn.Module,
    state: Mapping[str, object],
    *,
    with_parts: bool = False,
    gather_to: torch.device | None = None,
) -> State:
    """A live state dict of the host in original names, shapes and order, trained parts folded into their weights.

    with_parts: the parts stay beside the weights, for a checkpoint that resumes exactly. Entries of modules that lie as the
    user's own do pass through; tied tensors stay one. Raises StateError for a live dict of another layout.

    gather_to: where to put what was in pieces (fully_shard), one tensor after another, so that no device holds the model whole.
    """
    found = dict(state)
    placed: dict[int, Tensor] = {}
    done: dict[tuple[int, str], Tensor] = {}  # tied tensors stay one
    for prefix, module, layout in modules_with_layout(host):
        marker = found.pop(prefix + MARKER, None)
        if marker is None:
            continue  # not live, or another part of the model
        check_marker(marker, module, layout, prefix)
        own_leaves = (*module._parameters, *module._buffers)
        leaves = {leaf: value for leaf in own_leaves if isinstance(value := found.get(prefix + leaf), Tensor)}
        for leaf, value in leaves.items():
            own = getattr(module, leaf)
            folded = leaf == "weight" and isinstance(module, AdaptedMixin)
            if folded or leaf in layout.moves:
                key = (id(own), leaf)
                if key not in done:
                    refuse_meta(value, prefix + leaf)
                    current = (
                        fold(module, leaves) if isinstance(module, AdaptedMixin) and folded else whole(value.detach())
                    )
                    done[key] = layout.to_original(leaf, current)
                    if gather_to is not None and is_sharded(value):
                        done[key] = done[key].to(gather_to)
                found[prefix + leaf] = done[key]
        added = (*added_leaves(module), *packed_leaves(module))
        kept = set(module.added_leaves()) if with_parts and isinstance(module, AdaptedMixin) else set()
        for leaf in set(leaves) & set(added) - kept:
            del found[prefix + leaf]
    for name, value in found.items() if gather_to is not None else ():
        if is_sharded(value):
            if id(value) not in placed:
                placed[id(value)] = whole(value).to(gather_to)
            found[name] = placed[id(value)]
    return renamed(found, plain_names(host))


def refuse_meta(value: object, name: str) -> None:
    if isinstance(value, Tensor) and value.is_meta:
        raise StateError(
            f"{name} is on the meta device (offloaded, or not loaded yet), and its original form cannot be computed there; "
            "bring the model back (accelerate: remove_hook_from_submodules and load its weights), then save it"
        )


def marker_in(module: nn.Module, state: State, prefix: str) -> object:
    """The marker that a dict brings. The module's own is none: torch completes a dict that it distributes over ranks with what the
    model has, and so puts it beside tensors of any layout."""
    found, own = state.get(prefix + MARKER), module._buffers.get(MARKER)
    if (
        isinstance(found, Tensor)
        and own is not None
        and not found.is_meta
        and local(found).data_ptr() == local(own).data_ptr()
    ):
        return None
    return found


def check_marker(marker: object, module: nn.Module, layout: Layout, prefix: str) -> None:
    """Raise StateError when a live dict's tensors lie otherwise than this module's."""
    value = whole(marker)
    if not isinstance(value, Tensor) or value.is_meta:
        return
    if bytes(value.detach().cpu().flatten().tolist()) != layout.digest(module):
        raise StateError(other_layout(prefix))


def other_layout(prefix: str) -> str:
    return (
        f"{prefix}{MARKER}: this is the live state of a host with another layout: its tensors have these names, but other "
        "units or channels were chosen there, or its parts have another shape, scale or merge state. Load it into a host that was "
        "compiled with the same plan, seed and calibration; or take original_state_dict() or save_adapter() of that host, which "
        "do not depend on the layout"
    )


# --- in --------------------------------------------------------------------------------------------------------------------


@dataclass
class RootHook:
    """Before the host, or a part of it, loads anything: every module's entries are judged, so that what is refused leaves nothing
    half loaded. On every module that holds one with a layout; the outermost one that loads judges for those inside."""

    def __call__(self, host: nn.Module, state: State, prefix: str, *_rest: object) -> None:
        names = {f"{prefix}{plain}": f"{prefix}{own}" for own, plain in plain_names(host).items()}
        for name in [name for name in names if name in state]:  # packed experts, called as in the user's model
            state[names[name]] = state.pop(name)
        everything = list(modules_with_layout(host))
        if all(seen_already(module, layout, state, prefix + path) for path, module, layout in everything):
            return
        own = {prefix + path + MARKER for path, _, _ in everything}
        for name in state:
            if name.startswith(prefix) and name.rpartition(".")[2] == MARKER and name not in own:
                raise StateError(other_layout(name.removesuffix(MARKER)))
        complete = holds_originals(host, state, prefix)
        try:
            for path, module, layout in everything:
                sure = (
                    marker_in(module, state, prefix + path) is not None
                )  # then nothing has to be compared, and gathered
                with contextlib.nullcontext() if sure else whole_parameters(module):
                    live = judge(module, layout, state, prefix + path, complete)
                    layout.verdict = verdict_on(module, state, prefix + path, live)
                    check_entries(module, layout, state, prefix + path, live)
        except BaseException:
            for _, _, layout in everything:
                layout.verdict = None
            raise


@dataclass
class LoadHook:
    """Before a module loads its entries: they become live ones of this module's layout."""

    layout: Layout

    def __call__(
        self, module: nn.Module, state: State, prefix: str, metadata: Mapping[str, object], *_rest: object
    ) -> None:
        own = module._buffers.get(MARKER)
        if own is None:
            return
        layout, seen = self.layout, self.layout.verdict
        layout.verdict = None
        pieces = {leaf: state.get(prefix + leaf) for leaf in (*module._parameters, *module._buffers)}
        sure = marker_in(module, state, prefix) is not None
        with contextlib.nullcontext() if sure else whole_parameters(module):
            live = seen[1] if seen is not None and seen == verdict_on(module, state, prefix, seen[1]) else None
            if live is None:  # loaded by itself, or again under another name
                live = judge(module, layout, state, prefix, complete=True)
                check_entries(module, layout, state, prefix, live)
            note_base(module, layout, state, prefix, live)
            if live:
                take_support(module, layout, state, prefix)
            else:
                for leaf, piece in pieces.items():
                    if is_sharded(piece):
                        state[prefix + leaf] = whole(piece)
                reorder(module, layout, state, prefix)
        weight = state.get(prefix + "weight")
        entries = set(getattr(module, "entries_of_weight", ())) & set(module._parameters)
        scratch = entries and (live or "weight" not in layout.moves)
        assigned = bool(metadata.get("assign_to_params_buffers"))
        if scratch and assigned and isinstance(weight, Tensor) and not is_sharded(weight):
            state[prefix + "weight"] = weight.clone()  # what trains is written over it, and it is the caller's
        for leaf, parameter in module._parameters.items():
            value = state.get(prefix + leaf)
            if is_sharded(parameter) and isinstance(value, Tensor):
                piece = pieces.get(leaf)
                state[prefix + leaf] = cut_like(value, piece if is_sharded(piece) else parameter)
            elif is_sharded(value):
                state[prefix + leaf] = whole(value)
        for leaf in module._buffers:
            if is_sharded(value := state.get(prefix + leaf)):
                state[prefix + leaf] = whole(value)
        state[prefix + MARKER] = torch.tensor(list(layout.digest(module)), dtype=torch.uint8, device=own_device(module))
        for leaf in packed_leaves(module):
            state.setdefault(prefix + leaf, getattr(module, leaf))


def own_device(module: nn.Module) -> torch.device:
    found = next((t.device for t in module._parameters.values() if t is not None), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def verdict_on(module: nn.Module, state: State, prefix: str, live: bool) -> tuple[int, bool]:
    """What is remembered of a judgement: whose entries it was about, and what it said."""
    found = next((state[prefix + n] for n in module._parameters if prefix + n in state), None)
    return id(found), live


def seen_already(module: nn.Module, layout: Layout, state: State, prefix: str) -> bool:
    return layout.verdict is not None and layout.verdict == verdict_on(module, state, prefix, layout.verdict[1])


def holds_originals(host: nn.Module, state: State, prefix: str) -> bool:
    """Whether a dict has, under one of its names, every original tensor of the modules whose layout is our own."""
    present: dict[tuple[int, str], bool] = {}
    for path, module, _ in modules_with_layout(host):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and leaf not in (*added_leaves(module), *packed_leaves(module)):
                name = prefix + path + leaf
                present[id(parameter), leaf] = present.get((id(parameter), leaf), False) or name in state
    return all(present.values())


def judge(module: nn.Module, layout: Layout, state: State, prefix: str, complete: bool) -> bool:
    """Whether the entries of one module are live ones of this layout (True) or original ones (False); StateError for neither.

    Without a marker the frozen tensors tell: they equal the host's as they lie, or after reordering, bit for bit.
    """
    marker = marker_in(module, state, prefix)
    if marker is not None:
        check_marker(marker, module, layout, prefix)
        return True
    weight = state.get(prefix + "weight")
    adapted = isinstance(module, AdaptedMixin)
    if isinstance(module, QuantizedMixin) and isinstance(weight, Tensor):
        return weight.numel() == 0
    as_live, as_original = set(), set()
    leaves: dict[str, None] = dict.fromkeys([*layout.moves, *(["weight"] if adapted else [])])
    for leaf in list(leaves):
        value, own = state.get(prefix + leaf), getattr(module, leaf, None)
        if not isinstance(value, Tensor) or not isinstance(own, Tensor) or value.shape != own.shape:
            del leaves[leaf]  # torch says itself what does not fit
            continue
        if value.is_meta or own.is_meta:
            return False
        value, places = (
            whole(value).detach(),
            trained_places(module, state, prefix) if leaf == "weight" and adapted else None,
        )
        as_live |= {leaf} if same_frozen(module, value, own, places) else set()
        as_original |= {leaf} if same_frozen(module, layout.to_current(leaf, value), own, places) else set()
    if not leaves:
        return True  # nothing here depends on the layout, or only parts, which have no other form
    only_live, only_original, neither = (
        as_live - as_original,
        as_original - as_live,
        set(leaves) - as_live - as_original,
    )
    if bool(only_live) != bool(only_original):
        return bool(only_live)
    if neither or only_live:
        if only_live or not (complete or keeps_base(module)):
            raise StateError(
                f"{prefix[:-1] or 'the model'}: these tensors are neither this host's nor, in the original order, those of the model "
                f"that it was compiled from, and {MARKER}, which would say how they lie, is missing. Load a complete live state "
                "dict (host.state_dict(), buffers included) or a complete checkpoint of the original model"
            )
        return False
    if not adapted or not isinstance(weight, Tensor) or any(prefix + n in state for n in module.trained_leaves):
        return True  # both readings are the same: nothing moved, and the parts come beside an unchanged base
    if keeps_base(module):
        return not complete
    own = whole(module.weight).detach()
    return not complete and torch.equal(whole(weight).to(own.device, own.dtype), own)


def keeps_base(module: nn.Module) -> bool:
    """Whether the frozen base stays when a folded weight is loaded, because what trained does not follow from it."""
    return isinstance(module, AdaptedMixin) and not module.follows_from_weight


def trained_places(module: nn.Module, state: State, prefix: str) -> list[Tensor]:
    """Supports of sparse parts, the module's own and the dict's: the base is written over there."""
    if not isinstance(module, AdaptedMixin):
        return []  # merged
    own = {leaf: t for leaf, t in module._buffers.items() if t is not None}
    brought = {leaf: state.get(prefix + leaf) for leaf in module.part_buffers}
    found = []
    for tensors in (own, {leaf: t for leaf, t in brought.items() if isinstance(t, Tensor)}):
        found += module.supports({leaf: whole(t) for leaf, t in tensors.items()})
    return found


def same_frozen(module: nn.Module, value: Tensor, own: Tensor, places: list[Tensor] | None) -> bool:
    """Whether two stored tensors agree bit for bit; of an adapted weight (`places`) outside of what trains in it."""
    value, own = value.to(own.device, own.dtype), own.detach()
    if places is not None:
        value, own = (
            value.clone(memory_format=torch.contiguous_format),
            own.clone(memory_format=torch.contiguous_format),
        )
        for tensor in (value, own):
            clear_trained(module, tensor, places)
    return torch.equal(value, own)


def clear_trained(module: nn.Module, stored: Tensor, places: list[Tensor]) -> None:
    """Zeros at the trained channels and entries of a contiguous stored weight: what lies there is scratch."""
    for index in places:
        stored.view(-1).index_fill_(0, index.to(stored.device), 0)
    if isinstance(module, AdaptedMixin):
        module.clear_trained(stored)


def check_entries(module: nn.Module, layout: Layout, state: State, prefix: str, live: bool) -> None:
    """Raise StateError for what must not be loaded; nothing is written."""
    leaf, index, own = support_in(module, layout, state, prefix)
    if isinstance(module, AdaptedMixin) and index is not None and own is not None and layout.adopt is not None:
        if own.is_meta or index.is_meta:
            known = layout.adopt.known()
            if (
                not live
                or index.is_meta
                or known is None
                or not torch.equal(whole(index).cpu().long(), known.cpu().long())
            ):
                raise StateError(
                    f"{prefix}{leaf}: the model is on the meta device, and its support there cannot be compared with the "
                    "checkpoint's; load it into a model that has its buffers (accelerate: fsdp_cpu_ram_efficient_loading: false)"
                )
        elif module.support_open(whole(index)) and not module.support_open():
            raise StateError(f"{prefix}{leaf}: the checkpoint's mask was still open, this model's is chosen")
    weight = state.get(prefix + "weight")
    if live or not isinstance(module, AdaptedMixin) or not isinstance(weight, Tensor):
        return
    if weight.shape != module.stored_shape():
        return  # torch says so itself
    current = layout.to_current("weight", whole(weight))
    if keeps_base(module):
        check_parts(module, state, prefix, current)
        return
    for leaf, region in module.read_from(current).items():
        value = whole(state.get(prefix + leaf))
        if not isinstance(value, Tensor):
            continue
        known = value.shape == region.shape and not value.is_meta and not region.is_meta
        if known and not near(masked(module, leaf, value), region):
            raise StateError(
                f"{prefix}{leaf} is not what {prefix}weight holds in the trained channels: these two do not come from one "
                f"checkpoint of a host with this selection, and {MARKER}, which would say how a live state dict lies, is missing"
            )


def support_in(
    module: nn.Module, layout: Layout, state: State, prefix: str
) -> tuple[str, Tensor | None, Tensor | None]:
    """`(leaf, the support that a dict brings, the module's own)` of a part whose support may be another one; None for none."""
    leaf = module.support_leaf if isinstance(module, AdaptedMixin) else ""
    brought, own = state.get(prefix + leaf), module._buffers.get(leaf)
    if not leaf or layout.adopt is None or own is None or not isinstance(brought, Tensor):
        return leaf, None, own
    return leaf, brought, own


def masked(module: AdaptedMixin, leaf: str, block: Tensor) -> Tensor:
    bits = module.trained_masks().get(leaf)
    return block if bits is None or bits.is_meta else torch.ops.sparsify.apply_mask(block, bits.to(block.device))


def near(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding in the coarser dtype, by norm."""
    rounding = max(torch.finfo(t.dtype).eps for t in (a, b))
    error = (a.double() - b.to(a.device).double()).norm() / b.double().norm().clamp_min(1e-30)
    return bool(error <= max(1e-5, 4 * rounding))


def check_parts(module: AdaptedMixin, state: State, prefix: str, current: Tensor) -> None:
    """Sparse and low-rank parts do not follow from the folded weight: they must be there, and belong to this base."""
    own = [n for n in module.trained_leaves if n in module._parameters]
    missing = [n for n in own if prefix + n not in state]
    if missing:
        raise StateError(
            f"{prefix}weight: the checkpoint holds the folded weight but not {missing[0]}, and the parts cannot be told apart "
            "again; load it into an uncompiled model, or load the adapter with model.sparsify.load_adapter"
        )
    parts = {n: whole(value) for n in own if isinstance(value := state[prefix + n], Tensor)}
    held_parts = {n: module.get_parameter(n) for n in own}
    if any(n not in parts or parts[n].shape != held_parts[n].shape for n in own):
        return  # torch says so itself
    without_base = module.weight.is_meta and not hasattr(module, "packed_names")
    if without_base and not current.is_meta and not module.base_follows(parts):
        raise StateError(
            f"{prefix}weight: the model is on the meta device and has no base, and the checkpoint's weight has a trained "
            "part folded in, from which the base does not follow exactly; load it into a model that has its base "
            "(accelerate: fsdp_cpu_ram_efficient_loading: false)"
        )
    held = (
        module.weight,
        *held_parts.values(),
        *parts.values(),
        *module._parameters.values(),
        *module._buffers.values(),
        current,
    )
    if any(t is not None and t.is_meta for t in held):
        return
    leaf, own_index = module.support_leaf, module._buffers.get(module.support_leaf)
    index = state.get(prefix + leaf)
    places: dict[str, Tensor] = {}
    if isinstance(index, Tensor) and own_index is not None and index.shape == own_index.shape:
        places[leaf] = whole(index)
    if not near(fold(module, parts | places), current):
        raise StateError(
            f"{prefix}weight: the checkpoint was made over another base, and only its trained parts would be taken; "
            "compile the base that it was trained on (for Quantize, with the same format), then load it"
        )


def note_base(module: nn.Module, layout: Layout, state: State, prefix: str, live: bool) -> None:
    """Tell the handle when the frozen part of a weight is about to change: what it knows of the base is another base's then."""
    weight = state.get(prefix + "weight")
    if layout.base_loaded is None:
        return
    if isinstance(module, QuantizedMixin):
        for leaf in module.packed_names:
            incoming, own = state.get(prefix + leaf), getattr(module, leaf)
            if not isinstance(incoming, Tensor) or incoming.is_meta or own.is_meta:
                continue
            if not torch.equal(whole(incoming).to(own), own):
                layout.base_loaded(None)
        return
    own = module.weight
    if not isinstance(weight, Tensor) or not isinstance(own, Tensor):
        return
    if is_sharded(own):
        return
    if weight.is_meta or own.is_meta or weight.shape != own.shape:
        return
    weight = whole(weight).detach()
    if not live:
        if keeps_base(module):
            return  # the base stays
        weight = layout.to_current("weight", weight)
    if not same_frozen(module, weight, own, trained_places(module, state, prefix)):
        held = live or any(prefix + leaf in state for leaf in getattr(module, "entries_of_weight", ()))
        layout.base_loaded(None if held else weight)


def take_support(module: nn.Module, layout: Layout, state: State, prefix: str) -> None:
    """Adopt a support that the host does not have yet."""
    _, index, own = support_in(module, layout, state, prefix)
    if index is None or own is None or layout.adopt is None or not isinstance(module, AdaptedMixin):
        return
    index = whole(index)
    if index.shape != own.shape or own.is_meta or module.support_open(index):
        return
    if module.support_open() or not torch.equal(index.to(own), own):
        layout.adopt(index)


def reorder(module: nn.Module, layout: Layout, state: State, prefix: str) -> None:
    """Original entries of one module become live ones, in `state`."""
    for leaf in layout.moves:
        tensor, own = state.get(prefix + leaf), getattr(module, leaf)
        shape = module.stored_shape() if leaf == "weight" and isinstance(module, AdaptedMixin) else own.shape
        if isinstance(tensor, Tensor) and tensor.shape == shape:
            state[prefix + leaf] = layout.to_current(leaf, tensor)
    weight = state.get(prefix + "weight")
    if not isinstance(module, AdaptedMixin) or not isinstance(weight, Tensor) or weight.shape != module.stored_shape():
        return
    if module.follows_from_weight:
        for leaf, region in module.read_from(weight).items():  # from the file, or else from what its weight holds there
            own, value = module._parameters[leaf], state.get(prefix + leaf)
            if own is not None and (not isinstance(value, Tensor) or value.shape != own.shape):
                state[prefix + leaf] = region.to(own.dtype, copy=True).contiguous()
        return
    take_support(module, layout, state, prefix)
    if not module.weight.is_meta:
        state[prefix + "weight"] = module.weight.detach()  # the frozen base stays; the parts carry the training
    elif isinstance(module, QuantizedMixin):
        state[prefix + "weight"] = weight.new_empty(0)


# --- memory shared with the user's model -------------------------------------------------------------------------------------


@dataclass
class Unshare:
    """Before a module loads: parameters that still share memory with the user's model get their own, where values differ."""

    leaves: set[str]

    def __call__(self, module: nn.Module, state: State, prefix: str, *_rest: object) -> None:
        if any(is_sharded(p) for p in module._parameters.values()):
            return  # fully_shard gave every parameter memory of its own
        for leaf in sorted(self.leaves):
            incoming, own = state.get(prefix + leaf), module._parameters.get(leaf)
            if not isinstance(own, nn.Parameter) or not isinstance(incoming, Tensor) or own.is_meta or incoming.is_meta:
                continue
            if incoming.shape == own.shape and not torch.equal(whole(incoming).to(own.device, own.dtype), own.detach()):
                own.data = own.data.clone()
                self.leaves.discard(leaf)


# --- save_pretrained -----------------------------------------------------------------------------------------------------------


class OnHost:
    """A method of the user's class, as an instance attribute of the host that says it otherwise.

    An object that holds the host, so that a deep copy or a pickle of the host carries one that holds the copy.
    """

    method = ""

    def __init__(self, host: nn.Module) -> None:
        self.host = host

    @property
    def of_class(self) -> FunctionType:
        return getattr(type(self.host), self.method)

    @property
    def __wrapped__(self) -> MethodType:
        return self.of_class.__get__(self.host)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    @property
    def __name__(self) -> str:
        return self.method

    @property
    def __func__(self) -> FunctionType:
        return self.of_class


def trains_packed_experts(host: nn.Module) -> bool:
    """Whether something trains in a 3-D weight of experts."""
    return any(isinstance(module, AdaptedMixin) and isinstance(module, GroupedLinear) for module in host.modules())


class SavePretrained(OnHost):
    """`host.save_pretrained`: what is written has the original model's names, shapes and order, and nothing else.

    Whoever passes `state_dict` (Trainer does, also as None) writes a checkpoint: a live one, or the host's, is translated, and the
    trained parts are written beside the weights so that the run resumes exactly. One in original names is written as it is.
    Of packed experts that train, a checkpoint keeps the model's own form: transformers would write expert by expert, under names which
    Trainer, when it resumes, loads nowhere. `from_pretrained` opens both.
    """

    method = "save_pretrained"

    def __call__(self, save_directory: object, *args: object, **kwargs: object) -> object:
        host = self.host
        if kwargs.get("distributed_checkpoint"):
            raise SparsifyError(
                "save_pretrained(distributed_checkpoint=True) writes the live tensors of the host, which only a host of the same plan "
                "reads: use torch.distributed.checkpoint with get_model_state_dict(host), or save_pretrained without it"
            )
        bound = inspect.signature(self.of_class).bind_partial(host, save_directory, *args, **kwargs)
        state = bound.arguments.get("state_dict")
        with_parts = "state_dict" in bound.arguments
        state = original(host, host.state_dict() if state is None else state, with_parts=with_parts)
        bound.arguments["state_dict"] = state
        known = inspect.signature(self.of_class).parameters  # a class of the user's own may not have the option
        if with_parts and "save_original_format" in known and trains_packed_experts(host):
            bound = inspect.signature(self.of_class).bind_partial(
                *bound.args, **{"save_original_format": False, **bound.kwargs}
            )
        return self.of_class(*bound.args, **bound.kwargs)
