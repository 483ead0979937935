"""Patterns over names: the same answers as Python's `re`, in time that does not explode; globs, bare names and what is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.plan.name_patterns import Budget, PatternError, Regex, check_pattern, matches

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "(a|b)", "(?:ab|c)", "(?=a)", "(?!b)", "^", "$", r"\b", r"\B", "1", r"[\d\-x]",
         "(a*)", "(a+b)?", r"\-", r"[^\w.]", "(?:|a)"]  # fmt: skip
QUANTIFIERS = ["", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "*?", "{2,}"]


@st.composite
def expressions(draw: st.DrawFn) -> str:
    atoms = draw(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5))
    text = "".join(
        a
        if a.startswith(("(?=", "(?!", "^", "$", r"\b", r"\B")) or (a[-1] in "?*")
        else a + draw(st.sampled_from(QUANTIFIERS))
        for a in atoms
    )
    return text + draw(st.sampled_from(["", "", "|a", "|"]))


@settings(max_examples=300)
@given(expressions(), st.lists(st.text("ab.1-x_\n", min_size=1, max_size=7), min_size=1, max_size=6))
def test_answers_are_those_of_re(text, names):
    ours, theirs = Regex(text), re.compile(text)
    for name in names:
        assert ours.match(name) == bool(theirs.match(name)), name
        assert ours.fullmatch(name) == bool(theirs.fullmatch(name)), name


EXPLODING = [r"((\w|\.)+)+X", "(a?){60}(a){60}", r"(.*)*(.*)*(.*)*!", r"(a|a)*b", r"(?!(a+)+b)(a|aa)+c", r"([a-z]+)*\d"]


@pytest.mark.parametrize("text", EXPLODING)
def test_time_is_linear_where_re_takes_ages(text):
    began = time.monotonic()
    Regex(text).fullmatch("a" * 300)
    assert time.monotonic() - began < 30  # re would need 2^300 steps


REFUSED = [
    (r"(.)\1", "back-reference"), ("(?P=n)", "not supported"), ("(?<=a)b", "look-behind"), ("(?i)a", "flags"), ("(?>a)", "atomic"),
    ("a++", "possessive"), ("(", "unbalanced"), (")", "unbalanced"), ("[a", "unclosed"), ("a\\", "backslash"), ("*a", "nothing to repeat"),
    ("a**", "two quantifiers"), ("[b-a]", "bad range"), ("a{2,1}", "more often"), ("^*", "assertion"), (r"\x41", "escape"),
    ("(?P<n>a)(?P<n>b)", "twice"), ("((a{99}){99}){99}", "too large"), ("a{6000}", "more than"), ("(" * 60 + ")" * 60, "deeper"),
    ("a" * 2001, "characters"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "word"), REFUSED, ids=[w for _, w in REFUSED])
def test_what_cannot_be_matched_so_is_refused_by_name(text, word):
    with pytest.raises(PatternError, match=word):
        Regex(text)


def test_a_budget_ends():
    regex = Regex(".*.*x", Budget(1000))
    with pytest.raises(PatternError, match="too long to match"):
        for _ in range(1000):
            regex.match("a" * 50)


def test_three_kinds_of_patterns():
    name = "model.layers.1.self_attn.q_proj"
    for yes in (
        "*.q_proj",
        "q_proj",
        "self_attn.q_proj",
        name,
        "model.layers.[0-3].*",
        r"re:.*\.(q|v)_proj",
        "*",
        "re:.*1.*",
    ):
        assert matches(yes, name), yes
    for no in (
        "proj",
        "_proj",
        "q_pro?",
        "model",
        "layers.1",
        r"re:q_proj",
        r"re:.*\.(k|v)_proj",
        "1.self_attn",
        "model.layers.[2-3].*",
    ):
        assert not matches(no, name), no


def test_globs_of_hundreds_of_stars():
    began = time.monotonic()
    for pattern in ("*a" * 900 + "b", "*a?" * 600 + "b", "*[ab]" * 300 + "c"):
        check_pattern(pattern)
        assert not matches(pattern, "a" * 2000)
    assert time.monotonic() - began < 30
    with pytest.raises(PatternError, match="at most 2,000"):
        check_pattern("*a" * 1001)
