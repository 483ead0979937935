"""Files that appear whole: written beside their place under a name of their own, flushed to disk, then renamed.

    with writing("a/adapter.json") as file:              .adapter.json.<host>-<pid>-<token>.tmp  ──fsync──rename──▶  adapter.json
        file.write(…)

    with committing() as commit:                         several files that belong together: all are on disk before the first
        with commit.writing("a/adapter.json") as file:   is renamed, in the order in which they were opened; the last is the
            …                                            commit point
        with commit.writing("a/adapter.safetensors") as file:
            …

Threads and processes may write the same file at once: the last one that is complete wins, and none fails. A writer that fails leaves
what stood there before. What a killed writer left behind is removed by the next one that writes to the folder: of this machine
when its process is gone, of another one when it is older than a day.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO

from sparsify.console import printable
from sparsify.errors import SparsifyError

ABANDONED_SECONDS = 24 * 3600
SWEPT = 4096  # names that are looked at: a folder of many files must not make every write slow
NAME_BYTES = 120  # of the target's name that a temporary one repeats: file systems take 255 in all
TEMPORARY = re.compile(
    r"^\.(?P<name>.*)\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,10})-(?P<token>[0-9a-f]{16})\.tmp$", re.DOTALL
)
OLD_TEMPORARY = re.compile(r"(?P<name>.*)\.tmp(?P<pid>[0-9]{1,10})|\.(?P<other>.*)\.[a-z0-9_]{8}(\.part)?", re.DOTALL)
PROCESS = secrets.token_hex(4)  # tells this process from a dead one that had the same id


@printable
class WriteError(SparsifyError, OSError):
    """A file could not be written: names it, the cause, and what to do. What stood there before is unchanged."""

    def __init__(self, path: Path | str, cause: OSError | str) -> None:
        self.path = str(path)
        text = cause if isinstance(cause, str) else explained(cause)
        super().__init__(f"{shown(path)} could not be written: {text}")
        if isinstance(cause, OSError):
            self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[object, ...]:
        return rebuilt, (str(self.args[0]), self.path, self.errno)


def rebuilt(text: str, path: str, number: int | None) -> WriteError:
    error = WriteError.__new__(WriteError, text)
    error.args, error.path = (text,), path
    error.errno = number
    return error


ADVICE = {
    errno.ENOSPC: "the disk is full; free some space, or write to another place",
    errno.EDQUOT: "the disk quota is used up; free some space, or write to another place",
    errno.EFBIG: "the file is larger than this process or file system may write; write to another place, or raise the limit",
    errno.EROFS: "the file system is read-only; write to another place",
    errno.EACCES: "permission denied; choose a folder that you may write to, or change its permissions",
    errno.EPERM: "not permitted; choose a folder that you may write to, or change its permissions",
    errno.EISDIR: "a folder of that name is in the way; choose another name, or delete it",
    errno.ENOTEMPTY: "a folder of that name is in the way; choose another name, or delete it",
    errno.EEXIST: "a file is where a folder is needed; choose another folder, or delete it",
    errno.ENOTDIR: "a file is where a folder is needed; choose another folder, or delete it",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.ELOOP: "its path is a circle of symbolic links; choose another path",
    errno.EIO: "the disk reports an input/output error; check it, and write to another place",
}


def explained(error: OSError) -> str:
    advice = ADVICE.get(error.errno or 0)
    return f"{error}: {advice}" if advice else f"{error}; check the folder, or write to another place"


def shown(path: Path | str) -> str:
    """A path as text that every console and file can take."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def host_tag() -> str:
    """Tells machines, and the process namespaces of containers, apart."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


HOST = host_tag()

# --- writing --------------------------------------------------------------------------------------------------------------


class Commit:
    """Files that appear together. `committing` makes one."""

    def __init__(self) -> None:
        self.pending: list[tuple[IO[bytes], Path, Path]] = []

    @contextmanager
    def writing(self, path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
        """A new file that will take the place of `path`; its folder is made if missing. Raises WriteError."""
        target = Path(path)
        check_target(target)
        with reported(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(temporary_name(target.name))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            descriptor = os.open(temporary, flags | getattr(os, "O_CLOEXEC", 0), 0o666)  # less the umask
            file = os.fdopen(descriptor, "w+b")
            self.pending.append((file, temporary, target))
            yield file

    def finish(self) -> None:
        for file, _, target in self.pending:
            with reported(target):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        folders: dict[Path, Path] = {}
        while self.pending:
            _, temporary, target = self.pending[0]
            with reported(target):
                os.replace(temporary, target)
            self.pending.pop(0)
            folders[target.parent] = target
        for folder, target in folders.items():
            with reported(target):
                sync_folder(folder)

    def discard(self) -> None:
        for file, temporary, _ in self.pending:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                temporary.unlink()
        self.pending = []


@contextmanager
def committing() -> Iterator[Commit]:
    """Files that all appear when the block is left without an error; otherwise none does. Raises WriteError."""
    commit = Commit()
    try:
        yield commit
        targets = [target for _, _, target in commit.pending]
        commit.finish()
        for folder in {target.parent for target in targets}:
            sweep(folder, {target.name for target in targets})
    finally:
        commit.discard()


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """One file, open for binary writing, that takes its place when the block is left without an error. Raises WriteError."""
    with committing() as commit, commit.writing(path) as file:
        yield file


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for code that writes to a path: an empty file with a name of its own, beside `path`."""
    with committing() as commit, commit.writing(path):
        yield commit.pending[-1][1]


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """All of `data` under this name, or what stood there before. Raises WriteError."""
    with writing(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """UTF-8 text, all of it or what stood there before. Raises WriteError."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def copy_file(source: Path, target: Path) -> None:
    """The bytes of a regular file under another name, all of them or nothing. Raises SparsifyError."""
    from sparsify.files.regular import open_regular

    with open_regular(source) as given, writing(target) as file:
        while piece := given.read(1 << 20):
            file.write(piece)


def check_target(target: Path) -> None:
    """Raises WriteError for a name that nothing can have, and where something stands that is not a file."""
    try:
        encoded = os.fsencode(target)
    except UnicodeEncodeError:
        raise WriteError(target, "the name has characters that this system cannot store; choose another") from None
    if b"\0" in encoded:
        raise WriteError(target, "the name has a NUL character; choose another")
    if target.name in ("", "..") or os.path.isdir(target):
        raise WriteError(target, "a folder of that name is in the way; choose another name, or delete it")
    mode = stat.S_IFREG
    with suppress(OSError):
        mode = target.stat().st_mode
    if not stat.S_ISREG(mode):
        raise WriteError(target, "something that is not a file (a device, a pipe) is in the way; choose another name")


def temporary_name(name: str) -> str:
    kept = os.fsencode(name)[:NAME_BYTES].decode("utf-8", "ignore")
    return f".{kept}.{HOST}-{os.getpid()}-{PROCESS}{secrets.token_hex(4)}.tmp"


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """OSErrors inside are raised as WriteError that names `path`."""
    try:
        yield
    except SparsifyError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


def sync_folder(folder: Path) -> None:
    """The rename itself is on disk. File systems that cannot do that for a folder are let off."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


# --- what killed writers left ---------------------------------------------------------------------------------------------


def is_temporary(name: str) -> bool:
    """Whether a file name is one that a writer uses before the file is complete."""
    return TEMPORARY.match(name) is not None


def sweep(folder: str | os.PathLike[str], targets: Collection[str] = ()) -> None:
    """Remove the temporary files of writers that are gone. Those of living ones stay, and so does everything else.

    targets: names of files in whose place writers of earlier versions may have left theirs.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in islice(entries, SWEPT):
            with suppress(OSError):
                if abandoned(entry, targets) and entry.is_file(follow_symlinks=False):
                    os.unlink(entry.path)


def abandoned(entry: os.DirEntry[str], targets: Collection[str]) -> bool:
    found = TEMPORARY.match(entry.name)
    if found is None:
        former = OLD_TEMPORARY.fullmatch(entry.name)
        if former is None or (former["name"] or former["other"]) not in targets:
            return False
        return is_old(entry) or (former["pid"] is not None and os.name == "posix" and not alive(int(former["pid"])))
    if found["host"] != HOST or os.name != "posix":
        return is_old(entry)
    if int(found["pid"]) == os.getpid():
        return not found["token"].startswith(PROCESS)
    return not alive(int(found["pid"]))


def is_old(entry: os.DirEntry[str]) -> bool:
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is somebody else's
    return True
