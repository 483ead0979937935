"""Embeddings in PEFT's folders: rows (`trainable_token_indices` beside LoRA, and TRAINABLE_TOKENS alone), and LoRA of whole ones.

    <module>.token_adapter.trainable_tokens_delta (s, d)    beside LoRA, ids by module in `trainable_token_indices`
    <module>.trainable_tokens_delta (s, d)                  alone, ids of all modules in `token_indices`
    <module>.lora_embedding_A (r, v), lora_embedding_B (d, r)    LoRA: the change of the weight (v, d) is `s · Aᵀ Bᵀ`

In spite of its name the tensor of rows holds the rows themselves.
PEFT lets a head compute with the same rows where the configuration of the
model ties it to the input embedding; a head's bias it then leaves out, so a model that has one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.adapters.adapter import Delta
from sparsify.errors import AdapterError
from sparsify.model.linears import owner_name
from sparsify.model.tied_weights import FLAG

if TYPE_CHECKING:
    from jaxtyping import Float

    from sparsify.adapters.peft_format import Reading

PREFIX = "base_model.model."
BESIDE, ALONE = ".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta"


def is_rows(host: nn.Module, names: Mapping[str, Sequence[str]], delta: Delta) -> bool:
    """Whether a delta is of rows of an embedding."""
    owners = (host.get_submodule(owner_name(name)) for name in names[delta.param])
    return delta.kind == "row" and any(isinstance(module, nn.Embedding) for module in owners)


def rows_in_peft(host: nn.Module, names: Sequence[str], delta: Delta, base: Float[Tensor, "v d"]) -> tuple[str, Tensor]:
    """`(module, rows (s, d))` of trained rows. base: the weight before, in original coordinates.

    Raises AdapterError where PEFT would compute something else.
    """
    module = next(o for o in map(owner_name, names) if isinstance(host.get_submodule(o), nn.Embedding))
    reason = why_not(host, module, names)
    if reason is not None:
        raise AdapterError(f"export_lora: rows of {module} trained, and {reason}; merge() and save the whole model")
    old = base.index_select(0, delta.channels.to(base.device)).cpu()
    rows = old.float() + delta.values.cpu().float()
    return module, rows if delta.exact is None else torch.where(delta.exact.isnan(), rows, delta.exact.float())


def why_not(host: nn.Module, module: str, names: Sequence[str]) -> str | None:
    """Why PEFT's rows of an embedding would not be the model's; None where they are."""
    paths = [path for path, _ in host.named_modules(remove_duplicate=False)]
    if [path for path in paths if path.endswith(module)] != [module]:
        return "PEFT finds modules by the end of their names, of which this one has several"
    others = {
        id(m): m for name in names if (m := host.get_submodule(owner_name(name))) is not host.get_submodule(module)
    }
    if not others:
        return None
    if any(getattr(other, "bias", None) is not None for other in others.values()):
        return "the head that is tied to them has a bias, which PEFT leaves out"
    ask = getattr(host, "get_input_embeddings", None)
    tied = bool(getattr(getattr(host, "config", None), FLAG, False))
    if not tied or ask is None or ask() is not host.get_submodule(module) or len(others) > 1:
        return "PEFT would not know of what is tied to them (config.tie_word_embeddings of the input embedding and one head)"
    return None


def alone(base: str | None, rows: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """`adapter_config.json` of rows and nothing else. Raises AdapterError for modules with different tokens."""
    first = next(iter(rows.values()))
    if any(list(ids) != list(first) for ids in rows.values()):
        raise AdapterError(
            "export_lora: PEFT's TRAINABLE_TOKENS has one list of tokens for all modules, and different ones trained here; train them "
            "beside a LoRA, or merge() and save the whole model"
        )
    return {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": None,
        "base_model_name_or_path": base,
        "token_indices": list(first),
        "target_modules": sorted(rows),
        "init_weights": True,
        "inference_mode": True,
    }


# --- back ----------------------------------------------------------------------------------------------------------------


def module_of(name: str) -> str | None:
    """The module whose rows a tensor of a folder holds; None for other tensors."""
    for end in (BESIDE, ALONE):
        if name.endswith(end):
            return name.removesuffix(end)
    return None


def read_rows(reading: Reading, found: Mapping[str, str]) -> list[Delta]:
    """The changes of rows in a folder. found: module → name of its tensor."""
    tokens = reading.settings.tokens
    deltas = []
    for module, key in found.items():
        targets = [t for t in tokens if module == t or module.endswith(f".{t}") or not t]
        if not targets:
            raise reading.fail(f"the file has rows of {module}, which adapter_config.json does not name")
        deltas.append(read_one(reading, module, key, tokens[targets[0]]))
    for target in tokens:
        if not any(module == target or module.endswith(f".{target}") or not target for module in found):
            raise reading.fail(
                f"adapter_config.json names rows of {target or 'the embedding'}, and the file has none: it is incomplete"
            )
    return deltas


def read_one(reading: Reading, module: str, key: str, ids: Sequence[int]) -> Delta:
    try:
        owner = reading.host.get_submodule(module)
    except AttributeError:
        raise reading.fail(f"the model has no module {module!r}") from None
    param = reading.canonical.get(f"{module}.weight")
    if param is None or not isinstance(owner, nn.Embedding | nn.Linear):
        raise reading.fail(f"{module} is a {type(owner).__name__}, and rows are read of embeddings and heads")
    if isinstance(owner, nn.Linear) and owner.bias is not None:
        raise reading.fail(f"{module} has a bias, which PEFT leaves out where rows of a head are trained")
    reason = why_not(reading.host, module, reading.names[param]) if isinstance(owner, nn.Embedding) else None
    if reason is not None:
        raise reading.fail(f"rows of {module}: {reason}")
    part, shape = reading.file.parts[key], reading.shapes[param]
    reading.check_dtype(module, part)
    if tuple(part.shape) != (len(ids), shape[1]) or max(ids) >= shape[0]:
        raise reading.fail(
            f"{module} has {shape[0]} rows of {shape[1]} here; the file has {tuple(part.shape)} for tokens up to {max(ids)}"
        )
    if reading.base is None:
        raise reading.fail(f"rows of {module} are a change of the base, which is not at hand here")
    places = torch.tensor(sorted(ids), dtype=torch.int64)
    order = torch.tensor(ids).argsort()
    base = reading.base(param).detach().cpu()
    values = reading.finite(module, key).float().index_select(0, order)
    return Delta(param, "row", places, values - base.index_select(0, places).to(values.dtype))


# --- LoRA ----------------------------------------------------------------------------------------------------------------

SIDES = ("lora_embedding_A", "lora_embedding_B")


def embedding_factors(a: Float[Tensor, "r d"], b: Float[Tensor, "v r"]) -> dict[str, Tensor]:
    """Our factors, the scale in `b`, as PEFT's by leaf."""
    return dict(zip(SIDES, (b.t().contiguous(), a.t().contiguous()), strict=True))


def read_low_rank(reading: Reading, module: str) -> Delta:
    """The change of an embedding by its two factors. Raises AdapterError for what does not fit the model or the configuration."""
    try:
        owner = reading.host.get_submodule(module)
    except AttributeError:
        raise reading.fail(f"the model has no module {module!r}") from None
    keys = [f"{PREFIX}{module}.{side}" for side in SIDES]
    missing = [key for key in keys if key not in reading.file.parts]
    if missing or not isinstance(owner, nn.Embedding):
        raise reading.fail(
            f"{module}: {missing[0]} is missing" if missing else f"{module} is a {type(owner).__name__}, no embedding"
        )
    if module not in reading.settings.targets:
        raise reading.fail(
            f"the file has factors for {module}, which adapter_config.json does not name (target_modules)"
        )
    param = reading.canonical[f"{module}.weight"]
    if len({id(reading.host.get_submodule(owner_name(n))) for n in reading.names[param]}) > 1:
        raise reading.fail(
            f"{module} is adapted alone, but its weight is also another module's (tied): a change would change both"
        )
    shape, rank = reading.shapes[param], reading.settings.rank_of(module)
    for key, wanted in zip(keys, ((rank, shape[0]), (shape[1], rank)), strict=True):
        reading.check_dtype(module, reading.file.parts[key])
        if tuple(reading.file.parts[key].shape) != wanted:
            raise reading.fail(
                f"{module}: {key.rpartition('.')[2]} is {tuple(reading.file.parts[key].shape)}, expected {wanted}"
            )
    b, a = (reading.finite(module, key).float().t().contiguous() for key in keys)
    scale = reading.settings.scale_of(module)
    reading.check_sizes(module, a, b, scale)
    if reading.settings.residual:
        raise reading.fail(
            f"{module}: init_lora_weights is {reading.settings.residual!r}, which PEFT does not have for embeddings"
        )
    return Delta(param, "lora", torch.empty(0, dtype=torch.int64), b, False, a, scale)


__all__ = ["SIDES", "alone", "embedding_factors", "is_rows", "module_of", "read_low_rank", "read_rows", "rows_in_peft"]
