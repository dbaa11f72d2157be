"""The notebooks in examples/ run from top to bottom, on built-in images, with ``import dino`` alone."""

import ast
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

EXAMPLES = Path(__file__).parents[1] / "examples"
IN_ORDER = ["train_on_your_folder.ipynb", "use_a_backbone.ipynb"]  # The second uses what the first trained.


def test_there_are_no_others():
    assert sorted(path.name for path in EXAMPLES.glob("*.ipynb")) == IN_ORDER


@pytest.mark.parametrize("name", IN_ORDER)
def test_they_need_nothing_but_dino_and_hold_no_outputs(name):
    cells = [cell for cell in nbformat.read(EXAMPLES / name, 4).cells if cell.cell_type == "code"]
    tree = ast.parse("\n".join(cell.source for cell in cells))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["import dino"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_they_run(tmp_path):
    for name in IN_ORDER:
        notebook = nbformat.read(EXAMPLES / name, 4)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert (
            sum("image/png" in output.get("data", {}) for output in outputs) == {IN_ORDER[0]: 3, IN_ORDER[1]: 1}[name]
        )
    assert {"backbone.safetensors", "report.html"} <= {path.name for path in (tmp_path / "runs" / "first").iterdir()}
