"""Select rows: which tokens of which embeddings and heads train.

Tokens(ids=[7, 9])   ──▶  EmbeddingRows(embed_tokens.weight, (7, 9))    and of everything that is tied to it
                          HeadRows(lm_head.weight, (7, 9))              where the head is not
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx, nn

from sparsify.errors import PlanError, Refusal, RefusedError
from sparsify.methods.rows import EmbeddingRows, HeadRows
from sparsify.model.linears import is_conv1d, owner_name
from sparsify.passes.assign_rules import WHOLE, only_multiplies, why_not_trainable
from sparsify.passes.direct_reads import only_looks_at, read_past
from sparsify.plan import Tokens
from sparsify.plan.unmatched import nearest_module, unmatched_patterns
from sparsify.program import EmbeddingNode, LinearNode, Program


def select_rows(program: Program, index: int, rule: Tokens, taken: dict[str, int]) -> dict[str, Sequence[object]]:
    """What a rule of rows adds to the program; `taken` learns its weights.

    Raises PlanError when it matches nothing, and where a token lies beyond the vocabulary; RefusedError for a named module that
    cannot serve.
    """
    parts: list[HeadRows] = []
    refusals: list[Refusal] = []
    candidates = dict(weights_with_rows(program))
    owners = {param: [owner_name(n) for n in program.names_of(param)] for param in candidates}
    chosen = models_own(program, candidates) if rule.patterns == ("*",) else None
    found = [p for p in candidates if (p in chosen if chosen is not None else rule.matches(*owners[p]))]
    for param in found:
        where = owner_name(param) or param
        reason = why_taken(taken, param) or why_not_rows(program, param)
        if reason is None:
            parts.append(rows_of(program, index, rule, param, candidates[param]))
            taken[param] = index
        elif rule.is_named(*owners[param]):
            raise RefusedError(f"rule {index}, {rule}: {Refusal(where, reason)}")
        else:
            refusals.append(Refusal(where, reason))
    if not parts:
        every = [name for names in owners.values() for name in names]
        if refusals:
            raise PlanError(f"rule {index}, {rule}, serves nothing: " + "; ".join(map(str, refusals[:3])))
        if not every:
            raise PlanError(
                f"rule {index}, {rule}, matches nothing: the captured graph looks no rows up (no nn.Embedding)"
            )
        raise PlanError(
            f"rule {index}, {rule}, matches no embedding and no head{nearest_module(rule.patterns[0], every)}"
        )
    if chosen is None:
        refusals += unmatched_patterns(index, rule, [name for names in owners.values() for name in names])
    return {"parts": parts, "refusals": refusals}


def weights_with_rows(program: Program) -> Iterator[tuple[str, type[HeadRows]]]:
    """Every weight of an embedding, and every one of a linear, with the kind of part that trains rows of it."""
    held = program.host.named_modules(remove_duplicate=False)
    names = (f"{path}.weight".lstrip(".") for path, module in held if isinstance(module, nn.Embedding))
    embedded = dict.fromkeys(program.aliases[name] for name in names if name in program.aliases)
    yield from ((param, EmbeddingRows) for param in embedded)
    for param in dict.fromkeys(linear.weight for linear in program.linears()):
        if param not in embedded and program.tensor(param).dim() == 2:
            yield param, HeadRows


def models_own(program: Program, candidates: dict[str, type[HeadRows]]) -> set[str]:
    """The weights of the model's input embedding and output head; of a model that names none all embeddings."""
    held = {id(p): name for name, p in program.host.named_parameters()}
    found: set[str] = set()
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(program.host, ask)()
        except (AttributeError, NotImplementedError):
            continue
        weight = getattr(module, "weight", None)
        found |= {held[id(weight)]} if id(weight) in held else set()
    return found & set(candidates) or {param for param, kind in candidates.items() if kind is EmbeddingRows}


def why_taken(taken: dict[str, int], param: str) -> str | None:
    if param not in taken:
        return None
    return "it trains in full (Plan(train=…))" if taken[param] == WHOLE else f"rule {taken[param]} already trains it"


def why_not_rows(program: Program, param: str) -> str | None:
    """Why no rows of a weight can train in place, or None if some can."""
    if param in program.quantize:
        return f"it is packed ({program.quantize[param]}), and rows train in a dense weight"
    if param in program.masks:
        return "entries of it are pruned, and rows of a masked embedding are not kept"
    weight = program.tensor(param)
    if weight.dim() != 2 or not weight.is_floating_point():
        return f"its weight is {weight.dtype}, with {weight.dim()} dimensions"
    linears: dict[str, list[LinearNode]] = {}
    for linear in program.linears():
        linears.setdefault(linear.weight, []).append(linear)
    owners = [program.host.get_submodule(owner_name(name)) for name in program.names_of(param)]
    if not any(isinstance(owner, nn.Embedding) for owner in owners):
        return "a Conv1D is no head of tokens" if is_conv1d(owners[0]) else why_not_trainable(program, param, linears)
    lookups = [lookup for lookup in program.embeddings() if lookup.weight == param]
    products = linears.get(param, [])
    return (
        next(filter(None, (why_not_module(program, name, products) for name in program.names_of(param))), None)
        or (None if lookups else "no look-up of the captured graph reads it")
        or why_not_read(program, param, lookups, products)
        or read_past(program, param)
    )


def why_not_read(program: Program, param: str, lookups: list[EmbeddingNode], products: list[LinearNode]) -> str | None:
    """Whether look-ups and matrix products, each in the forward of its own module, are all that reads a weight."""
    paths = {owner_name(n) for n in program.names_of(param)}
    known = {x.node for x in lookups} | {x.node for x in products}
    placeholder = program.placeholder(param)
    for reader in placeholder.users if placeholder is not None else ():
        if reader not in known and not all(user in known for user in reader.users):
            return f"the weight is also read by node {reader.name} ({reader.target})"
    for node in known:
        inside = innermost(node)
        if inside is not None and inside not in paths:
            return f"the weight is read by the forward of '{inside}' directly, not by its own module (node {node.name})"
    return None


def innermost(node: fx.Node) -> str | None:
    """The module in whose forward a node was traced; None where the graph does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0].split("@")[0] if stack else None


def why_not_module(program: Program, name: str, products: list[LinearNode]) -> str | None:
    """Why one of the modules that hold the weight cannot carry rows."""
    module = program.host.get_submodule(owner_name(name))
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "max_norm rescales rows of the weight when they are looked up, frozen ones too"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq divides gradients by how often a token came, which partial rows do not"
        return (
            None
            if goes_on_from_lookup(type(module))
            else f"the forward of {type(module).__name__} does more than look rows up"
        )
    if type(module).forward is nn.Linear.forward:
        return None
    if isinstance(module, nn.Linear) and only_multiplies(program, [name], products):
        return None
    return f"it is tied to a {type(module).__name__}, whose own forward would be lost"


def goes_on_from_lookup(kind: type[nn.Embedding]) -> bool:
    """Whether a class of embeddings looks up by `nn.Embedding.forward`: its own, or called by `super().forward` (scaled embeddings)."""
    for base in kind.__mro__:
        if base is nn.Embedding:
            return True
        forward = base.__dict__.get("forward")
        if forward is None:
            continue
        code = getattr(forward, "__code__", None)
        if code is None or not {"super", "forward"} <= set(code.co_names) or not only_looks_at(code, "weight"):
            return False
    return False


def rows_of(program: Program, index: int, rule: Tokens, param: str, kind: type[HeadRows]) -> HeadRows:
    """The part. Raises PlanError for a token beyond the rows."""
    count = program.tensor(param).shape[0]
    if rule.new is not None and rule.new > count:
        raise PlanError(f"rule {index}, {rule}: {owner_name(param)} has {count:,} rows")
    ids = tuple(sorted(rule.ids)) if rule.new is None else tuple(range(count - rule.new, count))
    if ids[-1] >= count:
        raise PlanError(
            f"rule {index}, {rule}: token {ids[-1]} is beyond the {count:,} rows of {owner_name(param)}; call "
            "resize_token_embeddings(len(tokenizer)) before compile"
        )
    return kind(param, 0, -1, len(ids), "row", ids, places=ids, rule=index)


__all__ = ["goes_on_from_lookup", "select_rows", "why_not_rows"]
