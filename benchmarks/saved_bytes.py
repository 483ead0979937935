"""How many bytes live between forward and backward: eager, with AOTAutograd's own partition, and with `backend="sparsify"`?

    python benchmarks/saved_bytes.py --save

Counted, not timed: every storage that autograd keeps, once and in full, parameters and buffers left out, on a small Llama with grouped
queries whose gradient is carried to the embeddings. The proportions are Llama-3-8B's (hidden 3.5 ×, four query heads per group).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sparsify
from benchmarks.harness import begin, mib, parser, report, saved_for_backward
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA

RULES = {
    "S2FT 3 %": S2FT(fraction=0.03),
    "PaCA r=16": PaCA(rank=16),
    "LoRA r=8": LoRA(rank=8),
    "RoSA r=8 0.6 %": RoSA(rank=8, density=0.006, mask="random"),
}


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--width", type=int, default=512)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--methods", nargs="+", choices=list(RULES), default=list(RULES))
    found = made.parse_args(arguments)
    if found.fast:
        found.width, found.layers, found.tokens, found.methods = 64, 2, 16, ["S2FT 3 %"]
    return found


def build(arguments: argparse.Namespace) -> torch.nn.Module:
    import transformers as hf

    width = arguments.width
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=max(512, arguments.tokens),
    )
    return hf.LlamaForCausalLM(config).to(arguments.device)


def saved_bytes(host: Any, how: Any, ids: torch.Tensor) -> int:
    """Bytes kept by one forward through the decoder layers, up to the last hidden state."""
    torch._dynamo.reset()
    run = host.model if how is None else torch.compile(host.model, backend=how, fullgraph=True)
    embedded = host.model.embed_tokens(ids).detach().requires_grad_()
    with saved_for_backward([*host.parameters(), *host.buffers(), embedded]) as saved:
        y = run(inputs_embeds=embedded, use_cache=False).last_hidden_state
    y.sum().backward()  # the graph must live until here, or storages are freed and counted twice
    return saved.bytes


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    found = options(arguments)
    begin(found)
    base = build(found)
    ids = torch.randint(0, 512, (1, found.tokens), device=found.device)
    rows = []
    for name in found.methods:
        host = sparsify.compile(base, Plan([RULES[name]]), progress=False).train()
        ways = {"eager": None, "aot_eager": "aot_eager", "sparsify": sparsify.backend("aot_eager")}
        counted = {way: saved_bytes(host, how, ids) for way, how in ways.items()}
        rows.append(
            {
                "method": name,
                **{f"{way} MiB": mib(count) for way, count in counted.items()},
                "over eager": counted["sparsify"] / counted["eager"],
                "over aot_eager": counted["sparsify"] / counted["aot_eager"],
            }
        )
    return report("saved_bytes", found, rows)


if __name__ == "__main__":
    main()
