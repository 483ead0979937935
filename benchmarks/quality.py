"""What the methods learn and what they forget: a small decoder, pretrained here, then fine-tuned on text-to-SQL.

    base    LlamaForCausalLM of 1.1 M parameters over bytes, pretrained on the standard library's sources (cached in --out)
    task    questions from a seeded grammar → SQL, loss on the answer only; held-out questions never occur in training
    full, lora, s2ft, paca, rosa
            full fine-tuning, and four methods with the same number of trained parameters (--rank is LoRA's, the others follow)

For each method the learning rate is tuned by one rule: on a seed of its own, three rates half a decade apart, then outwards
as long as the best one lies on an edge, by loss on a validation set. Then --seeds runs with that rate. All methods take the
same number of optimizer steps, batches and warm-up; RoSA's low-rank warm-up and restart (the paper's schedule) come out of it.

    exact    share of held-out questions whose whole answer is right (greedy decoding)
    tokens   share of answer bytes that are right, given the right ones before
    forget   loss on held-out library text after fine-tuning minus before, in nats per byte

Values are means over seeds ± standard errors. Every finished run is one JSON file in --out; a run that was stopped goes on where it was.

    python benchmarks/quality.py --save          about a quarter of an hour on two quiet cores
    python benchmarks/quality.py --fast
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import begin, parser, report

PAD, END, VOCABULARY = 256, 257, 258
IGNORED = -100
TUNING_SEED = 1000
MOST_RATES = 7


@dataclass(frozen=True)
class Setting:
    """Everything that a number depends on, so that cached results are never mixed up."""

    width: int = 128
    ffn: int = 384
    layers: int = 5
    heads: int = 4
    sequence: int = 128
    pretrain_steps: int = 1000
    pretrain_batch: int = 16
    text_bytes: int = 4_000_000
    steps: int = 160
    batch: int = 16
    test: int = 512
    forget_blocks: int = 64
    rank: int = 4
    mask_batches: int = 8


FAST = Setting(
    width=32, ffn=48, layers=2, heads=2, sequence=64, pretrain_steps=8, pretrain_batch=4, text_bytes=60_000, steps=8, batch=8, test=16,
    forget_blocks=2, rank=2, mask_batches=2,
)  # fmt: skip


# --- data ----------------------------------------------------------------------------------------------------------------

TABLES = ("users", "orders", "cities", "books", "songs", "teams", "trains", "rooms", "films", "farms", "ships", "games")
COLUMNS = ("age", "price", "size", "year", "score", "weight", "speed", "height", "rank", "length", "stock", "cost")
ASKS = {
    "how many {t}": "SELECT COUNT(*) FROM {t}",
    "list all {t}": "SELECT * FROM {t}",
    "show {d} of {t}": "SELECT {d} FROM {t}",
    "mean {d} of {t}": "SELECT AVG({d}) FROM {t}",
    "top {d} of {t}": "SELECT MAX({d}) FROM {t}",
    "least {d} of {t}": "SELECT MIN({d}) FROM {t}",
}
FILTERS = {
    "": "",
    " with {c} over {n}": " WHERE {c} > {n}",
    " with {c} under {n}": " WHERE {c} < {n}",
    " with {c} of {n}": " WHERE {c} = {n}",
}
ORDERS = {"": "", " by {c}": " ORDER BY {c}", " down by {c}": " ORDER BY {c} DESC"}


def question(generator: torch.Generator) -> tuple[str, str]:
    """One question and its SQL."""

    def pick(options: Any) -> Any:
        options = list(options)
        return options[int(torch.randint(len(options), (), generator=generator))]

    words = {"t": pick(TABLES), "c": pick(COLUMNS), "d": pick(COLUMNS), "n": str(pick(range(10, 100)))}
    ask, where, order = pick(ASKS), pick(FILTERS), pick(ORDERS)
    asked = (ask + where + order).format(**words)
    return f"# {asked}?\n", (ASKS[ask] + FILTERS[where] + ORDERS[order]).format(**words) + ";"


def held_out(text: str) -> int:
    """Which part a question belongs to, by its hash: 0 test, 1 validation, 2 and more training."""
    return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % 8


def questions(seed: int, part: int | None) -> Iterator[tuple[str, str]]:
    """An endless stream of questions of one part (None: training)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        asked, answer = question(generator)
        if held_out(asked) == part or (part is None and held_out(asked) > 1):
            yield asked, answer


def encode(rows: list[tuple[str, str]], device: str) -> dict[str, Tensor]:
    """Question and answer as bytes, padded; labels on the answer and its end only."""
    ids, labels = [], []
    for asked, answer in rows:
        prompt, reply = list(asked.encode()), [*answer.encode(), END]
        ids.append(prompt + reply)
        labels.append([IGNORED] * len(prompt) + reply)
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([r + [PAD] * (longest - len(r)) for r in ids], device=device),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in ids], device=device),
        "labels": torch.tensor([r + [IGNORED] * (longest - len(r)) for r in labels], device=device),
    }


def task_batches(setting: Setting, seed: int, count: int, device: str) -> list[dict[str, Tensor]]:
    stream = questions(seed, None)
    return [encode([next(stream) for _ in range(setting.batch)], device) for _ in range(count)]


def held_out_batches(setting: Setting, part: int, device: str) -> list[dict[str, Tensor]]:
    """Distinct questions of the test or the validation part; the same for every method and seed."""
    found: dict[str, str] = {}
    for asked, answer in questions(77, part):
        found[asked] = answer
        if len(found) == setting.test:
            break
    rows = sorted(found.items(), key=lambda row: len(row[0]) + len(row[1]))
    return [encode(rows[i : i + 64], device) for i in range(0, len(rows), 64)]


def library_text(setting: Setting) -> tuple[Tensor, Tensor]:
    """The standard library's sources as bytes in blocks `(blocks, sequence)`: training, and every 20th held out."""
    from sparsify.demo.stdlib_text import code

    data = torch.frombuffer(bytearray(code(setting.text_bytes).encode()), dtype=torch.uint8).long()
    blocks = data[: data.numel() // setting.sequence * setting.sequence].view(-1, setting.sequence)
    group = 32  # neighbouring blocks go to the same side
    side = (torch.arange(len(blocks)) // group) % 20 == 7
    order = torch.randperm(int(side.sum()), generator=torch.Generator().manual_seed(3))
    return blocks[~side], blocks[side][order]


# --- the base ------------------------------------------------------------------------------------------------------------


def new_model(setting: Setting, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setting.width,
        intermediate_size=setting.ffn,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def warm_linear(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up over a twentieth, then linearly to zero."""
    warm = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )


def key_of(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename: a killed run leaves no half file."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def pretrained(setting: Setting, directory: Path, device: str) -> Any:
    """The base model, from the cache or trained now."""
    fields = ("width", "ffn", "layers", "heads", "sequence", "pretrain_steps", "pretrain_batch", "text_bytes")
    path = directory / f"base-{key_of({f: getattr(setting, f) for f in fields})}.pt"
    model = new_model(setting).to(device)
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return model.eval()
    blocks, _ = library_text(setting)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = warm_linear(optimizer, setting.pretrain_steps)
    model.train()
    bar = tqdm(range(setting.pretrain_steps), desc="pretrain", unit="step", dynamic_ncols=True)
    for step in bar:
        rows = blocks[torch.randint(len(blocks), (setting.pretrain_batch,), generator=generator)].to(device)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    write_atomic(path, lambda p: torch.save(model.state_dict(), p))
    return model.eval()


# --- the methods ---------------------------------------------------------------------------------------------------------


def budget(setting: Setting) -> int:
    """Parameters of LoRA on all linears of one layer."""
    return setting.rank * (4 * 2 * setting.width + 3 * (setting.width + setting.ffn))


def rules(method: str, setting: Setting) -> list[Any]:
    """The plan's rules with `budget` trained parameters per layer, up to one channel."""
    from sparsify import S2FT, LoRA, PaCA, RoSA

    width, total = setting.width, budget(setting)
    if method == "lora":
        return [LoRA(rank=setting.rank)]
    if method == "s2ft":  # one head, the rest in Down: nearest to equal shares that whole heads allow
        head = width // setting.heads * width
        return [
            S2FT(structure="attention", units=1),
            S2FT(structure="ffn", units=max(1, round((total - head) / width))),
        ]
    if method == "paca":  # equal ranks, what is left over in Down
        outputs = 5 * width + 2 * setting.ffn
        rank = total // outputs
        return [PaCA(rank={"*down_proj": rank + round((total - rank * outputs) / width), "*": rank})]
    if method == "rosa":  # half of it low-rank, half sparse
        low = setting.rank // 2
        weights = 4 * width**2 + 3 * width * setting.ffn
        return [RoSA(rank=low, density=(total - total * low // setting.rank) / weights)]
    raise ValueError(method)


METHODS = ("full", "lora", "s2ft", "paca", "rosa")
FIRST_RATES = {"full": 3e-4, "lora": 3e-3, "s2ft": 3e-3, "paca": 3e-3, "rosa": 3e-3}


def rate(method: str, number: int) -> float:
    """Rates half a decade apart; 0 is the middle one of the first three."""
    return FIRST_RATES[method] * 10 ** (number / 2)


def prepare(method: str, base: Any, setting: Setting, seed: int) -> Any:
    import copy

    import sparsify
    from sparsify import Plan

    model = copy.deepcopy(base)
    return (
        model if method == "full" else sparsify.compile(model, Plan(rules(method, setting), seed=seed), progress=False)
    )


def groups_of(model: Any, method: str, lr: float) -> list[dict[str, Any]]:
    """RoSA's two rates keep the paper's ratio, 2e-4 to 7e-4."""
    if method == "rosa":
        return model.sparsify.param_groups(sparse_lr=lr * 2 / 7, lora_lr=lr)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


@torch.no_grad()
def score(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Loss, exact answers and right bytes. Greedy decoding gives the answer exactly when every byte of it is the best one."""
    model.eval()
    exact = right = total = rows = 0
    loss = 0.0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        counted = labels != IGNORED
        hits = (logits.argmax(-1) == labels) | ~counted
        exact, rows = exact + int(hits.all(1).sum()), rows + len(labels)
        right, total = right + int((hits & counted).sum()), total + int(counted.sum())
        loss += float(nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum"))
    return {"exact": exact / rows, "tokens": right / total, "loss": loss / total}


@torch.no_grad()
def text_loss(model: Any, blocks: Tensor, device: str) -> float:
    """Nats per byte on held-out library text."""
    model.eval()
    losses = [float(model(input_ids=b.to(device), labels=b.to(device)).loss) * len(b) for b in blocks.split(16)]
    return sum(losses) / len(blocks)


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    setting: Setting
    base: Any
    directory: Path
    device: str
    text: Tensor
    before: float


def run(bench: Bench, method: str, lr: float, seed: int, label: str) -> dict[str, Any]:
    """One fine-tuning run, from the cache or done now."""
    setting = bench.setting
    path = bench.directory / "runs" / f"{method}-{seed}-{key_of(asdict(setting), method, lr, seed)}.json"
    if path.exists():
        return json.loads(path.read_bytes())
    torch.manual_seed(seed)
    model = prepare(method, bench.base, setting, seed)
    batches = task_batches(setting, seed + 1, setting.steps, bench.device)
    groups = groups_of(model, method, lr)
    trained = [p for g in groups for p in g["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = warm_linear(optimizer, setting.steps)
    collect_at = max(1, setting.steps // 10) if method == "rosa" else -1
    seen = []
    for step, batch in enumerate(tqdm(batches, desc=label, unit="step", leave=False, dynamic_ncols=True)):
        if step == collect_at:
            from sparsify.train.rosa import collect_masks

            chosen = task_batches(setting, seed + 2, setting.mask_batches, bench.device)
            collect_masks(model, chosen, optimizer=optimizer, progress=False)
        model.train()
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen.append(loss.item())
    found: dict[str, Any] = {"method": method, "lr": lr, "seed": seed, "trainable": sum(p.numel() for p in trained)}
    if not all(map(math.isfinite, seen)):
        found |= {"valid": None, "diverged": True}
    else:
        found |= score(model, held_out_batches(setting, 0, bench.device))
        found["valid"] = score(model, held_out_batches(setting, 1, bench.device))["loss"]
        found["forget"] = text_loss(model, bench.text, bench.device) - bench.before
        found["train_loss"] = statistics.mean(seen[-10:])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda p: p.write_text(json.dumps(found), encoding="utf-8"))
    return found


def tune(bench: Bench, method: str, most: int) -> tuple[float, dict[str, float]]:
    """The best rate by validation loss, and every rate that was tried."""
    tried: dict[int, float] = {}

    def look(number: int) -> None:
        lr = rate(method, number)
        valid = run(bench, method, lr, TUNING_SEED, f"tune {method} {lr:.0e}")["valid"]
        tried[number] = math.inf if valid is None else valid

    for number in (0, -1, 1)[:most]:
        look(number)
    while len(tried) < most:
        best = min(tried, key=lambda n: tried[n])
        if min(tried) < best < max(tried):
            break
        look(best - 1 if best == min(tried) else best + 1)
    best = min(tried, key=lambda n: tried[n])
    return rate(method, best), {f"{rate(method, n):.2g}": v for n, v in sorted(tried.items())}


def error(values: list[float]) -> float:
    """Standard error of the mean; NaN for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def options() -> argparse.ArgumentParser:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--out", default="build/quality", metavar="DIR", help="pretrained base and finished runs")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--steps", type=int, help="of fine-tuning")
    return made


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = options().parse_args(argv)
    begin(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    setting = FAST if arguments.fast else Setting()
    if arguments.steps:
        setting = Setting(**{**asdict(setting), "steps": arguments.steps})
    seeds = min(arguments.seeds, 2) if arguments.fast else arguments.seeds
    directory = Path(arguments.out)
    directory.mkdir(parents=True, exist_ok=True)
    base = pretrained(setting, directory, arguments.device)
    text = library_text(setting)[1][: setting.forget_blocks]
    bench = Bench(setting, base, directory, arguments.device, text, text_loss(base, text, arguments.device))
    start = score(base, held_out_batches(setting, 0, arguments.device))

    rows: list[dict[str, Any]] = []
    tuned = {m: tune(bench, m, 1 if arguments.fast else MOST_RATES) for m in arguments.methods}
    for method in arguments.methods:
        lr, tried = tuned[method]
        runs = [run(bench, method, lr, seed, f"{method} seed {seed}") for seed in range(seeds)]
        good = [r for r in runs if r["valid"] is not None]
        row: dict[str, Any] = {"method": method, "trainable": runs[0]["trainable"], "lr": lr}
        for name in ("exact", "tokens", "loss", "forget"):
            values = [r[name] for r in good]
            row[f"{name}_mean"] = statistics.mean(values) if values else None
            row[f"{name}_error"] = error(values) if len(values) > 1 else None
            if values:
                scale, digits = (100, 1) if name in ("exact", "tokens") else (1, 3)
                row[name] = f"{scale * row[f'{name}_mean']:.{digits}f} ± {scale * error(values):.{digits}f}"
        row |= {"diverged": len(runs) - len(good), "rates tried": tried, "runs": runs}
        rows.append(row)
    rows.sort(key=lambda r: -(r["exact_mean"] or 0.0))
    notes = [
        f"base: {sum(p.numel() for p in base.parameters()):,} parameters, {bench.before:.3f} nats per byte on held-out text; "
        f"on the task before training: {100 * start['exact']:.1f} % exact, {100 * start['tokens']:.1f} % of bytes",
        f"{setting.steps} steps of {setting.batch}, {setting.test} test questions, {seeds} seeds, mean ± standard error; exact and "
        "tokens in %, loss on the answers, forget in nats per byte (lower is better)",
        "rates: " + "; ".join(f"{m} {', '.join(f'{k}: {v:.3f}' for k, v in t.items())}" for m, (_, t) in tuned.items()),
        "order here, by exact: " + " > ".join(r["method"] for r in rows) + "; by forgetting, least first: "
        + " < ".join(r["method"] for r in sorted(rows, key=lambda r: r["forget_mean"] if r["forget_mean"] is not None else math.inf)),
        "papers: RoSA above LoRA and near full (LLaMA2-7B, GSM8K, ViGGO, SQL); S2FT above LoRA, and it forgets less than full and "
        "LoRA; PaCA on a par with LoRA",
    ]  # fmt: skip
    columns = ["method", "trainable", "lr", "exact", "tokens", "loss", "forget", "diverged"]
    return report("quality", arguments, rows, columns=columns, notes=notes)


if __name__ == "__main__":
    main()
