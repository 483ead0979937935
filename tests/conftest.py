"""Settings of all tests: one thread, no network, a seeded generator, deterministic hypothesis."""

from __future__ import annotations

import gc
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
import trace_cache
from hypothesis import HealthCheck, settings
from long_tests import COLLECTED, Collected, is_long, named, rows
from quick_export import quickly

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
gc.set_threshold(10_000, 20, 50)  # a session keeps millions of objects (modules, traces): to look through all of them takes a second
# pytest listens to every logger, and torch formats its structured log (a graph's text after each pass) for whoever listens
torch._logging._internal.trace_log = logging.Logger("nobody listens")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the long tests of README.md's table, and note what there is, for the test of the table."""
    table = rows()
    long = frozenset(name for row in table for name in row.long())
    for item in items:
        if is_long(named(item.nodeid), long):
            item.add_marker(pytest.mark.slow)
    asked = [config.rootpath / place for place in config.args]
    config.stash[COLLECTED] = Collected(
        everything=asked == [config.rootpath / place for place in config.getini("testpaths")],
        names=[named(item.nodeid) for item in items],
        slow=[named(item.nodeid) for item in items if item.get_closest_marker("slow")],
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


trace_cache.install()  # here, so that fixtures of a whole module have it too


@pytest.fixture(autouse=True)
def _traces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are built alike are traced once, except in tests of the tracer."""
    trace, judge = trace_cache.USERS
    if "fresh_trace" in request.keywords:
        monkeypatch.setattr(capture, "trace", quickly(trace))
        monkeypatch.setattr(prove_units, "why_not_everywhere", judge)
    if "users_trace" in request.keywords:
        monkeypatch.setattr(capture, "trace", trace)
