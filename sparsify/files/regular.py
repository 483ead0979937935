"""Only regular files are opened: a FIFO, a device or a socket in their place is named, not waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

from sparsify.errors import SparsifyError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of(mode: int) -> str:
    """What `os.stat` found in place of a file, in words."""
    return next((name for test, name in KINDS if test(mode)), "something else")


def check_regular(path: str | os.PathLike[str], error: type[SparsifyError] = SparsifyError, what: str = "file") -> Path:
    """`path`, if reading it ends. Raises `error` for folders, FIFOs, devices, sockets, and what is not there.

    For files that somebody else opens; our own readers look again at what they have opened (`open_regular`).
    """
    from sparsify.files.atomic import shown

    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as cause:
        kind = "a link to something that is not there" if path.is_symlink() else "not there"
        raise error(f"{shown(path)}: {kind}; expected a {what}") from cause
    if not stat.S_ISREG(mode):
        raise error(f"{shown(path)}: {kind_of(mode)}, not a {what}")
    return path


def open_regular(path: str | os.PathLike[str], error: type[SparsifyError] = SparsifyError) -> IO[bytes]:
    """A regular file, open for binary reading. Raises `error`, naming the path, for anything else."""
    from sparsify.files.atomic import shown

    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as cause:
        raise error(f"{shown(Path(path))}: no such file") from cause
    except (OSError, ValueError) as cause:
        raise error(f"{shown(Path(path))} cannot be read: {cause}") from cause
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise error(f"{shown(Path(path))} is {kind_of(mode)}, not a file")
    return os.fdopen(descriptor, "rb")


def read_file(path: str | os.PathLike[str], limit: int, error: type[SparsifyError] = SparsifyError) -> bytes:
    """All of a regular file of at most `limit` bytes. Raises `error`, naming the path."""
    from sparsify.files.atomic import shown

    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{shown(Path(path))} has {size:,} bytes; such a file has at most {limit:,}")
        try:
            return file.read(limit)
        except OSError as cause:
            raise error(f"{shown(Path(path))} cannot be read: {cause}") from cause
