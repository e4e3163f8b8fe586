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


# Rooms and what each may import, from the ground up: rooms of its package, whole packages, and files on top. Files that lie in
# no room import none and serve all, but for those on top.
ROOMS = {
    "moee": {
        "clustering": "",
        "interface": "",
        "layers": "",
        "parallel": "",
        "space": "",
        "store": "",
        "weights": "interface store",
        "libraries": "interface store weights",
        "models": "interface layers store weights libraries",
        "data": "parallel store models",
        "mlps": "interface layers models data",
        "tokens": "interface models mlps",
        "calibrate": "clustering interface layers parallel space store models data mlps tokens",
        "given": "interface libraries models data",
        "places": "store data",
        "kinds": "layers models data mlps tokens",
        "measure": "interface layers parallel space models data mlps tokens",
        "train": "interface layers parallel store weights models data mlps places measure",
        "methods": "clustering interface layers parallel space store models data mlps tokens calibrate kinds measure train",
        "artifacts": "interface layers store weights libraries models data mlps tokens given places kinds measure methods",
        "shrinking": "layers parallel space store models data calibrate",
        "stages": "interface layers parallel space store libraries models data calibrate given mlps places measure train methods "
        "artifacts shrinking",
        "ablation": "space store calibrate mlps places measure methods stages",
        "planning": "layers store models data calibrate mlps places measure methods stages",
    },
    "exporter": {
        "deploy": "",
        "engines": "moee plugins",
        "markup": "",
        "front": "moee markup",
        "passes": "moee plugins",
        "plots": "moee",
        "quantization": "moee",
        "forms": "moee plugins passes",
        "runners": "moee plugins engines",
        "graph": "moee plugins passes quantization forms runners",
        "terminal": "moee graph",
        "timing": "moee plugins engines passes forms runners graph",
        "parity": "moee plugins passes quantization forms runners graph timing",
        "ship": "moee plugins deploy engines passes runners graph parity",
        "targets": "moee plugins deploy engines runners graph ship timing",
        "report": "moee markup front terminal",
        "verification": "moee plugins engines runners graph parity ship",
        "compression": "moee plugins engines plots graph ship terminal timing targets report verification",
        "commands": "moee plugins engines front plots quantization graph ship terminal timing targets report "
        "verification compression clear_ablation demo doctor",
    },
}  # fmt: skip
ON_TOP = {  # what the command line and Python's users import, and no room that does not name it
    "moee": {"moee.api"},
    "exporter": {"exporter.api", "exporter.cli", "exporter.clear_ablation", "exporter.demo", "exporter.doctor", "exporter.start"},
}
MOST_FILES, MOST_LINES = 15, 300


def room_of(module: str) -> str:
    """The room that a module lies in; nothing for a file in none."""
    package, _, inside = module.partition(".")
    room = inside.partition(".")[0]
    return room if room in ROOMS.get(package, {}) else ""


def known_modules(*packages: str) -> dict[str, Path]:
    return {module_of(path): path for package in packages for path in (ROOT / package).rglob("*.py")}


def needed_rooms(package: str) -> dict[str, dict[str, list[str]]]:
    """By room, or by file where that lies in none, what it imports of other rooms, packages and files on top, and who does."""
    known = known_modules(*FORBIDDEN, "exporter")
    needed: dict[str, dict[str, list[str]]] = {room: {} for room in ROOMS[package]}
    for name, path in known_modules(package).items():
        here = room_of(name) or name
        for other in modules_imported(path, set(known)):
            there = room_of(other) or (other.rpartition(".")[2] if other in ON_TOP[package] else "")
            there = there if other.startswith(f"{package}.") else other.partition(".")[0]
            if there and there != here:
                needed.setdefault(here, {}).setdefault(there, []).append(f"{name} imports {other}")
    return needed


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_rooms_import_only_what_they_may(package):
    rooms = ROOMS[package]
    assert {path.name for path in (ROOT / package).iterdir() if path.is_dir() and list(path.glob("*.py"))} == set(rooms)
    wrong = []
    for here, needed in needed_rooms(package).items():
        if here not in rooms and here in {package, *ON_TOP[package]}:
            continue
        allowed = rooms[here].split() if here in rooms else ["moee", "plugins"]
        for there, imports in needed.items():
            wrong += imports if there not in allowed else []
    assert not wrong, "\n".join(wrong)
    order = [*FORBIDDEN, *(name.rpartition(".")[2] for name in ON_TOP[package]), *rooms]
    for room, needs in rooms.items():
        assert all(order.index(need) < order.index(room) for need in needs.split()), f"{room} needs a room above it"


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_a_room_is_allowed_nothing_that_it_does_not_use(package):
    needed = needed_rooms(package)
    unused = {room: sorted(left) for room, needs in ROOMS[package].items() if (left := set(needs.split()) - needed[room].keys())}
    assert not unused, f"take these out of the table and out of the rooms' docstrings: {unused}"


@pytest.mark.parametrize("room", [f"{package}/{room}" for package, rooms in ROOMS.items() for room in rooms])
def test_a_room_says_what_it_is(room):
    package, _, name = room.partition("/")
    said = " ".join((ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or "").split())
    *first, last = ROOMS[package][name].split() or ["no other room"]
    imports = f"Imports {' and '.join(part for part in (', '.join(first), last) if part)}."
    assert said.endswith(imports), f"{room} says something else than: {imports}"


def test_no_folder_is_crowded_and_no_file_long():
    folders = [folder for package in ROOMS for folder in [ROOT / package, *(ROOT / package).rglob("*/")]]
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in folders
        if folder.name != "__pycache__" and (count := sum(path.is_file() for path in folder.iterdir())) > MOST_FILES
    }
    assert not crowded, f"more than {MOST_FILES} files: {crowded}"
    files = [path for package in ("moee", "exporter", "plugins") for path in (ROOT / package).rglob("*")]
    long = {
        str(path.relative_to(ROOT)): count
        for path in files
        if path.suffix in (".py", ".cpp", ".h") and (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long, f"more than {MOST_LINES} lines: {long}"


def test_no_folder_of_the_plugin_is_crowded():
    for folder in (ROOT / "plugins", *(path for path in (ROOT / "plugins").rglob("*") if path.is_dir())):
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".pyc"]
        assert len(files) <= MOST_FILES, f"{folder} has more than {MOST_FILES} files"


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


MOST_POSITIONAL = 5


def test_no_function_takes_many_arguments_by_position():
    """What is behind the fifth is named where it is given."""
    wrong = []
    for package in ("moee", "exporter", "plugins"):
        for path in (ROOT / package).rglob("*.py"):
            if "kernels" not in path.parts:
                wrong += [f"{module_of(path)}.{name}" for name in _many_positional(ast.parse(path.read_text()))]
    assert not wrong, wrong


def _many_positional(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, (ast.ClassDef, ast.Module)) else []
        for function in inner:
            if not isinstance(function, ast.FunctionDef):
                continue
            names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            names = names[1:] if names[:1] in (["self"], ["cls"]) else names
            public = not function.name.startswith("_") or function.name == "__init__"
            marks = " ".join(ast.unparse(mark) for mark in function.decorator_list)
            decided = any(word in marks for word in ("custom_op", "jit", "register"))
            if public and not decided and len(names) > MOST_POSITIONAL:
                yield function.name
