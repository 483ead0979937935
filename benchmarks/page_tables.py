"""Tables and charts of the pages, each a function of the newest record of a benchmark; `pages.py` puts them where a page asks for them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import claim_page
from benchmarks.bars import NEUTRAL, OURS, THEIRS, Bar, chart

RESULTS = Path(__file__).resolve().parent / "results"
Row = Mapping[str, Any]
TABLES: dict[str, Callable[[], str]] = {}
CHARTS: dict[str, Callable[[], str]] = {}
READ: list[Path] = []
"""Records in the order in which tables and charts asked for them; `pages.py` names them where one has a row that no table knows."""


def measured(make: Callable[[], str]) -> Callable[[], str]:
    """Make a table known under its function's name."""
    TABLES[make.__name__] = make
    return make


def drawn(make: Callable[[], str]) -> Callable[[], str]:
    """Make a chart known: `docs/charts/NAME.svg`."""
    CHARTS[make.__name__] = make
    return make


def newest(name: str) -> Any:
    """The newest record `NAME-DATE.json`."""
    dated = [p for p in RESULTS.glob(f"{name}-*.json") if re.fullmatch(re.escape(name) + r"-\d{4}-\d\d-\d\d", p.stem)]
    if not dated:
        raise FileNotFoundError(f"no record {name}-DATE.json in {RESULTS}")
    path = max(dated)
    READ.append(path)
    return {**json.loads(path.read_text(encoding="utf-8")), "file": path.name}


NUMBER = 18
"""Characters up to which a cell is one number with its unit, which no line break may part."""


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def cell(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}") if len(text) <= NUMBER else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns are left-aligned, the others right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] * left + [" ---: "] * (len(head) - left)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join([row[0], *map(cell, row[1:])]) + " |" for row in rows)])


def origin(*records: Row, more: str = "") -> str:
    """Which records, when and on what: the line below a table."""
    files = ", ".join(f"`{r['file']}`" for r in records)
    machine = records[0].get("machine", records[0])
    threads = machine.get("threads", records[0].get("threads"))
    return f"\n<small>{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}, {records[0]['date']}; {files}{more}.</small>"


def by(rows: Iterable[Row], key: str) -> dict[str, Row]:
    return {str(row[key]): row for row in rows}


# --- training ---

STEP = {
    "floor": "forward and backward, nothing trains",
    "s2ft": "**S2FT**",
    "paca": "**PaCA**",
    "rosa": "**RoSA**",
    "our_lora": "**LoRA**",
    "lora": "PEFT LoRA",
    "miss": "PEFT MiSS",
    "shira": "PEFT SHiRA",
    "supra": "PEFT Super-Tuning",
    "full": "full fine-tuning",
}
PACKED = {
    "qs2ft": "**S2FT** over NF4",
    "qpaca": "**PaCA** over NF4",
    "qrosa": "**RoSA** over NF4",
    "qlora": "PEFT LoRA over bitsandbytes NF4",
}


def step_rows() -> tuple[dict[str, Row], Row, Row]:
    """Rows of the newest run; what only the longer run has comes from there, and ratios never cross runs."""
    short, long = newest("train_step-eager-2threads"), newest("train_step-eager-all-2threads")
    return by(long["rows"], "method") | by(short["rows"], "method"), short, long


def step_table(names: Mapping[str, str]) -> str:
    rows, short, long = step_rows()
    shown = [
        [
            label,
            f"{rows[n]['trainable']:,}",
            f"{rows[n]['floor_ratio'][0]:.2f} ×",
            f"{rows[n]['held MiB']:.0f} MiB",
            f"{rows[n]['peak MiB']:.0f} MiB",
        ]
        for n, label in names.items()
    ]
    head = ("method", "trains", "time of a step", "kept for backward", "peak memory")
    return markdown(head, shown) + "\n" + origin(short, long, more="; " + short["notes"][0].split(";")[0])


@measured
def training_step() -> str:
    return step_table(STEP)


@measured
def training_real() -> str:
    record = newest("real_model-fp32-1thread")
    labels = STEP | {"peft_lora": "PEFT LoRA"}
    shown = [
        [
            labels[row["method"]],
            str(row["checkpointing"])
            if isinstance(row["checkpointing"], str)
            else ("yes" if row["checkpointing"] else "no"),
            f"{row['trained']:,}",
            f"{row['time / peft_lora']:.2f}",
            f"{row['added_MiB']:,.0f} MiB",
            f"{row['peak_MiB']:,.0f} MiB",
        ]
        for row in record["rows"]
    ]
    head = ("method", "recomputes", "trains", "time of a step, LoRA's = 1", "what training adds", "peak memory")
    return (
        markdown(head, shown)
        + "\n"
        + origin(record, more="; SmolLM2-135M, 8 × 256 tokens, processor time on a busy machine")
    )


@measured
def training_step_packed() -> str:
    return step_table(PACKED)


def step_line(name: str) -> str:
    rows, short, _ = step_rows()
    row, peft = rows[name], rows["lora"]
    return (
        f"Time of a step: {row['floor_ratio'][0] / peft['floor_ratio'][0]:.2f} × that of PEFT's LoRA of the same size, and "
        f"{row['floor_ratio'][0]:.2f} × that of a frozen model which passes gradients through every layer (LoRA "
        f"{peft['floor_ratio'][0]:.2f} ×; below 1 where the gradients need not go all the way). Kept for the backward pass: {row['held MiB']:.0f} MiB ({peft['held MiB']:.0f}). "
        f"Peak memory: {row['peak MiB']:.0f} MiB ({peft['peak MiB']:.0f}).\n" + origin(short)
    )


@measured
def cost_s2ft() -> str:
    return step_line("s2ft")


@measured
def cost_paca() -> str:
    return step_line("paca")


@measured
def cost_rosa() -> str:
    return step_line("rosa")


@measured
def cost_lora() -> str:
    return step_line("our_lora")


@measured
def experts_step() -> str:
    record = newest("train_step-moe-eager-2threads")
    names = {k: v for k, v in STEP.items() if k in by(record["rows"], "method")}
    rows = by(record["rows"], "method")
    shown = [
        [
            label,
            f"{rows[n]['floor_ratio'][0]:.2f} ×",
            f"{rows[n]['held MiB']:.0f} MiB",
            f"{rows[n]['peak MiB']:.0f} MiB",
        ]
        for n, label in names.items()
    ]
    note = "; " + record["notes"][0].split(";")[0]
    return markdown(("method", "time of a step", "kept for backward", "peak memory"), shown) + "\n" + origin(
        record, more=note
    )  # fmt: skip


@measured
def compiled_step() -> str:
    record = newest("train_step-compiled-2threads")
    names = {
        "floor": STEP["floor"],
        "s2ft": STEP["s2ft"],
        "miss": STEP["miss"],
        "lora": STEP["lora"],
        "full": STEP["full"],
    }
    rows = by(record["rows"], "method")
    shown = [
        [label, *(f"{v:.2f} ×" for v in r["floor_ratio"][:1]), f"{r['held MiB']:.0f} MiB", f"{r['peak MiB']:.0f} MiB"]
        for name, label in names.items()
        for r in [rows[f"{name}+compile"]]
    ]
    head = ("compiled with Inductor", "time of a step", "kept for backward", "peak memory")
    return markdown(head, shown) + "\n" + origin(record)


@measured
def survivors() -> str:
    record = newest("masked_step-2threads")
    names = {
        "dense": "dense, trained in full",
        "masked": "zeros kept by a mask",
        "survivors": "survivors alone (given up)",
    }
    shown = [
        [
            f"{r['sparsity']:.0%} zeros, {names[r['layout']]}".replace("%", " %"),
            f"{r['time / dense']:.2f} ×",
            f"{r['held MiB']:.0f} MiB",
            f"{r['peak in step MiB']:.0f} MiB",
        ]
        for r in record["rows"]
        if r["layout"] != "dense" or r["sparsity"] == record["rows"][0]["sparsity"]
    ]
    shown[0][0] = names["dense"]
    size = record["arguments"]["size"]
    head = (f"a step of a linear, {size} × {size}", "time", "weight, gradient and optimizer", "beside it, at the peak")
    return markdown(head, shown) + "\n" + origin(record)


@measured
def structures() -> str:
    record = newest("coverage")
    rows = record["rows"]
    shown = []
    for kind, label in (("attention", "attention"), ("ffn", "feed-forward")):
        for way in ("eager", "sdpa"):
            mine = [r for r in rows if r["attention by"] == way]
            wrong = sum(r[f"{kind} wrong"] for r in mine)
            exact = sum(r[kind] - r[f"{kind} wrong"] for r in mine)
            peer = sum(r.get(f"peer {kind}") or 0 for r in mine)
            shown.append([f"{label}, {way}, {len(mine)} models", str(exact), str(wrong), str(peer)])
    head = ("structures found", "exactly", "wrong", "exactly by Torch-Pruning")
    return markdown(head, shown) + "\n" + origin(record, more="; the peer is asked about the structures that we found")


@measured
def saved_compiled() -> str:
    record = newest("saved_bytes")
    names = {"llama": "Llama", "t5": "T5 encoder", "gpt2": "GPT-2", "bert": "BERT"}
    shown = [
        [
            f"{names[r['model']]}, {r['method'].replace('r=', 'r = ')}",
            f"{r['eager MiB']:.1f} MiB",
            f"{r['aot_eager MiB']:.1f} MiB",
            f"{r['sparsify MiB']:.1f} MiB",
            f"{r['over eager']:.2f} ×",
        ]
        for r in record["rows"]
    ]
    head = ("model, method", "eager", "AOTAutograd", '`backend="sparsify"`', "over eager")
    return markdown(head, shown) + "\n" + origin(record)


@measured
def loss_chunks() -> str:
    record = newest("loss_chunks")
    names = {"plain": "all logits at once", "torch": "PyTorch's `linear_cross_entropy`", "ours": "**sparsify**"}
    shown = []
    for r in record["rows"]:
        who, _, chunk = r["loss"].partition(" ")
        label = names[who] + (f", {chunk} tokens a chunk" if chunk else "")
        shown.append([f"{r['head']}, {r['dtype']}: {label}", f"{r['over plain']:.2f} ×", f"{r['MiB']:.0f} MiB"])
    return markdown(("loss and gradient of a head", "time", "memory beyond inputs"), shown) + "\n" + origin(record)


@drawn
def step_time() -> str:
    rows, short, _ = step_rows()
    shown = ("s2ft", "paca", "miss", "our_lora", "rosa", "lora", "full")
    plain = {n: STEP[n].strip("*") for n in shown}
    ours = {"s2ft", "paca", "rosa", "our_lora"}
    bars = [
        Bar(plain[n], rows[n]["floor_ratio"][0], f"{rows[n]['floor_ratio'][0]:.2f} ×", OURS if n in ours else THEIRS)
        for n in shown
    ]
    return chart(
        "Time of a training step, over the frozen model's",
        bars,
        f"{short['machine']['cpu']}, {short['date']}; less is better",
    )


@drawn
def step_memory() -> str:
    rows, short, _ = step_rows()
    shown = ("s2ft", "paca", "miss", "our_lora", "rosa", "lora", "full", "qs2ft", "qlora")
    names = STEP | PACKED
    ours = {"s2ft", "paca", "rosa", "our_lora", "qs2ft"}
    bars = [
        Bar(
            names[n].replace("*", ""),
            rows[n]["peak MiB"],
            f"{rows[n]['peak MiB']:.0f} MiB",
            OURS if n in ours else THEIRS,
        )
        for n in shown
    ]
    return chart(
        "Peak memory of a training step",
        bars,
        f"{short['machine']['cpu']}, {short['date']}; weights and optimizer included",
    )


@measured
def planner() -> str:
    records = [newest("autoplan"), newest("autoplan-paca-rosa")]
    rows = [row for record in records for row in record["rows"]]
    shown = [
        [
            f"{r['model']}, {r['method']}",
            f"{r['predicted MiB']:.0f} / {r['peak MiB']:.0f} MiB",
            f"{r['predicted ms']:.0f} / {r['step ms']:.0f} ms",
            f"{r['time']:.2f} ×",
        ]
        for r in rows
    ]
    return (
        markdown(("model, method", "memory: said / was", "step: said / was", "was over said"), shown)
        + "\n"
        + origin(*records)
    )


@measured
def compile_time() -> str:
    record = newest("compile_time-quiet")
    shown = [
        [f"{r['layers']} layers of width {r['width']}", f"{r['total s']:.1f} s", f"{r['capture s']:.1f} s"]
        for r in record["rows"]
    ]
    return (
        markdown(("Llama shape, no weights in memory", "`compile`", "of it the trace"), shown) + "\n" + origin(record)
    )


@measured
def in_place() -> str:
    record = newest("in_place")
    names = {"attention": "attention heads, as blocks", "ffn": "feed-forward channels, gathered"}
    shown = [
        [names[r["structure"]], f"{r['step over permuted (medians)']:.2f} ×"]
        for r in record["rows"]
        if r["units"] == "in place"
    ]
    return markdown(("trained in place", "step over the permuted one"), shown) + "\n" + origin(record)


# --- one run of the demo ---


@measured
def demo() -> str:
    record = newest("demo-smollm2-2threads")
    rows = [
        ["before", "", percent(record["base"]["exact"]), f"{record['base']['loss']:.2f}", ""],
        *(
            [
                t["label"],
                f"{t['lr']:g}",
                percent(t["score"]["exact"]),
                f"{t['score']['loss']:.2f}",
                f"{t['text'] - record['base_text']:+.2f}",
            ]
            for t in record["tuned"]
        ),
    ]
    head = ("SmolLM2-135M learns SQL", "learning rate", "right", "loss", "loss on other text")
    s = record["settings"]
    more = f"; {s['steps']} steps of {s['batch']} questions, {record['held_out']} held out, one seed; both train {record['tuned'][0]['trained']:,} parameters"
    return markdown(head, rows) + "\n" + origin(record, more=more)


@measured
def demo_decode() -> str:
    record = newest("demo-smollm2-2threads")
    rows = [
        [
            d["label"],
            f"{d['speed']:.0f} tokens/s",
            f"{d['size'] / 2**20:.0f} MiB",
            "" if d["score"] is None else percent(d["score"]["exact"]),
        ]
        for d in record["decoders"]
    ]
    return markdown(("the tuned model", "speed", "weights", "right"), rows) + "\n" + origin(record)


@measured
def demo_pruned() -> str:
    record = newest("demo-smollm2-2threads")
    dense, pruned = record["decoders"][0], record["decoders"][-1]
    before, after = (f"{d['score']['exact']:.0%}".replace("%", " %") for d in (dense, pruned))
    return (
        f"One-shot pruning costs a small model much of what it learned: in the demo SmolLM2 fell from {before} to {after} right answers "
        f"at {record['settings']['sparsity']:.0%} zeros, without recovery.".replace("%", " %").replace("  %", " %")
    )


@measured
def demo_switch() -> str:
    record = newest("demo-smollm2-2threads")
    rows = [
        [
            "no adapter" if s["label"] == "none" else s["label"],
            percent(s["scores"]["sql"]["exact"]),
            percent(s["scores"]["dates"]["exact"]),
            f"{1000 * s['switch']:.0f} ms",
        ]
        for s in record["served"]
    ]
    return markdown(("active adapter", "SQL right", "dates right", "switching took"), rows) + "\n" + origin(record)


# --- inference ---

ENGINES = {
    "dense": "torch fp32, dense",
    "bf16": "torch bf16, dense",
    "fp32": "**sparsify** fp32, 75 % zeros",
    "int8": "**sparsify** int8, 75 % zeros",
    "int8-pytorch": "the same kernels, called by PyTorch",
    "aten-int8": "torch weight-only int8",
    "aten-int4": "torch weight-only int4",
    "openvino-int8": "OpenVINO int8",
    "openvino-int4": "OpenVINO int4",
    "llamacpp-Q8_0": "llama.cpp Q8_0",
    "llamacpp-Q4_0": "llama.cpp Q4_0",
    "llamacpp-Q4_1": "llama.cpp Q4_1, dense (the file that the model came as)",
}
ENCODERS = ENGINES | {"packed-bf16": "**sparsify** bf16, 75 % zeros"}


def memory_of(row: Row) -> str:
    found = row.get("memory", row)
    return f"{found.get('MiB', found.get('of_files_MiB')):.0f} MiB"


def decode_rows(record: Row) -> list[list[str]]:
    return [
        [ENGINES[r["variant"]], f"{r['per_second']:.1f} tokens/s", memory_of(r)]
        for r in sorted(record["results"], key=lambda r: -r["per_second"])
    ]


@measured
def decode_smollm2() -> str:
    record = newest("cpu_decode-smollm2-2threads")
    return markdown(("SmolLM2-135M, one prompt", "speed", "weights"), decode_rows(record)) + "\n" + origin(record)


@measured
def decode_1b() -> str:
    record = newest("cpu_decode-llama-1b-int8-2threads")
    return (
        markdown(("Llama of 1B shape, random weights", "speed", "weights"), decode_rows(record)) + "\n" + origin(record)
    )


@measured
def decode_7b() -> str:
    names = ("llamacpp", "openvino", "aten")
    records = [newest(f"cpu_decode-llama-7b-int8-{name}-2threads") for name in names]
    rows = []
    for record in records:
        ours = by(record["results"], "variant")["int8"]
        for r in record["results"]:
            if r["variant"] != "int8":
                rows.append(
                    [
                        ENGINES[r["variant"]],
                        f"{r['per_second']:.1f}",
                        f"{ours['per_second']:.1f}",
                        f"{ours['per_second'] / r['per_second']:.2f} ×",
                    ]
                )
    head = ("Llama of 7B shape, random weights", "tokens/s", "**sparsify** int8, same run", "ours over it")
    return markdown(head, rows) + "\n" + origin(*records)


@measured
def encoder() -> str:
    record = newest("cpu_decode-minilm-2threads")
    rows = [
        [ENCODERS[r["variant"]], f"{r['speedup']:.2f} ×"]
        for r in sorted(record["results"], key=lambda r: -r["speedup"])
    ]
    note = f"; {record['batch']} × {record['seq']} tokens"
    return markdown(("MiniLM's shape", "over dense fp32"), rows) + "\n" + origin(record, more=note)


@drawn
def decoding() -> str:
    record = newest("cpu_decode-smollm2-2threads")
    ours = {"fp32", "int8", "int8-pytorch"}
    rows = sorted(record["results"], key=lambda r: -r["per_second"])
    bars = [
        Bar(
            ENGINES[r["variant"]].replace("*", ""),
            r["per_second"],
            f"{r['per_second']:.0f} tokens/s",
            OURS if r["variant"] in ours else NEUTRAL,
        )
        for r in rows
    ]
    return chart("SmolLM2-135M writing text on two cores", bars, f"{record['cpu']} without AVX-512, {record['date']}")


@drawn
def decoding_1b() -> str:
    record = newest("cpu_decode-llama-1b-int8-2threads")
    rows = sorted(record["results"], key=lambda r: -r["per_second"])
    bars = [
        Bar(
            ENGINES[r["variant"]].replace("*", ""),
            r["per_second"],
            f"{r['per_second']:.1f} tokens/s",
            OURS if r["variant"] == "int8" else THEIRS,
        )
        for r in rows
    ]
    return chart(
        "A decoder of 1B shape on two cores", bars, f"{record['cpu']}, {record['date']}; random weights, batch 1"
    )


# --- pruning ---


@measured
def prune_layer() -> str:
    records = [newest("prune_layer-4096-2threads"), newest("prune_layer-4096x11008-2threads")]
    rows = []
    for record in records:
        shape = f"{record['arguments']['rows']} × {record['arguments']['columns']}"
        patterns = {r["pattern"]: {} for r in record["rows"]}
        for r in record["rows"]:
            patterns[r["pattern"]][r["who"]] = r
        for pattern, who in patterns.items():
            ours, theirs = who["sparsify"], who["llm-compressor"]
            rows.append(
                [
                    f"{shape}, {'75 % anywhere' if pattern == 'unstructured' else pattern}",
                    f"{ours['seconds']:.1f} s",
                    f"{theirs['seconds']:.1f} s",
                    f"{ours['seconds'] / theirs['seconds']:.2f} ×",
                    f"{ours['relative error'] / theirs['relative error']:.3f} ×",
                ]
            )
    head = ("SparseGPT of one linear", "sparsify", "llm-compressor", "time", "error")
    return markdown(head, rows) + "\n" + origin(*records)


@measured
def prune_7b() -> str:
    records = [newest("prune_model-7b-wanda-1thread"), newest("prune_model-7b-sparsegpt-2threads")]
    rows = [
        [
            {"wanda": "Wanda", "sparsegpt": "SparseGPT"}[r["method"]],
            f"{r['blocks']} of 32",
            str(record["machine"]["threads"]),
            f"{r['block s']:.0f} s",
            f"{r['own MiB'] / 1024:.1f} GiB",
        ]
        for record in records
        for r in record["rows"]
    ]
    head = ("a Llama-2-7B shape, disk to disk", "blocks", "threads", "a block", "memory")
    return markdown(head, rows) + "\n" + origin(*records)


RECOVERED = {"one-shot": "one-shot", "ce": "+ cross-entropy", "kl": "+ KL", "sq": "+ SquareHead"}
TASKS = {"t5": "T5 that sorts", "whisper": "Whisper on tones", "decoder": "byte decoder", "minilm": "MiniLM"}


@measured
def recovery() -> str:
    records = [newest(f"sparse_quality-{n}-1thread") for n in ("t5-whisper", "decoder", "minilm")]
    rows = []
    for record in records:
        for task in record["arguments"]["tasks"]:
            mine = [r for r in record["rows"] if r["task"] == task]
            dense = next(r["0%"] for r in mine if r["method"] == "dense")
            for share in ("75%", "90%"):
                found = {r["recovery"]: r[share] for r in mine if r["method"] == "sparsegpt"}
                rows.append([f"{TASKS[task]}, {share[:-1]} % zeros", dense, *(found[k] for k in RECOVERED)])
    head = ("accuracy in percent", "dense", *RECOVERED.values())
    note = f"; {len(records[0]['arguments']['seeds'])} seeds, mean ± standard deviation, 40 short steps"
    return markdown(head, rows) + "\n" + origin(*records, more=note)


@measured
def scarce_data() -> str:
    runs = claim_page.read_runs(RESULTS / "claims")
    rows = []
    for sparsity in ("0.6", "0.75", "0.85"):
        for loss, label in (
            ("none", "nothing"),
            ("ce", "cross-entropy"),
            ("ce+kl", "… + KL"),
            ("ce+sq", "… + SquareHead"),
        ):
            found = list(claim_page.seeds_of(runs, f"squarehead-{sparsity}-{loss}").values())
            if found:
                rates = {run["facts"].get("rate") for run in found} - {None, 0}
                rows.append(
                    [
                        f"{float(sparsity):.0%} zeros, {label}".replace("%", " %"),
                        ", ".join(f"{rate:g}" for rate in sorted(rates)),
                        claim_page.spread([r["end"]["exact"] for r in found], 1, 100) + " %",
                    ]
                )
    head = ("recovered with", "learning rate, tuned", "right")
    return (
        markdown(head, rows)
        + "\n\n<small>48 rows, 150 steps, three seeds, mean ± standard error; `benchmarks/results/claims/`.</small>"
    )


@drawn
def scarce() -> str:
    runs = claim_page.read_runs(RESULTS / "claims")
    names = {"none": "pruned", "ce": "cross-entropy", "ce+kl": "with KL", "ce+sq": "with SquareHead"}
    bars = []
    for sparsity in ("0.75", "0.85"):
        for loss, label in names.items():
            found = list(claim_page.seeds_of(runs, f"squarehead-{sparsity}-{loss}").values())
            mean = sum(r["end"]["exact"] for r in found) / len(found)
            color = {"none": NEUTRAL, "ce+sq": OURS}.get(loss, THEIRS)
            bars.append(
                Bar(
                    f"{float(sparsity):.0%} zeros, {label}".replace("%", " %"),
                    mean,
                    f"{mean:.1%}".replace("%", " %"),
                    color,
                )
            )
    return chart(
        "Right answers after recovery on 48 rows", bars, "a decoder that sorts seven digits; means of three seeds"
    )


@drawn
def linear() -> str:
    record = newest("cpu_linear-deepsparse-2threads")
    bars = [
        Bar(
            f"{r['dtype']}, {r['batch']} token{'s' if r['batch'] > 1 else ''}",
            r["peers"]["deepsparse " + r["dtype"]]["ratio"],
            f"{r['peers']['deepsparse ' + r['dtype']]['ratio']:.2f} ×",
            OURS if r["peers"]["deepsparse " + r["dtype"]]["ratio"] >= 1 else THEIRS,
        )
        for r in record["results"]
        if r["sparsity"] == 0.75
    ]
    return chart(
        "Speed over DeepSparse, one linear with 75 % zeros",
        bars,
        "4096 × 4096, the same type on both sides; below 1 × DeepSparse is faster",
    )


# --- rates of methods, from the claims as far as they were run ---


def rates(method: str) -> str:
    runs = claim_page.read_runs(RESULTS / "claims")
    lines = []
    for name in ("sorting", "arithmetic"):
        found = claim_page.seeds_of(runs, f"{name}-{method}")
        if found:
            used = next(iter(found.values()))["facts"]["rates"]
            lines.append(
                f"- task *{name}* of [the claims](../claims.md): " + ", ".join(f"{k} {v:g}" for k, v in used.items())
            )
    for t in newest("demo-smollm2-2threads")["tuned"]:
        if t["method"] == method:
            lines.append(
                f"- the demo, SmolLM2-135M on SQL: {t['lr']:g}, AdamW, no weight decay (one of three rates tried by `--tune`)"
            )
    if not lines:
        return "No learning rate of this method has been measured here yet; the rates above are the paper's."
    return "Rates that were measured here:\n\n" + "\n".join(lines)


LEARNT = ("s2ft", "paca", "rosa", "sparse", "lora", "full")


@measured
def learning() -> str:
    """What the claims' runs learned and forgot, as far as they were made."""
    from benchmarks.claim_adapters import METHODS
    from benchmarks.claim_tasks import TASKS as TITLES

    runs = claim_page.read_runs(RESULTS / "claims")
    rows = []
    for task in TITLES:
        base = runs.get(f"{task}-base")
        for name in LEARNT if base else ():
            ends = [run["end"] for run in claim_page.seeds_of(runs, f"{task}-{name}").values()]
            if ends and base:
                start = base["end"]
                rows.append(
                    [
                        f"{task}, {METHODS[name].label}",
                        claim_page.spread([e["loss"] for e in ends], 2),
                        claim_page.spread([e["exact"] for e in ends], 0, 100) + " %",
                        claim_page.spread([e["text"] - start["text"] for e in ends], 2, 1, True),
                    ]
                )
    if not rows:
        return "No method of that comparison has been run to its end yet."
    return (
        markdown(("task, method", "loss", "right", "loss on other text"), rows)
        + "\n\n<small>`benchmarks/results/claims/`.</small>"
    )


@measured
def rates_s2ft() -> str:
    return rates("s2ft")


@measured
def rates_paca() -> str:
    return rates("paca")


@measured
def rates_rosa() -> str:
    return rates("rosa")


@measured
def rates_lora() -> str:
    return rates("lora")


# --- what is covered, what was claimed ---


@measured
def coverage() -> str:
    from benchmarks import coverage as script
    from benchmarks import families_by_rules

    path = script.newest_rules()
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = families_by_rules.totals(rows)
    return (
        f"{found['architectures']} architectures × 7 rules: {found['ok']} cells right, {found['declined']} declined with a reason, "
        f"{found['not traced']} not traced, {found['errors']} errors, **{found['wrong']} wrong**."
    )


@measured
def linear_cpu() -> str:
    record = newest("cpu_linear-deepsparse-2threads")
    rows = [
        [
            f"{r['dtype']}, batch {r['batch']}, {r['sparsity']:.0%} zeros".replace("%", " %"),
            f"{r['vs_dense']:.1f} ×",
            f"{r['peers']['deepsparse ' + r['dtype']]['ratio']:.2f} ×",
        ]
        for r in record["results"]
    ]
    head = ("4096 × 4096", "faster than dense fp32 torch", "than DeepSparse in the same type")
    return markdown(head, rows) + "\n" + origin(record, more="; DeepSparse " + record["peers"]["deepsparse"])


@measured
def linear_engines() -> str:
    record = newest("cpu_linear-onnxruntime-openvino-75-2threads")
    columns = [(engine, kind) for engine in ("onnxruntime", "openvino") for kind in ("", "int4-weight-only")]
    shown = [
        [
            f"{r['dtype']}, batch {r['batch']}",
            *(f"{r['peers'][engine + ' ' + (kind or r['dtype'])]['ratio']:.2f} ×" for engine, kind in columns),
        ]
        for r in record["results"]
    ]
    head = ("4096 × 4096, 75 % zeros, faster than", "ONNX Runtime", "its int4 weights", "OpenVINO", "its int4 weights")
    versions = ", ".join(record["peers"].values())
    more = f"; the same type on both sides, or four bits where the column says so; versions {versions}"
    return markdown(head, shown) + "\n" + origin(record, more=more)


@measured
def readme() -> str:
    steps, _, _ = step_rows()
    demo_run, decoding_run = (
        newest("demo-smollm2-2threads"),
        by(newest("cpu_decode-smollm2-2threads")["results"], "variant"),
    )
    tuned, base = by(demo_run["tuned"], "method"), demo_run["base_text"]
    pruned = by((r for r in newest("prune_layer-4096-2threads")["rows"] if r["pattern"] == "unstructured"), "who")

    def right(name: str) -> str:
        return f"{tuned[name]['score']['exact']:.0%}".replace("%", " %")

    rows = [
        [
            "time of a training step at equal trained size: S2FT",
            f"{steps['s2ft']['floor_ratio'][0] / steps['lora']['floor_ratio'][0]:.2f}",
            "PEFT LoRA 1",
        ],
        [
            "its peak memory over a 4-bit base: S2FT",
            f"{steps['qs2ft']['peak MiB']:.0f} MiB",
            f"PEFT LoRA on bitsandbytes {steps['qlora']['peak MiB']:.0f} MiB",
        ],
        ["SmolLM2-135M learns SQL in 32 steps: right answers, S2FT", right("s2ft"), f"LoRA {right('lora')}"],
        [
            "what it forgot: loss on other text, in nats",
            f"{tuned['s2ft']['text'] - base:+.2f}",
            f"LoRA {tuned['lora']['text'] - base:+.2f}",
        ],
        [
            "SmolLM2 at 75 % zeros in int8 on two cores, tokens a second",
            f"{decoding_run['int8']['per_second']:.0f}",
            f"torch fp32 {decoding_run['dense']['per_second']:.0f}, bf16 {decoding_run['bf16']['per_second']:.0f}, "
            f"llama.cpp Q4_1 {decoding_run['llamacpp-Q4_1']['per_second']:.0f}",
        ],
        [
            "SparseGPT of a 4096 × 4096 linear",
            f"{pruned['sparsify']['seconds']:.1f} s",
            f"llm-compressor {pruned['llm-compressor']['seconds']:.1f} s",
        ],
    ]
    lines = ["| measured on two CPU cores | sparsify | beside it |", "| --- | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


@measured
def covered() -> str:
    """The README's sentence."""
    from benchmarks import coverage as script
    from benchmarks import families_by_rules

    found = families_by_rules.totals(json.loads(script.newest_rules().read_text(encoding="utf-8"))["rows"])
    return (
        f"Every rule on {found['architectures']} architectures: {found['ok']} cells right, {found['wrong']} wrong, "
        f"{found['declined']} declined with a reason."
    )
