"""`sparsify prune`: from a Hugging Face folder to one with zeros, or to a sparse checkpoint.

    MODEL_DIR ─▶ OUT.partial/ (the state of the run, on disk layer by layer) ─▶ OUT/ (appears when it is complete)

OUT is an ordinary checkpoint with config and tokenizer; with `--sparse` it has `model.sparse` instead of dense weights. `pruning.json` says
what was done to every layer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparsify.errors import Refusal
    from sparsify.pruning.sequential import LayerStats
    from sparsify.rules_prune import Prune

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SPARSE_FILE, RECORD = "model.sparse", "pruning.json"


def prune(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder.", exists=True, file_okay=False)],
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
            help="A .txt file (one text, cut into windows) or a .jsonl file (lines with text, messages or input_ids; and target "
            "or labels for encoder–decoders).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples; the seed chooses when there are more.")
    ] = 128,
    sequence: Annotated[int, typer.Option(min=0, help="Tokens per sample. 0: 512, or what the model takes.")] = 0,
    seed: Annotated[int, typer.Option(help="Chooses calibration samples, and what random prunes.")] = 0,
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
) -> None:
    """Prune a local Hugging Face checkpoint and write an ordinary checkpoint with zeros, or a sparse one."""
    from sparsify.errors import SparsifyError

    partial = out.parent / f"{out.name}.partial"
    try:
        check_folders(model, out, partial, resume)
        rule = rule_of(sparsity, method, pattern, match, exclude or [], allocation, seed)
        if rule.needs_calibration and calibration is None:
            raise typer.BadParameter(
                f"--method {method} looks at inputs: give --calibration FILE (.txt or .jsonl), or use --method magnitude"
            )
        batches = None if calibration is None else read_batches(model, calibration, samples, sequence, seed)
        with kept_for_resuming(partial):
            run = prune_streamed if stream else prune_in_memory
            ready, layers, refusals = run(model, partial, rule, batches, seed, torch_dtype(dtype), sparse)
            record = {**asdict(rule), "dtype": dtype, "stream": stream, **(counted(batches) if batches else {})}
            write_record(ready, record, layers, refusals)
            finish(ready, out, partial)
    except SparsifyError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        left = f"; the same command with --resume goes on from {partial}" if partial.exists() else ""
        typer.echo(f"interrupted{left}", err=True)
        raise typer.Exit(130) from error
    for line in table(layers):
        typer.echo(line)
    for refusal in refusals:
        typer.echo(f"not pruned: {refusal}")
    typer.echo(summary(layers))
    size = sum(
        path.stat().st_size for path in out.iterdir() if path.suffix == ".safetensors" or path.name == SPARSE_FILE
    )
    typer.echo(f"{out / SPARSE_FILE if sparse else out}: {size / 2**20:.2f} MiB")


# --- before anything is done ---


def check_folders(model: Path, out: Path, partial: Path, resume: bool) -> None:
    """Raises BadParameter for folders that cannot be read or written to."""
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} has no config.json: it is not a Hugging Face checkpoint")
    if "quantization_config" in json.loads((model / "config.json").read_text()):
        raise typer.BadParameter(f"{model} is quantised: prune the model that it was made from")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is there already: choose another --out, or delete it")
    if partial.exists() and not resume:
        raise typer.BadParameter(f"{partial} holds an unfinished run: go on with --resume, or delete it")


def rule_of(
    sparsity: float | None, method: str, pattern: str, match: str, exclude: list[str], allocation: str, seed: int
) -> Prune:
    from sparsify.rules_prune import Prune

    options: dict[str, Any] = {"method": method, "allocation": allocation}  # the rule refuses other words
    return Prune(sparsity=sparsity, pattern=pattern, match=match, exclude=tuple(exclude), seed=seed, **options)


def torch_dtype(name: str) -> Any:
    """None for auto. Raises BadParameter."""
    import torch

    if name == "auto":
        return None
    if name not in (*DTYPES, *DTYPES.values()):
        raise typer.BadParameter(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    return getattr(torch, DTYPES.get(name, name))


def read_batches(model: Path, calibration: Path, samples: int, sequence: int, seed: int) -> list[dict[str, Any]]:
    """Calibration batches of a text model; says how many tokens they have."""
    from transformers import AutoConfig

    from sparsify.errors import PlanError
    from sparsify.pruning.on_disk import hugging_face_class
    from sparsify.pruning.texts import calibration_batches

    taken = getattr(hugging_face_class(model), "main_input_name", "input_ids")
    if taken != "input_ids":
        raise PlanError(
            f"the model takes {taken}, not text: calibrate it in Python with sparsify.compile(…, calibration=batches), or use "
            "--method magnitude without --calibration"
        )
    config = AutoConfig.from_pretrained(model)
    batches = calibration_batches(
        calibration, config, load_tokenizer(model), samples=samples, sequence=sequence, seed=seed
    )
    found = counted(batches)
    fewer = f" (of {samples} asked for)" if found["samples"] < samples else ""
    typer.echo(f"calibration: {found['samples']} samples{fewer}, {found['tokens']:,} tokens", err=True)
    return batches


def load_tokenizer(model: Path) -> Any:
    """None when the folder has none."""
    from transformers import AutoTokenizer

    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def counted(batches: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "samples": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
    }


# --- the run: a folder that is complete but for its record, statistics of layers, what was left dense ---

Outcome = tuple[Path, "list[LayerStats]", "list[Refusal]"]


def prune_in_memory(
    model: Path, partial: Path, rule: Prune, batches: Any, seed: int, dtype: Any, sparse: bool
) -> Outcome:
    """Finished groups of layers are in `partial/groups`, the result in `partial/ready`."""
    import sparsify
    from sparsify import Plan
    from sparsify.pruning.streaming import copy_companions

    dense, unused = load_model(model, dtype)
    host = sparsify.compile(
        dense, Plan([rule], seed=seed), calibration=batches, resume_dir=partial / "groups", donate=True
    )
    ready = fresh_folder(partial / "ready")
    if sparse:
        host.config.save_pretrained(ready)
        host.sparsify.save_sparse(ready / SPARSE_FILE)
    else:
        host.save_pretrained(ready)
    copy_companions(model, ready)
    program = host.sparsify.program
    return ready, list(program.pruned), [*program.refusals, *unused]


def load_model(model: Path, dtype: Any) -> tuple[Any, list[Refusal]]:
    """The model with all its weights, and tensors in the files that it has no place for. Raises PlanError when the files lack one."""
    from sparsify.errors import PlanError
    from sparsify.pruning.on_disk import hugging_face_class, unused_tensor

    kind = hugging_face_class(model)
    loaded, info = kind.from_pretrained(model, dtype=dtype or "auto", local_files_only=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise PlanError(
            f"{model} has no tensor '{missing[0]}' ({len(missing)} in all), which {kind.__name__} would start at random: save the "
            "model with all its weights first"
        )
    return loaded.eval(), [unused_tensor(name) for name in sorted(info["unexpected_keys"])]


def prune_streamed(
    model: Path, partial: Path, rule: Prune, batches: Any, seed: int, dtype: Any, sparse: bool
) -> Outcome:
    """Finished blocks are in `partial/blocks`, with their masks; that is the result, or what it is compressed from."""
    from sparsify import Plan
    from sparsify.pruning.on_disk import prune_on_disk
    from sparsify.pruning.streaming import copy_companions
    from sparsify.sparse_checkpoint import model_hash, save_sparse
    from sparsify.tensor_file import FolderTensors

    blocks = partial / "blocks"
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


def write_record(ready: Path, settings: dict[str, Any], layers: list[LayerStats], refusals: list[Refusal]) -> None:
    from sparsify import __version__

    document = {"sparsify": __version__, "settings": settings, "layers": [asdict(layer) for layer in layers]}
    document["not_pruned"] = [asdict(refusal) for refusal in refusals]
    (ready / RECORD).write_text(json.dumps(document, indent=1) + "\n")


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
        yield (
            f"{layer.name:{width}} {layer.sparsity:7.2%} {layer.error:9.2e} {layer.seconds:8.2f} {dense:11,.1f} "
            f"{stored:11,.1f}{note}"
        )


def sizes(layer: LayerStats) -> tuple[int, int]:
    """Bytes of a weight as it is, and as values and bits."""
    from sparsify.sparse_checkpoint import stored_bytes

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
