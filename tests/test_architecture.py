"""The direction of imports, and the bans that hold everywhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "moee": {"onnx", "onnxruntime", "onnxscript", "onnx_ir", "tensorrt", "tensorrt_rtx", "exporter", "plugins"},
    "plugins": {"exporter"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_import_direction(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no Python files below {package}/"
    wrong = {str(f.relative_to(ROOT)): sorted(bad) for f in files if (bad := imported(f) & FORBIDDEN[package])}
    assert not wrong, f"imports against the direction: {wrong}"


def test_no_pickle_and_only_weights_only_torch_load():
    for package in ("moee", "exporter", "plugins"):
        for path in (ROOT / package).rglob("*.py"):
            assert not imported(path) & {"pickle", "dill", "joblib", "cloudpickle"}, f"{path} imports a pickle module"
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{path}:{node.lineno} torch.load without weights_only"


def modules_imported(path: Path, known: set[str]) -> set[str]:
    """Modules of this project, out of `known`, that a file imports at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            names |= {name if name in known else node.module for name in inner}
    return names & known


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("package", ["exporter", "moee", "plugins"])
def test_no_circle_of_files(package):
    files = {module_of(path): path for path in (ROOT / package).rglob("*.py")}
    left = {name: modules_imported(path, set(files)) - {name} for name, path in files.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import one another in a circle, or lead into one: {sorted(left)}"
