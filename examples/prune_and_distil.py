"""Prune MiniLM to 75 % zeros and bring its embeddings back with SquareHead: no labels, a few minutes on a CPU.

    python examples/prune_and_distil.py --out runs/sparse

The dense model is the teacher: block by block, the sparse student learns to give the same hidden states. What remains is an ordinary
encoder with exact zeros, saved in a quarter of the bytes of its pruned weights, and as a dense checkpoint for everyone else.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import sparsify
from sparsify import Plan, Prune
from sparsify.demo.minilm import embed, load_encoder, load_tokenizer
from sparsify.demo.stdlib_text import prose
from sparsify.pruning.sparse_checkpoint import open_sparse
from sparsify.train.squarehead import Distiller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--fast", action="store_true", help="eight steps only")
    parser.add_argument("--out", type=Path, help="where checkpoints and the picture go (default: a temporary folder)")
    options = parser.parse_args()
    steps = 8 if options.fast else options.steps
    out = options.out or Path(tempfile.mkdtemp(prefix="sparsify-"))

    tokenizer, texts = load_tokenizer(), list(prose())
    batches = [
        dict(tokenizer(texts[i : i + 16], padding=True, truncation=True, max_length=40, return_tensors="pt"))
        for i in range(0, 16 * (8 + steps + 4), 16)
    ]
    calibration, training, held_out = batches[:8], batches[8:-4], batches[-4:]

    # One call: SparseGPT, layer by layer; the model that is passed in stays dense, so it can teach.
    teacher = load_encoder()
    student = sparsify.compile(teacher, Plan([Prune(sparsity=options.sparsity)]), calibration=calibration)
    print(next(line for line in student.sparsify.program.history if line.startswith("prune:")))
    student.sparsify.draw_pruning(out / "pruning.svg")

    def likeness() -> float:
        """Mean cosine of the student's and the teacher's embeddings of texts that neither pruning nor training has seen."""
        return F.cosine_similarity(embed(student, held_out), embed(teacher, held_out)).mean().item()

    print(f"after pruning:      cosine {likeness():.3f} to the dense embeddings")
    distiller = Distiller(student, teacher, ce=0, sq=1)  # with labels: ce=1
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    student.train()
    for batch in training:
        distiller(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()  # pruned entries stay exactly zero, whatever the optimizer
        optimizer.zero_grad()
        schedule.step()
    print(f"after {steps} steps: cosine {likeness():.3f}")

    print(student.sparsify.save_sparse(out / "model.sparse"))
    student.save_pretrained(out / "dense")  # the usual layout, with zeros
    again = open_sparse(out / "model.sparse").load_into(load_encoder())
    same = torch.equal(embed(again, held_out), embed(student, held_out))
    print(f"read back, same embeddings: {same}")


if __name__ == "__main__":
    main()
