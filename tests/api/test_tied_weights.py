"""Tied weights in plain copies and files: tied again where both sides still are equal, else apart, with a config that says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch

import sparsify
from sparsify import Plan, Prune
from sparsify.lowering.cpu.options import CpuOptions
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear, can_prepack
from sparsify.model.tied_weights import different, tied_groups

COPY = CpuOptions(mode="small", tied="copy", tokens=(1,))
T5 = "T5"


def tied_model(name: str) -> Any:
    model = tiny.llama(tie_word_embeddings=True) if name == "Llama" else tiny.build(name)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "the model must be tied"
    return model


def outputs(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return tiny.output_of(model.eval()(**tiny.inputs_of(model, None if name == "Llama" else name)))


def embeddings(model: Any) -> set[int]:
    """Memory of every tensor that transformers ties in this model."""
    names = [
        n
        for n, _ in model.named_parameters(remove_duplicate=False)
        if "embed_tokens" in n or "shared" in n or "lm_head" in n
    ]
    assert len(names) > 1
    return {model.get_parameter(n).data_ptr() for n in names}


pytestmark = pytest.mark.skipif(not can_prepack(torch.zeros(2, 2)), reason="this torch has no oneDNN")


def lowered(model: Any, head: torch.Tensor) -> Any:
    """A host whose head was put into oneDNN's layout, as lowering does where that is faster."""
    plan = Plan([Prune(sparsity=0.5, method="magnitude")], target="cpu")
    host: Any = sparsify.compile(model, plan, progress=False, cpu=COPY)
    host.lm_head = PrepackedLinear(head.detach().clone(), None, transposed=False)
    host.sparsify.anchors.pop("lm_head", None)
    return host


@pytest.mark.parametrize("name", ["Llama", T5])
def test_a_head_that_was_only_rearranged_is_tied_again(name, tmp_path):
    model = tied_model(name)
    host = lowered(model, model.lm_head.weight)
    expected = outputs(host, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = host.sparsify.plain()
    assert len(embeddings(plain)) == 1
    assert plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert len(embeddings(again)) == 1
    for found in (plain, again):
        torch.testing.assert_close(outputs(found, name), expected)


@pytest.mark.parametrize("name", ["Llama", T5])
def test_a_head_with_other_values_is_a_tensor_of_its_own(name, tmp_path):
    model = tied_model(name)
    host = lowered(model, model.lm_head.weight.detach() * 1.5)
    expected = outputs(host, name)
    with pytest.warns(UserWarning, match=r"were one tensor in the model and hold different values now"):
        plain = host.sparsify.plain()
    torch.testing.assert_close(outputs(plain, name), expected)
    assert len(embeddings(plain)) > 1
    assert not plain.config.tie_word_embeddings
    assert host.config.tie_word_embeddings, "the host's config is not written to"
    assert model.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings == (
        name == T5
    )  # T5's config says True whatever its file says; its values differ
    torch.testing.assert_close(outputs(again, name), expected)


def test_groups_and_differences():
    a, b = torch.arange(3.0), torch.arange(3.0)
    groups = tied_groups({"x": "x", "y": "x", "z": "z"})
    assert groups == [["x", "y"]]
    assert different(groups, {"x": a, "y": b}) == []
    assert different(groups, {"x": a}) == []
    assert different(groups, {"x": a, "y": b + 1}) == [["x", "y"]]
