"""A folder that appears when it is complete: written beside its place under a name of its own, flushed to disk, then renamed.

with new_folder("merged") as begun:          .merged.x7k2…  ──fsync──rename──▶  merged
    model.save_pretrained(begun)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsify.errors import SparsifyError
from sparsify.files.atomic import reported, shown


def check_new(folder: str | os.PathLike[str], error: type[SparsifyError] = SparsifyError) -> Path:
    """`folder`, if it can be made. Raises `error` for a folder that holds something, a link, or a file."""
    path = Path(folder)
    if path.name in ("", ".."):
        raise error(f"{shown(path)}: give the folder a name of its own")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise error(f"{shown(path)}: is there already and is not a folder")
    if path.exists() and any(path.iterdir()):
        held = any(path.glob("*.safetensors"))
        raise error(
            f"{shown(path)} holds {'a model' if held else 'files'} already: choose another folder, or delete it"
        )
    return path


@contextmanager
def new_folder(folder: str | os.PathLike[str], error: type[SparsifyError] = SparsifyError) -> Iterator[Path]:
    """A folder to write to, which takes the name `folder` when the block is left without an error; else nothing stays."""
    path = check_new(folder, error)
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield begun
        with reported(path):
            for file in begun.rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as opened:
                        os.fsync(opened.fileno())
            os.chmod(begun, 0o777 & ~current_umask())
            if path.exists():
                path.rmdir()  # empty
            os.replace(begun, path)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


__all__ = ["check_new", "new_folder"]
