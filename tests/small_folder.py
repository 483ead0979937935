"""A small chat model as users have one: a folder with a random Llama, a tokenizer with a chat template, and rows to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "dogs",
    "what",
    "is",
    "blue",
    "red",
    "sky",
    "rose",
    "user",
    "assistant",
    "system",
]
MARKS = ["<pad>", "<s>", "</s>", "<unk>", "<begin>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}<begin> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<begin> assistant {% endif %}"
)


def tokenizer() -> Any:
    """One token a word; <s> in front of a text, </s> ends it; <unk> for words that nobody knows."""
    words = {word: number for number, word in enumerate([*MARKS, *WORDS])}
    made: Any = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    made.add_special_tokens(MARKS)
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = TEMPLATE
    return found


def config(**changes: Any) -> hf.LlamaConfig:
    sizes = {
        "vocab_size": len(MARKS) + len(WORDS), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False, "initializer_range": 0.3,
    }  # fmt: skip
    return hf.LlamaConfig(**{**sizes, **changes})


def write_model(folder: Path, **changes: Any) -> Path:
    """The folder of a random model and its tokenizer."""
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config(**changes)).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Prompts that have one answer each."""
    facts = [
        ("what is the sky", "the sky is blue"),
        ("what is the rose", "the rose is red"),
        ("what sat", "the cat sat on a mat"),
    ]
    return [{"prompt": facts[i % 3][0] + " ", "completion": facts[i % 3][1]} for i in range(count)]


def conversations(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"].strip()},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in pairs(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
