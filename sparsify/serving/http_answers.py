"""The answers to one request: in one object, or piece by piece as server-sent events.

    data: {"choices": [{"index": 0, "text": "once", …}], …}
    data: {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], …}
    data: [DONE]

A stream that fails has an event {"error": …} before the last line.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from sparsify.errors import AdapterError
from sparsify.serving.engine import Busy, Engine, Failed, Piece
from sparsify.serving.http_limits import error_body
from sparsify.serving.http_metrics import Metrics
from sparsify.serving.http_requests import Asked, RequestError
from sparsify.serving.sampling import Sampling
from sparsify.serving.served_adapters import Forbidden, Unknown
from sparsify.serving.store import SlotTimeout

CLOSING: set[asyncio.Future[None]] = set()
"""Answers that are being closed; an event loop alone does not keep them."""


@dataclass(frozen=True)
class Prompt:
    """One answer that is wanted: the prompt's tokens, and how to draw."""

    ids: list[int]
    sampling: Sampling


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error. What is not ours says nothing about itself to a stranger."""
    if isinstance(error, RequestError):
        return error.status, error_body(str(error), error.status, error.code, error.field)
    if isinstance(error, HTTPException):
        reason = {404: "there is no such path here", 405: "this path has no such method"}.get(
            error.status_code, str(error.detail)
        )
        return error.status_code, error_body(reason, error.status_code)
    known: tuple[tuple[type[Exception], int, str | None], ...] = (
        (Busy, 503, "overloaded"), (SlotTimeout, 503, "overloaded"), (Unknown, 404, "model_not_found"), (Forbidden, 403, None),
        (AdapterError, 400, "adapter_refused"), (Failed, 500, None),
    )  # fmt: skip
    for kind, status, code in known:
        if isinstance(error, kind):
            return status, error_body(str(error), status, code)
    return 500, error_body("something failed in the server; its log says what", 500)


class Form:
    """How one kind of request is answered."""

    prefix, whole_object, piece_object = "", "", ""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.adapter = ""
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model, "choices": choices}

    def choice(self, index: int, text: str, end: str) -> dict[str, Any]:
        raise NotImplementedError

    def piece(self, index: int, text: str, end: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        return None


class Completion(Form):
    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, end: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": end}

    def piece(self, index: int, text: str, end: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": end}


class Chat(Form):
    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, end: str) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": end,
        }

    def piece(self, index: int, text: str, end: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": end}

    def opening(self, index: int) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


class Run:
    """The answers to one request, side by side."""

    def __init__(self, engine: Engine, metrics: Metrics, form: Form, prompts: Sequence[Prompt], began: float) -> None:
        self.engine, self.metrics, self.form, self.prompts, self.began = engine, metrics, form, prompts, began
        self.written = 0
        self.ended = False
        self.tasks: list[asyncio.Task[Any]] = []
        self.answers = [engine.answer(form.adapter, p.ids, p.sampling) for p in prompts]

    async def begin(self) -> None:
        """Admit every answer. Raises what `Engine.answer` does; then none of them runs."""
        try:
            for answer in self.answers:
                await anext(answer)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Stop what still runs; once. Waits for nothing, so that a cancelled caller can do it too."""
        if self.ended:
            return
        self.ended = True
        for task in self.tasks:
            task.cancel()

        async def close() -> None:
            await asyncio.gather(*self.tasks, return_exceptions=True)
            for answer in self.answers:
                await answer.aclose()

        closing = asyncio.ensure_future(close())
        CLOSING.add(closing)
        closing.add_done_callback(CLOSING.discard)
        self.metrics.written.inc(self.written)
        self.metrics.whole.observe(time.monotonic() - self.began)

    def note(self, piece: Piece) -> None:
        if piece.tokens and not self.written:
            self.metrics.first.observe(time.monotonic() - self.began)
        self.written += piece.tokens
        if piece.end is not None:
            self.metrics.answers.labels(piece.end).inc()

    def usage(self) -> dict[str, int]:
        read = sum(len(p.ids) for p in self.prompts[:: self.form.asked.count])
        return {"prompt_tokens": read, "completion_tokens": self.written, "total_tokens": read + self.written}

    async def whole(self) -> dict[str, Any]:
        """All answers in one object, once they began."""

        async def one(index: int) -> dict[str, Any]:
            text, end = [], "length"
            async for piece in self.answers[index]:
                self.note(piece)
                text.append(piece.text)
                end = piece.end or end
            return self.form.choice(index, "".join(text), end)

        self.tasks = [asyncio.ensure_future(one(index)) for index in range(len(self.answers))]
        try:
            choices = await asyncio.gather(*self.tasks)
        except Exception:
            self.metrics.answers.labels("error").inc()
            raise
        finally:
            self.end()
        return {**self.form.envelope(self.form.whole_object, list(choices)), "usage": self.usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, one for each piece of text, once the answers began."""
        form, pieces = self.form, asyncio.Queue[tuple[int, Piece | Exception]]()

        async def follow(index: int) -> None:
            try:
                async for piece in self.answers[index]:
                    pieces.put_nowait((index, piece))
            except Exception as error:
                pieces.put_nowait((index, error))

        self.tasks = [asyncio.ensure_future(follow(index)) for index in range(len(self.answers))]
        left, complete = len(self.tasks), False
        try:
            for index in range(left):
                if (opening := form.opening(index)) is not None:
                    yield event(form.envelope(form.piece_object, [opening]))
            while left:
                index, piece = await pieces.get()
                if isinstance(piece, Exception):
                    self.metrics.answers.labels("error").inc()
                    yield event(failure(piece)[1])
                    break
                self.note(piece)
                left -= piece.end is not None
                if piece.text or piece.end is not None:
                    yield event(form.envelope(form.piece_object, [form.piece(index, piece.text, piece.end)]))
            else:
                if form.asked.usage:
                    yield event({**form.envelope(form.piece_object, []), "usage": self.usage()})
            complete = True
            yield b"data: [DONE]\n\n"
        finally:
            self.end()
            if not complete:
                self.metrics.answers.labels("gone").inc()


class Events(StreamingResponse):
    """The stream of a run that began, which ends when the response does, whether it was sent or not."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.run = run

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.end()


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


__all__ = ["Chat", "Completion", "Events", "Form", "Prompt", "Run", "failure"]
