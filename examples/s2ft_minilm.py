"""The smallest useful S2FT run: two sentences, one pretrained encoder, a few steps, an adapter on disk.

    python examples/s2ft_minilm.py --out adapter

Teaches MiniLM that a question and its answer belong together, by training 0.8 % of its weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import sparsify
from sparsify import S2FT, Plan
from sparsify.demo.minilm import load_encoder, load_tokenizer, mean_pool

PAIRS = [
    ("how do I open a file", "open() returns a file object; use it in a with statement"),
    ("how do I sort a list", "list.sort() sorts in place, sorted() returns a new list"),
    ("how do I start a thread", "create a Thread object and call its start() method"),
    ("how do I parse a date", "datetime.strptime() reads a date with a format string"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--fast", action="store_true", help="five steps only")
    parser.add_argument("--out", type=Path, help="where the adapter goes (default: a temporary folder)")
    options = parser.parse_args()
    steps = 5 if options.fast else options.steps

    # One call: find the coupled heads and channels, bring the chosen ones together, train nothing else.
    plan = Plan([S2FT(structure="ffn", fraction=0.03), S2FT(structure="attention", fraction=0.1)], seed=0)
    model = sparsify.compile(load_encoder(), plan)
    print(model.sparsify.report)
    model.sparsify.print_trainable_parameters()

    # Any training loop works: the trained slices are ordinary parameters.
    tokenizer = load_tokenizer()
    batch = tokenizer([text for pair in PAIRS for text in pair], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    target = torch.arange(len(PAIRS))
    model.train()
    for step in range(steps):
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        vectors = F.normalize(mean_pool(hidden, batch["attention_mask"]), dim=-1)
        similarity = vectors[0::2] @ vectors[1::2].T
        loss = F.cross_entropy(similarity / 0.5, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            print(
                f"step {step + 1}: loss {loss.item():.3f}, similarity of the pairs {similarity.diagonal().mean():.2f}"
            )

    out = options.out or Path(tempfile.mkdtemp(prefix="sparsify-"))
    model.sparsify.save_adapter(out)
    print(f"adapter in {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
