"""docs/tutorial.ipynb runs from its first cell to its last, and every result that it promises is there."""

import json
import logging
import re
from pathlib import Path

import pytest

from moee.store.result_kinds import CARD

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_one_and_holds_no_old_results():
    body = json.loads(NOTEBOOK.read_text())
    assert (body["nbformat"], body["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in body["cells"]}) == len(body["cells"])
    for cell in body["cells"]:
        assert cell["cell_type"] != "code" or (cell["outputs"] == [] and cell["execution_count"] is None), "clear the outputs"
    for target in re.findall(r"\]\(([^)#:]+)\)", "\n".join(cells("markdown"))):
        assert (NOTEBOOK.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*non-interactive.*")
def test_the_notebook_runs(tmp_path, monkeypatch, capsys, caplog):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)
    namespace: dict = {"__name__": "tutorial"}
    for number, source in enumerate(cells("code"), 1):
        exec(compile(source, f"tutorial.ipynb, code cell {number}", "exec"), namespace)
    text = capsys.readouterr().out
    for (name, _), result in namespace["results"].items():
        found = result.info["stages"]["extracted"]["retention"]
        assert found["dense_accuracy"] > 0.9 and found["accuracy"] > found["dense_accuracy"] - 0.1, name
    assert len(namespace["experts"]) == 4 and all(expert["patches"] for expert in namespace["experts"])
    assert namespace["verified"] and "# Model card of `tutorial.Digits`" in text
    assert (tmp_path / "model" / CARD).is_file() and (tmp_path / "export" / "tensorrt.onnx").is_file()
