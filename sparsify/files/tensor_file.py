"""The tensors of a checkpoint folder, read one at a time.

FolderTensors("llama-2-7b/")["lm_head.weight"]       a mapping over all files of a checkpoint; nothing is kept

Which file has which tensor is said by `model.safetensors.index.json`, or else by the files themselves. Neither is believed: an index
names files of the folder and nothing outside of it, every file's header is checked, and hashes are compared where a file has them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.files import strict_json
from sparsify.files.atomic import replacing, shown
from sparsify.files.kinds import DENSE, kind_of
from sparsify.files.tensors import DTYPE_NAMES, DTYPES, Part, PartWriter, TensorFile, tensor_file, write_tensors

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "FolderTensors",
    "Part",
    "PartWriter",
    "cast",
    "find_tensors",
    "replacing",
    "tensor_file",
    "write_tensors",
]
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r".*-([0-9]{5})-of-([0-9]{5})\.safetensors")
BESIDE = ("sparsify_masks.safetensors",)  # what else lies in a training checkpoint


class FolderTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, each read when asked for and kept by nobody. Raises SparsifyError when there are none.

    dtype: floating tensors are cast to it as they are read; None: as stored.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self.opened = open_tensors(self.folder)
        self.files = {name: file.path for name, file in self.opened.items()}

    def __getitem__(self, name: str) -> Tensor:
        return cast(self.opened[name].read(name), self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in `dtype`; any other, or without a dtype, as it is."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → file, from an index or from the files' headers. Raises SparsifyError when there is none."""
    return {name: file.path for name, file in open_tensors(folder).items()}


def open_tensors(folder: Path) -> dict[str, TensorFile]:
    """Tensor name → its file, whose header was checked.

    Raises SparsifyError for a folder without tensors, one that was not finished, one in which two files have the same tensor, an
    index that points outside of the folder or to what is not there, and damaged files.
    """
    index = folder / INDEX
    if os.path.lexists(index):
        return open_indexed(folder, index)
    if (folder / "pruning" / "run.json").is_file():
        raise SparsifyError(
            f"{shown(folder)} is an unfinished prune_on_disk run (no {INDEX} yet): run it again to the end first"
        )
    found: dict[str, TensorFile] = {}
    shards: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in BESIDE or kind_of(path.name) not in (None, DENSE):
            continue
        if numbered := SHARD.fullmatch(path.name):
            shards.setdefault(numbered[2], set()).add(numbered[1])
        file = TensorFile(inside_of(folder, path))
        for name in file.parts:
            if name in found:
                raise SparsifyError(
                    f"{shown(folder)}: tensor '{name}' is in {found[name].path.name} and in {path.name}: keep one of them there"
                )
            found[name] = file
    for total, present in shards.items():
        if len(present) < int(total):
            raise SparsifyError(
                f"{shown(folder)} has {len(present)} of {int(total)} shards and no {INDEX}: copy or write it again"
            )
    if not found:
        raise SparsifyError(f"{shown(folder)} has no safetensors files")
    return found


def open_indexed(folder: Path, index: Path) -> dict[str, TensorFile]:
    document = strict_json.read(inside_of(folder, index))
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not strict_json.is_texts(places) or not places:
        raise SparsifyError(f"{shown(index)}: 'weight_map' must map tensors to files")
    if "model.safetensors" not in places.values() and (folder / "model.safetensors").is_file():
        raise SparsifyError(
            f"{shown(folder)} holds two models: model.safetensors, and that of {INDEX}: delete the one that is not meant"
        )
    files: dict[str, TensorFile] = {}
    for name, file in places.items():
        if file not in files:
            if not file.endswith(".safetensors") or file != Path(file).name or "\\" in file:
                raise SparsifyError(
                    f"{shown(index)}: '{name}' is said to be in {file[:200]!r}, which is not a safetensors file of this folder"
                )
            files[file] = TensorFile(inside_of(folder, folder / file))
        if name not in files[file].parts:
            raise SparsifyError(f"{shown(index)}: '{name}' is said to be in {file}, which has no such tensor")
    return {name: files[file] for name, file in places.items()}


def inside_of(folder: Path, path: Path) -> Path:
    """The path, when its file lies in the folder. Raises SparsifyError for symbolic links that lead outside.

    In a snapshot of the Hugging Face cache files are links to the blobs of the same repository, and may be.
    """
    try:
        home, real = folder.resolve(), path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise SparsifyError(f"{shown(path)} cannot be read: {error}") from error
    blobs = home.parent.parent / "blobs"
    if real.parent == home or (home.parent.name == "snapshots" and real.parent == blobs):
        return path
    raise SparsifyError(
        f"{shown(path)} is a link that leads out of its folder, to {shown(real)}: put the file itself there"
    )
