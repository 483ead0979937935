"""Small random models of many families, built from configs without downloads, with what detection should find in them.

Sizes are ragged and pairwise different wherever a family allows it, so that no two axes agree by accident.
`Family.ffn` and `.attention` are the expected numbers of structures, `.declined` the number of refused ones per kind.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from quick_export import quick_export
from torch import nn

VOCABULARY, LAYERS = 53, 2
Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One model family.

    inputs: which example it takes: text, encoder (no cache argument), seq2seq, image, audio, speech, clip.
    ffn, attention: structures found. refused_ffn, refused_attention: declined ones.
    eager, sdpa: whether the attention implementation can be asked for.
    """

    name: str
    model: str
    config: str
    sizes: Mapping[str, Any]
    inputs: str = "text"
    ffn: int = LAYERS
    attention: int = LAYERS
    refused_ffn: int = 0
    refused_attention: int = 0
    implementations: tuple[str, ...] = ("eager", "sdpa")
    named: bool = field(default=True)  # named in the specification (the others test that the analysis generalises)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "max_position_embeddings": 19,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
GROUPED_TIGHT = {**SMALL, "hidden_size": 48, "num_key_value_heads": 2}
MULTI = {**SMALL, "num_attention_heads": 3}
ENCODER = {**MULTI, "type_vocab_size": 2}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 36,
    "n_inner": 44,
    "n_layer": LAYERS,
    "n_head": 3,
    "n_positions": 19,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 36,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 52,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 6,
    "max_position_embeddings": 19,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 28,
    "d_kv": 5,
    "d_ff": 44,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}
VISION = {
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "image_size": 10,
    "patch_size": 5,
}
EXPERTS = {**GROUPED, "moe_intermediate_size": 20, "num_experts_per_tok": 2}

FAMILIES: tuple[Family, ...] = (
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    Family("Mistral", "MistralForCausalLM", "MistralConfig", GROUPED),
    Family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED_TIGHT),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    Family(
        "Gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, "query_pre_attn_scalar": 8},
        implementations=("eager",),
    ),
    Family("Phi-3", "Phi3ForCausalLM", "Phi3Config", GROUPED_TIGHT),
    Family("GPT-2", "GPT2LMHeadModel", "GPT2Config", GPT),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", MULTI),
    Family("OPT", "OPTForCausalLM", "OPTConfig", {**MULTI, "ffn_dim": 44, "word_embed_proj_dim": 36}),
    Family(
        "Bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 36, "n_layer": LAYERS, "n_head": 3},
        attention=0,
        refused_attention=LAYERS,
        implementations=("eager",),
    ),
    Family(
        "MPT",
        "MptForCausalLM",
        "MptConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 36,
            "n_heads": 3,
            "n_layers": LAYERS,
            "expansion_ratio": 2,
            "max_seq_len": 19,
        },
        attention=0,
        refused_attention=LAYERS,
        implementations=("eager",),
    ),
    Family("Falcon (multi-query)", "FalconForCausalLM", "FalconConfig", {**MULTI, "multi_query": True, "alibi": False}),
    Family(
        "Falcon (grouped)",
        "FalconForCausalLM",
        "FalconConfig",
        {**SMALL, "hidden_size": 48, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    ),
    Family("T5", "T5ForConditionalGeneration", "T5Config", T5, "seq2seq", ffn=4, attention=2 + LAYERS),
    Family(
        "T5 (gated)",
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        "seq2seq",
        ffn=4,
        attention=2 + LAYERS,
    ),
    Family("BART", "BartForConditionalGeneration", "BartConfig", BART, "seq2seq", ffn=4, attention=6),
    Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **BART,
            "num_mel_bins": 10,
            "max_source_positions": 11,
            "max_target_positions": 13,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "speech",
        ffn=4,
        attention=6,
    ),
    Family("BERT", "BertForMaskedLM", "BertConfig", ENCODER, "encoder"),
    Family("BERT (classifier)", "BertForSequenceClassification", "BertConfig", ENCODER, "encoder", ffn=3),
    Family(
        "DistilBERT",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 36, "hidden_dim": 44, "n_layers": LAYERS, "n_heads": 3},
        "encoder",
    ),
    Family("MiniLM", "BertModel", "BertConfig", ENCODER, "encoder"),
    Family("ViT", "ViTForImageClassification", "ViTConfig", VISION, "image"),
    Family(
        "CLIP",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**MULTI, "projection_dim": 20},
            "vision_config": {**VISION, "projection_dim": 20},
            "projection_dim": 20,
        },
        "clip",
        ffn=4,
        attention=4,
    ),
    Family(
        "Mixtral", "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}
    ),
    # ---- families that the specification does not name
    Family("GPT-J", "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, named=False, implementations=("eager",)),
    Family(
        "CodeGen",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**GPT, "n_embd": 64, "n_head": 8, "rotary_dim": 4},
        named=False,
        implementations=("eager",),
    ),
    Family("StableLM", "StableLmForCausalLM", "StableLmConfig", GROUPED_TIGHT, named=False),
    Family(
        "StableLM (a norm module per head)",
        "StableLmForCausalLM",
        "StableLmConfig",
        {**GROUPED_TIGHT, "qk_layernorm": True},
        attention=0,
        refused_attention=LAYERS,
        named=False,
    ),
    Family("Cohere", "CohereForCausalLM", "CohereConfig", {**GROUPED_TIGHT, "use_qk_norm": True}, named=False),
    Family("OLMo2", "Olmo2ForCausalLM", "Olmo2Config", GROUPED_TIGHT, named=False),
    Family("Phi", "PhiForCausalLM", "PhiConfig", {**GROUPED_TIGHT, "qk_layernorm": True}, named=False),
    Family("Gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "query_pre_attn_scalar": 8}, named=False),
    Family("Starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED_TIGHT, named=False),
    Family("Nemotron", "NemotronForCausalLM", "NemotronConfig", GROUPED, named=False),
    Family("Persimmon", "PersimmonForCausalLM", "PersimmonConfig", {**MULTI, "qk_layernorm": True}, named=False),
    Family("GPT-BigCode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**GPT, "multi_query": True}, named=False),
    Family(
        "OpenAI GPT", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, "encoder", named=False, implementations=("eager",)
    ),
    Family("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config", GROUPED_TIGHT, named=False),
    Family("GLM", "GlmForCausalLM", "GlmConfig", GROUPED, named=False),
    Family("Granite", "GraniteForCausalLM", "GraniteConfig", GROUPED_TIGHT, named=False),
    Family(
        "GPT-OSS",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **GROUPED,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        named=False,
        implementations=("eager",),
    ),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "hidden_size": 48, "num_experts": 3, "shared_expert_intermediate_size": 28},
        ffn=2 * LAYERS,
        named=False,
    ),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "num_experts": 3}, named=False),
    Family(
        "DeepSeek-V2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            **MULTI,
            "num_key_value_heads": 3,
            "kv_lora_rank": 12,
            "q_lora_rank": 14,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        ffn=3,
        named=False,
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **MULTI,
            "num_key_value_heads": 3,
            "kv_lora_rank": 12,
            "q_lora_rank": 14,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
        ffn=3,
        named=False,
    ),
    Family("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", ENCODER, "encoder", named=False),
    Family("XLM-R", "XLMRobertaForMaskedLM", "XLMRobertaConfig", ENCODER, "encoder", named=False),
    Family(
        "ALBERT",
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**ENCODER, "embedding_size": 20},
        "encoder",
        ffn=1,
        attention=1,
        named=False,
    ),
    Family("ELECTRA", "ElectraForMaskedLM", "ElectraConfig", {**ENCODER, "embedding_size": 20}, "encoder", named=False),
    Family("ESM", "EsmForMaskedLM", "EsmConfig", {**MULTI, "mask_token_id": 3}, "encoder", named=False),
    Family(
        "ModernBERT",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**MULTI, "cls_token_id": 1, "sep_token_id": 2},
        "encoder",
        named=False,
    ),
    Family(
        "DeBERTa-v2",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
        "encoder",
        attention=0,
        refused_attention=LAYERS,
        named=False,
        implementations=("eager",),
    ),
    Family("mBART", "MBartForConditionalGeneration", "MBartConfig", BART, "seq2seq", ffn=4, attention=6, named=False),
    Family(
        "Pegasus", "PegasusForConditionalGeneration", "PegasusConfig", BART, "seq2seq", ffn=4, attention=6, named=False
    ),
    Family("Marian", "MarianMTModel", "MarianConfig", BART, "seq2seq", ffn=4, attention=6, named=False),
    Family(
        "M2M100", "M2M100ForConditionalGeneration", "M2M100Config", BART, "seq2seq", ffn=4, attention=6, named=False
    ),
    Family("DeiT", "DeiTForImageClassification", "DeiTConfig", VISION, "image", named=False),
    Family(
        "BEiT",
        "BeitForImageClassification",
        "BeitConfig",
        {**VISION, "use_relative_position_bias": True},
        "image",
        named=False,
    ),
    Family("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 2}, "image", named=False),
    Family(
        "SigLIP",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**MULTI, "projection_size": 36}, "vision_config": VISION},
        "clip",
        ffn=5,
        attention=5,
        named=False,
    ),
    Family(
        "Swin",
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 12,
            "depths": [2, 2],
            "num_heads": [2, 3],
            "window_size": 4,
            "mlp_ratio": 3,
        },
        "image",
        ffn=4,
        attention=4,
        named=False,
    ),
    Family(
        "SegFormer",
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [12, 20],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 5],
            "mlp_ratios": [3, 2],
        },
        "image",
        named=False,
        implementations=("eager",),
    ),
    Family(
        "ConvNeXt",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [12, 20], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        "image",
        attention=0,
        named=False,
        implementations=("eager",),
    ),
    Family(
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **MULTI,
            "conv_dim": [16, 20],
            "conv_stride": [2, 2],
            "conv_kernel": [3, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        "audio",
        named=False,
    ),
    Family(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 20,
            "num_hidden_layers": LAYERS,
            "state_size": 3,
            "time_step_rank": 4,
        },
        ffn=0,
        attention=0,
        named=False,
        implementations=("eager",),
    ),
)


def build(family: Family, implementation: str = "sdpa", seed: int = 0) -> tuple[nn.Module, Example]:
    """A random model of the family in eval mode, with an example input; the generator stands as after a new one was made."""
    if family not in FAMILIES:
        return make(family, implementation, seed)
    model, inputs, state = built(family.name, implementation, seed)
    torch.set_rng_state(state)
    return copy.deepcopy((model, inputs))


@functools.lru_cache(maxsize=256)
def built(name: str, implementation: str, seed: int) -> tuple[nn.Module, Example, torch.Tensor]:
    family = next(f for f in FAMILIES if f.name == name)
    return (*make(family, implementation, seed), torch.get_rng_state())


def make(family: Family, implementation: str, seed: int) -> tuple[nn.Module, Example]:
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**family.sizes)
    config._attn_implementation = implementation
    model = getattr(transformers, family.model)._from_config(config, attn_implementation=implementation)
    return model.eval(), example(family, model)


def example(family: Family, model: nn.Module) -> Example:
    tokens = torch.randint(3, VOCABULARY, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    image = torch.randn(2, 3, *[family.sizes.get("image_size", 16)] * 2)
    kwargs: dict[str, Any] = {
        "text": {"input_ids": tokens, "use_cache": False},
        "encoder": {"input_ids": tokens, "attention_mask": mask},
        "seq2seq": {
            "input_ids": tokens,
            "attention_mask": mask,
            "decoder_input_ids": tokens[:, :5],
            "use_cache": False,
        },
        "speech": {"input_features": torch.randn(2, 10, 22), "decoder_input_ids": tokens[:, :5], "use_cache": False},
        "image": {"pixel_values": image},
        "audio": {"input_values": torch.randn(2, 90)},
        "clip": {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 10, 10), "attention_mask": mask},
    }[family.inputs]
    return (), kwargs


def available(family: Family) -> bool:
    """Whether the installed transformers has the family."""
    import transformers

    return hasattr(transformers, family.model) and hasattr(transformers, family.config)


def lift(model: nn.Module, example: Example) -> tuple[torch.fx.Graph, dict[str, str]]:
    """The exported graph, and placeholder name → qualified name: what `find_structures` reads."""
    args, kwargs = example
    with torch.no_grad():
        exported = quick_export(model.eval(), args, kwargs, strict=False)
    signature = exported.graph_signature
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return exported.graph, named
