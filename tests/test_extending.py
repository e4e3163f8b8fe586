"""The code of docs/extending.md, run as a reader would use it."""

import json
import re
import sys
import types
from pathlib import Path

import pytest

from exporter import cli
from exporter.report import write_report
from moee.artifacts import checkpoint
from moee.methods.recipe import make_recipe
from moee.methods.registry import METHODS
from moee.planning.budget import Budget
from moee.planning.plan import make_plan
from moee.stages.extract import run_extract
from moee.stages.session import Session
from tests.conftest import tiny_images, tiny_spec

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


def code(section: str) -> list[str]:
    """The blocks of Python in a section of the page."""
    text = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert text is not None, f"the page has no section {section}"
    return re.findall(r"^```python\n(.*?)^```$", text[1], re.M | re.S)


@pytest.fixture
def norms(monkeypatch):
    """The page's method, with its line in the registry."""
    module = types.ModuleType("moee.methods.norms")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code("A method")[0], "docs/extending.md", "exec"), module.__dict__)
    METHODS.append(module.NormsMethod())
    yield METHODS[-1]
    METHODS.pop()


@pytest.fixture
def session(monkeypatch):
    splits = tiny_images(24, classes=10), tiny_images(24, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args: splits)
    monkeypatch.setattr("moee.data.sources.load_splits", lambda *args, **kwargs: splits)
    monkeypatch.setattr("moee.data.sources.load_data", lambda *args, **kwargs: splits[1])
    return Session(tiny_spec(), "digits")


def test_its_options_are_shown(norms, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["extract", "--method", "norms", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "share of each MLP's neurons that stays, those with the longest weights (default: 0.5)" in shown
    assert "norms: the neurons with the longest columns" in shown and "--clusters" not in shown
    with pytest.raises(SystemExit, match="0"):
        cli.main(["extract", "--help"])
    assert "norms: the neurons" in capsys.readouterr().out


def test_from_a_recipe_to_an_export_and_a_report(norms, session, tmp_path, capsys):
    recipe = make_recipe("norms", values={"keep": 0.75})
    moee = run_extract(session.spec, "digits", recipe, tmp_path / "run" / "model", session=session)
    assert all(layer["union"] == 96 for layer in moee.info["layers"])
    assert checkpoint.load(tmp_path / "run" / "model").recipe == recipe
    steps = json.loads((tmp_path / "run" / "model" / "moee.json").read_text())["recipe"]["steps"]
    assert steps == [{"method": "norms", "seed": 0, "exclude": [], "keep": 0.75}]
    model, out = str(tmp_path / "run" / "model"), str(tmp_path / "run" / "export")
    assert cli.main(["export", model, "--out", out]) == 0
    assert cli.main(["verify", out, "--model", model, "--images", "0"]) == 0
    page = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    assert "norms, keep 0.75." in page and "--method norms --keep 0.75" in page


def test_a_plan_and_an_ablation_try_it(norms, session, tmp_path):
    plan = make_plan(session, Budget(target_macs=0.7), tmp_path / "plan", ("norms", "static"), base={"tokens": 400})
    point = next(p for p in plan["points"] if p["method"] == "norms")
    assert point["macs"] == pytest.approx(0.7, abs=0.01) and point["recipe"]["steps"][0]["method"] == "norms"
    from moee.ablation.grid import TABLES, cells_of, make_ablation_config

    assert "norms" in [row.label for row in TABLES["3"].rows]
    cells = [cell for cell in cells_of(make_ablation_config(tables=("3",), seeds=1)) if cell.row == "norms"]
    assert {cell.point for cell in cells} == {"0.50", "0.70", "0.90"}
