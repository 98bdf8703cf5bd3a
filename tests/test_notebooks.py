"""The notebooks run from top to bottom, offline and without the checkout; their outputs are stored."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes of a notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    run(nbformat.read(path, as_version=4), tmp_path)


def test_runs_on_a_few_videos(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS[0].with_stem("quickstart"), as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = "per_class, epochs = 3, 1"
    run(notebook, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert not re.search(r"subprocess|/home/|/root/|/work/|site-packages", text)


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """From an empty folder; what it came to is left there, executed.ipynb."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, resources=resources, record_timing=False).execute()
    nbformat.write(notebook, folder / "executed.ipynb")
    check_outputs(notebook)


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("moving_left" in output.get("text", "") for output in outputs)
