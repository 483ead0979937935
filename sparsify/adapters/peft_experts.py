"""Low-rank changes of packed experts in PEFT's folders: `target_parameters`, which adapts a 3-D parameter of a module.

    experts.base_layer.lora_A.weight (E·r, in)    experts.base_layer.lora_B.weight (out, r·E)    of the first adapted parameter
    experts.lora_A.weight, …                                                                     of the last one, which PEFT wraps last

Row `e·r + i` of A and column `i·E + e` of B are those of expert e. PEFT takes a weight for `(E, out, in)` unless its module says
`is_transposed`; where a module stores `(E, in, out)` and does not say so (Llama 4), A and B change places.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.adapters.adapter import Delta
from sparsify.errors import AdapterError
from sparsify.model.packed_experts import GroupedLinear, form_of

if TYPE_CHECKING:
    from sparsify.adapters.peft_format import Reading

PREFIX = "base_model.model."
INSIDE = ".base_layer"


def is_packed(delta: Delta) -> bool:
    """Whether a delta is of a weight of packed experts (of single entries, it cannot be told)."""
    return delta.kind != "full" and delta.kind != "buffer" and delta.values.dim() == 3


def plain_param(host: nn.Module, param: str) -> tuple[str, str]:
    """`(module of experts, leaf)` of a packed weight in the user's model."""
    owner, _, leaf = param.rpartition(".")
    if isinstance(host.get_submodule(owner), GroupedLinear):
        owner, _, leaf = owner.rpartition(".")
    return owner, leaf


def wrapped_order(experts: nn.Module, leaves: Iterable[str]) -> list[str]:
    """Adapted parameters of a module as PEFT wraps them: in order of registration, the last outermost."""
    known = experts.__dict__.get("parameter_order") or tuple(experts._parameters)
    wanted = set(leaves)
    return [name for name in known if name in wanted]


def stored_turned(experts: nn.Module) -> bool:
    """Whether the packed weights of a module are `(E, in, out)`."""
    first = next((m for m in experts.children() if isinstance(m, GroupedLinear)), None)
    if first is not None:
        return first.conv1d
    form = form_of(experts)
    return form is not None and form[2]


def trade_places(experts: nn.Module) -> bool:
    """Whether PEFT reads the weight the other way round than it is multiplied, so that A and B change places."""
    return stored_turned(experts) and not getattr(experts, "is_transposed", False)


def packed_tensors(host: nn.Module, deltas: Iterable[Delta]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """`(tensors of the folder, rank by adapted parameter)` of low-rank changes of packed experts.

    Raises AdapterError for other kinds of changes, which `target_parameters` has no form for, and for a single expert.
    """
    found: dict[str, dict[str, Delta]] = {}
    for delta in deltas:
        if delta.kind != "lora":
            raise AdapterError(
                f"export_lora: {delta.param} has trained {delta.kind}s of packed experts, and PEFT's target_parameters holds low-rank "
                "factors alone; merge() and save the whole model"
            )
        owner, leaf = plain_param(host, delta.param)
        if delta.values.shape[0] == 1:
            raise AdapterError(
                f"export_lora: {delta.param} has one expert, which PEFT takes for a matrix; merge() and save the model"
            )
        found.setdefault(owner, {})[leaf] = delta
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for owner, by_leaf in found.items():
        experts = host.get_submodule(owner)
        order = wrapped_order(experts, by_leaf)
        for depth, leaf in enumerate(reversed(order)):
            delta = by_leaf[leaf]
            assert delta.a is not None
            a, b = delta.a.float(), delta.values.float() * delta.scale
            if trade_places(experts):
                a, b = b.mT, a.mT
            name = f"{PREFIX}{owner}{INSIDE * depth}"
            count, rank, width = a.shape
            tensors[f"{name}.lora_A.weight"] = a.reshape(count * rank, width).contiguous()
            tensors[f"{name}.lora_B.weight"] = b.permute(1, 2, 0).reshape(b.shape[1], rank * count).contiguous()
            ranks[f"{owner}.{leaf}"] = rank
    return tensors, ranks


def read_packed(reading: Reading, factors: dict[str, set[str]]) -> list[Delta]:
    """The changes of packed experts in a folder; takes their entries out of `factors` (module → which factors are there).

    Raises AdapterError for factors that are missing, that no parameter is named for, or of other shapes.
    """
    targets = reading.settings.parameters
    if not targets:
        return []
    found: list[Delta] = []
    for owner, leaves in targeted(reading.host, targets).items():
        experts = reading.host.get_submodule(owner)
        order = wrapped_order(experts, leaves)
        for depth, leaf in enumerate(reversed(order)):
            module = f"{owner}{INSIDE * depth}"
            if factors.pop(module, set()) != {"lora_A", "lora_B"}:
                raise reading.fail(
                    f"target_parameters names {owner}.{leaf}, but the file has no factors for it: it is incomplete"
                )
            found.append(read_one(reading, experts, f"{owner}.{leaf}", module))
    if not found:
        raise reading.fail(
            f"target_parameters names {', '.join(targets[:3])}, and no 3-D parameter of this model is called so"
        )
    return found


def targeted(host: nn.Module, targets: Iterable[str]) -> dict[str, list[str]]:
    """Module of experts → its parameters that end in one of the names, as PEFT matches them."""
    wanted = tuple(targets)
    found: dict[str, list[str]] = {}
    for name, parameter in host.named_parameters():
        if parameter.dim() != 3:
            continue
        owner, leaf = plain_param(host, name)
        plain = f"{owner}.{leaf}"
        if leaf not in found.get(owner, []) and any(plain == t or plain.endswith(f".{t}") for t in wanted):
            found.setdefault(owner, []).append(leaf)
    return found


def read_one(reading: Reading, experts: nn.Module, plain: str, module: str) -> Delta:
    held = getattr(experts, plain.rpartition(".")[2])
    param = f"{plain}.weight" if isinstance(held, GroupedLinear) else plain
    count, first, second = reading.shapes[param]
    turned, trade = stored_turned(experts), trade_places(experts)
    n, m = (second, first) if turned and not trade else (first, second)  # as PEFT sees it
    rank = reading.settings.rank_of(plain)
    scale = reading.settings.scale_of(plain)
    parts = [reading.file.parts[f"{PREFIX}{module}.{side}.weight"] for side in ("lora_A", "lora_B")]
    wanted = [(count * rank, m), (n, rank * count)]
    for part, shape in zip(parts, wanted, strict=True):
        reading.check_dtype(plain, part)
        if tuple(part.shape) != shape:
            raise reading.fail(
                f"{plain}: a factor is {tuple(part.shape)} in the file, expected {shape} for {count} experts of rank {rank}"
            )
    a = reading.finite(plain, f"{PREFIX}{module}.lora_A.weight").float().reshape(count, rank, m)
    b = reading.finite(plain, f"{PREFIX}{module}.lora_B.weight").float().reshape(n, rank, count).permute(2, 0, 1)
    if trade:
        a, b = b.mT, a.mT
    reading.check_sizes(plain, a, b, scale)
    empty = torch.empty(0, dtype=torch.int64)
    return Delta(param, "lora", empty, b.contiguous(), turned, a.contiguous(), scale)


__all__ = ["is_packed", "packed_tensors", "read_packed"]
