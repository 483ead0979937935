"""Llama-shaped decoders with random weights that every contestant of `cpu_decode.py` makes for itself, tensor by tensor.

A tensor depends on its name, shape and sparsity only, so that engines in processes and environments of their own hold the same model
without a file between them, and no model ever has to be dense and whole in memory. Needs numpy only: contestants import it in
environments that have no torch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

EPSILON = 1e-6  # of the norms
ROPE_BASE = 10000.0
AMPLITUDE = 0.03  # of the weights
CACHED = 1 << 16  # numbers that are worked on at a time


class Shape(NamedTuple):
    """Of a Llama: sizes in numbers of features, layers, heads and tokens."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "llama-tiny": Shape(256, 768, 2, 4, 2, 1024),
    "smollm2": Shape(576, 1536, 30, 9, 3, 49152),
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 32000),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
}


@dataclass(frozen=True)
class Decoder:
    """Which decoder. layers: its number of blocks, of which `distinct` differ and are repeated; sparsity: of the blocks' linears."""

    model: str
    layers: int
    sparsity: float
    distinct: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]._replace(layers=self.layers)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def file_name(self) -> str:
        """Of whatever is made of this decoder's weights, without what was made."""
        return f"{self.model}-{self.layers}-{self.distinct}-{self.sparsity}"

    def block_weights(self) -> int:
        """Number of weights in all blocks."""
        return self.layers * sum(math.prod(size) for _, size in block_tensors(self.shape, 0))

    def original(self, name: str) -> str:
        """The name of the tensor that this one repeats; its own if none."""
        parts = name.split(".")
        if parts[1:2] == ["layers"]:
            parts[2] = str(int(parts[2]) % self.distinct)
        return ".".join(parts)

    def tensor(self, name: str, size: tuple[int, ...]) -> np.ndarray:
        """fp32. name: as in Hugging Face's state dict."""
        return random_tensor(self.original(name), size, self.sparsity)


def decoder_from_json(job: dict[str, Any]) -> Decoder:
    return Decoder(job["model"], job["layers"], job["sparsity"], job["distinct"])


def block_tensors(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, as in Hugging Face's state dict, and shape (out, in) of the tensors of one decoder block."""
    hidden, ffn, kv = shape.hidden, shape.ffn, shape.kv_heads * shape.head_dim
    rows_cols = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for leaf, size in rows_cols.items():
        yield f"model.layers.{layer}.{leaf}.weight", size


def outer_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same of what lies outside of blocks: embedding, last norm, vocabulary head (not tied)."""
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocab, shape.hidden)


def random_tensor(name: str, size: tuple[int, ...], sparsity: float) -> np.ndarray:
    """fp32; uniform in ±AMPLITUDE with the share `sparsity` of zeros, or near 1 for a norm; embedding and head stay dense."""
    generator = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    if len(size) == 1:
        return generator.random(size, dtype=np.float32) * np.float32(0.2) + np.float32(0.9)
    share = sparsity if ".layers." in name else 0.0
    weight = np.empty(size, np.float32)
    for part in row_parts(weight):
        generator.random(out=part, dtype=np.float32)
        keep = part >= share
        part -= np.float32(share)
        part *= np.float32(2 * AMPLITUDE / (1 - share))
        part -= np.float32(AMPLITUDE)
        part *= keep
        part += np.float32(0)  # −0 to 0
    return weight


def row_parts(weight: np.ndarray) -> Iterator[np.ndarray]:
    """Views of some rows each, small enough for the cache."""
    rows = max(1, CACHED // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield weight[start : start + rows]


def quantize_rows(weight: np.ndarray, bits: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric, to the nearest: codes int8 (out, in) and fp32 scales (out, groups). group: columns per scale, 0 for a whole row."""
    top = np.float32(2 ** (bits - 1) - 1)
    group = group or weight.shape[1]
    codes, scales = np.empty(weight.shape, np.int8), np.empty((len(weight), weight.shape[1] // group), np.float32)
    start = 0
    for part in row_parts(weight):
        grouped, rows = part.reshape(len(part), -1, group), slice(start, start + len(part))
        scales[rows] = np.maximum(np.abs(grouped).max(2), np.float32(1e-12)) / top
        codes[rows] = np.rint(grouped / scales[rows, :, None]).reshape(part.shape)
        start += len(part)
    return codes, scales
