"""A fine-tuned model as one file that runs without sparsify: AOTInductor, free batch and length, an adapter exchanged after loading.

python examples/deploy.py --out deployed/
python examples/deploy.py --fast
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn
from torch.export import Dim

import sparsify
from sparsify import S2FT, LoRA, Plan

SHAPES = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}  # as for torch.export: any batch, any length


def decoder(fast: bool) -> nn.Module:
    width, layers = (64, 1) if fast else (256, 4)
    config = hf.LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return hf.LlamaForCausalLM(config)


def train(host: nn.Module, steps: int, seed: int) -> None:
    """Learn one random sequence by heart."""
    ids = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        host(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapter_of(host: nn.Module) -> dict[str, Tensor]:
    """What trains, under the names that an unfolded package knows it by."""
    return {name: p.detach().clone() for name, p in host.named_parameters() if p.requires_grad}


@torch.no_grad()
def difference(loaded: object, host: nn.Module) -> float:
    ids = torch.randint(0, 128, (3, 17))  # neither this batch nor this length was in the example
    return float((loaded(input_ids=ids)["logits"] - host(input_ids=ids, use_cache=False).logits).abs().max())  # type: ignore[operator]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("deployed"))
    options.add_argument("--fast", action="store_true")
    found = options.parse_args()
    torch.manual_seed(0)
    steps = 3 if found.fast else 30
    plan = Plan([S2FT(structure="ffn", fraction=0.05), LoRA(match="*.self_attn.*", rank=4)])
    host = sparsify.compile(decoder(found.fast), plan, progress=False)
    base = adapter_of(host)
    example = {"input_ids": torch.randint(0, 128, (2, 8))}
    # fold=False: the trained parts stay constants of their own in the file; fold=True (the default) puts them into the weights
    path = sparsify.package(host, found.out / "model.pt2", example, dynamic_shapes=SHAPES, fold=False)
    print(f"packaged: {path.stat().st_size / 2**20:.1f} MiB")
    loaded = torch._inductor.aoti_load_package(str(path))  # this line needs torch only, and there is one for C++
    print(f"the base's package equals the host within {difference(loaded, host):.1e}")
    train(host, steps, seed=1)
    loaded.load_constants(adapter_of(host), check_full_update=False)
    print(f"adapter exchanged: equals the trained host within {difference(loaded, host):.1e}")
    loaded.load_constants(base, check_full_update=False)
    host.sparsify.set_adapter(None)  # type: ignore[union-attr]
    print(f"back at the base: within {difference(loaded, host):.1e}")


if __name__ == "__main__":
    main()
