"""Names of adapters: what may be one, and where a name leads when adapters are found in a folder by name.

Names come from requests, so they are hostile: a name of a folder is one plain path component, and what it leads to lies inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsify.adapters import adapter as files
from sparsify.adapters import peft_format
from sparsify.errors import AdapterError
from sparsify.files.strict_json import short
from sparsify.plan import nearest

#: the name of no adapter, as PEFT spells it
BASE = "__base__"
LONGEST = 200


class Unknown(AdapterError):
    """No model or adapter has this name, or none any more."""


def check_name(name: object) -> str:
    """The name itself. Raises AdapterError for what cannot be one."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an adapter's name is a string that is not empty, got {short(name)}")
    if name == BASE:
        raise AdapterError(f"{BASE!r} is the name of the base, so no adapter can be called so")
    if len(name) > LONGEST or not name.isprintable():
        raise AdapterError(f"{short(name)} cannot be a name: at most {LONGEST} printable characters are taken")
    return name


def check_names(names: object, rows: int | None = None) -> tuple[str, ...]:
    """Names of a batch, one a row; one string is every row's. Raises AdapterError for anything else, and for another number than `rows`."""
    if isinstance(names, str):
        return (names,) * (1 if rows is None else rows)
    if not isinstance(names, Sequence) or isinstance(names, bytes | bytearray):
        raise AdapterError(
            f"adapter_names: expected a list with one name a row, or one name for all, got {short(names)}"
        )
    for name in names:
        if not isinstance(name, str):
            raise AdapterError(f"adapter_names: {short(name)} is no name; write {BASE!r} for a row without an adapter")
    if rows is not None and len(names) != rows:
        raise AdapterError(f"adapter_names: {len(names)} names for {rows} rows of the batch; name one adapter a row")
    return tuple(names)


def in_folder(folder: Path, name: str) -> Path | None:
    """The adapter folder of this name inside of `folder`; None where there is none, or where the name leads elsewhere."""
    if name in (".", "..") or any(c in name for c in "/\\\0:") or name.startswith("."):
        return None
    try:
        found = (folder / name).resolve()
        inside = found.parent == folder.resolve() and found.is_dir()
        return found if inside and holds_adapter(found) else None
    except (OSError, ValueError, RuntimeError):
        return None


def holds_adapter(folder: Path) -> bool:
    return (folder / files.TENSORS).is_file() or peft_format.is_peft(folder)


def listed(folder: Path) -> list[str]:
    """Names of the adapters in a folder."""
    try:
        return sorted(path.name for path in folder.iterdir() if in_folder(folder, path.name) is not None)
    except OSError:
        return []


def unknown(name: str, known: Iterable[str]) -> Unknown:
    return Unknown(f"no adapter is called {short(name)}{nearest(name, [*known, BASE])}")


__all__ = ["BASE", "Unknown", "check_name", "check_names", "holds_adapter", "in_folder", "listed", "unknown"]
