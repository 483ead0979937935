"""An OpenAI-compatible server over an `Engine`: completions, chats, models, and adapters that come and go.

POST /v1/completions, /v1/chat/completions          `model` is the base's name or an adapter's; "stream": true for server-sent events
GET  /v1/models, /v1/models/{name}                  the base and its adapters
POST /v1/load_lora_adapter, /v1/unload_lora_adapter as vLLM has them; out of the adapter folder alone
GET  /health, /metrics                              200 while steps are made; numbers for Prometheus

Errors are OpenAI's objects with a sentence in `message`. A stream that fails ends with such an object and `[DONE]`: nothing is half-sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sparsify.errors import SparsifyError
from sparsify.files.strict_json import short
from sparsify.serving.engine import Engine
from sparsify.serving.http_answers import Chat, Completion, Events, Form, Prompt, Run, failure
from sparsify.serving.http_limits import Guard, Limits
from sparsify.serving.http_metrics import Metrics
from sparsify.serving.http_requests import Asked, RequestError, body_object, read_chat, read_completion
from sparsify.serving.served_adapters import ServedAdapters

RETRY = {"Retry-After": "1"}


class Gone(Exception):
    """The client went away."""


def make_app(engine: Engine, served: ServedAdapters, limits: Limits, *, longest_answer: int | None = None) -> Guard:
    """The application. longest_answer: tokens that a request may ask for; None: as many as there are positions.

    The engine is started when the application starts, and stopped by whoever runs it.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.start)
        yield

    app = FastAPI(
        title="sparsify", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    metrics = Metrics(engine)
    Routes(app, engine, served, metrics, longest_answer or engine.longest)
    return Guard(app, limits, lambda status: metrics.responses.labels(str(status)).inc())


class Routes:
    """The handlers of one application."""

    def __init__(self, app: FastAPI, engine: Engine, served: ServedAdapters, metrics: Metrics, longest: int) -> None:
        self.engine, self.served, self.metrics, self.longest = engine, served, metrics, min(longest, engine.longest)
        self.began = int(time.time())
        app.add_exception_handler(Exception, self.failure)
        for kind in (SparsifyError, HTTPException):
            app.add_exception_handler(kind, self.failure)
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
        }
        gets = {
            "/health": self.health,
            "/metrics": self.numbers,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.one_model,
        }
        for path, handler in posts.items():
            app.add_api_route(path, handler, methods=["POST"], response_model=None)
        for path, handler in gets.items():
            app.add_api_route(path, handler, methods=["GET"], response_model=None)

    async def failure(self, _: Request, error: Exception) -> Response:
        status, body = failure(error)
        body["error"]["message"] = self.served.without_paths(body["error"]["message"])
        return JSONResponse(body, status, headers=RETRY if status == 503 else None)

    # --- looking -----------------------------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "not serving"}, 200 if alive else 503)

    async def numbers(self, _: Request) -> Response:
        return Response(
            await asyncio.to_thread(self.metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def card(self, name: str) -> dict[str, Any]:
        of = None if name == self.served.base else self.served.base
        return {
            "id": name, "object": "model", "created": self.began, "owned_by": "sparsify", "root": of or name, "parent": of,
            "max_model_len": self.engine.longest,
        }  # fmt: skip

    async def models(self, _: Request) -> Response:
        names = await asyncio.to_thread(lambda: self.served.names)
        return JSONResponse({"object": "list", "data": [self.card(name) for name in (self.served.base, *names)]})

    async def one_model(self, name: str) -> Response:
        await asyncio.to_thread(self.served.find, name)
        return JSONResponse(self.card(name))

    # --- adapters ----------------------------------------------------------------------------------------------------------------

    async def load(self, request: Request) -> Response:
        given = body_object(await request.body())
        name, path, again = given.pop("lora_name", None), given.pop("lora_path", None), given.pop("load_inplace", False)
        if not isinstance(name, str) or not isinstance(path, str) or not isinstance(again, bool) or given:
            raise RequestError("expected 'lora_name' and 'lora_path', which are texts, and at most 'load_inplace'")
        loop = asyncio.get_running_loop()  # not among the threads that requests for text need: a disk may be slow
        await loop.run_in_executor(self.engine.waiters, self.served.add, name, path, again)
        return JSONResponse({"status": "ok", "message": f"{name} is served"})

    async def unload(self, request: Request) -> Response:
        given = body_object(await request.body())
        name = given.pop("lora_name", None)
        given.pop("lora_int_id", None)
        if not isinstance(name, str) or given:
            raise RequestError("expected 'lora_name', which is a text")
        await asyncio.to_thread(self.served.remove, name)
        return JSONResponse({"status": "ok", "message": f"{name} is not served any more"})

    # --- text --------------------------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self.text(request, Completion(read_completion(body_object(await request.body()), self.longest)))

    async def chat(self, request: Request) -> Response:
        return await self.text(request, Chat(read_chat(body_object(await request.body()), self.longest)))

    async def text(self, request: Request, form: Form) -> Response:
        began = time.monotonic()
        form.adapter = await asyncio.to_thread(self.served.find, form.asked.model)
        count = form.asked.count * len(form.asked.prompts or [""])
        if count > self.engine.queue:  # it would be told to come again for ever
            raise RequestError(
                f"{count} answers at once are more than this server has places for ({self.engine.queue})"
            )
        prompts = await asyncio.to_thread(self.prompts, form.asked)
        self.metrics.prompt.inc(sum(len(p.ids) for p in prompts[:: form.asked.count]))
        run = Run(self.engine, self.metrics, form, prompts, began)
        try:
            await watched(request, run.begin())  # what cannot begin is an answer with a status, not a stream
            if form.asked.stream:
                return Events(run)
            return JSONResponse(await watched(request, run.whole()))
        except Gone:
            run.end()
            self.metrics.answers.labels("gone").inc()
            return Response(status_code=499)
        except BaseException:
            run.end()
            raise

    def prompts(self, asked: Asked) -> list[Prompt]:
        """Tokens of every prompt, checked; `n` times each, with seeds of their own. Raises RequestError."""
        found = []
        for token in asked.sampling.bias:
            if token >= self.engine.vocabulary:
                raise RequestError(
                    f"'logit_bias': {token} is no token; the vocabulary has {self.engine.vocabulary}",
                    field="logit_bias",
                )
        for ids in self.encoded(asked):
            if ids and max(ids) >= self.engine.vocabulary:  # a tokenizer may know more tokens than the model was given
                raise RequestError(
                    f"'prompt': {max(ids)} is no token; the vocabulary has {self.engine.vocabulary}", field="prompt"
                )
            room = self.engine.longest - len(ids)
            if not ids or room < 1:
                raise RequestError(
                    f"the prompt has {len(ids)} tokens, and prompt and answer together at most {self.engine.longest}",
                    code="context_length_exceeded",
                )
            if asked.bounded and asked.sampling.tokens > room:
                raise RequestError(
                    f"'max_tokens': {len(ids)} tokens of the prompt and {asked.sampling.tokens} of the answer are more than "
                    f"{self.engine.longest} together", code="context_length_exceeded", field="max_tokens",
                )  # fmt: skip
            for number in range(asked.count):
                seed = asked.sampling.seed
                own = replace(
                    asked.sampling,
                    tokens=min(asked.sampling.tokens, room),
                    seed=None if seed is None else seed + number,
                )
                found.append(Prompt(ids, own))
        return found

    def encoded(self, asked: Asked) -> list[list[int]]:
        tokenizer = self.engine.tokenizer
        if asked.messages is not None:
            if getattr(tokenizer, "chat_template", None) is None:
                raise RequestError("the model's tokenizer has no chat template: use /v1/completions", field="messages")
            try:
                text = tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template raises what it likes at an order of roles that it does not want
                raise RequestError(
                    f"'messages': the model's chat template refuses them: {short(str(error), 200)}", field="messages"
                ) from error
            return [tokenizer(text, add_special_tokens=False)["input_ids"]]
        found = []
        for prompt in asked.prompts or []:
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            found.append(list(ids))
        return found


async def watched(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which ends at once when the client goes away. Raises Gone then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


__all__ = ["make_app"]
