"""The command line: look at a model, an adapter or a sparse checkpoint, prune a model, time sparse inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsify.cli_bench import bench
from sparsify.cli_prune import prune

if TYPE_CHECKING:
    from sparsify.sparse_checkpoint import SparseCheckpoint

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Sparse fine-tuning and sparse inference of PyTorch models."
)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model folder, or a model type such as 'llama' (small random weights).")
    ],
    svg: Annotated[Path | None, typer.Option(help="Draw the structures here.")] = None,
    graph: Annotated[bool, typer.Option(help="Print the whole graph, not only the structures.")] = False,
) -> None:
    """Find a model's coupled structures: what could train, and what is declined and why."""
    from transformers import AutoConfig, AutoModel

    import sparsify

    if Path(model).is_dir():
        loaded = AutoModel.from_pretrained(model)
    else:
        try:
            config = AutoConfig.for_model(model)
        except ValueError as error:
            raise typer.BadParameter(
                f"{model!r} is neither a folder nor a model type that transformers knows"
            ) from error
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if hasattr(config, name):
                setattr(config, name, 2)
        import torch

        with torch.device("meta"):
            loaded = AutoModel.from_config(config)
    program = sparsify.analyse(loaded)
    if graph:
        typer.echo(str(program))
    for structure in program.structures:
        typer.echo(str(structure))
    for declined in program.declined:
        typer.echo(f"declined: {declined}")
    typer.echo(f"{len(program.structures)} structures, {len(program.declined)} declined")
    if svg is not None:
        program.svg(str(svg))
        typer.echo(f"drawn to {svg}")


@app.command()
def adapter(
    folder: Annotated[Path, typer.Argument(help="A folder that save_adapter wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the document as JSON.")] = False,
) -> None:
    """Check an adapter and say what it changes."""
    from sparsify import adapter as files
    from sparsify.errors import AdapterError

    try:
        loaded = files.load(folder)
    except AdapterError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(files.to_document(loaded), indent=1, sort_keys=True))
        return
    for delta in loaded.deltas:
        size = delta.values.numel() + (delta.a.numel() if delta.a is not None else 0)
        what = {"column": "columns", "row": "rows", "sparse": "entries", "lora": "rank", "full": "in full"}[delta.kind]
        count = "" if delta.kind in ("full", "buffer") else f"{delta.rank} "
        typer.echo(f"{delta.param}: {count}{what}, {size:,} numbers")
    typer.echo(
        f"{len(loaded.deltas)} weights, {loaded.nbytes() / 1024:.1f} KiB, made by sparsify {loaded.info.get('sparsify', '?')}"
    )


@app.command()
def checkpoint(
    path: Annotated[Path, typer.Argument(help="A file that save_sparse wrote.")],
    layers: Annotated[bool, typer.Option(help="One line per compressed weight: shape, zeros, stored size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, sizes in bytes.")] = False,
    to_dense: Annotated[
        Path | None, typer.Option("--dense", help="Write an ordinary checkpoint, zeros included, to this folder.")
    ] = None,
) -> None:
    """Check a sparse checkpoint and say how large it is, how sparse, and which dense model it was pruned from."""
    from sparsify.sparse_checkpoint import SparseCheckpointError, open_sparse

    try:
        found = open_sparse(path)
    except SparseCheckpointError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if to_dense is not None:
        expand(found, to_dense)
    sizes = {name: (dense, stored) for name, dense, stored in found.sizes()}
    if as_json:
        weights = {
            name: {"shape": entry.shape, "sparsity": entry.sparsity, "dense": sizes[name][0], "stored": sizes[name][1]}
            for name, entry in found.entries.items()
        }
        document = {"base": found.base, "file": path.stat().st_size, "compressed": weights, "plain": found.plain}
        typer.echo(json.dumps(document, indent=1))
        return
    if layers:
        for name, entry in found.entries.items():
            shape = " × ".join(map(str, entry.shape))
            typer.echo(f"{name}: {shape}, {entry.sparsity:.1%} zeros, {sizes[name][1] / 1024:.1f} KiB")
    zeros = sum(entry.numel - entry.survivors for entry in found.entries.values())
    total = sum(entry.numel for entry in found.entries.values())
    dense, stored = (sum(pair[i] for pair in sizes.values()) for i in (0, 1))
    file = path.stat().st_size
    typer.echo(
        f"{len(found.entries)} compressed tensors, {zeros / max(total, 1):.1%} zeros, {stored / 2**20:.2f} MiB instead of "
        f"{dense / 2**20:.2f} MiB; {len(found.plain)} tensors as they are"
    )
    typer.echo(f"the file: {file / 2**20:.2f} MiB, dense {(file - stored + dense) / 2**20:.2f} MiB")
    typer.echo(f"pruned from the dense model {found.base}" if found.base else "its dense model is not recorded")


def expand(found: SparseCheckpoint, folder: Path) -> None:
    """Dense weights, and config and tokenizer if they lie beside the sparse file."""
    from sparsify.pruning.streaming import copy_companions
    from sparsify.sparse_checkpoint import SparseCheckpointError

    try:
        found.save_dense(folder)
    except SparseCheckpointError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if (found.path.parent / "config.json").is_file():
        copy_companions(found.path.parent, folder)
    typer.echo(f"written to {folder}", err=True)


app.command()(prune)
app.command()(bench)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
