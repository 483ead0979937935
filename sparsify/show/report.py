"""The report: what was found, chosen, declined and why, and what training will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch._ops import OpOverload

from sparsify.console import in_full, one_line, printable
from sparsify.errors import Refusal
from sparsify.kernels.fallback import notes
from sparsify.model.sharded import class_name
from sparsify.modules.adapted import value_names
from sparsify.ops.schema import argument
from sparsify.passes.verify import operators
from sparsify.plan import Plan
from sparsify.program import Program
from sparsify.program.names import printable as without_controls
from sparsify.program.printer import pruned_line
from sparsify.program.repeats import Line, fold_lines
from sparsify.program.unit_budget import Budget
from sparsify.pruning.sparse_checkpoint import stored_bytes
from sparsify.show.parameter_count import adapter_size, count_parameters

SHOWN = (8, 1024)
"""Rows and tokens that the headline speaks of."""


@printable
@dataclass(frozen=True)
class Report:
    """Plain data; `str(report)` is the text, with equal layers as one line and "× 30" (`text(fold=False)` lists them all).

    trainable, total: parameters, packed weights as what they stand for; pruned: entries of trainable parameters that stay zero under
    a mask, which `trainable` leaves out. saved_bytes: bytes that the trained slices keep for backward on the captured example;
    saved_bytes_full: what weight gradients of all captured linears would keep (each distinct input once).
    values: trained parameters that hold values of weights, which weight decay would pull to zero.
    budgets: what S2FT's rules with `fraction=` asked for, of what, and what their whole units train.
    tokens: positions of the captured example that a linear sees; 0 where the model takes no tokens. adapter: bytes of its file at least.
    """

    model: str
    found: dict[str, int]
    chosen: tuple[str, ...]
    declined: tuple[Refusal, ...]
    trainable: int
    total: int
    saved_bytes: int
    saved_bytes_full: int
    history: tuple[str, ...]
    cpu: str = ""
    pruned: int = 0
    budgets: tuple[Budget, ...] = ()
    values: int = 0
    tokens: int = 0
    adapter: int = 0

    @property
    def headline(self) -> str:
        """The report in one line: `trains 1.20 %, keeps 3.1 GiB less for the backward at 8 × 1024 tokens, adapter 1.8 MiB`.

        What is kept is counted over the inputs of linears, against full fine-tuning; over the captured example, where the model takes
        no tokens.
        """
        said = [f"trains {100 * self.trainable / max(self.total, 1):.3g} %"]
        less = self.saved_bytes_full - self.saved_bytes
        if less > 0 and self.trainable:
            rows, length = SHOWN
            less = less * rows * length // self.tokens if self.tokens else less
            where = f"at {rows} × {length} tokens" if self.tokens else "on the captured example"
            said.append(f"keeps {human(less)} less for the backward than full fine-tuning {where}")
        if self.adapter:
            said.append(f"adapter {human(self.adapter)}")
        return ", ".join(said)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, fold: bool = True) -> str:
        """The report as text. fold: lines of equal layers as one, with what differs between them below it."""
        share = 100 * self.trainable / max(self.total, 1)
        lines = [f"sparsify report: {one_line(self.model)}: {self.headline}"]
        lines.append("found      " + (", ".join(f"{n} {kind}" for kind, n in self.found.items()) or "nothing"))
        chosen: Sequence[str] = self.chosen or ("nothing",)
        declined: Sequence[str] = [Line.about(r.where, str(r)) for r in self.declined]
        if fold:
            chosen, declined = fold_lines(chosen), fold_lines(declined)
        lines += [("chosen     " if i == 0 else "           ") + line for i, line in enumerate(chosen)]
        lines += [("budget     " if i == 0 else "           ") + str(budget) for i, budget in enumerate(self.budgets)]
        lines += [("declined   " if i == 0 else "           ") + line for i, line in enumerate(declined)]
        survivors = f": the survivors; {self.pruned:,} pruned entries stay zero" if self.pruned else ""
        lines.append(f"trainable  {self.trainable:,} of {self.total:,} parameters ({share:.4f} %){survivors}")
        if self.values:
            lines.append(
                f"decay      {self.values:,} trained parameters hold values of weights, not changes: weight decay would pull them to zero; "
                "sparsify.train.param_groups and keep_out_of_decay(trainer) keep them out of it"
            )
        if self.saved_bytes_full:
            lines.append(
                f"backward   keeps {human(self.saved_bytes)} of linear inputs on the captured example; "
                f"full fine-tuning would keep {human(self.saved_bytes_full)}"
            )
        lines += [("passes     " if i == 0 else "           ") + one_line(note) for i, note in enumerate(self.history)]
        lines += [self.cpu] if self.cpu else []
        return without_controls("\n".join(lines), keep="\n")


def human(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def make_report(program: Program, plan: Plan, host: nn.Module, cpu: object = None) -> Report:
    found: dict[str, int] = {}
    for structure in program.structures:
        found[structure.kind] = found.get(structure.kind, 0) + 1
    structures = {s.name: s for s in program.structures}
    chosen: list[str] = []
    for choice in program.choices:
        sides = structures[choice.structure].chosen_text(len(choice.consumers), len(choice.producers))
        what = f"{', '.join(filter(None, sides)) or 'nothing'} ({choice.method}, rule {choice.rule})"
        pieces = [f"{choice.structure}: {what} → "]
        for number, piece in enumerate(s for s in program.slices if s.structure == choice.structure):
            pieces[-1] += f"{', ' if number else ''}{piece.param}[{piece.side}s "
            pieces += [piece.spans, "]"]
        pieces[-1] += f"; in place: {choice.in_place}" if choice.in_place else ""
        chosen.append(Line.about(choice.structure, *pieces))
    for group in program.channel_choices:
        how = f"{len(group.channels)} input columns, gathered ({group.method}, rule {group.rule})"
        chosen.append(Line.about(group.params[0], f"{', '.join(group.params)}: {how}"))
    for part in program.parts:
        row = part.row()
        chosen += [Line.about(part.param, row)] if row is not None else []
    if program.pruned:
        zeros = sum(float((~m).sum()) for m in program.masks.values()) / sum(m.numel() for m in program.masks.values())
        chosen.append(f"{len(program.pruned)} weights pruned: {zeros:.1%} zeros")
        dense, stored = pruned_bytes(program)
        chosen[-1] += f"; in a sparse checkpoint {human(stored)} instead of {human(dense)}"
        chosen += [pruned_line(p, "  ") for p in program.pruned]
    packed = [f"{p.param}: {p.format}, error {p.error:.2%}" for p in program.packings]
    if packed:
        before, after = sum(p.dense_bytes for p in program.packings), sum(p.packed_bytes for p in program.packings)
        chosen.append(
            f"{len(packed)} weights packed: {human(before)} → {human(after)} ({packed[0]}{', …' if packed[1:] else ''})"
        )
    declined = tuple(program.refusals) + tuple(
        Refusal(d.name, d.reason) for d in program.declined if d.name not in {r.where for r in program.refusals}
    )
    count = count_parameters(host)
    saved, full = backward_bytes(program)
    return Report(
        model=class_name(host),
        found=found,
        chosen=tuple(line if isinstance(line, Line) else one_line(line) for line in chosen),
        declined=declined,
        trainable=count.trainable,
        total=count.total,
        pruned=count.pruned,
        budgets=program.budgets,
        values=sum(host.get_parameter(name).numel() for name in value_names(host)),
        saved_bytes=saved,
        saved_bytes_full=full,
        tokens=tokens_of(program, host),
        adapter=adapter_bytes(host, program) if plan.adapts else 0,
        history=(*program.history, *(f"note: {text}" for text in notes())),
        cpu="" if cpu is None else in_full(cpu),
    )


def adapter_bytes(host: nn.Module, program: Program) -> int:
    """Bytes of an adapter of the host at least: see `adapter_size`."""
    numbers, places = adapter_size(host, program)
    return numbers * 4 + places * 8


def of_ids() -> tuple[OpOverload, ...]:
    """Operators of ours that read ids, not channels."""
    return torch.ops.sparsify.partial_embedding.default, torch.ops.sparsify.lowrank_embedding.default


def tokens_of(program: Program, host: nn.Module) -> int:
    """Positions of the captured example that the first linear sees; 0 for a model that takes no tokens."""
    if getattr(host, "main_input_name", "") != "input_ids":
        return 0
    ops = torch.ops.sparsify
    known = set(operators(program)) - {ops.apply_mask.default, *of_ids()}
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target in known]
    values = [argument(n, "x").meta.get("val") for n in nodes]
    return next((v.numel() // v.shape[-1] for v in values if isinstance(v, torch.Tensor) and v.numel()), 0)


def pruned_bytes(program: Program) -> tuple[int, int]:
    """Bytes of the pruned weights as they are, and as `save_sparse` writes them, without anything that trained them since."""
    dense = sum(p.numel * p.itemsize for p in program.pruned)
    stored = [stored_bytes(p.numel, round(p.numel * (1 - p.sparsity)), p.itemsize) for p in program.pruned]
    return dense, sum(stored)


def node_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def backward_bytes(program: Program) -> tuple[int, int]:
    """Bytes of linear inputs kept for weight gradients: by the trained parts, and if every linear trained.

    Column slices keep a copy of their columns each; whole inputs (rows, sparse, low-rank) are kept once however many read them.
    """
    saved, whole, inputs = 0, {}, {}
    ops, known = torch.ops.sparsify, operators(program)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in known or node.target is ops.apply_mask.default:
            continue
        if node.target in of_ids():
            continue  # keeps ids alone
        x, part = argument(node, "x"), program.part_at(node)
        inputs[x.name] = node_bytes(x)
        own = part.saved_bytes(x.meta["val"]) if part is not None else None
        if own is not None:
            saved += own
        elif part is not None or node.target is ops.masked_linear.default:
            whole[x.name] = node_bytes(x)
    for linear in program.linears():
        inputs[linear.x.name] = node_bytes(linear.x)
    return saved + sum(whole.values()), sum(inputs.values())
