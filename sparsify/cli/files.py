"""`sparsify adapter` and `sparsify checkpoint`: look at what lies on disk, and say which command takes what lies there instead.

adapter      a folder or file that save_adapter wrote, or PEFT's folder
checkpoint   a file that save_sparse wrote, a folder that `sparsify prune` wrote, any folder of safetensors or pytorch_model.bin,
             one safetensors file
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.cli.model_folder import (
    ADAPTER_FILE,
    CONFIG,
    INDICES,
    PEFT_CONFIG,
    SPARSE_FILE,
    check_kinds,
    read_index,
    read_object,
)
from sparsify.cli.rule import line_of, reading
from sparsify.console import one_line
from sparsify.errors import InputError
from sparsify.files.regular import check_regular

if TYPE_CHECKING:
    from sparsify.pruning.sparse_checkpoint import SparseCheckpoint

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
RECORD = "pruning.json"


# --- adapters ---


def adapter(
    folder: Annotated[Path, typer.Argument(help="A folder that save_adapter wrote, or PEFT's.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the document as JSON.")] = False,
) -> None:
    """Check an adapter and say what it changes."""
    found = what_is_at(folder)
    if found == "peft":
        show_peft(folder, as_json)
        return
    if found != "adapter":
        raise InputError(f"{folder}: {ADAPTER_HINTS.get(found, ADAPTER_HINTS['']).format(path=folder)}")
    from sparsify.adapters import adapter as files

    loaded = files.load(folder)
    if as_json:
        typer.echo(json.dumps(files.to_document(loaded), indent=1, sort_keys=True))
        return
    for delta in loaded.deltas:
        size = delta.values.numel() + (delta.a.numel() if delta.a is not None else 0)
        what = {
            "column": "columns",
            "row": "rows",
            "sparse": "entries",
            "lora": "rank",
            "full": "in full",
            "buffer": "whole buffer",
        }
        count = f"{delta.rank} " if delta.rank else ""
        typer.echo(one_line(f"{delta.param}: {count}{what.get(delta.kind, delta.kind)}, {size:,} numbers"))
    made = one_line(str(loaded.info.get("sparsify", "?")))
    typer.echo(f"{len(loaded.deltas)} weights, {loaded.nbytes() / 1024:.1f} KiB, made by sparsify {made}")
    if folder.is_dir() and (folder / PEFT_CONFIG).exists():
        typer.echo(f"beside it lies a PEFT adapter ({PEFT_CONFIG})", err=True)


ADAPTER_HINTS = {
    "": f"no {ADAPTER_FILE} and no {PEFT_CONFIG} there; is it an adapter that save_adapter or PEFT wrote?",
    "model": "a model, not an adapter: `sparsify checkpoint {path}` says how sparse it is, `sparsify inspect {path}` what could train",
    "sparse": "a sparse checkpoint, not an adapter: `sparsify checkpoint {path}` looks at it",
}


def what_is_at(path: Path) -> str:
    """One of adapter, peft, sparse, model (with tensors or a config); the empty word for a folder with nothing of ours.

    Raises InputError for what is not there, for FIFOs and devices, and for a file that is not safetensors.
    """
    if not path.is_dir():
        check_regular(path, InputError, "file or folder")
        if path.suffix == ".sparse":
            return "sparse"
        return {"sparsify-sparse": "sparse", "sparsify-adapter": "adapter"}.get(declared_format(path), "model")
    check_kinds(path)
    if (path / ADAPTER_FILE).exists():
        return "adapter"
    if (path / PEFT_CONFIG).exists():
        return "peft"
    if (path / SPARSE_FILE).exists():
        return "sparse"
    return "model" if (path / CONFIG).exists() or weight_files(path) else ""


def declared_format(path: Path) -> str:
    """What a safetensors file says to be: sparsify-sparse, sparsify-adapter, or anything else (mostly "pt")."""
    from safetensors import safe_open

    with reading(f"{path}: damaged or not a safetensors file"), safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return "sparsify-adapter" if "sparsify" in metadata else metadata.get("format", "")


def show_peft(folder: Path, as_json: bool) -> None:
    """What a PEFT folder changes: kind, rank, scale, and the size of every module's factors."""
    config = read_object(folder / PEFT_CONFIG)
    shapes = peft_shapes(folder)
    modules: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        modules.setdefault(module, []).append((f"lora_{part}" if part else "", shape))
    if as_json:
        shown = {name: list(shape) for name, shape in shapes.items()}
        typer.echo(json.dumps({"format": "peft", "config": config, "tensors": shown}, indent=1, sort_keys=True))
        return
    for module, parts in modules.items():
        ranks = [shape[0] for part, shape in parts if part.startswith("lora_A") and shape]
        count = sum(size_of(shape) for _, shape in parts)
        what = f"rank {ranks[0]}" if ranks else "in full" if parts == [("", parts[0][1])] else "factors"
        typer.echo(one_line(f"{module}: {what}, {count:,} numbers"))
    facts = [f"{key} {config[key]}" for key in ("r", "lora_alpha") if isinstance(config.get(key), int | float)]
    base = config.get("base_model_name_or_path")
    facts += [f"trained on {base}"] if isinstance(base, str) and base else []
    total = sum(map(size_of, shapes.values()))
    kind = one_line(line_of(", ".join([f"PEFT adapter of type {config.get('peft_type', '?')}", *facts])))
    typer.echo(f"{len(modules)} weights, {total:,} numbers; {kind}")


def size_of(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def peft_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a PEFT adapter, in order of names. Raises InputError."""
    from safetensors import safe_open

    path = next((folder / name for name in PEFT_WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise InputError(f"{folder}: has {PEFT_CONFIG}, but neither {' nor '.join(PEFT_WEIGHTS)}")
    check_regular(path, InputError)
    if path.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in sorted(read_pickled(path).items())}
    with reading(f"{path}: damaged or not a safetensors file"), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


# --- checkpoints ---


def checkpoint(
    path: Annotated[
        Path, typer.Argument(help="A file that save_sparse wrote, or a folder: of `sparsify prune`, or any model's.")
    ],
    layers: Annotated[bool, typer.Option(help="One line per compressed weight: shape, zeros, stored size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, sizes in bytes.")] = False,
    to_dense: Annotated[
        Path | None, typer.Option("--dense", help="Write an ordinary checkpoint, zeros included, to this folder.")
    ] = None,
) -> None:
    """Check a checkpoint and say how large it is, how sparse, and which dense model a sparse one was pruned from."""
    kind = what_is_at(path)
    if kind in ("adapter", "peft"):
        whose = "a PEFT adapter" if kind == "peft" else "an adapter"
        raise InputError(f"{path}: {whose}, not a checkpoint: `sparsify adapter {path}` looks at it")
    if kind == "":
        raise InputError(f"{path}: no {SPARSE_FILE}, no safetensors and no pytorch_model.bin there")
    if kind == "model":
        if to_dense is not None:
            raise InputError(f"{path}: is dense already; --dense expands a sparse checkpoint")
        show_dense(path, layers, as_json)
        return
    from sparsify.pruning.sparse_checkpoint import open_sparse

    file = path / SPARSE_FILE if path.is_dir() else path
    check_regular(file, InputError)
    with reading(f"{file}: not a sparse checkpoint"):
        found = open_sparse(file)
    if to_dense is not None:
        expand(found, to_dense)
    show_sparse(found, file, layers, as_json)


def show_sparse(found: SparseCheckpoint, path: Path, layers: bool, as_json: bool) -> None:
    sizes = {name: (dense, stored) for name, dense, stored in found.sizes()}
    if as_json:
        weights = {
            name: {"shape": entry.shape, "sparsity": entry.sparsity, "dense": sizes[name][0], "stored": sizes[name][1]}
            for name, entry in found.entries.items()
        }
        document = {"base": found.base, "file": path.stat().st_size, "compressed": weights, "plain": found.plain}
        typer.echo(json.dumps(document, indent=1))
        return
    if layers:
        for name, entry in found.entries.items():
            shape = " × ".join(map(str, entry.shape))
            typer.echo(one_line(f"{name}: {shape}, {entry.sparsity:.1%} zeros, {sizes[name][1] / 1024:.1f} KiB"))
    zeros = sum(entry.numel - entry.survivors for entry in found.entries.values())
    total = sum(entry.numel for entry in found.entries.values())
    dense, stored = (sum(pair[i] for pair in sizes.values()) for i in (0, 1))
    file = path.stat().st_size
    typer.echo(
        f"{len(found.entries)} compressed tensors, {zeros / max(total, 1):.1%} zeros, {stored / 2**20:.2f} MiB instead of "
        f"{dense / 2**20:.2f} MiB; {len(found.plain)} tensors as they are"
    )
    typer.echo(f"the file: {file / 2**20:.2f} MiB, dense {(file - stored + dense) / 2**20:.2f} MiB")
    typer.echo(
        one_line(f"pruned from the dense model {found.base}") if found.base else "its dense model is not recorded"
    )


def expand(found: SparseCheckpoint, folder: Path) -> None:
    """Dense weights, and config and tokenizer if they lie beside the sparse file, in a folder that appears when it is complete."""
    from sparsify.files.new_folder import new_folder
    from sparsify.pruning.streaming import copy_companions

    with new_folder(folder, InputError) as begun:
        found.save_dense(begun)
        if (found.path.parent / CONFIG).is_file():
            copy_companions(found.path.parent, begun)
    typer.echo(f"written to {folder}", err=True)


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of an ordinary checkpoint. stored: its bytes in a sparse checkpoint."""

    shape: tuple[int, ...]
    numel: int
    zeros: int
    bytes: int
    stored: int


def show_dense(path: Path, layers: bool, as_json: bool) -> None:
    """Tensors, zeros and bytes of an ordinary checkpoint, and what a sparse one would take."""
    found = {name: measured(tensor) for name, tensor in dense_tensors(path)}
    record = pruning_record(path)
    if as_json:
        rows = {
            name: {"shape": t.shape, "sparsity": t.zeros / max(t.numel, 1), "dense": t.bytes, "stored": t.stored}
            for name, t in found.items()
        }
        typer.echo(json.dumps({"format": "dense", "tensors": rows, "pruning": record}, indent=1))
        return
    if layers:
        for name, t in found.items():
            shape = " × ".join(map(str, t.shape)) or "one number"
            typer.echo(one_line(f"{name}: {shape}, {t.zeros / max(t.numel, 1):.1%} zeros, {t.bytes / 1024:.1f} KiB"))
    count, zeros, size, stored = (
        sum(getattr(t, f) for t in found.values()) for f in ("numel", "zeros", "bytes", "stored")
    )
    matrices = [t for t in found.values() if len(t.shape) >= 2]
    inside, among = sum(t.zeros for t in matrices), sum(t.numel for t in matrices)
    typer.echo(
        f"{len(found)} tensors, {count:,} numbers, {zeros / max(count, 1):.1%} zeros ({inside / max(among, 1):.1%} in the "
        f"{len(matrices)} matrices), {size / 2**20:.2f} MiB; as a sparse checkpoint {stored / 2**20:.2f} MiB"
    )
    if record is not None:
        settings = record.get("settings")
        method = settings.get("method") if isinstance(settings, dict) else None
        pruned = record.get("layers")
        count = len(pruned) if isinstance(pruned, list) else 0
        typer.echo(one_line(f"{RECORD}: {count} weights pruned by {method or 'an unknown method'}"))


def measured(tensor: Any) -> DenseTensor:
    import torch

    from sparsify.pruning.sparse_checkpoint import stored_bytes

    zeros = int(tensor.numel() - torch.count_nonzero(tensor.view(torch.uint8) if needs_bytes(tensor) else tensor))
    size = tensor.numel() * tensor.element_size()
    return DenseTensor(
        tuple(tensor.shape), tensor.numel(), zeros, size, stored_bytes(tensor.numel(), tensor.numel() - zeros, tensor.element_size())
    )  # fmt: skip


def needs_bytes(tensor: Any) -> bool:
    """Eight-bit floats, which torch cannot compare with zero everywhere (−0.0 counts as a number there)."""
    return tensor.is_floating_point() and tensor.element_size() == 1


def weight_files(folder: Path) -> list[Path]:
    """Files of an ordinary checkpoint: safetensors (not an adapter's), or else pickled ones."""
    safe = [p for p in sorted(folder.glob("*.safetensors")) if p.name not in (ADAPTER_FILE, PEFT_WEIGHTS[0])]
    return safe or sorted(folder.glob("pytorch_model*.bin"))


def dense_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of a file or folder by name, one in memory at a time (all of one file, where it is pickled)."""
    from safetensors import safe_open

    index = next((path / name for name in INDICES if (path / name).exists()), None) if path.is_dir() else None
    places = {} if index is None else read_index(index)
    files = [path] if not path.is_dir() else list(dict.fromkeys(places.values())) if places else weight_files(path)
    if not files:
        raise InputError(f"{path}: no safetensors and no pytorch_model.bin there")
    seen: set[str] = set()
    for file in (check_regular(file, InputError) for file in files):
        if file.suffix == ".bin":
            tensors = read_pickled(file)
            for name in sorted(tensors):
                seen.add(name)
                yield name, tensors[name]
            continue
        with reading(f"{file}: damaged or not a safetensors file"):
            with safe_open(file, framework="pt") as opened:
                names = sorted(opened.keys())
            for name in names:
                with safe_open(file, framework="pt") as opened:
                    tensor = opened.get_tensor(name)
                seen.add(name)
                yield name, tensor
    if missing := sorted(set(places) - seen):
        raise InputError(f"{index}: lists '{missing[0]}' ({len(missing)} in all), which its file does not hold")


def read_pickled(path: Path) -> Mapping[str, Any]:
    """Tensors of a pickled state dict, read without running anything in it."""
    import torch

    with reading(f"{path}: not a pickled state dict of tensors alone"):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise InputError(f"{path}: not a state dict (tensors by name)")
    return found


def pruning_record(path: Path) -> dict[str, Any] | None:
    """What `sparsify prune` wrote about the folder, if it did."""
    return read_object(path / RECORD) if path.is_dir() and (path / RECORD).exists() else None
