"""The adapter that Model Explorer loads: `model-explorer out.html --extensions=sparsify.show.explorer`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, ClassVar

from sparsify.show.explorer.graphs import explorer_graphs
from sparsify.show.inspector import read_inspector

if TYPE_CHECKING:
    from model_explorer import ModelExplorerGraphs

if (
    importlib.util.find_spec("model_explorer") is not None
):  # Model Explorer alone calls it; others may read this module without it
    from model_explorer import Adapter, AdapterMetadata

    class SparsifyAdapter(Adapter):
        """Opens pages of the inspector (`sparsify inspect MODEL --html out.html`, `program.html("out.html")`)."""

        metadata: ClassVar[AdapterMetadata] = AdapterMetadata(
            id="sparsify",
            name="sparsify inspector",
            description="Programs of sparsify, from pages of its inspector: after and before.",
            source_repo="",
            fileExts=["html"],
        )

        def convert(self, model_path: str, settings: dict[str, object]) -> ModelExplorerGraphs:
            """Raises InputError for a file that is no page of the inspector, or a damaged one."""
            return explorer_graphs(read_inspector(model_path))
