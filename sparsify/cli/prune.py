"""`sparsify prune`: from a Hugging Face folder to one with zeros, or to a sparse checkpoint.

    MODEL_DIR ─▶ OUT.partial/ (the state of the run, on disk layer by layer) ─▶ OUT/ (appears when it is complete)

OUT is an ordinary checkpoint with config and tokenizer; with `--sparse` it has `model.sparse` instead of dense weights. `pruning.json` says
what was done to every layer.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.cli.model_folder import SPARSE_FILE, check_folder, load_config, load_model, load_tokenizer
from sparsify.cli.rule import line_of, reading
from sparsify.console import one_line, printable
from sparsify.errors import InputError
from sparsify.files.atomic import write_text
from sparsify.version import __version__

if TYPE_CHECKING:
    from sparsify.errors import Refusal
    from sparsify.pruning.rule import Prune
    from sparsify.pruning.sequential import LayerStats

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
RECORD = "pruning.json"
LARGEST_SEED = (1 << 63) - 1
HELD_OUT = 16  # samples on which the loss before and after is measured
WANDA_TOKENS = 128  # a mean of squares over as many is off by 12 %
SHOWN = 4  # weights that were not pruned, of which each has its line without --all


def prune(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder; it appears when it is complete.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros. Default: 0.75, or what an N:M pattern means.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="sparsegpt, wanda (both need --calibration), magnitude or random.")
    ] = "sparsegpt",
    pattern: Annotated[
        str, typer.Option(help="unstructured, N:M (N of M inputs stay) or HxW (blocks of rows × columns).")
    ] = "unstructured",
    match: Annotated[str, typer.Option(help="Glob over module names: what is pruned.")] = "*",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob over module names: what stays dense. Repeatable.")
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="uniform, or sensitivity: more zeros where they cost least.")
    ] = "uniform",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A .txt file (one text, cut into windows) or a .jsonl file (lines with text, messages, input_ids, or prompt "
            "and completion; for encoder–decoders also with target or labels)."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples; the seed chooses when there are more.")
    ] = 128,
    sequence: Annotated[int, typer.Option(min=0, help="Tokens per sample. 0: 512, or what the model takes.")] = 0,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Chooses calibration samples, and what random prunes.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (as stored), fp32, bf16 or fp16.")] = "auto",
    stream: Annotated[
        bool, typer.Option("--stream", help="Block by block from disk to disk, for a model larger than memory.")
    ] = False,
    sparse: Annotated[
        bool, typer.Option("--sparse", help=f"Write {SPARSE_FILE} (values and bits) instead of dense weights.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same options.")
    ] = False,
    loss: Annotated[
        bool,
        typer.Option("--loss/--no-loss", help="Measure the loss before and after, where the calibration allows it."),
    ] = True,
    every: Annotated[bool, typer.Option("--all", help="Print a line for every weight, not only a summary.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check folders, rule and calibration, say what would be done, and write nothing."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help=f"Print what {RECORD} holds as JSON.")] = False,
) -> None:
    """Prune a local Hugging Face checkpoint and write an ordinary checkpoint with zeros, or a sparse one."""
    partial = out.parent / f"{out.name}.partial"
    check_folders(model, out, partial, resume)
    rule = rule_of(sparsity, method, pattern, match, exclude or [], allocation, seed)
    weights = torch_dtype(dtype)
    if rule.needs_calibration and calibration is None:
        raise typer.BadParameter(
            f"--method {method} looks at inputs: give --calibration FILE (.txt or .jsonl), or use --method magnitude"
        )
    batches, held_out = (
        (None, None) if calibration is None else read_batches(model, calibration, samples, sequence, seed)
    )
    if dry_run:
        would = {"out": str(out), "rule": asdict(rule), **(counted(batches) if batches else {})}
        typer.echo(json.dumps(would, indent=1) if as_json else one_line(f"would write {out}: {rule}"))
        return
    losses = Losses(held_out or batches, bool(held_out), not loss, stream)
    try:
        with kept_for_resuming(partial):
            run = prune_streamed if stream else prune_in_memory
            ready, layers, refusals = run(model, partial, rule, batches, seed, weights, sparse, losses)
            record = {**asdict(rule), "dtype": dtype, "stream": stream, **(counted(batches) if batches else {})}
            write_record(ready, record, layers, refusals, losses)
            finish(ready, out, partial)
    except KeyboardInterrupt as error:
        if partial.exists():
            error.add_note(f"the same command with --resume goes on from {partial}")
        raise
    if as_json:
        typer.echo((out / RECORD).read_text(encoding="utf-8").rstrip())
        return
    for line in table(layers) if every else groups(layers):
        typer.echo(line)
    for refusal in refusals if every else refusals[:SHOWN]:
        typer.echo(f"not pruned: {refusal}")
    if not every and len(refusals) > SHOWN:
        typer.echo(f"not pruned: {len(refusals) - SHOWN} more (--all lists them)")
    typer.echo(summary(layers))
    typer.echo(str(losses))
    if warning := few_tokens(layers):
        typer.echo(warning, err=True)
    size = sum(
        path.stat().st_size for path in out.iterdir() if path.suffix == ".safetensors" or path.name == SPARSE_FILE
    )
    typer.echo(f"{out / SPARSE_FILE if sparse else out}: {size / 2**20:.2f} MiB")


# --- before anything is done ---


def check_folders(model: Path, out: Path, partial: Path, resume: bool) -> None:
    """Raises InputError for folders that cannot be read or written to."""
    if not model.exists():
        raise InputError(f"'{model}' does not exist")
    if "quantization_config" in check_folder(model):
        raise InputError(f"{model} is quantised: prune the model that it was made from")
    if out.name in ("", ".."):
        raise InputError(f"--out {out}: give the folder a name of its own")
    if out.is_symlink():
        raise InputError(f"--out {out}: is a link; give the folder itself")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already: choose another --out, or delete it")
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise InputError(f"{partial} is in the way: it is not a folder; delete it")
    if partial.exists() and not resume:
        raise InputError(f"{partial} holds an unfinished run: go on with --resume, or delete it")


def rule_of(
    sparsity: float | None, method: str, pattern: str, match: str, exclude: list[str], allocation: str, seed: int
) -> Prune:
    from sparsify.pruning.rule import Prune

    options: dict[str, Any] = {"method": method, "allocation": allocation}  # the rule refuses other words
    return Prune(sparsity=sparsity, pattern=pattern, match=match, exclude=tuple(exclude), seed=seed, **options)


def torch_dtype(name: str) -> Any:
    """None for auto. Raises InputError."""
    import torch

    if name == "auto":
        return None
    if name not in (*DTYPES, *DTYPES.values()):
        raise InputError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    return getattr(torch, DTYPES.get(name, name))


def read_batches(
    model: Path, calibration: Path, samples: int, sequence: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Calibration batches of a text model, and batches of samples that were not chosen; says how many tokens they have."""
    from sparsify.errors import PlanError
    from sparsify.pruning.texts import split_batches

    config = load_config(model)
    taken = model_class(model).main_input_name
    if taken != "input_ids":
        raise PlanError(
            f"the model takes {taken}, not text: calibrate it in Python with sparsify.compile(…, calibration=batches), or use "
            "--method magnitude without --calibration"
        )
    batches, held_out = split_batches(
        calibration, config, load_tokenizer(model), samples=samples, held_out=HELD_OUT, sequence=sequence, seed=seed
    )
    found = counted(batches)
    fewer = f" (of {samples} asked for)" if found["samples"] < samples else ""
    typer.echo(f"calibration: {found['samples']} samples{fewer}, {found['tokens']:,} tokens", err=True)
    return batches, held_out


def counted(batches: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "samples": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
    }


# --- loss before and after ---


@printable
class Losses:
    """Mean loss per token on a few samples, dense and pruned; or why there is none.

    held_out: whether the samples were kept out of calibration. dense, pruned: NaN until measured.
    """

    def __init__(self, batches: list[dict[str, Any]] | None, held_out: bool, unwanted: bool, stream: bool) -> None:
        self.batches = list(itertools.islice(batches or [], math.ceil(HELD_OUT / 8)))
        self.held_out, self.dense, self.pruned, self.samples = held_out, math.nan, math.nan, 0
        self.why = (
            "--no-loss" if unwanted
            else "it would need the whole model in memory (--stream)" if stream
            else "" if self.batches
            else "there is no --calibration text"
        )  # fmt: skip

    def measure(self, model: Any) -> float:
        """NaN, with the reason in `why`, where the model has no loss of its own for text."""
        import torch

        if self.why:
            return math.nan
        total, weight, self.samples = 0.0, 0, 0
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if "labels" not in self.batches[0]:
                    self.why = predicts_text(model, self.batches[0])
                for batch in () if self.why else self.batches:
                    labels = batch.get("labels")
                    if labels is None:
                        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                        count = int((labels[:, 1:] != -100).sum())
                    else:
                        count = int((labels != -100).sum())
                    value = float(model(**{**batch, "labels": labels}).loss)
                    total, weight, self.samples = total + value * count, weight + count, self.samples + len(labels)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            self.why = f"{type(model).__name__} has none for text ({line_of(f'{type(error).__name__}: {error}')[:120]})"
            return math.nan
        finally:
            model.train(was_training)
        if weight == 0 and not self.why:
            self.why = "the samples have no token to predict"
        return math.nan if self.why else total / weight

    def record(self) -> dict[str, Any] | None:
        """For pruning.json."""
        if self.why:
            return None
        return {"dense": self.dense, "pruned": self.pruned, "samples": self.samples, "held_out": self.held_out}

    def __str__(self) -> str:
        if self.why:
            return f"loss: not measured, {self.why}"
        samples = f"{self.samples} {'held-out' if self.held_out else 'calibration'} samples"
        change = (math.exp(min(self.pruned - self.dense, 700)) - 1) * 100
        return f"loss: {self.dense:.4f} dense, {self.pruned:.4f} pruned on {samples} (perplexity {change:+.1f} %)"


def predicts_text(model: Any, batch: dict[str, Any]) -> str:
    """Empty when `model` predicts every token from those before it, found by trying; or why not, as a clause."""
    import torch

    ids, seen = batch["input_ids"][:1], batch["attention_mask"][:1]
    end = int(seen.sum()) - 1
    first = model(input_ids=ids, attention_mask=seen).logits
    if first.shape[:2] != ids.shape or first.shape[2] <= int(ids.max()):
        return "its outputs are no tokens"
    other = ids.clone()
    other[0, end] = (other[0, end] + 1) % first.shape[2]
    second = model(input_ids=other, attention_mask=seen).logits
    moved = float((first[0, :end].float() - second[0, :end].float()).abs().max()) if end > 0 else 0.0
    same = moved <= 16 * torch.finfo(first.dtype).eps * float(first[0].abs().max())
    return "" if same else "its outputs see the tokens that they would have to predict"


def few_tokens(layers: list[LayerStats]) -> str:
    """A warning with numbers when Wanda saw too few tokens for its means of squares; empty when it did not.

    SparseGPT's own need, as many tokens as inputs, is known and warned about where its Hessian is made.
    """
    short = [layer for layer in layers if layer.method == "wanda" and 0 < layer.tokens < WANDA_TOKENS]
    if not short:
        return ""
    worst = min(short, key=lambda layer: layer.tokens)
    return one_line(
        f"warning: too little calibration: {worst.name} saw {worst.tokens:,} tokens ({len(short)} of {len(layers)} weights fewer than "
        f"{WANDA_TOKENS}), so its means of squares are off by {(2 / worst.tokens) ** 0.5:.0%}; give more --samples, a longer "
        "--sequence or a larger file"
    )


def model_class(model: Path) -> Any:
    """The class that config.json names. Raises InputError or PlanError."""
    from sparsify.pruning.on_disk import hugging_face_class

    with reading(f"{model / 'config.json'}"):
        kind = hugging_face_class(model)
    if not hasattr(kind, "from_pretrained") or not hasattr(kind, "main_input_name"):
        raise InputError(f"{model / 'config.json'}: names {getattr(kind, '__name__', kind)!r}, which is no model class")
    return kind


# --- the run: a folder that is complete but for its record, statistics of layers, what was left dense ---

Outcome = tuple[Path, "list[LayerStats]", "list[Refusal]"]


def prune_in_memory(
    model: Path, partial: Path, rule: Prune, batches: Any, seed: int, dtype: Any, sparse: bool, losses: Losses
) -> Outcome:
    """Finished groups of layers are in `partial/groups`, the result in `partial/ready`."""
    import sparsify
    from sparsify import Plan
    from sparsify.pruning.streaming import copy_companions

    dense, unused = complete_model(model, dtype)
    losses.dense = losses.measure(dense)
    host = sparsify.compile(
        dense, Plan([rule], seed=seed), calibration=batches, resume_dir=partial / "groups", donate=True
    )
    losses.pruned = losses.measure(host)
    ready = fresh_folder(partial / "ready")
    if sparse:
        host.config.save_pretrained(ready)
        host.sparsify.save_sparse(ready / SPARSE_FILE)
    else:
        host.save_pretrained(ready)
    copy_companions(model, ready)
    program = host.sparsify.program
    return ready, list(program.pruned), [*program.refusals, *unused]


def complete_model(model: Path, dtype: Any) -> tuple[Any, list[Refusal]]:
    """The model with all its weights, and tensors in the files that it has no place for. Raises PlanError when the files lack one."""
    from sparsify.errors import PlanError
    from sparsify.pruning.on_disk import unused_tensor

    kind = model_class(model)
    loaded, missing, unexpected = load_model(model, kind, dtype or "auto")
    if missing:
        raise PlanError(
            f"{model} has no tensor '{missing[0]}' ({len(missing)} in all), which {kind.__name__} would start at random: save the "
            "model with all its weights first"
        )
    return loaded, [unused_tensor(name) for name in unexpected]


def prune_streamed(
    model: Path, partial: Path, rule: Prune, batches: Any, seed: int, dtype: Any, sparse: bool, losses: Losses
) -> Outcome:
    """Finished blocks are in `partial/blocks`, with their masks; that is the result, or what it is compressed from."""
    from sparsify import Plan
    from sparsify.files.tensor_file import FolderTensors
    from sparsify.pruning.on_disk import prune_on_disk
    from sparsify.pruning.sparse_checkpoint import model_hash, save_sparse
    from sparsify.pruning.streaming import copy_companions

    blocks = partial / "blocks"
    model_class(model)
    result = prune_on_disk(model, blocks, Plan([rule], seed=seed), calibration=batches, dtype=dtype)
    if not sparse:
        return blocks, result.layers, result.refusals
    ready = fresh_folder(partial / "ready")
    save_sparse(blocks, ready / SPARSE_FILE, base=model_hash(FolderTensors(model, dtype)))
    copy_companions(blocks, ready)
    return ready, result.layers, result.refusals


def fresh_folder(path: Path) -> Path:
    """Without what a killed process had begun to write."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


@contextmanager
def kept_for_resuming(partial: Path) -> Iterator[None]:
    """The state folder stays when something goes wrong, unless nothing was finished in it."""
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if partial.exists() and not any(partial.rglob("*.safetensors")):
            shutil.rmtree(partial)


def write_record(
    ready: Path, settings: dict[str, Any], layers: list[LayerStats], refusals: list[Refusal], losses: Losses
) -> None:
    document = {"sparsify": __version__, "settings": settings, "layers": [asdict(layer) for layer in layers]}
    document["loss"] = losses.record()
    document["not_pruned"] = [asdict(refusal) for refusal in refusals]
    write_text(ready / RECORD, json.dumps(document, indent=1) + "\n")


def finish(ready: Path, out: Path, partial: Path) -> None:
    """The complete folder takes its name; everything is on disk before."""
    for path in ready.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()  # empty
    os.replace(ready, out)
    shutil.rmtree(partial)


# --- what is printed ---


def table(layers: list[LayerStats]) -> Iterator[str]:
    """One line per layer: zeros, squared error of its output relative to its energy, seconds, bytes dense and compressed."""
    width = max([len(layer.name) for layer in layers] + [5])
    yield f"{'layer':{width}} {'zeros':>7} {'error':>9} {'seconds':>8} {'dense KiB':>11} {'sparse KiB':>11}"
    for layer in layers:
        dense, stored = (size / 1024 for size in sizes(layer))
        note = f"  {layer.note}" if layer.note else ""
        yield one_line(
            f"{layer.name:{width}} {layer.sparsity:7.2%} {layer.error:9.2e} {layer.seconds:8.2f} {dense:11,.1f} "
            f"{stored:11,.1f}{note}"
        )


def groups(layers: list[LayerStats]) -> Iterator[str]:
    """One line per kind of weight, the same in every layer: how many, zeros, mean and largest error and where, seconds."""
    found: dict[str, list[LayerStats]] = {}
    for layer in layers:
        kind = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
        found.setdefault(kind, []).append(layer)
    width = max([len(kind) for kind in found] + [7])
    yield f"{'weights':{width}} {'count':>5} {'zeros':>7} {'error':>9} {'largest':>9} {'seconds':>8}"
    for kind, members in found.items():
        numel = sum(layer.numel for layer in members)
        zeros = sum(layer.sparsity * layer.numel for layer in members) / max(numel, 1)
        mean, seconds = (sum(getattr(layer, f) for layer in members) for f in ("error", "seconds"))
        worst = max(members, key=lambda layer: layer.error)
        where = f"  in {worst.name}" if len(members) > 1 else ""
        yield one_line(
            f"{kind:{width}} {len(members):5} {zeros:7.2%} {mean / len(members):9.2e} {worst.error:9.2e} {seconds:8.2f}{where}"
        )
    notes = [layer.note for layer in layers if layer.note]
    if notes:
        yield one_line(f"note: {notes[0]}" + (f"; {len(notes) - 1} more notes (--all shows them)" if notes[1:] else ""))


def sizes(layer: LayerStats) -> tuple[int, int]:
    """Bytes of a weight as it is, and as values and bits."""
    from sparsify.pruning.sparse_checkpoint import stored_bytes

    survivors = round(layer.numel * (1 - layer.sparsity))
    return layer.numel * layer.itemsize, stored_bytes(layer.numel, survivors, layer.itemsize)


def summary(layers: list[LayerStats]) -> str:
    total = sum(layer.numel for layer in layers)
    zeros = sum(layer.sparsity * layer.numel for layer in layers)
    dense, stored = (sum(sizes(layer)[i] for layer in layers) for i in (0, 1))
    return (
        f"{len(layers)} weights pruned, {zeros / max(total, 1):.1%} zeros: {dense / 2**20:.2f} MiB dense, "
        f"{stored / 2**20:.2f} MiB as values and bits"
    )
