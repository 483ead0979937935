"""Do blocks and gathered channels cost more than permuted ones? The same units, in place and brought together, in turn.

    attention / permuted     heads co-permuted to the front of q, k, v and o, one contiguous block trains (as it was done before)
    attention / in place     the same heads as blocks where they lie: what `S2FT(structure="attention")` does
    ffn / permuted           channels co-permuted, one contiguous block: what `S2FT(structure="ffn")` does where it is proven
    ffn / in place           the same channels gathered: `permute=False`, and every structure that is not proven

A training step: forward, backward, fused AdamW, zero_grad, on a Llama of `--layers` layers. `saved` is what autograd keeps.

    python benchmarks/in_place.py --save
    python benchmarks/in_place.py --dtype bf16 --layers 8 --save --label bf16
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import begin, interleave, mib, parser, report, saved_for_backward
from benchmarks.train_step import DTYPES, PRESETS, Case
from sparsify import S2FT, Plan
from sparsify.api import PIPELINE, compile_for_training
from sparsify.passes.base import Context, Pass, PassResult, insert_after
from sparsify.program import Program, Stage
from sparsify.program.capture import capture

FRACTION = 0.12


def brought_together(program: Program, _context: Context) -> PassResult:
    """The choices without their reason to stay in place."""
    choices = tuple(replace(c, in_place="") for c in program.choices)
    return PassResult(program.evolve("bring together", choices=choices), changed=choices != program.choices)


PERMUTED = insert_after(PIPELINE, "select", Pass("bring-together", Stage.SELECTED, Stage.SELECTED, brought_together))


def host_of(case: Case, rule: S2FT, together: bool) -> nn.Module:
    context, model = Context(Plan([rule], seed=case.seed), progress=False), case.model()
    return compile_for_training(capture(model), model, context, PERMUTED if together else PIPELINE).train()


def step_of(host: nn.Module, case: Case) -> Any:
    optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        host(input_ids=case.tokens, labels=case.tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--rounds", type=int, default=11)
    arguments = options.parse_args()
    begin(arguments)
    shape = replace(PRESETS["tiny" if arguments.fast else "small"], layers=2 if arguments.fast else arguments.layers)
    case = Case(shape, DTYPES[arguments.dtype], arguments.device, arguments.seed)
    rows = []
    for kind in ("attention", "ffn"):
        fraction = 0.3 if arguments.fast and kind == "attention" else FRACTION
        rules = {
            "permuted": (S2FT(structure=kind, fraction=fraction), True),
            "in place": (S2FT(structure=kind, fraction=fraction, permute=False), False),
        }
        hosts = {name: host_of(case, rule, together) for name, (rule, together) in rules.items()}
        chosen = {name: [c.consumers for c in h.sparsify.program.choices] for name, h in hosts.items()}
        assert chosen["permuted"] == chosen["in place"], "the two must train the same units"
        moved = {name: len(h.sparsify.program.moves) for name, h in hosts.items()}
        assert moved["permuted"] > moved["in place"] == 0, "the two must differ in what moved"
        saved = {}
        for name, host in hosts.items():
            held = [*host.parameters(), *host.buffers(), case.tokens]
            with saved_for_backward(held) as count:
                loss = host(input_ids=case.tokens, labels=case.tokens).loss
            saved[name] = count.bytes
            del loss
        timings = interleave(
            {name: step_of(host, case) for name, host in hosts.items()},
            rounds=3 if arguments.fast else arguments.rounds,
            clock=arguments.clock,
            patience=arguments.patience,
        )
        base = timings["permuted"]
        for name in rules:
            ratio = timings[name].over(base)
            rows.append(
                {
                    "structure": kind,
                    "units": name,
                    "step over permuted (medians)": ratio.median,
                    "(minima)": ratio.minimum,
                    "saved MiB": mib(saved[name]),
                    "tensors moved": moved[name],
                }
            )
    report("in_place", arguments, rows)


if __name__ == "__main__":
    main()
