"""What lies in a folder, and what must not be written beside it because a reader would take one for the other.

    adapter             adapter.safetensors                        save_adapter          ─┐ both are what load_adapter reads
    PEFT adapter        adapter_config.json, adapter_model.*       export_lora, PEFT     ─┘
    dense checkpoint    model.safetensors, an index, …             save_pretrained, prune_on_disk, save_dense
    sparse checkpoint   model.sparse                               sparsify prune --sparse, save_sparse
    resume folder       group-*.safetensors, state.json            sparsify.compile(…, resume_dir=)

An adapter of ours may lie beside a model: nothing takes one for the other (a Trainer's checkpoint has both). A PEFT adapter may not:
`from_pretrained` of transformers would apply it.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from sparsify.errors import AdapterError, SparsifyError
from sparsify.files.atomic import shown

ADAPTER, PEFT, DENSE, SPARSE, RESUME = (
    "adapter",
    "PEFT adapter",
    "dense checkpoint",
    "sparse checkpoint",
    "resume folder",
)
NAMES = {
    ADAPTER: re.compile(r"adapter\.safetensors"),
    PEFT: re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)"),
    DENSE: re.compile(r"(model|pytorch_model)(-.*)?\.(safetensors|bin)(\.index\.json)?"),
    SPARSE: re.compile(r"model\.sparse"),
    RESUME: re.compile(r"group-[0-9a-f]{24}\.safetensors"),
}
MADE_BY = {
    ADAPTER: "save_adapter",
    PEFT: "export_lora or PEFT",
    DENSE: "save_pretrained or prune_on_disk",
    SPARSE: "save_sparse",
    RESUME: "compile(…, resume_dir=…)",
}
FINE = {frozenset((ADAPTER, DENSE)), frozenset((ADAPTER, SPARSE))}


def kind_of(name: str) -> str | None:
    """What a file of this name belongs to; None for all others."""
    return next((kind for kind, names in NAMES.items() if names.fullmatch(name)), None)


def found_in(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Kind → a file of that kind, of a folder; empty for one that is not there."""
    found: dict[str, str] = {}
    with suppress(OSError, ValueError):
        for name in sorted(os.listdir(folder)):
            kind = kind_of(name)
            if kind is not None:
                found.setdefault(kind, name)
    if RESUME not in found and is_state(Path(folder) / "state.json"):
        found[RESUME] = "state.json"
    return found


def is_state(path: Path) -> bool:
    """Whether a state.json is that of a pruning run; other tools have files of that name too."""
    with suppress(OSError, ValueError):
        if path.is_file() and path.stat().st_size < 4096:
            return b'"fingerprint"' in path.read_bytes()
    return False


def refuse_beside(
    folder: str | os.PathLike[str], kind: str, file: str, error: type[SparsifyError] = SparsifyError
) -> None:
    """Raise `error` when `folder` holds another kind that a reader would take for `kind`, or the other way round.

    file: what is to be written, for the message.
    """
    for other, name in found_in(folder).items():
        if other != kind and frozenset((kind, other)) not in FINE:
            raise error(
                f"{shown(Path(folder))}: {name} there belongs to a {other} (made by {MADE_BY[other]}), and {file} beside it would "
                f"leave open which of the two is meant: choose another folder for the {kind}, or delete the {other} first"
            )


def refuse_two_adapters(folder: str | os.PathLike[str]) -> None:
    """Raise AdapterError for a folder that holds an adapter and a PEFT adapter: which one is meant, nobody can say."""
    path = Path(folder)
    found = []
    with suppress(OSError, ValueError):
        found = [(path / name).is_file() for name in ("adapter.safetensors", "adapter_config.json")]
    if found == [True, True]:
        raise AdapterError(
            f"{shown(path)} holds two adapters: adapter.safetensors (made by save_adapter) and adapter_config.json (a PEFT "
            "adapter, made by export_lora or PEFT): move one of them to a folder of its own, or delete the files of the one "
            "that is not meant"
        )
