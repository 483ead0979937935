"""Which names a server answers to, and what may be added while it runs: folders inside of one folder, and nothing else.

A name or a path comes from a client, so it is hostile: what it leads to lies inside of the adapter folder, after every link is followed,
and holds no link itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import AdapterError
from sparsify.files.strict_json import short
from sparsify.serving.names import BASE, Unknown, in_folder

if TYPE_CHECKING:
    from sparsify.serving.host import ServingHandle

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")
FILES = 64
"""Entries that an adapter's folder has at most."""


class Forbidden(AdapterError):
    """The server was started so that this cannot be asked of it."""


class ServedAdapters:
    """Names of a server: the base's, those of adapters. base: what the model itself is called. folder: where adapters may come from."""

    def __init__(self, handle: ServingHandle, base: str, folder: Path | None) -> None:
        self.handle, self.base, self.folder = handle, base, folder
        self.hidden: set[str] = set()
        self.lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return [
            name for name in self.handle.names if name not in self.hidden and NAME.fullmatch(name) and name != self.base
        ]

    def find(self, model: str) -> str:
        """The adapter that a request's `model` means. Raises Unknown."""
        if model == self.base:
            return BASE
        if not self.known(model):
            raise Unknown(f"no model is called {short(model)}; /v1/models lists those that are")
        return model

    def known(self, name: str) -> bool:
        """Whether an adapter has this name, without a look at all the others."""
        if name in (self.base, BASE) or name in self.hidden or not NAME.fullmatch(name):
            return False
        with self.handle.store.changed:
            if name in self.handle.store.entries:
                return True
        return self.folder is not None and in_folder(self.folder, name) is not None

    def add(self, name: str, path: str, again: bool = False) -> None:
        """Read an adapter of the folder and serve it under a name. again: exchange what has the name, which stays where that fails.

        Raises Forbidden, AdapterError.
        """
        place = self.inside(path)
        if not NAME.fullmatch(name) or name in (self.base, BASE):
            raise AdapterError(
                f"{short(name)} cannot be the name of an adapter: letters, digits and . _ : @ + - are taken, at most 128"
            )
        if self.known(name) and not again:
            raise AdapterError(f"an adapter is called {name!r} already; unload it first, or give load_inplace")
        self.handle.store.exchange(name, place, taken=again)
        with self.lock:
            self.hidden.discard(name)

    def remove(self, name: str) -> None:
        """Forget a name; requests that run go on. Raises Unknown."""
        with self.lock:
            if not self.known(name):
                raise Unknown(f"no adapter is called {short(name)}")
            self.forget(name)
            if self.folder is not None and in_folder(self.folder, name) is not None:
                self.hidden.add(name)

    def forget(self, name: str) -> None:
        with contextlib.suppress(AdapterError):  # it lies in the folder and was never asked for
            self.handle.remove(name)

    def without_paths(self, reason: str) -> str:
        """A reason with names for folders: where they lie is nobody's business."""
        with self.handle.store.changed:
            places = {name: entry.folder for name, entry in self.handle.store.entries.items()}
        lying = {str(place): name for name, place in places.items() if isinstance(place, Path) and place.is_absolute()}
        if self.folder is not None:
            reason = reason.replace(f"{self.folder.resolve()}/", "")
        for folder in sorted(lying, key=len, reverse=True):
            reason = reason.replace(folder, lying[folder])
        return reason

    def inside(self, path: str) -> Path:
        """The folder that a client's path means, all links followed. Raises Forbidden without a folder, AdapterError outside of it."""
        if self.folder is None:
            raise Forbidden("adapters cannot be added: the server was started without --adapter-dir")
        refused = AdapterError(f"{short(path)}: no adapter folder inside of the server's --adapter-dir")
        try:
            if not path or "\0" in path or len(path) > 4096:
                raise refused
            root = self.folder.resolve(strict=True)
            found = (root / path).resolve(strict=True)
            if found == root or not found.is_relative_to(root) or not found.is_dir():
                raise refused
            with os.scandir(found) as entries:
                for place, entry in enumerate(entries):
                    plain = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                    if place >= FILES or not plain:
                        raise AdapterError(
                            f"{short(path)}: an adapter's folder holds files of its own, no links and at most {FILES}"
                        )
        except AdapterError:
            raise
        except (OSError, ValueError, RuntimeError):
            raise refused from None
        return found


__all__ = ["Forbidden", "ServedAdapters", "Unknown"]
