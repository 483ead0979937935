"""The next token of one request, by its own parameters: nothing that one asks for touches another.

transformers' continuous batching draws for the whole batch with one configuration and one generator; a server cannot. Here each row of
the scores is taken alone, in the order that `generate` applies them:

    scores ── bias, presence, frequency ──▶ / temperature ──▶ top k ──▶ top p ──▶ drawn by the request's own generator
                                            (temperature 0: the likeliest, nothing drawn)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from jaxtyping import Float


COLDEST = 1e-30
"""A lower temperature is none in fp32; here already only scores that are equal share anything."""


class SamplingError(SparsifyError, ValueError):
    """No token can be drawn: the scores of a request are not finite, or everything is excluded."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks for, in OpenAI's terms.

    tokens: how many at most. temperature: 0 takes the likeliest. top_p: draw among the likeliest that have this share together.
    top_k: among so many (0: all). presence, frequency: taken from the scores of tokens that were written, once and for each time.
    bias: token → what is added to its score. seed: of what is drawn (None: another each time). stop: texts that end the answer.
    endless: go on after the end of the text.
    """

    tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    endless: bool = False

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is what is asked for, and nothing changes the scores."""
        return self.temperature == 0 and not (self.presence or self.frequency or self.bias)


class Sampler:
    """Draws the tokens of one request, one after another."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.written: Counter[int] = Counter()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def draw(self, scores: Float[Tensor, " c"]) -> int:
        """The next token, which counts as written. scores: fp32, one for each token of the vocabulary. Raises SamplingError."""
        token = int(scores.argmax()) if self.sampling.plain else self.drawn(self.changed(scores))
        if not bool(torch.isfinite(scores[token])):
            raise SamplingError("the model's scores are not finite")
        return self.takes(token)

    def takes(self, token: int) -> int:
        """Count a token as written."""
        self.written[token] += 1
        return token

    def changed(self, scores: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
        """Scores with bias and penalties; of tokens that the vocabulary has not, nothing."""
        asked = self.sampling
        scores = scores.to("cpu", torch.float32, copy=True)
        for token, added in asked.bias.items():
            if token < len(scores):
                scores[token] += added
        if asked.presence or asked.frequency:
            for token, count in self.written.items():
                scores[token] -= asked.presence + asked.frequency * count
        return scores

    def drawn(self, scores: Float[Tensor, " c"]) -> int:
        asked = self.sampling
        if asked.temperature == 0:
            return int(scores.argmax())
        scores = (scores - scores.max()) / max(
            asked.temperature, COLDEST
        )  # the largest is 0, so that no temperature overflows
        if 0 < asked.top_k < len(scores):
            scores[scores < scores.topk(asked.top_k).values[-1]] = -torch.inf
        if asked.top_p < 1:
            ordered, places = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            scores[places[before >= max(asked.top_p, torch.finfo(torch.float32).tiny)]] = -torch.inf
        shares = scores.softmax(-1)
        if not bool(torch.isfinite(shares).all()):
            raise SamplingError("the model's scores are not finite")
        return int(torch.multinomial(shares, 1, generator=self.generator))


__all__ = ["Sampler", "Sampling", "SamplingError"]
