"""The notebooks of docs run from their first cell to their last, in a kernel of their own."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'pyvidx[docs]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'pyvidx[docs]'")
pytest.importorskip("ipykernel", reason="pip install 'pyvidx[docs]'")
pytest.importorskip("av", reason="pip install 'pyvidx[video]'")
pytest.importorskip("transformers", minversion="5.20.2", reason="pip install 'pyvidx[hosts]'")

ROOT = Path(__file__).parents[1]
MEND = "from tests.torchvision_shim import mend_torchvision\nmend_torchvision()"


@pytest.mark.parametrize("path", sorted((ROOT / "docs/notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    notebook = nbformat.read(path, 4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(MEND))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert any(output.output_type == "display_data" for cell in notebook.cells for output in cell.get("outputs", []))
