"""What every request passes before anything of it is read: who asks, by which name, how much, and for how long it may take to send it.

the key               Authorization: Bearer …, compared in constant time; /health needs none
the host's name       without a key, on the loopback interface: this machine's alone, so that no page in a browser gets here
the kind of a body    application/json: what a form of another site can send without being asked is refused
its size and time     counted as it comes, whatever Content-Length says
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOCAL = ("localhost", "127.0.0.1", "[::1]")


def error_body(reason: str, status: int, code: str | None = None, field: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": reason, "type": kind, "param": field, "code": code}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """key: what a request must bring; None for nothing. body: bytes. seconds: until a body is there. local: see above."""

    key: str | None = None
    body: int = 1 << 20
    seconds: float = 30.0
    local: bool = True


class Guard:
    """ASGI middleware. seen: called with the status of every response."""

    def __init__(self, app: App, limits: Limits, seen: Callable[[int], None]) -> None:
        self.app, self.limits, self.seen = app, limits, seen

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.seen(message["status"])
            await send(message)

        headers = dict(reversed(scope["headers"]))  # the first of a name counts
        refused = self.refusal(scope, headers)
        if refused is not None:
            await answer(counted, *refused)
            return
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            body = await self.body(headers, receive)
            if not isinstance(body, bytes):
                if body is not None:
                    await answer(counted, *body)
                return
            receive = Replay(body, receive)
        await self.app(scope, receive, counted)

    def refusal(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and reason, before the body is looked at."""
        if scope["path"] != "/health" and self.limits.key is not None:
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            right = hmac.compare_digest(key.strip(), self.limits.key.encode())
            if not right or scheme.lower() != b"bearer":
                return 401, "the API key is missing or wrong: send it as 'Authorization: Bearer …'"
        if self.limits.local and self.limits.key is None:
            name = headers.get(b"host", b"").decode("latin-1").lower()
            host = name.rpartition(":")[0] if not name.endswith("]") and ":" in name else name
            if host not in LOCAL:
                return (
                    403,
                    "the Host header names another machine: without an API key the server answers to this machine's names alone",
                )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
            if kind != "application/json":
                return 415, "expected a body of Content-Type application/json"
        return None

    async def body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | tuple[int, str] | None:
        """The whole body; or status and reason; None where the client is gone."""
        said = headers.get(b"content-length", b"0")
        too_large = 413, f"the body is larger than the {self.limits.body} bytes that are taken"
        if not said.isdigit() or len(said) > 15 or int(said) > self.limits.body:
            return too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size > self.limits.body:
                        return too_large
                    parts.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return 408, f"the body was not there within {self.limits.seconds:g} seconds"


class Replay:
    """`receive` of a request whose body was read already."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def answer(send: Send, status: int, reason: str) -> None:
    """An error, after which the connection is closed: what is left of the body is not read."""
    body = json.dumps(error_body(reason, status)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["Guard", "Limits", "error_body"]
