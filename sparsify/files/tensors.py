"""Safetensors files with a content hash of every tensor: written piece by piece, checked when read.

    parts (name, dtype, shape) ──▶ header with every offset ──▶ pieces, each hashed as it is written ──▶ hashes into the header ──▶ rename

    with tensor_file("model.safetensors", [Part("w", torch.float32, (4, 3))], {"format": "pt"}) as file:
        file.append("w", first_half)
        file.append("w", second_half)

    TensorFile("model.safetensors").read("w")            a copy in memory of its own; its hash was compared

The header's metadata has, beside the format's own entries, `sparsify.content`: JSON with `sha256` (tensor name → SHA-256 over dtype,
shape and bytes) and `seal` (SHA-256 over these and the other metadata). Files without it (other tools', older versions') can be read
too; a format of ours asks for it with `require_hashes`.

A reader believes nothing: the header must fit the file to the byte, every size is compared with the file's before memory is taken,
and names, dtypes, shapes and offsets are checked. Reading is by copy: nothing is mapped, so a file that changes later changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TypeGuard

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.files import strict_json
from sparsify.files.atomic import Commit, committing, shown
from sparsify.files.regular import open_regular
from sparsify.files.strict_json import Json

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
ALIGNMENT = 8
HEADER_LIMIT = 64 << 20
CONTENT = "sparsify.content"
PIECE = 1 << 20
UNKNOWN = "0" * 64  # stands for a hash until it is known: as long as one


@dataclass(frozen=True)
class Part:
    """One tensor of a file. Raises SparsifyError for a dtype that safetensors does not have."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise SparsifyError(f"'{self.name}': safetensors files cannot hold {self.dtype}")

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def digest(self) -> hashlib._Hash:
        """SHA-256 that has seen dtype and shape; the bytes follow."""
        return hashlib.sha256(f"{DTYPE_NAMES[self.dtype]} {list(self.shape)}\n".encode())


# --- writing --------------------------------------------------------------------------------------------------------------


class PartWriter:
    """Writes pieces of parts to their places and hashes them. Pieces of one part come in order; parts may take turns."""

    def __init__(self, file: IO[bytes], parts: Sequence[Part], places: dict[str, tuple[int, int]]) -> None:
        self.file, self.places = file, places
        self.next = {name: start for name, (start, _) in places.items()}
        self.digests = {part.name: part.digest() for part in parts}

    def append(self, name: str, piece: Tensor) -> None:
        """The next entries of a part, flat. Raises SparsifyError when they do not fit."""
        data = bytes_of(piece)
        if self.next[name] + data.nbytes > self.places[name][1]:
            raise SparsifyError(f"'{name}': more bytes than announced ({data.nbytes} too many or of another dtype)")
        self.file.seek(self.next[name])
        self.file.write(data)
        self.digests[name].update(data)
        self.next[name] += data.nbytes

    def hashes(self) -> dict[str, str]:
        """Of every part. Raises SparsifyError when one is not complete."""
        for name, (_, stop) in self.places.items():
            if self.next[name] != stop:
                raise SparsifyError(f"'{name}': {stop - self.next[name]} bytes are missing")
        return {name: digest.hexdigest() for name, digest in self.digests.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def tensor_file(
    path: str | Path, parts: Sequence[Part], metadata: Mapping[str, str], commit: Commit | None = None
) -> Iterator[PartWriter]:
    """A safetensors file that appears under its name when every part is complete. Raises SparsifyError if one is not.

    commit: the file appears with the others of that commit.
    """
    if commit is None:
        with committing() as own, tensor_file(path, parts, metadata, own) as writer:
            yield writer
        return
    ordered = sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name))  # so that every part is aligned
    names = {part.name for part in ordered}
    if len(names) < len(ordered) or "__metadata__" in names or CONTENT in metadata:
        raise SparsifyError(f"{shown(path)}: two tensors of one name, or a name that the format keeps for itself")
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for part in ordered:
        offsets[part.name] = (end, end + part.nbytes)
        end += part.nbytes
    text = header_text(path, ordered, offsets, metadata, dict.fromkeys(names, UNKNOWN))
    first = len(text)
    with commit.writing(path) as file:
        file.write(text)
        places = {name: (first + start, first + stop) for name, (start, stop) in offsets.items()}
        writer = PartWriter(file, ordered, places)
        yield writer
        text = header_text(path, ordered, offsets, metadata, writer.hashes())
        assert len(text) == first
        file.seek(0)
        file.write(text)


def header_text(
    path: str | Path,
    parts: Sequence[Part],
    offsets: Mapping[str, tuple[int, int]],
    metadata: Mapping[str, str],
    hashes: Mapping[str, str],
) -> bytes:
    """The length and the JSON of a header; as long for one set of hashes as for another."""
    content = {"seal": seal_of(hashes, metadata), "sha256": dict(sorted(hashes.items()))}
    header: dict[str, object] = {"__metadata__": {**metadata, CONTENT: json.dumps(content)}}
    for part in parts:
        header[part.name] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": list(offsets[part.name]),
        }
    try:
        text = json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SparsifyError(f"{shown(path)}: a name or text that UTF-8 cannot hold: {error}") from error
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise SparsifyError(
            f"{shown(path)}: names and metadata take {len(text):,} bytes; at most {HEADER_LIMIT:,} can be read"
        )
    return len(text).to_bytes(8, "little") + text


def seal_of(hashes: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    text = json.dumps([sorted(hashes.items()), sorted((k, v) for k, v in metadata.items() if k != CONTENT)])
    return hashlib.sha256(text.encode()).hexdigest()


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], commit: Commit | None = None
) -> None:
    """A safetensors file of whole tensors, on any device."""
    parts = [Part(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with tensor_file(path, parts, metadata, commit) as file:
        for name, tensor in tensors.items():
            file.append(name, tensor)


# --- reading --------------------------------------------------------------------------------------------------------------


class TensorFile:
    """A safetensors file whose header was checked against the file. Tensors are read when asked for, and the file is open only then;
    keep_open: it stays open until `close`, so that a writer who replaces it meanwhile does not matter (for one thread).

    metadata: the header's, without our hashes. parts: tensor name → dtype and shape. hashes: tensor name → SHA-256, or None
    for a file that has none. error: what is raised, always with the file's name in front. check: False for a format whose reader
    has more to say about what is wrong than "not what was written", and calls `check_content` after that.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        error: type[SparsifyError] = SparsifyError,
        *,
        check: bool = True,
        keep_open: bool = False,
    ) -> None:
        self.path, self.error = Path(path), error
        self.parts: dict[str, Part] = {}
        self.offsets: dict[str, int] = {}
        self.held: IO[bytes] | None = open_regular(self.path, error)
        try:
            self.parse(check)
        except BaseException:
            keep_open = False
            raise
        finally:
            if not keep_open:
                self.close()

    def parse(self, check: bool) -> None:
        assert self.held is not None
        self.identity = identity(self.held)
        header, self.first = self.read_header(self.held)
        self.metadata = self.parsed_metadata(header.pop("__metadata__", {}))
        self.parse_parts(header)
        content = self.metadata.pop(CONTENT, None)
        self.hashes: dict[str, str] | None = None
        self.seal = ""
        if content is not None:
            self.hashes, self.seal = self.parsed_hashes(content)
        if check:
            self.check_content()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on the file is opened for each tensor, and must still be the same one."""
        if self.held is not None:
            self.held.close()
            self.held = None

    def bad(self, text: str) -> SparsifyError:
        return self.error(f"{shown(self.path)}: {text}")

    def require_hashes(self) -> None:
        """Raises when the file has no content hashes, which its format promises."""
        if self.hashes is None:
            raise self.bad(
                "damaged: its content hashes are missing, which this version of the format has; write or copy it again"
            )

    # --- the header ---

    def read_header(self, file: IO[bytes]) -> tuple[dict[str, Json], int]:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise self.bad(f"damaged or not a safetensors file (a header of {length:,} bytes in a file of {size:,})")
        text = file.read(length)
        if len(text) != length:
            raise self.bad("damaged or not a safetensors file (it ends inside its header)")
        header = strict_json.parse(
            text, f"{shown(self.path)}: damaged or not a safetensors file: its header", self.error
        )
        if not isinstance(header, dict):
            raise self.bad("damaged or not a safetensors file (its header is no object)")
        return header, 8 + length

    def parsed_metadata(self, metadata: Json) -> dict[str, str]:
        if not strict_json.is_texts(metadata):
            raise self.bad("damaged or not a safetensors file (its metadata must map names to texts)")
        return metadata

    def parse_parts(self, header: dict[str, Json]) -> None:
        """Every tensor's place: together they fill the file without gap or overlap."""
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            label = f"tensor {name[:200]!r}"
            if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
                raise self.bad(f"damaged or not a safetensors file ({label} has no dtype, shape and data_offsets)")
            dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise self.bad(f"{label} has dtype {str(dtype)[:40]!r}, which this sparsify does not know")
            if not is_sizes(shape) or len(shape) > 64 or not is_sizes(span) or len(span) != 2:
                raise self.bad(f"damaged or not a safetensors file ({label}: shape or data_offsets are no sizes)")
            count = DTYPES[dtype].itemsize
            for dimension in shape:
                count *= dimension
                if count.bit_length() > 63 and 0 not in shape:
                    raise self.bad(f"damaged or not a safetensors file ({label} has more entries than any file)")
            if span[1] - span[0] != count:
                raise self.bad(
                    f"damaged or not a safetensors file ({label} needs {count:,} bytes and has {span[1] - span[0]:,})"
                )
            self.parts[name] = Part(name, DTYPES[dtype], tuple(shape))
            self.offsets[name] = self.first + span[0]
            spans.append((span[0], span[1], name))
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                raise self.bad(
                    f"damaged or not a safetensors file (tensor {name[:200]!r} leaves a gap or overlaps another)"
                )
            end = stop
        held = self.identity[2] - self.first
        if end != held:
            raise self.bad(
                f"damaged or not a safetensors file (its tensors have {end:,} bytes, the file {held:,}: cut or extended)"
            )

    def parsed_hashes(self, text: str) -> tuple[dict[str, str], str]:
        content = strict_json.parse(text, f"{shown(self.path)}: damaged: its content hashes", self.error)
        hashes, seal = (content.get(name) if isinstance(content, dict) else None for name in ("sha256", "seal"))
        if strict_json.is_texts(hashes) and isinstance(seal, str):
            return hashes, seal
        raise self.bad("damaged: its content hashes are malformed")

    def check_content(self, required: bool = False) -> None:
        """Raises when metadata and names are not those that were written, or when the file has no hashes and they are required."""
        if required:
            self.require_hashes()
        if self.hashes is None:
            return
        if differing := sorted(set(self.hashes) ^ set(self.parts)):
            raise self.bad(f"damaged: tensor {differing[0][:200]!r} is not in both, the file and its content hashes")
        if self.seal != seal_of(self.hashes, self.metadata):
            raise self.bad(
                "damaged: its metadata or its content hashes are not what was written; write or copy it again"
            )

    # --- tensors ---

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        if self.held is not None:
            yield self.held
            return
        with open_regular(self.path, self.error) as file:
            if identity(file) != self.identity:
                raise self.bad("changed since it was opened; open it again")
            yield file

    def part(self, name: str) -> Part:
        if name not in self.parts:
            raise self.bad(f"has no tensor {name[:200]!r}")
        return self.parts[name]

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own; raises when its bytes are not those that were written."""
        part = self.part(name)
        raw = torch.empty(part.nbytes, dtype=torch.uint8)
        with self.opened() as file:
            self.fill(file, name, self.offsets[name], raw.numpy().data)
        if self.hashes is not None:
            digest = part.digest()
            digest.update(raw.numpy().data)
            self.compare(name, digest)
        return self.as_tensor(part, raw, part.shape)

    def rows(self, name: str, stop: int) -> Tensor:
        """The first rows, without a look at the others (so the hash is not compared); of a scalar, the scalar."""
        part = self.part(name)
        shape = part.shape and (min(stop, part.shape[0]), *part.shape[1:])
        raw = torch.empty(prod(shape) * part.dtype.itemsize, dtype=torch.uint8)
        with self.opened() as file:
            self.fill(file, name, self.offsets[name], raw.numpy().data)
        return self.as_tensor(part, raw, shape)

    def as_tensor(self, part: Part, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
        if part.dtype is torch.bool and raw.numel() and int(raw.max()) > 1:
            raise self.bad(f"damaged: tensor {part.name[:200]!r} has truth values other than 0 and 1")
        return raw.view(part.dtype).view(shape)

    def verify(self) -> None:
        """Compare every hash, with little memory. Raises, naming the first tensor that differs."""
        if self.hashes is None:
            return
        piece = bytearray(PIECE)
        with self.opened() as file:
            for name, part in self.parts.items():
                digest, place, left = part.digest(), self.offsets[name], part.nbytes
                while left:
                    view = memoryview(piece)[: min(PIECE, left)]
                    self.fill(file, name, place, view)
                    digest.update(view)
                    place, left = place + len(view), left - len(view)
                self.compare(name, digest)

    def compare(self, name: str, digest: hashlib._Hash) -> None:
        assert self.hashes is not None
        if self.hashes.get(name) != digest.hexdigest():
            raise self.bad(
                f"damaged: tensor {name[:200]!r} is not what was written (content hash); write or copy it again"
            )

    def fill(self, file: IO[bytes], name: str, place: int, view: memoryview) -> None:
        try:
            file.seek(place)
            got = file.readinto(view) if view.nbytes else 0  # type: ignore[attr-defined]
        except OSError as cause:
            raise self.bad(f"tensor {name[:200]!r} cannot be read: {cause}") from cause
        if got != view.nbytes:
            raise self.bad(f"damaged: it ends inside tensor {name[:200]!r}")


def identity(file: IO[bytes]) -> tuple[int, ...]:
    """What tells a file from another that took its place, or from itself after a change."""
    found = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
