"""Sparse checkpoints of models larger than memory: from folder to file and back, one tensor alive at a time, every bit the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from methods import batches
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify import Plan, Prune, SparsifyError
from sparsify.files.tensor_file import DTYPES, FolderTensors, Part, tensor_file
from sparsify.files.tensors import CONTENT
from sparsify.modules.masked import check_masks
from sparsify.ops.bits import unpack_bits
from sparsify.pruning import sparse_checkpoint
from sparsify.pruning.on_disk import prune_on_disk
from sparsify.pruning.sparse_checkpoint import (
    SparseCheckpoint,
    SparseCheckpointError,
    model_hash,
    open_sparse,
    save_sparse,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.harness import allocations


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = lambda t: t.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_a_file_written_in_pieces_is_the_one_that_safetensors_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every dtype, odd sizes, scalars and empty tensors beside it; pieces of two parts in turn."""
    raw = torch.randint(0, 2 if dtype is torch.bool else 255, (7 * 3 * dtype.itemsize,), dtype=torch.uint8)
    tensors = {
        "odd": raw.view(dtype).view(7, 3),
        "a": torch.arange(5, dtype=torch.uint8),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "näme": torch.randn(1, 9).bfloat16(),
    }
    parts = [Part(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with tensor_file(tmp_path / "a.safetensors", parts, {"format": "pt", "note": 'x "y" ü'}) as file:
        flat = {name: t.reshape(-1) for name, t in tensors.items()}
        for place in range(0, 21, 2):
            for name in reversed(flat):
                file.append(name, flat[name][place : place + 2])
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(same_bits(found[name], t) for name, t in tensors.items())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert {n: v for n, v in file.metadata().items() if n != CONTENT} == {"format": "pt", "note": 'x "y" ü'}
    save_file(tensors, tmp_path / "b.safetensors")
    header = lambda path: json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])  # noqa: E731
    own = header(tmp_path / "a.safetensors")
    del own["__metadata__"]
    assert {n: (p["dtype"], p["shape"]) for n, p in own.items()} == {
        n: (p["dtype"], p["shape"]) for n, p in header(tmp_path / "b.safetensors").items()
    }


def test_incomplete_parts_leave_no_file(tmp_path: Path) -> None:
    part = Part("w", torch.float32, (4,))
    with (
        pytest.raises(SparsifyError, match="'w': 8 bytes are missing"),
        tensor_file(tmp_path / "a", [part], {}) as file,
    ):
        file.append("w", torch.ones(2))
    with (
        pytest.raises(SparsifyError, match="'w': more bytes than announced"),
        tensor_file(tmp_path / "a", [part], {}) as file,
    ):
        file.append("w", torch.ones(5))
    with pytest.raises(SparsifyError, match="'w': safetensors files cannot hold torch.complex128"):
        Part("w", torch.complex128, (4,))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense` and, written by `prune_on_disk`, `pruned`; bf16, shards, a survivor that is zero."""
    folder = tmp_path_factory.mktemp("pruned")
    model: Any = tiny.llama(torch.bfloat16, num_hidden_layers=3)
    model.save_pretrained(folder / "dense")
    rules = [Prune(sparsity=0.75, match="*.mlp.*", method="wanda"), Prune(pattern="1:2", method="magnitude")]
    prune_on_disk(folder / "dense", folder / "pruned", Plan(rules), calibration=batches(), progress=False)
    path = folder / "pruned" / "model-model-layers-0.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    place = tuple(tensors[name].nonzero()[0].tolist())
    tensors[name] = tensors[name].clone()
    tensors[name][place] = 0
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("piece", [8, 64, 1 << 22])
def test_a_pruned_folder_goes_to_one_file_and_back(
    pruned: Path, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_checkpoint, "PIECE", piece)
    report = save_sparse(pruned / "pruned", tmp_path / "a.sparse", base=pruned / "dense")
    found = open_sparse(tmp_path / "a.sparse", base=pruned / "dense")
    files = dict(FolderTensors(pruned / "pruned"))
    assert set(found.names) == set(files)
    assert all(same_bits(found.tensor(name), t) for name, t in files.items())
    bits: dict[str, Tensor] = {}
    for path in (pruned / "pruned" / "pruning").glob("*.safetensors"):
        bits |= load_file(path)
    assert found.masked == set(bits)
    assert len(bits) == 21
    assert all(torch.equal(found.mask(n), unpack_bits(b, found.shape(n))) for n, b in bits.items())
    up = "model.layers.0.mlp.up_proj.weight"
    assert int((found.tensor(up) != 0).sum()) == found.entries[up].survivors - 1
    assert report.sparse < 0.8 * report.dense
    assert report.dense == sum(t.nbytes for t in files.values())
    dense = found.save_dense(tmp_path / "dense", shard_bytes=20_000)
    assert len(dense) > 2
    assert all(p.stat().st_size < 30_000 or len(load_file(p)) == 1 for p in dense)
    again = dict(FolderTensors(tmp_path / "dense"))
    assert set(again) == set(files)
    assert all(same_bits(again[name], t) for name, t in files.items())
    hf.LlamaConfig.from_pretrained(pruned / "dense").save_pretrained(tmp_path / "dense")
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    tiny.assert_same(dict(model.named_parameters()), files)
    host: Any = found.load_into(tiny.llama(torch.bfloat16, seed=5, num_hidden_layers=3))
    check_masks(host)
    tiny.assert_same(host.state_dict(), files)


def test_the_same_file_from_folder_module_and_mapping(pruned: Path, tmp_path: Path) -> None:
    save_sparse(pruned / "pruned", tmp_path / "folder")
    host: Any = open_sparse(tmp_path / "folder").load_into(tiny.llama(torch.bfloat16, seed=5, num_hidden_layers=3))
    save_sparse(host, tmp_path / "module")
    masks = {n: open_sparse(tmp_path / "folder").mask(n) for n in open_sparse(tmp_path / "folder").masked}
    save_sparse(dict(FolderTensors(pruned / "pruned")), tmp_path / "mapping", masks=masks)
    first = open_sparse(tmp_path / "folder")
    for other in (open_sparse(tmp_path / "module"), open_sparse(tmp_path / "mapping")):
        assert other.entries == first.entries
        assert other.masked == first.masked
        tiny.assert_same(other.dense(), first.dense())


@pytest.mark.parametrize("tied", [False, True])
def test_the_hash_of_a_folder_is_the_model_s(tied: bool, tmp_path: Path) -> None:
    model: Any = tiny.llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    assert model_hash(FolderTensors(tmp_path / "dense")) == model_hash(model)
    half = model.to(torch.bfloat16)
    assert model_hash(FolderTensors(tmp_path / "dense", torch.bfloat16)) == model_hash(half)
    save_sparse(half, tmp_path / "a.sparse", base=tmp_path / "dense")
    with pytest.raises(SparseCheckpointError, match="was pruned from another base model"):
        open_sparse(tmp_path / "a.sparse", base=half)


def test_a_folder_without_masks_is_compressed_by_its_zeros(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    tensor = torch.randn(40, 24) * (torch.rand(40, 24) < 0.2)
    save_file({"w": tensor, "b": torch.ones(7)}, tmp_path / "plain" / "weights.safetensors")
    save_sparse(str(tmp_path / "plain"), tmp_path / "a.sparse")
    found = open_sparse(tmp_path / "a.sparse")
    assert not found.masked
    assert found.plain == ["b"]
    assert torch.equal(found.tensor("w"), tensor)
    assert found.save_dense(tmp_path / "dense") == [tmp_path / "dense" / "model.safetensors"]
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")["w"], tensor)
    with pytest.raises(SparseCheckpointError, match="holds a model already"):
        found.save_dense(tmp_path / "dense")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SparsifyError, match="has no safetensors files"):
        save_sparse(tmp_path / "nothing", tmp_path / "b.sparse")


def test_masks_that_the_weights_have_left_are_refused(pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    (folder / "pruning").mkdir(parents=True)
    for path in (pruned / "pruned").rglob("*.safetensors"):
        (folder / path.relative_to(pruned / "pruned")).write_bytes(path.read_bytes())
    path = folder / "model-model-layers-1.safetensors"
    tensors = {name: torch.ones_like(t) for name, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(SparseCheckpointError, match=r"model\.layers\.1\..*pruned entries are not zero"):
        save_sparse(folder, tmp_path / "a.sparse")
    assert not (tmp_path / "a.sparse").exists()


COUNT, ROWS, COLUMNS = 12, 512, 512
LARGEST = ROWS * COLUMNS * 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tensors of 1 MiB, every second one 75 % zeros, in two files."""
    folder = tmp_path_factory.mktemp("large")
    for part in range(2):
        tensors = {f"w{i}": torch.randn(ROWS, COLUMNS) for i in range(part, COUNT, 2)}
        if part == 0:
            tensors = {n: t * (torch.rand_like(t) < 0.25) for n, t in tensors.items()}
        save_file(tensors, folder / f"{part}.safetensors")
    return folder


@pytest.fixture
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What is read from files is a fresh copy in memory (of what the returned mapping holds), not a page of a mapped file."""
    files: dict[str, Tensor] = {}
    for owner, name in ((FolderTensors, "__getitem__"), (SparseCheckpoint, "part")):
        monkeypatch.setattr(owner, name, lambda self, key: files[key].clone())
    return files


def test_one_tensor_is_alive_at_a_time(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted_reads: dict[str, Tensor]
) -> None:
    monkeypatch.setattr(sparse_checkpoint, "PIECE", 1 << 14)
    for path in large.iterdir():
        counted_reads |= load_file(path)
    tensors = FolderTensors(large)
    with allocations("cpu") as saving:
        save_sparse(tensors, tmp_path / "a.sparse", base=model_hash(tensors))
    assert LARGEST <= saving.peak < 1.5 * LARGEST
    counted_reads |= load_file(tmp_path / "a.sparse")
    found = open_sparse(tmp_path / "a.sparse")
    with allocations("cpu") as checking:
        for name, entry in found.entries.items():
            sparse_checkpoint.check_bits(found.path, name, entry, found.part(name + sparse_checkpoint.BITMASK))
    assert checking.peak < 1.5 * LARGEST  # bits as bytes, twice
    with allocations("cpu") as expanding:
        found.save_dense(tmp_path / "dense", shard_bytes=3 * LARGEST)
    assert (
        LARGEST <= expanding.peak < 5 * LARGEST
    )  # the tensor, its values, its mask, and the positions that indexing makes
    host = torch.nn.ModuleDict({f"w{i}": torch.nn.Linear(1, 1) for i in range(COUNT)})
    for i in range(COUNT):
        host[f"w{i}"].weight = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    save_sparse({f"w{i}.weight": found.tensor(f"w{i}") for i in range(COUNT)}, tmp_path / "b.sparse")
    counted_reads |= load_file(tmp_path / "b.sparse")
    loading = open_sparse(tmp_path / "b.sparse")
    with allocations("cpu") as filling:
        loading.load_into(host, strict=False)
    assert filling.peak < 5 * LARGEST
    assert all(torch.equal(host[n].weight, t) for n, t in FolderTensors(large).items())
    with allocations("cpu") as all_at_once:  # the control: what the counter says when nothing is freed
        held = found.dense()
    assert all_at_once.peak >= COUNT * LARGEST
    assert all(same_bits(held[name], t) for name, t in FolderTensors(large).items())
