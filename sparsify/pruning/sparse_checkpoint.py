"""Sparse checkpoints: one safetensors file that holds survivors and one bit per weight.

    model.safetensors      W (n, m)  4 nm bytes fp32            bf16 at 75 %: 2 nm
    sparse.safetensors     W.values (k,) + W.bitmask (⌈nm/8⌉,)  bf16 at 75 %: 0.625 nm

Header metadata: `format` = "sparsify-sparse", `version`, `base` (hash of the dense model that was pruned, optional), `entries`: for each
compressed tensor its shape, dtype and number of survivors, and (since version 2) a content hash of every tensor. A file is complete:
it opens without its base, whose hash is there to be checked. Bits are flat and little-endian as in `sparsify.ops.bits`. A tensor
is compressed when that makes it smaller; all others are stored as they are. Values keep their bits exactly, in any dtype.

A file is checked completely before anything is built from it: names, dtypes, shapes, content hashes, the number of set bits against the
number of values, unused bits. Files are written to a temporary name and renamed. Version 1, without hashes, can still be read.

Models that are larger than memory: `save_sparse("pruned/", "model.sparse")` compresses the folder that `prune_on_disk` wrote, and
`open_sparse("model.sparse").save_dense("dense/")` expands it again, one tensor at a time. Every tensor is read twice while
compressing: to count survivors, which the header needs, and to write them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.console import printable
from sparsify.errors import SparsifyError
from sparsify.files import kinds, strict_json
from sparsify.files.atomic import shown, write_bytes
from sparsify.files.strict_json import Json
from sparsify.files.tensor_file import DTYPE_NAMES, INDEX, FolderTensors, Part, PartWriter, tensor_file
from sparsify.files.tensors import TensorFile, is_sizes
from sparsify.modules.masked import MaskedModule, bits_name, mask_modules, masked_parameters
from sparsify.ops.bits import pack_bits, unpack_bits

if TYPE_CHECKING:
    from jaxtyping import Bool, Num, Shaped, UInt8

FORMAT, VERSION = "sparsify-sparse", 2
READABLE_VERSIONS = ("1", "2")
RESERVED = ("format", "version", "entries", "base")
VALUES, BITMASK = ".sparse_values", ".sparse_bitmask"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MAX_ENTRIES = 1 << 40
PIECE = 1 << 22  # entries that are compressed together: a multiple of 8, so of whole bytes of bits
SHARD_BYTES = 5 << 30


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


@printable
@dataclass(frozen=True)
class SizeReport:
    """Bytes of tensor data: `dense` as an ordinary checkpoint has it, `sparse` as written; in `tensors` both by name."""

    dense: int
    sparse: int
    tensors: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        ratio = self.dense / self.sparse if self.sparse else 1.0
        return f"{self.sparse / 2**20:.1f} MiB sparse, {self.dense / 2**20:.1f} MiB dense: {ratio:.2f} times smaller"


def bit_pattern(tensor: Shaped[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """The tensor's bytes as integers of the same width: exact for every dtype."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order: identifies a dense base model."""
    digest = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    for name in sorted(tensors):
        add(name, tensors[name].detach().cpu().contiguous())  # no variable keeps it while the next is read
    return digest.hexdigest()


def model_hash(model: nn.Module | Mapping[str, Tensor]) -> str:
    """`hash_tensors` of a model's parameters and persistent buffers, tied ones once; of a mapping or `FolderTensors`."""
    return hash_tensors(collect(model, None)[0])


def base_hash(base: nn.Module | str | Path) -> str:
    if isinstance(base, Path):
        return model_hash(FolderTensors(base))
    return base if isinstance(base, str) else model_hash(base)


def stored_bytes(numel: int, survivors: int, itemsize: int) -> int:
    """Bytes of a tensor in a sparse checkpoint: values and bits, or everything when that is not more."""
    return min(survivors * itemsize + (numel + 7) // 8, numel * itemsize)


def save_sparse(
    source: nn.Module | Mapping[str, Tensor] | str | Path,
    path: str | Path,
    *,
    masks: Mapping[str, Bool[Tensor, "*shape"]] | None = None,
    base: nn.Module | str | Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SizeReport:
    """Write a sparse checkpoint atomically.

    source: a module (its state dict, tied tensors once, and its masks if it has any), tensors by name, or a folder of safetensors
        files (with the masks that `prune_on_disk` left in it), of which one tensor is in memory at a time.
    masks: survivors by name, bool of the tensor's shape; a survivor may be zero and stays a survivor. Tensors without a mask are
        compressed by their zeros when that is smaller: every nonzero bit pattern survives (so −0.0 does).
    base: the dense model that was pruned, its `model_hash`, or the `Path` of its folder; `open_sparse(path, base=…)` checks it.
    metadata: further strings for the header. Raises SparseCheckpointError when a masked entry is not zero, and SparsifyError when the
        file cannot be written; what was there is then unchanged.
    """
    path = Path(path)
    if kinds.kind_of(path.name) == kinds.SPARSE:
        kinds.refuse_beside(path.parent, kinds.SPARSE, path.name, SparseCheckpointError)
    if taken := [name for name in metadata or () if name in RESERVED]:
        raise SparseCheckpointError(f"metadata: the format keeps {taken[0]!r} for itself; choose another name")
    tensors, masks = collect(source, masks)
    entries: dict[str, dict[str, object]] = {}
    parts: list[Part] = []
    sizes: dict[str, tuple[int, int]] = {}
    for name in tensors:
        own, entry = planned_parts(name, tensors[name], masks.get(name))
        dense = own[0].nbytes
        if entry is not None:
            entries[name] = entry
            dense = tensors[name].numel() * own[0].dtype.itemsize
        parts += own
        sizes[name] = (dense, sum(part.nbytes for part in own))
    header = {"format": FORMAT, "version": str(VERSION), "entries": json.dumps(entries), **(metadata or {})}
    if base is not None:
        header["base"] = base_hash(base)
    with tensor_file(path, parts, header) as file:
        for name in tensors:
            if name in entries:
                write_compressed(file, name, tensors[name], masks.get(name))
            else:
                file.append(name, tensors[name])
    return SizeReport(sum(d for d, _ in sizes.values()), sum(s for _, s in sizes.values()), sizes)


def planned_parts(
    name: str, tensor: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None
) -> tuple[list[Part], dict[str, object] | None]:
    """What the file gets for a tensor: values and bits with an entry for the header, or the tensor as it is and None."""
    shape = tuple(tensor.shape)
    survivors = count_survivors(name, tensor, mask)
    if survivors is None:
        return [Part(name, tensor.dtype, shape)], None
    values = Part(name + VALUES, tensor.dtype, (survivors,))
    bits = Part(name + BITMASK, torch.uint8, ((tensor.numel() + 7) // 8,))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [values, bits], {
        "shape": list(shape),
        "dtype": dtype,
        "survivors": survivors,
        "masked": mask is not None,
    }


def write_compressed(
    file: PartWriter, name: str, tensor: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None
) -> None:
    for values, kept in pieces(tensor, mask):
        file.append(name + VALUES, values[kept])
        file.append(name + BITMASK, pack_bits(kept))


def pieces(
    tensor: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None
) -> Iterator[tuple[Num[Tensor, " piece"], Bool[Tensor, " piece"]]]:
    """`(bit patterns, which survive)` of at most `PIECE` entries each, flat, on the CPU."""
    flat = bit_pattern(tensor.detach()).reshape(-1)
    kept = None if mask is None else mask.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        values = flat[start : start + PIECE].cpu()
        yield values, values != 0 if kept is None else kept[start : start + PIECE].cpu()


def count_survivors(name: str, tensor: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None) -> int | None:
    """How many values are stored, or None when compressing is not smaller, or not possible in this dtype.

    Raises SparseCheckpointError for a mask that does not fit, or drops an entry that is not zero.
    """
    if mask is not None:
        check_mask(name, tensor, mask)
    size = tensor.element_size()
    if size not in INTEGERS or tensor.is_complex() or tensor.numel() == 0:
        return None
    survivors = lost = 0
    for values, kept in pieces(tensor, mask):
        survivors += int(torch.count_nonzero(kept))
        if mask is not None:
            lost += int(torch.count_nonzero(values.view(tensor.dtype)[~kept] != 0))
    if lost:
        raise SparseCheckpointError(f"'{name}': {lost} pruned entries are not zero; they would be lost")
    smaller = stored_bytes(tensor.numel(), survivors, size) < tensor.numel() * size
    return survivors if smaller else None


def check_mask(name: str, tensor: Tensor, mask: Tensor) -> None:
    if mask.dtype is not torch.bool or mask.shape != tensor.shape:
        raise SparseCheckpointError(
            f"mask of '{name}': expected bool {tuple(tensor.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )


class ModuleMasks(Mapping[str, Tensor]):
    """The masks of a host by parameter name, unpacked when asked for; `given` ones come first."""

    def __init__(self, host: nn.Module, given: Mapping[str, Bool[Tensor, "*shape"]]) -> None:
        self.given = given
        self.own = {name: (module, leaf) for name, module, leaf in masked_parameters(host)}

    def __getitem__(self, name: str) -> Bool[Tensor, "*shape"]:
        if name in self.given:
            return self.given[name]
        module, leaf = self.own[name]
        return module.mask(leaf)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.given, *self.own)))

    def __len__(self) -> int:
        return len(self.given.keys() | self.own.keys())


def collect(
    source: nn.Module | Mapping[str, Tensor] | str | Path, masks: Mapping[str, Bool[Tensor, "*shape"]] | None
) -> tuple[Mapping[str, Tensor], Mapping[str, Bool[Tensor, "*shape"]]]:
    """Tensors by name (each piece of memory once) and masks, of a module, a mapping or a folder."""
    found: Mapping[str, Tensor]
    if isinstance(source, str | Path):
        from sparsify.pruning.streaming import FolderMasks

        found = folder = FolderTensors(source)
        masks = FolderMasks(folder.folder) if masks is None else masks
    elif isinstance(source, nn.Module):
        masks = ModuleMasks(source, masks or {})
        compiled = source.__dict__.get("sparsify")  # its live state dict has other names and another order
        found = compiled.original_state_dict() if compiled is not None else source.state_dict()
    else:
        found = source
    masks = {} if masks is None else masks
    for name in found:
        if name.endswith((VALUES, BITMASK)):
            raise SparseCheckpointError(f"tensor name '{name}' ends like a compressed part")
    unknown = sorted(set(masks) - set(found))
    if unknown:
        raise SparseCheckpointError(f"mask for '{unknown[0]}', but there is no such tensor")
    if isinstance(found, FolderTensors):
        return found, masks  # files hold tied tensors once
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        place = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor
    return tensors, masks


class SparseCheckpoint:
    """A sparse checkpoint, opened and checked. Tensors are read when asked for.

    entries: the compressed tensors. plain: names of the others. base: hash of the dense model, or None.
    """

    def __init__(self, path: str | Path, *, base: nn.Module | str | Path | None = None) -> None:
        self.path = Path(path)
        with TensorFile(self.path, SparseCheckpointError, check=False, keep_open=True) as self.file:
            self.entries, self.masked, self.parts, self.base = read_header(self.file)
            self.plain = list(self.parts)
            if base is not None:
                self.check_base(base_hash(base))
            self.file.verify()
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
        """One stored tensor as it lies in the file: a bitmask, survivors, or a plain tensor."""
        return self.file.read(name)

    @property
    def names(self) -> list[str]:
        """Every tensor of the model, compressed ones first."""
        return [*self.entries, *self.plain]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor in full; nothing is read."""
        return self.entries[name].shape if name in self.entries else self.parts[name].shape

    def sparse(self, name: str) -> tuple[Shaped[Tensor, " k"], UInt8[Tensor, " bytes"]]:
        """`(values (k,), bits (⌈numel/8⌉,))` of a compressed tensor."""
        return self.part(name + VALUES), self.part(name + BITMASK)

    def mask(self, name: str) -> Bool[Tensor, "*shape"]:
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

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor in full; nothing is read."""
        return self.entries[name].dtype if name in self.entries else self.parts[name].dtype

    def dense(self) -> dict[str, Tensor]:
        """Everything in full: an ordinary state dict."""
        return {name: self.tensor(name) for name in self.names}

    def csr(self, name: str) -> Shaped[Tensor, "p q"]:
        """A compressed matrix as `torch.sparse_csr` (explicit zeros among the survivors are kept)."""
        entry = self.entries[name]
        if len(entry.shape) != 2:
            raise SparseCheckpointError(f"'{name}' has {len(entry.shape)} axes; only matrices have a CSR form")
        mask = self.mask(name)
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        columns = mask.nonzero()[:, 1]
        return torch.sparse_csr_tensor(counts, columns, self.part(name + VALUES), entry.shape)

    def load_into(self, host: nn.Module, *, sparse: bool = True, strict: bool = True) -> nn.Module:
        """Load into a module of the same architecture, which is changed only when everything fits. One module's tensors at a time.

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
            shape = self.shape(name)
            if name in wanted and shape != tuple(wanted[name].shape):
                raise SparseCheckpointError(
                    f"'{name}' has shape {shape} in {self.path.name}, the model {tuple(wanted[name].shape)}"
                )
        self.file.verify()
        if sparse:
            present = {name for name, _, _ in masked_parameters(host)}
            parameters = dict(host.named_parameters())
            fresh = [n for n in self.entries if n in self.masked and n in parameters and n not in present]
            for name in fresh:
                mask_modules(host, {name: self.mask(name)})
            for name, module, leaf in masked_parameters(host):
                if name in self.masked and name not in fresh:
                    getattr(module, bits_name(leaf)).copy_(self.part(name + BITMASK))
        elif any(isinstance(module, MaskedModule) for module in host.modules()):
            raise SparseCheckpointError("the host carries masks already: load with sparse=True, or into a dense model")
        together: dict[str, list[str]] = {}
        for name in self.names:
            if name in wanted:
                together.setdefault(name.rpartition(".")[0], []).append(name)
        for names in together.values():
            host.load_state_dict({name: self.tensor(name) for name in names}, strict=False)
        return host

    def save_dense(self, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
        """Write an ordinary dense checkpoint, zeros included, with one tensor in memory at a time. Returns its files.

        They are `model.safetensors`, or shards of at most `shard_bytes` (or one tensor) and their index. Raises
        SparseCheckpointError for a folder that holds a model.
        """
        folder = Path(folder)
        if any(folder.glob("*.safetensors")) or kinds.DENSE in kinds.found_in(folder):
            raise SparseCheckpointError(f"{folder} holds a model already: choose another folder, or delete it")
        kinds.refuse_beside(folder, kinds.DENSE, "model.safetensors", SparseCheckpointError)
        self.file.verify()
        shards: list[list[Part]] = [[]]
        for name in self.names:
            part = Part(name, self.dtype(name), self.shape(name))
            if shards[-1] and sum(p.nbytes for p in shards[-1]) + part.nbytes > shard_bytes:
                shards.append([])
            shards[-1].append(part)
        several = len(shards) > 1
        places: dict[str, str] = {}
        written: list[Path] = []
        try:
            for number, parts in enumerate(shards, 1):
                label = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
                with tensor_file(folder / label, parts, {"format": "pt"}) as file:
                    for part in parts:
                        file.append(part.name, self.tensor(part.name))
                written.append(folder / label)
                places |= {part.name: label for part in parts}
            if several:  # the commit point: shards without it are no model
                index = {"metadata": {"format": "pt"}, "weight_map": dict(sorted(places.items()))}
                write_bytes(folder / INDEX, json.dumps(index, indent=1).encode())
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise
        return written

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """`(name, dense bytes, stored bytes)` of the compressed tensors."""
        for name, entry in self.entries.items():
            size = entry.dtype.itemsize
            yield name, entry.numel * size, stored_bytes(entry.numel, entry.survivors, size)


def open_sparse(path: str | Path, *, base: nn.Module | str | Path | None = None) -> SparseCheckpoint:
    """Open and check a sparse checkpoint.

    base: the dense model (or its `model_hash`, or the `Path` of its folder) that the file must have been pruned from; None: any, the
        file is complete.
    Raises SparseCheckpointError for anything that is not a sparse checkpoint, is damaged, or has another base.
    """
    return SparseCheckpoint(path, base=base)


def tied_names(host: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every parameter that has other names: those names."""
    groups: dict[int, list[str]] = {}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {n: tuple(o for o in names if o != n) for names in groups.values() if len(names) > 1 for n in names}


def read_header(file: TensorFile) -> tuple[dict[str, Entry], set[str], dict[str, Part], str | None]:
    """Entries, which of them have masks, other tensors, base hash; all checked against the stored parts' dtypes and shapes."""
    metadata, stored = file.metadata, file.parts
    if metadata.get("format") != FORMAT:
        raise file.bad(
            f"not a sparse checkpoint (format {str(metadata.get('format'))[:40]!r}); open it with safetensors"
        )
    if metadata.get("version") not in READABLE_VERSIONS:
        raise file.bad(
            f"version {str(metadata.get('version'))[:40]!r}, but this sparsify reads versions 1 to {VERSION}; a newer one may read it"
        )
    where = f"{shown(file.path)}: its list of entries is damaged"
    listed = strict_json.parse(metadata.get("entries", ""), where, SparseCheckpointError)
    if not isinstance(listed, dict):
        raise SparseCheckpointError(f"{where}: it is no object")
    entries: dict[str, Entry] = {}
    for name, value in listed.items():
        try:
            entries[name] = parse_entry(value)
        except (KeyError, TypeError, ValueError) as error:
            raise SparseCheckpointError(f"{where}: '{name[:200]}': {error}") from error
    masked = {name for name, value in listed.items() if isinstance(value, dict) and value.get("masked") is True}
    expected = {name + suffix for name in entries for suffix in (VALUES, BITMASK)}
    plain = {name: part for name, part in stored.items() if name not in expected}
    if missing := sorted(expected - set(stored)):
        raise file.bad(f"'{missing[0]}' is missing")
    if stray := [name for name in plain if name.endswith((VALUES, BITMASK)) or name in entries]:
        raise file.bad(f"'{stray[0]}' belongs to no entry")
    for name, entry in entries.items():
        values, bits = stored[name + VALUES], stored[name + BITMASK]
        if values.shape != (entry.survivors,) or values.dtype != entry.dtype:
            raise file.bad(
                f"'{name}': values are {DTYPE_NAMES[values.dtype]} {values.shape}, but the header says {entry.dtype} ({entry.survivors},)"
            )
        if bits.dtype != torch.uint8 or bits.shape != ((entry.numel + 7) // 8,):
            raise file.bad(
                f"'{name}': the bitmask is {DTYPE_NAMES[bits.dtype]} {bits.shape}, which does not fit shape {entry.shape}"
            )
    file.check_content(required=metadata["version"] != "1")
    return entries, masked, plain, metadata.get("base")


def parse_entry(value: Json) -> Entry:
    if not isinstance(value, dict):
        raise ValueError("an entry must be an object")
    shape, kind, survivors = value["shape"], str(value["dtype"])[:40], value["survivors"]
    dtype = getattr(torch, kind, None) if re.fullmatch(r"[a-z0-9_]+", kind) else None
    if not is_sizes(shape) or len(shape) > 64 or any(s >= MAX_ENTRIES for s in shape) or prod(shape) >= MAX_ENTRIES:
        raise ValueError(f"bad shape {str(shape)[:80]}")
    if not isinstance(dtype, torch.dtype) or dtype.itemsize not in INTEGERS:
        raise ValueError(f"bad dtype {kind!r}")
    if type(survivors) is not int or not 0 <= survivors <= prod(shape):
        raise ValueError(f"bad number of survivors {str(survivors)[:40]} for shape {shape}")
    return Entry(tuple(shape), dtype, survivors)


def check_bits(path: Path, name: str, entry: Entry, bits: UInt8[Tensor, " bytes"]) -> None:
    """The number of set bits is the number of values, and unused bits are zero."""
    within = beyond = 0
    for start in range(0, bits.numel(), PIECE // 8):  # unpacked, a bit takes a byte
        piece = bits[start : start + PIECE // 8]
        unpacked = unpack_bits(piece, (piece.numel() * 8,))
        inside = max(0, entry.numel - start * 8)
        within += int(torch.count_nonzero(unpacked[:inside]))  # sum() would make eight bytes of each bit
        beyond += int(torch.count_nonzero(unpacked[inside:]))
    if beyond:
        raise SparseCheckpointError(f"{path}: '{name}': bits beyond the last weight are set")
    if within != entry.survivors:
        raise SparseCheckpointError(f"{path}: '{name}': {within} bits are set, but there are {entry.survivors} values")
