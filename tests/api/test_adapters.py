"""Adapters: switch, mix, merge, restore, export; damaged and hostile files; saves that are killed."""

from __future__ import annotations

import copy
import json
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, AdapterError, SparsifyError
from sparsify.adapters import adapter as files
from sparsify.files.tensors import write_tensors

BOTH = S2FT(fraction=0.1, producer_fraction=0.1, budget="structure")
LAYOUTS = ["Llama", "Qwen2", "GPT-2", "GPT-NeoX", "Phi-3"]


def trained_host(
    name: str = "Llama", dtype: torch.dtype = torch.float32, seed: int = 0, rule: S2FT = BOTH
) -> tuple[nn.Module, nn.Module]:
    """A base, and a host over it with trained values."""
    model = tiny.build(name, dtype)
    host = tiny.lower(model, rule, seed=seed)
    tiny.disturb(host, seed=seed + 3)
    return model, host


def dense_delta(directory: Path, model: nn.Module) -> dict[str, Tensor]:
    """What an adapter file changes, as dense fp64 tensors of the stored shape, read without sparsify's own writing code."""
    tensors = load_file(directory / files.TENSORS)
    found = {}
    with safe_open(directory / files.TENSORS, "pt") as opened:
        document = json.loads(opened.metadata()["sparsify"])
    for entry in document["entries"]:
        param, kind = entry["param"], entry["kind"]
        channels, values = (tensors[f"{param}::{kind}::{leaf}"] for leaf in ("channels", "delta"))
        stored = model.get_parameter(param)
        total = found.setdefault(param, torch.zeros(stored.shape, dtype=torch.float64))
        logical = total.t() if entry["transposed"] else total
        logical.index_add_(1 if kind == "column" else 0, channels, values.double())
    return found


# --- round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_file_holds_the_change_in_original_coordinates(name, tmp_path):
    model, host = trained_host(name)
    host.sparsify.save_adapter(tmp_path)
    base, now = tiny.snapshot(model), tiny.state_of(host)
    change = dense_delta(tmp_path, model)
    assert set(change) == {s.param for s in host.sparsify.program.slices}
    for param in set(base) & set(now):
        expected = now[param].double() - base[param].double()
        if param not in change:
            assert not expected.any(), param
            continue
        torch.testing.assert_close(change[param], expected, rtol=0, atol=2e-7)
        assert change[param].any()
    assert json.loads((tmp_path / files.DOCUMENT).read_text())["format_version"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_reload_in_a_fresh_process_state_gives_the_same_model(name, dtype, tmp_path):
    _, host = trained_host(name, dtype)
    host.sparsify.save_adapter(tmp_path)
    fresh = tiny.lower(tiny.build(name, dtype), BOTH)
    fresh.sparsify.load_adapter(tmp_path, "it")
    mix = fresh.sparsify.set_adapter("it")
    assert mix.trainable
    x = tiny.tokens()
    for a, b in zip(tiny.trainable(host), tiny.trainable(fresh), strict=True):
        scale = torch.maximum(a.abs(), (a - b).abs()).clamp_min(0.1)
        assert bool(((a - b).abs() <= 2.0**-23 * scale).all()), "one rounding of a sum, no more"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fresh(x).logits, host(x).logits, atol=tolerance, rtol=tolerance)
    tiny.train(fresh, input_ids=x)


def test_interleaved_rows_train_as_scattered_channels(tmp_path):
    """GPT-NeoX keeps q, k and v of a head together, so rows of V of two heads are never neighbours."""
    rule = S2FT(structure="attention", fraction=0.4, producer_fraction=0.7)
    model, host = trained_host("GPT-NeoX", rule=rule)
    rows = [s for s in host.sparsify.program.slices if s.side == "row"]
    assert rows
    assert all(s.places and s.start == -1 for s in rows)
    host.sparsify.save_adapter(tmp_path)
    inputs = tiny.inputs_of(model, "GPT-NeoX")
    trained = tiny.output_of(host(**inputs))
    fresh = tiny.lower(tiny.build("GPT-NeoX"), rule, seed=4)
    fresh.sparsify.load_adapter(tmp_path, "it")
    fresh.sparsify.set_adapter("it")
    torch.testing.assert_close(tiny.output_of(fresh(**inputs)), trained, atol=1e-5, rtol=1e-4)
    host.sparsify.merge()
    assert torch.equal(tiny.output_of(host(**inputs)), trained)
    tiny.assert_same(tiny.snapshot(host.sparsify.restore()), tiny.snapshot(model))


def test_saving_what_was_loaded_gives_the_same_file(tmp_path):
    _, host = trained_host()
    host.sparsify.save_adapter(tmp_path / "a")
    host.sparsify.load_adapter(tmp_path / "a", "b")
    host.sparsify.save_adapter(tmp_path / "b", "b")
    a, b = load_file(tmp_path / "a" / files.TENSORS), load_file(tmp_path / "b" / files.TENSORS)
    tiny.assert_same(b, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Phi-3"])
def test_switching_off_and_back_is_exact(name, dtype):
    model, host = trained_host(name, dtype)
    x = tiny.tokens()
    base, trained = model(x).logits, host(x).logits
    blocks = [p.detach().clone() for p in tiny.trainable(host)]
    state = tiny.state_of(host)
    own = list(tiny.trainable(host))
    assert str(host.sparsify.set_adapter(None)) == "base (no adapter)"
    tiny.assert_same(tiny.state_of(host), {n: t.detach() for n, t in model.state_dict().items()})
    assert not tiny.trainable(host)
    torch.testing.assert_close(host(x).logits, base, atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=1e-2)
    assert host.sparsify.set_adapter("default").trainable
    tiny.assert_same(tiny.state_of(host), state)
    assert torch.equal(host(x).logits, trained)
    assert all(a is b for a, b in zip(own, tiny.trainable(host), strict=True)), (
        "an optimizer must go on with the same objects"
    )
    assert all(torch.equal(a, b) for a, b in zip(blocks, own, strict=True))


def test_a_switch_between_forward_and_backward_is_an_error():
    """`.data` writes bypass version counters: autograd must notice that the block changed."""
    _, host = trained_host()
    loss = tiny.probe_loss(host(tiny.tokens()))
    host.sparsify.set_adapter(None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_switch_writes_channels_and_not_weights():
    """Bytes written are those of the trained channels: every tensor object and every frozen entry stays."""
    _, host = trained_host()
    addresses = {n: p.data_ptr() for n, p in host.named_parameters()}
    frozen = {}
    for piece in host.sparsify.program.slices:
        weight = host.sparsify.stored(piece.param).detach()
        keep = [i for i in range(weight.shape[piece.axis]) if not piece.start <= i < piece.start + piece.length]
        frozen[piece.param] = (
            piece.axis,
            torch.tensor(keep),
            weight.index_select(piece.axis, torch.tensor(keep)).clone(),
        )
    host.sparsify.set_adapter(None)
    assert {n: p.data_ptr() for n, p in host.named_parameters()} == addresses
    for param, (axis, keep, values) in frozen.items():
        assert torch.equal(host.sparsify.stored(param).detach().index_select(axis, keep), values)


# --- mixes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_fusing_two_selections_gives_base_plus_the_weighted_changes(name, tmp_path):
    model, first = trained_host(name, seed=1)
    _, second = trained_host(name, seed=2)
    assert first.sparsify.program.choices != second.sparsify.program.choices
    first.sparsify.save_adapter(tmp_path / "a")
    second.sparsify.save_adapter(tmp_path / "b")
    base = tiny.snapshot(model)
    host = tiny.lower(model, BOTH, seed=3)
    before = tiny.state_of(host)
    host.sparsify.load_adapter(tmp_path / "a", "a")
    host.sparsify.load_adapter(tmp_path / "b", "b")
    mix = host.sparsify.set_adapter({"a": 0.75, "b": -0.5})
    assert not mix.trainable
    assert not tiny.trainable(host)
    plain = copy.deepcopy(model)
    changes = dense_delta(tmp_path / "a", model), dense_delta(tmp_path / "b", model)
    for param in set(changes[0]) | set(changes[1]):
        parts = [w * c[param] for w, c in zip((0.75, -0.5), changes, strict=True) if param in c]
        plain.get_parameter(param).data.copy_(base[param].double() + sum(parts))
    found = tiny.state_of(host)
    for param, value in tiny.snapshot(plain).items():
        if param in found:
            torch.testing.assert_close(found[param], value, atol=3e-7, rtol=1e-6)
    inputs = tiny.inputs_of(model, name)
    torch.testing.assert_close(tiny.output_of(host(**inputs)), tiny.output_of(plain(**inputs)), atol=2e-5, rtol=1e-4)
    host.sparsify.set_adapter(None)
    tiny.assert_same(tiny.state_of(host), before)
    tiny.assert_same(tiny.snapshot(model), base)


def test_adapter_of_another_plan_does_not_write_into_the_users_model(tmp_path):
    """Its weights are not among those that this plan copied, so they are shared with the user's model until then."""
    model = tiny.llama()
    other = tiny.lower(model, S2FT(structure="attention", units=2))
    tiny.disturb(other)
    other.sparsify.save_adapter(tmp_path)
    base = tiny.snapshot(model)
    host = tiny.lower(model, S2FT(structure="ffn", units=2))
    before = tiny.state_of(host)
    host.sparsify.load_adapter(tmp_path, "other")
    host.sparsify.set_adapter("other")
    torch.testing.assert_close(host(tiny.tokens()).logits, other(tiny.tokens()).logits)
    tiny.assert_same(tiny.snapshot(model), base)
    host.sparsify.set_adapter(None)
    tiny.assert_same(tiny.state_of(host), before)
    host.sparsify.set_adapter("other")
    tiny.assert_same(tiny.snapshot(host.sparsify.restore()), base)
    tiny.assert_same(tiny.snapshot(model), base)


def test_overlapping_channels_are_reported(tmp_path):
    model = tiny.llama()
    first = tiny.lower(model, S2FT(structure="ffn", units=30), seed=1)
    second = tiny.lower(model, S2FT(structure="ffn", units=30), seed=2)
    shared = {}
    for a, b in zip(first.sparsify.program.slices, second.sparsify.program.slices, strict=True):
        shared[a.param] = (len(set(a.channels) & set(b.channels)), len(set(a.channels) | set(b.channels)))
    first.sparsify.save_adapter(tmp_path / "a")
    second.sparsify.save_adapter(tmp_path / "b")
    first.sparsify.load_adapter(tmp_path / "a", "a")
    first.sparsify.load_adapter(tmp_path / "b", "b")
    mix = first.sparsify.set_adapter({"a": 0.5, "b": 0.5})
    assert {c.param: (c.shared, c.total) for c in mix.conflicts} == shared
    assert all(c.adapters == ("a", "b") for c in mix.conflicts)
    assert "0.5·a + 0.5·b" in str(mix)
    assert (
        f"conflict model.layers.0.mlp.down_proj.weight: a and b share {shared['model.layers.0.mlp.down_proj.weight'][0]}"
        in str(mix)
    )
    assert first.sparsify.set_adapter({"a": 1.0}).conflicts == ()


@pytest.mark.parametrize("weights", [{"a": 0.5}, {"a": 1.0, "b": -0.25}])
def test_a_mix_counts_every_entry_of_a_change(weights: dict[str, float], tmp_path: Path) -> None:
    """Also those whose trained value is kept beside the change, because base + change rounds to another: that value is for the adapter
    alone and as it is."""
    model, x = tiny.Mlp().eval(), torch.randn(2, 12)
    corrected = 0
    for seed, name in enumerate("ab"):
        host = tiny.lower(model, S2FT(units=2), seed=seed, example=x)
        with torch.no_grad():
            for parameter in tiny.trainable(
                host
            ):  # far below the base, so that the difference does not hold its last bits
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 1e-9)
        host.sparsify.save_adapter(tmp_path / name)
        corrected += sum(d.exact is not None for d in files.load(tmp_path / name).deltas)
    assert corrected
    served = sparsify.load(model, {name: tmp_path / name for name in "ab"}, active=weights)
    changes = {name: dense_delta(tmp_path / name, model) for name in weights}
    for param in set().union(*changes.values()):
        want = model.get_parameter(param).double() + sum(
            w * changes[name][param] for name, w in weights.items() if param in changes[name]
        )
        torch.testing.assert_close(served.get_parameter(param).double(), want, rtol=1e-6, atol=1e-8)


def test_a_switch_takes_back_what_trained_in_full(tmp_path: Path) -> None:
    """Also where the adapter came from a file, and the switch is to no adapter at all."""
    model, x = tiny.Mlp().eval(), torch.randn(2, 12)
    host = tiny.lower(model, S2FT(units=2), example=x, train=["head"])
    tiny.disturb(host)
    host.sparsify.save_adapter(tmp_path)
    trained = host.head.weight.detach().clone()
    again = tiny.lower(model, S2FT(units=2), example=x, train=["head"])
    for other in (host, again, sparsify.load(model, tmp_path, name="full", active=None)):
        if "full" not in other.sparsify.adapters:
            other.sparsify.load_adapter(tmp_path, "full")
        for _ in range(2):
            other.sparsify.set_adapter("full")
            assert torch.equal(other.head.weight, trained)
            other.sparsify.set_adapter(None)
            assert torch.equal(other.head.weight, model.head.weight)


def test_an_adapter_of_more_than_this_host_trains_is_switched_to_in_full(tmp_path: Path) -> None:
    """It fits what trains here, and changes another layer besides."""
    model, x = tiny.Mlp().eval(), torch.randn(2, 12)
    wide = tiny.lower(model, S2FT(units=2), example=x)
    tiny.disturb(wide)
    wide.sparsify.save_adapter(tmp_path)
    narrow = tiny.lower(model, S2FT(units=2, match="layers.0.*"), example=x)
    assert set(narrow.sparsify.parts) < set(wide.sparsify.parts)
    narrow.sparsify.load_adapter(tmp_path, "wide")
    assert not narrow.sparsify.set_adapter("wide").trainable
    torch.testing.assert_close(narrow(x), wide(x))
    narrow.sparsify.set_adapter(None)
    torch.testing.assert_close(narrow(x), model(x))


def test_mix_of_disjoint_selections_has_no_conflict(tmp_path):
    model = tiny.llama()
    hosts = [tiny.lower(model, S2FT(structure="ffn", units=22, select="weight", largest=up)) for up in (True, False)]
    for name, host in zip("ab", hosts, strict=True):
        host.sparsify.save_adapter(tmp_path / name)
        hosts[0].sparsify.load_adapter(tmp_path / name, name)
    assert hosts[0].sparsify.set_adapter({"a": 1.0, "b": 1.0}).conflicts == ()


def test_names_and_weights_are_checked_before_anything_changes():
    _, host = trained_host()
    state = tiny.state_of(host)
    cases: list[tuple[Any, str]] = [
        ("defualt", "no adapter is called 'defualt'; did you mean 'default'"),
        ({"default": float("nan")}, "the weight of 'default' must be a finite number, got nan"),
        ({"default": float("inf")}, "the weight of 'default' must be a finite number, got inf"),
        ({"default": "1"}, "the weight of 'default' must be a finite number, got '1'"),
        ({"default": True}, "the weight of 'default' must be a finite number, got True"),
        ({"default": 1.0, "zz": 1.0}, "no adapter is called 'zz'"),
    ]
    for spec, message in cases:
        with pytest.raises(AdapterError, match=message):
            host.sparsify.set_adapter(spec)
        tiny.assert_same(tiny.state_of(host), state)
        assert host.sparsify.active.trainable


def test_saving_a_mix_needs_a_name(tmp_path):
    _, host = trained_host()
    host.sparsify.set_adapter({"default": 0.5})
    with pytest.raises(AdapterError, match=r"0\.5·default is not one trained adapter; name the one to save"):
        host.sparsify.save_adapter(tmp_path)
    host.sparsify.save_adapter(tmp_path, "default")
    assert (tmp_path / files.TENSORS).is_file()


def test_removing_the_active_adapter_leaves_the_base(tmp_path):
    model, host = trained_host()
    host.sparsify.save_adapter(tmp_path)
    host.sparsify.load_adapter(tmp_path, "b")
    host.sparsify.set_adapter("b")
    host.sparsify.remove_adapter("b")
    tiny.assert_same(tiny.state_of(host), {n: t.detach() for n, t in model.state_dict().items()})
    with pytest.raises(AdapterError, match="no adapter is called 'b'"):
        host.sparsify.set_adapter("b")


# --- folding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Qwen2"])
def test_merge_unmerge_restore_are_exact(name, dtype):
    model = tiny.build(name, dtype)
    base = tiny.snapshot(model)
    host = tiny.lower(model, BOTH)
    tiny.disturb(host)
    x = tiny.tokens()
    expected, state = host(x).logits, tiny.state_of(host)
    own = tiny.trainable(host)
    blocks = [p.detach().clone() for p in own]

    host.sparsify.merge()
    assert not any(type(m).__name__.startswith("Partial") for m in host.modules())
    assert torch.equal(host(x).logits, expected)
    tiny.assert_same(tiny.state_of(host), state)
    with pytest.raises(
        SparsifyError, match=r"set_adapter: the adapter is merged into the weights; call unmerge\(\) first"
    ):
        host.sparsify.set_adapter(None)
    with pytest.raises(SparsifyError, match="merge: the adapter is merged"):
        host.sparsify.merge()

    host.sparsify.unmerge()
    assert torch.equal(host(x).logits, expected)
    assert all(a is b for a, b in zip(own, tiny.trainable(host), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, blocks, strict=True))
    with pytest.raises(SparsifyError, match="unmerge: nothing is merged"):
        host.sparsify.unmerge()

    plain = host.sparsify.restore()
    tiny.assert_same(tiny.snapshot(plain), base)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert "sparsify" not in plain.__dict__
    assert torch.equal(plain(x).logits, model(x).logits)
    again = tiny.lower(plain, BOTH)  # a restored model is as good as new
    assert again.sparsify.program.choices


def test_restore_from_merged_and_from_a_mix_is_exact():
    for prepare in (lambda s: s.merge(), lambda s: s.set_adapter({"default": 0.3}), lambda s: s.set_adapter(None)):
        model, host = trained_host(dtype=torch.bfloat16)
        base = tiny.snapshot(model)
        prepare(host.sparsify)
        tiny.assert_same(tiny.snapshot(host.sparsify.restore()), base)


class SharedUp(nn.Module):
    """Two feed-forwards that share the *tensor* of their up-projection, in different modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.up2, self.down2 = nn.Linear(12, 20), nn.Linear(20, 12)
        self.up2.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        return x + self.down2(torch.relu(self.up2(x)))


def test_restore_is_exact_when_a_reordered_tensor_is_tied_between_modules():
    model = SharedUp()
    base = tiny.snapshot(model)
    x = torch.randn(4, 12)
    expected = model(x)
    host = tiny.lower(model, S2FT(units=5), example=x, check="numeric")
    assert any(m.param == "up.weight" for m in host.sparsify.program.moves), "the tied tensor must move for this test"
    torch.testing.assert_close(host(x), expected)
    tiny.assert_same(tiny.state_of(host), {n: t.detach() for n, t in model.state_dict().items()})
    assert host.up.weight is host.up2.weight
    tiny.disturb(host)
    restored = host.sparsify.restore()
    tiny.assert_same(tiny.snapshot(restored), base)
    assert torch.equal(restored(x), expected)


# --- export ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Phi-3", "BERT (classifier)"])
def test_exported_lora_loads_in_peft_to_the_same_logits(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, host = trained_host(name)
    inputs = tiny.inputs_of(model, name)
    sides = {(s.side, s.axis) for s in host.sparsify.program.slices}
    assert {s for s, _ in sides} == {"column", "row"}
    expected = tiny.output_of(host(**inputs))
    host.sparsify.export_lora(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(tiny.output_of(loaded(**inputs)), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tiny.output_of(model(**inputs)), expected, atol=1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (name == "GPT-2")


def test_exported_lora_keeps_fully_trained_heads(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.build("BERT (classifier)")
    inputs = tiny.inputs_of(model, "BERT (classifier)")
    host = tiny.lower(model, S2FT(structure="attention", units=1), train=["classifier"])
    tiny.train(host, **inputs)
    host.sparsify.export_lora(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(tiny.output_of(loaded(**inputs)), tiny.output_of(host(**inputs)), atol=1e-5, rtol=1e-4)


# --- hostile and damaged files --------------------------------------------------------------------------------------------

PARAM = "model.layers.0.mlp.down_proj.weight"


class File:
    """A valid adapter file, opened up for tampering."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = {n: t.clone() for n, t in load_file(directory / files.TENSORS).items()}  # not views of the file
        with safe_open(directory / files.TENSORS, "pt") as opened:
            self.document = json.loads(opened.metadata()["sparsify"])
        self.metadata: dict[str, str] | None = None

    def entry(self) -> dict[str, Any]:
        return next(e for e in self.document["entries"] if e["param"] == PARAM)

    def set(self, leaf: str, value: Tensor, fix: bool = True) -> None:
        self.tensors[f"{PARAM}::column::{leaf}"] = value.contiguous()
        if fix:
            self.entry()["shape"] = list(self.tensors[f"{PARAM}::column::delta"].shape)
            self.entry()["channels"] = self.tensors[f"{PARAM}::column::channels"].numel()

    def get(self, leaf: str) -> Tensor:
        return self.tensors[f"{PARAM}::column::{leaf}"]

    def rename(self, new: str) -> None:
        for leaf in ("channels", "delta"):
            self.tensors[f"{new}::column::{leaf}"] = self.tensors.pop(f"{PARAM}::column::{leaf}")
        self.document["bases"][new] = self.document["bases"].pop(PARAM)
        self.entry()["param"] = new

    def write(self) -> None:
        metadata = {"sparsify": json.dumps(self.document)} if self.metadata is None else self.metadata
        write_tensors(self.directory / files.TENSORS, self.tensors, metadata)  # with content hashes of what it is now


def channels_with(f: File, value: int) -> Tensor:
    changed = f.get("channels").clone()
    changed[0] = value
    return changed


def rewrite_header(f: File, change: Callable[[dict[str, Any]], None]) -> None:
    f.write()
    path = f.directory / files.TENSORS
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def raw_write(f: File, change: Callable[[bytes], bytes]) -> None:
    path = f.directory / files.TENSORS
    path.write_bytes(change(path.read_bytes()))


def huge(header: dict[str, Any]) -> None:
    header[f"{PARAM}::column::delta"]["shape"] = [2**40, 2**20]


TAMPER: dict[str, tuple[Callable[[File], Any], str]] = {
    "channel past the end": (
        lambda f: f.set("channels", channels_with(f, 44)),
        r"is \(36, 44\) here; the file has channels up to 44",
    ),
    "channel far past the end": (
        lambda f: f.set("channels", channels_with(f, 2**62)),
        r"the file has channels up to \d{15,}",
    ),
    "negative channel": (
        lambda f: f.set("channels", channels_with(f, -1)),
        "channels must be distinct and not negative",
    ),
    "duplicate channel": (
        lambda f: f.set("channels", channels_with(f, int(f.get("channels")[1]))),
        "channels must be distinct",
    ),
    "channels as int32": (
        lambda f: f.set("channels", f.get("channels").int()),
        "channels are torch.int32, expected int64",
    ),
    "channels as floats": (
        lambda f: f.set("channels", f.get("channels").float()),
        "channels are torch.float32, expected int64",
    ),
    "channels in two dimensions": (
        lambda f: f.set("channels", f.get("channels")[None]),
        "the tensors have other shapes than the document says",
    ),
    "no channels": (
        lambda f: (f.set("channels", f.get("channels")[:0]), f.set("delta", f.get("delta")[:, :0])),
        "channels must be distinct",
    ),
    "values as integers": (
        lambda f: f.set("delta", f.get("delta").int()),
        "values are torch.int32, expected a floating type",
    ),
    "values as booleans": (
        lambda f: f.set("delta", f.get("delta") > 0),
        "values are torch.bool, expected a floating type",
    ),
    "values as complex": (
        lambda f: f.set("delta", f.get("delta").to(torch.complex64)),
        "values are torch.complex64|damaged",
    ),
    "values in 8 bits": (
        lambda f: f.set("delta", f.get("delta").to(torch.float8_e4m3fn)),
        "values are torch.float8_e4m3fn",
    ),
    "NaN": (lambda f: f.set("delta", f.get("delta") * float("nan")), "values are not finite"),
    "infinity": (lambda f: f.set("delta", f.get("delta") / 0.0), "values are not finite"),
    "fewer values than channels": (
        lambda f: f.set("delta", f.get("delta")[:, 1:]),
        r"values \(36, 3\) do not fit 4 channels",
    ),
    "values of another width": (lambda f: f.set("delta", f.get("delta")[1:]), r"is \(36, 44\) here"),
    "values in three dimensions": (
        lambda f: f.set("delta", f.get("delta")[None]),
        r"is \(36, 44\) here; the file has values \(1, 36, 4\)",
    ),
    "document says another shape": (
        lambda f: f.set("delta", f.get("delta")[:, 1:], fix=False),
        "other shapes than the document says",
    ),
    "missing tensor": (lambda f: f.tensors.pop(f"{PARAM}::column::delta"), "tensor '.*::delta' is missing"),
    "extra tensor": (lambda f: f.tensors.update(surprise=torch.zeros(3)), "unexpected tensor 'surprise'"),
    "path as tensor name": (lambda f: f.tensors.update({"../../etc/passwd": torch.zeros(3)}), "unexpected tensor"),
    "entry listed twice": (lambda f: f.document["entries"].append(dict(f.entry())), "is listed twice"),
    "unknown kind": (lambda f: f.entry().update(kind="diagonal"), "neither sparsify nor a registered method knows"),
    "kind that is no text": (lambda f: f.entry().update(kind=["column"]), "malformed entry"),
    "param that is no text": (lambda f: f.entry().update(param=3), "malformed entry"),
    "transposed by mistake": (lambda f: f.entry().update(transposed=True), "stored in another orientation"),
    "transposed is no bool": (lambda f: f.entry().update(transposed="no"), "malformed entry"),
    "scale is no number": (lambda f: f.entry().update(scale="1"), "the scale '1' is not a finite number"),
    "row instead of column": (
        lambda f: (
            f.entry().update(kind="row"),
            f.tensors.update(
                {
                    k.replace("column", "row"): f.tensors.pop(k)
                    for k in list(f.tensors)
                    if k.startswith(f"{PARAM}::column")
                }
            ),
        ),
        "do not fit 4 channels",
    ),
    "unknown parameter": (lambda f: f.rename("model.layers.7.mlp.down_proj.weight"), "the model has no parameter"),
    "empty parameter name": (lambda f: f.rename(""), "the model has no parameter ''"),
    "path as parameter": (lambda f: f.rename("../../../etc/passwd"), "the model has no parameter"),
    "attribute as parameter": (lambda f: f.rename("model.config.vocab_size"), "the model has no parameter"),
    "method as parameter": (lambda f: f.rename("model.layers.0.mlp.down_proj.forward"), "the model has no parameter"),
    "dunder as parameter": (lambda f: f.rename("__class__.__init__"), "the model has no parameter"),
    "our own block as parameter": (lambda f: f.rename(PARAM + "_slice"), "the model has no parameter"),
    "a vector as parameter": (lambda f: f.rename("model.norm.weight"), "has 1 dimensions here, expected 2"),
    "foreign base": (
        lambda f: f.document["bases"].update({PARAM: "0" * 64}),
        "not the base that the adapter was trained on",
    ),
    "base without a hash": (lambda f: f.document["bases"].pop(PARAM), "not the base that the adapter was trained on"),
    "bases is a list": (lambda f: f.document.update(bases=[]), "'bases' must map parameters to hashes"),
    "entries is an object": (lambda f: f.document.update(entries={}), "'entries' must be a list of objects"),
    "info is text": (lambda f: f.document.update(info="x"), "'info' must be an object"),
    "info is a list": (lambda f: f.document.update(info=[1]), "'info' must be an object"),
    "newer version": (
        lambda f: f.document.update(format_version=3),
        "format version 3; this sparsify reads versions 1 to 2",
    ),
    "no version": (lambda f: f.document.pop("format_version"), "format version None"),
    "another format": (lambda f: f.document.update(format="lora"), "not a sparsify adapter"),
    "no metadata": (lambda f: setattr(f, "metadata", {}), "not written by sparsify"),
    "metadata that is no JSON": (lambda f: setattr(f, "metadata", {"sparsify": "{"}), "its metadata is not JSON"),
    "metadata that is a list": (lambda f: setattr(f, "metadata", {"sparsify": "[]"}), "not a sparsify adapter"),
    "metadata nested without end": (
        lambda f: setattr(f, "metadata", {"sparsify": "[" * 100_000}),
        "its metadata is not JSON",
    ),
}
RAW: dict[str, tuple[Callable[[File], Any], str]] = {
    "truncated": (lambda f: raw_write(f, lambda b: b[: len(b) // 2]), "damaged or not a safetensors file"),
    "truncated by one byte": (lambda f: raw_write(f, lambda b: b[:-1]), "damaged or not a safetensors file"),
    "empty": (lambda f: raw_write(f, lambda b: b""), "damaged or not a safetensors file"),
    "random bytes": (lambda f: raw_write(f, lambda b: b"\x93" * 300), "damaged or not a safetensors file"),
    "pickle": (lambda f: torch.save(f.tensors, f.directory / files.TENSORS), "damaged or not a safetensors file"),
    "header longer than the file": (
        lambda f: raw_write(f, lambda b: struct.pack("<Q", 2**60) + b[8:]),
        "damaged or not",
    ),
    "huge shape": (lambda f: rewrite_header(f, huge), "damaged or not a safetensors file"),
    "offsets outside": (
        lambda f: rewrite_header(f, lambda h: h[f"{PARAM}::column::delta"].update(data_offsets=[0, 2**50])),
        "damaged or not",
    ),
    "a directory instead of the file": (
        lambda f: ((f.directory / files.TENSORS).unlink(), (f.directory / files.TENSORS).mkdir()),
        "no adapter.safetensors there",
    ),
    "nothing there": (
        lambda f: (f.directory / files.TENSORS).unlink(),
        "no adapter.safetensors there; is it an adapter",
    ),
}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """One host for all hostile files (each must leave it as it was), and a valid file."""
    torch.manual_seed(0)
    host = tiny.lower(tiny.llama(), S2FT(structure="ffn", units=4))
    tiny.disturb(host)
    directory = tmp_path_factory.mktemp("valid")
    host.sparsify.save_adapter(directory)
    return host, directory


def assert_refused(host: nn.Module, directory: Path, message: str) -> None:
    state, active, names = tiny.state_of(host), host.sparsify.active, set(host.sparsify.adapters)
    blocks = [p.detach().clone() for p in tiny.trainable(host)]
    logits = host(tiny.tokens()).logits
    with pytest.raises(AdapterError, match=message) as caught:
        host.sparsify.load_adapter(directory, "new")
    assert str(directory) in str(caught.value), "the error names the file"
    tiny.assert_same(tiny.state_of(host), state)
    assert host.sparsify.active == active
    assert set(host.sparsify.adapters) == names
    assert all(torch.equal(a, b) for a, b in zip(blocks, tiny.trainable(host), strict=True))
    assert torch.equal(host(tiny.tokens()).logits, logits)


def tampered(directory: Path, source: Path) -> File:
    for file in (files.TENSORS, files.DOCUMENT):
        (directory / file).write_bytes((source / file).read_bytes())
    return File(directory)


@pytest.mark.parametrize("case", TAMPER)
def test_hostile_file_is_refused_and_the_model_stays(case, victim, tmp_path):
    host, source = victim
    file = tampered(tmp_path, source)
    change, message = TAMPER[case]
    change(file)
    file.write()
    assert_refused(host, tmp_path, message)


@pytest.mark.parametrize("case", RAW)
def test_damaged_file_is_refused_and_the_model_stays(case, victim, tmp_path):
    host, source = victim
    change, message = RAW[case]
    change(tampered(tmp_path, source))
    assert_refused(host, tmp_path, message)


def test_untampered_file_loads(victim, tmp_path):
    """The control of the two tests above: writing the opened file back changes nothing."""
    host, source = victim
    file = tampered(tmp_path, source)
    file.write()
    host.sparsify.load_adapter(tmp_path, "same")
    host.sparsify.remove_adapter("same")


def test_the_readable_document_is_not_trusted(victim, tmp_path):
    host, source = victim
    tampered(tmp_path, source)
    (tmp_path / files.DOCUMENT).write_text("{}")
    with pytest.warns(
        UserWarning, match=r"adapter.json is damaged or of another adapter; what counts is the document inside"
    ):
        host.sparsify.load_adapter(tmp_path, "same")
    host.sparsify.remove_adapter("same")


def test_a_loaded_adapter_does_not_depend_on_its_file(victim, tmp_path):
    """Views of the mapped file would change, or crash the process, when somebody truncates it."""
    host, source = victim
    tampered(tmp_path, source)
    host.sparsify.load_adapter(tmp_path, "same")
    expected = [d.values.clone() for d in host.sparsify.get("same").deltas]
    (tmp_path / files.TENSORS).write_bytes(b"")
    assert all(torch.equal(d.values, e) for d, e in zip(host.sparsify.get("same").deltas, expected, strict=True))
    host.sparsify.remove_adapter("same")


def test_adapter_of_another_base_needs_strict_false(victim, tmp_path):
    host, source = victim
    other = tiny.lower(tiny.llama(seed=4), S2FT(structure="ffn", units=4))
    before = tiny.state_of(other)
    with pytest.raises(AdapterError, match="load the same base in the same dtype, or pass strict=False"):
        other.sparsify.load_adapter(source, "a")
    tiny.assert_same(tiny.state_of(other), before)
    other.sparsify.load_adapter(source, "a", strict=False)
    other.sparsify.set_adapter("a")
    change = dense_delta(source, host)[PARAM]
    torch.testing.assert_close(tiny.state_of(other)[PARAM].double() - before[PARAM].double(), change, atol=1e-6, rtol=0)


def test_a_single_changed_bit_of_the_base_is_noticed():
    weight = torch.randn(30, 20)
    changed = weight.clone()
    changed[7, 3] = torch.nextafter(changed[7, 3], torch.tensor(9.0))
    assert files.tensor_hash(weight) == files.tensor_hash(weight.clone())
    assert files.tensor_hash(weight) != files.tensor_hash(changed)
    assert files.tensor_hash(weight) != files.tensor_hash(weight.t().contiguous())
    assert files.tensor_hash(weight) != files.tensor_hash(weight.view(20, 30))
    assert files.tensor_hash(weight) != files.tensor_hash(weight.bfloat16())


def test_fully_trained_parameter_needs_the_same_plan(tmp_path):
    name = "BERT (classifier)"
    host = tiny.lower(tiny.build(name), S2FT(structure="attention", units=1), train=["classifier"])
    tiny.disturb(host)
    host.sparsify.save_adapter(tmp_path)
    plain = tiny.lower(tiny.build(name), S2FT(structure="attention", units=1))
    with pytest.raises(
        AdapterError, match=r"classifier.bias trained in full there; compile with Plan\(train=\['classifier'\]\)"
    ):
        plain.sparsify.load_adapter(tmp_path)
    again = tiny.lower(tiny.build(name), S2FT(structure="attention", units=1), train=["classifier"])
    again.sparsify.load_adapter(tmp_path, "a")
    again.sparsify.set_adapter("a")
    assert torch.equal(again.classifier.weight, host.classifier.weight)


# --- saves that are killed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_save_that_fails_leaves_the_old_adapter_and_no_litter(fails_at, tmp_path, monkeypatch):
    _, host = trained_host()
    host.sparsify.save_adapter(tmp_path)
    old = {n: t.clone() for n, t in load_file(tmp_path / files.TENSORS).items()}
    tiny.disturb(host, seed=77)
    real, calls = os.replace, []

    def replace(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError("disk full")
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        host.sparsify.save_adapter(tmp_path)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} == {files.TENSORS, files.DOCUMENT}
    tiny.assert_same(load_file(tmp_path / files.TENSORS), old)
    host.sparsify.load_adapter(tmp_path, "old")


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
import tiny
from sparsify import S2FT
host = tiny.lower(tiny.Mlp(), S2FT(units=3), example=torch.randn(2, 12), seed=5)
tiny.disturb(host)
calls = []
real = os.{function}
def dies(*arguments):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
os.{function} = dies
host.sparsify.save_adapter({directory!r})
"""


@pytest.mark.parametrize(("function", "at"), [("fsync", 2), ("replace", 2)])
def test_a_save_that_is_killed_leaves_the_old_adapter(function, at, tmp_path):
    torch.manual_seed(0)
    host = tiny.lower(tiny.Mlp(), S2FT(units=3), example=torch.randn(2, 12))
    tiny.disturb(host, seed=1)
    host.sparsify.save_adapter(tmp_path)
    old = {n: t.clone() for n, t in load_file(tmp_path / files.TENSORS).items()}
    code = KILLED.format(tests=str(Path(__file__).parents[1]), function=function, at=at, directory=str(tmp_path))
    done = processes.run_python("-c", code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tiny.assert_same(load_file(tmp_path / files.TENSORS), old)
    host.sparsify.load_adapter(tmp_path, "old")
    host.sparsify.set_adapter("old")


def test_save_into_a_directory_that_does_not_exist_yet(tmp_path):
    _, host = trained_host()
    path = host.sparsify.save_adapter(tmp_path / "a" / "b")
    assert (path / files.TENSORS).stat().st_size < 40_000
    assert sparsify.adapters.adapter.load(path).info["model"] == "LlamaForCausalLM"
