"""Names of a model hub, `owner/name` or `owner/name@revision`, as folders of its cache.

What is downloaded, cached, and from where says `huggingface_hub` with its own environment variables (`HF_HUB_OFFLINE=1`: the cache
alone; `HF_HUB_CACHE`: where it lies). Only the files that are asked for are fetched, and nothing in them runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sparsify.errors import SparsifyError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?", re.ASCII)


def is_hub_name(text: str) -> bool:
    """Whether a text can be a name of the hub; a folder that is there is a folder all the same."""
    return NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def hub_folder(name: str, files: Sequence[str], error: type[SparsifyError]) -> Path:
    """The folder in the hub's cache with those files of `name` that are there, downloaded first where that is needed and possible.

    files: names and patterns such as "*.safetensors". Raises `error` with the hub's reason: nothing of that name, no network, a
    revision that is not there, access denied.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.errors import LocalEntryNotFoundError as NotThere
    except ImportError as missing:
        raise error(
            f"{name} is no folder on this machine, and names of a model hub need the package huggingface_hub, which is not installed: "
            "pip install huggingface_hub, or pass a folder"
        ) from missing
    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(files))
        )
    except (HfHubHTTPError, HFValidationError, NotThere, OSError, ValueError) as reason:
        text = " ".join(str(reason).split())
        raise error(
            f"{name} is no folder on this machine, and the model hub did not give it: {text[:300]} (HF_HUB_OFFLINE=1 asks the cache alone)"
        ) from reason


__all__ = ["hub_folder", "is_hub_name"]
