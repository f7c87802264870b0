"""The notebook runs from its first cell to its last, and shows what its text says."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.filterwarnings("default")  # of the kernel's own libraries
def test_quickstart() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 5
    lines = [line for o in outputs for line in o.get("text", "").splitlines()]
    assert "layers.1  mlx.nn.BatchNorm(16)     mlx_welford.BatchNorm" in lines
    assert "never worse: True" in lines
    assert "mlx_welford  deviation 1.000" in lines
    values = dict(line.split(": ") for line in lines if ": " in line)
    quotient = float(values["difference quotient"])
    assert float(values["gradient"]) == pytest.approx(quotient, abs=1e-3)
