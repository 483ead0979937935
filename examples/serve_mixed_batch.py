"""One batch, an adapter for every row: three tasks over one base that is never written to.

    python examples/serve_mixed_batch.py

Three adapters of different methods are trained for a few steps on a small random decoder, each to answer with one token; then one
`generate` serves all of them and the base together, and a second one runs at the same time in another thread.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan

METHODS = {"threes": S2FT(0.2), "fours": PaCA(8), "fives": LoRA(8)}


def train(base: torch.nn.Module, rule: Any, token: int, steps: int) -> Any:
    """An adapter that answers every prompt with one token."""
    model: Any = sparsify.compile(base, Plan([rule]), progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = torch.randint(6, 64, (8, 12), generator=torch.Generator().manual_seed(token))
    labels = torch.full_like(ids, token)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in METHODS}
        for token, (name, rule) in enumerate(METHODS.items(), 3):
            train(base, rule, token, steps).sparsify.save_adapter(folders[name])
        host: Any = sparsify.serve(base, folders, slots=2, budget="16MiB")  # two live at once, the third on call
        prompt = torch.randint(6, 64, (1, 6))
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

        def ask(names: list[str]) -> None:
            answers = host.generate(input_ids=prompt.repeat(len(names), 1), adapter_names=names, **settings)[:, 6:]
            for name, answer in zip(names, answers.tolist(), strict=True):
                print(f"{name:9} {answer}")

        ask(["threes", "fours", "__base__"])
        other = threading.Thread(target=ask, args=(["fives", "fives"],))
        other.start()
        ask(["threes"])
        other.join()
        try:
            ask(["sixes"])
        except sparsify.AdapterError as error:
            print(f"refused: {error}")
        print(host.sparsify.report)


if __name__ == "__main__":
    main()
