"""`sparsify adapter …`: what lies on disk, whether it is whole, and what can be made of it; ours and PEFT's folders alike.

ls FOLDER…                    every adapter below some folders
show FOLDER                   what it changes        (`sparsify adapter FOLDER` is the same)
verify FOLDER [--base MODEL]  whether its files are whole, and belong to this model
merge MODEL ADAPTER… -o OUT   an ordinary model with the adapter, or a weighted sum of some, in its weights
fuse A=0.5 B=0.5 -o OUT       one adapter that is the weighted sum of several
export MODEL ADAPTER -o OUT   PEFT's LoRA folder that computes the same
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from sparsify.cli.files import PEFT_WEIGHTS, adapter, peft_shapes, size_of, what_is_at
from sparsify.cli.model_folder import ADAPTER_FILE, PEFT_CONFIG, load_model, read_object
from sparsify.cli.prune import model_class, torch_dtype
from sparsify.cli.rule import RuledGroup
from sparsify.cli.tables import show as show_table
from sparsify.console import one_line
from sparsify.errors import InputError, SparsifyError
from sparsify.files.atomic import write_text

OTHER_WORDS = {"list": "ls", "info": "show", "inspect": "show", "print": "show", "check": "verify", "validate": "verify", "combine": "fuse",
               "add": "fuse", "convert": "export", "to-peft": "export", "merge-and-unload": "merge", "unload": "merge"}  # fmt: skip
DEEPEST = 4  # folders below the one that is listed


class AdapterGroup(RuledGroup):
    """`sparsify adapter FOLDER` is `sparsify adapter show FOLDER`; a word that is neither is answered."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            raise InputError(
                f"sparsify adapter: give a folder, or a verb ({', '.join(self.commands)}) and what it takes"
            )
        word = next((a for a in args if not a.startswith("-")), "")
        if args and args[0] not in self.commands and not {"-h", "--help"} & set(args[:1]):
            if not os.path.lexists(word) and (verb := self.meant(word)):
                raise InputError(
                    f"sparsify adapter {word}: no folder and no verb; here it is `sparsify adapter {verb}`"
                )
            args = ["show", *args]
        return super().parse_args(ctx, args)

    def meant(self, word: str) -> str | None:
        """The verb that another tool's word, or a slip, stands for."""
        close = difflib.get_close_matches(word[:40], list(self.commands), n=1, cutoff=0.7)
        return OTHER_WORDS.get(word) or next(iter(close), None)


adapters = typer.Typer(
    cls=AdapterGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look at, check, merge, fuse and export adapters.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="The new folder; it appears when it is complete.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be written, and write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Model = Annotated[Path, typer.Argument(help="The Hugging Face folder of the model that it was trained on.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as stored), fp32, bf16 or fp16.")]

adapters.command("show")(adapter)


@adapters.command()
def ls(
    folders: Annotated[list[Path] | None, typer.Argument(help="Where to look. Default: here.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters in some folders and below them: of whom, how large, of which base."""
    rows = [facts(place) for folder in folders or [Path()] for place in adapter_folders(folder)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo("no adapters")
        return
    cells = [
        [r["folder"], r["made_by"], r["methods"], str(r["weights"]), f"{r['numbers']:,}", f"{r['bytes'] / 1024:,.1f} KiB", r["note"]]
        for r in rows
    ]  # fmt: skip
    show_table(["folder", "made by", "what", "weights", "numbers", "size", "note"], cells, left=3)


def adapter_folders(folder: Path, deep: int = DEEPEST) -> Iterator[Path]:
    """Folders with an adapter, this one or below it, in order. Raises InputError for what is no folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no folder")
    if (folder / ADAPTER_FILE).exists() or (folder / PEFT_CONFIG).exists():
        yield folder
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    except OSError:
        inside = []  # not ours to read
    for place in inside if deep else []:
        yield from adapter_folders(place, deep - 1)


def facts(folder: Path) -> dict[str, Any]:
    """What `ls` says of an adapter; of a damaged one, why it cannot be read."""
    found: dict[str, Any] = {
        "folder": str(folder),
        "made_by": "",
        "methods": "",
        "weights": 0,
        "numbers": 0,
        "bytes": 0,
        "base": "",
        "note": "",
    }
    try:
        if what_is_at(folder) == "adapter":
            found |= our_facts(folder)
        else:
            found |= peft_facts(folder)
    except SparsifyError as error:
        found["note"] = f"cannot be read: {str(error).splitlines()[0]}"
    return found


def our_facts(folder: Path) -> dict[str, Any]:
    from sparsify.adapters import adapter as files

    loaded = files.load(folder)
    try:
        plan = loaded.info.get("plan")
        rules = json.loads(plan if isinstance(plan, str) else "{}").get("rules", [])
    except (ValueError, AttributeError):
        rules = []
    methods = list(dict.fromkeys(str(rule.get("rule")) for rule in rules if isinstance(rule, dict)))
    numbers = sum(d.values.numel() + (d.a.numel() if d.a is not None else 0) for d in loaded.deltas)
    return {
        "made_by": f"sparsify {loaded.info.get('sparsify', '')}".strip(),
        "methods": ", ".join(methods),
        "base": str(loaded.info.get("model", "")),
        "weights": len({d.param for d in loaded.deltas}),
        "numbers": numbers,
        "bytes": (folder / ADAPTER_FILE).stat().st_size,
    }


def peft_facts(folder: Path) -> dict[str, Any]:
    config, shapes = read_object(folder / PEFT_CONFIG), peft_shapes(folder)
    file = next(folder / name for name in PEFT_WEIGHTS if (folder / name).exists())
    weights = {name.partition(".lora_")[0] for name in shapes}
    return {
        "made_by": "PEFT",
        "methods": f"{config.get('peft_type', '?')} r={config.get('r', '?')}",
        "base": str(config.get("base_model_name_or_path") or ""),
        "weights": len(weights),
        "numbers": sum(map(size_of, shapes.values())),
        "bytes": file.stat().st_size,
    }


@adapters.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An adapter folder, ours or PEFT's.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="Also whether it was trained on the model in this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter: every byte against its hash, every name and shape, and with --base whether it belongs to a model."""
    kind = adapter_kind(folder)
    if kind == "adapter":
        from sparsify.adapters import adapter as files

        weights = len({d.param for d in files.load(folder).deltas})
    else:
        from sparsify.adapters.peft_config import read_config

        read_config(read_object(folder / PEFT_CONFIG), str(folder))
        weights = len({name.partition(".lora_")[0] for name in peft_shapes(folder)})
    if base is not None:
        serving(base, [str(folder)], "auto")
    checked = {"adapter": "hashes, names and shapes", "peft": "fields, names and shapes (PEFT's files have no hashes)"}[
        kind
    ]
    if base is not None:
        checked += {
            "adapter": f"; trained on {base}",
            "peft": f"; fits {base} (PEFT's files do not say on which values)",
        }[kind]
    if as_json:
        typer.echo(
            json.dumps(
                {"folder": str(folder), "kind": kind, "weights": weights, "base": str(base or ""), "fine": True},
                indent=1,
            )
        )
    else:
        typer.echo(one_line(f"{folder}: fine; {weights} weights; {checked}"))


def adapter_kind(folder: Path) -> str:
    """adapter or peft. Raises InputError for what is neither."""
    from sparsify.cli.files import ADAPTER_HINTS

    kind = what_is_at(folder)
    if kind not in ("adapter", "peft"):
        raise InputError(f"{folder}: {ADAPTER_HINTS.get(kind, ADAPTER_HINTS['']).format(path=folder)}")
    return kind


def serving(folder: Path, given: list[str], dtype: str) -> tuple[Any, list[str]]:
    """The model in a folder serving adapters, none active, and their names. Raises InputError and AdapterError."""
    from sparsify.cli.text_model import named_folders, with_adapters

    for place in named_folders(given).values():
        adapter_kind(place)
    if not folder.exists():
        raise InputError(f"'{folder}' does not exist")
    model, missing, _ = load_model(folder, model_class(folder), torch_dtype(dtype) or "auto")
    if missing:
        raise InputError(
            f"{folder}: its files lack '{missing[0]}' ({len(missing)} tensors in all), which would start at random"
        )
    return with_adapters(model, given)


@adapters.command()
def merge(
    model: Model,
    given: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="An adapter folder, or name=folder for several.")
    ],
    out: Out,
    mix: Annotated[
        str | None, typer.Option("--mix", help="Weights of several: a=0.5,b=0.5. Default: equal shares.")
    ] = None,
    dtype: Dtype = "auto",
    dry_run: Dry = False,
    as_json: AsJson = False,
) -> None:
    """Write an ordinary model folder with an adapter, or a weighted sum of several, in its weights."""
    from sparsify.cli.generate import weights_of
    from sparsify.files.new_folder import check_new, new_folder
    from sparsify.pruning.streaming import copy_companions

    check_new(out, InputError)
    host, names = serving(model, given, dtype)
    spec: Any = names[0] if len(names) == 1 and mix is None else weights_of(mix, names)
    host.sparsify.set_adapter(spec)
    if not dry_run:
        with new_folder(out, InputError) as begun:
            host.sparsify.plain().save_pretrained(begun)
            copy_companions(model, begun)
    done = {
        "out": str(out),
        "model": str(model),
        "adapters": spec if isinstance(spec, dict) else {spec: 1.0},
        "written": not dry_run,
    }
    report(done, f"{model} with {', '.join(names)}", as_json)


@adapters.command()
def fuse(
    given: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER=WEIGHT...", help="Adapter folders and their weights: runs/a=0.5 runs/b=0.5."),
    ],
    out: Out,
    model: Annotated[
        Path | None, typer.Option("--model", help="The model they were trained on; PEFT's folders need it.")
    ] = None,
    dry_run: Dry = False,
    as_json: AsJson = False,
) -> None:
    """Write one adapter that is the weighted sum of several."""
    from sparsify.adapters import adapter as files
    from sparsify.adapters.fuse import fuse as fused
    from sparsify.files.new_folder import check_new

    weights = [folder_weight(word, 1 / len(given)) for word in given]
    check_new(out, InputError)
    kinds = {adapter_kind(folder) for folder, _ in weights}
    if kinds == {"adapter"} and model is None:
        made = fused([(weight, files.load(folder)) for folder, weight in weights])
    elif model is None:
        raise InputError("PEFT's folders do not say what their factors belong to: give the model too, --model FOLDER")
    else:
        host, names = serving(model, [f"{place}={folder}" for place, (folder, _) in enumerate(weights)], "auto")
        made = fused([(weight, host.sparsify.get(name)) for name, (_, weight) in zip(names, weights, strict=True)])
    if not dry_run:
        files.save(made, out)
    done = {
        "out": str(out),
        "adapters": {str(folder): weight for folder, weight in weights},
        "weights": len(made.deltas),
        "written": not dry_run,
    }
    report(done, f"the sum of {len(weights)} adapters over {len(made.deltas)} weights", as_json)


def folder_weight(word: str, default: float) -> tuple[Path, float]:
    """Folder and weight of "folder=0.5"; a folder alone has `default`. Raises InputError."""
    folder, equals, number = word.rpartition("=")
    if not equals or Path(word).exists():
        return Path(word), default
    try:
        return Path(folder), float(number)
    except ValueError:
        raise InputError(f"{word!r}: expected folder=weight, such as runs/a=0.5") from None


@adapters.command()
def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.")],
    out: Out,
    to: Annotated[
        str, typer.Option("--to", help="peft, or vllm: the same files, refused where vLLM cannot serve them.")
    ] = "peft",
    sparse: Annotated[
        str,
        typer.Option(help="What to do with scattered entries, which are no LoRA: refuse, or merge them into OUT/base."),
    ] = "refuse",
    dtype: Dtype = "auto",
    dry_run: Dry = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as PEFT's LoRA folder that computes the same."""
    from sparsify.files.new_folder import check_new, new_folder

    if to not in ("peft", "vllm"):
        raise InputError(f"--to {to!r}: expected peft or vllm")
    check_new(out, InputError)
    host, names = serving(model, [f"adapter={folder}"], dtype)
    host.sparsify.set_adapter(names[0])
    with scratch() if dry_run else new_folder(out, InputError) as begun:
        host.sparsify.export_lora(begun, names[0], sparse=sparse)
        config = read_object(begun / PEFT_CONFIG)
        base = config.get("base_model_name_or_path")
        if isinstance(base, str) and base.startswith(str(begun)):  # of sparse="merge", which lies beside it
            config["base_model_name_or_path"] = str(out) + base[len(str(begun)) :]
            write_text(begun / PEFT_CONFIG, json.dumps(config, indent=2))
        rank = lora_rank(peft_shapes(begun))
        if to == "vllm":
            check_vllm(config)
    done = {"out": str(out), "rank": rank, "to": to, "written": not dry_run}
    report(done, f"PEFT LoRA of rank {rank}{flags(to, rank)}", as_json)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def lora_rank(shapes: dict[str, tuple[int, ...]]) -> int:
    """The largest rank among the factors of a PEFT adapter."""
    return max(
        (shape[0] for name, shape in shapes.items() if "lora_A" in name or "lora_embedding_A" in name), default=0
    )


def check_vllm(config: dict[str, Any]) -> None:
    """Raises InputError for what vLLM's LoRA has no place for."""
    if config.get("modules_to_save"):
        full = config["modules_to_save"][0]
        raise InputError(
            f"vLLM serves low-rank changes alone, and {full!r} trained in full: merge instead (`sparsify adapter merge`)"
        )
    if config.get("bias", "none") != "none":
        raise InputError(
            "vLLM serves low-rank changes alone, and biases trained: merge instead (`sparsify adapter merge`)"
        )


def flags(to: str, rank: int) -> str:
    served = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), None)
    if to != "vllm":
        return ""
    return (
        f"; vllm serve … --enable-lora --max-lora-rank {served}"
        if served
        else "; more than vLLM's largest rank, 512: merge instead"
    )


def report(done: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(done, indent=1))
        return
    typer.echo(one_line(f"{'written to' if done['written'] else 'would write'} {done['out']}: {what}"))


__all__ = ["adapters"]
