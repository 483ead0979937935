"""Every field of a request is honoured or refused with a sentence that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.serving.http_requests import IGNORED, UNUSED, RequestError, body_object, read_chat, read_completion
from sparsify.serving.sampling import Sampling

PROMPT = {"model": "m", "prompt": "the cat"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_what_is_asked_arrives() -> None:
    asked = read_completion(
        {**PROMPT, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "presence_penalty": 1, "frequency_penalty": -1, "seed": 3,
         "logit_bias": {"7": -100}, "stop": ["a", "b"], "ignore_eos": True, "n": 2, "stream": True, "stream_options": {"include_usage": True}}, 64,
    )  # fmt: skip
    assert asked.sampling == Sampling(
        tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        presence=1,
        frequency=-1,
        seed=3,
        bias={7: -100.0},
        stop=("a", "b"),
        endless=True,
    )
    assert (asked.count, asked.stream, asked.usage, asked.prompts) == (2, True, True, ["the cat"])
    assert read_completion(PROMPT, 64).sampling == Sampling(tokens=16)
    assert read_chat(CHAT, 64).sampling == Sampling(tokens=64)
    assert not read_chat(CHAT, 64).bounded
    assert read_chat({**CHAT, "max_tokens": 3}, 64).bounded
    assert read_chat({**CHAT, "max_tokens": 3, "max_completion_tokens": 9}, 64).sampling.tokens == 9
    assert read_completion({**PROMPT, "temperature": None, "stop": None, "seed": None}, 64).sampling == Sampling(
        tokens=16
    )


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [3]], ["a", [3]]),
    ],
)
def test_prompts_of_every_kind(prompt: Any, found: Any) -> None:
    assert read_completion({**PROMPT, "prompt": prompt}, 64).prompts == found


def test_messages_are_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": "", "tool_calls": []},
    ]
    assert read_chat({**CHAT, "messages": messages}, 64).messages == [
        {"role": "system", "content": "x"}, {"role": "user", "content": "ab"}, {"role": "assistant", "content": ""},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", None, "'model' is missing"), ("model", "", "'model': expected the name"), ("model", 3, "'model': expected"),
        ("model", "m" * 257, "'model': expected"), ("prompt", None, "'prompt' is missing"), ("prompt", "", "none of them empty"),
        ("prompt", [], "'prompt': expected"), ("prompt", [[]], "none of them empty"), ("prompt", [1, "a"], "'prompt': expected"),
        ("prompt", [-1], "'prompt': expected"), ("prompt", [True], "'prompt': expected"), ("prompt", {}, "'prompt': expected"),
        ("max_tokens", 0, "from 1 to 64"), ("max_tokens", 65, "from 1 to 64"), ("max_tokens", 1.0, "whole number"), ("max_tokens", True, "whole"),
        ("temperature", -0.1, "from 0 to 2"), ("temperature", 2.1, "from 0 to 2"), ("temperature", "1", "from 0 to 2"), ("top_p", 0, "above 0"),
        ("top_p", 1.1, "at most 1"), ("top_k", -2, "whole number"), ("n", 0, "from 1 to 16"), ("n", 17, "from 1 to 16"), ("seed", 1 << 64, "64 bits"),
        ("seed", 0.5, "64 bits"), ("stop", [""], "1 to 256"), ("stop", ["a"] * 17, "at most 16"), ("stop", "x" * 257, "1 to 256"), ("stop", 3, "a text"),
        ("stream", "yes", "true or false"), ("stream_options", {"x": 1}, "include_usage"), ("stream_options", {"include_usage": 1}, "include_usage"),
        ("logit_bias", {"a": 1}, "ids of tokens"), ("logit_bias", {"1": 101}, "-100 to 100"), ("logit_bias", {"²": 1}, "ids of tokens"),
        ("logit_bias", [1], "an object"), ("presence_penalty", 3, "from -2 to 2"), ("ignore_eos", 1, "true or false"),
        ("logprobs", 3, "'logprobs': not offered"), ("logprobs", True, "not offered"), ("echo", True, "not offered"), ("best_of", 2, "not offered"),
        ("suffix", "x", "not offered"), ("best_of", True, "not offered"), ("temprature", 1, "'temprature': not a field"), ("x" * 5000, 1, "not a field"),
    ],
)  # fmt: skip
def test_what_is_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError, match="^.{0,300}$") as refused:
        read_completion({**PROMPT, field: value}, 64)
    assert words in str(refused.value)
    assert refused.value.status == 400
    assert refused.value.field is None or field.startswith(refused.value.field.rstrip("…"))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "a list of messages"), ([], "a list of messages"), (["a"], "objects with a 'role'"), ([{"role": "user"}], "that is text"),
        ([{"role": "user", "content": None}], "that is text"), ([{"role": "tool", "content": "x"}], "a role 'tool'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}], "only parts of text"),
        ([{"role": "user", "content": []}], "only parts of text"), ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "'tool_calls' is not offered"),
        ([{"content": "x"}], "objects with a 'role'"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(messages: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_chat({**CHAT, "messages": messages}, 64)
    assert words in str(refused.value)


def test_what_asks_for_nothing_is_taken() -> None:
    for name, values in UNUSED.items():
        for value in values:
            read_chat({**CHAT, name: value}, 64)
        with pytest.raises(RequestError, match=f"'{name}': not offered"):
            read_chat({**CHAT, name: {"unheard": "of"}}, 64)
    read_chat({**CHAT, **{name: {"any": "thing"} for name in IGNORED}}, 64)
    with pytest.raises(RequestError, match="2 answers to each of 9 prompts are more than 16"):
        read_completion({**PROMPT, "prompt": ["a"] * 9, "n": 2}, 64)


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 5000, b'{"a": 1e999}',
     b'{"a": "\\ud800"}', b"1" * 10_000],
)  # fmt: skip
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(RequestError, match="the body"):
        body_object(body)


@given(st.dictionaries(st.sampled_from(["model", "prompt", "messages", "max_tokens", "stop", "n", "logit_bias", "stream_options", "seed"]),
                       st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)))  # fmt: skip
def test_nothing_but_a_request_error_comes_of_anything(document: dict[str, Any]) -> None:
    for read in (read_completion, read_chat):
        try:
            found = read({**document, "model": "m"}, 64)
        except RequestError:
            continue
        assert 1 <= found.sampling.tokens <= 64
        json.dumps(found.prompts or found.messages)
