"""`sparsify serve` as a process: what it says, how it ends, and what is left when it is killed."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import served
from typer.testing import CliRunner

from sparsify.cli import app

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")

import http_server

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
#: of the process started in the tests below: long enough to meet a signal on its way
SLOW: dict[str, Any] = {"prompt": "the cat sat", "max_tokens": 2000, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write(tmp_path_factory.mktemp("served"), max_position_embeddings=4096)


def asked(at: http_server.Served, found: list[Any], **document: Any) -> threading.Thread:
    """A request in a thread of its own; its answer is put into `found`."""

    def ask() -> None:
        try:
            found.append(at.call("/v1/completions", {**SLOW, **document}))
        except (OSError, http.client.HTTPException) as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def until_running(at: http_server.Served, count: int) -> None:
    at.until(lambda: f"\nsparsify_requests {count}.0\n" in at.call("/metrics")[1])


@pytest.mark.slow  # api/test_serving_engine.py: the end waits for what runs
def test_a_signal_lets_what_runs_end(given: Path) -> None:
    adapter = f"mine={given / 'adapters' / 'lora'}"
    with http_server.process(
        given / "model", "-a", adapter, "--adapter-dir", given / "adapters", "--served-model-name", "base"
    ) as made:
        at = made.begin()
        assert "serving base and 5 adapters on http://127.0.0.1:" in made.said
        assert [card["id"] for card in at.call("/v1/models")[1]["data"]] == [
            "base",
            "lora",
            "mine",
            "paca",
            "rosa",
            "s2ft",
        ]
        answers: list[Any] = []
        threads = [
            asked(at, answers, model=name, max_tokens=300, stream=stream)
            for name, stream in (("mine", False), ("paca", True))
        ]
        until_running(at, 2)
        made.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert made.end() == 0, made.said
    assert sorted(status for status, _ in answers) == [200, 200]
    (whole,) = [document for _, document in answers if isinstance(document, dict)]
    (stream,) = [text for _, text in answers if isinstance(text, str)]
    assert whole["usage"]["completion_tokens"] == 300
    assert stream.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in stream
    assert "Traceback" not in made.said
    with pytest.raises(OSError):
        at.call("/health")


@pytest.mark.slow  # api/test_http_server.py: clients that vanish, streams that fail
def test_killed_and_started_again_it_serves_the_same(given: Path) -> None:
    texts = []
    for how in (signal.SIGKILL, signal.SIGINT):
        with http_server.process(given / "model", "--adapter-dir", given / "adapters", "--grace", "1") as made:
            at = made.begin()
            texts.append(
                at.call("/v1/completions", {**SLOW, "model": "rosa", "max_tokens": 20})[1]["choices"][0]["text"]
            )
            answers: list[Any] = []
            threads = [asked(at, answers, model="rosa", max_tokens=4000, stream=stream) for stream in (False, True)]
            until_running(at, 2)
            began = time.monotonic()
            made.process.send_signal(how)
            code = made.end()
            for thread in threads:
                thread.join(60)
            assert time.monotonic() - began < 40
            if how == signal.SIGKILL:
                assert code == -signal.SIGKILL
                assert all(isinstance(answer, OSError | http.client.HTTPException) for answer in answers)
                continue
            assert code == 0, made.said
            said = {status: document for status, document in answers}
            assert said[503]["error"]["message"] == "the server is stopping"
            *_, error, end = [event for event in said[200].split("\n\n") if event]
            assert (end, "the server is stopping" in error) == ("data: [DONE]", True)
    assert texts[0] == texts[1] != ""


@pytest.mark.slow  # the log is the only file that is written
def test_a_full_disk_under_its_log_does_not_stop_it(given: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sparsify.cli", "serve", str(given / "model"), "--port", str(port)]
        made = subprocess.Popen(
            command, stderr=full, stdout=full, cwd=http_server.ROOT, env=http_server.process_environment()
        )
        try:
            at = http_server.Served(port)

            def answers() -> bool:
                assert made.poll() is None
                try:
                    return at.call("/health")[0] == 200
                except OSError:
                    return False

            at.until(answers)
            assert at.call("/v1/completions", {**SLOW, "model": "model", "max_tokens": 5})[0] == 200
            assert at.call("/v1/completions", {"model": "nobody"})[0] == 400
            made.send_signal(signal.SIGTERM)
            assert made.wait(60) == 0
        finally:
            made.kill()
            made.wait(60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        (["MODEL", "-a", "a/b=ADAPTER"], "'a/b' cannot be a name here"),
        (["MODEL", "-a", "model=ADAPTER"], "would both be called 'model': give --served-model-name"),
        (["MODEL", "--adapter-dir", "ADAPTERS", "--served-model-name", "lora"], "would both be called 'lora'"),
        (["MODEL", "-a", "x=ADAPTER", "-a", "x=ADAPTER"], "two adapters would be called 'x'"),
        (["MODEL", "-a", "x=MODEL"], "holds no adapter"),
        (["MODEL", "--adapter-dir", "nowhere"], "is no folder on this machine"),
        (["MODEL", "--api-key", " "], "the key is empty"),
        (["MODEL", "--budget", "lots"], "budget"),
        (["MODEL", "--max-body", "-3"], "--max-body"),
        (["MODEL", "--port", "70000"], "'--port'"),
        (["MODEL", "--slots", "0"], "'--slots'"),
        (["MODEL", "--max-tokens", "0"], "'--max-tokens'"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_served(given: Path, arguments: list[str], words: str) -> None:
    places = {
        "MODEL": str(given / "model"),
        "ADAPTER": str(given / "adapters" / "lora"),
        "ADAPTERS": str(given / "adapters"),
    }
    done = RUNNER.invoke(app, ["serve", *("=".join(places.get(p, p) for p in word.split("=")) for word in arguments)])
    assert done.exit_code == 2, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line


def test_a_port_that_is_taken(given: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = RUNNER.invoke(app, ["serve", str(given / "model"), "--port", str(taken.getsockname()[1])])
    assert done.exit_code == 2
    assert "nothing can listen on 127.0.0.1:" in done.stderr


def test_without_the_extra_it_says_what_to_install(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("sparsify.serving.http_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = RUNNER.invoke(app, ["serve", str(given / "model")])
    assert done.exit_code == 1
    assert "pip install 'sparsify-compiler[serve]'" in done.stderr
