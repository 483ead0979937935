"""llama.cpp on a random Llama in GGUF, quantised by llama.cpp's own quantiser (`ggml_quantize_chunk`).

Started by `cpu_decode.py` with one argument, JSON: a `Decoder`, threads, format (Q8_0, Q4_0, F32), head (the format of the
vocabulary head and of the embedding), context (tokens), folder (where files are kept; a file that is there is used), file (a GGUF
to run as it is).
Norms are fp32. The file has no tokenizer; tokens go in and come out as numbers.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import numpy as np
from decoder_loop import serve

from benchmarks.random_decoder import (
    EPSILON,
    ROPE_BASE,
    Decoder,
    Shape,
    block_tensors,
    decoder_from_json,
    outer_tensors,
)

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
Type = gguf.GGMLQuantizationType


def gguf_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" → "blk.3.ffn_up.weight"."""
    parts = name.removesuffix(".weight").split(".")
    if parts[1:2] == ["layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from "first halves, second halves" of the rotated pairs to "pair after pair", as GGUF has them."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


class Quantiser:
    """`ggml_quantize_chunk` of the library that will read the file."""

    def __init__(self) -> None:
        folder = Path(llama.__file__).parent / "lib"
        library = next(path for path in sorted(folder.iterdir()) if "ggml-base" in path.name)
        self.call = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self.call.restype = ctypes.c_size_t
        self.call.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
        ]  # fmt: skip

    def __call__(self, weight: np.ndarray, kind: Any) -> np.ndarray:
        """fp32 (rows, cols) → bytes (rows, bytes per row)."""
        rows, cols = weight.shape
        out = np.empty((rows, row_bytes(cols, kind)), np.uint8)
        weight = np.ascontiguousarray(weight)
        written = self.call(int(kind), weight.ctypes.data, out.ctypes.data, 0, rows, cols, None)
        if written != out.nbytes:
            raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes, expected {out.nbytes}")
        return out


def row_bytes(cols: int, kind: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return cols // block * size


def tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from outer_tensors(shape)
    for layer in range(shape.layers):
        yield from block_tensors(shape, layer)


def write_gguf(path: Path, decoder: Decoder, kind: str, head: str) -> None:
    """One tensor in memory at a time; the file appears under its name when it is whole."""
    shape = decoder.shape
    unfinished = path.with_suffix(f".{os.getpid()}")
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("none")
    kinds = {}
    for name, size in tensors_of(shape):
        kinds[name] = Type.F32 if len(size) == 1 else Type[kind if ".layers." in name else head]
        bytes_shape = (*size[:-1], row_bytes(size[-1], kinds[name]))
        data = np.dtype(np.float32) if kinds[name] == Type.F32 else np.dtype(np.uint8)
        writer.add_tensor_info(
            gguf_name(name), size if kinds[name] == Type.F32 else bytes_shape, data, int(np.prod(bytes_shape)),
            raw_dtype=None if kinds[name] == Type.F32 else kinds[name],
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    quantise = Quantiser()
    for name, size in tensors_of(shape):
        values = decoder.tensor(name, size)
        if "q_proj" in name or "k_proj" in name:
            values = interleave_halves(values, shape.heads if "q_proj" in name else shape.kv_heads)
        writer.write_tensor_data(values if kinds[name] == Type.F32 else quantise(values, kinds[name]))
    writer.close()
    unfinished.rename(path)


class LlamaCpp:
    """The low-level API: one sequence, greedy, logits of the last token only."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        limits = llama.llama_context_default_params()
        limits.n_ctx = limits.n_batch = limits.n_ubatch = context
        limits.n_threads = limits.n_threads_batch = threads
        limits.no_perf = True
        self.context = llama.llama_init_from_model(self.model, limits)
        self.sampler = llama.llama_sampler_init_greedy()
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def feed(self, ids: list[int]) -> None:
        tokens = (llama.llama_token * len(ids))(*ids)
        status = llama.llama_decode(self.context, llama.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode: {status}")

    def next(self) -> int:
        return int(llama.llama_sampler_sample(self.sampler, self.context, -1))

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, -1), (self.vocab,)).copy()


def main() -> None:
    job = json.loads(sys.argv[1])
    decoder = decoder_from_json(job)
    path = Path(job["folder"]) / f"{decoder.file_name()}-{job['format']}-{job['head']}.gguf"
    path = Path(job.get("file", path))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(path, decoder, job["format"], job["head"])
    engine = LlamaCpp(path, job["threads"], job["context"])
    system = llama.llama_print_system_info().decode()
    serve("llama-cpp-python", engine, system=system, file_MiB=path.stat().st_size / 2**20, head=job["head"])


if __name__ == "__main__":
    main()
