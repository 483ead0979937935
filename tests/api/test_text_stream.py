"""Text in pieces is the text: spaces, characters of several tokens, special tokens, and stops wherever they fall."""

from __future__ import annotations

from typing import Any

import pytest
import small_folder
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sparsify.serving.text_stream import LONGEST, TextStream


class Bytes:
    """A tokenizer of bytes; 256 is a special token."""

    all_special_ids = (256,)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def pieces(tokenizer: Any, ids: list[int], stops: list[str] | None = None) -> tuple[list[str], bool]:
    stream, said = TextStream(tokenizer, stops or ()), []
    for token in ids:
        said.append(stream.push([token]))
        if stream.stopped:
            return said, True
    said.append(stream.finish())
    return said, stream.stopped


@given(st.text(max_size=30), st.lists(st.integers(0, 40), max_size=4))
def test_the_pieces_are_the_text(text: str, marks: list[int]) -> None:
    ids = list(text.encode())
    for place in marks:
        ids.insert(min(place, len(ids)), 256)
    said, stopped = pieces(Bytes(), ids)
    assert "".join(said) == text
    assert not stopped
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in said) or "\N{REPLACEMENT CHARACTER}" in text


@given(st.text("abc\n", max_size=24), st.lists(st.text("abc\n", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_ends_the_text_before_it(text: str, stops: list[str]) -> None:
    said, stopped = pieces(Bytes(), list(text.encode()), stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert ("".join(said), stopped) == (text, False)
        return
    assert stopped
    # tokens come one by one: the stop that is complete first counts, the longest of those that are complete together
    first = next(n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops))
    assert "".join(said) == text[: min(text[:first].find(stop) for stop in stops if stop in text[:first])]
    assert not any(stop in "".join(said) for stop in stops)


def test_what_may_become_a_stop_waits() -> None:
    stream = TextStream(Bytes(), ["\n\n", "END"])
    assert [stream.push([b]) for b in b"a\nbEN"] == ["a", "", "\nb", "", ""]
    assert stream.push(b"X") == "ENX"
    assert stream.push(b"E") == ""
    assert stream.finish() == "E"
    assert [stream.push([b]) for b in b"\n\nmore"][-1] == ""
    assert stream.stopped


def test_bytes_that_are_no_character_do_not_wait_for_ever() -> None:
    stream = TextStream(Bytes())
    assert "".join(stream.push([0x80]) for _ in range(LONGEST))
    assert stream.push(b"a").endswith("a")


def test_spaces_between_words_and_after_special_tokens() -> None:
    tokenizer = small_folder.tokenizer()
    ids = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    said, _ = pieces(tokenizer, [ids[0], end, end, *ids[1:]])
    assert "".join(said) == tokenizer.decode([ids[0], end, end, *ids[1:]], skip_special_tokens=True) == "the cat sat"


@pytest.mark.parametrize("text", ["Hello  world", "naïve 你好 🙂!", " leading"])
def test_tokens_of_sentencepiece_with_bytes(text: str) -> None:
    words = {"▁Hello": 0, "▁": 1, "▁world": 2, "▁na": 3, "ve": 4, "!": 5, "▁leading": 6, "▁▁world": 7}
    words |= {f"<0x{b:02X}>": 10 + b for b in range(256)}
    made: Any = Tokenizer(models.WordLevel(words, unk_token="!"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )

    class Wrapped:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            return made.decode(ids, skip_special_tokens=skip_special_tokens)

    ids: list[int] = []
    rest = "▁" + text.replace(" ", "▁")
    while rest:
        word = max((w for w in words if rest.startswith(w)), key=len, default=None)
        if word is None:
            ids += [10 + b for b in rest[0].encode()]
            rest = rest[1:]
        else:
            ids.append(words[word])
            rest = rest[len(word) :]
    said, _ = pieces(Wrapped(), ids)
    assert "".join(said) == made.decode(ids) == text
