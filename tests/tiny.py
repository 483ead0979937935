"""The smallest models of a few families, and what tests do with them: inputs, a loss, snapshots, training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
import zoo
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, Plan

VOCABULARY = zoo.VOCABULARY
BY_NAME = {family.name: family for family in zoo.FAMILIES}
#: Families that differ in layout: GQA, biases, packed and interleaved projections, Conv1D, cross attention, vision.
FAMILIES = ("Llama", "Qwen2", "GPT-2", "GPT-NeoX", "Phi-3", "T5 (gated)", "BERT (classifier)", "ViT")
DECODERS = ("Llama", "Qwen2", "GPT-2", "GPT-NeoX", "Phi-3")


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A small random model of a family of the zoo, in eval mode, with no tensor left at zeros or ones."""
    model = perturb(zoo.build(BY_NAME[name], BY_NAME[name].implementations[-1], seed)[0])
    if hasattr(model.config, "loss_type") and name == "GPT-2":
        model.config.loss_type = "ForCausalLMLoss"  # else its first call logs a warning, which breaks Dynamo's graph
    return model.to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
    """Six query heads in two KV groups, with changes to its configuration."""
    torch.manual_seed(seed)
    settings = {**BY_NAME["Llama"].sizes, "max_position_embeddings": 64, **changes}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).to(dtype).eval()


def inputs_of(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """One batch of what the family takes (the zoo's example); text decoders when no name is given."""
    if name is None:
        return {"input_ids": tokens()}
    torch.manual_seed(99)
    return zoo.example(BY_NAME[name], model)[1]


class Mlp(nn.Module):
    """Plain modules: two residual feed-forwards over `(…, 12)`, biases everywhere."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)}) for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.nn.functional.gelu(layer["up"](x)))
        return self.head(x)


def perturb(model: nn.Module) -> nn.Module:
    """Zero- and one-initialised tensors hide mistakes: give every parameter values of its own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int = 3, length: int = 9, seed: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def output_of(outputs: Any) -> Tensor:
    """The tensor that a user looks at: logits, or the first output."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def probe_loss(outputs: Any) -> Tensor:
    """A loss that weighs every output entry differently, so that no gradient cancels."""
    y = output_of(outputs).double()
    weights = torch.linspace(-1.0, 1.3, y.numel(), dtype=y.dtype).view(y.shape)
    return (y * weights).sum() + y.square().mean()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer of a module that sparsify has not touched."""
    found = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    return found | {n: b.detach().clone() for n, b in model.named_buffers(remove_duplicate=False)}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        same = torch.equal(found[name], tensor)
        assert same, f"{name} differs by {(found[name].double() - tensor.double()).abs().max():.2e}"


def state_of(host: nn.Module) -> dict[str, Tensor]:
    """The host's state dict in original names, shapes and order, trained parts folded in."""
    return {n: t.detach().clone() for n, t in host.sparsify.original_state_dict().items()}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def lower(model: nn.Module, *rules: Any, **options: Any) -> nn.Module:
    """`sparsify.compile` with a default rule that trains every kind of slice."""
    plan_fields = {k: options.pop(k) for k in ("seed", "check", "train") if k in options}
    rules = rules or (S2FT(fraction=0.1, producer_fraction=0.1, budget="structure"),)
    return sparsify.compile(model, Plan(list(rules), **plan_fields), progress=False, **options)


def train(host: nn.Module, steps: int = 3, lr: float = 1e-2, **inputs: Any) -> list[float]:
    """A few AdamW steps; returns the losses."""
    inputs = inputs or inputs_of(host)
    optimizer = torch.optim.AdamW(trainable(host), lr=lr)
    losses = []
    for _ in range(steps):
        loss = probe_loss(host(**inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def disturb(host: nn.Module, scale: float = 0.05, seed: int = 3) -> None:
    """Give the trained parameters new values without training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(host):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
