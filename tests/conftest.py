"""Settings of all tests: no network, the long tests of README.md's table; what runs them is set up in `running.py`."""

from __future__ import annotations

import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from long_tests import COLLECTED, Collected, is_long, named, rows


def pytest_configure(config: pytest.Config) -> None:
    """A process that only hands tests to others (`-n 2`) loads neither torch nor sparsify: the others start seconds earlier."""
    hands_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.register(importlib.import_module("running"), "running")


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
