# SPDX-License-Identifier: Apache-2.0
"""What can be said of the notebooks without running them (``make notebooks`` does)."""

import json
from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_five():
    assert [file.stem[:2] for file in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_its_script_says_the_same_and_outputs_are_stripped(file):
    """Edit either and run ``jupytext --sync notebooks/*.ipynb``."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    script = jupytext.read(file.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in script.cells] == cells
    assert notebook["metadata"]["jupytext"]["formats"] == "ipynb,py:percent"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
