"""What was replaced after compile is noticed by every verb, and what no part touches may be replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from sparsify import S2FT, LoRA, PaCA, RoSA, SparsifyError

HEADS = LoRA(match="*", rank=2, exclude=())


def build(*rules: Any, train: tuple[str, ...] = ()) -> Any:
    host = tiny.lower(tiny.llama(), *rules, train=train)
    tiny.disturb(host)
    return host


def verbs(h: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "report": lambda: h.report,
        "count_parameters": h.count_parameters,
        "current": h.current,
        "save_adapter": lambda: h.save_adapter(folder),
        "load_adapter": lambda: h.load_adapter(folder, "a"),
        "set_adapter": lambda: h.set_adapter(None),
        "merge": h.merge,
        "restore": h.restore,
        "plain": h.plain,
        "original_state_dict": h.original_state_dict,
        "save_sparse": lambda: h.save_sparse(folder / "sparse"),
        "export_lora": lambda: h.export_lora(folder),
        "remove_adapter": lambda: h.remove_adapter("default"),
        "param_groups": lambda: h.param_groups(1e-3, 1e-3),
    }


def grow(host: Any) -> None:
    host.resize_token_embeddings(70, mean_resizing=False)


def new_head(host: Any) -> None:
    host.lm_head = nn.Linear(host.config.hidden_size, 10, bias=False)


def new_up(host: Any) -> None:
    host.model.layers[1].mlp.up_proj = nn.Linear(*reversed(host.model.layers[1].mlp.up_proj.weight.shape), bias=False)


def no_down(host: Any) -> None:
    del host.model.layers[0].mlp.down_proj


def other_tool(host: Any) -> None:
    class Packed(torch.Tensor):
        pass

    weight = host.model.layers[0].mlp.down_proj.weight
    host.model.layers[0].mlp.down_proj.weight = nn.Parameter(weight.detach().as_subclass(Packed), requires_grad=False)


def smaller(host: Any) -> None:
    host.model.layers[0].self_attn.q_proj.weight.data = torch.zeros(4, 4)


def rebuilt_class(host: Any) -> None:
    host.model.layers[0].self_attn.q_proj.__class__ = nn.Linear


CASES: dict[str, tuple[tuple[Any, ...], tuple[str, ...], Callable[[Any], None], str]] = {
    "vocabulary, head adapted": ((HEADS,), (), grow, "lm_head was a SparseLowRankLinear .* is another Linear now"),
    "vocabulary, embeddings train": (
        (LoRA(rank=2),),
        ("model.embed_tokens",),
        grow,
        r"embed_tokens.weight was \(\d+, \d+\)",
    ),
    "new head, old one trains": ((LoRA(rank=2),), ("lm_head",), new_head, "lm_head was a Linear"),
    "reordered module": ((S2FT(structure="ffn", units=4),), (), new_up, "layers.1.mlp.up_proj was a Linear"),
    "deleted module": ((PaCA(rank=2),), (), no_down, "layers.0.mlp.down_proj was a PartialLinear .* is gone"),
    "another tool's tensor": ((PaCA(rank=2),), (), other_tool, "down_proj.weight is a Packed now, another tool's"),
    "another shape": (
        (RoSA(rank=1, density=0.02, mask="random"),),
        (),
        smaller,
        r"q_proj.weight was .* is \(4, 4\) now",
    ),
    "another class": ((LoRA(rank=2),), (), rebuilt_class, "q_proj was changed from SparseLowRankLinear to Linear"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_every_verb_notices_and_says_what_to_do(case: str, tmp_path: Path) -> None:
    rules, train, change, message = CASES[case]
    host = build(*rules, train=train)
    change(host)
    for verb, call in verbs(host.sparsify, tmp_path).items():
        with pytest.raises(SparsifyError, match=message) as caught:
            call()
        assert str(caught.value).startswith(f"{verb}: "), verb
        assert "Put the old one back; or make the change first" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_old_module_put_back_works_again() -> None:
    host = build(HEADS)
    expected, old = host(tiny.tokens()).logits, host.lm_head
    new_head(host)
    with pytest.raises(SparsifyError, match="lm_head"):
        host.sparsify.set_adapter(None)
    host.lm_head = old
    host.sparsify.set_adapter(None)
    host.sparsify.set_adapter("default")
    assert torch.equal(host(tiny.tokens()).logits, expected)


def test_what_no_part_touches_may_be_replaced(tmp_path: Path) -> None:
    base = tiny.llama()
    host = build(LoRA(match="*q_proj", rank=2), S2FT(structure="ffn", units=4))
    grow(host)
    new_head(host)
    host.model.norm.weight = nn.Parameter(host.model.norm.weight * 2)
    expected = host(tiny.tokens()).logits
    assert expected.shape[-1] == 10
    str(host.sparsify.report)
    host.sparsify.save_adapter(tmp_path)
    host.sparsify.load_adapter(tmp_path, "a")
    host.sparsify.set_adapter("a")
    assert torch.equal(host(tiny.tokens()).logits, expected)
    torch.testing.assert_close(host.sparsify.plain()(tiny.tokens()).logits, expected, atol=1e-5, rtol=1e-4)
    host.sparsify.merge()
    host.sparsify.unmerge()
    restored = host.sparsify.restore()
    for name, parameter in base.model.layers.named_parameters():
        assert torch.equal(restored.model.layers.get_parameter(name), parameter), name


def test_other_objects_of_the_same_tensors_are_not_a_replacement() -> None:
    host = build(S2FT(structure="ffn", units=4), LoRA(match="*q_proj", rank=2))
    expected = host(tiny.tokens()).logits
    host.load_state_dict({n: t.clone() for n, t in host.state_dict().items()}, assign=True)
    host.to(torch.float64).to(torch.float32)
    host.tie_weights()
    clone = copy.deepcopy(host)
    clone.model.layers[0] = torch.compile(clone.model.layers[0], backend="eager")
    for one in (host, clone):
        str(one.sparsify.report)
        one.sparsify.set_adapter(None)
        one.sparsify.set_adapter("default")
        torch.testing.assert_close(one(tiny.tokens()).logits, expected, atol=1e-6, rtol=1e-5)
