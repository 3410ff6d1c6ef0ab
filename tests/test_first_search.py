"""The gallery's notebook runs from top to bottom, and is stored without outputs."""

import pytest
from running import EXPERIMENTS

nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]' brings nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="pip install -e '.[test]' brings nbclient and ipykernel")


@pytest.fixture
def notebook():
    import nbformat

    return nbformat.read(EXPERIMENTS / "first_search.ipynb", as_version=4)


def test_the_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = 'TRIALS, EPOCHS, BUDGET = 2, 1, "8MiB"'
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    for words in ("largest micro-batch:", "[2/2]   → val_loss", "TrainingConfig(", "validation accuracy"):
        assert words in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
