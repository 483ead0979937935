"""How much accuracy does pruning cost, and how much of it does sparse fine-tuning bring back?

Four models, all made here, none downloaded but MiniLM (from its PyPI package):

    decoder   a byte-level Llama, pretrained on the standard library's code and fine-tuned on its docstrings: next-byte accuracy
    t5        a T5 that learns to sort digits and to spell them in another alphabet (generated): token accuracy, teacher forced
    whisper   a Whisper that transcribes generated tones under noise: token accuracy, teacher forced
    minilm    MiniLM, fine-tuned to tell from which module a docstring comes: accuracy

For each: the dense model; pruned in one shot by each method at each sparsity; and, from the pruned model (`--recover-from`,
`--recover-at`), after the same number of steps with cross-entropy only (`ce`), with CE + KL to the dense teacher (`kl`), and with
CE + SquareHead (`sq`). A seed chooses calibration batches and the order of training data; a cell at seed 1 differs from one at
seed 0 in nothing else. Every cell is written to the JSON file as it is finished; a second run with the same file does only what is
missing. Seeds come first in the order of work, so that an interrupted run has whole seeds.

    python benchmarks/sparse_quality.py --threads 1 --out runs/sparse_quality.json --save

Learning rates of the recovery (`Task.rates`) are the same for the three losses. For t5 and whisper 1e-3 was the better of 3e-4 and 1e-3
for each loss at 90 % on seed 100, which is not among the reported ones; decoder (1e-3) and MiniLM (3e-4) have not been searched:

    python benchmarks/sparse_quality.py --out runs/pilot.json --seeds 100 --methods sparsegpt --sparsity 0.9 --rate 3e-4
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import begin, parser, report
from sparsify.modules.masked import check_masks, mask_modules
from sparsify.program.capture import capture
from sparsify.pruning.rule import Prune
from sparsify.pruning.sequential import prune_model
from sparsify.train.squarehead import Distiller

Batch = dict[str, Tensor]
RECOVERIES: dict[str, dict[str, float]] = {
    "ce": {"ce": 1, "sq": 0},
    "kl": {"ce": 1, "kl": 1, "sq": 0},
    "sq": {"ce": 1, "sq": 1},
}


@dataclass(frozen=True)
class Task:
    """One model and its data.

    build: the untrained model. batch: `(generator, rows) → batch` of training data. score: accuracy on held-out data, higher is better.
    phases: training of the dense model, `(steps, learning rate, batch)` each. rates: learning rate of the recovery, by its loss.
    steps: of each recovery. rows: of a training batch.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]
    score: Callable[[nn.Module], float]
    phases: tuple[tuple[int, float, Callable[[torch.Generator, int], Batch]], ...]
    rates: dict[str, float]
    steps: int = 40
    rows: int = 16


@torch.no_grad()
def token_accuracy(model: nn.Module, batches: list[Batch], shift: bool) -> float:
    """Share of target tokens whose most likely prediction is right."""
    model.eval()
    right = count = 0
    for batch in batches:
        predicted = model(**batch).logits.argmax(-1)
        labels = batch["labels"]
        if shift:
            predicted, labels = predicted[:, :-1], labels[:, 1:]
        kept = labels != -100
        right += int((predicted == labels)[kept].sum())
        count += int(kept.sum())
    return right / count


# --- the four tasks ---------------------------------------------------------------------------------------------------------


def decoder_task(fast: bool) -> Task:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsify.demo.stdlib_text import code, prose

    def as_bytes(text: str) -> Tensor:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()

    source, texts = as_bytes(code(400_000 if fast else 6_000_000)), as_bytes("\n".join(prose()))
    held = len(texts) // 10
    length = 64

    def windows(data: Tensor) -> Callable[[torch.Generator, int], Batch]:
        def draw(generator: torch.Generator, rows: int) -> Batch:
            starts = torch.randint(len(data) - length, (rows,), generator=generator).tolist()
            ids = torch.stack([data[s : s + length] for s in starts])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

        return draw

    unseen, generator = windows(texts[:held]), torch.Generator().manual_seed(99)
    tests = [unseen(generator, 64) for _ in range(1 if fast else 6)]
    size = 64 if fast else 128
    config = LlamaConfig(
        vocab_size=256, hidden_size=size, intermediate_size=11 * size // 4, num_hidden_layers=2 if fast else 4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=length, use_cache=False,
    )  # fmt: skip
    tune = windows(texts[held:])
    first, second = (20, 10) if fast else (1500, 400)
    return Task(
        "decoder",
        lambda: LlamaForCausalLM(config),
        tune,
        lambda model: token_accuracy(model, tests, shift=True),
        ((first, 2e-3, windows(source)), (second, 5e-4, tune)),
        {"ce": 1e-3, "kl": 1e-3, "sq": 1e-3},
    )


def t5_task(fast: bool) -> Task:
    from transformers import T5Config, T5ForConditionalGeneration

    def draw(generator: torch.Generator, rows: int) -> Batch:
        length = 12
        counts = torch.randint(4, length + 1, (rows,), generator=generator)
        digits = torch.randint(2, 12, (rows, length), generator=generator)
        kept = torch.arange(length) < counts[:, None]
        ordered = digits.masked_fill(~kept, 99).sort(1).values
        labels = ((ordered - 2) * 7 % 10 + 12).masked_fill(~kept, -100)  # another alphabet
        return {"input_ids": digits.masked_fill(~kept, 0), "attention_mask": kept.long(), "labels": labels}

    size = 32 if fast else 128
    config = T5Config(
        vocab_size=24, d_model=size, d_kv=size // 4, d_ff=4 * size, num_layers=2 if fast else 3, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0, use_cache=False,
    )  # fmt: skip
    unseen = torch.Generator().manual_seed(99)
    tests = [draw(unseen, 64) for _ in range(1 if fast else 8)]
    return Task(
        "t5",
        lambda: T5ForConditionalGeneration(config),
        draw,
        lambda model: token_accuracy(model, tests, shift=False),
        ((20 if fast else 3000, 1e-3, draw),),
        {"ce": 1e-3, "kl": 1e-3, "sq": 1e-3},
        rows=32,
    )


def whisper_task(fast: bool) -> Task:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    bands, frames, notes, vocabulary = 20, 80, 8, 24
    spectra = torch.rand(vocabulary, bands, generator=torch.Generator().manual_seed(5)).square()

    def draw(generator: torch.Generator, rows: int) -> Batch:
        tokens = torch.randint(4, vocabulary, (rows, notes), generator=generator)
        sound = spectra[tokens].repeat_interleave(frames // notes, 1).transpose(1, 2)  # (rows, bands, frames)
        loud = torch.rand(rows, 1, frames, generator=generator) * 0.5 + 0.75
        noisy = sound * loud + 0.35 * torch.randn(rows, bands, frames, generator=generator)
        return {"input_features": noisy, "labels": tokens}

    size = 32 if fast else 128
    config = WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=bands, max_source_positions=frames // 2, max_target_positions=notes + 2,
        d_model=size, encoder_layers=2 if fast else 3, decoder_layers=2 if fast else 3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=4 * size, decoder_ffn_dim=4 * size, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, use_cache=False,
    )  # fmt: skip
    unseen = torch.Generator().manual_seed(99)
    tests = [draw(unseen, 64) for _ in range(1 if fast else 8)]
    return Task(
        "whisper",
        lambda: WhisperForConditionalGeneration(config),
        draw,
        lambda model: token_accuracy(model, tests, shift=False),
        ((20 if fast else 1500, 1e-3, draw),),
        {"ce": 1e-3, "kl": 1e-3, "sq": 1e-3},
    )


class Labelled(nn.Module):
    """MiniLM, mean pooling and a head, in the calling convention of a Hugging Face classifier."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, classes)
        self.config = encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        from sparsify.demo.minilm import mean_pool

        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(mean_pool(hidden, attention_mask))
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def minilm_task(fast: bool) -> Task:
    from sparsify.demo.minilm import load_encoder, load_tokenizer
    from sparsify.demo.stdlib_text import docstring_task

    tokenizer, data = load_tokenizer(), docstring_task(4 if fast else 24)

    def tokenised(texts: list[str], labels: list[int]) -> Batch:
        made = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {
            "input_ids": made["input_ids"],
            "attention_mask": made["attention_mask"],
            "labels": torch.tensor(labels),
        }

    def draw(generator: torch.Generator, rows: int) -> Batch:
        chosen = torch.randint(len(data.train_texts), (rows,), generator=generator).tolist()
        return tokenised([data.train_texts[i] for i in chosen], [data.train_labels[i] for i in chosen])

    held = list(zip(data.test_texts, data.test_labels, strict=True))[: 64 if fast else 768]  # their order is a hash's
    held.sort(key=lambda pair: len(pair[0]))  # texts of like length together: little padding
    texts, labels = zip(*held, strict=True)
    tests = [tokenised(list(texts[i : i + 64]), list(labels[i : i + 64])) for i in range(0, len(held), 64)]

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        model.eval()
        right = sum(int((model(**batch)["logits"].argmax(-1) == batch["labels"]).sum()) for batch in tests)
        return right / sum(len(batch["labels"]) for batch in tests)

    return Task(
        "minilm",
        lambda: Labelled(load_encoder(), len(data.classes)),
        draw,
        score,
        ((5 if fast else 300, 2e-4, draw),),
        {"ce": 3e-4, "kl": 3e-4, "sq": 3e-4},
    )


TASKS: dict[str, Callable[[bool], Task]] = {
    "decoder": decoder_task, "t5": t5_task, "whisper": whisper_task, "minilm": minilm_task
}  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------------


def optimise(
    model: nn.Module, steps: int, rate: float, batches: Iterator[Batch], loss_of: Callable[[Batch], Tensor]
) -> None:
    """AdamW, warm-up over the first 20 steps or tenth, linear decay, clipping at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warm = max(1, min(20, steps // 10))
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm) * (1 - step / steps)
        loss_of(next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def stream(draw: Callable[[torch.Generator, int], Batch], rows: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(generator, rows)


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(**batch)
    return outputs["loss"]


def dense_model(task: Task, folder: Path) -> nn.Module:
    """Trained once and kept in `folder`."""
    torch.manual_seed(0)
    model = task.build()
    path = folder / f"{task.name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()
    for number, (steps, rate, draw) in enumerate(task.phases):
        optimise(model, steps, rate, stream(draw, task.rows, 1000 + number), lambda batch: own_loss(model, batch))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), temporary := path.with_suffix(f".tmp{os.getpid()}"))
    os.replace(temporary, path)
    return model.eval()


def pruned_model(
    task: Task, dense: nn.Module, method: Any, sparsity: float, seed: int, samples: int
) -> tuple[nn.Module, float]:
    """The dense model with masks, and the seconds that pruning took."""
    generator = torch.Generator().manual_seed(2000 + seed)
    calibration = [task.batch(generator, 8) for _ in range(max(1, samples // 8))]
    rule = Prune(method=method, sparsity=sparsity, seed=seed, exclude=("head",))
    host = copy.deepcopy(dense)
    program = capture(host, {k: v for k, v in seq2seq_example(dense, calibration[0]).items() if k != "labels"})
    names, _ = rule.targets(program)
    start = time.perf_counter()
    result = prune_model(host, program, [(name, rule) for name in names], calibration, seed=seed, progress=False)
    mask_modules(host, result.masks)
    return host.eval(), time.perf_counter() - start


def seq2seq_example(model: nn.Module, batch: Batch) -> Batch:
    """An encoder–decoder makes its decoder inputs from labels; the trace needs them spelled out."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch
    return {**batch, "decoder_input_ids": batch["labels"].clamp_min(0)}


def recover(task: Task, host: nn.Module, dense: nn.Module, recovery: str, steps: int, rate: float, seed: int) -> None:
    """Sparse fine-tuning of a pruned host, in place."""
    distiller = Distiller(host, dense, **RECOVERIES[recovery])
    optimise(host, steps, rate, stream(task.batch, task.rows, 3000 + seed), lambda batch: distiller(batch).loss)
    distiller.student_outputs.remove()
    distiller.teacher_outputs.remove()
    check_masks(host)


# --- the cells ---------------------------------------------------------------------------------------------------------------


class Results:
    """Finished cells by name, in a JSON file that is replaced whole after each."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            held = json.loads(path.read_bytes())
            if held["settings"] != settings:
                raise SystemExit(f"{path} was made with {held['settings']}, not {settings}: choose another --out")
            self.cells = held["cells"]
        self.settings = settings

    def put(self, name: str, cell: dict[str, Any]) -> None:
        self.cells[name] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text(
            json.dumps({"settings": self.settings, "cells": self.cells}, indent=1) + "\n", encoding="utf-8"
        )
        os.replace(temporary, self.path)


def run(task: Task, seed: int, arguments: argparse.Namespace, results: Results) -> None:
    dense = dense_model(task, Path(arguments.out).parent / f"dense-{'fast' if arguments.fast else 'full'}")
    if f"{task.name}/dense" not in results.cells:
        results.put(f"{task.name}/dense", {"task": task.name, "method": "dense", "score": task.score(dense)})
    for sparsity in arguments.sparsity:
        for method in arguments.methods:
            if method == "magnitude" and seed != arguments.seeds[0]:
                continue  # no seed enters it
            cells = {"one-shot": f"{task.name}/{method}/{sparsity:g}/one-shot/{seed}"}
            if method == arguments.recover_from and sparsity in arguments.recover_at:
                cells |= {r: f"{task.name}/{method}/{sparsity:g}/{r}/{seed}" for r in arguments.recoveries}
            missing = {what: name for what, name in cells.items() if name not in results.cells}
            if not missing:
                continue
            host, seconds = pruned_model(task, dense, method, sparsity, seed, arguments.calibration)
            for what, name in missing.items():
                cell: dict[str, Any] = {"task": task.name, "method": method, "sparsity": sparsity}
                cell |= {"recovery": what, "seed": seed, "seconds": round(seconds, 2)}
                model = host
                if what != "one-shot":
                    model, start = copy.deepcopy(host), time.perf_counter()
                    steps, rate = arguments.steps or task.steps, arguments.rate or task.rates[what]
                    recover(task, model, dense, what, steps, rate, seed)
                    cell |= {"steps": steps, "rate": rate, "seconds": round(time.perf_counter() - start, 2)}
                results.put(name, {**cell, "score": task.score(model)})
                print(f"{name}: {results.cells[name]['score']:.4f}", file=sys.stderr, flush=True)


def summary(cells: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds; a row per task, method and recovery, a column per sparsity."""
    groups: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for cell in cells.values():
        key = (cell["task"], cell["method"], cell.get("recovery", ""))
        groups.setdefault(key, {}).setdefault(cell.get("sparsity", 0.0), []).append(cell["score"])
    rows = []
    for (task, method, recovery), by_sparsity in groups.items():
        row: dict[str, Any] = {"task": task, "method": method, "recovery": recovery}
        for sparsity, scores in sorted(by_sparsity.items()):
            spread = f" ± {100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            row[f"{sparsity:.0%}"] = f"{100 * statistics.mean(scores):.2f}{spread}"
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--out", default="runs/sparse_quality.json", help="cells are kept here; the run resumes from it"
    )
    options.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    options.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda", "magnitude", "random"])
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
    options.add_argument("--recoveries", nargs="+", choices=list(RECOVERIES), default=list(RECOVERIES))
    options.add_argument("--recover-from", default="sparsegpt", help="the one-shot method that recovery starts from")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument(
        "--recover-at", type=float, nargs="+", default=[0.5, 0.75, 0.9], help="sparsities to recover from"
    )
    options.add_argument("--steps", type=int, default=0, help="of each recovery (0: the task's own)")
    options.add_argument("--rate", type=float, default=0.0, help="learning rate of each recovery (0: the task's own)")
    options.add_argument("--calibration", type=int, default=128, help="calibration rows")
    arguments = options.parse_args()
    if arguments.fast:
        arguments.steps, arguments.calibration = 3, 16
    begin(arguments)
    settings = {"fast": arguments.fast, "steps": arguments.steps, "calibration": arguments.calibration}
    settings |= {"recover_from": arguments.recover_from, "rate": arguments.rate}
    results = Results(Path(arguments.out), settings)
    tasks = [TASKS[name](arguments.fast) for name in arguments.tasks]
    for seed in arguments.seeds:
        for task in tasks:
            run(task, seed, arguments, results)
    shown = {n: c for n, c in results.cells.items() if c["task"] in arguments.tasks}
    rows = summary(shown)
    arguments.out = Path(arguments.out).name  # the record names no folder of the machine
    columns = [
        "task",
        "method",
        "recovery",
        *sorted({k for r in rows for k in r if k.endswith("%")}, key=lambda k: int(k[:-1])),
    ]
    report(
        "sparse_quality",
        arguments,
        rows,
        columns=columns,
        notes=["scores in percent, mean ± standard deviation over seeds"],
    )


if __name__ == "__main__":
    main()
