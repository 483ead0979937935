"""Where we lose: every comparison that the pages show, and that another one wins by a hundredth or more, from the newest records.

    comparisons of one record ──▶ Loss(what, ours, theirs, …)  where theirs is better ──▶ the table of docs/benchmarks.md

Compared is what a reader could take instead: another engine or library, the same engine without zeros, another loss. A record that is
made again moves its rows in here and out of here by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.page_tables import (
    ENCODERS,
    ENGINES,
    PACKED,
    RECOVERED,
    RESULTS,
    STEP,
    TASKS,
    by,
    markdown,
    measured,
    newest,
    percent,
    step_rows,
)

LEVEL = 0.99
"""What reaches this share of the other one is level with it."""


@dataclass(frozen=True)
class Comparison:
    """what: is measured. ours, theirs: as they are written. share: how much of theirs ours reaches; 1 is level, below is lost.
    section: of docs/benchmarks.md, its heading in the address."""

    what: str
    ours: str
    theirs: str
    share: float
    section: str

    @property
    def lost(self) -> bool:
        return round(self.share, 2) < LEVEL


def training() -> Iterator[Comparison]:
    """Each method of ours beside each method of PEFT's at the same size, in time and in peak memory, over plain and over packed bases."""
    rows, _, _ = step_rows()
    for names in (STEP, PACKED):
        for peer in (name for name, label in names.items() if label.startswith("PEFT")):
            for name in (name for name, label in names.items() if label.startswith("**")):
                for what, number, unit in (
                    ("time of a training step", lambda row: row["floor_ratio"][0], "{:.2f} ×"),
                    ("peak memory of a training step", lambda row: row["peak MiB"], "{:.0f} MiB"),
                ):
                    ours, theirs = number(rows[name]), number(rows[peer])
                    yield Comparison(
                        what, f"{plain(names[name])} {unit.format(ours)}", f"{names[peer]} {unit.format(theirs)}",
                        theirs / ours, "a-training-step",
                    )  # fmt: skip


def vocabularies() -> Iterator[Comparison]:
    """The loss of a head in chunks beside PyTorch's own, in chunks of as many tokens."""
    rows = newest("loss_chunks")["rows"]
    for theirs in (r for r in rows if r["loss"].startswith("torch")):
        chunk = theirs["loss"].partition(" ")[2]
        same = ("head", "dtype")
        ours = next(r for r in rows if r["loss"] == f"ours {chunk}" and all(r[key] == theirs[key] for key in same))
        for what, key, form in (("time", "seconds", "{:.2f} s"), ("memory", "MiB", "{:.0f} MiB")):
            yield Comparison(
                f"{what} of a loss in chunks of {chunk} tokens", f"sparsify {form.format(ours[key])}",
                f"PyTorch 2.13 {form.format(theirs[key])}", theirs[key] / ours[key], "loss-of-a-large-vocabulary",
            )  # fmt: skip


def demo() -> Iterator[Comparison]:
    """S2FT beside LoRA on SQL, and what one-shot pruning leaves of it."""
    record = newest("demo-smollm2-2threads")
    tuned = by(record["tuned"], "method")
    for peer in (name for name in tuned if name != "s2ft"):
        for what, key, form in (("right answers", "exact", percent), ("loss", "loss", "{:.2f}".format)):
            ours, theirs = tuned["s2ft"]["score"][key], tuned[peer]["score"][key]
            share = ours / theirs if key == "exact" else theirs / ours
            yield Comparison(
                f"SmolLM2 learns SQL, {what}", f"S2FT {form(ours)}", f"{tuned[peer]['label']} {form(theirs)}", share, "one-run-of-the-demo",
            )  # fmt: skip
    dense = next(d for d in record["decoders"] if d["score"])
    for pruned in record["decoders"]:
        if pruned["score"] and pruned is not dense:
            ours, theirs = pruned["score"]["exact"], dense["score"]["exact"]
            yield Comparison(
                "SQL after one-shot pruning, right answers", f"{pruned['label'].partition(',')[0].replace('%', ' %')} {percent(ours)}",
                f"dense {percent(theirs)}", ours / theirs, "one-run-of-the-demo",
            )  # fmt: skip


def decoders() -> Iterator[Comparison]:
    """Our fastest beside every other engine of the same run."""
    runs = {
        "SmolLM2-135M writes": "cpu_decode-smollm2-2threads",
        "1B shape writes": "cpu_decode-llama-1b-int8-2threads",
        **{f"7B shape writes, {n}": f"cpu_decode-llama-7b-int8-{n}-2threads" for n in ("llamacpp", "openvino", "aten")},
    }
    for what, name in runs.items():
        rows = newest(name)["results"]
        ours = max((r for r in rows if r["variant"] in OURS), key=lambda r: r["per_second"])
        for row in rows:
            if row["variant"] not in OURS:
                yield Comparison(
                    what, f"{plain(ENGINES[ours['variant']])} {ours['per_second']:.1f} tokens/s",
                    f"{ENGINES[row['variant']]} {row['per_second']:.1f} tokens/s", ours["per_second"] / row["per_second"], "decoders",
                )  # fmt: skip


def encoders() -> Iterator[Comparison]:
    """Each type of ours beside torch without zeros."""
    rows = newest("cpu_decode-minilm-2threads")["results"]
    names = ENCODERS
    for ours in (r for r in rows if plain(names[r["variant"]]).startswith("sparsify")):
        for row in (r for r in rows if names[r["variant"]].startswith("torch")):
            yield Comparison(
                "MiniLM's shape, over dense fp32", f"{plain(names[ours['variant']])} {ours['speedup']:.2f} ×",
                f"{names[row['variant']]} {row['speedup']:.2f} ×", ours["speedup"] / row["speedup"], "encoders",
            )  # fmt: skip


def linears() -> Iterator[Comparison]:
    """One linear in a type beside another engine's in the same, and our int8 beside their four bits."""
    for name in ("cpu_linear-deepsparse-2threads", "cpu_linear-onnxruntime-openvino-75-2threads"):
        for row in newest(name)["results"]:
            for peer, found in row["peers"].items():
                engine, _, theirs = peer.partition(" ")
                if theirs == row["dtype"] or (row["dtype"] == "int8" and theirs.startswith("int4")):
                    tokens = f"{row['batch']} token{'s' if row['batch'] > 1 else ''}"
                    yield Comparison(
                        f"one linear, {tokens}, {percent(row['sparsity'])} zeros", f"sparsify {row['dtype']}",
                        f"{PEERS[engine]} {theirs.replace('-', ' ')}, {1 / found['ratio']:.2f} × as fast", found["ratio"], "one-linear",
                    )  # fmt: skip


def recoveries() -> Iterator[Comparison]:
    """SquareHead beside the best other loss, on tasks with plenty of data."""
    for name in ("t5-whisper", "decoder", "minilm"):
        record = newest(f"sparse_quality-{name}-1thread")
        for task in record["arguments"]["tasks"]:
            found = {r["recovery"]: r for r in record["rows"] if r["task"] == task and r["method"] == "sparsegpt"}
            for share in ("75%", "90%"):
                best = max(("ce", "kl"), key=lambda loss: mean(found[loss][share]))
                yield Comparison(
                    f"{TASKS[task]}, {share[:-1]} % zeros, accuracy recovered", f"SquareHead {found['sq'][share]}",
                    f"{RECOVERED[best].removeprefix('+ ')} {found[best][share]}", mean(found["sq"][share]) / mean(found[best][share]),
                    "pruning-and-recovery",
                )  # fmt: skip


def layers() -> Iterator[Comparison]:
    """SparseGPT of one linear beside llm-compressor."""
    for name in ("prune_layer-4096-2threads", "prune_layer-4096x11008-2threads"):
        rows = newest(name)["rows"]
        for theirs in (r for r in rows if r["who"] == "llm-compressor"):
            ours = next(r for r in rows if r["who"] == "sparsify" and r["pattern"] == theirs["pattern"])
            for what, unit in (("seconds", "{:.1f} s"), ("relative error", "{:.4f}")):
                yield Comparison(
                    f"SparseGPT, {theirs['pattern']}, {what}", f"sparsify {unit.format(ours[what])}",
                    f"llm-compressor {unit.format(theirs[what])}", theirs[what] / ours[what], "pruning-and-recovery",
                )  # fmt: skip


OURS = ("int8", "fp32", "int8-pytorch", "packed-bf16")
PEERS = {"deepsparse": "DeepSparse", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
ALL = (training, vocabularies, demo, decoders, encoders, linears, recoveries, layers)


def plain(label: str) -> str:
    return label.replace("*", "")


def unbroken(text: str) -> str:
    """With no line break between a number and its unit or its spread."""
    return re.sub(r"(?<=\d) (?=[×%±]|MiB|tokens/s|s\b)|(?<=±) ", "\N{NO-BREAK SPACE}", text)


def mean(text: str) -> float:
    """`51.88 ± 0.42` without its spread."""
    return float(text.partition("±")[0])


@measured
def where_we_lose() -> str:
    compared = [found for look in ALL for found in look()]
    rows = [
        [f"[{c.what}](#{c.section})", unbroken(c.ours), unbroken(c.theirs), percent(c.share)]
        for c in compared
        if c.lost
    ]
    text = (
        f"Of {len(compared)} comparisons of these pages {len(rows)} are lost: what we reach of the other one, in speed, in memory, or in what "
        "was learned. From 99 % on it counts as level.\n\n"
    )
    return text + markdown(("what", "ours", "better", "we reach"), rows, left=3)


def sentence(*looks: Callable[[], Iterator[Comparison]], level: str) -> str:
    """The losses among some comparisons, one a line; `level` where there are none."""
    lost = [found for look in looks for found in look() if found.lost]
    lines = [f"- {c.what}: {c.theirs}; ours ({c.ours}) reaches {percent(c.share)}" for c in lost]
    return "Where we lose:\n\n" + "\n".join(lines) if lines else level


@measured
def lost_decoding() -> str:
    return sentence(decoders, level="No other engine was faster in these runs.")


@measured
def lost_linears() -> str:
    return sentence(linears, level="No other engine was faster in these runs.")


@measured
def missed_aims() -> str:
    """Bars that a record set itself and did not reach."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        name = re.sub(r"-\d{4}-\d\d-\d\d$", "", path.stem)
        if "before" in name or newest(name)["file"] != path.name:
            continue
        for bar in json.loads(path.read_text(encoding="utf-8")).get("bars") or ():
            if bar.get("verdict") == "MISSED":
                bound = f"at {'least' if bar['at_least'] else 'most'} {bar['bound']:g}"
                rows.append([spelled(bar["name"]), bound, f"{bar['value']:.3f}", f"`{name}`"])
    return markdown(("aim that was missed", "asked", "was", "record"), rows)


def spelled(bar: str) -> str:
    """A bar's name with methods as people call them: `time of miss / s2ft` is the time of PEFT MiSS over S2FT's."""
    names = {name: plain(label) for name, label in (STEP | PACKED).items()} | {"floor": "a frozen step"}
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), bar).replace(" / ", " over ")


__all__ = ["ALL", "Comparison", "missed_aims", "where_we_lose"]
