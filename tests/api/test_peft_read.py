"""What PEFT wrote is read to the function that PEFT computes, or refused by name; hostile directories are refused, and change nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import sparsify
from sparsify import AdapterError, LoRA, Plan, SparsifyError
from sparsify.adapters import peft_format

peft = pytest.importorskip("peft")

TASKS = {"BERT (classifier)": "SEQ_CLS", "T5 (gated)": "SEQ_2_SEQ_LM"}
TARGETS = {
    "Llama": ["q_proj", "down_proj"],
    "Qwen2": ["q_proj", "down_proj"],
    "GPT-2": ["c_attn", "mlp.c_proj"],
    "BERT (classifier)": ["query", "dense"],
    "T5 (gated)": ["q", "wo"],
}


def build(name: str) -> nn.Module:
    return tiny.llama(tie_word_embeddings=True) if name == "tied Llama" else tiny.build(name)


def outputs(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return tiny.output_of(model.eval()(**tiny.inputs_of(model, None if name == "tied Llama" else name)))


def write(name: str, directory: Path, **fields: Any) -> nn.Module:
    """A PEFT adapter with every trained tensor moved, saved; returns PEFT's model."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS.get(name, TARGETS["Llama"]), **fields}
    config = peft.LoraConfig(task_type=TASKS.get(name, "CAUSAL_LM"), **settings)
    model = peft.get_peft_model(build(name), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    return model


EQUAL = [
    ("Llama", {}),
    ("Llama", {"init_lora_weights": "pissa"}),
    ("GPT-2", {"init_lora_weights": "pissa"}),
    ("Qwen2", {"init_lora_weights": "olora", "use_rslora": True}),
    ("Llama", {"init_lora_weights": "pissa", "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.*q_proj": 3}}),
    ("Llama", {"init_lora_weights": "gaussian"}),
    ("Llama", {"init_lora_weights": "orthogonal"}),
    ("Llama", {"use_rslora": True, "lora_dropout": 0.3}),
    ("Llama", {"rank_pattern": {r"^model\.layers\.0\..*": 2}, "alpha_pattern": {"(q|k)_proj": 9, "model.layers.1.mlp.down_proj": 1}}),
    ("Llama", {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}),
    ("Llama", {"target_modules": r"(?!.*layers\.0\.).*\.(?:q|v)_proj\b"}),
    ("Llama", {"layers_to_transform": [1]}),
    ("Llama", {"layers_to_transform": 0, "layers_pattern": "layers"}),
    ("Llama", {"modules_to_save": ["lm_head", "norm"]}),
    ("Qwen2", {"bias": "all"}),
    ("Qwen2", {"bias": "lora_only"}),
    ("GPT-2", {}),
    ("GPT-2", {"fan_in_fan_out": True, "bias": "all"}),
    ("BERT (classifier)", {}),
    ("BERT (classifier)", {"bias": "all", "modules_to_save": ["classifier", "embeddings.LayerNorm"]}),
    ("T5 (gated)", {"modules_to_save": ["final_layer_norm"]}),
    ("tied Llama", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    *([("Llama", {"init_lora_weights": "mica"})] if hasattr(peft, "KasaConfig") else []),
]  # fmt: skip


#: the rest is marked slow
QUICK = {0, 2, 3, 4, 8, 10, 11, 13, 14, 19, 21}
MARKED = [pytest.param(*c, marks=[] if i in QUICK else [pytest.mark.slow]) for i, c in enumerate(EQUAL)]


@pytest.mark.parametrize(("name", "fields"), MARKED, ids=[f"{n} {f}" for n, f in EQUAL])
def test_read_to_the_function_that_peft_computes(name, fields, tmp_path):
    write(name, tmp_path, **fields)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path)
    want, plain = outputs(theirs, name), outputs(build(name), name)
    host = sparsify.load(build(name), tmp_path)
    assert float((want - plain).abs().max()) > 1e-3
    torch.testing.assert_close(outputs(host, name), want, rtol=2e-5, atol=2e-5)
    host.sparsify.set_adapter(None)
    assert torch.equal(outputs(host, name), plain)


def test_a_residual_is_read_by_a_permuted_host_too(tmp_path):
    """PiSSA needs the base in original coordinates, whatever the host has moved and trained meanwhile."""
    write("Llama", tmp_path, init_lora_weights="pissa")
    want = outputs(peft.PeftModel.from_pretrained(build("Llama"), tmp_path), "Llama")
    host = tiny.lower(build("Llama"), sparsify.S2FT(0.3))
    tiny.disturb(host)
    host.sparsify.load_adapter(tmp_path, "pissa")
    host.sparsify.set_adapter("pissa")
    torch.testing.assert_close(outputs(host, "Llama"), want, rtol=2e-5, atol=2e-5)


FEATURES = [
    ({"use_dora": True}, "use_dora"),
    ({"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ({"kasa_config": peft.KasaConfig() if hasattr(peft, "KasaConfig") else None}, "kasa_config"),
    ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
]


@pytest.mark.parametrize(("fields", "word"), FEATURES, ids=[w for _, w in FEATURES])
def test_a_feature_that_is_no_plain_low_rank_change_is_refused_by_name(fields, word, tmp_path):
    if None in fields.values():
        pytest.skip("this PEFT does not have it")
    write("Llama", tmp_path, **fields)
    with pytest.raises(AdapterError, match=word):
        sparsify.load(build("Llama"), tmp_path)


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("LoHaConfig", "VeraConfig", "PrefixTuningConfig")]


@pytest.mark.parametrize("kind", ["IA3Config", "AdaLoraConfig", *SLOW_KINDS])
def test_other_adapter_types_are_refused_by_name(kind, tmp_path):
    more = {"IA3Config": {"feedforward_modules": ["down_proj"]}, "AdaLoraConfig": {"total_step": 9}}.get(kind, {})
    more = {"num_virtual_tokens": 3} if "Prefix" in kind else {"target_modules": ["down_proj"], **more}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **more)
    peft.get_peft_model(build("Llama"), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=rf"a PEFT adapter of type '{config.peft_type.value}'; only LORA"):
        sparsify.load(build("Llama"), tmp_path)


def test_tied_weights(tmp_path):
    """PEFT adapts, or saves, one of the tied modules alone: over shared weights that is another function."""
    write("tied Llama", tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head is adapted alone, but its weight is also model\.embed_tokens"):
        sparsify.load(build("tied Llama"), tmp_path / "head")
    write("tied Llama", tmp_path / "embedding", modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"trained apart from lm_head\.weight, with which it shares its weight"):
        sparsify.load(build("tied Llama"), tmp_path / "embedding")


def test_pickles_are_refused(tmp_path):
    write("Llama", tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle, which can run code"):
        sparsify.load(build("Llama"), tmp_path)


# --- damaged and hostile -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    write("Llama", directory)
    return directory


@pytest.fixture(scope="module")
def host(written):
    return sparsify.compile(build("Llama"), Plan([LoRA(match="*.q_proj", rank=2)]), progress=False)


def refuse(host: Any, written: Path, tmp_path: Path, config: Any = None, tensors: Any = None, word: str = "") -> None:
    """A changed copy of the directory is refused, at once, and the host stays as it is to the last bit."""
    directory = tmp_path / "changed"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(written, directory)
    if config is not None:
        (directory / "adapter_config.json").write_text(config)
    if tensors is not None:
        (directory / "adapter_model.safetensors").write_bytes(tensors)
    before, began = {n: t.clone() for n, t in host.state_dict().items()}, time.monotonic()
    with pytest.raises(AdapterError, match=word):
        host.sparsify.load_adapter(directory, "changed")
    assert time.monotonic() - began < 30  # linear, not exponential
    tiny.assert_same(host.state_dict(), before)
    assert "changed" not in host.sparsify.adapters


FIELDS: list[tuple[str, Any]] = [
    ("lora_alpha", "x"), ("lora_alpha", None), ("lora_alpha", True), ("lora_alpha", float("nan")), ("lora_alpha", 10**400),
    ("lora_alpha", [8]), ("lora_alpha", 1e300), ("r", 0), ("r", -4), ("r", 4.0), ("r", 5), ("r", "4"), ("r", True), ("r", 2**70),
    ("use_rslora", "false"), ("use_rslora", 1), ("bias", "some"), ("bias", []), ("lora_dropout", "0"), ("lora_dropout", 7),
    ("alpha_pattern", [1]), ("alpha_pattern", {"(": 1}), ("alpha_pattern", {"q": 10**400}), ("alpha_pattern", {"q": None}),
    ("alpha_pattern", {"q": True}), ("alpha_pattern", "q"), ("alpha_pattern", {r"(.)\1": 1}), ("alpha_pattern", {"(?<=a)b": 1}),
    ("alpha_pattern", {"a" * 5000: 1}), ("alpha_pattern", {"((a{1,99}){1,99}){1,99}": 1}), ("alpha_pattern", {"": 1}),
    ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": 3}), ("rank_pattern", {"q_proj": 1.5}), ("rank_pattern", 3),
    ("target_modules", 3), ("target_modules", [1]), ("target_modules", {"q_proj": 1}), ("target_modules", "("),
    ("target_modules", ["q_proj"]), ("target_modules", ["q_proj", "down_proj", "v_proj"]), ("target_modules", []),
    ("target_modules", r"(?i).*Q_PROJ"), ("exclude_modules", ["q_proj"]), ("exclude_modules", 1), ("layers_to_transform", [1]),
    ("layers_to_transform", "1"), ("modules_to_save", "lm_head"), ("modules_to_save", ["lm_head"]), ("modules_to_save", [3]),
    ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"), ("init_lora_weights", "later"),
    ("init_lora_weights", 3), ("init_lora_weights", None), ("init_lora_weights", "pissa_niter_2"), ("auto_mapping", 3),
    ("kasa_config", {}), ("arrow_config", {"top_k": 2}), ("use_bdlora", {}), ("monteclora_config", {}), ("velora_config", {}),
    ("target_parameters", ["x"]), ("use_qalora", True), ("megatron_config", {"a": 1}), ("peft_type", "LOHA"), ("peft_type", None),
    ("peft_type", ["LORA"]), ("peft_type", "lora"), ("a_field_of_the_future", True), ("a_field_of_the_future", {"on": False}),
    ("a_field_of_the_future", 0.5), ("base_model_name_or_path", 3), ("fan_in_fan_out", "yes"), ("task_type", []),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[f"{f}={str(v)[:30]}" for f, v in FIELDS])
def test_wrong_fields_are_refused_by_name(field, value, host, written, tmp_path):
    config = json.loads((written / "adapter_config.json").read_text())
    word = {"r": "adapter_config.json says|r must|digits|rank", "rank_pattern": "rank_pattern|says 3"}.get(field, field)
    word = (
        f"{word}|read|incomplete|of type"
        if field != "a_field_of_the_future"
        else "'a_field_of_the_future' to .*does not know"
    )
    refuse(host, written, tmp_path, json.dumps({**config, field: value}), word=word)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"LORA"', "{", "[" * 100000, '{"a":' * 5000, '{"r": 1, "r": 2}', '{"r": %s}' % ("9" * 5000)], ids=lambda t: t[:12])  # fmt: skip
def test_configurations_that_are_no_object_are_refused(text, host, written, tmp_path):
    refuse(host, written, tmp_path, text, word="not a readable PEFT adapter|no JSON object")


def test_unknown_fields_that_say_nothing_are_taken(host, written, tmp_path):
    shutil.copytree(written, tmp_path / "changed")
    config = json.loads((written / "adapter_config.json").read_text())
    config |= {"later": None, "latest": False, "last": [], "least": {}, "lost": ""}
    (tmp_path / "changed" / "adapter_config.json").write_text(json.dumps(config))
    host.sparsify.load_adapter(tmp_path / "changed", "fine")
    host.sparsify.remove_adapter("fine")


def test_an_expression_that_would_hang_is_answered(host, written, tmp_path):
    """Matched without backtracking: it names no module, so nothing changes."""
    shutil.copytree(written, tmp_path / "changed")
    config = json.loads((written / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"((\w|\.)+)+X": 1, r"(a?){40}(a){40}": 2, r"(.*)*(.*)*(.*)*!": 3}
    (tmp_path / "changed" / "adapter_config.json").write_text(json.dumps(config))
    began = time.monotonic()
    host.sparsify.load_adapter(tmp_path / "changed", "fine")
    assert time.monotonic() - began < 30
    assert {d.scale for d in host.sparsify.adapters["fine"].deltas} == {1.5}
    host.sparsify.remove_adapter("fine")


def spoiled_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    key_a = next(k for k in tensors if "lora_A" in k)
    key_b = key_a.replace("lora_A", "lora_B")
    a, b = tensors[key_a], tensors[key_b]
    changed = lambda **new: {**tensors, **{(key_a if k == "a" else key_b): v for k, v in new.items()}}  # noqa: E731
    base = "base_model.model."
    found = {
        "NaN": (changed(a=a * float("nan")), "not finite"),
        "infinite": (changed(b=b / 0), "not finite"),
        "whole numbers": (changed(a=a.int()), "torch.int32"),
        "booleans": (changed(a=a.bool()), "torch.bool"),
        "complex": (changed(a=a.to(torch.complex64)), "torch.complex64"),
        "eight bits": (changed(a=a.to(torch.float8_e4m3fn)), "float8"),
        "rank 0": (changed(a=a[:0], b=b[:, :0]), "do not fit"),
        "one dimension": (changed(a=a[0]), "do not fit"),
        "convolution": (changed(a=a[:, :, None, None], b=b[:, :, None, None]), "do not fit"),
        "too wide": (changed(a=torch.cat([a, a], 1)), "factors make"),
        "another rank": (changed(a=a[:2], b=b[:, :2]), "adapter_config.json says 4"),
        "overflow": (changed(a=a * 1e20, b=b * 1e20), "overflows"),
        "no A": ({k: v for k, v in tensors.items() if k != key_a}, "no lora_A"),
        "neither": ({k: v for k, v in tensors.items() if k not in (key_a, key_b)}, "incomplete"),
        "nothing": ({}, "no LoRA factors"),
        "elsewhere": ({**tensors, f"{base}nowhere.lora_A.weight": a, f"{base}nowhere.lora_B.weight": b}, "no module"),
        "no prefix": ({**tensors, "model.norm.weight": a[0]}, "not named as PEFT names them"),
        "no parameter": ({**tensors, f"{base}model.nrm.weight": a[0]}, r"no parameter 'model\.nrm"),
        "another shape": ({**tensors, f"{base}model.norm.weight": a[0, :3]}, "is .* here"),
        "magnitudes": ({**tensors, key_a.replace("lora_A.weight", "lora_magnitude_vector"): a[0]}, "DoRA"),
        "a bias": ({**tensors, key_b.replace("weight", "bias"): b[:, 0].contiguous()}, "lora_bias"),
        "another name": ({**tensors, key_a.replace("lora_A", "lora_A.default"): a}, "save_pretrained"),
        "an embedding": ({**tensors, f"{base}model.embed_tokens.lora_embedding_A": a}, "embedding"),
        "not a linear": ({**tensors, f"{base}model.norm.lora_A.weight": a, f"{base}model.norm.lora_B.weight": b}, "RMSNorm"),
    }  # fmt: skip
    return {name: ({k: v.clone().contiguous() for k, v in new.items()}, word) for name, (new, word) in found.items()}


def test_tensors_that_do_not_fit_are_refused(host, written, tmp_path):
    tensors = load_file(written / "adapter_model.safetensors")
    for name, (changed, word) in spoiled_tensors(tensors).items():
        try:
            refuse(host, written, tmp_path, tensors=save(changed), word=word)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def headers(data: bytes) -> list[bytes]:
    """Files whose header does not tell the truth."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    first = next(k for k in header if "lora_A" in k)

    def written(changes: dict[str, Any] | None = None, text: str | None = None) -> bytes:
        entry = {**header[first], **(changes or {})}
        text = json.dumps({**header, first: entry}) if text is None else text
        return len(text.encode()).to_bytes(8, "little") + text.encode() + rest

    return [
        b"", b"abc", data[:-1], data + b"x", data[:40], (2**63).to_bytes(8, "little") + data[8:],
        written({"shape": [1 << 40, 1 << 40]}), written({"shape": [-1, 4]}), written({"shape": "4"}), written({"shape": [4.0, 4]}),
        written({"data_offsets": [0, 1 << 62]}), written({"data_offsets": [8, 4]}), written({"data_offsets": [0]}),
        written({"data_offsets": None}), written({"dtype": "F128"}), written({"dtype": 3}), written(text="[]"), written(text="{"),
        written(text="[" * 100000), written(text='{"__metadata__": 3}'), written(text=json.dumps({**header, first: 3})),
        written({"shape": [True, 4]}), written({"data_offsets": [0, 10**300]}),
    ]  # fmt: skip


def test_headers_that_lie_are_refused(host, written, tmp_path):
    for data in headers((written / "adapter_model.safetensors").read_bytes()):
        refuse(host, written, tmp_path, tensors=data, word="adapter_model.safetensors")


def test_damaged_files_are_read_or_refused_never_anything_else(written, tmp_path):
    model = build("Llama")
    shutil.copytree(written, tmp_path / "damaged")
    tensors, config = (
        (written / "adapter_model.safetensors").read_bytes(),
        (written / "adapter_config.json").read_bytes(),
    )
    draw, refused, header = random.Random(0), 0, int.from_bytes(tensors[:8], "little")
    for number in range(200):
        data, text = bytearray(tensors), bytearray(config)
        if number % 2:
            data[draw.randrange(header + 8)] ^= 1 << draw.randrange(8)
        else:
            place = draw.randrange(len(text))
            text[place : place + draw.randrange(12)] = draw.choice(
                [b"9" * 500, b"[", b"null", b"-1", b"1e999", b'"x"', b"\xff", b""]
            )
        (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(data)
        (tmp_path / "damaged" / "adapter_config.json").write_bytes(text)
        try:
            peft_format.read(tmp_path / "damaged", model)
        except AdapterError:
            refused += 1
    assert 100 < refused <= 200


def test_only_regular_files_are_opened(host, written, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        directory = tmp_path / f"pipe {name}"
        shutil.copytree(written, directory)
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(SparsifyError, match="no adapter|is a pipe|is no folder|no adapter.safetensors"):
            host.sparsify.load_adapter(directory, "pipe")
        (directory / name).unlink()
        (directory / name).mkdir()
        with pytest.raises(SparsifyError):
            host.sparsify.load_adapter(directory, "folder")
    linked = tmp_path / "linked"  # a hub's cache is made of links
    linked.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (linked / name).symlink_to(written / name)
    host.sparsify.load_adapter(linked, "linked")
    host.sparsify.remove_adapter("linked")


def test_what_is_read_is_a_copy(host, written, tmp_path):
    """A mapped file kills the process when somebody cuts it off after it was read."""
    shutil.copytree(written, tmp_path / "changed")
    host.sparsify.load_adapter(tmp_path / "changed", "cut")
    before = [d.values.clone() for d in host.sparsify.adapters["cut"].deltas]
    os.truncate(tmp_path / "changed" / "adapter_model.safetensors", 0)
    host.sparsify.set_adapter("cut")
    assert all(torch.equal(d.values, b) for d, b in zip(host.sparsify.adapters["cut"].deltas, before, strict=True))
    host.sparsify.set_adapter("default")
    host.sparsify.remove_adapter("cut")


def test_factors_of_16_and_64_bits_are_read(written, tmp_path):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        directory = tmp_path / str(dtype)
        shutil.copytree(written, directory)
        tensors = {k: v.to(dtype) for k, v in load_file(written / "adapter_model.safetensors").items()}
        save_file(tensors, directory / "adapter_model.safetensors")
        want = outputs(peft.PeftModel.from_pretrained(build("Llama"), directory), "Llama")
        torch.testing.assert_close(
            outputs(sparsify.load(build("Llama"), directory), "Llama"), want, rtol=2e-5, atol=2e-5
        )


def test_a_packed_base_has_no_residual(tmp_path):
    write("Llama", tmp_path, init_lora_weights="pissa")
    host = tiny.lower(build("Llama"), LoRA(match="*", rank=4), sparsify.Quantize("int8"))
    with pytest.raises(AdapterError, match=r"is packed \(int8\)"):
        host.sparsify.load_adapter(tmp_path)


def test_the_model_is_deep_copied_not_changed(written):
    model = build("Llama")
    before = tiny.snapshot(model)
    host = sparsify.load(model, written)
    copy.deepcopy(host)
    tiny.assert_same(tiny.snapshot(model), before)
