"""Small random models of every architecture that the installed packages offer, for `benchmarks/coverage.py --rules`.

transformers: every class of the automatic mappings (causal, masked, sequence-to-sequence, classification of text, images and sound,
vision–language), its configuration shrunk by the names of its fields. A class that does not build or run by itself on such a
configuration is no architecture here: what is counted is what transformers itself can run.
Others where they are installed: timm, torchvision, diffusers, x-transformers; and plain modules.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "encoder_hidden_size"), 48),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "ffn_hidden_size"), 80),
    **dict.fromkeys(("decoder_ffn_dim", "hidden_dim", "d_inner", "mlp_dim"), 72),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_attention_head"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_size"), 12),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 20),
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 10, "kv_lora_rank": 8, "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8, "v_head_dim": 10, "rotary_dim": 4, "vocab_size": 61, "type_vocab_size": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "embedding_size": 24, "image_size": 16, "patch_size": 4,
    "num_channels": 3, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32, "word_embed_proj_dim": 48,
    "projection_dim": 16, "image_token_id": 60, "image_token_index": 60, "num_labels": 3, "sliding_window": 16, "window_size": 2,
    "hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "layer_types": None, "attention_types": [[["global", "local"], 1]],
    "max_window_layers": 2, "router_jitter_noise": 0.0, "query_pre_attn_scalar": 12, "conv_dim": [16, 20], "conv_stride": [2, 2],
    "conv_kernel": [3, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
MAPPINGS = {
    "text": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
LARGEST = 20_000_000  # parameters; a configuration that did not shrink is left out


@dataclass(frozen=True)
class Architecture:
    """A model that can be built, and one batch that it takes. kind: of inputs; source: the package."""

    name: str
    kind: str
    source: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]


def shrunk(config_class: Any) -> Any:
    """A configuration of a class with every size that it has made small, nested ones too."""
    config = config_class()
    changes = changes_of(config)
    return config_class(**changes)


def changes_of(config: Any) -> dict[str, Any]:
    known = {**config.to_dict()}
    names = set(known) | set(getattr(config, "attribute_map", {}))
    changes: dict[str, Any] = {}
    for name in names:
        value = getattr(config, name, None)
        if name.endswith("_config") and hasattr(value, "to_dict"):
            inner = changes_of(value)
            changes[name] = {**inner, "model_type": value.model_type} if value.model_type else inner
        elif name in SIZES and (value is not None or name in ("pad_token_id", "num_key_value_heads")):
            if SIZES[name] is None or isinstance(value, list) == isinstance(SIZES[name], list):
                changes[name] = SIZES[name]
        elif "dropout" in name or name in (
            "attention_probs_dropout_prob",
            "drop_path_rate",
            "layerdrop",
            "classifier_dropout",
        ):
            changes[name] = 0.0 if isinstance(value, float) else value
    mapped = getattr(config, "attribute_map", {})
    for alias, real in mapped.items():
        if alias in changes and real in changes:
            changes.pop(alias)
    if "layer_types" in changes:
        changes.pop("layer_types")
    return changes


def batch_of(model: nn.Module, config: Any, kind: str) -> dict[str, Any]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    high = min(int(getattr(text, "vocab_size", 61) or 61), 60)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, high, (2, 9), generator=generator)
    size = getattr(config, "image_size", None) or 16
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if kind in ("text", "masked", "vision-language"):
        return {"input_ids": tokens}
    if kind == "seq2seq":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    if kind == "image":
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)}
    if kind == "speech":
        frames = 2 * int(getattr(config, "max_source_positions", 20))
        mels = int(getattr(config, "num_mel_bins", 8))
        return {"input_features": torch.randn(2, mels, frames, generator=generator), "decoder_input_ids": tokens[:, :5]}
    return {"input_values": torch.randn(2, 400, generator=generator)}


def transformers_architectures(kinds: tuple[str, ...]) -> Iterator[Architecture]:
    import transformers
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    for kind in kinds:
        table = getattr(modeling_auto, MAPPINGS[kind], {})
        for model_type, names in table.items():
            name = names[0] if isinstance(names, tuple | list) else names
            cls = getattr(transformers, name, None)
            if cls is None or name in seen or getattr(cls, "config_class", None) is None:
                continue
            seen.add(name)

            def build(cls: Any = cls, kind: str = kind) -> tuple[nn.Module, dict[str, Any]]:
                torch.manual_seed(0)
                config = shrunk(cls.config_class)
                with torch.device("meta"):
                    size = sum(p.numel() for p in cls(config).parameters())
                if size > LARGEST:
                    raise ValueError(f"{size} parameters after shrinking")
                torch.manual_seed(0)
                model = cls(config).eval()
                batch = batch_of(model, config, kind)
                accepted = inspect.signature(model.forward).parameters
                if "decoder_input_ids" not in accepted:
                    batch.pop("decoder_input_ids", None)
                return model, batch

            yield Architecture(f"{model_type} ({name})", kind, "transformers", build)


# --- plain modules, and packages that may be installed --------------------------------------------------------------------


class Residual(nn.Module):
    """Plain pre-norm blocks with a gated feed-forward."""

    def __init__(self, width: int = 24, hidden: int = 40, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "gate": nn.Linear(width, hidden),
                    "up": nn.Linear(width, hidden),
                    "down": nn.Linear(hidden, width),
                }
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            h = block["norm"](x)
            x = x + block["down"](nn.functional.silu(block["gate"](h)) * block["up"](h))
        return x


def plain_architectures() -> Iterator[Architecture]:
    def made(module: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
        def build() -> tuple[nn.Module, dict[str, Any]]:
            torch.manual_seed(0)
            return module().eval(), {"": torch.randn(*shape)}

        return build

    table: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "gated residual blocks": (Residual, (2, 5, 24)),
        "nn.Sequential, in-place ReLU": (
            lambda: nn.Sequential(nn.Linear(12, 30), nn.ReLU(inplace=True), nn.Linear(30, 12)),
            (4, 12),
        ),
        "nn.Sequential, BatchNorm1d": (
            lambda: nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.GELU(), nn.Linear(30, 12)),
            (4, 12),
        ),
        "nn.TransformerEncoder": (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, 0.0, batch_first=True), 2),
            (2, 5, 24),
        ),
        "convolutions": (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(8 * 64, 20),
                nn.ReLU(),
                nn.Linear(20, 5),
            ),
            (2, 3, 8, 8),
        ),
    }
    for name, (module, shape) in table.items():
        yield Architecture(name, "plain", "torch", made(module, *shape))


def optional_architectures() -> Iterator[Architecture]:
    with contextlib.suppress(ImportError):
        package: Any = importlib.import_module("x_transformers")

        def decoder(**options: Any) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
            def build() -> tuple[nn.Module, dict[str, Any]]:
                torch.manual_seed(0)
                layers = package.Decoder(dim=48, depth=2, heads=4, attn_dim_head=12, **options)
                model = package.TransformerWrapper(num_tokens=61, max_seq_len=32, attn_layers=layers)
                return model.eval(), {"": torch.randint(3, 60, (2, 9))}

            return build

        for label, options in {
            "plain": {}, "GLU and rotary": {"ff_glu": True, "rotary_pos_emb": True}, "one KV head": {"attn_one_kv_head": True},
            "RMSNorm, squared ReLU": {"use_rmsnorm": True, "ff_relu_squared": True}, "KV groups": {"attn_kv_heads": 2},
        }.items():  # fmt: skip
            yield Architecture(f"x-transformers decoder ({label})", "text", "x-transformers", decoder(**options))
    with contextlib.suppress(ImportError, RuntimeError):
        diffusers: Any = importlib.import_module("diffusers")

        def dit() -> tuple[nn.Module, dict[str, Any]]:
            torch.manual_seed(0)
            model = diffusers.DiTTransformer2DModel(
                num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2, sample_size=8
            )
            batch = {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "timestep": torch.tensor([3, 7]),
                "class_labels": torch.tensor([1, 2]),
            }
            return model.eval(), {**batch, "return_dict": False}

        yield Architecture("DiT (diffusers)", "image", "diffusers", dit)


TIMM = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 4},
    "deit3_small_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 4},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4},
    "swin_tiny_patch4_window7_224": {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    "cait_xxs24_224": {"depth": 2, "embed_dim": 48, "num_heads": 4, "depth_token_only": 1},
    "xcit_nano_12_p16_224": {"depth": 2, "embed_dim": 48, "num_heads": 4},
    "mixer_s16_224": {},
    "resmlp_12_224": {},
    "gmlp_s16_224": {},
}


def disturbed(model: nn.Module) -> nn.Module:
    """Some heads and layer scales begin at zero, and so would every gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def timm_architectures() -> Iterator[Architecture]:
    with contextlib.suppress(ImportError, RuntimeError):
        need_torchvision()
        timm: Any = importlib.import_module("timm")

        def model_of(name: str, options: dict[str, Any]) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
            def build() -> tuple[nn.Module, dict[str, Any]]:
                torch.manual_seed(0)
                size = options.get("img_size", 32)
                model = timm.create_model(name, num_classes=5, **{"img_size": size, **options})
                return disturbed(model).eval(), {"": torch.randn(2, 3, size, size)}

            return build

        for name, options in TIMM.items():
            yield Architecture(f"{name.partition('_patch')[0]} (timm)", "image", "timm", model_of(name, options))


def torchvision_architectures() -> Iterator[Architecture]:
    with contextlib.suppress(ImportError, RuntimeError):
        models: Any = need_torchvision().models

        def model_of(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
            def build() -> tuple[nn.Module, dict[str, Any]]:
                torch.manual_seed(0)
                return disturbed(make()).eval(), {"": torch.randn(2, 3, 32, 32)}

            return build

        for name, make in {
            "VisionTransformer": lambda: models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=5),
            "SwinTransformer": lambda: models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5),
            "MobileNetV3 small": lambda: models.mobilenet_v3_small(num_classes=5),
        }.items():
            yield Architecture(f"{name} (torchvision)", "image", "torchvision", model_of(make))


def need_torchvision() -> Any:
    """torchvision; where its wheel's compiled operators do not load (no CUDA), with empty ones in their place: no model here
    calls one, but the import registers shapes for them."""
    for _ in range(40):
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor x) -> Tensor")
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    raise ImportError("torchvision")


def zoo_architectures() -> Iterator[Architecture]:
    """The families of `tests/zoo.py`, whose configurations were written by hand."""
    import zoo

    for family in zoo.FAMILIES:
        if not zoo.available(family):
            continue

        def build(family: Any = family) -> tuple[nn.Module, dict[str, Any]]:
            model, (_, batch) = zoo.build(family, family.implementations[0])
            return model, {n: v for n, v in batch.items() if n != "use_cache"}

        kind = {"encoder": "masked", "clip": "vision-language"}.get(family.inputs, family.inputs)
        yield Architecture(f"{family.name} [zoo]", kind, "transformers", build)


def architectures(kinds: tuple[str, ...] = tuple(MAPPINGS)) -> Iterator[Architecture]:
    """All of them, lazily; whether one builds is found out by building it."""
    warnings.filterwarnings("ignore")
    yield from plain_architectures()
    yield from optional_architectures()
    yield from timm_architectures()
    yield from torchvision_architectures()
    yield from zoo_architectures()
    yield from transformers_architectures(kinds)
