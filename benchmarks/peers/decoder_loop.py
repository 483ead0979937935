"""What the decoders of all engines answer: logits after a prompt, and seconds per token of greedy decoding."""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """One sequence with its cache."""

    def reset(self) -> None: ...

    def feed(self, ids: list[int]) -> None:
        """Append tokens to the sequence; what comes next is known afterwards."""
        ...

    def next(self) -> int:
        """The most likely next token."""
        ...

    def logits(self) -> np.ndarray:
        """(vocabulary,) fp32 of the next token."""
        ...


def seconds_per_token(engine: Engine, prompt: list[int], tokens: int) -> float:
    """Of `tokens` tokens after a prompt, which is not counted."""
    engine.reset()
    engine.feed(prompt)
    token = engine.next()
    start = time.perf_counter()
    for _ in range(tokens):
        engine.feed([token])
        token = engine.next()
    return (time.perf_counter() - start) / tokens


def serve(package: str, engine: Engine, **facts: Any) -> None:
    """Answer lines of JSON: {"prompt": ids, "tokens": n} → seconds, {"prompt": ids, "logits": file} → file.

    facts: what the first line says besides the version of the package.
    """
    print(json.dumps({"version": metadata.version(package), **facts}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "logits" in job:
            engine.reset()
            engine.feed(job["prompt"])
            np.save(job["logits"], engine.logits())
            print(json.dumps({"ready": True}), flush=True)
            continue
        print(json.dumps({"seconds": seconds_per_token(engine, job["prompt"], job["tokens"])}), flush=True)
