"""Weight decay and trained parts that hold values: they stay out of it.

    S2FT, PaCA (weight_slice), RoSA's S (sparse_values)    hold the *values* of their entries: decay pulls pretrained weights to 0
    LoRA, RoSA's A and B                                   hold the change: decay pulls the model to its base, as its authors mean it

    optimizer = AdamW(param_groups(model, lr=1e-3, weight_decay=0.1))        values in a group without decay
    trainer = keep_out_of_decay(Trainer(model=model, args=…))                the same for Trainer's own optimizer

A plain `AdamW(model.parameters(), weight_decay=…)` decays everything (torch's default is 0.01): nothing in a model can forbid it, so the
report says so. For an optimizer that is made elsewhere, pass `weight_decay=0`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from sparsify.errors import SparsifyError
from sparsify.modules.adapted import value_names

Trainer = TypeVar("Trainer")


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    sparse_lr: float | None = None,
    lora_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: what trains, by learning rate, and values of weights without weight decay.

    "sparse" RoSA's S (`sparse_lr`, no decay), "lora" low-rank factors (`lora_lr`, decay), "values" S2FT's and PaCA's channels (`lr`, no
    decay), "rest" everything else that trains (`lr`, decay). The rates default to `lr`; RoSA's paper has 2e-4 for S and 7e-4 for A, B.
    weight_decay: of the groups that have decay. model: a host, wrapped (DDP, `torch.compile`) or not.
    """
    values = {id(model.get_parameter(name)) for name in value_names(model)}
    named: dict[str, list[nn.Parameter]] = {"sparse": [], "lora": [], "values": [], "rest": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rates = getattr(model.get_submodule(name.rpartition(".")[0]), "rates", {})
        group = rates.get(name.rpartition(".")[2], "values" if id(parameter) in values else "rest")
        named[group].append(parameter)
    rates = {"sparse": lr if sparse_lr is None else sparse_lr, "lora": lr if lora_lr is None else lora_lr}
    decays = {"sparse": 0.0, "values": 0.0}
    return [
        {"params": ps, "lr": rates.get(group, lr), "weight_decay": decays.get(group, weight_decay), "name": group}
        for group, ps in named.items()
        if ps
    ]


def keep_out_of_decay(trainer: Trainer) -> Trainer:
    """Let a `transformers.Trainer` (TRL's, too), before it trains, leave values out of `args.weight_decay`; returns it.

    The optimizer that it makes has its two groups as always, so checkpoints resume. Raises SparsifyError when there is no such method, or
    when the optimizer is there already.
    """
    decays = getattr(trainer, "get_decay_parameter_names", None)
    if decays is None:
        raise SparsifyError(f"keep_out_of_decay: {type(trainer).__name__} is no transformers.Trainer")
    if getattr(trainer, "optimizer", None) is not None:
        raise SparsifyError(
            "keep_out_of_decay: the trainer has its optimizer already; call it before train(), or make the optimizer from "
            "sparsify.train.param_groups(model, lr=…, weight_decay=…)"
        )

    def without_values(model: nn.Module) -> list[str]:
        values = set(value_names(model))
        return [name for name in decays(model) if name not in values]

    trainer.get_decay_parameter_names = without_values  # type: ignore[attr-defined]
    return trainer
