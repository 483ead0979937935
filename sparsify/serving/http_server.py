"""Runs the application: one process, one event loop, steps in a thread of their own.

SIGTERM or Ctrl-C: no request is taken any more, what runs ends (for `grace` seconds at most), then the process does. A second one ends it
at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from sparsify.errors import SparsifyError
from sparsify.serving.engine import Engine
from sparsify.serving.http_limits import App

LAST_WORDS = 5.0
"""Seconds in which answers that were ended are still sent."""


def listening(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises SparsifyError."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, number)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError) as error:
        raise SparsifyError(f"nothing can listen on {host}:{port}: {error}") from error
    return made


def run_server(
    app: App,
    engine: Engine,
    on: socket.socket,
    *,
    grace: float = 30.0,
    connections: int = 512,
    started: Callable[[], Any] | None = None,
) -> None:
    """Serve until a signal. grace: seconds for what runs. connections: open ones at most. started: called when it listens."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=round(grace + LAST_WORDS), timeout_keep_alive=15,
        limit_concurrency=connections, server_header=False, proxy_headers=False, http="h11", ws="none", lifespan="on",
        h11_max_incomplete_event_size=64 << 10, loop="asyncio",
    )  # fmt: skip
    server = Server(config, engine, grace, started)
    before = {}
    if threading.current_thread() is threading.main_thread():
        # uvicorn hands on what it caught, when it is done: to these, which do nothing
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        engine.start()
        server.run(sockets=[on])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        engine.stop(grace=0)
        on.close()
    if not server.started:
        raise SparsifyError("the server could not start; its log says why")


class Server(uvicorn.Server):
    """Says when it listens, and ends requests before their connections: with a whole answer, or with an error that says so."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float, said: Callable[[], Any] | None) -> None:
        super().__init__(config)
        self.engine, self.grace, self.said = engine, grace, said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self.said is not None:
            self.said()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(asyncio.to_thread(self.engine.stop, self.grace))
        await super().shutdown(sockets=sockets)
        await ending


__all__ = ["listening", "run_server"]
