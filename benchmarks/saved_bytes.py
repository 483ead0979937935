"""How many bytes live between forward and backward: eager, with AOTAutograd's own partition, and with `backend="sparsify"`?

    python benchmarks/saved_bytes.py --families llama t5 gpt2 bert --save

Counted, not timed: every storage that autograd keeps, once and in full, parameters and buffers left out, on small models whose gradient
is carried to the embeddings. Llama has grouped queries and the proportions of Llama-3-8B (hidden 3.5 ×, four query heads per
group); T5 is an encoder with a gated GELU (hidden 3.5 ×), GPT-2 and BERT have hidden 4 ×. Dropout is off.
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


FAMILIES = ("llama", "t5", "gpt2", "bert")


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--width", type=int, default=512)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--families", nargs="+", choices=FAMILIES, default=["llama"])
    made.add_argument("--methods", nargs="+", choices=list(RULES), default=list(RULES))
    found = made.parse_args(arguments)
    if found.fast:
        found.width, found.layers, found.tokens, found.methods = 64, 2, 16, ["S2FT 3 %"]
    return found


def build(family: str, arguments: argparse.Namespace) -> torch.nn.Module:
    """A model without a head, of `arguments.layers` layers."""
    import transformers as hf

    width, layers, positions = arguments.width, arguments.layers, max(512, arguments.tokens)
    if family == "llama":
        config: Any = hf.LlamaConfig(
            hidden_size=width,
            intermediate_size=7 * width // 2,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=positions,
        )
        model: Any = hf.LlamaModel(config)
    elif family == "t5":
        sizes = {"d_model": width, "d_ff": 7 * width // 2, "d_kv": width // 8, "num_layers": layers, "num_heads": 8}
        config = hf.T5Config(**sizes, vocab_size=512, dropout_rate=0.0, feed_forward_proj="gated-gelu")
        model = hf.T5EncoderModel(config)
    elif family == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 8, "n_positions": positions, "vocab_size": 512}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        model = hf.GPT2Model(hf.GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    else:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        more = {"num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": positions}
        config = hf.BertConfig(**sizes, **more, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = hf.BertModel(config, add_pooling_layer=False)
    return model.to(arguments.device)


def saved_bytes(host: Any, how: Any, ids: torch.Tensor) -> int:
    """Bytes kept by one forward through the decoder layers, up to the last hidden state."""
    torch._dynamo.reset()
    run = host if how is None else torch.compile(host, backend=how, fullgraph=True)
    embedded = torch.nn.functional.embedding(ids, host.get_input_embeddings().weight).detach().requires_grad_()
    switches = {"use_cache": False} if host.config.model_type in ("llama", "gpt2") else {}
    with saved_for_backward([*host.parameters(), *host.buffers(), embedded]) as saved:
        y = run(inputs_embeds=embedded, **switches).last_hidden_state
    y.sum().backward()  # the graph must live until here, or storages are freed and counted twice
    return saved.bytes


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    found = options(arguments)
    begin(found)
    ids = torch.randint(0, 512, (1, found.tokens), device=found.device)
    rows = []
    for family in found.families:
        base = build(family, found)
        for name in found.methods:
            host = sparsify.compile(base, Plan([RULES[name]]), progress=False).train()
            ways = {"eager": None, "aot_eager": "aot_eager", "sparsify": sparsify.backend("aot_eager")}
            counted = {way: saved_bytes(host, how, ids) for way, how in ways.items()}
            rows.append(
                {
                    "model": family,
                    "method": name,
                    **{f"{way} MiB": mib(count) for way, count in counted.items()},
                    "over eager": counted["sparsify"] / counted["eager"],
                    "over aot_eager": counted["sparsify"] / counted["aot_eager"],
                }
            )
    return report("saved_bytes", found, rows)


if __name__ == "__main__":
    main()
