"""Sparse checkpoints: one safetensors file that holds survivors and one bit per weight.

    model.safetensors      W (n, m)  4 nm bytes fp32            bf16 at 75 %: 2 nm
    sparse.safetensors     W.values (k,) + W.bitmask (⌈nm/8⌉,)  bf16 at 75 %: 0.625 nm

Header metadata: `format` = "sparsify-sparse", `version`, `base` (hash of the dense model that was pruned, optional), and
`entries`: for each compressed tensor its shape, dtype and number of survivors. A file is complete: it opens without its base, whose
hash is there to be checked. Bits are flat and little-endian as in `sparsify.masked`. A tensor is compressed when that makes it smaller;
all others are stored as they are. Values keep their bits exactly, in any dtype.

A file is checked completely before anything is built from it: names, dtypes, shapes, the number of set bits against the number of
values, unused bits. Files are written to a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.masked import MaskedModule, bits_name, mask_modules, masked_parameters, pack_bits, unpack_bits

FORMAT, VERSION = "sparsify-sparse", 1
VALUES, BITMASK = ".sparse_values", ".sparse_bitmask"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MAX_ENTRIES = 1 << 40


class SparseCheckpointError(SparsifyError, ValueError):
    """A sparse checkpoint is damaged, foreign or hostile, or does not fit the model."""


@dataclass(frozen=True)
class Entry:
    """One compressed tensor. survivors: number of stored values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    survivors: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def sparsity(self) -> float:
        return 1 - self.survivors / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SizeReport:
    """Bytes of tensor data: `dense` as an ordinary checkpoint has it, `sparse` as written; per tensor `(dense, sparse)`."""

    dense: int
    sparse: int
    tensors: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        ratio = self.dense / self.sparse if self.sparse else 1.0
        return f"{self.sparse / 2**20:.1f} MiB sparse, {self.dense / 2**20:.1f} MiB dense: {ratio:.2f} times smaller"


def bit_pattern(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers of the same width: exact for every dtype."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order: identifies a dense base model."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def model_hash(model: nn.Module | Mapping[str, Tensor]) -> str:
    """`hash_tensors` of a model's parameters and persistent buffers, tied ones once."""
    return hash_tensors(collect(model, {})[0])


def base_hash(base: nn.Module | str) -> str:
    return base if isinstance(base, str) else model_hash(base)


def stored_bytes(numel: int, survivors: int, itemsize: int) -> int:
    """Bytes of a tensor in a sparse checkpoint: values and bits, or everything when that is not more."""
    return min(survivors * itemsize + (numel + 7) // 8, numel * itemsize)


def compress(tensor: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """`(values, bitmask)`, or None when that is not smaller. Without a mask every nonzero bit pattern survives (so −0.0 does).

    Raises SparseCheckpointError when an entry that the mask drops is not zero.
    """
    if tensor.element_size() not in INTEGERS or tensor.is_complex() or tensor.numel() == 0:
        return None
    flat = bit_pattern(tensor.detach()).reshape(-1)
    kept = flat != 0 if mask is None else mask.reshape(-1)
    values = flat[kept]
    dense = tensor.numel() * tensor.element_size()
    if stored_bytes(tensor.numel(), values.numel(), tensor.element_size()) == dense:
        return None
    return values.view(tensor.dtype), pack_bits(kept)


def save_sparse(
    source: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    base: nn.Module | str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SizeReport:
    """Write a sparse checkpoint atomically.

    source: a module (its state dict, tied tensors once, and its masks if it has any) or tensors by name.
    masks: survivors by name, bool of the tensor's shape; a survivor may be zero and stays a survivor. Tensors without a mask are
        compressed by their zeros when that is smaller.
    base: the dense model that was pruned, or its `model_hash`; `open_sparse(path, base=…)` checks it.
    metadata: further strings for the header. Raises SparseCheckpointError when a masked entry is not zero.
    """
    from safetensors.torch import save_file

    tensors, masks = collect(source, dict(masks or {}))
    stored: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        mask = masks.get(name)
        if mask is not None:
            check_mask(name, tensor, mask)
        packed = compress(tensor.cpu(), None if mask is None else mask.cpu())
        dense = tensor.numel() * tensor.element_size()
        if packed is None:
            stored[name] = tensor.detach().cpu().contiguous()
            sizes[name] = (dense, dense)
            continue
        values, bits = packed
        stored[name + VALUES], stored[name + BITMASK] = values, bits
        entries[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "survivors": values.numel(),
            "masked": mask is not None,
        }
        sizes[name] = (dense, values.numel() * tensor.element_size() + bits.numel())
    header = {"format": FORMAT, "version": str(VERSION), "entries": json.dumps(entries), **(metadata or {})}
    if base is not None:
        header["base"] = base_hash(base)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save_file(stored, temporary, header)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return SizeReport(sum(d for d, _ in sizes.values()), sum(s for _, s in sizes.values()), sizes)


def collect(
    source: nn.Module | Mapping[str, Tensor], masks: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by name (each piece of memory once) and masks, of a module or a mapping."""
    if isinstance(source, nn.Module):
        for name, module, leaf in masked_parameters(source):
            masks.setdefault(name, module.mask(leaf))
        source = source.state_dict()
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.items():
        if name.endswith((VALUES, BITMASK)):
            raise SparseCheckpointError(f"tensor name '{name}' ends like a compressed part")
        place = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor
    unknown = sorted(set(masks) - set(source))
    if unknown:
        raise SparseCheckpointError(f"mask for '{unknown[0]}', but there is no such tensor")
    return tensors, masks


def check_mask(name: str, tensor: Tensor, mask: Tensor) -> None:
    if mask.dtype is not torch.bool or mask.shape != tensor.shape:
        raise SparseCheckpointError(
            f"mask of '{name}': expected bool {tuple(tensor.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    count = int((tensor.detach()[~mask.to(tensor.device)] != 0).sum())
    if count:
        raise SparseCheckpointError(f"'{name}': {count} pruned entries are not zero; they would be lost")


class SparseCheckpoint:
    """A sparse checkpoint, opened and checked. Tensors are read when asked for.

    entries: the compressed tensors. plain: names of the others. base: hash of the dense model, or None.
    """

    def __init__(self, path: str | Path, *, base: nn.Module | str | None = None) -> None:
        self.path = Path(path)
        self.entries, self.masked, self.plain, self.base = read_header(self.path)
        if base is not None:
            self.check_base(base_hash(base))
        for name, entry in self.entries.items():
            check_bits(self.path, name, entry, self.part(name + BITMASK))

    def check_base(self, expected: str) -> None:
        """Raises SparseCheckpointError when the file was not pruned from the dense model with this hash, or does not say."""
        if self.base is None:
            raise SparseCheckpointError(f"{self.path} does not record its base model; open it without base=…")
        if self.base != expected:
            raise SparseCheckpointError(
                f"{self.path} was pruned from another base model (hash {self.base[:12]}…, not {expected[:12]}…); it is "
                "complete and opens without base=…"
            )

    def part(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    @property
    def names(self) -> list[str]:
        return [*self.entries, *self.plain]

    def sparse(self, name: str) -> tuple[Tensor, Tensor]:
        """`(values (k,), bits (⌈numel/8⌉,))` of a compressed tensor."""
        return self.part(name + VALUES), self.part(name + BITMASK)

    def mask(self, name: str) -> Tensor:
        """Survivors of a compressed tensor, bool of its shape."""
        return unpack_bits(self.part(name + BITMASK), self.entries[name].shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor in full, zeros included."""
        if name not in self.entries:
            return self.part(name)
        entry = self.entries[name]
        values, bits = self.sparse(name)
        width = INTEGERS[entry.dtype.itemsize]
        flat = torch.zeros(entry.numel, dtype=width)
        flat[unpack_bits(bits, (entry.numel,))] = values.view(width)
        return flat.view(entry.dtype).view(entry.shape)

    def dense(self) -> dict[str, Tensor]:
        """Everything in full: an ordinary state dict."""
        return {name: self.tensor(name) for name in self.names}

    def csr(self, name: str) -> Tensor:
        """A compressed matrix as `torch.sparse_csr` (explicit zeros among the survivors are kept)."""
        entry = self.entries[name]
        if len(entry.shape) != 2:
            raise SparseCheckpointError(f"'{name}' has {len(entry.shape)} axes; only matrices have a CSR form")
        mask = self.mask(name)
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        columns = mask.nonzero()[:, 1]
        return torch.sparse_csr_tensor(counts, columns, self.part(name + VALUES), entry.shape)

    def load_into(self, host: nn.Module, *, sparse: bool = True, strict: bool = True) -> nn.Module:
        """Load into a module of the same architecture, which is changed only when everything fits.

        sparse: give the compressed parameters their masks, so that training keeps them. Without, the host becomes an
            ordinary dense model with zeros.
        """
        wanted = host.state_dict()
        tied = tied_names(host)
        missing = [n for n in wanted if n not in self.names and not any(t in self.names for t in tied.get(n, ()))]
        foreign = [n for n in self.names if n not in wanted]
        if strict and (missing or foreign):
            raise SparseCheckpointError(
                f"{self.path} does not fit the model: missing {missing[:3]}, unknown {foreign[:3]}"
            )
        for name in self.names:
            shape = self.entries[name].shape if name in self.entries else tuple(self.part(name).shape)
            if name in wanted and shape != tuple(wanted[name].shape):
                raise SparseCheckpointError(
                    f"'{name}' has shape {shape} in {self.path.name}, the model {tuple(wanted[name].shape)}"
                )
        if sparse:
            present = {name for name, _, _ in masked_parameters(host)}
            parameters = dict(host.named_parameters())
            fresh = {n: self.mask(n) for n in self.masked if n in parameters and n not in present}
            mask_modules(host, fresh)
            for name, module, leaf in masked_parameters(host):
                if name in self.masked and name not in fresh:
                    getattr(module, bits_name(leaf)).copy_(self.part(name + BITMASK))
        elif any(isinstance(module, MaskedModule) for module in host.modules()):
            raise SparseCheckpointError("the host carries masks already: load with sparse=True, or into a dense model")
        host.load_state_dict({name: self.tensor(name) for name in self.names if name in wanted}, strict=False)
        return host

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """`(name, dense bytes, stored bytes)` of the compressed tensors."""
        for name, entry in self.entries.items():
            size = entry.dtype.itemsize
            yield name, entry.numel * size, stored_bytes(entry.numel, entry.survivors, size)


def open_sparse(path: str | Path, *, base: nn.Module | str | None = None) -> SparseCheckpoint:
    """Open and check a sparse checkpoint.

    base: the dense model (or its `model_hash`) that the file must have been pruned from; None: any, the file is complete.
    Raises SparseCheckpointError for anything that is not a sparse checkpoint, is damaged, or has another base.
    """
    return SparseCheckpoint(path, base=base)


def tied_names(host: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every parameter that has other names: those names."""
    groups: dict[int, list[str]] = {}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {n: tuple(o for o in names if o != n) for names in groups.values() if len(names) > 1 for n in names}


def read_header(path: Path) -> tuple[dict[str, Entry], set[str], list[str], str | None]:
    """Entries, which of them have masks, other names, base hash; all checked against the stored parts' dtypes and shapes."""
    from safetensors import SafetensorError, safe_open

    bad = lambda text: SparseCheckpointError(f"{path}: {text}")  # noqa: E731
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_slice(name) for name in list(file.keys())}
            stored = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except FileNotFoundError as error:
        raise bad("no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise bad(f"not a safetensors file, or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise bad(f"not a sparse checkpoint (format {metadata.get('format')!r}); open it with safetensors")
    if metadata.get("version") != str(VERSION):
        raise bad(f"version {metadata.get('version')!r}, but this sparsify reads version {VERSION}")
    try:
        listed = json.loads(metadata["entries"])
        entries = {name: parse_entry(value) for name, value in listed.items()}
        masked = {name for name, value in listed.items() if value.get("masked") is True}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise bad(f"its list of entries is damaged: {error}") from error
    expected = {name + suffix for name in entries for suffix in (VALUES, BITMASK)}
    plain = [name for name in stored if name not in expected]
    if missing := sorted(expected - set(stored)):
        raise bad(f"'{missing[0]}' is missing")
    if stray := [name for name in plain if name.endswith((VALUES, BITMASK)) or name in entries]:
        raise bad(f"'{stray[0]}' belongs to no entry")
    for name, entry in entries.items():
        kind, shape = stored[name + VALUES]
        if shape != (entry.survivors,) or kind != safetensors_name(entry.dtype):
            raise bad(f"'{name}': values are {kind} {shape}, but the header says {entry.dtype} ({entry.survivors},)")
        kind, shape = stored[name + BITMASK]
        if kind != "U8" or shape != ((entry.numel + 7) // 8,):
            raise bad(f"'{name}': the bitmask is {kind} {shape}, which does not fit shape {entry.shape}")
    return entries, masked, plain, metadata.get("base")


def parse_entry(value: Any) -> Entry:
    shape, dtype, survivors = value["shape"], getattr(torch, str(value["dtype"]), None), value["survivors"]
    sane = (
        isinstance(shape, list)
        and all(type(s) is int and 0 <= s < MAX_ENTRIES for s in shape)
        and prod(shape) < MAX_ENTRIES
    )
    if not sane:
        raise ValueError(f"bad shape {shape!r}")
    if not isinstance(dtype, torch.dtype) or dtype.itemsize not in INTEGERS:
        raise ValueError(f"bad dtype {value['dtype']!r}")
    if type(survivors) is not int or not 0 <= survivors <= prod(shape):
        raise ValueError(f"bad number of survivors {survivors!r} for shape {shape}")
    return Entry(tuple(shape), dtype, survivors)


def safetensors_name(dtype: torch.dtype) -> str:
    """How safetensors spells a dtype ("F32", "BF16", "I8", …)."""
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
        torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    }  # fmt: skip
    return names.get(dtype, "?")


def check_bits(path: Path, name: str, entry: Entry, bits: Tensor) -> None:
    """The number of set bits is the number of values, and unused bits are zero."""
    set_bits = int(unpack_bits(bits, (bits.numel() * 8,)).sum())
    within = int(unpack_bits(bits, (entry.numel,)).sum())
    if set_bits != within:
        raise SparseCheckpointError(f"{path}: '{name}': bits beyond the last weight are set")
    if within != entry.survivors:
        raise SparseCheckpointError(f"{path}: '{name}': {within} bits are set, but there are {entry.survivors} values")
