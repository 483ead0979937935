"""A server on the loopback interface, on a free port: in a thread for most tests, as a process of its own for those that end it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import small_folder

import sparsify

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0


class Served:
    """A server that runs. port: on 127.0.0.1."""

    def __init__(self, port: int, engine: Any = None) -> None:
        self.port, self.engine = port, engine
        self.url = f"http://127.0.0.1:{port}"

    def call(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any]:
        """Status and document of one request. body: a document, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method or ("GET" if data is None else "POST"), path, data, {**given, **(headers or {})})
            response = connection.getresponse()
            text = response.read()
            kind = response.getheader("content-type") or ""
            return response.status, json.loads(text) if kind.startswith("application/json") else text.decode()
        finally:
            connection.close()

    def raw(self, data: bytes) -> socket.socket:
        """A connection on which these bytes were sent."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        made.sendall(data)
        return made

    def post(self, path: str, document: Any) -> socket.socket:
        body = json.dumps(document).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.raw(head.encode() + body)

    def until(self, true: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.01)

    def idle(self) -> None:
        """Until nothing runs and nothing is held."""
        engine = self.engine
        self.until(lambda: engine.inside == 0 and not engine.manager.tickets and engine.handle.status()["held"] == 0)


@contextmanager
def serving(
    model: Any,
    folder: Path | None = None,
    *,
    slots: int = 3,
    key: str | None = None,
    base: str = "base",
    **options: Any,
) -> Iterator[Served]:
    """A server of this process. options: of `Engine`, and `limits` of `Limits`, `answer` for the longest."""
    import uvicorn

    from sparsify.serving.engine import Engine
    from sparsify.serving.http_app import make_app
    from sparsify.serving.http_limits import Limits
    from sparsify.serving.http_server import listening
    from sparsify.serving.served_adapters import ServedAdapters

    limits, answer = options.pop("limits", {}), options.pop("answer", None)
    host: Any = sparsify.serve(model, folder=folder, slots=slots, budget="1MiB")
    engine = Engine(host, small_folder.tokenizer(), **{"cache_tokens": 1024, "timeout": 20.0, **options})
    app = make_app(
        engine, ServedAdapters(engine.handle, base, folder), Limits(key=key, **limits), longest_answer=answer
    )
    made = listening("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", access_log=False, http="h11", ws="none", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [made]}, daemon=True)
    thread.start()
    found = Served(made.getsockname()[1], engine)
    try:
        found.until(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        yield found
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        engine.stop(grace=5)
        made.close()


def process_environment() -> dict[str, str]:
    """For a process that finds what this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}


class Process:
    """`sparsify serve` as a process. said: what it wrote on stderr so far."""

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        command = [sys.executable, "-m", "sparsify.cli", "serve", *map(str, arguments), "--port", "0"]
        own = {**process_environment(), **environment}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=own, text=True, cwd=ROOT
        )
        self.said = ""

    def begin(self) -> Served:
        """Until it listens."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if "serving " in line and "http://" in line:
                return Served(int(line.partition("http://127.0.0.1:")[2].partition("/")[0]))
        raise AssertionError(f"the server did not start: {self.said}")

    def end(self) -> int:
        """Until it ended, by itself or in the end by force; its exit code."""
        try:
            _, rest = self.process.communicate(timeout=PATIENCE)
            self.said += rest
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode


@contextmanager
def process(*arguments: str | Path, **environment: str) -> Iterator[Process]:
    made = Process(*arguments, **environment)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.communicate()
