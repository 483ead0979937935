"""What a process that runs tests has: one thread, a seeded generator, deterministic hypothesis, the memory of traces."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import pytest
import torch
import trace_cache
from hypothesis import HealthCheck, settings
from quick_export import quickly

from sparsify.model import untouched
from sparsify.passes import prove_units
from sparsify.passes.detect import axes
from sparsify.program import capture

settings.register_profile(
    "sparsify",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
axes.strict_rules = True  # a bug in a rule of the axis analysis is an error here, and an unknown operation for users
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sparsify"))
torch.set_num_threads(1)
gc.disable()  # until everything is loaded
gc.set_threshold(10_000, 20, 50)
# pytest listens to every logger, and torch formats its structured log (a graph's text after each pass) for whoever listens
torch._logging._internal.trace_log = logging.Logger("nobody listens")
trace_cache.install()  # here, so that fixtures of a whole module have it too


def set_aside() -> None:
    """What is there now stays: the collector need not look through these million objects again, which takes it most of a second each
    time that Trainer ends a run. The compiler looks for function caches among what the collector knows, so it looks first."""
    gc.collect()
    untouched.FUNCTION_CACHES.add(gc.get_objects())
    gc.freeze()


def pytest_collection_finish() -> None:
    set_aside()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries that count what is left at the end call it a leak


FILES = 12
finished: set[Path] = set()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Every so many files, what is remembered of them (traces, modules that they loaded) is set aside too."""
    if nextitem is not None and nextitem.path != item.path and item.path not in finished:
        finished.add(item.path)
        if len(finished) % FILES == 0:
            set_aside()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _traces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are built alike are traced once, except in tests of the tracer."""
    trace, judge = trace_cache.USERS
    if "fresh_trace" in request.keywords:
        monkeypatch.setattr(capture, "trace", quickly(trace))
        monkeypatch.setattr(prove_units, "why_not_everywhere", judge)
    if "users_trace" in request.keywords:
        monkeypatch.setattr(capture, "trace", trace)
