"""What `sparsify.autoplan` predicts beside what is measured: bytes at the peak and seconds of a training step, whole models of three families.

    predicted   from three blocks with random weights: memory counted over fake tensors, time of each phase measured with cold caches
    measured    the whole model: allocations of a real step as the allocator reports them, and steps in turn

Both use as many threads; the smallest of several rounds counts, as the machine is shared. The bar is 15 %.

    python benchmarks/autoplan.py --threads 1 --save
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Bar, allocations, begin, mib, parser, report, storage_bytes
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA, compile
from sparsify.planner.estimate import estimate
from sparsify.planner.shallow import skeleton
from sparsify.planner.step_time import step_time

BOUND = 0.15
METHODS = {"S2FT": S2FT(0.03), "LoRA": LoRA(16), "PaCA": PaCA(16), "RoSA": RoSA(16, mask="random")}


def models(fast: bool) -> dict[str, Any]:
    """Name → a function that makes the model. Layers that share nothing but their shapes, more than what the last-level cache holds."""
    layers, width, vocabulary = (9, 64, 256) if fast else (12, 512, 16_000)
    llama: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    }  # fmt: skip
    neox: dict[str, Any] = {k: v for k, v in llama.items() if k != "num_key_value_heads"} | {
        "intermediate_size": 4 * width
    }
    gpt2: dict[str, Any] = {
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_layer": layers,
        "n_head": 8,
        "n_positions": 1024,
    }
    return {
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama)),
        "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
        "GPT-NeoX": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**neox)),
    }


def measure(model: Any, rule: Any, batch: int, length: int, rounds: int) -> tuple[int, float]:
    """(bytes at the peak, seconds) of a real step of the whole model."""
    host: Any = compile(model, Plan([rule]), progress=False).train()
    trained = [p for p in host.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
    ids = torch.randint(0, host.config.vocab_size, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # rows of different lengths
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    alone = torch.get_num_threads() == 1

    def step() -> float:
        start, own = time.perf_counter(), time.thread_time()
        host(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        taken = time.perf_counter() - start
        taken = min(taken, time.thread_time() - own) if alone else taken
        optimizer.zero_grad(set_to_none=True)
        return taken

    step()
    seconds = min(step() for _ in range(rounds))
    held = storage_bytes([*host.parameters(), *host.buffers()])
    held += sum(storage_bytes(s.values()) for s in optimizer.state.values())
    with allocations("cpu") as found:
        host(**inputs, use_cache=False).loss.backward()
        optimizer.step()
    return held + found.peak, seconds


def main() -> None:
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = options.parse_args()
    begin(arguments)
    rows, bars = [], []
    shape = {"batch": arguments.batch, "length": 64 if arguments.fast else arguments.length}
    for family, make in models(arguments.fast).items():
        model = make()
        for method in arguments.methods:
            rule = METHODS[method]
            counted = estimate(skeleton(model, None), Plan([rule]), full=False, **shape)
            predicted = step_time(model, Plan([rule]), **shape)
            rounds = 2 if arguments.fast else arguments.rounds
            peak, seconds = measure(model, rule, **shape, rounds=rounds)
            again = step_time(model, Plan([rule]), **shape)  # from the record
            assert again == predicted
            memory, time_of = counted.memory / peak, predicted.seconds / seconds
            rows.append(
                {
                    "model": family, "method": method, "peak MiB": mib(peak), "predicted MiB": mib(counted.memory), "memory": memory,
                    "step ms": 1e3 * seconds, "predicted ms": 1e3 * predicted.seconds, "time": time_of, "blocks": str(predicted.blocks),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            if not arguments.fast:
                bars += [
                    Bar(f"{family}, {method}: {what} off by", abs(x - 1), BOUND)
                    for what, x in (("memory", memory), ("time", time_of))
                ]
    report("autoplan", arguments, rows, bars=bars)


if __name__ == "__main__":
    main()
