"""The server on loopback: OpenAI's own client, strangers without manners, and clients that go away."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
from served import NAMES, alone

import sparsify

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")

import http_server
import small_folder
from http_server import Served

TOKENIZER = small_folder.tokenizer()
PROMPT = "the cat sat on a mat"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
SLOW: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 50, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(given: Path) -> Iterator[Served]:
    with http_server.serving(served.model_of(given), given / "adapters") as made:
        yield made


@pytest.fixture(scope="module")
def wanted(given: Path) -> dict[str, str]:
    """What the base and each adapter write after the prompt; and, as "name chat", after it as a user's message."""
    host: Any = sparsify.serve(served.model_of(given), folder=given / "adapters", slots=4, budget="1MiB")
    found = {}
    chat = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    for name, label in zip(NAMES, ("base", *NAMES[1:]), strict=True):
        for ids, end in (
            (TOKENIZER(PROMPT)["input_ids"], ""),
            (TOKENIZER(chat, add_special_tokens=False)["input_ids"], " chat"),
        ):
            found[label + end] = TOKENIZER.decode(alone(host, name, ids, 10, endless=False), skip_special_tokens=True)
    assert len(set(found.values())) == len(found)
    return found


def complete(at: Served, model: str = "base", **more: Any) -> tuple[int, Any]:
    return at.call("/v1/completions", {"model": model, "prompt": PROMPT, **GREEDY, **more})


def reason(answer: tuple[int, Any]) -> tuple[int, str]:
    """Status and sentence of an error, which has OpenAI's form."""
    status, document = answer
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return status, document["error"]["message"]


# --- OpenAI's client ---


def test_openai_s_client(server: Served, wanted: dict[str, str]) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == ["base", "lora", "paca", "rosa", "s2ft"]
        assert client.models.retrieve("lora").id == "lora"
        for name in ("base", *NAMES[1:]):
            whole = client.completions.create(model=name, prompt=PROMPT, **GREEDY)
            assert whole.choices[0].text == wanted[name]
            assert whole.usage.prompt_tokens == 7
            messages: Any = [{"role": "user", "content": PROMPT}]
            chat = client.chat.completions.create(model=name, messages=messages, **GREEDY)
            assert chat.choices[0].message.content == wanted[f"{name} chat"]
            assert chat.choices[0].finish_reason in ("stop", "length")
            pieces = list(client.completions.create(model=name, prompt=PROMPT, stream=True, **GREEDY))
            assert "".join(piece.choices[0].text for piece in pieces) == wanted[name]
            assert [p.choices[0].finish_reason for p in pieces][-1] in ("stop", "length")
            stream = client.chat.completions.create(
                model=name, messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
            )
            *texts, usage = list(stream)
            assert "".join(piece.choices[0].delta.content or "" for piece in texts) == wanted[f"{name} chat"]
            assert texts[0].choices[0].delta.role == "assistant"
            assert usage.usage.completion_tokens == chat.usage.completion_tokens
        several = client.completions.create(model="lora", prompt=[PROMPT, "a rose"], n=2, **GREEDY)
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
        assert several.choices[0].text == several.choices[1].text == wanted["lora"]
        assert several.choices[2].text == several.choices[3].text != wanted["lora"]
        drawn = [
            client.completions.create(model="lora", prompt=PROMPT, temperature=1.5, seed=5, n=3, max_tokens=9).choices
            for _ in range(2)
        ]
        assert [c.text for c in drawn[0]] == [c.text for c in drawn[1]]
        assert len({c.text for c in drawn[0]}) > 1
        with pytest.raises(openai.NotFoundError, match="no model is called 'nobody'"):
            client.completions.create(model="nobody", prompt=PROMPT)
        with pytest.raises(openai.BadRequestError, match="'logprobs': not offered here"):
            client.completions.create(model="base", prompt=PROMPT, logprobs=2)
        with client.completions.create(
            model="lora", prompt=PROMPT, stream=True, max_tokens=50, extra_body={"ignore_eos": True}
        ) as leaving:
            next(iter(leaving))
    server.idle()


def test_the_words_of_a_chat_that_cannot_be(server: Served) -> None:
    assert reason(server.call("/v1/chat/completions", {"model": "base", "messages": []})) == (
        400,
        "'messages': expected a list of messages, got []",
    )
    long = [{"role": "user", "content": "the " * 70}]
    status, said = reason(server.call("/v1/chat/completions", {"model": "base", "messages": long}))
    assert status == 400
    assert "prompt and answer together at most 64" in said
    status, said = reason(
        server.call(
            "/v1/chat/completions",
            {"model": "base", "messages": [{"role": "user", "content": "the"}], "max_tokens": 64},
        )
    )
    assert (status, "are more than 64 together" in said) == (400, True)
    assert (
        server.call("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "the"}]})[0]
        == 200
    )


@pytest.mark.slow  # the same on the engine: test_serving_engine.py, equal prompts under many adapters
def test_load_of_mixed_adapters_loses_nothing_and_mixes_nothing_up(given: Path) -> None:
    host: Any = sparsify.serve(served.model_of(given), folder=given / "adapters", slots=4, budget="1MiB")
    prompts = [[1, *(6 + (3 * row + n) % 17 for n in range(3 + 5 * row))] for row in range(6)]
    names = dict(zip(("base", *NAMES[1:]), NAMES, strict=True))
    alone_ids = {
        (label, row): alone(host, names[label], prompts[row], 12) for label in names for row in range(len(prompts))
    }
    expected = {key: TOKENIZER.decode(ids, skip_special_tokens=True) for key, ids in alone_ids.items()}
    asked = [
        (label, row, stream)
        for _ in range(6)
        for label in names
        for row in range(len(prompts))
        for stream in (False, True)
    ]
    found: list[tuple[str, int, str]] = []
    with http_server.serving(served.model_of(given), given / "adapters", slots=2, queue=24) as made:

        def ask(mine: list[tuple[str, int, bool]]) -> None:
            for label, row, stream in mine:
                document = {
                    "model": label,
                    "prompt": prompts[row],
                    "max_tokens": 12,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": stream,
                }
                status, answer = made.call("/v1/completions", document)
                assert status == 200, answer
                if stream:
                    events = [json.loads(line[6:]) for line in answer.split("\n\n") if line.startswith("data: {")]
                    assert answer.endswith("data: [DONE]\n\n")
                    found.append((label, row, "".join(event["choices"][0]["text"] for event in events)))
                else:
                    found.append((label, row, answer["choices"][0]["text"]))

        threads = [threading.Thread(target=ask, args=(asked[number::20],)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.idle()
    assert len(found) == len(asked) == 360
    assert [(label, row) for label, row, text in found if text != expected[label, row]] == []


# --- adapters that come and go ---


def test_adapters_are_loaded_and_unloaded(given: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(given / "adapters" / "lora", folder / "deep" / "one")
    shutil.copytree(given / "adapters" / "paca", folder / "two")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "adapter.safetensors").write_bytes(b"\0" * 100)
    with http_server.serving(served.model_of(given), folder) as made:
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        assert made.call(load, {"lora_name": "one", "lora_path": "deep/one"})[0] == 200
        assert complete(made, "one")[1]["choices"][0]["text"] == wanted["lora"]
        assert reason(made.call(load, {"lora_name": "one", "lora_path": "two"})) == (
            400, "an adapter is called 'one' already; unload it first, or give load_inplace",
        )  # fmt: skip
        assert made.call(load, {"lora_name": "one", "lora_path": str(folder / "two"), "load_inplace": True})[0] == 200
        assert complete(made, "one")[1]["choices"][0]["text"] == wanted["paca"]
        again = made.call(load, {"lora_name": "one", "lora_path": "damaged", "load_inplace": True})
        assert again[0] == 400
        assert (
            complete(made, "one")[1]["choices"][0]["text"] == wanted["paca"]
        )  # what cannot be read takes nothing away
        assert [card["id"] for card in made.call("/v1/models")[1]["data"]] == ["base", "damaged", "one", "two"]
        assert made.call(unload, {"lora_name": "one"})[0] == 200
        assert reason(complete(made, "one"))[0] == 404
        assert reason(made.call(unload, {"lora_name": "one"})) == (404, "no adapter is called 'one'")
        assert made.call(unload, {"lora_name": "two"})[0] == 200  # it lies in the folder, and is not served any more
        assert reason(complete(made, "two"))[0] == 404
        assert made.call(load, {"lora_name": "two", "lora_path": "two"})[0] == 200
        assert complete(made, "two")[0] == 200
        status, said = reason(made.call(load, {"lora_name": "bad", "lora_path": "damaged"}))
        assert status == 400
        assert "damaged" in said
        assert str(tmp_path) not in said  # where it lies is nobody's business
        assert reason(complete(made, "bad"))[0] == 404
        status, said = reason(complete(made, "damaged"))
        assert (status, str(tmp_path) in said) == (400, False)
        elsewhere = shutil.copytree(folder / "damaged", tmp_path / "elsewhere")
        made.engine.handle.add("elsewhere", elsewhere)  # as --adapter does
        status, said = reason(complete(made, "elsewhere"))
        assert (status, str(tmp_path) in said, said.startswith("elsewhere/")) == (400, False, True)
        assert complete(made, "base")[1]["choices"][0]["text"] == wanted["base"]


def test_nothing_outside_of_the_folder_is_an_adapter(given: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    outside = shutil.copytree(given / "adapters" / "lora", tmp_path / "outside")
    shutil.copytree(given / "adapters" / "lora", folder / "fine")
    (folder / "link").symlink_to(outside)
    (folder / "inside").mkdir()
    for file in outside.iterdir():
        (folder / "inside" / file.name).symlink_to(file)
    shutil.copytree(given / "adapters" / "lora", folder / "pipe")
    (folder / "pipe" / "adapter.json").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe" / "adapter.json")
    (folder / ".hidden").mkdir()
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    with http_server.serving(served.model_of(given), folder) as made:
        paths = ["../outside", str(outside), "link", "inside", "pipe", "", ".", "/", "/etc", "fine/../../outside", "a\0b", "nowhere", "file", "x" * 5000, "~", "empty",
                 "fine\n", "..", "//", "fine/adapter.safetensors", "\\..\\outside", "%2e%2e/outside", "https://example.com/x"]  # fmt: skip
        for path in paths:
            status, said = reason(made.call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path}))
            assert status == 400, path
            assert len(said) < 300
            if path in ("inside", "pipe"):
                assert "holds files of its own, no links" in said
            assert str(tmp_path) in path or str(tmp_path) not in said  # what was asked for may be said again
        for name in ("", "a/b", "../x", "base", "__base__", "a b", "a\n", "é", ".x", "x" * 129, "-x"):
            assert reason(made.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "fine"}))[0] == 400, name
        for document in (
            {"lora_name": 1, "lora_path": "fine"},
            {"lora_name": "x"},
            {"lora_name": "x", "lora_path": "fine", "y": 1},
            [],
        ):
            assert reason(made.call("/v1/load_lora_adapter", document))[0] == 400
        for name in ("link", "inside/..", "../outside", "__base__", ".hidden", "a\0", "x" * 200):
            assert reason(complete(made, name))[0] == 404, name
        assert [card["id"] for card in made.call("/v1/models")[1]["data"]] == ["base", "fine", "inside", "pipe"]
        assert made.call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "fine"})[0] == 200
    with http_server.serving(served.model_of(given), None) as made:
        status, said = reason(made.call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(outside)}))
        assert (status, said) == (403, "adapters cannot be added: the server was started without --adapter-dir")


# --- strangers ---


def test_the_key(given: Path) -> None:
    with http_server.serving(served.model_of(given), given / "adapters", key="s3cret-é") as made:
        right = {"Authorization": "Bearer s3cret-é".encode().decode("latin-1")}
        assert made.call("/health") == (200, {"status": "ok"})
        for headers in (
            {},
            {"Authorization": "Bearer s3cret"},
            {"Authorization": "Basic s3cret-e"},
            {"Authorization": ""},
            {"authorization": "Bearer " + "x" * 9000},
        ):
            for path in ("/v1/models", "/metrics", "/v1/nothing", "/"):
                status, said = reason(made.call(path, headers=headers))
                assert (status, "API key is missing or wrong" in said) == (401, True)
            assert made.call("/v1/completions", {"model": "base", "prompt": "a"}, headers)[0] == 401
        assert made.call("/v1/models", headers=right)[0] == 200
        assert (
            made.call("/v1/completions", {"model": "base", "prompt": "a"}, {**right, "Host": "anything.example"})[0]
            == 200
        )
        twice = made.raw(
            b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer no\r\nAuthorization: Bearer s3cret-\xc3\xa9\r\nConnection: close\r\n\r\n"
        )
        assert b" 401 " in received(twice)


def test_pages_in_a_browser_cannot_use_a_server_without_a_key(server: Served) -> None:
    assert reason(server.call("/v1/models", headers={"Host": "attacker.example"}))[0] == 403
    assert server.call("/v1/models", headers={"Host": "localhost:1"})[0] == 200
    assert server.call("/v1/models", headers={"Host": "[::1]:80"})[0] == 200
    assert reason(server.call("/v1/models", headers={"Host": "127.0.0.1.attacker.example"}))[0] == 403
    simple = {"Content-Type": "text/plain"}
    assert reason(server.call("/v1/completions", json.dumps({"model": "base", "prompt": "a"}).encode(), simple)) == (
        415, "expected a body of Content-Type application/json",
    )  # fmt: skip
    status, _ = server.call("/v1/completions", headers={"Origin": "http://attacker.example"}, method="OPTIONS")
    assert status == 405


def received(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_bodies_that_are_too_large_or_too_slow(given: Path) -> None:
    with http_server.serving(served.model_of(given), limits={"body": 2000, "seconds": 0.5}) as made:
        assert complete(made)[0] == 200
        status, said = reason(made.call("/v1/completions", {"model": "base", "prompt": "the " * 600}))
        assert (status, said) == (413, "the body is larger than the 2000 bytes that are taken")
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        chunked = made.raw(
            head.encode()
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"400\r\n"
            + b" " * 1024
            + b"\r\n400\r\n"
            + b" " * 1024
            + b"\r\n"
        )
        assert b" 413 " in received(chunked)
        for length, status in (("5000000000", b" 413 "), ("9" * 30, b" 400 "), ("-1", b" 400 "), ("1, 2", b" 400 ")):
            assert status in received(made.raw(f"{head}Content-Length: {length}\r\n\r\n".encode()))
        assert b" 408 " in received(made.raw(f"{head}Content-Length: 100\r\n\r\n{{".encode()))
        assert b" 400 " in received(made.raw(b"GET /" + b"a" * (70 << 10) + b" HTTP/1.1\r\n\r\n"))
        assert b" 400 " in received(made.raw(b"\x16\x03\x01 not http at all\r\n\r\n"))
        made.raw(f"{head}Content-Length: 100\r\n\r\n{{".encode()).close()
        assert complete(made)[0] == 200
        made.idle()


def test_paths_methods_and_json_that_are_none(server: Served) -> None:
    for path in ("/", "/v1", "/v1/completions/", "/docs", "/openapi.json", "/v1/embeddings", "/../etc/passwd", "/%00"):
        assert reason(server.call(path))[0] == 404, path
    for path, method in (("/v1/completions", "GET"), ("/health", "DELETE"), ("/v1/models", "PUT")):
        assert reason(server.call(path, method=method))[0] == 405
    for body in (b"", b"{", b"[]", b"null", b'{"model": "base"}', b"[" * 50_000, b'{"a":1,"a":2}', b"\xff"):
        status, said = reason(server.call("/v1/completions", body, {"Content-Type": "application/json"}))
        assert status == 400, body
        assert len(said) < 300
    for name in (
        "nobody",
        "../lora",
        "lora/../base",
        "\u202elora",
        "base' OR 1=1",
        "<script>",
        "a" * 256,
        "LORA",
        "lora ",
        "%6cora",
    ):
        assert reason(complete(server, name))[0] == 404, name
    assert reason(server.call("/v1/models/..%2f..%2fetc%2fpasswd"))[0] == 404
    assert reason(complete(server, prompt=[10**9])) == (400, "'prompt': 1000000000 is no token; the vocabulary has 24")
    assert reason(complete(server, prompt="the " * 80))[0] == 400
    assert reason(complete(server, max_tokens=60))[0] == 400


def test_tokens_that_the_model_does_not_have_are_refused(given: Path) -> None:
    """A tokenizer may know more than the model: looking one up would end the steps of everybody."""
    with http_server.serving(served.model_of(given)) as made:
        assert made.engine.tokenizer.add_tokens(["<more>"]) == 1
        assert made.engine.vocabulary == len(made.engine.tokenizer) - 1
        chat = {"model": "base", "messages": [{"role": "user", "content": "the <more>"}]}
        for answer in (
            complete(made, prompt="the <more>"),
            complete(made, prompt=[3, 24]),
            made.call("/v1/chat/completions", chat),
            complete(made, logit_bias={"24": 5}),
        ):
            status, said = reason(answer)
            assert status == 400
            assert "24 is no token; the vocabulary has 24" in said
        assert complete(made)[0] == 200


def test_numbers_for_prometheus(server: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def numbers() -> dict[str, float]:
        status, text = server.call("/metrics")
        assert status == 200
        return {
            f"{s.name}{s.labels.get('status', s.labels.get('end', ''))}": s.value
            for f in text_string_to_metric_families(text)
            for s in f.samples
        }

    before = numbers()
    assert complete(server, "lora", max_tokens=3, ignore_eos=True)[0] == 200
    assert complete(server, "nobody")[0] == 404
    after = numbers()
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["sparsify_generated_tokens_total"] == 3
    assert change["sparsify_prompt_tokens_total"] == 7
    assert change["sparsify_http_responses_total404"] == 1
    assert change["sparsify_answers_totallength"] == 1
    assert change["sparsify_request_seconds_count"] == 1
    assert change["sparsify_steps_total"] == 3
    assert after["sparsify_slots"] == 3
    assert after["sparsify_requests"] == after["sparsify_held"] == 0


# --- clients that go away, adapters that go away ---


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_what_it_held(server: Served, stream: bool) -> None:
    before = server.engine.manager.numbers
    connections = [
        server.post("/v1/completions", {"model": name, **SLOW, "stream": stream, "n": 2})
        for name in ("lora", "paca", "base")
    ]
    server.until(lambda: server.engine.manager.numbers == before + 6)
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # gone without a word
        connection.close()
    server.idle()
    assert complete(server, "rosa")[0] == 200


def test_an_adapter_deleted_while_it_is_used(given: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    folder = tmp_path / "adapters"
    for name in ("lora", "paca"):
        shutil.copytree(given / "adapters" / name, folder / name)
    with http_server.serving(served.model_of(given), folder, slots=1) as made:
        running = made.post("/v1/completions", {"model": "lora", "prompt": PROMPT, **GREEDY, "stream": True})
        assert b"200 OK" in running.recv(30)
        shutil.rmtree(folder / "lora")
        body = b"data:" + running.recv(1 << 20).partition(b"data:")[2]
        while b"[DONE]" not in body:
            body += running.recv(1 << 20)
        running.close()
        texts = [
            json.loads(line[6:])["choices"][0]["text"] for line in body.split(b"\n") if line.startswith(b"data: {")
        ]
        assert "".join(texts) == wanted["lora"]
        assert complete(made, "paca")[1]["choices"][0]["text"] == wanted["paca"]  # takes the only slot
        made.engine.handle.remove("lora")  # and nothing keeps it in memory
        assert reason(complete(made, "lora"))[0] == 404
        shutil.rmtree(folder)
        assert made.call("/v1/models")[1]["data"][1:] == [made.call("/v1/models/paca")[1]]
        assert complete(made, "base")[1]["choices"][0]["text"] == wanted["base"]


def test_too_many_requests_are_told_to_come_again(given: Path) -> None:
    with http_server.serving(served.model_of(given), given / "adapters", queue=2, slots=1) as made:
        first = made.post("/v1/completions", {"model": "lora", **SLOW, "stream": True, "n": 2})
        made.until(lambda: made.engine.inside == 2)
        status, said = reason(complete(made))
        assert (status, "as many as may wait" in said) == (503, True)
        status, said = reason(complete(made, n=3))  # it would never come in
        assert (status, "more than this server has places for (2)" in said) == (400, True)
        first.close()
        made.idle()
        assert complete(made)[0] == 200
        answers: list[Any] = []
        with made.engine.handle.lease("lora"):
            waiting = threading.Thread(target=lambda: answers.append(complete(made, "paca")))
            waiting.start()
            made.until(lambda: made.engine.handle.status()["waiting"] == 1)
            made.engine.handle.remove("paca")
            waiting.join(http_server.PATIENCE)
        assert reason(answers[0]) == (404, "'paca' was removed while a request waited for it")
    with http_server.serving(served.model_of(given), given / "adapters", slots=1, timeout=0.1) as made:
        with made.engine.handle.lease("lora"):
            status, said = reason(complete(made, "paca"))
        assert (status, "no slot was free within 0.1 s" in said) == (503, True)
        assert complete(made, "paca")[0] == 200


def test_a_stream_that_fails_says_so_and_ends(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served.model_of(given)
    with http_server.serving(model, given / "adapters") as made:
        calls = []
        real = type(model.model).forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > 3:
                raise ValueError("the weights are gone")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(type(model.model), "forward", forward)
        status, text = made.call("/v1/completions", {"model": "lora", **SLOW, "stream": True})
        assert status == 200
        events = [line for line in text.split("\n\n") if line]
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert (error["type"], "the weights are gone" in error["message"]) == ("server_error", True)
        made.until(lambda: made.call("/health")[0] == 503)
        assert reason(complete(made))[0] == 503
