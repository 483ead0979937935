"""Tokens per second and memory of whole models on this CPU: dense torch, packed fp32, packed int8.

    python benchmarks/cpu_decode.py --model llama-1b --sparsity 0.75 --threads 2
    python benchmarks/cpu_decode.py --model minilm --batch 16 --seq 128

Models have the real shapes and random weights (nothing is downloaded), pruned by magnitude row by row. Decoders
generate `--new` tokens with a KV cache after a prompt of `--seq` tokens; encoders run forward. One process, variants in
turn, medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.kernels.cpu.dispatch import best_isa, cpu_name
from sparsify.kernels.cpu.operator import module_bytes
from sparsify.lowering.cpu import lower_model

#: hidden, FFN, layers, heads, KV heads, vocabulary
LLAMAS = {
    "llama-tiny": (256, 704, 2, 4, 2, 1000),
    "llama-1b": (2048, 8192, 16, 32, 8, 32000),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
}


def make_model(name: str) -> nn.Module:
    """A model of real shape with random weights, in eval mode."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    if name == "minilm":
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        return BertModel(config).eval()
    hidden, ffn, layers, heads, kv_heads, vocab = LLAMAS[name]
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
        )
    ).eval()


def prune(model: nn.Module, sparsity: float) -> None:
    """Zero the smallest weights of every row of every linear but the vocabulary head."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in name and sparsity > 0:
                count = int(module.in_features * sparsity)
                bound = module.weight.abs().kthvalue(count, dim=1, keepdim=True).values
                module.weight.mul_(module.weight.abs() > bound)


def one_run(model: nn.Module, ids: torch.Tensor, new: int) -> float:
    start = time.perf_counter()
    if hasattr(model, "lm_head"):
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    else:
        model(ids)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*LLAMAS, "minilm"], default="llama-1b")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=16)
    parser.add_argument("--new", type=int, default=8, help="tokens to generate")
    parser.add_argument("--variants", nargs="+", choices=["dense", "fp32", "int8"], default=["dense", "fp32", "int8"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = make_model(args.model)
    prune(dense, args.sparsity)
    ids = torch.randint(0, dense.config.vocab_size, (args.batch, args.seq))  # type: ignore[union-attr, arg-type]
    decoder = hasattr(dense, "lm_head")
    tokens = (args.batch, args.batch * args.seq) if decoder else (args.batch * args.seq,)
    models: dict[str, nn.Module] = {}
    for variant in args.variants:
        if variant == "dense":
            models[variant] = dense
            continue
        memo = {id(p): p for p in dense.parameters()}  # linears are replaced, everything else is shared
        host = copy.deepcopy(dense, memo)
        quantize = "int8" if variant == "int8" else None
        report = lower_model(host, quantize=quantize, tokens=tokens, mode="small")
        print(str(report).splitlines()[0])
        models[variant] = host
        gc.collect()
    samples: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            one_run(model, ids, 2)
        for _ in range(args.rounds):
            for name, model in models.items():
                samples[name].append(one_run(model, ids, args.new))
    units = args.batch * (args.new if decoder else 1)
    rows: list[dict[str, Any]] = []
    reference = statistics.median(samples[args.variants[0]])
    for name, seconds in samples.items():
        middle = statistics.median(seconds)
        rows.append(
            {
                "variant": name,
                "per_second": units / middle,
                "speedup": reference / middle,
                "MiB": module_bytes(models[name]) / 2**20,
            }
        )
        unit = "tokens" if decoder else "sentences"
        ratio, memory = reference / middle, rows[-1]["MiB"]
        print(f"{name:>6} {units / middle:>9.2f} {unit}/s {ratio:>6.2f} × {memory:>9.1f} MiB")
    summary = {
        "benchmark": "cpu_decode", "model": args.model, "sparsity": args.sparsity, "batch": args.batch, "seq": args.seq,
        "new": args.new, "threads": args.threads, "cpu": cpu_name(), "isa": best_isa(), "torch": torch.__version__,
        "date": str(date.today()), "results": rows,
    }  # fmt: skip
    text = json.dumps(summary)
    if args.save:
        args.save.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
