"""What the code generators of both targets share: strict templates, and files of generated source.

    template + parameters ──render──▶ source ──sha256──▶ <cache>/kernels/<key>.<suffix>

The files are for reading, by people and by tools; what runs is the text that was generated, not what a file says.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.kernels.cache import keep, kept

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def strict_environment(directory: Path) -> Environment:
    """Templates of a directory, in which an undefined name is an error."""
    import jinja2

    loader = jinja2.FileSystemLoader(str(directory))
    return jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def write_once(text: str, suffix: str) -> Path:
    """Path of a file that holds `text`, named by its hash; written only if the cache does not hold it whole. Raises CacheError."""
    content = text.encode()
    name = f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    found = kept(name)
    return found[0] if found is not None and found[1] == content else keep(name, content)
