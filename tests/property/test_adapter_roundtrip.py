"""Adapter files: what is written is what is read, for any deltas; any change of any byte is refused or harmless."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import S2FT, AdapterError
from sparsify.adapters import adapter as files
from sparsify.adapters.adapter import Adapter, Delta


@st.composite
def deltas(draw: st.DrawFn, number: int) -> Delta:
    n, m, s = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["column", "row", "full"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    shape = {"column": (n, s), "row": (s, m), "full": (n, m)}[kind]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** draw(st.integers(-4, 3))).to(dtype)
    channels = torch.randperm(50, generator=generator)[:s] if kind != "full" else torch.empty(0, dtype=torch.int64)
    name = draw(st.sampled_from(["a.weight", "ü.weight", "x::y", "weight"]))
    return Delta(f"{number}.{name}", kind, channels, values, draw(st.booleans()))


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    found = [draw(deltas(i)) for i in range(draw(st.integers(1, 4)))]
    info = draw(
        st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.booleans()), max_size=3)
    )
    return Adapter(tuple(found), {d.param: "0" * 64 for d in found}, info)


@given(adapters())
def test_any_adapter_is_read_back_bit_for_bit(adapter):
    with tempfile.TemporaryDirectory() as directory:
        files.save(adapter, directory)
        found = files.load(directory)
    assert found.bases == adapter.bases
    assert found.info == adapter.info
    assert len(found.deltas) == len(adapter.deltas)
    for a, b in zip(found.deltas, adapter.deltas, strict=True):
        assert (a.param, a.kind, a.transposed) == (b.param, b.kind, b.transposed)
        assert a.values.dtype == b.values.dtype
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.channels, b.channels)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    host = tiny.lower(tiny.Mlp(), S2FT(units=2), example=torch.randn(3, 12))
    tiny.disturb(host)
    path = host.sparsify.save_adapter(tmp_path_factory.mktemp("adapter"))
    return (path / files.TENSORS).read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_any_corruption_is_an_adapter_error_or_reads_as_a_valid_adapter(written, data):
    """No other exception, no crash: bytes overwritten, cut off, or inserted anywhere."""
    raw = bytearray(written)
    at = data.draw(st.integers(0, len(raw) - 1))
    change = data.draw(st.sampled_from(["overwrite", "truncate", "insert", "header"]))
    if change == "overwrite":
        raw[at] = data.draw(st.integers(0, 255))
    elif change == "truncate":
        del raw[at:]
    elif change == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        raw[at % 400] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / files.TENSORS).write_bytes(bytes(raw))
        try:
            found = files.load(directory)
        except AdapterError:
            return
    assert all(bool(torch.isfinite(d.values).all()) for d in found.deltas)


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-4, 1.0), fraction=st.floats(0.05, 1.0))
def test_reload_restores_the_trained_blocks(seed, scale, fraction):
    """Bit for bit, also where base + (value − base) rounds to another value."""
    torch.manual_seed(3)
    model, example = tiny.Mlp(), torch.randn(4, 12)
    host = tiny.lower(
        model, S2FT(fraction=fraction, producer_fraction=0.2, budget="structure"), example=example, seed=seed
    )
    tiny.disturb(host, scale=scale, seed=seed)
    trained = [p.detach().clone() for p in tiny.trainable(host)]
    with tempfile.TemporaryDirectory() as directory:
        host.sparsify.save_adapter(directory)
        host.sparsify.load_adapter(directory, "again")
    host.sparsify.set_adapter("again")
    for before, after in zip(trained, tiny.trainable(host), strict=True):
        assert torch.equal(after, before)
