"""A small Llama, trained from nothing on the standard library's code, then adapted to docstrings, then generating.

    python examples/tiny_decoder.py

Bytes are the tokens, so no tokenizer is needed. Generation uses the KV cache, with the adapter on and off.
"""

from __future__ import annotations

import argparse

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import S2FT, Plan
from sparsify.demo.stdlib_text import code, prose

LENGTH, BATCH = 96, 16


def to_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int, lr: float, name: str) -> float:
    """Next-byte prediction on random windows; returns the mean loss of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    losses = []
    for step in tqdm(range(steps), desc=name, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([data[s : s + LENGTH] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, data: torch.Tensor) -> float:
    """Mean loss on fixed windows."""
    batch = data[: 16 * LENGTH].view(16, LENGTH)
    return model(input_ids=batch, labels=batch).loss.item()


def complete(model: LlamaForCausalLM, prompt: str, count: int = 60) -> str:
    """Greedy continuation with the KV cache."""
    out = model.generate(to_bytes(prompt)[None], max_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True)
    return bytes(out[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--fast", action="store_true", help="ten steps of each, on a smaller model")
    options = parser.parse_args()
    steps, width = (10, 64) if options.fast else (options.steps, 128)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config)
    print(f"a Llama with {sum(p.numel() for p in base.parameters()):,} parameters, from random weights")
    loss = train(base, to_bytes(code(400_000)), steps, 3e-3, "code, all weights")
    print(f"trained on code: loss {loss:.2f} per byte")

    text = to_bytes("\n".join(prose())[:400_000])
    docs, held_out = text[: -20 * LENGTH], text[-20 * LENGTH :]
    plan = Plan([S2FT(structure="ffn", fraction=0.1), S2FT(structure="attention", fraction=0.25)], seed=0)
    model = sparsify.compile(base, plan)
    model.sparsify.print_trainable_parameters()
    before = evaluate(model, held_out)
    train(model, docs, steps, 3e-3, "docstrings, S2FT")
    print(f"held-out docstrings: loss {before:.2f} before, {evaluate(model, held_out):.2f} after S2FT")

    prompt = "Return the "
    print(f"adapter on:  {complete(model, prompt)!r}")
    model.sparsify.set_adapter(None)
    print(f"adapter off: {complete(model, prompt)!r}")
    print(f"the base:    {complete(base, prompt)!r}")
    print(f"off is the base again: loss {evaluate(model, held_out):.4f} and {before:.4f}")


if __name__ == "__main__":
    main()
