"""Tokens per second and memory of whole models on this CPU: dense torch, packed, quantised kernels of torch, OpenVINO.

    python benchmarks/cpu_decode.py --model llama-1b --sparsity 0.75 --threads 2 --variants dense int8 aten-int8 aten-int4
    python benchmarks/cpu_decode.py --model llama-1b --openvino-python ENV/bin/python --variants int8
    python benchmarks/cpu_decode.py --model minilm --batch 16 --seq 128

Models have the real shapes and random weights (nothing is downloaded), and lose random weights. Decoders generate
`--new` tokens with a KV cache after a prompt of `--seq` tokens, and the time per token is the slope between a short and a long
generation, so that the prompt does not count; encoders run forward. One process tree, variants in turn, medians.

    dense       torch, fp32                       fp32, int8            `sparsify.compile(…, target="cpu")`
    bf16        torch, bfloat16                   packed-bf16           the same of the model in bfloat16
                                                  aten-int8, aten-int4  the kernels that torchao's weight-only configurations
                                                                        compile to on a CPU, in place of every linear (bf16)
    OpenVINO runs a chain of the model's linears alone (int8 and int4 weights, its own decompression), without attention,
    norms and cache; with it, the same is timed for the others ("linears"). The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsify
from sparsify import CpuOptions, Plan, Quantize
from sparsify.kernels.cpu.dispatch import best_isa
from sparsify.kernels.cpu.operator import module_bytes
from sparsify.kernels.cpu.tune import cpu_name
from sparsify.plan import Rule

#: hidden, FFN, layers, heads, KV heads, vocabulary
LLAMAS = {
    "llama-tiny": (256, 704, 2, 4, 2, 1000),
    "llama-1b": (2048, 8192, 16, 32, 8, 32000),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
}
VARIANTS = ("dense", "bf16", "fp32", "packed-bf16", "int8", "aten-int8", "aten-int4")

OPENVINO = r"""
import json, sys, time
import numpy as np
import openvino as ov
from openvino import opset13 as ops
hidden, ffn, layers, kv, vocab, threads, bits, runs = map(int, sys.argv[1:])
generator = np.random.default_rng(0)
def linear(x, rows, cols):
    low, high, kind = (-127, 128, ov.Type.i8) if bits == 8 else (-8, 8, ov.Type.i4)
    groups = 1 if bits == 8 else cols // 128
    shape = [rows, cols] if groups == 1 else [rows, groups, cols // groups]
    values = generator.integers(low, high, shape, dtype=np.int8)
    weight = ops.convert(ops.constant(values, dtype=kind), np.float32)
    scale = np.full([rows, 1] if groups == 1 else [rows, groups, 1], 1e-3, np.float32)
    weight = ops.multiply(weight, ops.convert(ops.constant(scale.astype(np.float16)), np.float32))
    if groups > 1:
        weight = ops.reshape(weight, ops.constant(np.array([rows, cols])), False)
    return ops.matmul(x, weight, False, True)
node = ops.parameter([1, hidden], np.float32)
x = node
for _ in range(layers):
    q, k, v = linear(x, hidden, hidden), linear(x, kv, hidden), linear(x, kv, hidden)
    keys = ops.reduce_mean(ops.concat([k, v], 1), ops.constant(np.array([1])), True)
    x = ops.add(x, linear(ops.add(q, keys), hidden, hidden))
    gate, up = linear(x, ffn, hidden), linear(x, ffn, hidden)
    x = ops.add(x, linear(ops.multiply(ops.swish(gate), up), hidden, ffn))
model = ov.Model([linear(x, vocab, hidden)], [node])
hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
data = generator.standard_normal((1, hidden)).astype(np.float32)
from importlib.metadata import version
print(json.dumps({"version": version("openvino")}), flush=True)
for _ in range(2):
    request.infer([data])
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(runs):
        request.infer([data])
    print(json.dumps({"seconds": (time.perf_counter() - start) / runs}), flush=True)
"""


class OpenVino:
    """OpenVINO in a process of its own: seconds per pass through the model's linears."""

    def __init__(self, python: str, model: str, depth: int | None, threads: int, bits: int, runs: int) -> None:
        hidden, ffn, layers, heads, kv_heads, vocab = LLAMAS[model]
        sizes = (hidden, ffn, depth or layers, hidden // heads * kv_heads, vocab, threads, bits, runs)
        command = [python, "-c", OPENVINO, *map(str, sizes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = str(self.answer()["version"])

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("OpenVINO ended without an answer")

    def seconds(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.answer()["seconds"])


class AtenLinear(nn.Module):
    """A linear on torch's weight-only kernels: int8 with a scale per row, or int4 with one per 128 columns. bf16."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.bits, self.out_features = bits, linear.out_features
        if bits == 8:
            scales = weight.abs().amax(1) / 127
            self.register_buffer("packed", torch.round(weight / scales[:, None]).clamp_(-127, 127).to(torch.int8))
            self.register_buffer("scales", scales.to(torch.bfloat16))
            return
        groups = weight.view(weight.shape[0], -1, 128)
        scales = groups.abs().amax(2) / 7
        codes = torch.round(groups / scales[..., None]).clamp_(-8, 7).add_(8).view_as(weight).to(torch.int32)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        pairs = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1)
        self.register_buffer("scales", pairs.to(torch.bfloat16).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.bits == 8:
            y = torch._weight_int8pack_mm(flat, self.packed, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, 128, self.scales)
        return y.view(*x.shape[:-1], self.out_features)


def make_model(name: str, depth: int | None = None) -> nn.Module:
    """A model of real shape with random weights, in eval mode. depth: of a decoder, instead of its own."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    if name == "minilm":
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        return BertModel(config).eval()
    hidden, ffn, layers, heads, kv_heads, vocab = LLAMAS[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=depth or layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def prune(model: nn.Module, sparsity: float) -> None:
    """Zero random weights of every linear but the vocabulary head: the weights are random, so any are as good."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in name and sparsity > 0:
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)


def make_variant(dense: nn.Module, variant: str, tokens: tuple[int, ...]) -> nn.Module:
    """One contestant over the weights of `dense`; what it does not change it shares."""
    if variant == "dense":
        return dense
    if variant in ("fp32", "packed-bf16", "int8"):
        rules: list[Rule] = (
            [Quantize(format="int8", exclude=())] if variant == "int8" else []
        )  # the vocabulary head too
        plan = Plan(rules, target="cpu")
        source = copy.deepcopy(dense).bfloat16() if variant == "packed-bf16" else dense
        host = sparsify.compile(source, plan, cpu=CpuOptions(tokens=tokens), progress=False)
        print("\n".join(summary_of(str(host.sparsify.report))))  # type: ignore[union-attr]
        return host
    memo = {id(p): p for p in dense.parameters()}
    host = copy.deepcopy(dense, memo)
    if variant != "bf16":
        for name, module in list(host.named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, leaf = name.rpartition(".")
                setattr(host.get_submodule(owner), leaf, AtenLinear(module, 8 if variant == "aten-int8" else 4))
    for module in host.modules():  # the rest in bf16, in tensors of its own
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))
    return host


def summary_of(report: str) -> list[str]:
    """The first line of the CPU's part of a report, and one line of each kind."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("cpu lowering"))
    kinds = ("packed", "fused", "apart", "dense", "blocked")
    return [lines[start], *(next((x for x in lines[start:] if x.startswith(k)), f"{k:<10} none") for k in kinds)]


def generate(model: Any, ids: torch.Tensor, new: int) -> float:
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def one_run(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds per generated token, without the prompt; or seconds of one forward of an encoder."""
    if hasattr(model, "lm_head"):
        return (generate(model, ids, new + 2) - generate(model, ids, 2)) / new
    start = time.perf_counter()
    model(ids)
    return time.perf_counter() - start


def linears_alone(model: Any) -> float:
    """Seconds of one token through the model's linears, chained as OpenVINO's are: no attention, norms, cache."""
    start = time.perf_counter()
    x = torch.ones(1, 1, model.config.hidden_size, dtype=next(model.parameters()).dtype)
    for layer in model.model.layers:
        attention = layer.self_attn
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        x = x + attention.o_proj(q + torch.cat([k, v], -1).mean(-1, keepdim=True))
        x = x + layer.mlp(x)
    model.lm_head(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*LLAMAS, "minilm"], default="llama-1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model, where time or memory is short")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=16)
    parser.add_argument("--new", type=int, default=8, help="tokens to time")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["dense", "fp32", "int8"])
    parser.add_argument("--openvino-python", help="Python of an environment that has OpenVINO")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = make_model(args.model, args.layers)
    prune(dense, args.sparsity)
    ids = torch.randint(0, dense.config.vocab_size, (args.batch, args.seq))  # type: ignore[union-attr, arg-type]
    decoder = hasattr(dense, "lm_head")
    tokens = (args.batch, args.batch * args.seq) if decoder else (args.batch * args.seq,)
    models = {variant: make_variant(dense, variant, tokens) for variant in args.variants}
    memory = {name: module_bytes(model) / 2**20 for name, model in models.items()}
    if "dense" not in models:
        del dense
    gc.collect()
    runs: dict[str, Callable[[], float]] = {
        name: lambda model=model: one_run(model, ids, args.new) for name, model in models.items()
    }
    version = None
    if args.openvino_python:
        runs |= {f"{name} linears": lambda model=model: linears_alone(model) for name, model in models.items()}
        for bits in (8, 4):
            peer = OpenVino(args.openvino_python, args.model, args.layers, args.threads, bits, args.new)
            runs[f"openvino-int{bits} linears"], version = peer.seconds, peer.version
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for call in runs.values():
            call()
        for _ in range(args.rounds):
            for name, call in runs.items():
                samples[name].append(call())
    units, unit = args.batch, "tokens" if decoder else "sentences"
    rows: list[dict[str, Any]] = []
    reference = statistics.median(samples[args.variants[0]])
    for name, seconds in samples.items():
        middle = statistics.median(seconds)
        row = {
            "variant": name,
            "per_second": units / middle,
            "best": units / min(seconds),
            "speedup": reference / middle,
        }
        rows.append({**row, "MiB": memory.get(name)})
        size = f"{memory[name]:>9.1f} MiB" if name in memory else ""
        print(f"{name:>18} {units / middle:>9.2f} {unit}/s {reference / middle:>6.2f} × {size}")
    summary = {
        "benchmark": "cpu_decode", "model": args.model, "layers": args.layers, "sparsity": args.sparsity, "batch": args.batch, "seq": args.seq,
        "new": args.new, "threads": args.threads, "cpu": cpu_name(), "isa": best_isa(), "torch": torch.__version__,
        "openvino": version, "date": str(date.today()), "results": rows,
    }  # fmt: skip
    text = json.dumps(summary)
    if args.save:
        args.save.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
