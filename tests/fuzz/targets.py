"""What is fuzzed: valid files of every kind that sparsify reads, and the reader of each.

A target has files (name → bytes), and `read(folder)`, which gives back what the files mean (anything that `==` compares) or raises.
sealed: the files carry hashes, so whatever is accepted after one change means what it meant before.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, Plan, Prune, Quantize, RoSA
from sparsify.files.tensor_file import FolderTensors
from sparsify.pruning.on_disk import prune_on_disk
from sparsify.pruning.sparse_checkpoint import open_sparse, save_sparse

#: Targets that fail today because of code that is being changed elsewhere: name → why. They are left out of the default run.
PENDING: dict[str, str] = {}

TARGETS: dict[str, Callable[[Path], Target]] = {}


@dataclass
class Target:
    """files: relative name → bytes of a valid set. read: what they mean. victims: models that a refusal must not change.

    refuses: False for what is read as if it were not there when it is damaged.
    """

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    sealed: bool
    victims: list[nn.Module] = field(default_factory=list)
    tries: int = 40
    refuses: bool = True

    def place(self, folder: Path, changed: dict[str, bytes]) -> None:
        for name, raw in (self.files | changed).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)


def target(make: Callable[[Path], Target]) -> Callable[[Path], Target]:
    TARGETS[make.__name__] = make
    return make


def taken_from(folder: Path, files: list[str] | None = None) -> dict[str, bytes]:
    names = files or [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: (folder / name).read_bytes() for name in names}


def digest(model: nn.Module) -> str:
    """Parameters, buffers, flags, classes: everything of a model that a refusal must leave as it was."""
    hashed = hashlib.sha256()
    for kind, tensors in (("p", model.named_parameters()), ("b", model.named_buffers())):
        for name, tensor in tensors:
            hashed.update(f"{kind} {name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
            hashed.update(bytes_of(tensor))
    for name, module in model.named_modules():
        hashed.update(f"{name} {type(module).__name__} {module.training}".encode())
    handle = model.__dict__.get("sparsify")
    if handle is not None:
        hashed.update(f"{handle.active} {sorted(handle.adapters)} {sorted(handle.parked)}".encode())
    return hashed.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def meaning(tensors: Any) -> dict[str, Any]:
    return {name: (str(t.dtype), tuple(t.shape), bytes_of(t)) for name, t in tensors.items()}


@cache
def example() -> Tensor:
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def host_of(plan: Plan) -> Any:
    torch.manual_seed(0)
    host = sparsify.compile(tiny.Mlp(), plan, example=example(), progress=False)
    tiny.disturb(host)
    return host


def adapter_meaning(adapter: Any) -> Any:
    deltas = [
        (d.param, d.kind, d.transposed, d.scale, bytes_of(d.channels), bytes_of(d.values), str(d.values.dtype), d.a is not None and bytes_of(d.a))
        for d in adapter.deltas
    ]  # fmt: skip
    return deltas, adapter.bases, adapter.info


# --- adapters -------------------------------------------------------------------------------------------------------------


def adapter_target(plan: Plan, folder: Path, tries: int) -> Target:
    host = host_of(plan)
    host.sparsify.save_adapter(folder)

    def read(place: Path) -> Any:
        host.sparsify.load_adapter(place, "x")
        try:
            return adapter_meaning(host.sparsify.get("x"))
        finally:
            host.sparsify.remove_adapter("x")

    return Target(taken_from(folder), read, True, [host], tries)


@target
def adapter_of_channels(folder: Path) -> Target:
    return adapter_target(Plan([S2FT(fraction=0.2, budget="structure")]), folder, 40)


@target
def adapter_of_entries_and_factors(folder: Path) -> Target:
    return adapter_target(Plan([RoSA(rank=2, density=0.05, mask="random")], train=["head"]), folder, 40)


@target
def peft_adapter(folder: Path) -> Target:
    host = host_of(Plan([LoRA(rank=2)]))
    host.sparsify.export_lora(folder)

    def read(place: Path) -> Any:
        host.sparsify.load_adapter(place, "x")
        try:
            return adapter_meaning(host.sparsify.get("x"))[0]
        finally:
            host.sparsify.remove_adapter("x")

    return Target(taken_from(folder), read, False, [host], 40)


# --- sparse checkpoints -----------------------------------------------------------------------------------------------------


@target
def sparse_checkpoint(folder: Path) -> Target:
    torch.manual_seed(0)
    model, victim = tiny.Mlp(), tiny.Mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.2)
    save_sparse(model, folder / "model.sparse", base=tiny.Mlp())
    host_state = digest(victim)

    def read(place: Path) -> Any:
        found = open_sparse(place / "model.sparse")
        fresh = tiny.Mlp()
        found.load_into(fresh, sparse=False)
        assert digest(victim) == host_state
        return found.base, sorted(found.masked), meaning(fresh.state_dict())

    return Target(taken_from(folder), read, True, [victim], 40)


@target
def sparse_checkpoint_of_version_1(folder: Path) -> Target:
    """Without hashes: what is accepted may mean something else, but nothing else may happen."""
    made = sparse_checkpoint(folder)
    opened = open_sparse(folder / "model.sparse")
    parts = {name: opened.part(name) for name in opened.file.parts}
    save_file(parts, folder / "model.sparse", {**opened.file.metadata, "version": "1"})
    return Target(taken_from(folder), made.read, False, made.victims, 40)


# --- pruning ------------------------------------------------------------------------------------------------------------------


@target
def resume_folder(folder: Path) -> Target:
    torch.manual_seed(0)
    model = tiny.Mlp()
    plan = Plan([Prune(sparsity=0.5, method="wanda", match="layers.*")])

    def read(place: Path) -> Any:
        host = sparsify.compile(
            model, plan, calibration=[example()], example=example(), progress=False, resume_dir=place
        )  # fmt: skip
        return meaning(host.state_dict())

    read(folder)
    return Target(taken_from(folder), read, True, [model], 8)


class Blocks(nn.Module):
    """Equal blocks, which are streamed one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def prune_blocks(source: Path, out: Path) -> Any:
    plan = Plan([Prune(sparsity=0.5, method="magnitude")])
    prune_on_disk(source, out, plan, build=Blocks, example=example(), progress=False)
    return meaning(FolderTensors(out))


@target
def prune_stream(folder: Path) -> Target:
    torch.manual_seed(0)
    (folder / "dense").mkdir()
    save_file(Blocks().state_dict(), folder / "dense" / "weights.safetensors")
    prune_blocks(folder / "dense", folder / "out")
    source = taken_from(folder / "dense")["weights.safetensors"]
    files = {name: raw for name, raw in taken_from(folder).items() if name.startswith("out")}

    def read(place: Path) -> Any:
        (place / "dense").mkdir(exist_ok=True)
        (place / "dense" / "weights.safetensors").write_bytes(source)
        found = prune_blocks(place / "dense", place / "out")
        save_sparse(place / "out", place / "out.sparse")
        return found

    return Target(files, read, True, [], 8)


@target
def dense_folder(folder: Path) -> Target:
    """Weights and index of somebody else: no hashes, but every lie about places and sizes is noticed."""
    torch.manual_seed(0)
    state = Blocks().state_dict()
    names = list(state)
    halves = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, own in halves.items():
        save_file({name: state[name] for name in own}, folder / file, {"format": "pt"})
    places = {name: file for file, own in halves.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def read(place: Path) -> Any:
        save_sparse(place, place / "x.out")
        return prune_blocks(place, place / "out")

    return Target(taken_from(folder), read, False, [], 15)


@target
def model_folder(folder: Path) -> Target:
    """Config and index of a Hugging Face folder."""
    model: Any = tiny.llama()
    model.save_pretrained(folder)

    def read(place: Path) -> Any:
        from sparsify.pruning.on_disk import hugging_face_model

        with torch.device("meta"):
            found = hugging_face_model(place)
        tensors = FolderTensors(place)
        return sorted(n for n, t in found.state_dict().items() if n in tensors and tensors[n].shape == t.shape)

    return Target(taken_from(folder, ["config.json", "model.safetensors"]), read, False, [], 8)


# --- plans, texts, caches, words ----------------------------------------------------------------------------------------------


@target
def plan_json(folder: Path) -> Target:
    plan = Plan(
        [
            S2FT(fraction=0.1, match="*.mlp", budget="structure"),
            RoSA(rank={"*.q": 4, "*": 2}, density=0.01),
            Quantize(format="nf4"),
            Prune(pattern="2:4"),
        ]
    )
    (folder / "plan.json").write_text(plan.to_json())

    def read(place: Path) -> Any:
        return Plan.from_json((place / "plan.json").read_text(encoding="utf-8", errors="surrogateescape")).to_json()

    return Target(taken_from(folder), read, False, [], 120)


class Config:
    """What the reader of calibration texts asks of a config."""

    vocab_size, max_position_embeddings, pad_token_id, is_encoder_decoder = 100, 64, 0, False

    def get_text_config(self) -> Config:
        return self


class Tokenizer:
    """One token for a character; has a chat template."""

    model_max_length, chat_template = 64, "x"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 100 for c in text]}

    def apply_chat_template(self, messages: Any, tokenize: bool = False) -> str:
        return "".join(message["content"] for message in messages)


@target
def calibration_texts(folder: Path) -> Target:
    lines: list[Any] = [
        {"text": "one two three"},
        {"input_ids": [1, 5, 9]},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"text": "über \u2028 line"},
    ]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    (folder / "a.txt").write_text("a text of some words, " * 20)

    def read(place: Path) -> Any:
        from sparsify.pruning.texts import calibration_batches

        return [
            {n: t.tolist() for n, t in batch.items()}
            for name in ("a.jsonl", "a.txt")
            for batch in calibration_batches(place / name, Config(), Tokenizer(), samples=8)
        ]

    return Target(taken_from(folder), read, False, [], 80)


@target
def tuning_caches(folder: Path) -> Target:
    """Measurements of kernels: damaged ones are not there, whatever they say."""
    from sparsify.kernels.cpu import tune

    timing = {"key": {"seconds": {"a": 1e-3, "b": 2e-3}, "steady": True}}
    tile = {"interpreter": {"k": {"tile": {"warps": 4, "unroll": 1}, "us": 1.0}}}
    (folder / "cpu.json").write_text(json.dumps(timing))
    (folder / "gpu.json").write_text(json.dumps(tile))

    def read(place: Path) -> Any:
        from sparsify.kernels.gpu.tune import read_tiles

        before, tune.tuned = tune.tuned, None
        path = tune.tune_path
        tune.tune_path = lambda: place / "cpu.json"
        try:
            found = tune.recorded("key")
        finally:
            tune.tuned, tune.tune_path = before, path
        return str(found), isinstance(read_tiles(place / "gpu.json", random.random()), dict)

    return Target(taken_from(folder), read, False, [], 40, refuses=False)


WORDS = (
    "inspect", "adapter", "checkpoint", "prune", "bench", "--json", "--dense", "--svg", "--layers", "--out", "--seed", "--sparsity", "--method",
    "--pattern", "--match", "--calibration", "--samples", "-1", "0", "1e999", "nan", "99999999999999999999", "2:4", "0:0", "*", "", "..", "/dev/null",
    "/nowhere/at all", "\u2028", "a\u0000b", "--help", "--no-such-option", "none.json", "magnitude",
)  # fmt: skip


def command_lines(rng: random.Random) -> Iterator[list[str]]:
    while True:
        yield [rng.choice(WORDS[:5]), *(rng.choice(WORDS[5:]) for _ in range(rng.randrange(5)))]
