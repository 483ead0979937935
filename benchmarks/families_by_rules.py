"""Every architecture under every rule: does the compiled model compute what the model computes, everywhere a user looks?

Per architecture and rule, on random weights without dropout, the host is compared with the model it came from:

    eval, train        outputs in both modes
    maps               attention maps and hidden states, where the model returns them
    cached             greedy `generate()` of a few tokens with a cache (causal and sequence-to-sequence models)
    gradients          one backward pass: every trained parameter has a finite gradient, and not all are zero
    restored           switched to no adapter the host computes the model's outputs, and `plain()` those of the host

Prune and Quantize change the outputs; they are compared with `plain()`, and Prune's zeros are counted.

`python benchmarks/coverage.py --rules --save` runs it; `docs/coverage.md` is made from the record.
"""

from __future__ import annotations

import copy
import multiprocessing
import queue
import random
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.architectures import Architecture, architectures

OK = "ok"


def rules() -> dict[str, Callable[[], list[Any]]]:
    from sparsify import S2FT, LoRA, PaCA, Prune, Quantize, RoSA

    return {
        "S2FT ffn": lambda: [S2FT(structure="ffn", fraction=0.2)],
        "S2FT attention": lambda: [S2FT(structure="attention", fraction=0.3, budget="structure")],
        "PaCA": lambda: [PaCA(rank=3)],
        "RoSA": lambda: [RoSA(rank=2, density=0.02, mask="random")],
        "LoRA": lambda: [LoRA(rank=2)],
        "Quantize + LoRA": lambda: [Quantize(format="int8"), LoRA(rank=2)],
        "Prune": lambda: [Prune(sparsity=0.5, method="magnitude")],
    }


def call(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Any:
    inputs = {n: v.clone() if isinstance(v, Tensor) else v for n, v in batch.items()}
    return model(inputs.pop(""), **options) if "" in inputs else model(**inputs, **options)


def tensors(outputs: Any) -> list[Tensor]:
    values = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
    leaves = torch.utils._pytree.tree_leaves(values)
    return [t.detach() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def apart(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Largest difference, relative to the largest entry; infinite for different shapes."""
    first, second = list(one), list(other)
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.numel():
            a, b = a.double(), b.double()
            same = torch.isfinite(a) == torch.isfinite(b)
            if not bool(same.all()):
                return float("inf")
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


BOUND = 2e-4


def compare(model: nn.Module, host: Any, batch: Mapping[str, Any], kind: str, changes: bool) -> str:
    """The verdict of one host: OK, or what is wrong with it. changes: the rule is meant to change the outputs."""
    reference: Any = host.sparsify.plain() if changes else copy.deepcopy(model)  # train mode moves its buffers
    with torch.no_grad():
        for mode in (False, True):
            reference.train(mode), host.train(mode)
            seed_everything()
            want = tensors(call(reference, batch))
            seed_everything()
            error = apart(want, tensors(call(host, batch)))
            if not error <= BOUND:
                return f"WRONG: outputs in {'train' if mode else 'eval'} mode differ by {error:.1e}"
        reference.eval(), host.eval()
        for option in ("output_attentions", "output_hidden_states"):
            try:
                want = tensors(call(reference, batch, **{option: True}))
            except Exception:  # the model itself does not have it
                continue
            error = apart(want, tensors(call(host, batch, **{option: True})))
            if not error <= BOUND:
                return f"WRONG: {option} differ by {error:.1e}"
        if kind in ("text", "seq2seq", "vision-language") and hasattr(model, "generate") and "input_ids" in batch:
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            try:
                want = reference.generate(batch["input_ids"], **options)
            except Exception:
                want = None
            if want is not None and not torch.equal(want, host.generate(batch["input_ids"], **options)):
                return "WRONG: generate() gives other tokens"
    host.train()
    total = sum(
        (t.double().square().mean() for t in with_gradient(call(host, batch))), torch.zeros((), dtype=torch.float64)
    )
    total.backward()
    gradients = [p.grad for p in host.parameters() if p.requires_grad and p.grad is not None]
    if not gradients or not all(bool(torch.isfinite(g).all()) for g in gradients):
        return "WRONG: a trained parameter has no finite gradient"
    if not any(bool(g.any()) for g in gradients):
        return "WRONG: every gradient is zero"
    host.eval()
    if not changes:
        host.sparsify.set_adapter(None)
        with torch.no_grad():
            error = apart(tensors(call(model.eval(), batch)), tensors(call(host, batch)))
        if not error <= BOUND:
            return f"WRONG: without an adapter the outputs differ by {error:.1e}"
    return OK


def seed_everything() -> None:
    """Dropout and layer drop draw from torch, masks over time (Wav2Vec2's SpecAugment) from numpy."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def with_gradient(outputs: Any) -> list[Tensor]:
    values = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def judge(architecture: Architecture, answers: Any) -> None:
    """In a child process: puts (rule, verdict) one by one, ("", reason) when the model itself does not run."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    import sparsify
    from sparsify.api import compile_for_training
    from sparsify.passes.base import Context
    from sparsify.passes.train_experts import write_out_experts
    from sparsify.program.capture import capture

    try:
        model, batch = architecture.build()
        for module in model.modules():  # a mask of dropout falls on other units where these were reordered
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            call(model, batch)
    except Exception as error:
        answers.put(("", f"not run by its own package: {type(error).__name__}: {str(error)[:80]}"))
        return
    example = (batch[""],) if "" in batch else batch
    try:
        program = capture(model, example)
        answers.put(("found", counts(sparsify, program)))
    except Exception as error:
        answers.put(("trace", f"{type(error).__name__}: {first_line(error)}"))
        return
    for name, make in rules().items():
        try:
            plan = sparsify.Plan(make())
            source = write_out_experts(model, plan)  # as `sparsify.compile` does, for plans that train packed experts
            captured = program if source is model else capture(source, example)
            host = compile_for_training(captured, source, Context(plan, progress=False))
            verdict = compare(model, host, batch, architecture.kind, name in ("Prune", "Quantize + LoRA"))
        except sparsify.PlanError as error:
            verdict = f"declined: {first_line(error)}"
        except sparsify.SparsifyError as error:
            verdict = f"refused: {type(error).__name__}: {first_line(error)}"
        except Exception as error:
            verdict = f"ERROR: {type(error).__name__}: {first_line(error)}"
        answers.put((name, verdict))
    answers.put(("done", ""))


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if len(lines) > 1 else "".join(lines))[:160]


def counts(sparsify: Any, program: Any) -> str:
    from sparsify.api import find_pass
    from sparsify.passes.base import Context

    found = find_pass(program, Context(sparsify.Plan([sparsify.LoRA()]))).program
    kinds = [s.kind for s in found.structures]
    return f"{kinds.count('attention')} attention, {kinds.count('ffn')} ffn"


def run(
    limit: float,
    workers: int,
    only: list[str] | None,
    tell: Callable[[str], None],
    minutes: float = float("inf"),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row per architecture that its own package can run; each in a child process under a time limit, several at once.

    minutes: no architecture is begun after this time; the order is random, so that what was begun is a fair sample.
    """
    context = multiprocessing.get_context("fork")
    begun = time.perf_counter()
    waiting = [a for a in architectures() if not only or any(word.lower() in a.name.lower() for word in only)]
    random.Random(seed).shuffle(waiting)
    running: list[tuple[Architecture, Any, Any, float, dict[str, str]]] = []
    rows: list[dict[str, Any]] = []
    while waiting or running:
        if time.perf_counter() - begun > 60 * minutes:
            waiting = []
        while waiting and len(running) < workers:
            architecture = waiting.pop(0)
            answers = context.Queue()
            child = context.Process(target=judge, args=(architecture, answers), daemon=True)
            child.start()
            running.append((architecture, child, answers, time.perf_counter(), {}))
        for entry in list(running):
            architecture, child, answers, started, verdicts = entry
            over = False
            try:
                name, verdict = answers.get(timeout=0.2)
                verdicts[name] = verdict
                over = name in ("done", "", "trace")
            except queue.Empty:
                if not child.is_alive() and answers.empty():
                    verdicts.setdefault("crashed", f"ERROR: the process ended with {child.exitcode}")
                    over = True
                elif time.perf_counter() - started > limit:
                    verdicts.setdefault("stopped", f"stopped after {limit:g} s")
                    over = True
            if not over:
                continue
            child.kill()
            child.join()
            running.remove(entry)
            if "" in verdicts:
                tell(f"{architecture.name}: {verdicts['']}")
                continue
            verdicts.pop("done", None)
            row: dict[str, Any] = {
                "architecture": architecture.name,
                "kind": architecture.kind,
                "from": architecture.source,
            }
            trouble = verdicts.get("trace") or verdicts.get("crashed") or verdicts.get("stopped") or ""
            row |= {"found": verdicts.get("found", ""), **{n: verdicts.get(n, trouble or "not run") for n in rules()}}
            rows.append(row)
            tell(f"{architecture.name}: " + ", ".join(f"{n} {row[n][:60]}" for n in rules()))
    return sorted(rows, key=lambda r: (r["kind"], r["architecture"].lower()))


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    cells = [str(row[name]) for row in rows for name in rules()]
    return {
        "architectures": len(rows),
        "cells": len(cells),
        "ok": sum(c == OK for c in cells),
        "declined": sum(c.startswith("declined") for c in cells),
        "refused": sum(c.startswith("refused") for c in cells),
        "wrong": sum(c.startswith("WRONG") for c in cells),
        "errors": sum(c.startswith("ERROR") for c in cells),
        "not traced": sum(c.startswith(("CaptureError", "stopped", "not run")) for c in cells),
    }


def document(record: Mapping[str, Any]) -> str:
    """`docs/coverage.md` from a record: one line per architecture, reasons below the table."""
    rows = record["rows"]
    names = list(rules())
    summary = totals(rows)
    lines = [
        "# Coverage",
        "",
        f"Made from `benchmarks/results/` by `python benchmarks/coverage.py --document` (run of {record['date']}, "
        f"torch {record['versions'].get('torch', '?')}, transformers {record['versions'].get('transformers', '?')}).",
        "",
        f"{summary['architectures']} architectures × {len(names)} rules: {summary['ok']} cells right, {summary['declined']} declined "
        f"with a reason (nothing there to train), {summary['refused']} refused, {summary['not traced']} not traced, "
        f"{summary['errors']} errors, **{summary['wrong']} wrong**. What is compared stands in `benchmarks/families_by_rules.py`.",
        "",
        "| architecture | kind | found | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    reasons: dict[str, int] = {}
    for row in rows:
        cells = []
        for name in names:
            verdict = str(row[name])
            if verdict == OK:
                cells.append("✓")
                continue
            number = reasons.setdefault(verdict, len(reasons) + 1)
            word = verdict.partition(":")[0] if ":" in verdict else verdict
            cells.append(f"{word.lower()} [{number}](#reasons)")
        lines.append(f"| {row['architecture']} | {row['kind']} | {row['found']} | " + " | ".join(cells) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {text.replace('|', '/').replace('<', '‹')}" for text, number in reasons.items()]
    return "\n".join(lines) + "\n"
