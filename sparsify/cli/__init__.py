"""The command line: one file for each command, and one rule for how they end."""

from sparsify.cli.commands import app

__all__ = ["app"]
