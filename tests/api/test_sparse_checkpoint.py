"""Sparse checkpoints: exact round trips, sizes, and refusal of everything that is damaged before anything is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.files.tensors import CONTENT, write_tensors
from sparsify.modules.masked import check_masks, mask_modules, masked_parameters
from sparsify.pruning.sparse_checkpoint import (
    BITMASK,
    VALUES,
    SparseCheckpointError,
    hash_tensors,
    model_hash,
    open_sparse,
    save_sparse,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.float8_e4m3fn,
]


def sparse_tensor(
    dtype: torch.dtype, shape: tuple[int, ...] = (37, 53), density: float = 0.25
) -> tuple[Tensor, Tensor]:
    mask = torch.rand(shape) < density
    values = torch.randint(-99, 99, shape) if dtype not in (torch.uint8,) else torch.randint(0, 200, shape)
    return (values * mask).to(dtype), mask


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = lambda t: t.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def pruned_llama(**changes: Any) -> nn.Module:
    model = tiny.llama(**changes)
    names = [n for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    generator = torch.Generator().manual_seed(0)
    mask_modules(model, {n: torch.rand(model.get_parameter(n).shape, generator=generator) > 0.75 for n in names})
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor, mask = sparse_tensor(dtype)
    save_sparse({"w": tensor, "dense": torch.randn(3, 4)}, tmp_path / "a.safetensors", masks={"w": mask})
    found = open_sparse(tmp_path / "a.safetensors")
    assert same_bits(found.tensor("w"), tensor)
    assert torch.equal(found.mask("w"), mask)
    assert found.plain == ["dense"]


def test_special_values_and_tensors_without_a_mask(tmp_path: Path) -> None:
    tensor = torch.zeros(16, 16)
    tensor[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    others = {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "bools": torch.rand(9, 9) > 0.5,
        "full": torch.randn(8, 8),
    }
    report = save_sparse({"w": tensor, **others}, tmp_path / "a.safetensors")
    found = open_sparse(tmp_path / "a.safetensors")
    assert all(same_bits(found.dense()[n], t) for n, t in {"w": tensor, **others}.items())
    assert found.entries["w"].survivors == 4
    assert report.tensors["full"] == (256, 256)
    assert report.tensors["w"] == (1024, 16 + 32)


def test_a_survivor_that_is_zero_stays_a_survivor(tmp_path: Path) -> None:
    mask = torch.rand(20, 30) < 0.3
    tensor = torch.randn(20, 30) * mask
    tensor[mask.nonzero()[0, 0], mask.nonzero()[0, 1]] = 0
    save_sparse({"w": tensor}, tmp_path / "a.safetensors", masks={"w": mask})
    assert torch.equal(open_sparse(tmp_path / "a.safetensors").mask("w"), mask)
    assert torch.equal(open_sparse(tmp_path / "a.safetensors").csr("w").to_dense(), tensor)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_opens_sparse_or_dense(tied: bool, tmp_path: Path) -> None:
    model = pruned_llama(tie_word_embeddings=tied)
    report = save_sparse(model, tmp_path / "a.safetensors", base="abc")
    found = open_sparse(tmp_path / "a.safetensors", base="abc")
    x = tiny.inputs_of(model)
    expected = model(**x).logits
    dense = found.load_into(tiny.llama(seed=4, tie_word_embeddings=tied), sparse=False)
    assert torch.equal(dense(**x).logits, expected)
    assert not list(masked_parameters(dense))
    sparse = found.load_into(tiny.llama(seed=4, tie_word_embeddings=tied))
    assert torch.equal(sparse(**x).logits, expected)
    check_masks(sparse)
    masks = {n: m.mask(leaf) for n, m, leaf in masked_parameters(sparse)}
    assert all(torch.equal(masks[n], m.mask(leaf)) for n, m, leaf in masked_parameters(model))
    tiny.train(sparse, **x)
    check_masks(sparse)
    assert report.sparse < 0.75 * report.dense
    assert "times smaller" in str(report)
    assert report.sparse <= (tmp_path / "a.safetensors").stat().st_size < report.sparse + 20_000


def test_save_pretrained_is_an_ordinary_dense_checkpoint(tmp_path: Path) -> None:
    model = pruned_llama()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not any("mask" in name for name in list(file.keys()))
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    tiny.assert_same(dict(again.named_parameters()), dict(model.named_parameters()))


def test_sizes_at_75_percent(tmp_path: Path) -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, ::4] = True
    save_sparse({"w": (torch.randn(64, 64) * mask).bfloat16()}, tmp_path / "a.safetensors", masks={"w": mask})
    assert list(open_sparse(tmp_path / "a.safetensors").sizes()) == [("w", 8192, 2048 + 512)]


def test_writing_is_atomic_and_refuses_to_lose_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    tensor, mask = sparse_tensor(torch.float32)
    save_sparse({"w": tensor}, path, masks={"w": mask})
    before = path.read_bytes()
    with pytest.raises(SparseCheckpointError, match=r"'w': \d+ pruned entries are not zero"):
        save_sparse({"w": torch.ones_like(tensor)}, path, masks={"w": mask})
    with pytest.raises(SparseCheckpointError, match="there is no such tensor"):
        save_sparse({"w": tensor}, path, masks={"v": mask})
    with pytest.raises(SparseCheckpointError, match="expected bool"):
        save_sparse({"w": tensor}, path, masks={"w": mask[:3]})

    def full_disk(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_sparse({"w": tensor * 2}, path, masks={"w": mask})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def rewrite(path: Path, change: Any) -> Path:
    """The same file with parts or header changed by `change(parts, metadata, entries)`, and with content hashes of what it is now."""
    with safe_open(path, framework="pt") as file:
        parts, metadata = {n: file.get_tensor(n).clone() for n in list(file.keys())}, dict(file.metadata())
    del metadata[CONTENT]
    entries = json.loads(metadata["entries"])
    change(parts, metadata, entries)
    metadata.setdefault("entries", json.dumps(entries))
    if metadata["entries"] != "damaged":
        metadata["entries"] = json.dumps(entries)
    write_tensors(bad := path.with_name("bad.safetensors"), parts, metadata)
    return bad


def cut_values(parts: Any, _m: Any, _e: Any) -> None:
    parts["w" + VALUES] = parts["w" + VALUES][:-1].clone()


def flip_bit(parts: Any, _m: Any, _e: Any) -> None:
    parts["w" + BITMASK][0] ^= 1


def stray_bits(parts: Any, _m: Any, entries: Any) -> None:
    parts["w" + BITMASK][-1] |= 128  # 37 · 53 = 1961 entries leave 7 unused bits
    parts["w" + VALUES] = torch.cat([parts["w" + VALUES], torch.ones(1)])
    entries["w"]["survivors"] += 1


def wrong_dtype(parts: Any, _m: Any, _e: Any) -> None:
    parts["w" + VALUES] = parts["w" + VALUES].half()


def wrong_shape(_p: Any, _m: Any, entries: Any) -> None:
    entries["w"]["shape"] = [53, 36]


def negative_shape(_p: Any, _m: Any, entries: Any) -> None:
    entries["w"]["shape"] = [-37, -53]


def huge_shape(_p: Any, _m: Any, entries: Any) -> None:
    entries["w"]["shape"] = [1 << 39, 1 << 39]


def too_many(_p: Any, _m: Any, entries: Any) -> None:
    entries["w"]["survivors"] = 10**9


def odd_dtype(_p: Any, _m: Any, entries: Any) -> None:
    entries["w"]["dtype"] = "load"


def missing_part(parts: Any, _m: Any, _e: Any) -> None:
    del parts["w" + BITMASK]


def stray_part(parts: Any, _m: Any, _e: Any) -> None:
    parts["v" + VALUES] = torch.ones(2)


def twice(parts: Any, _m: Any, _e: Any) -> None:
    parts["w"] = torch.ones(37, 53)


def other_format(_p: Any, metadata: Any, _e: Any) -> None:
    metadata["format"] = "pt"


def newer(_p: Any, metadata: Any, _e: Any) -> None:
    metadata["version"] = "3"


def no_list(_p: Any, metadata: Any, _e: Any) -> None:
    metadata["entries"] = "damaged"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (cut_values, "values are F32"),
        (flip_bit, "bits are set, but there are"),
        (stray_bits, "beyond the last weight"),
        (wrong_dtype, "values are F16"),
        (wrong_shape, "the bitmask is U8"),
        (negative_shape, "bad shape"),
        (huge_shape, "bad shape"),
        (too_many, "bad number of survivors"),
        (odd_dtype, "bad dtype"),
        (missing_part, "is missing"),
        (stray_part, "belongs to no entry"),
        (twice, "belongs to no entry"),
        (other_format, "not a sparse checkpoint"),
        (newer, "reads versions 1 to 2"),
        (no_list, "damaged"),
    ],
)
def test_damaged_and_hostile_files_are_refused(change: Any, text: str, tmp_path: Path) -> None:
    tensor, mask = sparse_tensor(torch.float32)
    save_sparse({"w": tensor, "b": torch.ones(3)}, tmp_path / "a.safetensors", masks={"w": mask})
    with pytest.raises(SparseCheckpointError, match=text):
        open_sparse(rewrite(tmp_path / "a.safetensors", change))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(SparseCheckpointError, match="no such file"):
        open_sparse(path)
    tensor, mask = sparse_tensor(torch.float32)
    save_sparse({"w": tensor}, path, masks={"w": mask}, base="a" * 64)
    whole = path.read_bytes()
    for damaged in (b"", b"\x00" * 20, whole[: len(whole) // 2], b"\xff" * 8 + whole):
        path.write_bytes(damaged)
        with pytest.raises(SparseCheckpointError, match="not a safetensors file"):
            open_sparse(path)
    path.write_bytes(whole)
    with pytest.raises(SparseCheckpointError, match="another base model"):
        open_sparse(path, base="b" * 64)
    assert issubclass(SparseCheckpointError, SparsifyError)


def test_a_host_that_does_not_fit_is_not_touched(tmp_path: Path) -> None:
    save_sparse(pruned_llama(), tmp_path / "a.safetensors")
    found = open_sparse(tmp_path / "a.safetensors")
    for host, text in ((tiny.llama(intermediate_size=52), "has shape"), (tiny.llama(num_hidden_layers=3), "missing")):
        before = tiny.snapshot(host)
        kinds = [type(m) for m in host.modules()]
        with pytest.raises(SparseCheckpointError, match=text):
            found.load_into(host)
        tiny.assert_same(tiny.snapshot(host), before)
        assert kinds == [type(m) for m in host.modules()]
    with pytest.raises(SparseCheckpointError, match="carries masks already"):
        found.load_into(pruned_llama(), sparse=False)


def test_loading_replaces_the_masks_of_a_sparse_host(tmp_path: Path) -> None:
    model = pruned_llama()
    save_sparse(model, tmp_path / "a.safetensors")
    host = pruned_llama(seed=3)
    for _, module, leaf in masked_parameters(host):
        module.set_mask(leaf, torch.rand_like(getattr(module, leaf)) > 0.5)
    open_sparse(tmp_path / "a.safetensors").load_into(host)
    assert torch.equal(host(**tiny.inputs_of(host)).logits, model(**tiny.inputs_of(model)).logits)
    check_masks(host)


def test_the_command_line_shows_sizes_and_refuses_damage(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sparsify.cli import app

    report = save_sparse(pruned_llama(), tmp_path / "a.safetensors")
    done = CliRunner().invoke(app, ["checkpoint", str(tmp_path / "a.safetensors"), "--layers"])
    assert done.exit_code == 0
    entries = open_sparse(tmp_path / "a.safetensors").entries
    assert len(done.output.splitlines()) == len(entries) + 3
    stored = sum(report.tensors[name][1] for name in entries)
    assert f"{stored / 2**20:.2f} MiB instead of" in done.output
    assert f"{entries['model.layers.0.mlp.up_proj.weight'].sparsity:.1%} zeros" in done.output
    size = (tmp_path / "a.safetensors").stat().st_size
    assert (
        f"the file: {size / 2**20:.2f} MiB, dense {(size + report.dense - report.sparse) / 2**20:.2f} MiB"
        in done.output
    )
    assert "its dense model is not recorded" in done.output
    save_sparse(pruned_llama(), tmp_path / "c.safetensors", base=tiny.llama())
    done = CliRunner().invoke(app, ["checkpoint", str(tmp_path / "c.safetensors")])
    assert f"pruned from the dense model {model_hash(tiny.llama())}" in done.output
    document = json.loads(CliRunner().invoke(app, ["checkpoint", str(tmp_path / "c.safetensors"), "--json"]).output)
    assert document["base"] == model_hash(tiny.llama())
    assert document["file"] == (tmp_path / "c.safetensors").stat().st_size
    assert {n: (c["dense"], c["stored"]) for n, c in document["compressed"].items()} == {
        n: report.tensors[n] for n in entries
    }
    shown = CliRunner().invoke(app, ["checkpoint", "--help"]).output
    for text in ("which dense model", "--layers", "--json", "save_sparse"):
        assert text in " ".join(shown.split())
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    done = CliRunner().invoke(app, ["checkpoint", str(tmp_path / "b.safetensors")])
    assert done.exit_code == 2
    assert "error: " in done.output + done.stderr


def test_the_base_hash_sees_names_shapes_dtypes_and_bits() -> None:
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}
    reference = hash_tensors(base)
    assert reference == hash_tensors({"b": base["b"], "a": base["a"].clone()})
    a, b = base["a"], base["b"]
    changed = [{"a": a.view(3, 2), "b": b}, {"a": a.double(), "b": b}, {"c": a, "b": b}, {"a": -a, "b": b}]
    assert len({reference, *map(hash_tensors, changed)}) == 5


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_knows_the_dense_model_it_was_pruned_from(tied: bool, tmp_path: Path) -> None:
    dense = tiny.llama(tie_word_embeddings=tied)
    path = tmp_path / "a.safetensors"
    save_sparse(pruned_llama(tie_word_embeddings=tied), path, base=dense)
    assert open_sparse(path, base=tiny.llama(tie_word_embeddings=tied)).base == model_hash(dense)
    assert open_sparse(path, base=model_hash(dense)).entries
    for other in (tiny.llama(seed=1, tie_word_embeddings=tied), dense.bfloat16()):
        with pytest.raises(SparseCheckpointError, match="was pruned from another base model"):
            open_sparse(path, base=other)
    host = open_sparse(path).load_into(tiny.llama(seed=1, tie_word_embeddings=tied))  # complete: any host will do
    check_masks(host)
    save_sparse(pruned_llama(), path)
    with pytest.raises(SparseCheckpointError, match="does not record its base model"):
        open_sparse(path, base=tiny.llama())
