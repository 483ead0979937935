"""LoRA of embeddings: what names them, what declines them, and PEFT's form of it both ways."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import tiny
import torch

import sparsify
from sparsify import AdapterError, LoRA, PaCA, Plan, RefusedError, RoSA


def small(tied: bool = False) -> Any:
    return tiny.perturb(tiny.llama(num_hidden_layers=1, tie_word_embeddings=tied))


def trained(rule: Any, model: Any) -> set[str]:
    host = sparsify.compile(model, Plan([rule]), progress=False)
    return {part.owner for part in host.sparsify.program.parts}


def test_an_embedding_trains_where_a_pattern_speaks_of_it():
    model = small()
    assert "model.embed_tokens" in trained(LoRA(2, match=["*.embed_tokens", "q_proj"]), model)
    for everything in ("*", "model.*", r"re:model\..*"):
        assert "model.embed_tokens" not in trained(LoRA(2, match=everything), model), everything


def test_what_has_no_form_for_one_is_declined():
    for rule, words in (
        (PaCA(2, match="model.embed_tokens"), r"Tokens\(ids=\[…\]\) trains single ones"),
        (RoSA(rank=2, mask="random", match="model.embed_tokens"), "RoSA has no form for embeddings"),
    ):
        with pytest.raises(RefusedError, match=words):
            sparsify.compile(small(), Plan([rule]), progress=False)
    with pytest.raises(RefusedError, match="also read by node embedding|tied"):
        sparsify.compile(small(tied=True), Plan([LoRA(2, match="model.embed_tokens")]), progress=False)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trained_is_read(rslora, tmp_path):
    model, inputs = small(), {"input_ids": tiny.tokens()}
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=["embed_tokens", "q_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    tiny.disturb(theirs, 0.2)
    theirs.save_pretrained(tmp_path)  # with the whole embedding beside its factors
    want = tiny.output_of(theirs.eval()(**inputs))
    torch.testing.assert_close(tiny.output_of(sparsify.load(model, tmp_path)(**inputs)), want, rtol=2e-5, atol=2e-5)
    rule = LoRA(rank=3, alpha=5, rslora=rslora, match=["embed_tokens", "q_proj"])
    host = sparsify.compile(model, Plan([rule]), progress=False)
    host.sparsify.load_adapter(tmp_path, "a")
    assert host.sparsify.set_adapter("a").trainable, "the same parts, so it goes on training"
    torch.testing.assert_close(tiny.output_of(host(**inputs)), want, rtol=2e-5, atol=2e-5)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data += 0.1
    with pytest.raises(AdapterError, match="was changed as a whole .* beside its factors"):
        sparsify.load(other, tmp_path)
