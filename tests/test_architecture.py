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


# Rooms of `moee/` and what each may import, beside what everyone may: the files that lie in no room. From the ground up.
ROOMS = {
    "clustering": "",
    "interface": "",
    "layers": "",
    "parallel": "",
    "store": "",
    "weights": "interface store",
    "libraries": "interface store weights",
    "models": "interface layers store weights libraries",
    "data": "parallel store models",
    "calibrate": "clustering interface layers parallel store models data",
    "given": "interface libraries models data",
    "mlps": "interface layers models data",
    "places": "store data",
    "kinds": "layers models mlps",
    "measure": "interface layers parallel models data mlps",
    "train": "interface layers parallel store weights models data mlps places measure",
    "methods": "clustering interface layers parallel store models data calibrate mlps kinds measure train",
    "artifacts": "interface layers store weights libraries models data given mlps places kinds measure methods",
    "stages": "parallel store models data calibrate given mlps places measure train methods artifacts",
    "ablation": "store calibrate mlps places measure methods stages",
    "planning": "layers store models data calibrate mlps places measure methods stages",
}
ON_TOP = {"moee.api"}  # what only the commands and Python's users import
MOST_FILES = 15


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def test_rooms_import_only_what_they_may():
    files = {module_of(path): path for path in (ROOT / "moee").rglob("*.py")}
    assert {path.name for path in (ROOT / "moee").iterdir() if path.is_dir() and list(path.glob("*.py"))} == set(ROOMS)
    wrong = []
    for name, path in files.items():
        for needed in modules_imported(path, set(files)):
            here, there = room_of(name), room_of(needed)
            allowed = needed not in ON_TOP if not there else here in ("", there) or there in ROOMS[here].split()
            if here and not allowed:
                wrong.append(f"{name} imports {needed}")
    assert not wrong, "\n".join(wrong)
    order = list(ROOMS)
    for room, needs in ROOMS.items():
        assert all(order.index(need) < order.index(room) for need in needs.split()), f"{room} needs a room above it"


def test_a_room_says_what_it_is_and_is_not_crowded():
    for room in ROOMS:
        folder = ROOT / "moee" / room
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, f"{folder} has more than {MOST_FILES} files"
        said = " ".join((ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").split())
        *first, last = ROOMS[room].split() or ["no other room"]
        imports = f"Imports {' and '.join(part for part in (', '.join(first), last) if part)}."
        assert said.endswith(imports), f"{folder} says something else than: {imports}"


def test_nobody_asks_what_class_options_or_layers_are_outside_of_their_own_room():
    asked = ("ExpertsOptions", "ClearOptions", "RoutedFFN", "ClearFFN", "GatedFFN", "GatedMLP", "NarrowAttention")
    at_home = {"moee/layers", "moee/methods", "moee/mlps", "moee/kinds"}
    wrong = []
    for package in ("moee", "exporter"):
        for path in (ROOT / package).rglob("*.py"):
            where = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type", "issubclass"):
                    named = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                    if named & set(asked) and not any(where.startswith(home) for home in at_home):
                        wrong.append(f"{where}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
