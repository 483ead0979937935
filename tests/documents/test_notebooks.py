"""The notebooks of examples/ run from top to bottom, with small settings in place of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.demo.pretrained import why_missing

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"

#: notebook → what takes the place of its cell of parameters
SMALL = {
    "fine_tune.ipynb": "steps, batch, held_out, layers = 2, 2, 4, 2",
    "prune_and_serve.ipynb": "sparsity, blocks, tokens, layers = 0.5, 6, 4, 1",
    "inspect.ipynb": "layers = 2",
}
LARGEST = 20_000  # bytes: without outputs they are small


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def parameters(name: str) -> list[dict[str, Any]]:
    return [cell for cell in cells(name) if "parameters" in cell["metadata"].get("tags", ())]


@pytest.mark.parametrize("name", SMALL)
def test_it_is_kept_without_outputs_and_has_settings(name: str) -> None:
    """Code that does not compile, and a name of the small settings that the notebook does not have, are noticed here."""
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(SMALL)
    assert (FOLDER / name).stat().st_size < LARGEST
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    for cell in code:
        compile(source(cell), name, "exec")
    own: dict[str, Any] = {}
    small: dict[str, Any] = {}
    (settings,) = parameters(name)
    exec(source(settings), own)
    exec(SMALL[name], small)
    assert set(own) == set(small)


@pytest.mark.slow  # covered by test_pages.py, which runs the same calls on small random models
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="notebooks are run with nbclient: pip install -e '.[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run with nbclient: pip install -e '.[notebooks]'")
    pytest.importorskip("ipykernel", reason="notebooks are run with ipykernel: pip install -e '.[notebooks]'")
    if "smollm2" in str(cells(name)) and why_missing():
        pytest.skip(why_missing())
    notebook = nbformat.read(FOLDER / name, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = SMALL[name]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert notebook.cells[-1].outputs
