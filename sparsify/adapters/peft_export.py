"""Exact export to PEFT's LoRA directory: a slice delta is a low-rank matrix with a one-hot factor.

columns   ΔW = Δ · onehot(channels)      lora_B = Δ (n, s)            lora_A = one-hot rows (s, m)
rows      ΔW = onehot(channels)ᵀ · Δ     lora_B = one-hot columns     lora_A = Δ (s, m)

What trained in full goes where PEFT loads it to the same function:

a whole module of its own        modules_to_save: PEFT puts a copy of the module in its place, so *everything* the module holds is written
the bias of an adapted linear    <module>.base_layer.bias, bias="lora_only"
another bias                     <module>.bias, bias="all"
(packed experts and rows of embeddings: see `sparsify.adapters.peft_experts` and `peft_tokens`)
tied, shared, or a name whose    the parameter itself under each of its names, which PEFT loads into the base (as it does resized
end other modules have too       embeddings), so that what is tied stays tied
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sparsify.adapters.adapter import Adapter, Delta
from sparsify.adapters.delta_kinds import PeftLayer, known_kind
from sparsify.adapters.peft_config import ends_in
from sparsify.adapters.peft_experts import is_packed, packed_tensors
from sparsify.adapters.peft_format import CONFIG, PREFIX, TENSORS, all_names, place
from sparsify.adapters.peft_tokens import ALONE, BESIDE, alone, embedding_factors, is_rows, rows_in_peft
from sparsify.errors import AdapterError
from sparsify.files import kinds
from sparsify.files.atomic import committing
from sparsify.files.strict_json import Json
from sparsify.files.tensors import write_tensors
from sparsify.model.linears import owner_name
from sparsify.plan.name_patterns import Regex
from sparsify.program import canonical_names

if TYPE_CHECKING:
    from jaxtyping import Float

LOW_RANK = ("column", "row", "lora")
WHOLE = ("full", "buffer")


def lora_factors(delta: Delta, shape: tuple[int, int]) -> tuple[Float[Tensor, "r m"], Float[Tensor, "n r"]]:
    """`(A (r, in), B (out, r))` with `B A` equal to the delta; `shape` is the logical `(out, in)`."""
    values = delta.values.float()
    if delta.kind == "lora":
        assert delta.a is not None
        return delta.a.float(), values * delta.scale
    size = shape[1] if delta.kind == "column" else shape[0]
    onehot = torch.zeros(delta.rank, size)
    onehot[torch.arange(delta.rank), delta.channels] = 1.0
    return (onehot, values) if delta.kind == "column" else (values, onehot.t().contiguous())


def peft_layer(delta: Delta, shape: tuple[int, int]) -> PeftLayer:
    """What PEFT holds of a change of a weight `shape (out, in)`."""
    kind = known_kind(delta.kind)
    if kind is None:
        return PeftLayer(*lora_factors(delta, shape))
    assert not isinstance(kind.peft, str)
    return kind.peft(delta)


@dataclass(frozen=True)
class Exported:
    """What goes into the two files."""

    tensors: dict[str, Tensor]
    config: dict[str, object]

    def write(self, directory: str | os.PathLike[str]) -> Path:
        """Write both files, the tensors first. Returns the directory."""
        path = Path(directory)
        kinds.refuse_beside(path, kinds.PEFT, CONFIG, AdapterError)
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.tensors.items()}
        with committing() as commit:  # what PEFT looks for first appears last
            write_tensors(path / TENSORS, tensors, {"format": "pt"}, commit)
            with commit.writing(path / CONFIG) as file:
                file.write(json.dumps(self.config, indent=2).encode())
        return path


def export(
    adapter: Adapter,
    host: nn.Module,
    shapes: Mapping[str, torch.Size],
    base_of: Callable[[str], Tensor],
    base: str | None,
) -> Exported:
    """What PEFT must read to compute the same function over the base.

    shapes: stored shape of every parameter of the host. base_of: the base value of a parameter, in original coordinates.
    base: where PEFT finds the base, for `base_model_name_or_path`.

    Raises AdapterError for what PEFT cannot compute: linears that stand in two places, sparse parts, nothing low-rank at all.
    """
    if not adapter.deltas:
        raise AdapterError("export_lora: the adapter is empty")
    for delta in adapter.deltas:
        kind = known_kind(delta.kind)
        if kind is not None and isinstance(kind.peft, str):
            raise AdapterError(f"export_lora: {delta.param} has a change of kind {delta.kind!r}: {kind.peft}")
        if kind is None and delta.kind not in LOW_RANK + WHOLE:
            raise AdapterError(
                f"export_lora: {delta.param} has a change of kind {delta.kind!r}, which PEFT does not know"
            )
    return Export(adapter, host, shapes, base_of, all_names(canonical_names(host))).make(base)


@dataclass
class Export:
    """One adapter over one host, on its way to PEFT's names."""

    adapter: Adapter
    host: nn.Module
    shapes: Mapping[str, torch.Size]
    base_of: Callable[[str], Tensor]
    names: dict[str, list[str]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    settings: dict[str, dict[str, Json]] = field(default_factory=dict)
    bias: Literal["none", "lora_only", "all"] = "none"

    def make(self, base: str | None) -> Exported:
        low = [d for d in self.adapter.deltas if d.kind not in WHOLE]
        if not low:
            raise AdapterError(
                "export_lora: nothing low-rank was trained, and PEFT's LoRA needs a linear to adapt; save_adapter keeps what trained"
            )
        packed = [d for d in low if is_packed(d)]
        rows = [d for d in low if is_rows(self.host, self.names, d)]
        low = [d for d in low if not is_packed(d) and d not in rows]
        tensors, self.packed = packed_tensors(self.host, packed)
        self.tensors |= tensors
        for delta in low:
            self.add_factors(delta)
        if rows and not low and not packed:
            return self.rows_alone(rows, base)
        for delta in rows:
            self.add_rows(delta, BESIDE)
        self.add_whole({d.param: d.values for d in self.adapter.deltas if d.kind in WHOLE})
        return Exported(self.tensors, self.config(base, any(d.transposed for d in low)))

    def add_factors(self, delta: Delta) -> None:
        module = owner_name(delta.param)
        places = {place(self.host, owner_name(name)) for name in self.names[delta.param]}
        if len(places) > 1 or not module:
            others = ", ".join(name for name in self.names[delta.param])
            raise AdapterError(
                f"export_lora: the linear of {delta.param} stands in several places of the model ({others}), and PEFT would adapt the "
                "first alone; merge() and save the whole model"
            )
        stored = tuple(self.shapes[delta.param])
        if isinstance(owner := self.host.get_submodule(module), nn.Conv1d | nn.Conv2d):
            stored = (stored[0], math.prod(stored[1:]))
            self.check_convolution(module, owner)
        logical = (stored[1], stored[0]) if delta.transposed else (stored[0], stored[1])
        layer = peft_layer(delta, logical)
        a, b = layer.a, layer.b
        for setting, value in layer.config.items():
            self.settings.setdefault(setting, {})[module] = value
        name = f"{PREFIX}{module}."
        if isinstance(self.host.get_submodule(module), nn.Embedding):
            self.tensors |= {name + leaf: factor for leaf, factor in embedding_factors(a, b).items()}
            self.ranks[module] = a.shape[0]
            return
        if isinstance(owner, nn.Conv1d | nn.Conv2d):
            a = a.reshape(a.shape[0], *owner.weight.shape[1:])
            b = b.reshape(*b.shape, *[1] * (owner.weight.dim() - 2))
        if name + "lora_A.weight" in self.tensors:
            a = torch.cat([self.tensors[name + "lora_A.weight"], a])
            b = torch.cat([self.tensors[name + "lora_B.weight"], b], dim=1)
        self.tensors[name + "lora_A.weight"], self.tensors[name + "lora_B.weight"] = a.contiguous(), b.contiguous()
        self.tensors |= {name + leaf: tensor.contiguous() for leaf, tensor in layer.tensors.items()}
        self.ranks[module] = a.shape[0]

    def add_rows(self, delta: Delta, end: str) -> None:
        module, values = rows_in_peft(self.host, self.names[delta.param], delta, self.base_of(delta.param))
        self.tensors[PREFIX + module + end] = values
        self.rows[module] = delta.channels.tolist()

    def rows_alone(self, rows: Sequence[Delta], base: str | None) -> Exported:
        """PEFT's LoRA needs a linear to adapt; rows alone are an adapter of another type."""
        whole = next((d.param for d in self.adapter.deltas if d.kind in WHOLE), None)
        if whole is not None:
            raise AdapterError(
                f"export_lora: rows and {whole} trained, which PEFT holds together beside a LoRA alone; save_adapter keeps what trained"
            )
        for delta in rows:
            self.add_rows(delta, ALONE)
        return Exported(self.tensors, alone(base, self.rows))

    @staticmethod
    def check_convolution(module: str, owner: nn.Conv1d | nn.Conv2d) -> None:
        """PEFT gives its own convolution kernel, stride and padding of the adapted one, and nothing else."""
        odd = "dilation" if any(d != 1 for d in owner.dilation) else ""
        odd = odd or ("padding_mode" if owner.padding_mode != "zeros" else "")
        if odd:
            raise AdapterError(
                f"export_lora: {module} has {odd}={getattr(owner, odd)!r}, which PEFT leaves out of the convolution beside it; merge() "
                "and save the whole model"
            )

    # --- what trained in full ------------------------------------------------------------------------------------------------

    def add_whole(self, values: Mapping[str, Tensor]) -> None:
        owners: dict[str, list[str]] = {}
        for param in values:
            owners.setdefault(owner_name(param), []).append(param)
        lone = {owner for owner, params in owners.items() if {p.rpartition(".")[2] for p in params} == {"bias"}}
        lone = {o for o in lone if len(list(self.host.get_submodule(o).parameters(recurse=False))) > 1}
        wrapped = [owner for owner in owners if owner not in lone and self.can_wrap(owner)]
        outer = [o for o in wrapped if not any(o.startswith(f"{other}.") for other in wrapped)]
        for owner, params in owners.items():
            if any(owner == o or owner.startswith(f"{o}.") for o in outer):
                continue
            for param in params:
                for name in self.names[param]:
                    self.tensors[PREFIX + self.name_in_peft(name)] = values[param]
                if param.rpartition(".")[2] == "bias" and self.bias != "all":
                    self.bias = "lora_only" if owner in self.ranks else "all"
        for owner in outer:
            self.saved.add(owner)
            self.add_module(owner, values)

    def name_in_peft(self, name: str) -> str:
        """PEFT moves the parameters of an adapted linear under `base_layer`."""
        owner, _, leaf = name.rpartition(".")
        return f"{owner}.base_layer.{leaf}" if owner in self.ranks else name

    def can_wrap(self, owner: str) -> bool:
        """Whether `modules_to_save` can name this module: it alone ends in the name, nothing in it is tied or adapted."""
        module = self.host.get_submodule(owner) if owner else None
        if module is None or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            return False
        paths = [path for path, _ in self.host.named_modules(remove_duplicate=False)]
        if [path for path in paths if path.endswith(owner)] != [owner]:
            return False
        excluded = Regex(rf"(^|.*\.){re.escape(owner)}($|\..*)")
        if any(excluded.match(linear) for linear in self.ranks):
            return False
        held = [name for name in self.names if name.startswith(f"{owner}.")]
        apart = [n for name in held for n in self.names[name] if not n.startswith(f"{owner}.")]
        known = all(name in self.shapes for name, _ in module_parameters(self.host, owner))
        return not apart and known

    def add_module(self, owner: str, values: Mapping[str, Tensor]) -> None:
        """Everything that a module holds: trained values, and the base for the rest. Buffers as they are now."""
        first = {name: param for param, names in self.names.items() for name in names}
        for name, _ in module_parameters(self.host, owner):
            param = first[name]
            self.tensors[PREFIX + name] = values[param] if param in values else self.base_of(param)
        for name, buffer in persistent_buffers(self.host, owner):
            self.tensors[PREFIX + name] = values.get(first[name], buffer)

    # --- the configuration ---------------------------------------------------------------------------------------------------

    def config(self, base: str | None, conv1d: bool) -> dict[str, object]:
        ranks = {**self.ranks, **self.packed}
        top = max(ranks.values())
        # anchored and escaped: PEFT matches keys of these tables as regular expressions over the end of a name
        own = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != top}
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "r": top,
            "lora_alpha": top,
            "lora_dropout": 0.0,
            "bias": self.bias,
            "fan_in_fan_out": conv1d,
            "target_modules": self.targets(),
            "modules_to_save": sorted(self.saved) or None,
            "rank_pattern": own,
            "alpha_pattern": dict(own),
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            **({"target_parameters": sorted(self.packed)} if self.packed else {}),
            **({"trainable_token_indices": self.rows} if self.rows else {}),
            **self.common_settings(),
        }

    def common_settings(self) -> dict[str, Json]:
        """Settings of registered kinds, which hold for the whole folder. Raises AdapterError where a linear is without."""
        for setting, values in self.settings.items():
            without = sorted(set(self.ranks) - set(values))
            if without or len({repr(value) for value in values.values()}) > 1:
                other = without[0] if without else next(iter(values))
                raise AdapterError(
                    f"export_lora: {setting!r} holds for every linear of a PEFT folder, and {other} trained otherwise than "
                    f"{next(reversed(values))}; train them in two adapters, or merge() and save the whole model"
                )
        return {setting: next(iter(values.values())) for setting, values in self.settings.items()}

    def targets(self) -> list[str] | str:
        """The adapted modules by name; one regular expression where the end of another module's name is the same."""
        named = set(self.ranks)
        if all(path in named or not ends_in(path, named) for path, _ in self.host.named_modules()):
            return sorted(named)
        return "(?:" + "|".join(re.escape(module) for module in sorted(named)) + ")"


def module_parameters(host: nn.Module, owner: str) -> list[tuple[str, Tensor]]:
    return [(f"{owner}.{n}", p) for n, p in host.get_submodule(owner).named_parameters(remove_duplicate=False)]


def persistent_buffers(host: nn.Module, owner: str) -> list[tuple[str, Tensor]]:
    found = []
    for path, module in host.get_submodule(owner).named_modules():
        prefix = f"{owner}.{path}." if path else f"{owner}."
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                found.append((prefix + leaf, buffer))
    return found
