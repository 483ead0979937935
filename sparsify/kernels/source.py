"""What the code generators of both targets share: strict templates, the cache directory, files written once.

    template + parameters ──render──▶ source ──sha256──▶ <cache>/kernels/<key>.<suffix>

A file is written under a temporary name and moved into place, so that processes may write the same one at once and none
ever reads half of it. `SPARSIFY_CACHE` names the cache directory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any


def cache_directory() -> Path:
    """Where kernels and tuning results are kept: `SPARSIFY_CACHE`, else the user's cache directory."""
    named = os.environ.get("SPARSIFY_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsify"


@cache
def strict_environment(directory: Path) -> Any:
    """Templates of a directory, in which an undefined name is an error."""
    import jinja2

    loader = jinja2.FileSystemLoader(str(directory))
    return jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def write_once(text: str, suffix: str) -> Path:
    """Path of a file that holds `text`, named by its hash; written only if the cache does not hold it whole."""
    content = text.encode()
    directory = cache_directory() / "kernels"
    target = directory / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    if target.exists() and target.read_bytes() == content:
        return target
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, scratch = tempfile.mkstemp(dir=directory, prefix="write-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return target
