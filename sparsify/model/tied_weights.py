"""Tied weights in what leaves sparsify: equal sides are one tensor again, sides that differ are two, and the config says so.

    lm_head.weight ─┬─ model.embed_tokens.weight     one tensor, read under both names
    lowered for a target, unpacked                   two tensors: equal bit for bit (reordered), or not (rounded to int8, pruned)

transformers ties by `config.tie_word_embeddings` when it opens a file. With that left at True over two different tensors, what opens
depends on its version: so the copy has configs of its own that say False, and then every tied name holds a tensor of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

FLAG = "tie_word_embeddings"


def tied_groups(canonical: Mapping[str, str]) -> list[list[str]]:
    """Names of each tensor that has several. canonical: name → first name of the same tensor (`sparsify.program.canonical_names`)."""
    groups: dict[str, list[str]] = {}
    for name, first in canonical.items():
        groups.setdefault(first, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def different(groups: Sequence[Sequence[str]], values: Mapping[str, object]) -> list[list[str]]:
    """Groups of which `values` holds different tensors under some of the names; names that it does not hold do not count."""
    found = []
    for names in groups:
        held = [value for name in names if isinstance(value := values.get(name), Tensor)]
        if any(not same(held[0], other) for other in held[1:]):
            found.append(list(names))
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, which on the meta device is one tensor."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr()) or torch.equal(a, b.to(a.device))


def tie_again(model: nn.Module, groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Make every group one Parameter where its values are equal. Where those of one group are not, nothing stays tied, in the configs
    neither; returns the groups that differ."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups = [[name for name in names if name in parameters] for names in groups]
    torn = different(groups, parameters)
    if torn:
        separate_configs(model)
    for names in groups:
        for name in names[1:]:
            owner, _, leaf = name.rpartition(".")
            value = parameters[names[0]]
            if torn:  # a file of a model whose config ties nothing must hold every name
                value = nn.Parameter(parameters[name].detach().clone(), parameters[name].requires_grad)
            setattr(model.get_submodule(owner), leaf, value)
    return torn


def separate_configs(model: nn.Module) -> None:
    """Give every module whose config ties a copy of it that does not."""
    copies: dict[int, object] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, FLAG, False):
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                setattr(copies[id(config)], FLAG, False)
            module.__dict__["config"] = copies[id(config)]
        if module.__dict__.get("all_tied_weights_keys"):
            module.__dict__["all_tied_weights_keys"] = {}
