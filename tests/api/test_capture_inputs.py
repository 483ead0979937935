"""What a trace takes and returns: examples of any form, parameters of any dtype, outputs of any class, models with pictures."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, CaptureError, LoRA, Plan, Prune
from sparsify.program.capture import capture, dummy_inputs, example_inputs

pytestmark = pytest.mark.fresh_trace


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def run(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class TakesDict(Ffn):
    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        return {**features, "y": self.run(features["x"])}


class KeywordsOnly(Ffn):
    def forward(
        self, *, x: Tensor, scale: float = 1.0, mode: str = "a", flag: bool = True, none: None = None
    ) -> Tensor:
        y = self.run(x) * scale
        return y + 1 if mode == "b" and flag and none is None else y


class AnyKeywords(Ffn):
    def forward(self, **batch) -> Tensor:
        return self.run(batch["x"])


class Nested(Ffn):
    def forward(self, batch, *rest: Tensor) -> tuple:
        return self.run(batch["a"][0]), [self.run(batch["b"][1][1])], rest


def test_a_dict_is_keywords_or_the_one_positional_input():
    x = torch.randn(2, 8)
    for example in ({"x": x}, ({"x": x},), [{"x": x}], OrderedDict(x=x), hf.BatchEncoding({"x": x})):
        program = sparsify.analyse(TakesDict(), example)
        assert [s.kind for s in program.structures] == ["ffn"]
        assert program.example == (({"x": x},), {})
    assert sparsify.analyse(AnyKeywords(), {"x": x}).example[0] == ()


def test_keyword_only_inputs_and_values_that_are_no_tensors():
    x = torch.randn(2, 8)
    model = KeywordsOnly()
    batch = {"x": x, "scale": 2.0, "mode": "b", "flag": True, "none": None}
    program = capture(model, batch)
    torch.testing.assert_close(program(**batch), model(**batch))
    host = sparsify.compile(model, Plan([S2FT(fraction=0.3)], check="numeric"), example=batch, progress=False)
    torch.testing.assert_close(host(**batch), model(**batch))
    with pytest.raises(
        CaptureError, match=r"^example: KeywordsOnly\.forward\(\*, x: .* cannot be called with it: .*; pass keyword"
    ):
        capture(model, (x,))
    with pytest.raises(
        CaptureError, match="missing a required argument: 'x'|missing a required keyword-only argument: 'x'"
    ):
        capture(model, {"scale": 2.0})


def test_nested_containers():
    model, x = Nested(), torch.randn(2, 8)
    example = ({"a": (x,), "b": [1, (None, x)]}, x, x)
    program = capture(model, example)
    torch.testing.assert_close(program(*example), model(*example))
    assert len(list(program.linears())) == 4


@pytest.mark.parametrize("value", [np.ones((2, 8)), SimpleNamespace(x=1), object()])
def test_inputs_that_no_trace_takes_are_named(value):
    with pytest.raises(CaptureError, match=rf"^example: input 'x' is a {type(value).__name__}; pass tensors, numbers"):
        capture(AnyKeywords(), {"x": value})
    with pytest.raises(CaptureError, match=rf"^example: input 1\['a'\]\[0\] is a {type(value).__name__}"):
        capture(Nested(), ({"a": [value]},))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.int8])
def test_parameters_of_any_dtype(dtype: torch.dtype):
    class Mixed(Ffn):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.ones(8).to(dtype), requires_grad=dtype.is_complex)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x + (self.extra.real if self.extra.is_complex() else self.extra.float()))

    model, x = Mixed(), torch.randn(2, 8)
    for rule in (S2FT(fraction=0.3), LoRA(rank=2), Prune(sparsity=0.5, method="magnitude")):
        host = sparsify.compile(model, Plan([rule]), example=(x,), progress=False)
        host(x).sum().backward()
        assert host.extra.dtype == dtype
        assert host.sparsify.plain().extra.dtype == dtype


# ------------------------------------------------------------------------------------------------------------------ outputs


@dataclass
class Output:
    logits: Tensor
    note: str
    loss: Tensor | None = None


class Odd:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.inner, self.itself = logits, SimpleNamespace(hidden=logits * 2), self


RETURNS = {
    "dataclass": lambda y: Output(y, "a"),
    "object": Odd,
    "namespace": lambda y: SimpleNamespace(logits=y),
    "objects in a list": lambda y: [SimpleNamespace(logits=y), {"a": Output(y, "b")}],
    "cache beside": lambda y: {"logits": y, "cache": hf.DynamicCache()},
    "distribution": lambda y: torch.distributions.Normal(y, torch.ones_like(y), validate_args=False),
    "function beside": lambda y: (y, len),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_outputs_of_classes_that_export_does_not_know(kind: str):
    class Returns(Ffn):
        def forward(self, x: Tensor):
            return RETURNS[kind](self.run(x))

    model, x = Returns(), torch.randn(2, 8)
    host = sparsify.compile(model, Plan([S2FT(fraction=0.3)], check="numeric"), example=(x,), progress=False)
    assert type(host(x)) is type(model(x))
    leaves = torch.utils._pytree.tree_leaves(host.sparsify.program(x))
    assert any(isinstance(t, Tensor) and torch.allclose(t, model.run(x)) for t in leaves)


def test_a_cache_that_only_the_configuration_switches():
    """No `use_cache` argument at all: it is switched off in the trace's configuration, and not in the user's."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.llama()

        def forward(self, tokens: Tensor):
            return self.inner(input_ids=tokens)

    model = Wrapped()
    program = capture(model, (tiny.tokens(),))
    assert model.inner.config.use_cache is True
    out = program(tiny.tokens())
    assert getattr(out, "past_key_values", None) is None


# ----------------------------------------------------------------------------------------------------- failures, one screen


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def test_a_failed_trace_is_one_screen(capfd, caplog):
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), torch.randn(2, 4))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert len(str(caught.value).splitlines()) <= 5
    assert all(len(line) <= 500 for line in str(caught.value).splitlines())
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


# -------------------------------------------------------------------------------------------------------- text and pictures

TEXT = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
}
SIGLIP = {**{k: v for k, v in CLIP.items() if k != "projection_dim"}, "model_type": "siglip_vision_model"}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}


def pictured(count: int) -> Tensor:
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    ids[:, 2 : 2 + count] = 100
    return ids


def llava():
    config = hf.LlavaConfig(
        vision_config=CLIP, text_config=TEXT, image_token_index=100, vision_feature_layer=-1, image_seq_length=4
    )
    batch = {"input_ids": pictured(4), "pixel_values": torch.randn(2, 3, 16, 16)}
    return hf.LlavaForConditionalGeneration(config), batch


def qwen2_vl():
    text = {**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": ROPE}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=100,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    ids = pictured(4)
    batch = {
        "input_ids": ids,
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == 100).long(),
    }
    return hf.Qwen2VLForConditionalGeneration(config), batch


def internvl():
    vision = {**CLIP, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]}
    config = hf.InternVLConfig(vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=100)
    return hf.InternVLForConditionalGeneration(config), {
        "input_ids": pictured(4),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


def paligemma():
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP, text_config=text, image_token_index=100, projection_dim=32, hidden_size=32
    )
    return hf.PaliGemmaForConditionalGeneration(config), {
        "input_ids": pictured(4),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


def blip2():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {
        "model_type": "opt",
        "vocab_size": 128,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    config = hf.Blip2Config(
        vision_config={**small, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        qformer_config={**small, "vocab_size": 128, "num_hidden_layers": 2, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_id=100,
    )
    return hf.Blip2ForConditionalGeneration(config), {
        "input_ids": pictured(4),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


# (model, structures of the text alone, structures of text and pictures or None where pictures cannot be traced)
PICTURES = [(llava, 2, 5), (qwen2_vl, 2, None)]  # pictures can be traced, or cannot
MORE_PICTURES = [(internvl, 2, 5), (paligemma, 2, 6), (blip2, 9, 9)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow, id=case[0].__name__) for case in MORE_PICTURES]


@pytest.mark.parametrize(("build", "alone", "both"), [*(pytest.param(*c, id=c[0].__name__) for c in PICTURES), *SLOW])
def test_models_of_text_and_pictures(build, alone: int, both: int | None):
    torch.manual_seed(0)
    model, batch = build()
    model.eval()
    with torch.no_grad():
        want = model(**batch).logits
    for example, expected in ((None, alone), (batch, both), ({**batch, "use_cache": False}, both)):
        if both is None and example is not None and "use_cache" in example:
            continue
        host = sparsify.compile(model, Plan([S2FT(fraction=0.3)]), example=example, progress=False)
        program = host.sparsify.program
        assert len(program.structures) == (alone if expected is None else expected)
        with torch.no_grad():
            torch.testing.assert_close(host(**batch).logits, want, rtol=1e-4, atol=1e-5)
        said = [str(r) for r in host.sparsify.report.declined if "it was traced on text alone" in str(r)]
        assert bool(said) == (expected is None)
        if said:
            assert "pixel_values" in said[0]
            assert "structures in model.visual are not looked for" in said[0]
            assert "pixel_values" not in program.example[1]
    configs = (model.config, model.config.get_text_config())
    assert all(getattr(c, "use_cache", True) for c in configs), "the user's configuration is as it was"


def test_dummy_text_has_no_placeholders_of_pictures():
    model = llava()[0]
    model.config.image_token_index = model.config.image_token_id = 5
    kwargs = dummy_inputs(model)
    assert set(kwargs) == {"input_ids"}
    assert not (kwargs["input_ids"] == 5).any()
    assert example_inputs(model, None)[1]["use_cache"] is False


def test_where_neither_can_be_traced_the_error_offers_text_alone(monkeypatch):
    model, batch = llava()
    monkeypatch.setattr(
        type(model.model.language_model.layers[0]), "forward", lambda self, h, *a, **k: h if h.sum() > 0 else -h
    )
    with pytest.raises(
        CaptureError, match=r"try: an example of text alone, without pixel_values: the language model is found"
    ):
        capture(model, batch)


# ---------------------------------------------------------------------------------------------------------------- wrappers


class ReadOnly(nn.Sequential):
    """As SentenceTransformer: a Sequential that takes a dict and shows what is in it by properties without setters."""

    @property
    def _keys_to_ignore_on_save(self):
        return self[0].inner._keys_to_ignore_on_save

    @property
    def config(self):
        return self[0].inner.config

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        for module in self:
            features = module(features)
        return features


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = hf.BertConfig(
            vocab_size=64, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=80
        )
        self.inner = hf.BertModel(config)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "tokens": self.inner(**features)[0]}


class Mean(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "embedding": features["tokens"].mean(1)}


@pytest.mark.parametrize(
    "rule", [S2FT(fraction=0.2, budget="structure"), LoRA(rank=4), Prune(sparsity=0.5, method="magnitude")]
)
def test_wrappers_with_read_only_attributes(rule, tmp_path):
    model = ReadOnly(Encoder(), Mean()).eval()
    features = {"input_ids": torch.randint(3, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    want = model(features)["embedding"]
    for example in ((features,), features):
        host = sparsify.compile(model, Plan([rule]), example=example, progress=False)
        if not isinstance(rule, Prune):
            torch.testing.assert_close(host(features)["embedding"], want)
        plain = host.sparsify.plain()
        torch.testing.assert_close(plain(features)["embedding"], host(features)["embedding"])
    plain[0].inner.save_pretrained(tmp_path)
    assert not plain[0].inner._keys_to_ignore_on_save
    back = hf.BertModel.from_pretrained(tmp_path)
    assert set(back.state_dict()) == set(model[0].inner.state_dict())
    if not isinstance(rule, Prune):
        assert host.sparsify.restore() is host
