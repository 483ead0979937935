"""Rows of embeddings and heads: new tokens train, everything else stays, whatever is tied to what."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers as hf
from torch import nn

import sparsify
from sparsify import LoRA, Plan, PlanError, RefusedError, Tokens
from sparsify.train import param_groups

IDS = [3, 9, 20]


def small(tied: bool, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return tiny.perturb(tiny.llama(num_hidden_layers=1, tie_word_embeddings=tied, **changes)).to(dtype)


def dense_gradients(model: nn.Module, names: list[str], **inputs: Any) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(model)
    tiny.probe_loss(twin(**inputs)).backward()
    return {name: twin.get_parameter(name).grad for name in names}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_get_the_masked_dense_gradient(tied):
    model, inputs = small(tied), {"input_ids": tiny.tokens()}
    host = sparsify.compile(model, Plan([Tokens(IDS)]), progress=False)
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    trained = {n for n, p in host.named_parameters() if p.requires_grad}
    assert trained == {name.replace(".weight", ".weight_slice") for name in names}, (
        "one tensor that is tied trains once"
    )
    tiny.probe_loss(host(**inputs)).backward()
    want = dense_gradients(model, names, **inputs)
    for name in names:
        found = host.get_parameter(name.replace(".weight", ".weight_slice")).grad
        torch.testing.assert_close(found, want[name][IDS], rtol=1e-10, atol=1e-12)
        assert host.get_parameter(name).grad is None


def test_new_tokens_train_and_the_model_opens_with_them(tmp_path):
    """The way of a user: the vocabulary grows, the last rows train, the whole model is saved and opened plainly."""
    model = small(True, torch.float32)
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(old + 2, mean_resizing=False)
    host = sparsify.compile(model, Plan([Tokens(new=2), LoRA(rank=2, match="q_proj")]), progress=False)
    ids = torch.tensor([[4, old, 7, old + 1], [old, old, 5, 6]])
    tiny.train(host, steps=3, input_ids=ids)
    host.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    assert opened.lm_head.weight is opened.get_input_embeddings().weight
    torch.testing.assert_close(tiny.output_of(opened(ids)), tiny.output_of(host(ids)), rtol=2e-5, atol=2e-5)
    before, after = model.get_input_embeddings().weight, opened.get_input_embeddings().weight
    assert torch.equal(before[:old], after[:old])
    assert not torch.equal(before[old:], after[old:])


def test_one_rate_of_decay_and_one_count(tmp_path):
    host = sparsify.compile(small(True), Plan([Tokens(IDS)]), progress=False)
    width = host.config.hidden_size
    assert host.sparsify.count_parameters()[0] == len(IDS) * width
    groups = param_groups(host, lr=1.0, weight_decay=0.5)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [("values", 0.0, 1)]
    assert "model.embed_tokens.weight: 3 of its rows: tokens 3, 9, 20" in str(host.sparsify.report)


def test_an_embedding_that_scales_what_it_looks_up_keeps_its_forward():
    """Gemma 3 multiplies by √d in a class of its own; BART likewise."""
    config = hf.Gemma3TextConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tiny.perturb(hf.Gemma3ForCausalLM(config)).double().eval()
    inputs = {"input_ids": torch.randint(1, 31, (2, 5))}
    host = sparsify.compile(model, Plan([Tokens(IDS)], check="numeric"), progress=False)
    tiny.probe_loss(host(**inputs)).backward()
    name = "model.embed_tokens.weight"
    want = dense_gradients(model, [name], **inputs)[name][IDS]
    torch.testing.assert_close(host.get_parameter("model.embed_tokens.weight_slice").grad, want, rtol=1e-9, atol=1e-11)
    assert isinstance(host.model.embed_tokens, type(model.model.embed_tokens))
    assert torch.equal(tiny.output_of(copy.deepcopy(host)(**inputs)), tiny.output_of(host(**inputs)))
    assert type(host.sparsify.restore().model.embed_tokens) is type(model.model.embed_tokens)


def test_an_encoder_decoder_shares_one_block_among_all_that_is_tied():
    config = hf.T5Config(
        vocab_size=31,
        d_model=16,
        d_kv=8,
        d_ff=20,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(config).eval()
    host = sparsify.compile(model, Plan([Tokens(IDS)]), progress=False)
    blocks = {id(m.weight_slice) for m in host.modules() if isinstance(getattr(m, "weight_slice", None), nn.Parameter)}
    shared = {id(host.get_input_embeddings().weight), id(host.get_output_embeddings().weight)}
    assert len(blocks) == len(shared)


class Bag(nn.Module):
    """Plain modules; the padding is a row like others."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, **options)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x).mean(-2))


def test_a_plain_model_with_padding():
    torch.manual_seed(0)
    model, x = Bag(padding_idx=2).double(), torch.tensor([[1, 2, 3], [2, 5, 2]])
    host = sparsify.compile(model, Plan([Tokens([1, 2, 5])]), example=x, progress=False)
    tiny.probe_loss(host(x)).backward()
    want = dense_gradients_of(model, x)[[1, 2, 5]]
    assert not bool(want[1].any())
    torch.testing.assert_close(host.words.weight_slice.grad, want, rtol=1e-12, atol=1e-14)


def dense_gradients_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(model)
    tiny.probe_loss(twin(x)).backward()
    return twin.words.weight.grad


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Bag(max_norm=1.0), "max_norm rescales"),
        (lambda: Bag(scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
)
def test_an_embedding_that_does_more_is_declined(make, words):
    with pytest.raises(RefusedError, match=words):
        sparsify.compile(make(), Plan([Tokens([1], match="words")]), example=torch.tensor([[1, 2]]), progress=False)


def test_rules_that_say_too_little_or_too_much():
    for fields, words in (
        ({}, "give either ids"), ({"ids": [1], "new": 1}, "give either ids"), ({"ids": [-1]}, "is no token"), ({"ids": [1, 1]}, "twice"),
        ({"new": 0}, "a number of rows"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=words):
            Tokens(**fields)
    assert Tokens(range(3, 5)).ids == (3, 4)
    assert Tokens(trainable_token_indices=[7]).ids == (7,)
    model = small(True)
    with pytest.raises(PlanError, match="beyond the .* rows of model.embed_tokens; call resize_token_embeddings"):
        sparsify.compile(model, Plan([Tokens([10_000])]), progress=False)
    with pytest.raises(PlanError, match="matches no embedding and no head"):
        sparsify.compile(model, Plan([Tokens([1], match="*.embed_positions")]), progress=False)
    with pytest.raises(PlanError, match="it trains in full"):
        sparsify.compile(model, Plan([Tokens([1])], train=["lm_head"], seed=1), progress=False)


class Rows(torch.utils.data.Dataset):
    """Eight rows of tokens; labels are the tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = tiny.tokens(8, 8)[i]
        return {"input_ids": x, "labels": x}


def with_trainer(folder: Any, resume: Any = None) -> Any:
    host = sparsify.compile(small(True, torch.bfloat16), Plan([Tokens(IDS), LoRA(rank=2)]), progress=False)
    args = hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = hf.Trainer(model=host, args=args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return host


def test_rows_over_a_16_bit_tied_model_resume_exactly(tmp_path):
    host = with_trainer(tmp_path / "one")
    again = with_trainer(tmp_path / "two", tmp_path / "one" / "checkpoint-2")
    assert host.model.embed_tokens.weight_slice.dtype == torch.float32
    tiny.assert_same(*({n: p.detach() for n, p in h.named_parameters() if p.requires_grad} for h in (again, host)))
    assert again.lm_head.weight_slice is again.model.embed_tokens.weight_slice


# --- PEFT ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside LoRA", "alone"])
def test_a_peft_folder_computes_the_same_and_comes_back(tied, beside, tmp_path):
    model = small(tied, torch.float32)
    rules = [Tokens(IDS, match="*.embed_tokens")] + ([LoRA(rank=2, alpha=2, match="q_proj")] if beside else [])
    host = sparsify.compile(model, Plan(rules), progress=False)
    tiny.disturb(host, 0.2)
    host.sparsify.export_lora(tmp_path)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind == ("LORA" if beside else "TRAINABLE_TOKENS")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    inputs = {"input_ids": tiny.tokens()}
    torch.testing.assert_close(tiny.output_of(theirs(**inputs)), tiny.output_of(host(**inputs)), rtol=2e-5, atol=2e-5)
    want = tiny.output_of(host(**inputs))
    for other in (sparsify.load(model, tmp_path), sparsify.compile(model, Plan(rules), progress=False)):
        other.sparsify.load_adapter(tmp_path, "a")
        assert other.sparsify.set_adapter("a").trainable == (not other.sparsify.serving)
        torch.testing.assert_close(tiny.output_of(other(**inputs)), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_peft_trained_is_read(tied, tmp_path):
    model = small(tied, torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[9, 3, 20])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    tiny.disturb(theirs, 0.2)
    theirs.save_pretrained(tmp_path)
    inputs = {"input_ids": tiny.tokens()}
    found = sparsify.load(model, tmp_path)
    torch.testing.assert_close(
        tiny.output_of(found(**inputs)), tiny.output_of(theirs.eval()(**inputs)), rtol=2e-5, atol=2e-5
    )


def test_a_head_with_a_bias_is_not_exported(tmp_path):
    """PEFT leaves the bias of a head out whose rows it trains."""
    model = tiny.build("BERT (classifier)")
    config = hf.BertConfig(**{k: getattr(model.config, k) for k in ("vocab_size", "hidden_size", "intermediate_size")},
                           num_hidden_layers=1, num_attention_heads=model.config.num_attention_heads)  # fmt: skip
    torch.manual_seed(0)
    masked = hf.BertForMaskedLM(config).eval()
    host = sparsify.compile(masked, Plan([Tokens(IDS)]), progress=False)
    tiny.disturb(host)
    with pytest.raises(sparsify.AdapterError, match="has a bias, which PEFT leaves out"):
        host.sparsify.export_lora(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path):
    model = small(True, torch.float32)
    host = sparsify.compile(model, Plan([Tokens(IDS), LoRA(rank=2, match="q_proj")]), progress=False)
    host.sparsify.export_lora(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for tokens, words in (
        ([3, 3, 9], "a list of tokens"),
        ([3], "for tokens up to 3"),
        ({"embed_tokens": [3, 9, 10_000]}, "tokens up to"),
    ):
        path.write_text(json.dumps(config | {"trainable_token_indices": tokens}))
        with pytest.raises(sparsify.AdapterError, match=words):
            sparsify.load(model, tmp_path)
    path.write_text(json.dumps(config | {"trainable_token_indices": {"embed_tokens": [3, 9, 20], "lm_head": [1]}}))
    with pytest.raises(sparsify.AdapterError, match="names rows of lm_head, and the file has none"):
        sparsify.load(model, tmp_path)
