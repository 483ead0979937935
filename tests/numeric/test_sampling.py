"""One request's next token: the shares that `generate` would draw from, the request's own seed, and no token from scores that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from sparsify.serving.sampling import Sampler, Sampling, SamplingError

VOCABULARY = 23


def scores(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def shares_of(sampling: Sampling, given: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What `multinomial` is asked to draw from."""
    seen: list[torch.Tensor] = []

    def drawn(shares: torch.Tensor, count: int, generator: Any) -> torch.Tensor:
        seen.append(shares.clone())
        return shares.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", drawn)
    Sampler(sampling).draw(given)
    (found,) = seen
    return found


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 5, 1.0), (1.7, 0, 0.8), (0.9, 7, 0.5), (1.0, 0, 1e-9), (2.0, 40, 1.0)],
)
def test_the_shares_are_those_of_generate(
    temperature: float, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = scores()
    expected = given[None].clone()
    for warper in (
        hf.TemperatureLogitsWarper(temperature),
        hf.TopKLogitsWarper(top_k) if top_k else None,
        hf.TopPLogitsWarper(top_p),
    ):
        expected = expected if warper is None else warper(torch.zeros(1, 1, dtype=torch.long), expected)
    found = shares_of(Sampling(tokens=1, temperature=temperature, top_k=top_k, top_p=top_p), given, monkeypatch)
    assert torch.equal(found > 0, expected[0].softmax(-1) > 0)
    torch.testing.assert_close(found, expected[0].softmax(-1), atol=2e-7, rtol=1e-5)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-30, 1e-9])
def test_a_temperature_near_nothing_takes_the_likeliest(temperature: float) -> None:
    for seed in range(5):
        assert Sampler(Sampling(tokens=1, temperature=temperature, top_p=0.5, top_k=9)).draw(scores(seed)) == int(
            scores(seed).argmax()
        )
    equal = torch.tensor([1.0, 2.0, 2.0, 0.0])
    assert {Sampler(Sampling(tokens=1, temperature=temperature, seed=s)).draw(equal) for s in range(30)} == {1, 2}


def test_penalties_and_bias() -> None:
    given = torch.tensor([5.0, 4.9, 1.0, 0.0])
    sampler = Sampler(Sampling(tokens=9, temperature=0, presence=0.2, frequency=0.3))
    drawn = [sampler.draw(given) for _ in range(6)]
    counts, expected = [0, 0, 0, 0], []
    for _ in range(6):
        now = [s - (0.2 if c else 0) - 0.3 * c for s, c in zip(given.tolist(), counts, strict=True)]
        expected.append(now.index(max(now)))
        counts[expected[-1]] += 1
    assert drawn == expected
    assert len(set(drawn)) == 2
    assert torch.equal(given, torch.tensor([5.0, 4.9, 1.0, 0.0]))
    assert Sampler(Sampling(tokens=1, temperature=0, bias={3: 100.0, 99: 100.0})).draw(given) == 3
    assert Sampler(Sampling(tokens=1, temperature=0, bias={0: -100.0})).draw(given) == 1


def test_a_seed_is_the_request_s_own() -> None:
    asked = Sampling(tokens=20, temperature=1.5, seed=7)
    alone = Sampler(asked)
    expected = [alone.draw(scores(step)) for step in range(20)]
    again, other = Sampler(asked), Sampler(Sampling(tokens=20, temperature=1.5))
    found = []
    for step in range(20):  # another request draws between
        torch.manual_seed(step)
        other.draw(scores(step))
        found.append(again.draw(scores(step)))
    assert found == expected
    assert [Sampler(Sampling(tokens=1, temperature=2.0, seed=s)).draw(scores()) for s in range(30)] != [
        expected[0]
    ] * 30
    negative = Sampling(tokens=1, temperature=1.5, seed=-(1 << 63))
    assert Sampler(negative).draw(scores()) == Sampler(negative).draw(scores())


@pytest.mark.parametrize(
    "asked", [Sampling(tokens=1, temperature=0), Sampling(tokens=1, temperature=1.0)], ids=["likeliest", "drawn"]
)
def test_scores_that_are_none(asked: Sampling) -> None:
    for broken in (float("nan"), float("inf")):
        given = scores()
        given[4] = broken
        with pytest.raises(SamplingError, match="not finite"):
            Sampler(asked).draw(given)
    with pytest.raises(SamplingError, match="not finite"):
        Sampler(asked).draw(torch.full((5,), -torch.inf))
    masked = scores()
    masked[4] = -torch.inf
    assert Sampler(asked).draw(masked) != 4
