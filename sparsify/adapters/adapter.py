"""Adapters: what training changed, in original coordinates, with a hash of the base; read, written, checked.

A file pair per adapter, so that adapters of different runs, seeds and machines can be compared, fused and switched:

    adapter.safetensors   <param>::column|row::channels int64 (s,)     <param>::column|row::delta fp32 (n, s) or (s, m)
                          <param>::sparse::channels int64 (k,) flat    <param>::sparse::delta fp32 (k,)
                          <param>::lora::A fp32 (r, m)                 <param>::lora::delta fp32 (n, r)
                          (of packed experts delta and A have a leading axis, the experts)
                          the JSON document also stands in its metadata, which is what a reader trusts
                          <param>::full::delta, <param>::buffer::delta any shape
                          <param>::…::exact_places int64, ::exact: trained values that base + delta rounds away from
    adapter.json          the same document for people and tools: format version, base hashes, entries, plan, versions

Both appear together, the tensor file last: it is the commit point, complete without the other. Where the two disagree, what counts is
the document in the tensor file, and a warning says so. Version 2 has a content hash of every tensor and of the document
(`sparsify.files.tensors`), which is compared when the file is read; version 1, without, can still be read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.adapters.delta_kinds import REGISTERED, known_kind
from sparsify.errors import AdapterError, SparsifyError
from sparsify.files import kinds, strict_json
from sparsify.files.atomic import committing, shown
from sparsify.files.atomic import write_bytes as write_atomic  # noqa: F401  (its former name)
from sparsify.files.strict_json import Json, short
from sparsify.files.tensors import TensorFile, write_tensors
from sparsify.plan.installed import find

if TYPE_CHECKING:
    from jaxtyping import Float

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
TENSORS, DOCUMENT = "adapter.safetensors", "adapter.json"
HASH_SAMPLES = 65536
#: in `info`, of an adapter over a packed base: weights whose units were brought together before they were packed
MOVED = "moved_before_packing"
VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
KINDS = ("column", "row", "sparse", "lora", "full", "buffer")


@dataclass(frozen=True)
class Delta:
    """The change of one weight, in original coordinates of the *stored* tensor.

    kind: "column" or "row": whole logical channels `channels (s,)`, `values (n, s)` or `(s, m)`, added to the base; "sparse":
        entries `channels (k,)`, flat in the stored weight, `values (k,)` added; "lora": `scale · values (n, r) · a (r, m)` added;
        "full": a parameter that trained as a whole, `values` replace it; "buffer": a buffer that moved while training (running
        statistics, counters; any dtype), likewise. `channels` is empty for "lora", "full" and "buffer". Any other is a kind of a
        registered method (`sparsify.adapters.delta_kinds`): `values` is its tensor "delta", `more` holds the others by name.
        A convolution's weight counts as a matrix, flattened behind its outputs.
    transposed: the stored weight is `(in, out)` (Conv1D). Of packed experts values and `a` have a leading axis, the experts.
    exact: for "column", "row" and "sparse", of the shape of `values`: the trained value itself where base + values rounds to another
        one, NaN elsewhere (`sparsify.modules.exact`); None where nothing does. It belongs to the base that `Adapter.bases` names.
    """

    param: str
    kind: str
    channels: Tensor
    values: Tensor
    transposed: bool = False
    a: Tensor | None = None
    scale: float = 1.0
    exact: Tensor | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of a registered kind by its name in files."""
        return self.values if name == "delta" else self.more.get(name)

    @property
    def axis(self) -> int:
        """Axis of the stored tensor on which the channels lie."""
        logical = 1 if self.kind == "column" else 0
        return (1 - logical if self.transposed else logical) + self.values.dim() - 2

    @property
    def rank(self) -> int:
        """Rank of the change: trained channels, or the inner width of the low-rank factors."""
        return int(self.values.shape[-1]) if self.kind == "lora" else int(self.channels.numel())

    def stored(self) -> Tensor:
        """Values laid out as in the stored tensor, channels on `axis`."""
        return self.values.mT if self.transposed else self.values


@dataclass(frozen=True)
class Adapter:
    """Everything that one training run changed. `bases` maps each touched parameter to the hash of its base value."""

    deltas: tuple[Delta, ...]
    bases: dict[str, str]
    info: dict[str, Json] = field(default_factory=dict)

    def called(self, names: Mapping[str, str]) -> Adapter:
        """The same adapter with other names for some parameters."""
        deltas = tuple(replace(d, param=names.get(d.param, d.param)) for d in self.deltas)
        return replace(self, deltas=deltas, bases={names.get(p, p): h for p, h in self.bases.items()})

    def nbytes(self) -> int:
        held = [t for d in self.deltas for t in (d.values, *d.more.values())]
        return sum(t.nbytes for t in held) + sum(d.channels.numel() * 8 for d in self.deltas)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over shape, dtype and evenly spaced entries: all of them below 131,072, else at least 65,536.

    Cheap on any size and equal on every machine: it tells *bases* apart. A base that differs in entries between the sampled ones
    only has the same hash. What an adapter file holds has hashes over every byte (`sparsify.files.tensors`).
    """
    flat = tensor.detach().reshape(-1)
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if flat.device.type != "meta" and flat.numel():
        step = max(1, flat.numel() // HASH_SAMPLES)
        sample = flat[::step].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Document:
    """What a file says of its adapter. whole: all of it, as it stands there; entries: one a delta, not checked yet."""

    whole: dict[str, Json]
    version: int
    entries: list[dict[str, Json]]
    bases: dict[str, str]
    info: dict[str, Json]


def to_document(adapter: Adapter) -> dict[str, object]:
    entries = [
        {
            "param": d.param,
            "kind": d.kind,
            "transposed": d.transposed,
            "channels": int(d.channels.numel()),
            "shape": list(d.values.shape),
            "scale": d.scale,
            **({} if d.exact is None else {"exact": int((~d.exact.isnan()).sum())}),
        }
        for d in adapter.deltas
    ]
    return {
        "format": "sparsify-adapter",
        "format_version": FORMAT_VERSION,
        "entries": entries,
        "bases": adapter.bases,
        "info": adapter.info,
    }


def save(adapter: Adapter, directory: str | os.PathLike[str]) -> Path:
    """Write the adapter into `directory` (made if missing). Returns the directory.

    Raises AdapterError for a directory that holds another kind of adapter or a pruning run, and SparsifyError when it cannot be written;
    what was there is then unchanged.
    """
    path = Path(directory)
    kinds.refuse_beside(path, kinds.ADAPTER, TENSORS, AdapterError)
    document = to_document(adapter)
    tensors: dict[str, Tensor] = {}
    for delta in adapter.deltas:
        tensors[f"{delta.param}::{delta.kind}::channels"] = delta.channels.to("cpu", torch.int64).contiguous()
        tensors[f"{delta.param}::{delta.kind}::delta"] = delta.values.detach().cpu().contiguous()
        for name, tensor in delta.more.items():
            tensors[f"{delta.param}::{delta.kind}::{name}"] = tensor.detach().cpu().contiguous()
        if delta.a is not None:
            tensors[f"{delta.param}::{delta.kind}::A"] = delta.a.detach().cpu().contiguous()
        if delta.exact is not None:
            flat = delta.exact.detach().cpu().flatten()
            places = (~flat.isnan()).nonzero().flatten()
            tensors[f"{delta.param}::{delta.kind}::exact_places"] = places
            tensors[f"{delta.param}::{delta.kind}::exact"] = flat[places]
    text = json.dumps(document, sort_keys=True)
    with committing() as commit:
        with commit.writing(path / DOCUMENT) as file:
            file.write(json.dumps(document, indent=1, sort_keys=True).encode())
        write_tensors(path / TENSORS, tensors, {"sparsify": text}, commit)
    return path


def load(directory: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter directory; AdapterError says what is wrong with it. Nothing but the files is looked at."""
    path = Path(directory)
    if not is_file(path):
        kinds.refuse_two_adapters(path)
    file = path if is_file(path) else path / TENSORS
    if not is_file(file):
        raise AdapterError(f"{shown(path)}: no {TENSORS} there; is it an adapter that save_adapter wrote?")
    with TensorFile(file, AdapterError, check=False, keep_open=True) as opened:
        document = read_document(opened.metadata.get("sparsify"), file)
        deltas = tuple(read_deltas(document, opened))
        opened.check_content(required=document.version > 1)
    if file.name == TENSORS:
        compare_readable(file.with_name(DOCUMENT), document.whole)
    return Adapter(deltas, document.bases, document.info)


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def compare_readable(path: Path, document: dict[str, Json]) -> None:
    """Warn when the readable copy says something else than the document that counts."""
    if not os.path.lexists(path):
        return
    try:
        same = strict_json.read(path) == document
    except SparsifyError:
        same = False
    if not same:
        warnings.warn(
            f"{shown(path)} is damaged or of another adapter; what counts is the document inside {TENSORS}, which was read",
            stacklevel=4,
        )


def read_document(text: str | None, file: Path) -> Document:
    where = shown(file)
    if text is None:
        raise AdapterError(f"{where}: not written by sparsify (no 'sparsify' metadata)")
    document = strict_json.parse(text, f"{where}: its metadata is not JSON", AdapterError)
    if not isinstance(document, dict) or document.get("format") != "sparsify-adapter":
        raise AdapterError(f"{where}: not a sparsify adapter")
    version = document.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise AdapterError(
            f"{where}: format version {short(version)}; this sparsify reads versions 1 to {FORMAT_VERSION}; a newer one may read it"
        )
    bases, entries, info = document.get("bases"), document.get("entries"), document.get("info", {})
    if not strict_json.is_texts(bases):
        raise AdapterError(f"{where}: 'bases' must map parameters to hashes")
    if not strict_json.is_objects(entries):
        raise AdapterError(f"{where}: 'entries' must be a list of objects")
    if not isinstance(info, dict):
        raise AdapterError(f"{where}: 'info' must be an object")
    return Document(document, version, entries, bases, info)


def read_deltas(document: Document, opened: TensorFile) -> Iterator[Delta]:
    file, keys = shown(opened.path), opened.parts
    seen: set[str] = set()
    kinds_of: dict[str, set[str]] = {}
    for entry in document.entries:
        param, kind, transposed = entry.get("param"), entry.get("kind"), entry.get("transposed")
        if not isinstance(param, str) or not isinstance(kind, str) or not isinstance(transposed, bool):
            raise AdapterError(f"{file}: malformed entry {short(entry, 200)}")
        own = known_kind(kind)
        if kind not in KINDS and own is None:
            find(kind)
            own = known_kind(kind)
        if kind not in KINDS and own is None:
            raise AdapterError(unknown_kind(file, param, kind, document))
        names = [f"{param}::{kind}::channels", f"{param}::{kind}::delta"]
        names += [f"{param}::{kind}::A"] if kind == "lora" else []
        others = [name for name in own.tensors if name != "delta"] if own is not None else []
        names += [f"{param}::{kind}::{name}" for name in others]
        corrected = "exact" in entry
        names += [f"{param}::{kind}::exact_places", f"{param}::{kind}::exact"] if corrected else []
        scale = entry.get("scale", 1.0)
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
            raise AdapterError(f"{file}: {param}: the scale {short(scale)} is not a finite number")
        if names[0] in seen:
            raise AdapterError(f"{file}: {param} ({kind}) is listed twice")
        seen.update(names)
        together = kinds_of.setdefault(param, set())
        together.add(kind)
        if "full" in together and len(together) > 1:
            raise AdapterError(f"{file}: {param} is listed in full and in parts")
        for name in names:
            if name not in keys:
                raise AdapterError(f"{file}: tensor {name!r} is missing")
        shape, count = entry.get("shape"), entry.get("channels")
        if list(keys[names[1]].shape) != shape or list(keys[names[0]].shape) != [count] or type(count) is not int:
            raise AdapterError(f"{file}: {param}: the tensors have other shapes than the document says")
        if keys[names[0]].dtype != torch.int64:
            raise AdapterError(f"{file}: {param}: channels are {keys[names[0]].dtype}, expected int64")
        for name in names[1:]:
            free = kind == "buffer" or name.endswith("::exact_places")
            if keys[name].dtype not in VALUE_DTYPES and not free:
                raise AdapterError(f"{file}: {param}: values are {keys[name].dtype}, expected a floating type")
        channels, values = opened.read(names[0]), opened.read(names[1])
        if not bool(torch.isfinite(values).all()):
            raise AdapterError(f"{file}: {param}: values are not finite")
        factor = opened.read(names[2]) if kind == "lora" else None
        if factor is not None:
            fits = values.dim() == factor.dim() in (2, 3) and values.shape[:-2] == factor.shape[:-2]
            fits = fits and factor.shape[-2] == values.shape[-1] > 0
            if not fits or not bool(torch.isfinite(factor).all()):
                raise AdapterError(
                    f"{file}: {param}: low-rank factors {tuple(values.shape)}, {tuple(factor.shape)} do not fit"
                )
        if kind == "sparse" and (values.dim() != 1 or values.shape != channels.shape):
            raise AdapterError(f"{file}: {param}: values {tuple(values.shape)} do not fit {channels.numel()} entries")
        side = {"column": 1, "row": 0}.get(str(kind))
        if side is not None and (values.dim() not in (2, 3) or values.shape[side - 2] != channels.numel()):
            raise AdapterError(f"{file}: {param}: values {tuple(values.shape)} do not fit {channels.numel()} channels")
        if kind in ("column", "row", "sparse") and (
            channels.numel() == 0 or int(channels.min()) < 0 or channels.unique().numel() != channels.numel()
        ):
            raise AdapterError(f"{file}: {param}: channels must be distinct and not negative")
        if kind not in ("column", "row", "sparse") and channels.numel():
            raise AdapterError(
                f"{file}: {param}: a change of kind {kind} has no channels, but {channels.numel()} are there"
            )
        exact = read_exact(opened, names[-2], names[-1], entry, values, file) if corrected else None
        more = {name: opened.read(f"{param}::{kind}::{name}") for name in others}
        delta = Delta(param, kind, channels, values, transposed, factor, float(scale), exact, more)
        wrong = own.check(delta) if own is not None else None
        if wrong is not None:
            raise AdapterError(f"{file}: {param}: a change of kind {kind}: {wrong}")
        yield delta
    extra = set(keys) - seen
    if extra:
        raise AdapterError(f"{file}: unexpected tensor {sorted(extra)[0]!r}")


def unknown_kind(file: str, param: str, kind: str, document: Document) -> str:
    """Why a kind that no method of this process has is refused, and what would make it known."""
    plan = document.info.get("plan")
    found = re.findall(r'"rule": "(\w{1,60})"', plan) if isinstance(plan, str) else []
    rules = f" (its plan has the rules {', '.join(dict.fromkeys(found))})" if found else ""
    known = f"; registered here: {', '.join(sorted(REGISTERED))}" if REGISTERED else ""
    return (
        f"{file}: {short(param)}: a change of kind {short(kind)}, which neither sparsify nor a registered method knows{known}. "
        f"Import the module that calls sparsify.methods.register for it{rules}, then read the adapter again"
    )


def read_exact(
    opened: TensorFile, places_name: str, name: str, entry: dict[str, Json], values: Float[Tensor, "*shape"], file: str
) -> Float[Tensor, "*shape"]:
    """Corrections by place → a tensor of the shape of `values`, NaN where there is none."""
    shapes = [list(opened.part(n).shape) for n in (places_name, name)]
    if entry["kind"] not in ("column", "row", "sparse") or shapes != [[entry["exact"]]] * 2:
        raise AdapterError(f"{file}: {name}: the corrections do not fit their entry")
    places, exact = opened.read(places_name), opened.read(name)
    fits = places.dtype == torch.int64 and exact.dtype in VALUE_DTYPES and places.unique().numel() == places.numel()
    if not fits or not bool(torch.isfinite(exact).all()):
        raise AdapterError(f"{file}: {name}: the corrections are not finite values at distinct places")
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < values.numel():
        raise AdapterError(f"{file}: {name}: a correction lies outside of its tensor")
    found = torch.full((values.numel(),), float("nan"), dtype=exact.dtype)
    found[places] = exact
    return found.view(values.shape)


def other_axis(delta: Delta) -> int:
    """Of the two axes of a stored matrix, or of every expert's, the one on which the channels do not lie."""
    lead = delta.values.dim() - 2
    return 1 - (delta.axis - lead) + lead


def check_fits(
    adapter: Adapter, shapes: dict[str, torch.Size], hashes: dict[str, str], where: str, strict: bool
) -> None:
    """Refuse an adapter whose parameters, shapes, channels or base differ from the model's; nothing is written."""
    for delta in adapter.deltas:
        shape = shapes.get(delta.param)
        if shape is None:
            raise AdapterError(f"{where}: the model has no parameter {delta.param!r}")
        if delta.kind in ("full", "buffer"):
            if tuple(delta.values.shape) != tuple(shape):
                raise AdapterError(
                    f"{where}: {delta.param} is {tuple(shape)} here, {tuple(delta.values.shape)} in the file"
                )
            continue
        flat = delta.kind in ("lora", "column") and delta.values.dim() == 2
        if flat and len(shape) > 2:  # kernels, flattened behind their outputs
            shape = torch.Size((shape[0], math.prod(shape[1:])))
        if len(shape) not in (2, 3):
            raise AdapterError(
                f"{where}: {delta.param} has {len(shape)} dimensions here, expected 2, or 3 of packed experts"
            )
        experts, (first, second) = tuple(shape[:-2]), shape[-2:]
        logical = (second, first) if delta.transposed else (first, second)
        own = known_kind(delta.kind)
        if delta.kind != "sparse" and tuple(delta.values.shape[:-2]) != experts:
            raise AdapterError(
                f"{where}: {delta.param} is {tuple(shape)} here; the file has values {tuple(delta.values.shape)}"
            )
        if own is not None:
            sizes = own.sizes(delta)
            wrong = {w: s for w, s in zip(("out", "in"), logical, strict=True) if sizes.get(w, s) != s}
            if wrong:
                raise AdapterError(
                    f"{where}: {delta.param} is {logical} (out, in) here; the file's tensors are for {sizes}"
                )
        elif delta.kind == "lora":
            assert delta.a is not None
            if (delta.values.shape[-2], delta.a.shape[-1]) != logical:
                raise AdapterError(
                    f"{where}: {delta.param} is {logical} (out, in) here; the file's factors make "
                    f"{(delta.values.shape[-2], delta.a.shape[-1])}"
                )
        elif delta.kind == "sparse":
            if int(delta.channels.max()) >= shape.numel():
                raise AdapterError(
                    f"{where}: {delta.param} has {shape.numel()} entries here; the file has entry {int(delta.channels.max())}"
                )
        elif (
            delta.stored().shape[other_axis(delta)] != shape[other_axis(delta)]
            or int(delta.channels.max()) >= shape[delta.axis]
        ):
            raise AdapterError(
                f"{where}: {delta.param} is {tuple(shape)} here; the file has channels up to {int(delta.channels.max())} on "
                f"axis {delta.axis} and {delta.stored().shape[other_axis(delta)]} entries each"
            )
        if strict and hashes.get(delta.param) != adapter.bases.get(delta.param):
            raise AdapterError(
                f"{where}: {delta.param} of this model is not the base that the adapter was trained on (the hash of "
                f"its shape, dtype and sampled entries differs); "
                "load the same base in the same dtype, or pass strict=False to apply the change to this one"
            )
