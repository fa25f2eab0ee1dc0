"""The notebook of examples/ runs from its first cell to its last, in a kernel as in Jupyter."""

from __future__ import annotations

import base64
import io

import nbclient
import nbformat
import pytest
from PIL import Image
from places import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SMALL = """CHANGES = ["train.steps=2", "train.batch_size=8", "model.width=8", "model.depths=[1,1,1,1,1]"]
CHANGES += ["sample.steps=2"]
SAMPLES, SOLVER_STEPS = 20, 2"""


def texts(cell) -> str:
    return "".join(str(output.get("text", output.get("data", ""))) for output in cell.get("outputs", ()))


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    shown = [cell for cell in notebook.cells if "image/png" in texts(cell)]
    parameters.source = SMALL
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert (tmp_path / "runs" / "quickstart" / "metrics.jsonl").is_file()
    drawn = [cell for cell in notebook.cells if "image/png" in texts(cell)]
    assert len(drawn) >= 6
    assert [cell.id for cell in shown] == [cell.id for cell in drawn]  # kept in the file
    picture = drawn[-1].outputs[-1].data["image/png"]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).width > 300
    printed = "".join(map(texts, notebook.cells))
    assert "2/2" in printed or "widget-view" in printed  # the bar
    assert "Warning" not in printed
    assert "FD-digits" in printed


def test_the_notebook_as_it_is_kept():
    """It tells nothing of the machine that it was run on, and is small."""
    content = NOTEBOOK.read_text(encoding="utf-8")
    assert len(content) < 400_000
    for word in ("/root", "/home", "/tmp", "/work", "site-packages", "Traceback", "Warning"):
        assert word not in content
