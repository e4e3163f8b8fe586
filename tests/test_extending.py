"""The code of docs/extending.md, run as a reader would use it."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from exporter import cli
from exporter.graph.export import export
from exporter.report import write_report
from exporter.runners.registry import RUNTIMES
from exporter.verification import verify
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel, recorded_data
from moee.data import sources
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.methods.recipe import Recipe, make_recipe
from moee.methods.registry import METHODS
from moee.models.model import load_model
from moee.planning.budget import Budget
from moee.planning.plan import make_plan
from moee.stages.extract import run_extract
from moee.stages.session import Session
from plugins.library.build import SOURCE, select_headers
from tests.conftest import tiny_images, tiny_spec
from tests.moee.test_folders import tree

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


def section(title: str) -> str:
    text = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert text is not None, f"the page has no section {title}"
    return text[1]


def code(title: str, language: str = "python") -> list[str]:
    """The blocks of code in a section of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.M | re.S)


def added(title: str, monkeypatch):
    """What a section adds: its file as the module that it names, and its line as the items of a list or a dictionary."""
    file = re.search(r"[Tt]he file, `([\w/]+)\.py`", section(title))
    line = re.search(r"The line, in the (list|dictionary) `\w+`: `(.*?)`", section(title), re.S)
    assert file and line
    module = types.ModuleType(file[1].replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code(title)[0], "docs/extending.md", "exec"), module.__dict__)
    return eval(f"[{line[2]}]" if line[1] == "list" else f"{{{line[2]}}}", module.__dict__)


@pytest.fixture
def norms(monkeypatch):
    """The page's method, with its line in the registry."""
    METHODS.extend(added("A method", monkeypatch))
    yield METHODS[-1]
    METHODS.pop()


@pytest.fixture
def session(monkeypatch):
    splits = tiny_images(24, classes=10), tiny_images(24, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: splits)
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
    plan = make_plan(session, Budget(target_macs=0.7), tmp_path / "plan", methods=("norms", "static"), base={"tokens": 400})
    point = next(p for p in plan["points"] if p["method"] == "norms")
    assert point["macs"] == pytest.approx(0.7, abs=0.01) and point["recipe"]["steps"][0]["method"] == "norms"
    from moee.ablation.grid import TABLES, cells_of, make_ablation_config

    assert "norms" in [row.label for row in TABLES["3"].rows]
    cells = [cell for cell in cells_of(make_ablation_config(tables=("3",), seeds=1)) if cell.row == "norms"]
    assert {cell.point for cell in cells} == {"0.50", "0.70", "0.90"}


def test_a_method_that_looks_at_tokens_is_refitted_and_planned(monkeypatch, session, tmp_path):
    METHODS.extend(added("A method that looks at tokens", monkeypatch))
    try:
        few = {"experts": 3, "tokens": 300, "refit_tokens": 300}
        recipe = make_recipe("drawn", values={**few, "keep": 0.25})
        moee = run_extract(session.spec, "digits", recipe, tmp_path / "m", session=session)
        assert moee.info["layers"]
        for layer in moee.info["layers"]:
            assert layer["experts"] == 3 and layer["widths"] == [32, 32, 32] and 32 <= layer["union"] <= 96
            assert sum(layer["share"]) == pytest.approx(1) and layer["refit"]["tokens"] > 0
        plan = make_plan(session, Budget(target_macs=0.7), tmp_path / "plan", methods=("drawn",), base=few)
        assert plan["points"][0]["macs"] == pytest.approx(0.7, abs=0.02)
    finally:
        METHODS.pop()


def apply(diff: str, root: Path) -> None:
    """Change the file that a diff begins with: each hunk's old lines, which stand in it once, become its new ones."""
    name, *hunks = re.split(r"^@@\n", diff, flags=re.M)
    path = root / name.removeprefix("--- ").strip()
    text = path.read_text()
    for hunk in hunks:
        old, new = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] != sign) for sign in "+-")
        assert text.count(old) == 1, f"{path} has these lines {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the project with the page's activation."""
    root = tmp_path_factory.mktemp("changed")
    for package in ("moee", "exporter", "plugins", "tests"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", root)
    changes = code("An activation", "diff")
    assert len(changes) == 10
    for diff in changes:
        apply(diff, root)
    return root


def run_in(root: Path, *words: str) -> str:
    """Standard output of Python in a copy of the project."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_an_activation_is_the_same_in_every_language(changed):
    tactics = ("tile16", "masked16", "fused_d192", "group16", "group_fused_d384")
    kernels = [f"tests/plugins/test_kernels.py::test_activations[{tactic}-5]" for tactic in tactics]
    kernels.append("tests/plugins/test_kernels.py::test_a_code_that_the_contract_lacks_is_no_other_function")
    agreed = "tests/plugins/test_plugin_contract.py::test_activations_have_the_contracts_codes"
    shown = run_in(changed, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_activations.py", agreed, *kernels)
    assert "passed" in shown and "failed" not in shown


def test_a_model_with_it_is_recognised_cut_exported_and_verified(changed, tmp_path):
    facts = json.loads(run_in(changed, "-m", "tests.relu6_model", str(tmp_path / "export")))
    assert facts == {"recognised": ["relu6"] * 3, "routed": ["relu6"] * 3, "plugin_nodes": ["relu6"] * 3, "verified": True}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_plugin_knows_it(changed, tmp_path):
    header = next((changed / "plugins" / "csrc").rglob("operator.h"))
    program = tmp_path / "known.cpp"
    program.write_text(
        f'#include "{header}"\n#include <string_view>\n'
        'static_assert(std::string_view(moee::kActivations.at(5)) == "relu6" && moee::kActivations.size() == 6);\n'
    )
    include = [changed / "plugins" / "csrc", select_headers().include, SOURCE / "csrc" / "compat"]
    flags = [word for folder in include for word in ("-isystem", str(folder))]
    done = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", *flags, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_operator_on_a_cpu_knows_it(changed):
    own = "tests/plugins/test_cpu_operator.py::test_every_activation"
    shown = run_in(changed, "-m", "pytest", "-p", "no:cacheprovider", f"{own}[relu6-16]", f"{own}[gelu-16]")
    assert "2 passed" in shown


def test_a_runtime_verifies_and_is_timed(tiny_moee, tmp_path, monkeypatch, capsys):
    for name, runtime in added("A runtime", monkeypatch).items():
        monkeypatch.setitem(RUNTIMES, name, runtime)
    model, _, data, config, _ = tiny_moee
    moee = MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "tiny")
    export(moee, tmp_path / "export")
    result = verify(tmp_path / "export", moee, data, sizes=(1, 3), provider="reference", images=0)
    assert result and result.parity.runtime.endswith("reference evaluator") and len(result.parity.layers) == 3
    bench = ["bench", str(tmp_path / "export"), "--provider", "reference", "--batch", "1", "--runs", "2"]
    assert cli.main([*bench, "--duration", "0", "--throughput", "0"]) == 0
    assert "reference evaluator" in capsys.readouterr().out
    assert cli.main(["bench", str(tmp_path / "export"), "--provider", "unheard"]) == 2
    assert "expected one of cpu, cuda, tensorrt, reference" in capsys.readouterr().err


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """The page's source of images, with its line in the registry; a list of pictures, in whose folder commands run."""
    monkeypatch.setattr(sources, "SOURCES", [*sources.SOURCES, *added("A data source", monkeypatch)])
    tree(tmp_path / "pictures", ("cat", "dog"), ("cat", "dog"))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name},{file.parent.parent.name}\n" for file in files]
    (tmp_path / "images.csv").write_text("".join(lines))
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_data_source_is_read_numbered_and_found_again(listed, monkeypatch, capsys):
    model = load_model(tiny_spec(num_classes=2))
    torch.save(model.state_dict(), "w.pth")
    sizes = [f"{name}={value}" for name, value in tiny_spec().kwargs.items() if name != "num_classes"]
    words = ["extract", tiny_spec().timm_name, "--checkpoint", "w.pth", "--model-kwargs", *sizes, "--data", "list:images.csv"]
    few = ["--clusters", "2", "--cluster-tokens", "60", "--tokens", "120", "--components", "4", "--keep", "0.9"]
    assert cli.main([*words, *few, "--out", "extracted"]) == 0
    assert json.loads((listed / "extracted" / "moee.json").read_text())["data"] == f"list:{listed / 'images.csv'}"
    content = sources.load_data("list:images.csv", model_transform(model), "val").content()
    monkeypatch.chdir("/")
    images = checkpoint.load(listed / "extracted").record.images("val")
    folder = sources.load_data(str(listed / "pictures"), model_transform(model), "val")
    assert images.classes == folder.classes == ("cat", "dog") and images.labels == folder.labels == [0, 0, 1, 1]
    assert all(torch.equal(images.load(i), folder.load(i)) for i in range(4)) and images.content() == content
    assert sources.same_data("list:images.csv", f"list:{listed}/images.csv") is False  # another folder's
    (listed / "images.csv").write_text("pictures/val/cat/0.png,cat\n")
    with pytest.raises(UserError, match="expected a path, a class, and train or val a line"):
        sources.load_data(f"list:{listed}/images.csv", model_transform(model), "val")
    (listed / "images.csv").unlink()
    with pytest.raises(UserError, match="say where it lies with --data"):
        recorded_data(f"list:{listed}/images.csv")
