"""The methods of the lifecycle suite. A new method joins with one line of METHODS."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA, Tokens

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from write_a_method import DoRA


@dataclass(frozen=True)
class Case:
    """A rule, or several; why PEFT cannot hold it (a pattern), or "" where the export is exact; the module that registers it; the model's family."""

    rule: Any
    refusal: str = ""
    module: str = ""
    family: str = "Llama"


METHODS = {
    "S2FT": Case(S2FT(fraction=0.2, producer_fraction=0.1, budget="structure")),
    "PaCA": Case(PaCA(rank=3)),
    "RoSA": Case(RoSA(rank=2, density=0.03, mask="random"), "has a sparse part of"),
    "LoRA": Case(LoRA(rank=2)),
    "DoRA": Case(DoRA(rank=2), module="write_a_method"),
    "Tokens": Case([Tokens(ids=[5, 3, 17, 28]), LoRA(rank=2, match="q_proj")], family="tied Llama"),
    "LoRA of embeddings": Case(LoRA(rank=2, match=["embed_tokens", "q_proj"])),
    "S2FT of experts": Case(S2FT(structure="ffn", units=3), "has trained columns of packed experts", family="Mixtral"),
    "RoSA of experts": Case(
        RoSA(rank=2, density=0.03, mask="random", match="*.experts.*"), "sparse part", family="Mixtral"
    ),
}


@functools.cache
def family(name: str) -> nn.Module:
    if name == "Llama":
        return tiny.perturb(tiny.llama(num_hidden_layers=1))
    if name == "tied Llama":
        return tiny.perturb(tiny.llama(num_hidden_layers=1, tie_word_embeddings=True))
    return tiny.build(name)


def base(name: str) -> nn.Module:
    """The model that a method's hosts were compiled from, one block of a Llama or a small one with packed experts; never write to it."""
    return family(METHODS[name].family)


def plan(name: str, **fields: Any) -> Plan:
    rule = METHODS[name].rule
    return Plan(rule if isinstance(rule, list) else [rule], **fields)


@functools.cache
def shared(name: str) -> nn.Module:
    return sparsify.compile(base(name), plan(name), progress=False)


def compiled(name: str, seed: int | None = None) -> Any:
    """A host of a method, a copy of its own; with other trained values for every seed."""
    host = copy.deepcopy(shared(name))
    if seed is not None:
        tiny.disturb(host, 0.1, seed)
    return host


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return tiny.output_of(model(**tiny.inputs_of(model))).clone()


def copied(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def weights(host: Any) -> dict[str, Tensor]:
    """What a plain model with the host's function holds."""
    return {n: t.detach().clone() for n, t in host.sparsify.plain().state_dict().items()}


def with_weights(name: str, state: dict[str, Tensor]) -> nn.Module:
    plain = copy.deepcopy(base(name))
    plain.load_state_dict(state)
    return plain


def trained(host: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}


FRESH = """
import sys, torch
sys.path[:0] = {paths!r}
import lifecycle_cases as cases
for name in {names!r}:
    host = cases.compiled(name)
    host.sparsify.load_adapter(f"{folder}/{{name}}", "a")
    host.sparsify.set_adapter("a")
    torch.save({{"output": cases.output(host), "trained": cases.trained(host)}}, f"{folder}/{{name}}.pt")
"""

__all__ = ["FRESH", "METHODS", "Plan", "base", "compiled", "output", "sparsify", "trained", "weights", "with_weights"]
