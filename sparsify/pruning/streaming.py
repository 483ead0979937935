"""Where weights live while their block is not being pruned: in memory, or on disk for models larger than memory.

host on the meta device ─▶ load block i from safetensors ─▶ prune ─▶ write shard i ─▶ back to meta

with parameters_on_meta():
    host = LlamaForCausalLM(config)                         # buffers are real, parameters have no memory
prune_model(host, None, rules, batches, residence=StreamedWeights("dense/", "pruned/"), resume_dir="state/")
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sparsify.blocks import repeated_blocks
from sparsify.errors import SparsifyError
from sparsify.masked import pack_bits
from sparsify.program import canonical_names
from sparsify.pruning.collect import Watcher


class Residence(Protocol):
    """What the driver asks of a place for weights."""

    def opened(self, host: nn.Module) -> AbstractContextManager[Any]:
        """Around the whole run: everything outside of repeated blocks is usable inside."""
        ...

    def loaded(self, unit: str) -> AbstractContextManager[Any]:
        """The module `unit` is usable inside; at the end its (pruned) weights are put away."""
        ...

    def loading_forward(self, watcher: Watcher) -> AbstractContextManager[Any]:
        """Inside, a forward of the host loads each block as it comes and drops it after; the watcher is told."""
        ...

    def keep(self, result: Any, name: str, tensor: Tensor, mask: Tensor) -> None:
        """Put a finished parameter into the result."""
        ...


class NoStreaming:
    """Everything is in memory already."""

    def opened(self, host: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def loaded(self, unit: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def loading_forward(self, watcher: Watcher) -> AbstractContextManager[Any]:
        return nullcontext()

    def keep(self, result: Any, name: str, tensor: Tensor, mask: Tensor) -> None:
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
    Everything else in `source` (config, tokenizer) is copied. Raises SparsifyError for a tensor that is missing or has another shape.
    """

    def __init__(self, source: str | Path, target: str | Path) -> None:
        self.source, self.target = Path(source), Path(target)
        self.files = find_tensors(self.source)
        self.written: dict[str, str] = {}
        self.host: nn.Module = nn.Module()
        self.blocks: list[str] = []

    # --- the driver's side ---

    @contextmanager
    def opened(self, host: nn.Module) -> Iterator[None]:
        self.host = host
        self.blocks = [name for stack in repeated_blocks(host) for name in stack.names]
        self.canonical = canonical_names(host)
        self.target.mkdir(parents=True, exist_ok=True)
        self.load([name for name in self.own_names("") if not any(inside(name, block) for block in self.blocks)])
        yield
        self.finish()

    @contextmanager
    def loaded(self, unit: str) -> Iterator[None]:
        touched = [block for block in self.blocks if inside(block, unit) or inside(unit, block)]
        for block in touched:
            self.load(self.own_names(block))
        yield
        for block in touched:
            self.write_shard(block, self.own_names(block))
            self.drop(block)

    @contextmanager
    def loading_forward(self, watcher: Watcher) -> Iterator[None]:
        with ExitStack() as cleanup:
            for block in self.blocks:

                def enter(_module: nn.Module, _args: Any, block: str = block) -> None:
                    self.load(self.own_names(block))
                    watcher.refresh()

                def leave(_module: nn.Module, _args: Any, _output: Any, block: str = block) -> None:
                    self.drop(block)
                    watcher.refresh()

                module = self.host.get_submodule(block)
                cleanup.callback(module.register_forward_pre_hook(enter).remove)
                cleanup.callback(module.register_forward_hook(leave).remove)
            yield

    def keep(self, result: Any, name: str, tensor: Tensor, mask: Tensor) -> None:
        result.masks[name] = pack_bits(mask)

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
        from safetensors import safe_open

        wanted: dict[Path, list[str]] = {}
        for name in names:
            if self.tensor(name).device.type != "meta":
                continue
            if name in self.written:
                wanted.setdefault(self.target / self.written[name], []).append(name)
            elif name in self.files:
                wanted.setdefault(self.files[name], []).append(name)
            else:
                raise SparsifyError(f"{self.source} has no tensor '{name}'")
        for path, inside_file in wanted.items():
            with safe_open(path, framework="pt") as file:
                for name in inside_file:
                    value = file.get_tensor(name)
                    if value.shape != self.tensor(name).shape:
                        raise SparsifyError(
                            f"{path.name}: '{name}' has shape {tuple(value.shape)}, the model {tuple(self.tensor(name).shape)}"
                        )
                    self.bind(name, value)

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
        from safetensors.torch import save_file

        shard = f"model-{label.replace('.', '-') or 'rest'}.safetensors"
        temporary = self.target / f"{shard}.tmp{os.getpid()}"
        save_file({name: self.tensor(name).detach().contiguous() for name in names}, temporary, {"format": "pt"})
        os.replace(temporary, self.target / shard)
        self.written |= dict.fromkeys(names, shard)

    def finish(self) -> None:
        """Blocks that no rule touched, everything outside of blocks, the index, and the other files."""
        for block in self.blocks:
            names = self.own_names(block)
            if any(name not in self.written for name in names):
                self.load(names)
                self.write_shard(block, names)
                self.drop(block)
        rest = [name for name in self.own_names("") if name not in self.written]
        if rest:
            self.write_shard("", rest)
        index = {"metadata": {"format": "pt"}, "weight_map": dict(sorted(self.written.items()))}
        temporary = self.target / f"index.tmp{os.getpid()}"
        temporary.write_text(json.dumps(index, indent=1))
        os.replace(temporary, self.target / "model.safetensors.index.json")
        for path in self.source.iterdir():
            if path.is_file() and ".safetensors" not in path.name and not (self.target / path.name).exists():
                shutil.copy2(path, self.target / path.name)


def inside(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(outer + ".")


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → file, from an index or from the files' headers. Raises SparsifyError when there is none."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise SparsifyError(f"{folder} has no safetensors files")
    return found


def memory_of(module: nn.Module) -> int:
    """Bytes of the parameters and buffers that are really allocated."""
    seen = {
        id(t): t.numel() * t.element_size()
        for t in (*module.parameters(), *module.buffers())
        if t.device.type != "meta"
    }
    return sum(seen.values())
