"""Where weights live while their block is not being pruned: in memory, or on disk for models larger than memory.

host on the meta device ─▶ load block i from safetensors ─▶ prune ─▶ write shard i ─▶ back to meta

with parameters_on_meta():
    host = LlamaForCausalLM(config)                         # buffers are real, parameters have no memory
prune_model(host, None, rules, batches, residence=StreamedWeights("dense/", "pruned/"))

The target folder is the state of the run: `pruned/pruning/` has the masks and statistics of each finished block, written after its
shard. The same run started again goes on with the first block that is missing there. `prune_on_disk` is all of it in one call.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sparsify.errors import PlanError, SparsifyError
from sparsify.files import kinds, strict_json
from sparsify.files.atomic import copy_file, is_temporary, sweep, write_bytes
from sparsify.files.tensor_file import INDEX, cast, open_tensors
from sparsify.files.tensors import TensorFile, write_tensors
from sparsify.model.blocks import repeated_blocks
from sparsify.ops.bits import pack_bits, unpack_bits
from sparsify.program import canonical_names
from sparsify.pruning.collect import Watcher
from sparsify.pruning.resume import parsed_stats, stats_text

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8

    from sparsify.files.strict_json import Json
    from sparsify.pruning.sequential import LayerStats, PruneResult

RECORDS = "pruning"
VERSION = 2  # of records and run.json: with content hashes
READABLE_VERSIONS = (1, 2)


class StoredMasks(Mapping[str, Tensor]):
    """Packed masks by parameter name, read from the records when asked for: at 7 B weights they are 0.8 GiB."""

    def __init__(self) -> None:
        self.files: dict[str, TensorFile] = {}

    def __getitem__(self, name: str) -> UInt8[Tensor, " bytes"]:
        return self.files[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class FolderMasks(StoredMasks):
    """The same as bool tensors of the parameters' shapes, for a folder that `prune_on_disk` wrote; empty for any other.

    Raises SparsifyError for a record that is damaged, or of other tensors than the folder's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tensors = open_tensors(folder)
        for path in sorted((folder / RECORDS).glob("*.safetensors")):
            file = open_record(path)
            for name, bits in file.parts.items():
                if name not in self.tensors:
                    raise file.bad(f"a mask of '{name}', which the folder does not have")
                count = prod(self.tensors[name].parts[name].shape)
                if bits.dtype != torch.uint8 or bits.shape != ((count + 7) // 8,):
                    raise file.bad(
                        f"the mask of '{name}' is {bits.dtype} {bits.shape}, which does not fit {count} weights"
                    )
                self.files[name] = file

    def __getitem__(self, name: str) -> Bool[Tensor, "*shape"]:
        return unpack_bits(super().__getitem__(name), torch.Size(self.tensors[name].parts[name].shape))


def open_record(path: Path) -> TensorFile:
    """Masks and statistics of one unit. Raises SparsifyError when the file is damaged."""
    file = TensorFile(path)
    if "version" in file.metadata:
        file.require_hashes()
    return file


def check_part(file: TensorFile, name: str, tensor: Tensor) -> None:
    """Raises SparsifyError when the file's tensor has another shape, or holds integers where the model has a floating parameter."""
    part = file.part(name)
    if part.shape != tuple(tensor.shape):
        raise SparsifyError(f"{file.path.name}: '{name}' has shape {part.shape}, the model {tuple(tensor.shape)}")
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not part.dtype.is_floating_point:
        raise SparsifyError(f"{file.path.name}: '{name}' is stored as {part.dtype}, the model has {tensor.dtype} there")


class Residence(Protocol):
    """What the driver asks of a place for weights."""

    def sample(self, name: str) -> Tensor | None:
        """A few entries of a dense weight that has no memory, to tell models apart; None when it has memory."""
        ...

    def masks(self) -> Mapping[str, Tensor]:
        """The mapping that the run's masks go to."""
        ...

    def opened(self, host: nn.Module, run: str) -> AbstractContextManager[object]:
        """Around the whole run: everything outside of repeated blocks is usable inside. run: hash of rules, weights, calibration."""
        ...

    def finished(self, unit: str) -> list[dict[str, Json]] | None:
        """Statistics of what an earlier start of the same run has put away for `unit`; None when it has to be pruned."""
        ...

    def loaded(self, unit: str, *, keep: bool = False) -> AbstractContextManager[object]:
        """The module `unit` is usable inside; keep: at the end its pruned weights are put away."""
        ...

    def loading_forward(self, watcher: Watcher) -> AbstractContextManager[object]:
        """Inside, a forward of the host loads each block as it comes and drops it after; the watcher is told."""
        ...

    def keep(
        self,
        result: PruneResult,
        name: str,
        tensor: Float[Tensor, "*experts p q"],
        mask: Bool[Tensor, "*experts p q"],
    ) -> None:
        """Put a finished parameter into the result, whose last layer has its statistics."""
        ...


class NoStreaming:
    """Everything is in memory already."""

    def sample(self, name: str) -> Tensor | None:
        return None

    def masks(self) -> dict[str, Tensor]:
        return {}

    def opened(self, host: nn.Module, run: str) -> AbstractContextManager[object]:
        return nullcontext()

    def finished(self, unit: str) -> list[dict[str, Json]] | None:
        return None

    def loaded(self, unit: str, *, keep: bool = False) -> AbstractContextManager[object]:
        return nullcontext()

    def loading_forward(self, watcher: Watcher) -> AbstractContextManager[object]:
        return nullcontext()

    def keep(
        self,
        result: PruneResult,
        name: str,
        tensor: Float[Tensor, "*experts p q"],
        mask: Bool[Tensor, "*experts p q"],
    ) -> None:
        assert isinstance(result.masks, dict)  # the run's are those of `masks`
        result.tensors[name], result.masks[name] = tensor, mask


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device (no memory, no initialisation) and real buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class StreamedWeights:
    """Weights in safetensors files (one, or shards with an index, as `save_pretrained` writes them); results go to `target` as shards.

    Peak memory: one block, everything outside of blocks, and the calibration's hidden states. Names in the files must be the host's.
    Everything else in `source` (config, tokenizer) is copied. dtype: floating tensors are cast to it as they are read; None: as stored.
    Raises SparsifyError for a tensor that is missing or has another shape,
    and PlanError when `target` holds another run or is `source`.
    """

    def __init__(self, source: str | Path, target: str | Path, dtype: torch.dtype | None = None) -> None:
        self.source, self.target, self.dtype = Path(source), Path(target), dtype
        self.given = open_tensors(self.source)
        self.files = {name: file.path for name, file in self.given.items()}
        if self.source.resolve() == self.target.resolve():
            raise PlanError(f"{self.target}: the pruned model needs a folder of its own, not the dense model's")
        self.written: dict[str, TensorFile] = {}
        self.stored = StoredMasks()
        self.pending: list[tuple[Tensor, LayerStats]] = []
        self.host: nn.Module = nn.Module()
        self.blocks: list[str] = []

    def check_shapes(self, model: nn.Module) -> None:
        """Raises SparsifyError when a tensor of the files cannot be that of `model` (which needs no memory)."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            file = self.given.get(name)
            if file is not None:
                check_part(file, name, tensor)

    # --- the driver's side ---

    def sample(self, name: str) -> Tensor | None:
        return self.given[name].rows(name, 1) if name in self.given else None

    def masks(self) -> StoredMasks:
        return self.stored

    @contextmanager
    def opened(self, host: nn.Module, run: str) -> Iterator[None]:
        self.host = host
        self.blocks = [name for stack in repeated_blocks(host) for name in stack.names]
        self.canonical = canonical_names(host)
        self.check_run(run if self.dtype is None else f"{run}:{self.dtype}")
        for folder in (self.target, self.records):  # what a killed process left half-written
            sweep(folder)
            for leftover in folder.glob("*.tmp[0-9]*"):  # by earlier versions
                leftover.unlink()
        self.load([name for name in self.own_names("") if not any(inside(name, block) for block in self.blocks)])
        yield
        self.finish()

    def finished(self, unit: str) -> list[dict[str, Json]] | None:
        """None as well when a shard was deleted: the unit is pruned again. Raises SparsifyError for damaged files."""
        path = self.record(unit)
        shards = [self.target / shard_name(part) for part in self.parts(unit)]
        if not self.touched(unit) or not all(file.exists() for file in (path, *shards)):
            return None
        try:
            record = open_record(path)
            stats = parsed_stats(record)
            if {name for layer in stats if isinstance(name := layer.get("name"), str)} != set(record.parts):
                raise record.bad("damaged: its statistics are of other layers than its masks")
        except SparsifyError as error:
            raise SparsifyError(
                f"{error}; delete {path.name} there to prune its layers again, or {self.target} to start over"
            ) from error
        for part, place in zip(self.parts(unit), shards, strict=True):
            try:
                shard = TensorFile(place)
                self.check_shard(shard, part, record)
                shard.verify()
            except SparsifyError as error:
                raise SparsifyError(
                    f"{error}; delete it to prune its layers again, or {self.target} to start over"
                ) from error
            self.written |= dict.fromkeys(self.own_names(part), shard)
        self.stored.files |= dict.fromkeys(record.parts, record)
        return stats

    def check_shard(self, shard: TensorFile, part: str, record: TensorFile) -> None:
        """A shard has the part's tensors, in their shapes; it is the one that the record was written after; masks fit."""
        seals = record.metadata.get("shards", "")
        if record.hashes is not None and f"{shard.path.name} {shard.seal}" not in seals.split("\n"):
            raise shard.bad(f"is not the shard that {record.path.name} was written for")
        for name in self.own_names(part):
            shape = tuple(self.tensor(name).shape)
            if name not in shard.parts or shard.parts[name].shape != shape:
                raise shard.bad(f"damaged: '{name}' is missing or has another shape than the model's {shape}")
            bits = record.parts.get(name)
            if bits is not None and (bits.dtype != torch.uint8 or bits.shape != ((prod(shape) + 7) // 8,)):
                raise record.bad(f"damaged: the mask of '{name}' does not fit its shape {shape}")

    @contextmanager
    def loaded(self, unit: str, *, keep: bool = False) -> Iterator[None]:
        touched = self.touched(unit)
        for block in touched:
            self.load(self.own_names(block))
        self.pending.clear()
        yield
        if keep:
            for part in self.parts(unit):
                self.write_shard(part, self.own_names(part))
            self.write_record(unit)
        for block in touched:
            self.drop(block)

    def touched(self, unit: str) -> list[str]:
        """The blocks that a unit lies in or contains."""
        return [block for block in self.blocks if inside(block, unit) or inside(unit, block)]

    def parts(self, unit: str) -> list[str]:
        """What gets shards of its own when the unit is finished: the unit inside of its block, or the blocks in it."""
        return [unit if inside(unit, block) else block for block in self.touched(unit)]

    @contextmanager
    def loading_forward(self, watcher: Watcher) -> Iterator[None]:
        """A block is there from the first call of any module in it until the first call of one in another block."""
        present: list[str] = []

        def leave() -> None:
            for block in present:
                self.drop(block)
            present.clear()

        def enter(_module: nn.Module, _args: object, block: str) -> None:
            if block not in present:
                leave()
                self.load(self.own_names(block))
                present.append(block)
                watcher.refresh()

        with ExitStack() as cleanup:
            cleanup.callback(leave)
            for block in self.blocks:
                for module in self.host.get_submodule(block).modules():
                    hook = module.register_forward_pre_hook(partial(enter, block=block))
                    cleanup.callback(hook.remove)
            yield

    def keep(
        self,
        result: PruneResult,
        name: str,
        tensor: Float[Tensor, "*experts p q"],
        mask: Bool[Tensor, "*experts p q"],
    ) -> None:
        self.pending.append((pack_bits(mask), result.layers[-1]))

    # --- the state of the run ---

    @property
    def records(self) -> Path:
        return self.target / RECORDS

    def record(self, unit: str) -> Path:
        return self.records / f"{file_label(unit) or 'model'}.safetensors"

    def check_run(self, run: str) -> None:
        """Raises PlanError when the target belongs to another run, or to none."""
        path = self.records / "run.json"
        if os.path.lexists(path):
            try:
                document = strict_json.read(path, PlanError, limit=1 << 16)
                found = document.get("run") if isinstance(document, dict) else None
                version = document.get("version", 1) if isinstance(document, dict) else None
                if not isinstance(found, str) or type(version) is not int or version not in READABLE_VERSIONS:
                    raise PlanError(f"{path}: no run of a version that this sparsify reads")
            except PlanError as error:
                raise PlanError(f"{error}: it is damaged; delete {self.target} to start again") from error
            if found != run:
                raise PlanError(
                    f"{self.target} holds another pruning run (other rules, weights, seed or calibration): choose another "
                    "target, or delete it"
                )
            return
        if any(self.target.glob("*.safetensors")):
            raise PlanError(f"{self.target} holds a model already: choose another target, or delete it")
        kinds.refuse_beside(self.target, kinds.DENSE, INDEX, PlanError)
        write_bytes(path, json.dumps({"run": run, "version": VERSION}).encode())

    def write_record(self, unit: str) -> None:
        """Masks and statistics of a unit whose shards are on disk: from now on it is finished."""
        bits = {stats.name: packed for packed, stats in self.pending}
        shards = {
            self.written[name].path.name: self.written[name].seal
            for part in self.parts(unit)
            for name in self.own_names(part)
        }
        metadata = {
            "version": str(VERSION),
            "stats": stats_text([asdict(stats) for _, stats in self.pending]),
            "shards": "\n".join(f"{file} {seal}" for file, seal in shards.items()),
        }
        write_tensors(self.record(unit), bits, metadata)
        self.stored.files |= dict.fromkeys(bits, open_record(self.record(unit)))
        self.pending.clear()

    # --- files ---

    def own_names(self, path: str) -> list[str]:
        """Canonical names of the tensors under a module that a checkpoint holds."""
        module = self.host.get_submodule(path)
        prefix = f"{path}." if path else ""
        return list(
            dict.fromkeys(
                self.canonical.get(prefix + name, prefix + name) for name in module.state_dict(keep_vars=True)
            )
        )

    def tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.host.get_submodule(owner), leaf)

    def load(self, names: list[str]) -> None:
        for name in names:
            if self.tensor(name).device.type != "meta":
                continue
            file = self.written.get(name) or self.given.get(name)
            if file is None:
                raise SparsifyError(
                    f"{self.source} has no tensor '{name}': its files must have the module's own names (a model that "
                    "transformers renames on loading, such as Mixtral, is written with them by "
                    "save_pretrained(…, save_original_format=False))"
                )
            check_part(file, name, self.tensor(name))
            self.bind(name, cast(file.read(name), self.dtype))

    def bind(self, name: str, value: Tensor) -> None:
        old = self.tensor(name)
        fresh = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for alias in [a for a, canonical in self.canonical.items() if canonical == name] or [name]:
            owner, _, leaf = alias.rpartition(".")
            setattr(self.host.get_submodule(owner), leaf, fresh)

    def drop(self, block: str) -> None:
        for name in self.own_names(block):
            self.bind(name, self.tensor(name).detach().to("meta"))

    def write_shard(self, label: str, names: list[str]) -> None:
        path = self.target / shard_name(label)
        write_tensors(path, {name: self.tensor(name) for name in names}, {"format": "pt"})
        self.written |= dict.fromkeys(names, TensorFile(path))

    def finish(self) -> None:
        """Blocks that no rule touched, everything outside of blocks, the index, and the other files."""
        for block in self.blocks:
            names = [name for name in self.own_names(block) if name not in self.written]
            if names:
                self.load(names)
                self.write_shard(block, names)
                self.drop(block)
        rest = [name for name in self.own_names("") if name not in self.written]
        if rest:
            self.write_shard("", rest)
        places = {name: file.path.name for name, file in sorted(self.written.items())}
        index = {"metadata": {"format": "pt"}, "weight_map": places}
        copy_companions(self.source, self.target, self.dtype)
        write_bytes(self.target / INDEX, json.dumps(index, indent=1).encode())  # last: now the folder is a model


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Config, tokenizer and whatever else lies beside the weights in `source`; what `target` has already is left. dtype: for the config."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or (target / path.name).exists() or is_weights(path) or is_temporary(path.name):
            continue
        if path.name == "config.json" and dtype is not None:
            document = strict_json.read(path)
            if not isinstance(document, dict):
                raise SparsifyError(f"{path}: a config must be a JSON object")
            document.pop("torch_dtype", None)
            document["dtype"] = str(dtype).removeprefix("torch.")
            write_bytes(target / path.name, (json.dumps(document, indent=2) + "\n").encode())
        else:
            copy_file(path, target / path.name)


def is_weights(path: Path) -> bool:
    """Files of dense weights, in any framework's format, and their indices."""
    return ".safetensors" in path.name or bool(
        {".bin", ".sparse", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"} & set(path.suffixes)
    )


def shard_name(label: str) -> str:
    """File of a block, or of everything outside of blocks (label "")."""
    return f"model-{file_label(label).replace('.', '-') or 'rest'}.safetensors"


def file_label(name: str) -> str:
    """A module's name as part of a file name: as it is, or mangled with a hash where a folder or another module could be meant."""
    if re.fullmatch(r"[A-Za-z0-9_.]{0,120}", name) and name not in ("rest", "model"):
        return name
    return (
        re.sub(r"[^A-Za-z0-9_.]", "_", name)[:80]
        + "_"
        + hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    )


def inside(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(outer + ".")


def memory_of(module: nn.Module) -> int:
    """Bytes of the parameters and buffers that are really allocated."""
    seen = {
        id(t): t.numel() * t.element_size()
        for t in (*module.parameters(), *module.buffers())
        if t.device.type != "meta"
    }
    return sum(seen.values())
