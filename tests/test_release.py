"""The wheel and the source distribution hold what the repository does; the installed wheel works where no source tree lies."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from exporter import cli
from moee import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("moee", "exporter", "plugins")


def build_dist(out: Path, *more: str) -> tuple[Path, Path]:
    """Through the script, in a process of its own: setuptools changes folders and hooks into imports."""
    command = [sys.executable, ROOT / "scripts" / "build_dist.py", out, *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    return build_dist(tmp_path_factory.mktemp("dist"))


def package_files() -> set[str]:
    """Every file of the packages, by its path in the repository."""
    found = {p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file()}
    kept = {p for p in found if "__pycache__" not in p.parts and p.suffix not in (".pyc", ".so")}
    return {p.relative_to(ROOT).as_posix() for p in kept}


def test_the_wheel_holds_every_file_of_the_packages(dist):
    with zipfile.ZipFile(dist[0]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == package_files()
    assert {f"{p}/py.typed" for p in PACKAGES} <= inside and "plugins/csrc/plugin/plugin.cpp" in inside
    licences = {n.rpartition("/")[2] for n in names if "/licenses/" in n}
    assert licences == {"LICENSE", "THIRD_PARTY_NOTICES.md"}
    assert "License-Expression: Apache-2.0" in metadata and f"Version: {__version__}\n" in metadata


def test_the_source_distribution_builds_and_tests(dist):
    with tarfile.open(dist[1]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert package_files() <= names
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert wanted <= names
    assert {"Makefile", "constraints.txt", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "docs/deploy.md"} <= names
    assert not [n for n in names if n.endswith((".pyc", ".so", ".plan"))]


@pytest.mark.slow
def test_a_wheel_with_the_operator(tmp_path):
    pytest.importorskip("ziglang")
    wheel, source = build_dist(tmp_path, "--operator")
    with zipfile.ZipFile(wheel) as archive:
        brought = {n for n in archive.namelist() if "/prebuilt/" in n}
    libraries = {f"{machine}/libmoee_onnxruntime.so" for machine in ("x86_64", "aarch64")}
    assert brought == {f"plugins/cpu/prebuilt/{name}" for name in (*libraries, "sources.sha256")}
    with tarfile.open(source) as archive:
        assert not [n for n in archive.getnames() if n.endswith(".so")]


@pytest.mark.slow
def test_the_installed_wheel_works_without_the_source_tree(dist, tmp_path):
    """A fresh environment with the wheel alone; its dependencies come from this one, without its links to the repository."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(ask, text=True).strip())
    with zipfile.ZipFile(dist[0]) as wheel:
        wheel.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # lists no .pth files of that folder
    environment = {**os.environ, "PYTHONPATH": "", "OMP_WAIT_POLICY": "PASSIVE"}

    def run(code: str) -> str:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert str(site) in run("import exporter, moee, plugins; print(exporter.__file__, moee.__file__, plugins.__file__)")
    assert __version__ in run("from exporter.cli import main; main(['--version'])")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "synthetic")!r})
from pathlib import Path
from plugins.library.build import build_plugin, describe_plugin
from synthetic import write_kernels
from exporter.deploy import DEPLOY
print(describe_plugin(build_plugin(Path("plugin"), write_kernels(Path("kernels")))).headers, (DEPLOY / "build.sh").is_file())
"""
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "synthetic.py").write_bytes((ROOT / "tests" / "plugins" / "synthetic.py").read_bytes())
    assert "True" in run(code)


def test_versions_and_documents_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text().lower()
    for requirement in [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]:
        name = re.split(r"[<>=;\[ ]", requirement)[0]
        assert re.search(rf"\b{re.escape(name)}\b", notices), f"{name} is not in THIRD_PARTY_NOTICES.md"


WHEELS = {"PIL": "pillow", "sklearn": "scikit-learn", "onnx_ir": "onnx-ir", "pydantic_core": "pydantic", "triton": "torch"}
BY_NAME = {  # what is imported by a name in a text, or opened as data
    "scikit-image": "moee/data/built_in.py", "transformers": "moee/libraries/transformers_classes.py",
    "webdataset": "moee/data/shards.py", "tensorrt": "exporter/manifests.py", "tensorrt-rtx-cu13": "exporter/manifests.py",
    "onnxruntime-gpu": "exporter/runners/onnx_runtime.py",
}  # fmt: skip


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(need for extra in ("stream", "hf", "rtx", "trt") for need in extras[extra])]
    declared = {re.split(r"[<>=;\[ ]", need)[0] for need in wanted}
    line = re.compile(r"^ *(?:import ([\w.]+)(?: as \w+|, .+)?$|from ([\w.]+) import )", re.MULTILINE)
    texts = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = {plain or source for text in texts for plain, source in line.findall(text)}
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - set(PACKAGES)
    imported = {WHEELS.get(name, name) for name in tops}
    assert imported <= declared, "imported and not declared"
    for name in declared - imported:
        assert name in BY_NAME, f"{name} is declared and not imported"
        assert re.search(r"skimage|transformers|webdataset|tensorrt|onnxruntime", (ROOT / BY_NAME[name]).read_text())


def test_links_of_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_is_documented():
    text = "".join(p.read_text() for p in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
    for name in cli.build_parser()._subparsers._group_actions[0].choices:
        assert f"moee {name}" in text, f"moee {name} is in no page"


def test_every_page_is_in_the_table_of_contents():
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", (docs / "index.md").read_text(), flags=re.MULTILINE))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_for_nothing(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")):
        pytest.skip("needs Sphinx: pip install 'moee[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", ROOT / "docs", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for page in ("index.html", "choosing.html", "results/methods.html"):
        text = (tmp_path / page).read_text()
        assert "toctree-l1" in text and not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', text)


@pytest.mark.slow
def test_the_api_reference_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("needs pdoc: pip install 'moee[docs]'")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, ROOT / "scripts" / "build_api.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warn" not in done.stderr and (tmp_path / "moee" / "methods" / "convert.html").is_file()
