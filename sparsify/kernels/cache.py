"""The cache folder: where it is, whose it is, what may be read from it, and how files get there.

    SPARSIFY_CACHE, else $XDG_CACHE_HOME/sparsify, else ~/.cache/sparsify
      kernels/<key>.so, kernels/<key>.py     generated code
      tune.json, gpu_tiles.json              what was measured

What lies there is run, so nothing is taken on trust. A folder serves only if it is ours and nobody else may write to it; a file
only if it is a regular file, no link, ours, written by nobody else, and holds what was put into it (`seal`). Everything
else counts as missing and is made again. Where the folder itself cannot be trusted or used, a temporary folder of this
process takes its place, which a warning says once, with what to do.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

from sparsify.errors import SparsifyError
from sparsify.kernels.fallback import note

MARK = b"\nsparsify sha256 "
LARGEST = 64 << 20  # bytes of a cached file; everything that is written here is far smaller
ABANDONED = 24 * 3600.0  # seconds after which a scratch file belongs to a process that was killed
SCRATCH = "write-"
lock = threading.RLock()
private: dict[int, Path] = {}  # process id → its own folder
swept: set[Path] = set()


class CacheError(SparsifyError, OSError):
    """There is no folder in which files can be kept, not even a temporary one."""


# --- which folder -----------------------------------------------------------------------------------------------------


def directory() -> Path:
    """The cache folder by name, absolute; it need not exist. Raises CacheError where there is neither a setting nor a home."""
    named = os.environ.get("SPARSIFY_CACHE", "")
    if named.strip():
        return Path(os.path.abspath(os.path.expanduser(named)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification: relative ones are ignored
        return Path(base) / "sparsify"
    try:
        home = os.path.expanduser("~") if os.path.isabs(os.environ.get("HOME", "/")) else home_of_user()
    except (KeyError, ImportError, RuntimeError):
        home = ""
    if not os.path.isabs(home):
        raise CacheError(
            "there is no home directory (HOME names none, and this user has no entry in the password file): set "
            "SPARSIFY_CACHE to a folder of your own"
        )
    return Path(home) / ".cache" / "sparsify"


def home_of_user() -> str:
    """The home directory by the password file. Raises KeyError without an entry."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_dir


def folder(name: str = "") -> Path:
    """The cache folder, or the folder `name` in it, made if needed: ours alone. Where that cannot be, the same in a temporary folder
    of this process, after a warning. Raises CacheError without either."""
    try:
        base = directory()
        place = base / name if name else base
        why = unusable(base) or (unusable(place, link=False) if name else "")
    except CacheError as error:
        why, place = str(error), None
    if place is not None and not why:
        sweep(place)
        return place
    where = "" if place is None else f"{place}: "
    note(f"sparsify: kernels are built and kept in a temporary folder of this process, because {where}{why}")
    return private_folder(name)


def unusable(path: Path, link: bool = True) -> str:
    """Why what lies in a folder must not be trusted, or cannot be made, with what to do; nothing if it serves. It is made if
    missing. link: it may be a symbolic link of ours."""
    try:
        make(path)
        itself, found = os.lstat(path), os.stat(path)
    except OSError as error:
        return f"it cannot be made ({error.strerror or error}); set SPARSIFY_CACHE to a folder of your own"
    is_link = stat.S_ISLNK(itself.st_mode)
    if is_link and not link:
        return "it is a symbolic link; remove it"
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a folder; remove it, or set SPARSIFY_CACHE to a folder of your own"
    if not hasattr(os, "geteuid"):
        return ""
    own = os.geteuid()
    for owner in {found.st_uid, itself.st_uid} - {own}:
        return f"it belongs to user {owner}, and this is user {own}; set SPARSIFY_CACHE to a folder of your own"
    if found.st_mode & 0o022:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}); run: chmod go-w '{path}'"
    return ""


def make(path: Path) -> None:
    """A folder and what is missing above it, for this user alone."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)


def private_folder(name: str = "") -> Path:
    """A temporary folder of this process, or the folder `name` in it; removed at its end. Raises CacheError if there can be none."""
    with lock:
        found = private.get(os.getpid())
        try:
            if found is None or not found.is_dir():
                found = private[os.getpid()] = Path(tempfile.mkdtemp(prefix="sparsify-"))
                atexit.register(remove_private, found, os.getpid())
            place = found / name if name else found
            make(place)
        except OSError as error:
            raise CacheError(f"no temporary folder can be made ({error.strerror or error}): set TMPDIR") from error
        return place


def remove_private(path: Path, owner: int) -> None:
    """At the end of the process that made it; not of one that was forked from that."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def sweep(place: Path) -> None:
    """Remove what killed processes left half written; once per process and folder."""
    if place in swept:
        return
    swept.add(place)
    with contextlib.suppress(OSError):
        for path in place.glob(f"{SCRATCH}*"):
            if path.is_file() and time.time() - path.lstat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)


# --- files ------------------------------------------------------------------------------------------------------------


def read(path: Path, largest: int = LARGEST) -> bytes | None:
    """The bytes of a regular file that is ours alone; None for everything else: missing, a link, a pipe, a folder, another
    user's, one that others may write to, too large, unreadable. Never waits."""
    flags = os.O_RDONLY
    for word in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, word, 0)
    try:
        handle = os.open(path, flags)
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or not ours(found) or found.st_size > largest:
            return None
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(largest + 1)
        return content if len(content) <= largest else None
    except OSError:
        return None
    finally:
        os.close(handle)


def ours(found: os.stat_result) -> bool:
    """Whether a file belongs to this user and nobody else may write to it."""
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def write(path: Path, content: bytes) -> None:
    """Put a whole file in place, on the disk before it gets its name; what stands there is replaced, unless it is a folder that
    holds something. Raises OSError."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=SCRATCH)  # mode 0600, a name of its own
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    with contextlib.suppress(OSError):  # the name too; some file systems cannot
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def keep(name: str, content: bytes, inside: str = "kernels") -> Path:
    """Write a file of this name to the cache, or, where that fails, to the temporary folder, after a warning. Raises CacheError."""
    place = folder(inside) / name
    try:
        write(place, content)
    except OSError as error:
        note(
            f"sparsify: {place.parent} cannot be written to ({error.strerror or error}): kernels are kept in a temporary folder of "
            "this process; set SPARSIFY_CACHE to a folder with space that you may write to"
        )
        place = private_folder(inside) / name
        try:
            write(place, content)
        except OSError as second:
            raise CacheError(f"{place} cannot be written ({second.strerror or second})") from second
    return place


def kept(name: str, inside: str = "kernels") -> tuple[Path, bytes] | None:
    """What `keep` wrote under this name, as far as it can be trusted: its place and its bytes."""
    own = private.get(os.getpid())
    for place in (folder(inside), *([own / inside] if own is not None else [])):
        content = read(place / name)
        if content is not None:
            return place / name, content
    return None


def seal(name: str, content: bytes) -> bytes:
    """`content` with a hash of itself and of its name behind it, so that both are one file and never disagree."""
    return content + MARK + digest(name, content)


def unseal(name: str, sealed: bytes) -> bytes | None:
    """What was sealed under this name; None when it was cut, changed, or belongs to another name."""
    content, mark, found = sealed[: -len(MARK) - 32], sealed[-len(MARK) - 32 : -32], sealed[-32:]
    return content if mark == MARK and found == digest(name, content) else None


def digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
