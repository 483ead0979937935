"""`sparsify checkpoint` and `sparsify adapter` on what users have: folders of every kind, and the other kind's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from sparsify import S2FT, LoRA, Prune
from sparsify.cli import app
from sparsify.pruning.sparse_checkpoint import stored_bytes

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def call(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [os.fspath(a) for a in arguments])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/, pruned/ (with zeros), sparse/ (model.sparse beside a config), ours/ and peft/."""
    path = tmp_path_factory.mktemp("kinds")
    model: Any = tiny.build("Llama")
    model.save_pretrained(path / "dense")
    host: Any = tiny.lower(model, Prune(method="magnitude", sparsity=0.75))
    host.save_pretrained(path / "pruned")
    (path / "sparse").mkdir()
    host.sparsify.save_sparse(path / "sparse" / "model.sparse")
    shutil.copy(path / "dense" / "config.json", path / "sparse")
    lora: Any = tiny.lower(model, LoRA(match="*.q_proj", rank=2))
    lora.sparsify.export_lora(path / "peft")
    tiny.lower(model, S2FT(structure="ffn", units=3)).sparsify.save_adapter(path / "ours")
    return path


def expected(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.slow), "pruned"])
@pytest.mark.parametrize("form", ["folder", "file", "shards", "pickled"])
def test_any_dense_checkpoint_is_counted(kinds: Path, tmp_path: Path, name: str, form: str) -> None:
    tensors = expected(kinds / name)
    path = tmp_path / "copy"
    shutil.copytree(kinds / name, path)
    if form == "file":
        path /= "model.safetensors"
    if form in ("shards", "pickled"):
        (path / "model.safetensors").unlink()
    if form == "shards":
        names = sorted(tensors)
        weight_map = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
        for file in set(weight_map.values()):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, path / file, {"format": "pt"})
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    if form == "pickled":
        torch.save(tensors, path / "pytorch_model.bin")
    done = call("checkpoint", path, "--layers")
    assert done.exit_code == 0, done.output
    count = sum(t.numel() for t in tensors.values())
    zeros = sum(int((t == 0).sum()) for t in tensors.values())
    size = sum(t.numel() * 4 for t in tensors.values())
    stored = sum(stored_bytes(t.numel(), int((t != 0).sum()), 4) for t in tensors.values())
    *rows, last = done.stdout.splitlines()
    assert last.startswith(f"{len(tensors)} tensors, {count:,} numbers, {zeros / count:.1%} zeros (")
    assert last.endswith(f"{size / 2**20:.2f} MiB; as a sparse checkpoint {stored / 2**20:.2f} MiB")
    assert len(rows) == len(tensors)
    down = "model.layers.0.mlp.down_proj.weight"
    share = float((tensors[down] == 0).float().mean())
    assert f"{down}: {' × '.join(map(str, tensors[down].shape))}, {share:.1%} zeros, " in done.stdout
    document = json.loads(call("checkpoint", path, "--json").stdout)
    assert document["format"] == "dense"
    assert {n: tuple(row["shape"]) for n, row in document["tensors"].items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert document["tensors"][down]["sparsity"] == pytest.approx(share)


def test_the_folder_of_prune_says_what_was_done(kinds: Path, tmp_path: Path) -> None:
    for extra, name in (([], "out"), (["--sparse"], "small")):
        assert call("prune", kinds / "dense", "-o", tmp_path / name, "--method", "random", *extra).exit_code == 0
    done = call("checkpoint", tmp_path / "out")
    assert done.stdout.splitlines()[-1] == "pruning.json: 14 weights pruned by random"
    done = call("checkpoint", tmp_path / "small")
    assert done.stdout.startswith("14 compressed tensors, 75.")
    assert done.stdout == call("checkpoint", tmp_path / "small" / "model.sparse").stdout
    (tmp_path / "out" / "pruning.json").write_text("[]", encoding="utf-8")
    assert call("checkpoint", tmp_path / "out").exit_code == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_zeros_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file(
        {"w": torch.tensor([[0, 1, 0], [1, 0, 0]]).to(dtype), "s": torch.ones(()), "e": torch.ones(0)},
        tmp_path / "a.safetensors",
    )
    done = call("checkpoint", tmp_path / "a.safetensors", "--layers")
    assert done.exit_code == 0, done.output
    assert "w: 2 × 3, 66.7% zeros" in done.stdout
    assert "s: one number, 0.0% zeros" in done.stdout


def test_a_peft_folder_is_shown(kinds: Path, tmp_path: Path) -> None:
    done = call("adapter", kinds / "peft")
    assert done.exit_code == 0, done.output
    tensors = load_file(kinds / "peft" / "adapter_model.safetensors")
    *rows, last = done.stdout.splitlines()
    size = sum(t.numel() for n, t in tensors.items() if ".layers.0." in n)
    assert rows[0] == f"model.layers.0.self_attn.q_proj: rank 2, {size:,} numbers"
    assert len(rows) == 2
    assert last.startswith("2 weights, ")
    assert "PEFT adapter of type LORA, r 2, lora_alpha 2" in last
    assert set(json.loads(call("adapter", kinds / "peft", "--json").stdout)["tensors"]) == set(tensors)
    shutil.copytree(kinds / "peft", tmp_path / "bin")
    (tmp_path / "bin" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "bin" / "adapter_model.bin")
    assert call("adapter", tmp_path / "bin").stdout == done.stdout


def test_our_adapter_is_shown_as_a_folder_and_as_a_file(kinds: Path) -> None:
    done = call("adapter", kinds / "ours")
    assert done.exit_code == 0, done.output
    assert "down_proj.weight: 3 columns, " in done.stdout
    assert call("adapter", kinds / "ours" / "adapter.safetensors").stdout == done.stdout


@pytest.mark.parametrize(
    ("command", "kind", "words"),
    [
        ("checkpoint", "peft", "a PEFT adapter, not a checkpoint: `sparsify adapter"),
        ("checkpoint", "ours", "an adapter, not a checkpoint: `sparsify adapter"),
        ("checkpoint", "ours/adapter.safetensors", "an adapter, not a checkpoint: `sparsify adapter"),
        ("adapter", "dense", "a model, not an adapter: `sparsify checkpoint"),
        ("adapter", "dense/model.safetensors", "a model, not an adapter"),
        ("adapter", "sparse", "a sparse checkpoint, not an adapter: `sparsify checkpoint"),
        ("adapter", "sparse/model.sparse", "a sparse checkpoint, not an adapter"),
        ("inspect", "peft", "holds a PEFT adapter (adapter_config.json), not a model: `sparsify adapter"),
        ("inspect", "ours", "holds an adapter of sparsify, not a model: `sparsify adapter"),
        ("inspect", "sparse/model.sparse", "a file, not a folder with a model in it: `sparsify checkpoint"),
        ("checkpoint", "", "no model.sparse, no safetensors and no pytorch_model.bin there"),
        ("adapter", "", "no adapter.safetensors and no adapter_config.json there"),
        ("inspect", "", "has no config.json: it is not a Hugging Face checkpoint"),
        ("checkpoint", "dense/config.json", "damaged or not a safetensors file"),
    ],
)
def test_another_kind_is_named_with_its_command(kinds: Path, command: str, kind: str, words: str) -> None:
    done = call(command, kinds / kind)
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_dense_is_written_whole_or_not_at_all(kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = kinds / "sparse" / "model.sparse"
    (tmp_path / "empty").mkdir()
    for out in ("new/out", "empty"):
        done = call("checkpoint", file, "--dense", tmp_path / out)
        assert done.exit_code == 0, done.output
        tiny.assert_same(expected(tmp_path / out), expected(kinds / "pruned"))
        assert (tmp_path / out / "config.json").exists()
        assert (tmp_path / out).stat().st_mode & 0o700 == 0o700
    done = call("checkpoint", kinds / "pruned", "--dense", tmp_path / "x")
    assert (done.exit_code, "is dense already" in done.stderr) == (2, True)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "is not a folder" in call("checkpoint", file, "--dense", tmp_path / "file").stderr

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsify.pruning.streaming.copy_companions", stopped)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = call("checkpoint", file, "--dense", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stderr == "interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("adapter_config.json", b"[]", "expected a JSON object"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b"[" * 99_999, "not JSON"),
        ("adapter_model.safetensors", b"", "damaged"),
        ("adapter_model.safetensors", b"\xff" * 99, "damaged"),
        ("adapter_model.safetensors", None, "neither adapter_model.safetensors nor adapter_model.bin"),
    ],
)
def test_damaged_peft_folders(kinds: Path, tmp_path: Path, name: str, data: bytes | None, words: str) -> None:
    shutil.copytree(kinds / "peft", tmp_path / "peft")
    (tmp_path / "peft" / name).unlink()
    if data is not None:
        (tmp_path / "peft" / name).write_bytes(data)
    done = call("adapter", tmp_path / "peft")
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_index_that_lists_what_its_file_lacks(kinds: Path, tmp_path: Path) -> None:
    shutil.copytree(kinds / "dense", tmp_path / "d")
    index = {"weight_map": dict.fromkeys([*expected(kinds / "dense"), "more"], "model.safetensors")}
    (tmp_path / "d" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    done = call("checkpoint", tmp_path / "d")
    assert done.exit_code == 2
    assert "lists 'more' (1 in all), which its file does not hold" in done.stderr
