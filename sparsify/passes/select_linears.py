"""Select for single linears: PaCA's shared column sets, RoSA's supports, LoRA's ranks, and which weights are quantised.

PaCA(rank=16)  over q, k, v of one layer   ──▶  ChannelChoice((q, k, v), channels=(3, 17, …))
RoSA(…)        over down_proj              ──▶  SparseLowRank(down_proj, index=(…), rank=16)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from sparsify.calibration.checks import check_weights, column_squares, rows_of, squares_of
from sparsify.calibration.fisher import sample_squares
from sparsify.calibration.ranks import of_first_rank, sum_over_ranks
from sparsify.calibration.statistics import batch_count, given, gradient_statistics, input_squares, need_batches
from sparsify.errors import PlanError, Refusal, RefusedError
from sparsify.formats import format_named
from sparsify.methods.lowrank_conv import LowRankKernels
from sparsify.methods.lowrank_embedding import LowRankRows
from sparsify.methods.partial_conv import KernelColumns
from sparsify.methods.registry import method_of
from sparsify.methods.sparse_lowrank import SparseLowRank
from sparsify.model.convolutions import why_not_convolution
from sparsify.model.linears import is_conv1d, owner_name
from sparsify.model.task_heads import head_parameters, output_parameters
from sparsify.passes.assign_rules import WHOLE, why_not_trainable
from sparsify.passes.base import Context
from sparsify.passes.direct_reads import read_past
from sparsify.passes.select_rows import why_not_rows
from sparsify.plan import LinearRule, LoRA, PaCA, Quantize, RoSA, pattern_value
from sparsify.plan.name_patterns import REGEX, matches
from sparsify.plan.unmatched import nearest_module, unmatched_patterns
from sparsify.program import ChannelChoice, LinearNode, Program, UnitChoice
from sparsify.program.selection import choose, generator, index_dtype, random_scores, unit_channels

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sparsify.program.structure import Structure
    from sparsify.program.values import Batch

VIEWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "view",
        "reshape",
        "_unsafe_view",
        "alias",
        "detach",
        "clone",
        "contiguous",
        "to",
        "_to_copy",
        "flatten",
        "dropout",
    )
)


def first_linears(program: Program) -> dict[str, LinearNode]:
    """One matrix product per weight, in graph order."""
    found: dict[str, LinearNode] = {}
    for linear in program.linears():
        found.setdefault(linear.weight, linear)
    return found


def serve(
    program: Program, index: int, rule: LinearRule, linears: dict[str, LinearNode], taken: Mapping[str, int]
) -> tuple[list[str], list[Refusal]]:
    """Weights that a rule gets, and what it matched but cannot have. Raises when it serves nothing."""
    by_weight: dict[str, list[LinearNode]] = {}
    for linear in program.linears():
        by_weight.setdefault(linear.weight, []).append(linear)
    served, refusals = [], []
    clashes, everything, named = [], [], False
    heads = head_parameters(program.host) if isinstance(rule, Quantize) else output_parameters(program.host)
    for param in (*linears, *other_weights(program, linears)):
        names = [owner_name(n) for n, canonical in program.aliases.items() if canonical == param]
        if param in linears:
            everything += names
        if not rule.matches(*names) or (param not in linears and not says_so(rule, names)):
            continue
        everything += [] if param in linears else names
        named |= rule.is_named(*names)
        where = owner_name(param) or param
        if param in heads and rule.exclude and not rule.is_named(*names):
            refusals.append(
                Refusal(where, "it belongs to the output head; name it in match=…, or pass exclude=(), to take it")
            )
            continue
        if taken.get(param) == WHOLE:
            refusals.append(Refusal(where, "it trains in full (Plan(train=…))"))
            continue
        if param in taken:
            clashes.append(f"rule {taken[param]} already has {owner_name(param)}")
            continue
        if param in linears:
            reason = why_not_trainable(program, param, by_weight)
            reason = reason or why_not_fitting(program, linears[param], rule)
        elif isinstance(program.host.get_submodule(owner_name(param)), torch.nn.Embedding):
            reason = why_not_embedding(program, param, rule)
        else:
            reason = why_not_kernels(program, param, rule)
        if reason is None:
            served.append(param)
        else:
            refusals.append(Refusal(where, reason))
    if named and refusals:
        raise RefusedError(f"rule {index}, {rule}: {refusals[0]}")
    if not served:
        if refusals:
            raise PlanError(f"rule {index}, {rule}, serves nothing: " + "; ".join(map(str, refusals[:3])))
        if clashes:
            raise PlanError(
                f"rule {index}, {rule}, serves nothing: {clashes[0]}, and a module takes one rule that trains it"
            )
        names = [owner_name(p) for p in linears]
        if not names:
            raise PlanError(
                f"rule {index}, {rule}, matches nothing: the captured graph of {type(program.host).__name__} multiplies with no weight "
                "of its own (no nn.Linear and no Conv1D is in it)"
            )
        raise PlanError(f"rule {index}, {rule}, matches no linear{nearest_module(rule.patterns[0], names)}")
    return served, refusals + unmatched_patterns(index, rule, everything)


def other_weights(program: Program, linears: Mapping[str, LinearNode]) -> list[str]:
    """Weights of embeddings and convolutions that no matrix product reads; a rule has to say so to train them."""
    held, kinds = program.host.named_modules(remove_duplicate=False), torch.nn.Embedding | _ConvNd
    names = (f"{path}.weight".lstrip(".") for path, module in held if isinstance(module, kinds))
    return [p for p in dict.fromkeys(program.aliases[n] for n in names if n in program.aliases) if p not in linears]


def says_so(rule: LinearRule, names: Sequence[str]) -> bool:
    """Whether a pattern that matches speaks of the module itself: the last word of a name (`*.embed_tokens`), not `*` or `re:…`."""
    words = [p for p in rule.patterns if any(matches(p, n) for n in names) and not p.startswith(REGEX)]
    return any(p.rpartition(".")[2].strip("*?") for p in words)


def why_not_embedding(program: Program, param: str, rule: LinearRule) -> str | None:
    """Why a rule cannot train an embedding that it names; None if it can."""
    if isinstance(rule, PaCA):
        return "the input columns of an embedding are its tokens: Tokens(ids=[…]) trains single ones"
    if isinstance(rule, RoSA) or not isinstance(rule, LoRA):
        return f"{type(rule).__name__} has no form for embeddings: LoRA and Tokens have"
    if pattern_value(rule.rank, owner_name(param)) is None:
        return "no pattern of rank names it"
    return why_not_rows(program, param) or why_not_alone(program, param)


def why_not_kernels(program: Program, param: str, rule: LinearRule) -> str | None:
    """Why a rule cannot train a convolution that it names; None if it can."""
    if not isinstance(rule, LoRA | PaCA):
        return f"{type(rule).__name__} has no form for convolutions: LoRA and PaCA have"
    if isinstance(rule, PaCA) and rule.select not in ("random", "weight"):
        return (
            f"select={rule.select!r} needs inputs or gradients of linears; of convolutions 'random' and 'weight' choose"
        )
    rank, weight = pattern_value(rule.rank, owner_name(param)), program.tensor(param)
    if rank is None:
        return "no pattern of rank names it"
    if isinstance(rule, PaCA) and rank >= weight.shape[1]:
        return f"rank {rank}, and it has {weight.shape[1]} input channels: give it a smaller rank, or another rule"
    if rank > max(weight.shape[0], weight[0].numel(), ALWAYS_TAKEN):
        return f"rank {rank} is more than its weight {tuple(weight.shape)} can hold"
    if not weight.is_floating_point() or not weight.is_contiguous():
        return f"its weight is {weight.dtype}" + ("" if weight.is_contiguous() else ", in channels-last memory")
    nodes = {found.node: found for found in program.convolutions() if found.weight == param}
    placeholder = program.placeholder(param)
    other = next((user for user in (placeholder.users if placeholder is not None else ()) if user not in nodes), None)
    return (
        why_not_convolution(program.host.get_submodule(owner_name(param)))
        or (f"the weight is also read by node {other.name} ({other.target})" if other is not None else None)
        or (None if nodes else "no convolution of the captured graph reads it")
        or why_not_alone(program, param)
        or read_past(program, param)
    )


def why_not_alone(program: Program, param: str) -> str | None:
    if len({id(program.host.get_submodule(owner_name(n))) for n in program.names_of(param)}) > 1:
        return f"the weight is tied: {', '.join(sorted(program.names_of(param)))}"
    return None


#: ranks that are taken whatever the size of the weight: one rank for all linears of a model may exceed its narrow ones
ALWAYS_TAKEN = 256


def why_not_fitting(program: Program, linear: LinearNode, rule: LinearRule) -> str | None:
    """Why a weight that can train cannot have what this rule asks for, said before anything is allocated."""
    module, weight = owner_name(linear.weight), program.tensor(linear.weight)
    if isinstance(rule, PaCA):
        rank, width = pattern_value(rule.rank, module), weight.shape[linear.in_axis]
        if rank is not None and rank >= width:
            return f"rank {rank} for {module}, which has {width} input columns: give it a smaller rank, or another rule"
    if isinstance(rule, RoSA | LoRA):
        rank, larger = pattern_value(rule.rank, module), max(weight.shape)
        if rank is not None and rank > max(larger, ALWAYS_TAKEN):
            return f"rank {rank} is more than the larger side of its weight, {larger}; {min(weight.shape)} is all that it can hold"
        kept = program.masks.get(linear.weight)
        if isinstance(rule, RoSA) and not rank and kept is not None and not bool(kept.any()):
            return "every entry of the weight is pruned, so no entry can train"
    if linear.offsets is not None:
        reason = why_not_experts(rule)
        if reason is not None:
            return reason
    method = method_of(rule)
    if method is not None:
        return method.part.why_not(rule, program, linear)
    return why_not_packed(program, linear.weight, weight, rule.format) if isinstance(rule, Quantize) else None


def why_not_experts(rule: LinearRule) -> str | None:
    """Why a rule cannot have the weight of packed experts; None if it can."""
    if isinstance(rule, Quantize):
        return "packed experts are not quantised: no format here has a grouped product"
    if isinstance(rule, RoSA) and rule.mask == "fisher":
        return "mask='fisher' needs gradients by sample, and rows of packed experts are sorted by expert; mask='gradient' serves"
    if method_of(rule) is not None:
        return f"{type(rule).__name__} trains matrices, and this weight is one per expert, packed"
    return None


def why_not_packed(program: Program, param: str, weight: Float[Tensor, "rows columns"], format: str) -> str | None:
    """Why a weight cannot be stored in `format`."""
    if param in program.bases:
        return f"it is packed already, by {program.bases[param].library} ({program.quantize[param]})"
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"the weight is stored as {weight.dtype}, and {format} is made from 16, 32 or 64 bits"
    if weight.device.type == "meta" or not weight.numel():
        return None if weight.numel() else "the weight has no entries"
    largest = weight.detach().abs().amax(dim=1).float()
    if not bool(torch.isfinite(largest).all()):
        return "the weight has NaN or Inf"
    return format_named(format).why_not(weight)


def select_linears(
    program: Program, context: Context, index: int, rule: LinearRule, taken: dict[str, int]
) -> dict[str, Sequence[object]]:
    """What one linear rule that trains adds to the program; `taken` learns its weights."""
    linears = first_linears(program)
    if method_of(rule) is None and not isinstance(rule, PaCA | RoSA | LoRA):
        name = type(rule).__name__
        raise PlanError(
            f"rule {index}, {rule}: no method is registered for {name}; call sparsify.methods.register({name}, …)"
        )
    served, refusals = serve(program, index, rule, linears, taken)
    changes: dict[str, Sequence[object]] = {"refusals": refusals}
    taken.update(dict.fromkeys(served, index))
    others = [param for param in served if param not in linears]
    served = [param for param in served if param in linears]
    if isinstance(rule, PaCA):
        units, channels = choose_columns(program, context, index, rule, served, linears)
        changes["choices"], changes["channel_choices"] = units, channels
        changes["parts"] = [kernel_columns(program, context, index, rule, param) for param in others]
    elif isinstance(rule, RoSA | LoRA):
        parts: list[SparseLowRank] = choose_supports(program, context, index, rule, served, refusals)
        if isinstance(rule, LoRA):
            parts += [low_rank_part(program, index, rule, param) for param in others]
        changes["parts"] = parts
    else:
        method = method_of(rule)
        assert method is not None
        changes["parts"] = [method.part.from_rule(rule, index, program, linears[param]) for param in served]
    return changes


def select_packed(
    program: Program, index: int, rule: Quantize, taken: dict[str, int]
) -> tuple[list[str], list[Refusal]]:
    """Weights that a rule packs, and why others are not."""
    return serve(program, index, rule, first_linears(program), taken)


# --- PaCA ----------------------------------------------------------------------------------------------------------------


def input_root(node: fx.Node) -> fx.Node:
    """The node under views and copies that do not change values: linears with one root share their input."""
    while node.op == "call_function" and getattr(node.target, "overloadpacket", None) in VIEWS:
        above = node.args[0]
        if not isinstance(above, fx.Node):
            break
        node = above
    return node


def choose_columns(
    program: Program, context: Context, index: int, rule: PaCA, served: list[str], linears: dict[str, LinearNode]
) -> tuple[list[UnitChoice], list[ChannelChoice]]:
    """One index set per shared input; through a structure where its channels can be brought together."""
    groups: dict[tuple[fx.Node, int], list[str]] = {}
    for param in served:
        rank = pattern_value(rule.rank, owner_name(param))
        if rank is None:
            raise PlanError(f"rule {index}, {rule}: no pattern of rank names {owner_name(param)}; add '*' for the rest")
        groups.setdefault((input_root(linears[param].x), rank), []).append(param)
    scores = column_scores(program, context, index, rule, list(groups.values()), linears)
    movable = movable_consumers(program) if rule.permute else {}
    units, channels = [], []
    for (_, rank), params in groups.items():
        chosen = choose(scores[params[0]], rank, largest=rule.largest)
        structure = movable.get(params[0])
        if structure is not None and set(params) == {s.param for s in structure.consumers}:
            units.append(UnitChoice(structure.name, index, chosen, (), rule.select))
        else:
            channels.append(ChannelChoice(tuple(params), index, chosen, rule.select))
    return units, channels


def movable_consumers(program: Program) -> dict[str, Structure]:
    """Consumer weight → the proven structure that may reorder its input columns one by one, in the columns' own order."""
    found = {}
    moved = {c.structure for c in program.choices}
    for structure in program.structures:
        if structure.name in moved or structure.kind != "ffn" or structure.name in program.unproven:
            continue
        if any(site.param in program.bases for site in structure.sites):
            continue  # a packed base lies in blocks, which no reordering respects
        for site in structure.consumers:
            channels = unit_channels(site, structure)
            whole = channels.shape == (program.tensor(site.param).shape[site.axis], 1)
            if whole and torch.equal(channels[:, 0], torch.arange(channels.shape[0])):
                found[site.param] = structure
    return found


def column_scores(
    program: Program, context: Context, index: int, rule: PaCA, groups: list[list[str]], linears: dict[str, LinearNode]
) -> dict[str, Tensor]:
    """Score per input column of each group (by its first weight), fp64; members of a group add their squares."""
    if rule.select == "random":
        return {
            g[0]: random_scores(context.plan.seed, g[0], program.tensor(g[0]).shape[linears[g[0]].in_axis])
            for g in groups
        }
    members = [p for g in groups for p in g]  # one order on every rank
    modules = {p: program.host.get_submodule(owner_name(p)) for p in members}

    def weight_squares() -> dict[str, Tensor]:
        found = {}
        for param in members:
            weight = program.tensor(param).detach()
            check_weights([(param, weight)])
            found[param] = column_squares(rows_of(weight, linears[param].in_axis))
        return found

    weights = of_first_rank(weight_squares) if rule.select in ("weight", "product") else {}
    if rule.select == "weight":
        return {g[0]: torch.stack([weights[p] for p in g]).sum(0).sqrt() for g in groups}
    batches = need_batches(context.calibration, f"rule {index}, select={rule.select!r},")
    if rule.select == "gradient":
        sums: dict[str, Tensor] = {}

        def reduce(name: str, gradient: Float[Tensor, "*experts n m"]) -> None:
            total = column_squares(rows_of(gradient, -1))
            sums[name] = sums[name] + total if name in sums else total

        gradient_statistics(program.host, modules, batches, reduce, context.loss, context.progress)
        total = batch_count(batches)
        return {g[0]: (sum_over_ranks(torch.stack([sums[p] for p in g]).sum(0)) / total).sqrt() for g in groups}
    squares = input_squares(program.host, {g[0]: modules[g[0]] for g in groups}, batches, context.progress)
    result = {name: s.sqrt() for name, s in squares.items()}
    if rule.select == "product":
        result = {g[0]: result[g[0]] * torch.stack([weights[p] for p in g]).sum(0).sqrt() for g in groups}
    return result


# --- RoSA, LoRA ----------------------------------------------------------------------------------------------------------


GRADIENT_MASKS = ("gradient", "fisher", "gradient_abs")
"""Masks that need calibration batches, and stay open without them."""


def choose_supports(
    program: Program, context: Context, index: int, rule: RoSA | LoRA, served: list[str], refusals: list[Refusal]
) -> list[SparseLowRank]:
    """Ranks and entries of every served weight; what a table leaves without either goes to `refusals`."""
    settings: dict[str, tuple[int, int]] = {}
    for param in served:
        module, size = owner_name(param), program.tensor(param).numel()
        rank = pattern_value(rule.rank, module)
        density = pattern_value(rule.density, module) if isinstance(rule, RoSA) else 0.0
        if rank is None or density is None:
            field = "rank" if rank is None else "density"
            raise PlanError(f"rule {index}, {rule}: no pattern of {field} names {module}; add '*' for the rest")
        survivors = int(program.masks[param].sum()) if param in program.masks else size
        settings[param] = (rank, min(survivors, max(1, round(density * size))) if density else 0)
    mask = rule.mask if isinstance(rule, RoSA) else "none"
    sparse = [p for p in served if settings[p][1]]
    gradient = mask in GRADIENT_MASKS
    found: dict[str, Tensor] = {}
    if gradient and sparse and given(context.calibration):
        batches = need_batches(context.calibration, f"rule {index}, mask={mask!r},")
        modules = {p: program.host.get_submodule(owner_name(p)) for p in sparse}
        counts = {p: settings[p][1] for p in sparse}
        found = gradient_supports(program.host, modules, counts, mask, batches, context, program.masks)
    elif not gradient:
        for param in tqdm(sparse, desc=f"mask: {mask}", disable=not context.progress or len(sparse) < 8, leave=False):
            weight, survivors = program.tensor(param), program.masks.get(param)
            if mask == "magnitude":
                check_weights([(param, weight)])
            found[param] = plain_support(weight, settings[param][1], mask, context.plan.seed, param, survivors)
    supports = []
    for param in served:
        rank, count = settings[param]
        if not rank and not count:  # a pattern that says so; nothing to train, nothing to store
            refusals.append(Refusal(owner_name(param), "rank 0 and density 0 leave nothing to train in it"))
            continue
        entries = found[param].to(index_dtype(program.tensor(param).shape)) if param in found else None
        scale = rule.scale(rank) if rank else 1.0
        conv1d = is_conv1d(program.host.get_submodule(owner_name(param)))
        part = SparseLowRank(param, index, rank, scale, rule.dropout, count, mask, conv1d, entries, entries)
        supports.append(part)
    return supports


def kernel_columns(program: Program, context: Context, index: int, rule: PaCA, param: str) -> KernelColumns:
    """The input channels of a convolution that train, as columns of its flattened kernel."""
    weight, rank = program.tensor(param).detach(), pattern_value(rule.rank, owner_name(param))
    if rule.select == "weight":
        check_weights([(param, weight)])
        scores = weight.double().square().transpose(0, 1).flatten(1).sum(1).sqrt().cpu()
    else:
        scores = random_scores(context.plan.seed, param, weight.shape[1])
    taps = weight[0, 0].numel()
    chosen = sorted(choose(scores, rank, largest=rule.largest))
    columns = tuple(channel * taps + tap for channel in chosen for tap in range(taps))
    return KernelColumns(param, 1, -1, len(columns), "column", columns, places=columns, rule=index, taps=taps)


def low_rank_part(program: Program, index: int, rule: LoRA, param: str) -> LowRankRows | LowRankKernels:
    """The part of an embedding, or of a convolution."""
    rank = pattern_value(rule.rank, owner_name(param))
    if not isinstance(program.host.get_submodule(owner_name(param)), torch.nn.Embedding):
        return LowRankKernels(param, index, rank, rule.scale(rank), rule.dropout, 0, "none", False)
    return LowRankRows(param, index, rank, rule.scale(rank), 0.0, 0, "none", False)


def plain_support(
    weight: Tensor, count: int, mask: str, seed: int, name: str, survivors: Tensor | None = None
) -> Tensor:
    """Random or largest-magnitude entries, flat and sorted; pruned entries stay zero and are never chosen."""
    if mask == "random":
        scores = torch.rand(weight.numel(), generator=generator(seed, name))
    else:
        scores = weight.detach().float().abs().reshape(-1).cpu()
    return best_entries(scores, count, survivors)


def best_entries(scores: Float[Tensor, " p*q"], count: int, survivors: Bool[Tensor, "p q"] | None) -> Int[Tensor, " k"]:
    """Top `count` of flat scores ≥ 0 among the survivors of a pruned weight, sorted."""
    if survivors is not None:
        kept = survivors.reshape(-1).to(scores.device)
        scores = scores.masked_fill(~kept, -1.0)
        count = min(count, int(kept.sum()))
    return scores.topk(count).indices.sort().values.cpu()


def gradient_supports(
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    counts: Mapping[str, int],
    mask: str,
    batches: list[Batch],
    context: Context,
    survivors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Top-k entries by mean over batches of dW² ("gradient"), of dW itself ("gradient_abs"), or over samples of dW² ("fisher").

    In fp32; one dense gradient is alive at a time, of "fisher" as many as `sparsify.calibration.fisher.BUDGET` allows.
    The accumulators live on the CPU; entries are flat in the *stored* weight, sorted.
    """
    sums: dict[str, Tensor] = {}

    def reduce(name: str, gradient: Float[Tensor, "*experts n m"]) -> None:
        part = (squares_of(gradient) if mask == "gradient" else gradient).cpu()
        sums[name] = sums[name] + part if name in sums else part.clone()  # (fp64 where fp32 squares would not fit)

    measure = sample_squares if mask == "fisher" else gradient_statistics
    measure(model, modules, batches, reduce, context.loss, context.progress)
    found = {}
    for name in modules:  # one order on every rank
        own = sums.pop(name)
        wide = bool(float(sum_over_ranks(torch.tensor([float(own.dtype == torch.float64)]))))
        score = sum_over_ranks(own.double() if wide else own).abs()
        stored = score.mT if is_conv1d(modules[name]) else score
        found[name] = best_entries(stored.reshape(-1), counts[name], (survivors or {}).get(name))
    return found
