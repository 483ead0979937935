"""One linear that a rule cannot serve is declined with its reason, and the rest is served; heads and tied weights stay as they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import itertools

import tiny

import sparsify
from sparsify import LoRA, PaCA, Plan, PlanError, Prune, Quantize, RefusedError, RoSA
from sparsify.model.task_heads import head_parameters, output_parameters

pytest.importorskip("bitsandbytes")
WIDTHS = (4, 64, 6, 48)


def net() -> nn.Sequential:
    """Linears of 4, 64 and 6 inputs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for m, n in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(m, n), nn.GELU()]
    return nn.Sequential(*layers[:-1]).eval()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


def compiled(*rules: Any, model: nn.Module | None = None, example: Any = None, **options: Any) -> Any:
    example = (X,) if example is None else example
    return sparsify.compile(
        net() if model is None else model, Plan(list(rules)), example=example, progress=False, **options
    )


def reasons(host: Any) -> dict[str, str]:
    return {r.where.removesuffix(".weight"): r.reason for r in host.sparsify.program.refusals}


def served(host: Any) -> set[str]:
    program = host.sparsify.program
    names = {s.param for s in program.slices} | {p.param for p in program.lowranks}
    return {n.removesuffix(".weight") for n in names | set(program.masks) | set(program.quantize)}


BIG, SMALL = 1e6, 1e-9


def with_weight(place: int, value: float) -> nn.Sequential:
    model = net()
    with torch.no_grad():
        model[place].weight[1] = value
    return model


CASES = {
    "PaCA": (
        (PaCA(rank=16),),
        None,
        {"2"},
        {"0": "rank 16 for 0, which has 4 input columns", "4": "which has 6 input"},
    ),
    "PaCA table": ((PaCA(rank={"4": 6, "*": 2}),), None, {"0", "2"}, {"4": "rank 6 for 4, which has 6 input columns"}),
    "LoRA": (
        (LoRA(rank={"4": 300, "*": 64}),),
        None,
        {"0", "2"},
        {"4": "rank 300 is more than the larger side of its weight, 48"},
    ),
    "RoSA": (
        (RoSA(rank={"0": 0, "*": 2}, density={"0": 0.0, "*": 0.1}, mask="random"),),
        None,
        {"2", "4"},
        {"0": "rank 0 and density 0 leave nothing to train"},
    ),
    "Prune N:M": (
        (Prune(pattern="2:4", method="magnitude"),),
        None,
        {"0", "2"},
        {"4": "groups of 4 inputs, but the layer has 6"},
    ),
    "Prune blocks": (
        (Prune(pattern="4x4", method="magnitude"),),
        None,
        {"0"},
        {"2": "do not tile a layer with 6 outputs", "4": "do not tile a layer with 6 inputs"},
    ),
    "int8, large": (
        (Quantize("int8"), LoRA(rank=2)),
        (2, BIG),
        None,
        {"2": "largest entry, 1e+06, lies beyond the scales"},
    ),
    "int8, small": ((Quantize("int8"), LoRA(rank=2)), (2, SMALL), None, {"2": "a row has no entry above 6e-05"}),
    "nf4, NaN": ((Quantize("nf4"), LoRA(rank=2)), (2, float("nan")), None, {"2": "the weight has NaN or Inf"}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_linear_that_does_not_fit_is_declined_alone(name: str) -> None:
    rules, weight, expected, words = CASES[name]
    model = net() if weight is None else with_weight(*weight)
    host = compiled(*rules, model=model)
    found = reasons(host)
    assert set(found) == set(words)
    for where, text in words.items():
        assert text in found[where]
        assert text in str(host.sparsify.report)
    if expected is not None:
        assert served(host) == expected
    else:  # what is not packed still trains, and is not packed
        assert set(host.sparsify.program.quantize) == {"0.weight", "4.weight"}
        assert served(host) == {"0", "2", "4"}


@pytest.mark.parametrize(
    "rule",
    [
        PaCA(match="4", rank=16),
        LoRA(match="4", rank=300),
        Prune(match="4", pattern="2:4", method="magnitude"),
        Prune(match="4", pattern="4x4", method="magnitude"),
    ],
    ids=str,
)
def test_a_linear_named_without_wildcards_is_refused_loudly(rule: Any) -> None:
    with pytest.raises(RefusedError, match=r"rule 0, .*: 4"):
        compiled(rule)


@pytest.mark.parametrize(
    "rule",
    [PaCA(rank=64), LoRA(rank=300), Prune(pattern="3:7", method="magnitude"), Prune(pattern="5x5", method="magnitude")],
    ids=str,
)
def test_a_rule_with_nothing_left_is_an_error_with_the_reasons(rule: Any) -> None:
    with pytest.raises(PlanError, match=r"serves nothing: .*(input columns|larger side|groups of 7|do not tile)"):
        compiled(rule)


def test_formats_hold_what_is_at_their_edges() -> None:
    """Near misses of the cases above."""
    for model in (with_weight(2, 6e4), with_weight(2, 1e-4), with_weight(2, 0.0)):
        host = compiled(Quantize("int8"), LoRA(rank=2), model=model)
        assert len(host.sparsify.program.quantize) == 3
        assert not reasons(host)
        assert torch.isfinite(host(X)).all()
    assert served(compiled(PaCA(rank=3))) == served(compiled(LoRA(rank=48))) == {"0", "2", "4"}


class Table(nn.Module):
    """A matrix that is looked up in and multiplied with; an encoder whose decoder is its transpose; one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 16))
        self.encoder, self.free = nn.Linear(16, 32), nn.Linear(16, 16)
        self.first = nn.Linear(16, 16)
        self.second = self.first

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.embedding(ids, self.table)
        x = nn.functional.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())
        x = self.second(torch.relu(self.first(x))) + self.free(x)
        return x @ self.table.t()


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    "method",
    ["magnitude", "sparsegpt", *(pytest.param(m, marks=pytest.mark.slow) for m in ("wanda", "random"))],
)
def test_prune_leaves_tied_weights_alone(method: Any) -> None:
    torch.manual_seed(0)
    host = compiled(Prune(sparsity=0.5, method=method), model=Table(), example=(IDS,), calibration=[(IDS,)] * 2)
    assert served(host) == {"free"}
    found = reasons(host)
    assert "also read by node embedding" in found["table"]
    assert "tied to its own transpose" in found["encoder"]
    assert "tied (first.weight, second.weight), and a tied weight cannot train under a mask" in found["first"]
    host(IDS).sum().backward()
    for name in ("table", "encoder", "first"):
        with pytest.raises(RefusedError):
            compiled(Prune(match=name, sparsity=0.5, method="magnitude"), model=Table(), example=(IDS,))


@pytest.mark.parametrize("rule", [PaCA(rank=2), LoRA(rank=2), RoSA(rank=2, density=0.1, mask="random")], ids=str)
def test_training_rules_name_what_they_leave_alone(rule: Any) -> None:
    torch.manual_seed(0)
    host = compiled(rule, model=Table(), example=(IDS,))
    assert {"free"} <= served(host)
    assert not {"table", "encoder"} & served(host)
    assert "also read by node embedding" in reasons(host)["table"]
    assert "encoder" in reasons(host)


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = {"vocab_size": 50, "max_position_embeddings": 20, **SIZES}
BART = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
}  # fmt: skip
SPEECH = {
    **SIZES,
    "vocab_size": 50,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4,
}
T5 = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 1,
    "num_heads": 4,
    "tie_word_embeddings": False,
}
HEADS: dict[str, tuple[Any, set[str]]] = {
    "BERT, classes": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), {"classifier"}),
    "BERT, tokens": (lambda: hf.BertForTokenClassification(hf.BertConfig(**TEXT)), {"classifier"}),
    "BERT, questions": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**TEXT)), {"qa_outputs"}),
    "BERT, masked": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT, tie_word_embeddings=False)),
        {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    ),
    "RoBERTa": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
        {"classifier.dense", "classifier.out_proj"},
    ),
    "Llama, classes": (lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, pad_token_id=0)), {"score"}),
    "Llama": (lambda: tiny.llama(), {"lm_head"}),
    "GPT-NeoX": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)), {"lm_head"}),
    "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)), {"classifier"}),
    "T5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), {"lm_head"}),
    "Whisper": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**BART, num_mel_bins=8, pad_token_id=0)),
        {"proj_out"},
    ),
    "Wav2Vec2, CTC": (lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SPEECH, num_feat_extract_layers=2)), {"lm_head"}),
    "BART, classes": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)),
        {"classification_head.dense", "classification_head.out_proj"},
    ),
    "inside of a wrapper": (
        lambda: nn.Sequential(hf.BertForSequenceClassification(hf.BertConfig(**TEXT))),
        {"0.classifier"},
    ),
    "plain": (net, set()),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found_in_every_family(name: str) -> None:
    build, expected = HEADS[name]
    model = build()
    heads = head_parameters(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n in linears if f"{n}.weight" in heads} == expected
    assert {n.rpartition(".")[0] for n in output_parameters(model)} <= expected | {"model.embed_tokens"} | {
        n.rpartition(".")[0] for n in heads
    }


def test_the_head_stays_dense_and_in_full_precision() -> None:
    model = tiny.build("BERT (classifier)")
    example = tiny.inputs_of(model, "BERT (classifier)")
    pruned = compiled(Prune(sparsity=0.5, method="magnitude"), model=model, example=example)
    packed = compiled(Quantize("int8"), LoRA(rank=2), model=model, example=example)
    for host in (pruned, packed):
        assert "the output head" in reasons(host)["classifier"]
    assert "classifier.weight" not in pruned.sparsify.program.masks
    assert "classifier.weight" not in packed.sparsify.program.quantize
    assert "classifier" in served(packed), "LoRA trains it as before"
    named = compiled(Prune(match="classifier", sparsity=0.5, method="magnitude"), model=model, example=example)
    assert set(named.sparsify.program.masks) == {"classifier.weight"}
    named = compiled(Quantize("int8", match="classifier"), LoRA(rank=2), model=model, example=example)
    assert set(named.sparsify.program.quantize) == {"classifier.weight"}


def test_adapters_leave_the_output_projection_alone_unless_it_is_named() -> None:
    model = tiny.llama(num_hidden_layers=1)
    assert "lm_head" not in served(compiled(LoRA(rank=2), model=model, example={"input_ids": tiny.tokens()}))
    for rule in (LoRA(match="lm_head", rank=2), LoRA(rank=2, exclude=())):
        assert "lm_head" in served(compiled(rule, model=model, example={"input_ids": tiny.tokens()}))
    with pytest.raises(PlanError, match="matches no linear|serves nothing"):
        compiled(LoRA(match="lm_head", rank=2, exclude=("lm_*",)), model=model, example={"input_ids": tiny.tokens()})


def test_too_little_calibration_is_said_with_numbers() -> None:
    batches = [(X,), (X * 2,)]
    with pytest.warns(UserWarning, match="calibration tokens") as caught:
        host = compiled(Prune(sparsity=0.5), calibration=batches)
    texts = [str(w.message) for w in caught if "calibration tokens" in str(w.message)]
    assert len(texts) == 1
    assert "1 of 3 weights were pruned with fewer calibration tokens than inputs; the worst is 2.weight" in texts[0]
    assert "10 tokens for a Hessian 64 wide" in texts[0]
    assert "Give at least 64 tokens, better 512" in texts[0]
    notes = {s.name: s.note for s in host.sparsify.program.pruned}
    assert notes == {"0.weight": "", "2.weight": "only 10 calibration tokens for 64 inputs", "4.weight": ""}
    assert "only 10 calibration tokens for 64 inputs" in str(host.sparsify.report)
    assert torch.isfinite(host(X)).all()  # the damping holds a Hessian of rank 10
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Prune(sparsity=0.5), calibration=[(torch.randn(80, 4),)])
        compiled(Prune(sparsity=0.5, method="wanda"), calibration=batches)


def test_more_zeros_ask_for_more_calibration() -> None:
    """64 inputs: 80 tokens are enough for half, and not for three quarters of the weights (three zeros per survivor)."""
    tokens = [(torch.randn(80, 4),)]
    with pytest.warns(UserWarning, match="on few calibration tokens") as caught:
        host = compiled(Prune(sparsity=0.75), calibration=tokens)
    (text,) = [str(w.message) for w in caught if "calibration tokens" in str(w.message)]
    assert (
        "1 of 3 weights lost more than half of their entries on few calibration tokens; the worst is 2.weight" in text
    )
    assert "80 tokens for 64 inputs" in text
    assert "Give 512 tokens or more" in text
    assert "only 80 calibration tokens for 64 inputs" in str(host.sparsify.report)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Prune(sparsity=0.75), calibration=[(torch.randn(200, 4),)])
