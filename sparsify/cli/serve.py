"""`sparsify serve`: one model and many adapters, over HTTP, as OpenAI's clients talk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.text_model import load_text_model, named_folders, note
from sparsify.console import stage
from sparsify.errors import InputError

KEY = "SPARSIFY_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="An adapter folder, or name=folder. Repeat for more.")
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapter-dir",
            help="A folder of adapters: each is served by its name, and only from here more are loaded.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--served-model-name", help="What the base is called. Default: its folder's name.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Adapters that are live at once.")] = 32,
    budget: Annotated[str, typer.Option(help="Memory of live adapters.")] = "2GiB",
    host_budget: Annotated[
        str, typer.Option("--host-budget", help="Memory of adapters that wait beside them.")
    ] = "8GiB",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar=KEY, show_envvar=True, help="What every request but /health must bring."),
    ] = None,
    max_body: Annotated[str, typer.Option("--max-body", help="Size of a request.")] = "1MiB",
    max_context: Annotated[
        int | None, typer.Option("--max-context", min=2, help="Tokens of a prompt and its answer together.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens of an answer. Default: what there is room for.")
    ] = None,
    max_running: Annotated[
        int, typer.Option("--max-running", min=1, max=256, help="Requests that are computed together.")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=1, max=1024, help="Requests in the house; more are answered with 503.")
    ] = 64,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds that a request waits for its adapter.")] = 60.0,
    grace: Annotated[float, typer.Option(min=1.0, help="Seconds that running requests get at the end.")] = 30.0,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (as stored), fp32, bf16 or fp16.")] = "auto",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict",
            help="Refuse adapters that were trained on another base, also on this one in another dtype.",
        ),
    ] = True,
) -> None:
    """Serve a model and its adapters: /v1/completions, /v1/chat/completions, /v1/models; adapters are chosen by `model`."""
    import sparsify
    from sparsify.planner.limits import size
    from sparsify.serving.engine import Engine
    from sparsify.serving.names import in_folder
    from sparsify.serving.served_adapters import NAME, ServedAdapters

    try:
        from sparsify.serving.http_app import make_app
        from sparsify.serving.http_limits import Limits
        from sparsify.serving.http_server import listening, run_server
    except ImportError as error:
        raise ImportError(
            f"{error}: `sparsify serve` needs the extra: pip install 'sparsify-compiler[serve]'"
        ) from error

    base = name or model.resolve().name
    folders = named_folders(adapter or [])
    for word in (base, *folders):
        if not NAME.fullmatch(word):
            raise InputError(f"{word!r} cannot be a name here: letters, digits and . _ : @ + - are taken, at most 128")
    if base in folders or (adapter_dir is not None and in_folder(adapter_dir, base) is not None):
        raise InputError(f"the base and an adapter would both be called {base!r}: give --served-model-name")
    api_key = None if api_key is None else api_key.strip()  # as HTTP takes spaces off the header, too
    if api_key == "":
        raise InputError("--api-key: the key is empty")
    with stage("loading the model", True):
        loaded, tokenizer = load_text_model(model, dtype)
    with stage("looking where adapters can be added", True):
        served = sparsify.serve(
            loaded, folders, folder=adapter_dir, slots=slots, budget=budget, host_budget=host_budget, timeout=timeout,
            strict=strict,
        )  # fmt: skip
    positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or 4096
    context = min(max_context or positions, positions)
    cache = min(max_running * context, max(context, 16384))
    engine = Engine(
        served, tokenizer, running=max_running, queue=max_queue, cache_tokens=cache, longest=context, timeout=timeout
    )
    adapters = ServedAdapters(engine.handle, base, adapter_dir)
    limits = Limits(key=api_key, body=size(max_body, "--max-body"), local=host in LOOPBACK)
    app = make_app(engine, adapters, limits, longest_answer=max_tokens)
    socket = listening(host, port)
    where = f"http://{host if ':' not in host else f'[{host}]'}:{socket.getsockname()[1]}"

    def say() -> None:
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full: no reason not to serve
            if host not in LOOPBACK and api_key is None:
                note("warning: whoever reaches this machine can use the server: give --api-key")
            note(f"serving {base} and {len(adapters.names)} adapters on {where}/v1 (process {os.getpid()})")

    run_server(app, engine, socket, grace=grace, started=say)


__all__ = ["serve"]
