"""OpenVINO on a random Llama: weights in int8 (a scale per row) or int4 (one per 128 columns), its own decompression.

Started by `cpu_decode.py` with one argument, JSON: a `Decoder`, threads, bits, head (bits of the vocabulary head), linears (only
the chain), folder (where files are kept; a file that is there is used). The graph is stateful, in the form that its exporters write and
its CPU plugin fuses: RMS norms, rotary embedding, attention with the cache. The embedding is fp16. Everything else is left to its defaults (precision of activations and of the cache, dynamic quantisation of
activations), which the first line reports.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from decoder_loop import serve
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo

from benchmarks.random_decoder import EPSILON, ROPE_BASE, Decoder, decoder_from_json, quantize_rows

GROUP = 128
POSITIONS = 4096


def numbers(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


def compressed(weight: np.ndarray, bits: int) -> Any:
    """fp32 (out, in) as a constant in int8 or int4 with fp16 scales, decompressed in the graph."""
    return decompressed(*quantize_rows(weight, bits, 0 if bits == 8 else GROUP), bits)


def decompressed(codes: np.ndarray, scales: np.ndarray, bits: int) -> Any:
    """codes int8 (out, in), which are copied; scales fp32 (out, groups) → a node, fp32 (out, in)."""
    rows, cols = codes.shape
    grouped = scales.shape[1] > 1
    shape = [rows, scales.shape[1], cols // scales.shape[1]] if grouped else [rows, cols]
    if bits == 8:
        stored = ops.constant(codes.reshape(shape))
    else:  # two to a byte here: `ops.constant` would convert one by one
        pairs = (codes[:, 0::2] & 15).astype(np.uint8) | (codes[:, 1::2] << 4).astype(np.uint8)
        tensor = ov.Tensor(ov.Type.i4, ov.Shape(shape))  # the constant shares its memory
        tensor.data.reshape(-1)[:] = pairs.reshape(-1)
        stored = ops.constant(tensor)
    factors = ops.constant((scales[:, :, None] if grouped else scales).astype(np.float16))
    wide = ops.multiply(ops.convert(stored, np.float16), factors)
    return ops.convert(ops.reshape(wide, numbers(rows, cols), False) if grouped else wide, np.float32)


class Graph:
    """Builds the model; state: one variable for the keys and one for the values of each layer."""

    def __init__(self, decoder: Decoder, bits: int, head: int) -> None:
        self.decoder, self.shape, self.bits, self.head = decoder, decoder.shape, bits, head
        shape = self.shape
        self.ids = ops.parameter([-1, -1], np.int64, "input_ids")
        self.mask = ops.parameter([-1, 1, -1, -1], np.float32, "mask")
        self.positions = ops.parameter([-1, -1], np.int64, "positions")
        self.beams = ops.parameter([-1], np.int32, "beam_idx")
        self.sinks: list[Any] = []
        self.quantised: dict[str, Any] = {}
        self.batch = ops.gather(ops.shape_of(self.ids), numbers(0), ops.constant(0))
        half = np.arange(0, shape.head_dim, 2, dtype=np.float32) / shape.head_dim
        angles = np.outer(np.arange(POSITIONS, dtype=np.float32), ROPE_BASE**-half)
        angles = np.concatenate([angles, angles], 1).astype(np.float32)
        tables = [ops.gather(ops.constant(f(angles)), self.positions, ops.constant(0)) for f in (np.cos, np.sin)]
        self.cos, self.sin = (ops.unsqueeze(table, numbers(1)) for table in tables)

    def tensor(self, name: str, *size: int) -> np.ndarray:
        return self.decoder.tensor(f"{name}.weight", size)

    def linear(self, x: Any, name: str, rows: int, cols: int) -> Any:
        bits = self.head if name == "lm_head" else self.bits
        key = self.decoder.original(name)
        found = self.quantised.get(key)
        if found is None:
            found = quantize_rows(self.tensor(name, rows, cols), bits, 0 if bits == 8 else GROUP)
        if self.decoder.distinct < self.decoder.layers:
            self.quantised[key] = found
        return ops.matmul(x, decompressed(*found, bits), False, True)

    def norm(self, x: Any, name: str) -> Any:
        square = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), numbers(-1), True)
        root = ops.sqrt(ops.add(square, ops.constant(np.float32(EPSILON))))
        scaled = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))
        return ops.multiply(ops.constant(self.tensor(name, self.shape.hidden)), scaled)

    def heads(self, x: Any, count: int) -> Any:
        """(batch, tokens, count · head_dim) → (batch, count, tokens, head_dim)."""
        return ops.transpose(ops.reshape(x, numbers(0, 0, count, self.shape.head_dim), True), numbers(0, 2, 1, 3))

    def rotate(self, x: Any) -> Any:
        half = self.shape.head_dim // 2
        first = ops.slice(x, numbers(0), numbers(half), numbers(1), numbers(3))
        second = ops.slice(x, numbers(half), numbers(2**31 - 1), numbers(1), numbers(3))
        turned = ops.concat([ops.multiply(second, ops.constant(np.float32(-1))), first], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))

    def cached(self, x: Any, name: str) -> Any:
        """x appended to the state, (batch, KV heads, all tokens, head_dim), repeated for every query head."""
        shape = self.shape
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, shape.kv_heads, -1, shape.head_dim])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        size = ops.concat([self.batch, numbers(shape.kv_heads, 0, shape.head_dim)], 0)
        empty = ops.broadcast(ops.constant(np.float32(0)), size)
        past = ops.gather(ops.read_value(empty, variable), self.beams, ops.constant(0))
        whole = ops.concat([past, x], -2)
        self.sinks.append(ops.assign(whole, variable))
        repeats = shape.heads // shape.kv_heads
        if repeats == 1:
            return whole
        copies = ops.broadcast(ops.unsqueeze(whole, numbers(2)), numbers(1, 1, repeats, 1, 1), None, "BIDIRECTIONAL")
        return ops.reshape(copies, numbers(0, shape.heads, -1, shape.head_dim), True)

    def block(self, x: Any, layer: int) -> Any:
        shape, name = self.shape, f"model.layers.{layer}"
        kv = shape.kv_heads * shape.head_dim
        normed = self.norm(x, f"{name}.input_layernorm")
        q = self.heads(self.linear(normed, f"{name}.self_attn.q_proj", shape.hidden, shape.hidden), shape.heads)
        k = self.heads(self.linear(normed, f"{name}.self_attn.k_proj", kv, shape.hidden), shape.kv_heads)
        v = self.heads(self.linear(normed, f"{name}.self_attn.v_proj", kv, shape.hidden), shape.kv_heads)
        keys, values = self.cached(self.rotate(k), f"{layer}.key"), self.cached(v, f"{layer}.value")
        mixed = ops.scaled_dot_product_attention(self.rotate(q), keys, values, self.mask)
        mixed = ops.reshape(ops.transpose(mixed, numbers(0, 2, 1, 3)), numbers(0, 0, shape.hidden), True)
        x = ops.add(x, self.linear(mixed, f"{name}.self_attn.o_proj", shape.hidden, shape.hidden))
        normed = self.norm(x, f"{name}.post_attention_layernorm")
        gate = ops.swish(self.linear(normed, f"{name}.mlp.gate_proj", shape.ffn, shape.hidden))
        up = self.linear(normed, f"{name}.mlp.up_proj", shape.ffn, shape.hidden)
        return ops.add(x, self.linear(ops.multiply(gate, up), f"{name}.mlp.down_proj", shape.hidden, shape.ffn))

    def model(self) -> Any:
        table = self.tensor("model.embed_tokens", self.shape.vocab, self.shape.hidden).astype(np.float16)
        x = ops.convert(ops.gather(ops.constant(table), self.ids, ops.constant(0)), np.float32)
        for layer in range(self.shape.layers):
            x = self.block(x, layer)
        last = ops.slice(self.norm(x, "model.norm"), numbers(-1), numbers(2**31 - 1), numbers(1), numbers(1))
        logits = self.linear(last, "lm_head", self.shape.vocab, self.shape.hidden)
        return ov.Model([ops.result(logits)], self.sinks, [self.ids, self.mask, self.positions, self.beams], "llama")

    def chain(self) -> Any:
        """The linears alone, one after the other, for one token: no attention, norms, cache."""
        shape = self.shape
        kv = shape.kv_heads * shape.head_dim
        node = ops.parameter([1, shape.hidden], np.float32)
        x: Any = node
        for layer in range(shape.layers):
            name = f"model.layers.{layer}"
            q = self.linear(x, f"{name}.self_attn.q_proj", shape.hidden, shape.hidden)
            k, v = (self.linear(x, f"{name}.self_attn.{leaf}_proj", kv, shape.hidden) for leaf in "kv")
            mean = ops.reduce_mean(ops.concat([k, v], 1), numbers(1), True)
            x = ops.add(x, self.linear(ops.add(q, mean), f"{name}.self_attn.o_proj", shape.hidden, shape.hidden))
            gate, up = (self.linear(x, f"{name}.mlp.{leaf}_proj", shape.ffn, shape.hidden) for leaf in ("gate", "up"))
            gated = ops.multiply(ops.swish(gate), up)
            x = ops.add(x, self.linear(gated, f"{name}.mlp.down_proj", shape.hidden, shape.ffn))
        return ov.Model([ops.result(self.linear(x, "lm_head", shape.vocab, shape.hidden))], [node], "linears")


class Chain:
    """The linears as an engine: whatever the token, the same input."""

    def __init__(self, compiled: Any, hidden: int) -> None:
        self.request, self.x = compiled.create_infer_request(), np.ones((1, hidden), np.float32)

    def reset(self) -> None:
        pass

    def feed(self, ids: list[int]) -> None:
        self.request.infer([self.x])

    def next(self) -> int:
        return 0

    def logits(self) -> np.ndarray:
        return self.request.get_output_tensor(0).data.reshape(-1).astype(np.float32)


class OpenVino:
    """One sequence; the argmax is numpy's."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.length = 0
        self.found = np.zeros(0, np.float32)

    def reset(self) -> None:
        self.request.reset_state()
        self.length = 0

    def feed(self, ids: list[int]) -> None:
        tokens = len(ids)
        positions = np.arange(self.length, self.length + tokens)
        self.length += tokens
        late = np.arange(self.length)[None] > positions[:, None]
        mask = np.where(late, np.finfo(np.float32).min, np.float32(0)).astype(np.float32)
        inputs = (np.array([ids], np.int64), mask[None, None], positions[None].astype(np.int64), np.zeros(1, np.int32))
        self.request.infer(inputs)
        self.found = self.request.get_output_tensor(0).data.reshape(-1)

    def next(self) -> int:
        return int(self.found.argmax())

    def logits(self) -> np.ndarray:
        return self.found.astype(np.float32)


def model_of(job: dict[str, Any], decoder: Decoder) -> Any:
    """The file of a model, or, if blocks are repeated, the model: a file would hold equal constants only once."""
    name = f"{decoder.file_name()}-int{job['bits']}-int{job['head']}{'-linears' * job['linears']}.xml"
    path = Path(job["folder"]) / name
    if path.exists():
        return str(path)
    graph = Graph(decoder, job["bits"], job["head"])
    model = graph.chain() if job["linears"] else graph.model()
    if decoder.distinct < decoder.layers:
        return model
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        ov.save_model(model, str(unfinished), compress_to_fp16=False)
        for file in (unfinished.with_suffix(".bin"), unfinished):  # they get their names when they are whole
            file.rename(path.with_suffix(file.suffix))
    return str(path)


def main() -> None:
    job = json.loads(sys.argv[1])
    decoder = decoder_from_json(job)
    hints = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(model_of(job, decoder), "CPU", hints)
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    asked = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    facts = {name: str(compiled.get_property(name)) for name in asked}
    fused = {kind: kinds.count(kind) for kind in ("ScaledDotProductAttention", "RoPE", "RMS", "FullyConnected")}
    engine = Chain(compiled, decoder.shape.hidden) if job["linears"] else OpenVino(compiled)
    serve("openvino", engine, settings=facts, head=f"int{job['head']}", nodes={**fused, "all": len(kinds)})


if __name__ == "__main__":
    main()
