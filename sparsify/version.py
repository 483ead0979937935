"""The version of the package, as files, reports and the command line say it; and whether another project's files lie beside it."""

from __future__ import annotations

__version__ = "0.1.0"

DISTRIBUTION = "sparsify-compiler"
"""What pip calls this package."""


def other_sparsify() -> str:
    """A warning where a distribution named `sparsify` has put its files into this package's folder; empty otherwise.

    It is another, older project. pip writes the files of the one over those of the other without a word. An entry without files of
    its own (an editable checkout of this project from before it had its name) does no harm.
    """
    from importlib import metadata

    for found in metadata.distributions(name="sparsify"):
        if any(str(file).replace("\\", "/") == "sparsify/__init__.py" for file in found.files or ()):
            return (
                f"the distribution 'sparsify' {found.version} is installed beside '{DISTRIBUTION}', and both have written to the folder "
                f"sparsify/: run `pip uninstall sparsify {DISTRIBUTION}`, then install {DISTRIBUTION} again"
            )
    return ""
