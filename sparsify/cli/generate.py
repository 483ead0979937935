"""`sparsify generate` and `sparsify chat`: text from a model, with an adapter or a mix of some, as it is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli.text_model import load_text_model, with_adapters
from sparsify.errors import InputError

Model = Annotated[Path, typer.Argument(help="A Hugging Face model folder.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="An adapter folder (or owner/name of a hub), or name=folder. Several are mixed, see --mix.",
    ),
]
Mix = Annotated[
    str | None, typer.Option("--mix", help="Weights of several adapters: a=0.5,b=0.5. Default: equal shares.")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens that have this share together.")
]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of what is drawn.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as stored), fp32, bf16 or fp16.")]


def generate(
    model: Model,
    words: Annotated[
        str | None, typer.Argument(metavar="{prompt}", help="Text to go on from. Default: what stands on stdin.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The same.")] = None,
    adapter: Adapters = None,
    mix: Mix = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: put it into the chat template.")
    ] = False,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt, text and settings as JSON.")] = False,
) -> None:
    """Go on from a prompt; the text is printed as it is written."""
    if words is not None and prompt is not None:
        raise InputError("the prompt is given twice: once by its place and once by --prompt")
    given = prompt if words is None else words
    text = sys.stdin.read() if given is None else given
    if not text.strip():
        raise InputError("the prompt is empty")
    host, tokenizer = serving(model, adapter or [], mix, dtype)
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}]) if chat else tokenizer(text)["input_ids"]
    written = write(host, tokenizer, ids, max_new_tokens, temperature, top_p, seed, quiet=as_json)
    if as_json:
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        typer.echo(json.dumps({"prompt": text, "text": written, **settings}, indent=1, ensure_ascii=False))


def chat(
    model: Model,
    adapter: Adapters = None,
    mix: Mix = None,
    system: Annotated[str | None, typer.Option(help="A system message in front.")] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every answer as one line of JSON: prompt, text, turn.")
    ] = False,
) -> None:
    """Talk to a model: a line is a message; /reset forgets, /exit or the end of input leaves."""
    host, tokenizer = serving(model, adapter or [], mix, dtype)
    beginning = [{"role": "system", "content": system}] if system else []
    encode_chat(tokenizer, [*beginning, {"role": "user", "content": "?"}])
    messages = list(beginning)
    while (line := next_line()) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(beginning)
            typer.echo("(forgotten)", err=True)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        ids = encode_chat(tokenizer, messages)
        answer = write(host, tokenizer, ids, max_new_tokens, temperature, top_p, seed, quiet=as_json)
        messages.append({"role": "assistant", "content": answer})
        if as_json:
            turn = sum(message["role"] == "assistant" for message in messages)
            typer.echo(json.dumps({"prompt": line, "text": answer, "turn": turn}, ensure_ascii=False))


def next_line() -> str | None:
    """The next message; None at the end of input."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def serving(folder: Path, adapters: Sequence[str], mix: str | None, dtype: str) -> tuple[Any, Any]:
    """The model with what it shall compute with, and its tokenizer."""
    model, tokenizer = load_text_model(folder, dtype)
    host, names = with_adapters(model, adapters)
    if mix is not None and not names:
        raise InputError("--mix: no --adapter is given")
    if len(names) == 1 and mix is None:
        host.sparsify.set_adapter(names[0])
    elif names:
        host.sparsify.set_adapter(weights_of(mix, names))
    return host, tokenizer


def weights_of(mix: str | None, names: Sequence[str]) -> dict[str, float]:
    """Weights by adapter from "a=0.5,b=0.5". Raises InputError."""
    from sparsify.plan import nearest

    if mix is None:
        return {name: 1 / len(names) for name in names}
    found = {}
    for part in mix.split(","):
        name, _, number = part.strip().partition("=")
        if name not in names:
            raise InputError(f"--mix: no adapter is called {name!r}{nearest(name, list(names))}")
        try:
            found[name] = float(number)
        except ValueError:
            raise InputError(f"--mix {part.strip()!r}: expected name=weight") from None
    return found


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation and the beginning of an answer. Raises InputError."""
    from sparsify.errors import PlanError
    from sparsify.finetune.rows import prompt_text

    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("the model's tokenizer has no chat template: use `sparsify generate` without --chat")
    try:
        return tokenizer(prompt_text("messages", tokenizer, messages), add_special_tokens=False)["input_ids"]
    except PlanError as error:
        raise InputError(str(error)) from error


def write(
    host: Any,
    tokenizer: Any,
    ids: list[int],
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
    quiet: bool = False,
) -> str:
    """Generate after `ids`, print the text as it comes unless `quiet`, and return it."""
    import torch
    from transformers import TextStreamer

    from sparsify.finetune.evaluate import device_of
    from sparsify.finetune.rows import pad_token

    limit = getattr(host.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit <= len(ids):
        raise InputError(f"the prompt has {len(ids)} tokens, and the model {limit} positions")
    if isinstance(limit, int) and limit > 0:
        count = min(count, limit - len(ids))
    torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=device_of(host))
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        found = host.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            pad_token_id=pad_token(host, tokenizer),
            streamer=None if quiet else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),  # type: ignore[arg-type]
            **(drawn if temperature > 0 else greedy),
        )
    return tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


__all__ = ["chat", "generate"]
