"""Models that transformers opened from a GGUF file: dense weights, with marks of a quantiser that keep them from being saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
import typer.testing

import sparsify
from sparsify import S2FT, LoRA, Plan
from sparsify.cli.commands import app

gguf = pytest.importorskip("gguf", reason="the gguf package, which reads and writes such files, is not installed")

WIDTH, INNER, HEADS, VOCABULARY = 32, 64, 2, 40
RULES = [S2FT(structure="ffn", fraction=0.2), LoRA(rank=2, match="q_proj")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block, its matrices in 8 bits."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for name, rows, columns in (
        ("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH, WIDTH), ("attn_v", WIDTH, WIDTH), ("attn_output", WIDTH, WIDTH),
        ("ffn_gate", INNER, WIDTH), ("ffn_up", INNER, WIDTH), ("ffn_down", WIDTH, INNER),
    ):  # fmt: skip
        shapes[f"blk.0.{name}"] = (rows, columns)
    shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32) * 0.3
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        packed = values + 1 if len(shape) == 1 else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(file: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def test_it_trains_and_saves_and_its_adapter_comes_back(file, tmp_path):
    model = opened(file)
    assert "hf_quantizer" in model.__dict__, "transformers marks it"
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "theirs")
    host = sparsify.compile(model, Plan(RULES), progress=False)
    ids = tiny.tokens(3, 7) % VOCABULARY
    losses = tiny.train(host, steps=3, input_ids=ids)
    assert losses[-1] < losses[0]
    want = tiny.output_of(host(ids))
    host.sparsify.save_adapter(tmp_path / "adapter")
    for number, saved in enumerate((host, host.sparsify.plain())):
        saved.save_pretrained(tmp_path / str(number))
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        torch.testing.assert_close(tiny.output_of(again(ids)), want, rtol=2e-5, atol=2e-5)
        assert getattr(again.config, "quantization_config", None) is None
    assert model.config.quantization_config is not None, "the user's model is not written to"
    assert "hf_quantizer" in model.__dict__
    served = sparsify.load(opened(file), tmp_path / "adapter")
    torch.testing.assert_close(tiny.output_of(served(ids)), want, rtol=2e-5, atol=2e-5)
    host.sparsify.restore().save_pretrained(tmp_path / "base")


@pytest.mark.parametrize("words", [["plan"], ["generate", "--prompt", "x"]])
@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_commands_say_what_to_do_with_one(file, words, inside):
    given = str(file.parent if inside else file)
    found = typer.testing.CliRunner().invoke(app, [words[0], given, *words[1:]])
    assert found.exit_code == 2, found.output
    assert "a GGUF file, not a folder of a model" in found.output
    assert "gguf_file='small.gguf'" in found.output
