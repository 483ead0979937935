"""Which coupled structures does detection find, where, and are they right? Next to Torch-Pruning's DepGraph.

Every model of `tests/zoo.py` is analysed with each of its attention implementations. A structure counts as exact when
it passes both controls of `sparsify.testing`: permuting all its sites keeps the output, all but one changes it.
The peer (Torch-Pruning, `DependencyGraph`) is asked for the group of unit 0 of each of these exact structures, from one
of its producers. Its group is exact when it names the same channels of the same tensors, and differs when it names
others; its groups are not run through the controls, and what it may find beyond ours is not asked. It runs in a child
process under a time limit. Structures that we decline (ALiBi heads, a gather over heads) count for and against nobody,
because they must not be moved.

    python benchmarks/coverage.py --save
    python benchmarks/coverage.py --only Llama T5 --no-peer

With `--rules` it asks another question of many more architectures: whether every rule leaves outputs, modes, attention maps and
`generate()` as they were (`benchmarks/families_by_rules.py`). `--document` writes `docs/coverage.md` from the newest record of that.

    python benchmarks/coverage.py --rules --workers 2 --save --label rules
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import zoo  # noqa: E402

from benchmarks.harness import Bar, begin, parser, report  # noqa: E402
from sparsify.passes.detect.find_structures import find_structures  # noqa: E402
from sparsify.program.structure import Structure  # noqa: E402
from sparsify.testing import check_structure, perturbed  # noqa: E402

FAST = ("Llama", "GPT-2", "BERT")
Channels = frozenset[tuple[str, int, frozenset[int]]]


def unit_channels(structure: Structure, unit: int = 0) -> Channels:
    """(tensor, axis, channels) of one unit, sites on one axis joined."""
    found: dict[tuple[str, int], set[int]] = {}
    for site in structure.sites:
        found.setdefault((site.param, site.axis), set()).update(site.channels(unit))
    return frozenset((param, axis, frozenset(channels)) for (param, axis), channels in found.items())


def ours(model: nn.Module, example: zoo.Example) -> tuple[dict[str, Any], list[Structure]]:
    """Counts of one model, and the structures that passed both controls."""
    graph, named = zoo.lift(model, example)
    start = time.perf_counter()
    detection = find_structures(graph, named)
    row: dict[str, Any] = {"detect ms": round(1e3 * (time.perf_counter() - start), 1)}
    twin = perturbed(model, example)
    exact = []
    for structure in detection.structures:
        try:
            check_structure(twin, example, structure, prepared=True)
        except AssertionError:
            continue
        exact.append(structure)
    for kind in ("ffn", "attention"):
        row[kind] = sum(s.kind == kind for s in exact)
        row[f"{kind} wrong"] = sum(s.kind == kind for s in detection.structures) - row[kind]
        row[f"{kind} declined"] = sum(d.kind == kind for d in detection.declined)
    return row, exact


def ask_peer(model: nn.Module, example: zoo.Example, structures: list[Structure], answers: Any) -> None:
    """In a child process: puts (index, verdict) for every structure, (-1, error) when the graph cannot be built."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        import torch_pruning as tp

        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        graph = tp.DependencyGraph().build_dependency(
            model,
            example_inputs=example[1],
            forward_fn=lambda module, inputs: module(**inputs),
            output_transform=first_tensors,
            verbose=False,
        )
        modules = {p: m for m in model.modules() for p in (names.get(id(x)) for x in m.parameters(recurse=False)) if p}
    except Exception as error:  # the peer may fail in any way
        answers.put((-1, f"{type(error).__name__}: {error}"[:120]))
        return
    for i, structure in enumerate(structures):
        try:
            answers.put((i, judge_peer(tp, graph, modules, names, structure)))
        except Exception as error:  # the same
            answers.put((i, f"failed: {type(error).__name__}"))
    answers.put((-2, "done"))


def judge_peer(
    tp: Any, graph: Any, modules: Mapping[str, nn.Module], names: Mapping[int, str], structure: Structure
) -> str:
    """Whether the peer's group of unit 0 names the same channels."""
    from torch_pruning.pruner import function

    producer = structure.producers[0]
    module = modules[producer.param]
    if not isinstance(module, nn.Linear):
        return f"failed: no rule for {type(module).__name__}"
    packed = [c for site in structure.producers if site.param == producer.param for c in site.channels(0)]
    group = graph.get_pruning_group(module, tp.prune_linear_out_channels, idxs=sorted(packed))
    found: dict[tuple[str, int], set[int]] = {}
    inputs = (function.prune_linear_in_channels, function.prune_conv_in_channels)
    for item in group:
        target, action = item.dep.target.module, item.dep.handler
        for parameter in target.parameters(recurse=False) if isinstance(target, nn.Module) else ():
            reads = action in inputs or getattr(action, "__name__", "").endswith("in_channels")
            if reads and parameter.dim() < 2:
                continue  # a bias lies on the output side
            axis = 1 if reads and parameter.dim() > 1 else 0
            if isinstance(target, nn.Embedding):
                axis = 1
            found.setdefault((names[id(parameter)], axis), set()).update(int(i) for i in item.idxs)
        if isinstance(target, nn.Parameter):
            axis = next(u.pruning_dim for u in graph.unwrapped_parameters if u.parameters is target)
            found.setdefault((names[id(target)], axis), set()).update(int(i) for i in item.idxs)
    answer = frozenset((param, axis, frozenset(channels)) for (param, axis), channels in found.items())
    return "exact" if answer == unit_channels(structure) else "differs"


def first_tensors(output: Any) -> Any:
    values = output.values() if isinstance(output, Mapping) else [output]
    return [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]


def peer(model: nn.Module, example: zoo.Example, structures: list[Structure], limit: float) -> dict[str, Any]:
    """Counts of the peer on the structures of one model, under a time limit."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    start = time.perf_counter()
    child = context.Process(target=ask_peer, args=(model, example, structures, answers), daemon=True)
    child.start()
    verdicts: dict[int, str] = {}
    status = "ok"
    while True:
        try:
            index, verdict = answers.get(timeout=max(limit - (time.perf_counter() - start), 0.01))
        except queue.Empty:
            status = f"stopped after {limit:g} s"
            break
        if index < 0:
            status = "ok" if verdict == "done" else verdict
            break
        verdicts[index] = verdict
    child.kill()
    child.join()
    row: dict[str, Any] = {"peer s": round(time.perf_counter() - start, 1), "peer": status}
    for kind in ("ffn", "attention"):
        mine = [verdicts.get(i, "no answer") for i, s in enumerate(structures) if s.kind == kind]
        row[f"peer {kind}"] = mine.count("exact")
        row[f"peer {kind} differs"] = mine.count("differs")
    return row


def rules_table(arguments: Any) -> None:
    from benchmarks import families_by_rules as rules

    before = json.loads(newest_rules().read_text(encoding="utf-8"))["rows"] if arguments.again else []
    again = [row["architecture"] for row in before if arguments.again in json.dumps(row)]
    if arguments.again and not again:
        raise SystemExit(f"--again {arguments.again!r}: no cell of {newest_rules().name} says so")
    words = (
        again or arguments.only or (["Residual", "Sequential", "gpt2", "llama (", "bert ("] if arguments.fast else None)
    )

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    rows = rules.run(12 * arguments.limit, arguments.workers, words, tell, arguments.minutes, arguments.seed)
    made = {row["architecture"]: row for row in rows}
    if again:
        rows = [made.get(row["architecture"], row) for row in before]
    summary = rules.totals(rows)
    bars = [Bar("cells that are wrong", summary["wrong"], 0), Bar("cells with an error", summary["errors"], 0)]
    if not words or again:
        bars.append(Bar("architectures", summary["architectures"], 120, at_least=True))
    notes = [", ".join(f"{n} {name}" for name, n in summary.items())]
    if again:
        notes.append(f"{len(made)} architectures were run again and joined into {newest_rules().name}")
    report(
        "coverage", arguments, rows, columns=["architecture", "kind", "found", *rules.rules()], bars=bars, notes=notes
    )


def newest_rules() -> Path:
    """The newest record of `--rules`."""
    records = sorted((ROOT / "benchmarks" / "results").glob("coverage-rules-*.json"), key=lambda p: p.stem[-10:])
    if not records:
        raise SystemExit("no record of `coverage.py --rules --save --label rules` in benchmarks/results")
    return records[-1]


def write_document() -> None:
    """`docs/coverage.md` from the newest record of `--rules`."""
    from benchmarks import families_by_rules as rules

    record = newest_rules()
    target = ROOT / "docs" / "coverage.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(rules.document(json.loads(record.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"wrote docs/coverage.md from {record.name}")


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rules", action="store_true", help="every architecture under every rule, instead of detection")
    made.add_argument(
        "--again",
        metavar="TEXT",
        help="with --rules: only architectures with a cell that says TEXT in the newest record",
    )
    made.add_argument("--workers", type=int, default=1, help="with --rules: architectures at once")
    made.add_argument(
        "--minutes", type=float, default=float("inf"), help="with --rules: begin no architecture after this time"
    )
    made.add_argument(
        "--document", action="store_true", help="write docs/coverage.md from the newest record of --rules"
    )
    made.add_argument("--only", nargs="*", default=None, help="names of families")
    made.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    made.add_argument("--limit", type=float, default=15.0, help="seconds that the peer gets per model")
    arguments = made.parse_args()
    arguments.threads = arguments.threads or 1
    begin(arguments)
    warnings.filterwarnings("ignore")
    if arguments.document:
        return write_document()
    if arguments.rules:
        return rules_table(arguments)
    wanted = arguments.only or (FAST if arguments.fast else None)
    rows, notes = [], []
    for family in zoo.FAMILIES:
        if (wanted and family.name not in wanted) or not zoo.available(family):
            continue
        for implementation in family.implementations:
            model, example = zoo.build(family, implementation)
            counts, structures = ours(model, example)
            row = {"family": family.name, "attention by": implementation, **counts}
            if not arguments.no_peer:
                row |= peer(model, example, structures, arguments.limit)
            rows.append(row)
            print(
                f"{family.name} ({implementation}): {counts['ffn']} ffn, {counts['attention']} attention",
                file=sys.stderr,
            )
    totals: dict[str, Any] = {"family": "all", "attention by": f"{len(rows)} models"}
    for column in rows[0] if rows else ():
        if isinstance(rows[0][column], int):
            totals[column] = sum(row.get(column) or 0 for row in rows)
    for implementation in ("eager", "sdpa"):
        part = [row for row in rows if row["attention by"] == implementation]
        for kind in ("ffn", "attention"):
            found = sum(row[kind] for row in part)
            theirs = sum(row.get(f"peer {kind}") or 0 for row in part)
            notes.append(
                f"{kind}, {implementation}: {found} exact here, {theirs} exact in Torch-Pruning ({len(part)} models)"
            )
    rows.append(totals)
    wrong = totals.get("ffn wrong", 0) + totals.get("attention wrong", 0)
    columns = list(rows[0])
    report(
        "coverage",
        arguments,
        rows,
        columns=columns,
        bars=[Bar("structures that fail a control", wrong, 0)],
        notes=notes,
    )


if __name__ == "__main__":
    main()
