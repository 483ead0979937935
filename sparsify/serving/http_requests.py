"""What a request may say, and what it asks for: OpenAI's fields, each honoured or refused with a sentence that names it.

{"model": "law", "prompt": "…", "temperature": 0, "logprobs": true}   ──▶   RequestError 400: 'logprobs': not offered here
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsify.errors import SparsifyError
from sparsify.files.strict_json import cut, parse, short
from sparsify.serving.sampling import Sampling

if TYPE_CHECKING:
    from sparsify.files.strict_json import Json

CHOICES = 16
"""Answers to one request at most: prompts times `n`."""
STOPS, STOP_LENGTH = 16, 256
BIASES = 1024
DEPTH = 16

UNUSED: dict[str, tuple[Json, ...]] = {
    "logprobs": (None, False), "top_logprobs": (None, 0), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "functions": (None, []), "function_call": (None, "none", "auto"), "response_format": (None, {"type": "text"}),
    "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1), "store": (None, False), "audio": (None,),
    "service_tier": (None, "auto", "default"), "modalities": (None, ["text"]), "prediction": (None,),
    "reasoning_effort": (None, "none"), "web_search_options": (None,), "verbosity": (None, "medium"),
}  # fmt: skip
"""Fields of the interface that are not offered, and the values that ask for nothing."""
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls")
"""Fields that say nothing about the answer."""


class RequestError(SparsifyError, ValueError):
    """A request cannot be served as it stands. status: of HTTP. code: for programs. field: which one."""

    def __init__(self, reason: str, status: int = 400, code: str | None = None, field: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.code, self.field = status, code, field


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request for text. prompts: text, or token ids, each; for a chat one list of messages. count: answers to each.

    bounded: whether it says how many tokens it wants; otherwise an answer may take what room there is.
    """

    model: str
    prompts: list[str | list[int]] | None
    messages: list[dict[str, str]] | None
    sampling: Sampling
    bounded: bool
    count: int
    stream: bool
    usage: bool


def body_object(body: bytes) -> dict[str, Json]:
    """The JSON object in a body. Raises RequestError."""
    try:
        found = parse(body, "the body", RequestError, depth=DEPTH)
    except MemoryError as error:
        raise RequestError("the body: not JSON that can be read") from error
    if not isinstance(found, dict):
        raise RequestError("the body: expected a JSON object")
    return found


class Fields:
    """The fields of a request, taken one by one; `done` refuses those that are left."""

    def __init__(self, given: Mapping[str, Json]) -> None:
        self.left = dict(given)

    def take(self, name: str, default: Any, good: Callable[[Any], bool], expected: str) -> Any:
        """A field; null stands for its default. Raises RequestError for a value that is none."""
        value = self.left.pop(name, None)
        if value is None:
            if default is ...:
                raise RequestError(f"{name!r} is missing: expected {expected}", field=name)
            return default
        if not good(value):
            raise RequestError(f"{name!r}: expected {expected}, got {short(value)}", field=name)
        return value

    def done(self) -> None:
        for name in IGNORED:
            self.left.pop(name, None)
        for name, nothing in UNUSED.items():
            value = self.left.pop(name, None)
            if not any(type(value) is type(none) and value == none for none in nothing):
                raise RequestError(
                    f"{name!r}: not offered here; leave it out", field=name, code="unsupported_parameter"
                )
        if self.left:
            name = next(iter(self.left))
            raise RequestError(
                f"{short(name)}: not a field of this request", field=cut(name, 64), code="unknown_parameter"
            )


def number(low: float, high: float, *, above: bool = False) -> Callable[[Any], bool]:
    def good(value: Any) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and (low < value if above else low <= value) and value <= high

    return good


def whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def truth(value: Any) -> bool:
    return isinstance(value, bool)


def read_completion(given: Mapping[str, Json], most: int) -> Asked:
    """/v1/completions. most: tokens of an answer that may be asked for. Raises RequestError."""
    fields = Fields(given)
    prompt = fields.take(
        "prompt", ..., lambda p: isinstance(p, str | list) and p != [], "text, token ids, or a list of one of them"
    )
    tokens = fields.take("max_tokens", 16, whole(1, most), f"a whole number from 1 to {most}")
    return asked(fields, tokens, bounded=True, prompts=prompts_of(prompt), messages=None)


def prompts_of(prompt: Any) -> list[str | list[int]]:
    found = [prompt] if isinstance(prompt, str) or type(prompt[0]) is int else list(prompt)
    for each in found:
        ids = isinstance(each, list) and each != [] and all(type(token) is int and token >= 0 for token in each)
        if not ids and not (isinstance(each, str) and each):
            raise RequestError(
                "'prompt': expected text, token ids, or a list of one of them, and none of them empty", field="prompt"
            )
    return found


def read_chat(given: Mapping[str, Json], most: int) -> Asked:
    """/v1/chat/completions. Raises RequestError."""
    fields = Fields(given)
    messages = fields.take("messages", ..., lambda m: isinstance(m, list) and m != [], "a list of messages")
    tokens = fields.take("max_tokens", None, whole(1, most), f"a whole number from 1 to {most}")
    tokens = fields.take("max_completion_tokens", tokens, whole(1, most), f"a whole number from 1 to {most}")
    texts = [message(m) for m in messages]
    return asked(fields, tokens or most, bounded=tokens is not None, prompts=None, messages=texts)


def message(given: Any) -> dict[str, str]:
    """Role and text of a message; content in parts is text too, where its parts are."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise RequestError("'messages': expected objects with a 'role' and a 'content'", field="messages")
    content = given.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not parts or not all(isinstance(part, str) for part in parts):
            raise RequestError("'messages': only parts of text can be read", field="messages")
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise RequestError("'messages': expected a 'content' that is text", field="messages")
    odd = next((key for key in given if key not in ("role", "content", "name", "refusal")), None)
    if odd is not None and given[odd] not in (None, []):
        raise RequestError(
            f"'messages': {short(odd)} is not offered here", field="messages", code="unsupported_parameter"
        )
    if given["role"] not in ("system", "developer", "user", "assistant"):
        raise RequestError(f"'messages': a role {short(given['role'])} is not known", field="messages")
    return {"role": "system" if given["role"] == "developer" else given["role"], "content": content}


def asked(fields: Fields, tokens: int, **what: Any) -> Asked:
    """The fields that both kinds of request have."""
    model = fields.take(
        "model", ..., lambda m: isinstance(m, str) and 0 < len(m) <= 256, "the name of a model or an adapter"
    )
    stop = fields.take("stop", [], stops, f"a text, or at most {STOPS} of them, each of 1 to {STOP_LENGTH} characters")
    count = fields.take("n", 1, whole(1, CHOICES), f"a whole number from 1 to {CHOICES}")
    stream = fields.take("stream", False, truth, "true or false")
    options = fields.take(
        "stream_options",
        {},
        lambda o: isinstance(o, dict) and {*o} <= {"include_usage", "include_obfuscation"},
        "include_usage",
    )
    usage = options.get("include_usage") or False
    if not truth(usage):
        raise RequestError("'stream_options': include_usage is true or false", field="stream_options")
    sampling = Sampling(
        tokens=tokens,
        temperature=fields.take("temperature", 1.0, number(0, 2), "a number from 0 to 2"),
        top_p=fields.take("top_p", 1.0, number(0, 1, above=True), "a number above 0 and at most 1"),
        top_k=fields.take("top_k", 0, whole(-1, 1 << 20), "a whole number; 0 or -1 for all"),
        presence=fields.take("presence_penalty", 0.0, number(-2, 2), "a number from -2 to 2"),
        frequency=fields.take("frequency_penalty", 0.0, number(-2, 2), "a number from -2 to 2"),
        bias=biases(
            fields.take(
                "logit_bias",
                {},
                lambda b: isinstance(b, dict) and len(b) <= BIASES,
                f"an object of at most {BIASES} tokens",
            )
        ),
        seed=fields.take("seed", None, whole(-(1 << 63), (1 << 63) - 1), "a whole number of 64 bits"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        endless=fields.take("ignore_eos", False, truth, "true or false"),
    )
    fields.done()
    prompts = what["prompts"] or [""]
    if count * len(prompts) > CHOICES:
        raise RequestError(
            f"{count} answers to each of {len(prompts)} prompts are more than {CHOICES}; send several requests",
            field="n",
        )
    return Asked(model=model, sampling=sampling, count=count, stream=stream, usage=usage, **what)


def stops(value: Any) -> bool:
    found = [value] if isinstance(value, str) else value
    return (
        isinstance(found, list)
        and len(found) <= STOPS
        and all(isinstance(s, str) and 0 < len(s) <= STOP_LENGTH for s in found)
    )


def biases(given: Mapping[str, Any]) -> dict[int, float]:
    found = {}
    for token, added in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10) or not number(-100, 100)(added):
            raise RequestError(
                "'logit_bias': expected ids of tokens, with numbers from -100 to 100", field="logit_bias"
            )
        found[int(token)] = float(added)
    return found


__all__ = ["Asked", "RequestError", "body_object", "read_chat", "read_completion"]
