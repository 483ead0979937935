"""`sparsify adapter …`: what lies on disk, whether it is whole, and what can be made of it; ours and PEFT's folders alike.

ls FOLDER…                    every adapter below some folders
show FOLDER                   what it changes        (`sparsify adapter FOLDER` is the same)
verify FOLDER [--base MODEL]  whether its files are whole, and belong to this model
merge MODEL ADAPTER… -o OUT   an ordinary model with the adapter, or a weighted sum of some, in its weights
fuse A=0.5 B=0.5 -o OUT       one adapter that is the weighted sum of several
export MODEL ADAPTER -o OUT   PEFT's LoRA folder that computes the same; --to vllm refuses what vLLM would, and prints the line that serves
verify FOLDER --for vllm      what vLLM makes of a PEFT folder: ranks, padding, refusals
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.cli.files import PEFT_WEIGHTS, adapter, peft_shapes, size_of, what_is_at
from sparsify.cli.model_folder import ADAPTER_FILE, CONFIG, PEFT_CONFIG, load_model, read_object
from sparsify.cli.prune import model_class, torch_dtype
from sparsify.cli.rule import RuledGroup
from sparsify.cli.tables import show as show_table
from sparsify.console import one_line
from sparsify.errors import InputError, SparsifyError
from sparsify.files.atomic import write_text
from sparsify.files.hub import is_hub_name

if TYPE_CHECKING:
    from sparsify.adapters.vllm_check import VllmReport

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

MaxRank = Annotated[
    int | None,
    typer.Option("--max-lora-rank", min=1, help="Of the vLLM server that there is. Default: what is needed."),
]

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
    engine: Annotated[
        str | None, typer.Option("--for", help="vllm: what vLLM makes of a PEFT folder, or why it would refuse it.")
    ] = None,
    most: MaxRank = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter: every byte against its hash, every name and shape, and with --base whether it belongs to a model."""
    kind = adapter_kind(folder)
    check_engine(engine, kind, folder, most)
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
    done: dict[str, Any] = {
        "folder": str(folder),
        "kind": kind,
        "weights": weights,
        "base": str(base or ""),
        "fine": True,
    }
    served = of_vllm(folder, most, base) if engine == "vllm" else None
    if served is not None:
        done |= {"vllm": served.document(), "fine": served.fine}
    if as_json:
        typer.echo(json.dumps(done, indent=1))
    else:
        typer.echo(one_line(f"{folder}: fine; {weights} weights; {checked}"))
        if served is not None:
            typer.echo(str(served))
            typer.echo(served.command(folder.resolve().name, str(folder)) if served.fine else "", nl=served.fine)
    if served is not None and not served.fine:
        raise InputError(f"{folder}: vLLM would refuse it: {served.refusals[0]}")


def check_engine(engine: str | None, kind: str, folder: Path, most: int | None) -> None:
    """Raises InputError for an engine that nobody knows, or a folder that it does not read."""
    if engine not in (None, "vllm"):
        raise InputError(f"--for {engine!r}: expected vllm")
    if engine is None and most is not None:
        raise InputError("--max-lora-rank is a setting of vLLM's: give --for vllm beside it")
    if engine == "vllm" and kind != "peft":
        raise InputError(
            f"{folder}: vLLM reads PEFT's folders: `sparsify adapter export MODEL {folder} --to vllm -o OUT` first"
        )


def of_vllm(folder: Path, most: int | None, base: Path | None) -> VllmReport:
    """What vLLM makes of a PEFT folder."""
    from sparsify.adapters.vllm_check import check_for_vllm

    config = read_object(folder / PEFT_CONFIG)
    place = base or Path(str(config.get("base_model_name_or_path") or ""))
    found = read_object(place / CONFIG).get("model_type") if (place / CONFIG).is_file() else None
    return check_for_vllm(config, peft_shapes(folder), most, found if isinstance(found, str) else None)


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
        if Path(place).exists() or not is_hub_name(place):
            adapter_kind(Path(place))
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
    most: MaxRank = None,
    dtype: Dtype = "auto",
    dry_run: Dry = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as PEFT's LoRA folder that computes the same."""
    from sparsify.files.new_folder import check_new, new_folder

    if to not in ("peft", "vllm"):
        raise InputError(f"--to {to!r}: expected peft or vllm")
    if most is not None and to != "vllm":
        raise InputError("--max-lora-rank is a setting of vLLM's: give --to vllm beside it")
    check_new(out, InputError)
    host, names = serving(model, [f"adapter={folder}"], dtype)
    host.sparsify.set_adapter(names[0])
    with scratch() if dry_run else new_folder(out, InputError) as begun:
        host.sparsify.export_lora(begun, names[0], sparse=sparse, engine=to, max_lora_rank=most)
        config = read_object(begun / PEFT_CONFIG)
        base = config.get("base_model_name_or_path")
        if isinstance(base, str) and base.startswith(str(begun)):  # of sparse="merge", which lies beside it
            config["base_model_name_or_path"] = str(out) + base[len(str(begun)) :]
            write_text(begun / PEFT_CONFIG, json.dumps(config, indent=2))
        rank = lora_rank(peft_shapes(begun))
        served = of_vllm(begun, most, model) if to == "vllm" else None
    done = {"out": str(out), "rank": rank, "to": to, "written": not dry_run}
    if served is None:
        report(done, f"PEFT LoRA of rank {rank}", as_json)
        return
    line = served.command(folder.resolve().name, str(out.resolve()))
    report(done | {"vllm": served.document(), "serve": line}, f"PEFT LoRA of rank {rank}", as_json)
    if not as_json:
        typer.echo(f"{served}\n{line}")


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


def report(done: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(done, indent=1))
        return
    typer.echo(one_line(f"{'written to' if done['written'] else 'would write'} {done['out']}: {what}"))


__all__ = ["adapters"]
