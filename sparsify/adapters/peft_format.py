"""PEFT's LoRA directories, read as adapters of low-rank deltas: the function that PEFT computes, or an error that says why not.

    adapter_config.json        ──▶  `sparsify.adapters.peft_config`: an allow-list of fields
    adapter_model.safetensors  ──▶  base_model.model.<module>.lora_A.weight (r, in)    .lora_B.weight (out, r)
                                    base_model.model.<parameter>                        trained in full (modules_to_save, bias)

PiSSA and OLoRA take their first factors `B₀A₀` out of the base whenever PEFT loads the adapter, so the change of the weight is
`s · (B A − B₀ A₀)`: a low-rank change of twice the rank, which is what is read.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.adapters.adapter import VALUE_DTYPES, Adapter, Delta
from sparsify.adapters.peft_config import PLAIN, Settings, read_config
from sparsify.adapters.peft_experts import read_packed
from sparsify.adapters.peft_tokens import SIDES, module_of, read_low_rank, read_rows
from sparsify.errors import AdapterError
from sparsify.files import strict_json
from sparsify.files.strict_json import short
from sparsify.files.tensors import Part, TensorFile
from sparsify.model.convolutions import why_not_convolution
from sparsify.model.linears import is_conv1d
from sparsify.plan import nearest
from sparsify.plan.name_patterns import PatternError
from sparsify.program import canonical_names

if TYPE_CHECKING:
    from jaxtyping import Float

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MAX_CONFIG, MAX_DEPTH = 16 << 20, 32
#: largest entry that a change of a weight may reach: beyond it 32-bit arithmetic overflows
LARGEST_CHANGE = 1e30

#: ends of tensor names that stand for a feature of PEFT which is not a plain low-rank change of a linear
FOREIGN_TENSORS = {
    "lora_magnitude_vector": "DoRA's magnitudes",
}


def all_names(canonical: Mapping[str, str]) -> dict[str, list[str]]:
    """First name of a tensor → every name that it has."""
    names: dict[str, list[str]] = {}
    for name, first in canonical.items():
        names.setdefault(first, []).append(name)
    return names


def place(host: nn.Module, module: str) -> tuple[int, str]:
    """Where PEFT puts the adapted module: an attribute of its parent. A module in two places is adapted in the first alone."""
    parent, _, leaf = module.rpartition(".")
    return id(host.get_submodule(parent)), leaf


def is_peft(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (Path(directory) / CONFIG).is_file()


def read(
    directory: str | os.PathLike[str],
    host: nn.Module,
    shapes: Mapping[str, torch.Size] | None = None,
    base: Callable[[str], Tensor] | None = None,
) -> Adapter:
    """Read a PEFT LoRA directory for a model. Nothing of the model is touched.

    shapes: stored shape of every parameter, where the host's own say something else (packed weights). base: the stored base value
    of a weight in original coordinates, for the beginnings that are residuals of it.

    Raises AdapterError: damaged or hostile files, other adapter types, features that are not a plain low-rank change (named), and
    tensors that do not fit the model or the configuration.
    """
    path = Path(directory)
    try:
        config = strict_json.read(path / CONFIG, AdapterError, MAX_CONFIG, depth=MAX_DEPTH)
    except AdapterError as error:
        raise AdapterError(f"{path}: not a readable PEFT adapter ({error})") from error
    settings = read_config(config, str(path))
    if not (path / TENSORS).exists() and (path / PICKLE).exists():
        raise AdapterError(
            f"{path}: {PICKLE} is a pickle, which can run code when it is opened; load the adapter with PEFT and save it again "
            f"(save_pretrained writes {TENSORS})"
        )
    if shapes is None:
        shapes = {name: parameter.shape for name, parameter in host.named_parameters()}
    try:
        file = TensorFile(path / TENSORS, AdapterError, keep_open=True)
    except AdapterError as error:
        raise AdapterError(f"{path}: not a readable PEFT adapter ({error})") from error
    with file:
        reading = Reading(str(path), file, settings, host, dict(shapes), base, canonical_names(host))
        try:
            return Adapter(tuple(reading.deltas()), {}, {"peft": config})
        except PatternError as error:
            raise AdapterError(f"{path}: {error}") from None


@dataclass
class Reading:
    """One file over one model. Everything that headers can tell is checked before data is read."""

    where: str
    file: TensorFile
    settings: Settings
    host: nn.Module
    shapes: dict[str, torch.Size]
    base: Callable[[str], Tensor] | None
    canonical: dict[str, str]
    names: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.names = all_names(self.canonical)

    def fail(self, what: str) -> AdapterError:
        return AdapterError(f"{self.where}: {what}")

    def deltas(self) -> list[Delta]:
        factors, full, rows = self.sort_tensors()
        if not factors and not full and not rows:
            raise self.fail("the file holds no LoRA factors")
        packed = read_packed(self, factors) + read_rows(self, rows)
        embedded = {module for module, sides in factors.items() if sides <= set(SIDES)}
        packed += [read_low_rank(self, module) for module in sorted(embedded)]
        for module in embedded:
            del factors[module]
            self.drop_copy(module, full)
        linears = {module: self.check_factors(module, sides) for module, sides in factors.items()}
        twice = Counter(linears.values()).most_common(1)
        if twice and twice[0][1] > 1:
            raise self.fail(f"{twice[0][0]} is adapted under two names")
        self.check_complete(set(factors) | embedded, set(full))
        values = self.read_full(full)
        found = packed + [self.low_rank(module, param) for module, param in linears.items()]
        empty = torch.empty(0, dtype=torch.int64)
        return found + [Delta(param, "full", empty, value) for param, value in values.items()]

    def sort_tensors(self) -> tuple[dict[str, set[str]], dict[str, str], dict[str, str]]:
        """Module → which factors there are, name of a parameter in the model → tensor in the file, module → tensor of its rows."""
        factors: dict[str, set[str]] = {}
        full: dict[str, str] = {}
        rows: dict[str, str] = {}
        for key in self.file.parts:
            if not key.startswith(PREFIX):
                raise self.fail(f"tensor {short(key)} is not named as PEFT names them ({PREFIX}…)")
            name = key.removeprefix(PREFIX)
            plain = name if name in self.canonical else name.replace(".base_layer.", ".")
            parts = name.split(".")
            if plain in self.canonical:
                full[plain] = key
            elif self.is_leftover(parts):
                continue
            elif len(parts) >= 3 and parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight":
                factors.setdefault(".".join(parts[:-2]), set()).add(parts[-2])
            elif parts[-1] in SIDES:
                factors.setdefault(".".join(parts[:-1]), set()).add(parts[-1])
            elif (module := module_of(name)) is not None:
                rows[module] = key
            else:
                raise self.unknown_tensor(name, parts)
        return factors, full, rows

    def drop_copy(self, module: str, full: dict[str, str]) -> None:
        """PEFT writes the whole embedding beside its factors: that is no change where it is the base, and refused where it is not."""
        key = full.pop(f"{module}.weight", None)
        if key is None:
            return
        if self.base is None:
            raise self.fail(f"the file holds all of {module} beside factors for it, and the base is not at hand here")
        own, value = self.base(self.canonical[f"{module}.weight"]).detach().cpu(), self.finite(module, key)
        if own.shape != value.shape or not torch.equal(own.to(value.dtype), value):
            raise self.fail(
                f"{module} was changed as a whole (resized, or trained in full) beside its factors; {PLAIN}"
            )

    def is_leftover(self, parts: list[str]) -> bool:
        """Whether a tensor is what bias="all" writes a second time for modules_to_save; PEFT computes nothing with it."""
        inner = [part for part in parts if part not in ("modules_to_save", "original_module")]
        name = ".".join(inner)
        return len(inner) == len(parts) - 1 and name in self.canonical and self.wrapper(name) is not None

    def unknown_tensor(self, name: str, parts: list[str]) -> AdapterError:
        for part in parts:
            if part in FOREIGN_TENSORS:
                return self.fail(f"tensor {short(name)} belongs to {FOREIGN_TENSORS[part]}, which is not read; {PLAIN}")
        if parts[-1] == "bias" and "lora_B" in parts:
            return self.fail(f"tensor {short(name)} is a bias of lora_B (lora_bias), which is not read; {PLAIN}")
        if any(part.startswith("lora_") for part in parts):
            return self.fail(
                f"tensor {short(name)} is not named as PEFT's save_pretrained names LoRA factors (…lora_A.weight, …lora_B.weight)"
            )
        return self.fail(f"the model has no parameter {short(name)}{nearest(name, self.canonical)}")

    def check_factors(self, module: str, sides: set[str]) -> str:
        """Everything that headers tell about one adapted linear. Returns the name of its weight in the model."""
        if len(sides) < 2:
            missing = "lora_B" if "lora_A" in sides else "lora_A"
            raise self.fail(f"{module}: lora_A and lora_B are missing or do not fit: there is no {missing}")
        try:
            linear = self.host.get_submodule(module)
        except AttributeError:
            names = [name for name, _ in self.host.named_modules() if name]
            raise self.fail(f"the model has no module {module!r}{nearest(module, names)}") from None
        a, b = (self.file.parts[f"{PREFIX}{module}.{side}.weight"] for side in ("lora_A", "lora_B"))
        if isinstance(linear, nn.Conv1d | nn.Conv2d):
            a, b = self.check_kernels(module, linear, a, b)
        elif not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
            raise self.fail(
                f"{module} is a {type(linear).__name__}; LoRA of nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d and nn.Embedding is read ({PLAIN})"
            )
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
            raise self.fail(f"{module}: lora_A {a.shape} and lora_B {b.shape} are missing or do not fit")
        for entry in (a, b):
            self.check_dtype(module, entry)
        if module not in self.settings.targets:
            raise self.fail(
                f"the file has factors for {module}, which adapter_config.json does not name (target_modules, exclude_modules, "
                "layers_to_transform): PEFT would ignore them"
            )
        if a.shape[0] != self.settings.rank_of(module):
            raise self.fail(
                f"{module}: the factors have rank {a.shape[0]}, adapter_config.json says {self.settings.rank_of(module)}"
            )
        return self.check_weight(module, linear, (b.shape[0], a.shape[1]))

    def check_kernels(self, module: str, owner: nn.Conv1d | nn.Conv2d, a: Part, b: Part) -> tuple[Part, Part]:
        """The two factors of a convolution as matrices, by their headers. Raises AdapterError for what PEFT and we read differently."""
        reason = why_not_convolution(owner)
        odd = [name for name in ("dilation", "padding_mode") if getattr(owner, name) not in ((1,), (1, 1), "zeros")]
        if reason is not None or odd:
            raise self.fail(f"{module}: {reason or f'PEFT leaves {odd[0]} out of the convolution beside it'}")
        fits = a.shape[1:] == tuple(owner.weight.shape[1:]) and set(b.shape[2:]) == {1} and len(b.shape) == len(a.shape)
        if not fits or not a.shape:
            raise self.fail(
                f"{module}: lora_A {a.shape} and lora_B {b.shape} do not fit a kernel {tuple(owner.weight.shape)}"
            )
        return replace(a, shape=(a.shape[0], math.prod(a.shape[1:]))), replace(b, shape=b.shape[:2])

    def check_weight(self, module: str, linear: nn.Module, made: tuple[int, int]) -> str:
        param = self.canonical.get(f"{module}.weight")
        shape = self.shapes.get(param or "")
        if isinstance(linear, nn.Conv1d | nn.Conv2d) and shape is not None:
            shape = torch.Size((shape[0], math.prod(shape[1:])))
        if param is None or shape is None or len(shape) != 2:
            raise self.fail(f"{module} has no two-dimensional weight in this model")
        logical = (shape[1], shape[0]) if is_conv1d(linear) else (shape[0], shape[1])
        if made != logical:
            raise self.fail(f"{module} is {logical} (out, in) here; the file's factors make {made}")
        names = self.names[param]
        if len({place(self.host, name.rpartition(".")[0]) for name in names}) > 1:
            others = ", ".join(name for name in names if name != f"{module}.weight")
            raise self.fail(
                f"{module} is adapted alone, but its weight is also {others} (tied): a change of the shared weight would change both; "
                f"{PLAIN}"
            )
        return param

    def check_dtype(self, name: str, entry: Part) -> None:
        if entry.dtype not in VALUE_DTYPES:
            raise self.fail(f"{name}: values are {entry.dtype}, expected a floating type of 16, 32 or 64 bits")

    def check_complete(self, factors: set[str], full: set[str]) -> None:
        """Refuse a file that lacks what its configuration says was trained."""
        for name, module in self.host.named_modules():
            linear = isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d) or is_conv1d(module)
            if self.settings.targets.named and linear and name not in factors and name in self.settings.targets:
                raise self.fail(f"target_modules names {name}, but the file has no factors for it: it is incomplete")
        for name in self.canonical:
            wrapped = self.wrapper(name)
            if wrapped and self.canonical[name] in self.shapes and name not in full:
                raise self.fail(
                    f"modules_to_save names {wrapped}, but the file has no tensor for {name}: it is incomplete"
                )

    def wrapper(self, name: str) -> str | None:
        """The module that PEFT would copy because `modules_to_save` names it (by the end of its name), outermost first."""
        parts = name.split(".")[:-1]
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return next((p for p in paths if any(p.endswith(saved) for saved in self.settings.saved)), None)

    def read_full(self, full: Mapping[str, str]) -> dict[str, Tensor]:
        """Parameter in the model → the value that replaces it."""
        found: dict[str, Tensor] = {}
        for name, key in full.items():
            param, entry = self.canonical[name], self.file.parts[key]
            if param not in self.shapes:
                self.check_buffer(name, key)
                continue
            if tuple(self.shapes[param]) != entry.shape:
                raise self.fail(f"{name} is {tuple(self.shapes[param])} here, {entry.shape} in the file")
            self.check_dtype(name, entry)
            wrapped = self.wrapper(name)
            outside = [n for n in self.names[param] if wrapped and not f"{n}.".startswith(f"{wrapped}.")]
            if outside and not self.settings.tying:
                raise self.fail(
                    f"{wrapped} was trained apart from {outside[0]}, with which it shares its weight in this model (tied); untie "
                    "the model first, or train with ensure_weight_tying=true"
                )
            value = self.finite(name, key)
            if param in found and not torch.equal(found[param], value):
                raise self.fail(f"{name} and {param} are one parameter in this model (tied), but differ in the file")
            found[param] = value
        return found

    def check_buffer(self, name: str, key: str) -> None:
        """A buffer may stand in the file when it is what the model has already."""
        owner, _, leaf = name.rpartition(".")
        own = getattr(self.host.get_submodule(owner), leaf)
        entry = self.file.parts[key]
        same = tuple(own.shape) == entry.shape and own.dtype == entry.dtype
        if not same or not torch.equal(own.detach().cpu(), self.file.read(key)):
            raise self.fail(
                f"{name} is a buffer whose value differs from the model's; copy it into the model before loading"
            )

    def finite(self, name: str, key: str) -> Tensor:
        value = self.file.read(key)
        if not bool(torch.isfinite(value).all()):
            raise self.fail(f"{name}: values are not finite")
        return value

    def low_rank(self, module: str, param: str) -> Delta:
        a = self.finite(module, f"{PREFIX}{module}.lora_A.weight").float()
        b = self.finite(module, f"{PREFIX}{module}.lora_B.weight").float()
        a, b = a.flatten(1), b.flatten(1)  # of kernels
        if self.settings.residual and isinstance(self.host.get_submodule(module), nn.Conv1d | nn.Conv2d):
            raise self.fail(
                f"{module}: init_lora_weights is {self.settings.residual!r}, which PEFT does not have for convolutions"
            )
        scale = self.settings.scale_of(module)
        self.check_sizes(module, a, b, scale)
        transposed = is_conv1d(self.host.get_submodule(module))
        if self.settings.residual:
            first_a, first_b = self.first_factors(module, param, a.shape[0], scale, transposed)
            a, b = torch.cat([a, first_a]), torch.cat([b, -first_b], dim=1)
        return Delta(param, "lora", torch.empty(0, dtype=torch.int64), b, transposed, a, scale)

    def check_sizes(
        self, name: str, a: Float[Tensor, "*experts r m"], b: Float[Tensor, "*experts n r"], scale: float
    ) -> None:
        if float(a.abs().max()) * float(b.abs().max()) * a.shape[-2] * max(abs(scale), 1.0) > LARGEST_CHANGE:
            raise self.fail(f"{name}: the factors are so large that their product overflows")

    def first_factors(
        self, module: str, param: str, rank: int, scale: float, transposed: bool
    ) -> tuple[Float[Tensor, "r m"], Float[Tensor, "n r"]]:
        """`(A₀, B₀)` that PEFT takes out of the base when it loads a PiSSA or OLoRA adapter."""
        word = self.settings.residual
        if self.base is None:
            raise self.fail(f"init_lora_weights is {word!r}, a residual of the base, which is not at hand here")
        weight = self.base(param).detach().float().cpu()
        weight = weight.t() if transposed else weight
        if rank > min(weight.shape) or scale <= 0:
            raise self.fail(f"{module}: rank {rank} and scale {scale:g} cannot begin with {word!r}")
        if word == "olora":
            if transposed:
                raise self.fail(f"{module} is a Conv1D, for which PEFT's {word!r} is not defined; {PLAIN}")
            q, r = torch.linalg.qr(weight)
            return r[:rank].contiguous(), q[:, :rank].contiguous()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        return root.unsqueeze(1) * vh[:rank], u[:, :rank] * root
