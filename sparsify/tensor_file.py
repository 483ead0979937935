"""Safetensors files of models that are larger than memory: written piece by piece, read one tensor at a time.

parts (name, dtype, shape) ──▶ header with every offset ──▶ pieces, each part in order ──▶ flush, rename

with tensor_file("model.safetensors", [Part("w", torch.float32, (4, 3))], {"format": "pt"}) as file:
    file.append("w", first_half)
    file.append("w", second_half)

FolderTensors("llama-2-7b/")["lm_head.weight"]       a mapping over all files of a checkpoint; nothing is kept
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from sparsify.errors import SparsifyError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
ALIGNMENT = 8


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


class PartWriter:
    """Writes pieces of parts to their places. Pieces of one part come in order; parts may take turns."""

    def __init__(self, file: IO[bytes], places: dict[str, tuple[int, int]]) -> None:
        self.file, self.places = file, places
        self.next = {name: start for name, (start, _) in places.items()}

    def append(self, name: str, piece: Tensor) -> None:
        """The next entries of a part, flat. Raises SparsifyError when they do not fit."""
        data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if self.next[name] + data.nbytes > self.places[name][1]:
            raise SparsifyError(f"'{name}': more bytes than announced ({data.nbytes} too many or of another dtype)")
        self.file.seek(self.next[name])
        self.file.write(data.data)
        self.next[name] += data.nbytes

    def check_complete(self) -> None:
        for name, (_, stop) in self.places.items():
            if self.next[name] != stop:
                raise SparsifyError(f"'{name}': {stop - self.next[name]} bytes are missing")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well: all of it or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def tensor_file(path: str | Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> Iterator[PartWriter]:
    """A safetensors file that appears under its name when every part is complete. Raises SparsifyError if one is not."""
    ordered = sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name))  # so that every part is aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for part in ordered:
        start, end = end, end + part.nbytes
        offsets[part.name] = (start, end)
        header[part.name] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    first = 8 + len(text)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        writer = PartWriter(file, {name: (first + start, first + stop) for name, (start, stop) in offsets.items()})
        yield writer
        writer.check_complete()


class FolderTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, each read when asked for and kept by nobody. Raises SparsifyError when there are none.

    dtype: floating tensors are cast to it as they are read; None: as stored.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self.files = find_tensors(self.folder)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            return cast(file.get_tensor(name), self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in `dtype`; any other, or without a dtype, as it is."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → file, from an index or from the files' headers. Raises SparsifyError when there is none."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise SparsifyError(f"{folder} has no safetensors files")
    return found
