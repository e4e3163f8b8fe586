"""What our commands write, and how it is known again: every kind of folder and of file that has a place of its own."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moee.schema import parse_json, split

OURS_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")  # what moee.store.atomic leaves when it is killed
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of file managers, which nobody misses
HEAD_BYTES, BLOCK_BYTES = 4096, 1 << 20
CARD = "MODEL_CARD.md"  # of a model, an export, engines or a bundle: what `moee.artifacts.card` writes of its manifest
BUILT_IN_DATA = ("digits", "photos", "photo-crops")  # names of data that lie in no file


@dataclass(frozen=True)
class FolderKind:
    """What a command writes as a folder: `what` it is, its manifest and that one's schema.

    `beside` are patterns of further files that our own commands put there. `signs` are patterns of files and the bytes that they
    begin with or hold near the beginning: a folder that holds nothing else is of this kind too, although its manifest is missing.
    `refusals` are such signs of what a refused command left: a folder that holds nothing else is replaced without `--force`.
    """

    what: str
    manifest: str
    schema: str
    beside: tuple[str, ...] = ()
    signs: tuple[tuple[str, bytes], ...] = ()
    refusals: tuple[tuple[str, bytes], ...] = ()


MODEL = FolderKind("a model of moee extract or finetune", "moee.json", "moee.model")
EXPORT = FolderKind("an export", "export.json", "moee.export")
ENGINE = FolderKind("an engine folder", "engine.json", "moee.engine")
PLAN = FolderKind("a plan", "plan.json", "moee.plan")
VERIFY = FolderKind(
    "a result of moee verify", "parity.json", "moee.parity", signs=(("junit.xml", b'<testsuites name="moee verify"'),),
    refusals=(("junit.xml", b'<testsuites name="moee verify" tests="1" failures="0" errors="1"'),),
)  # fmt: skip
DEPLOYMENT = FolderKind(
    "a bundle for a device", "deployment.json", "moee.deployment",
    beside=(  # what its build.sh makes in it
        "plugin.log", "selftest.log", "runner.log", "plugin/build/*", "selftest/build/*", "runner/build/*", "engines/*",
        "engines.new/*", "timing.cache", "selftest.json", "triton/model_repository/*/1/*",
    ),
)  # fmt: skip
PLUGIN_BUNDLE = FolderKind(
    "a plugin bundle", "bundle.json", "moee.bundle", beside=("build/*", "selftest/build/*", "selftest.json")
)
KERNELS = FolderKind("compiled kernels", "kernels.json", "moee.kernels", beside=("*.cubin", "*.ptx"))
PLOTS = FolderKind(
    "plots", "routing.json", "moee.plot-routing",
    beside=(
        "examples.json",
        *(f"{name}.{form}" for name in ("routing", "similarity", "curves", "patches") for form in ("json", "svg")),
    ),
)  # fmt: skip
FRONT = FolderKind("the front of a plan", "front.json", "moee.plot-front", beside=("front.svg",))
ABLATION = FolderKind(
    "an ablation", "setup.json", "moee.ablation-setup",
    beside=("cells/*.json", "ablation.json", "table.md", "table*.svg", "fig*.svg"),
)  # fmt: skip
CLEAR_ABLATION = FolderKind("an ablation of CLEAR-MoE", "setup.json", "moee.clear-setup", beside=("*-s[0-9]*.json",))
FINETUNE_STATE = FolderKind(
    "an interrupted fine-tuning", "state.json", "moee.finetune",
    beside=("state-*.safetensors",), signs=(("state-*.safetensors", b""),),
)  # fmt: skip
EMITTED = "emitted.json"  # what a plan keeps of the candidates that are measured elsewhere
PLAN_STATE = FolderKind(
    "an interrupted plan", "identity.json", "moee.plan-store", beside=("[0-9a-f]" * 16 + ".json", EMITTED)
)
EMIT = FolderKind(
    "candidates for a device", "emit.json", "moee.emit",
    beside=(  # what its measure.sh makes in it
        "plugin/build/*", "engines/*", "logs/*", "timing.cache", "RESULT.json", "RESULT.json.new",
    ),
)  # fmt: skip
COMPRESSION = FolderKind("a result of moee compress", "compress.json", "moee.compress")
FOLDER_KINDS = (
    MODEL, EXPORT, ENGINE, PLAN, VERIFY, DEPLOYMENT, PLUGIN_BUNDLE, KERNELS, PLOTS, FRONT, ABLATION, CLEAR_ABLATION,
    FINETUNE_STATE, PLAN_STATE, EMIT, COMPRESSION,
)  # fmt: skip


@dataclass(frozen=True)
class FileKind:
    """What a command writes as a file: `what` it is, the endings of its name, and how it is known again: the JSON `schema`, or
    bytes that it begins with (`magic`), or that stand in it (`mark`, within the first `HEAD_BYTES` if `early`).

    `kept`: an earlier one is overwritten with `--force` only. `sealed`: nothing else ever is, and it never lies in an input.
    """

    what: str
    endings: tuple[str, ...]
    schema: str = ""
    magic: bytes = b""
    mark: bytes = b""
    early: bool = True
    kept: bool = False
    sealed: bool = False

    def wrote(self, path: Path) -> bool:
        """Whether the regular file `path` is of this kind; an empty one counts, since nothing is lost with it."""
        if not self.schema:
            with open(path, "rb") as file:
                head = file.read(HEAD_BYTES)
                if not head.startswith(self.magic):
                    return not head
                return self.mark in head or not head or (not self.early and self._marked(file, head))
        if path.stat().st_size == 0:
            return True
        body = read_object(path)
        return body is not None and family(body) == self.schema and "files" not in body

    def _marked(self, file: BinaryIO, read: bytes) -> bool:
        """Whether the mark stands in the rest of a file, of which `read` came last; block by block, for files of any size."""
        while block := file.read(BLOCK_BYTES):
            read = read[-len(self.mark):] + block
            if self.mark in read:
                return True
        return False


LATENCY = FileKind("a result of moee bench", (".json",), schema="moee.latency")
PARITY = FileKind("a result of moee verify", (".json",), schema="moee.parity")
DISPATCH = FileKind("a result of moee bench-dispatch", (".json",), schema="moee.dispatch")
EXAMPLES = FileKind("examples for a report", (".json",), schema="moee.examples")
SUMMARY = FileKind("a demo's summary", (".json",), schema="moee.summary")
REPORT = FileKind("a report", (".html", ".htm"), magic=b"<!doctype html>", mark=b"<title>MoEE report: ", early=False, kept=True)
CLEAR_TABLE = FileKind(
    "a table of moee ablate-clear", (".md", ".txt"), magic=b"| router | rank | experts | images | seeds | MACs |"
)
CLEAR_PLOT_TITLE = "moee ablate-clear"
CLEAR_PLOT = FileKind("a plot of moee ablate-clear", (".svg",), mark=f"<dc:title>{CLEAR_PLOT_TITLE}<".encode())
PLUGIN = FileKind("a plugin library", (".so",), magic=b"\x7fELF", mark=b"moee-plugin-headers=", early=False)
TIMING_CACHE = FileKind("a timing cache of TensorRT", (), magic=b"ptrt", sealed=True)  # an engine begins with ftrt or vtrt


def family(body: Any) -> str:
    """`moee.model` of a body whose schema is `moee.model/1`, in any version; empty for anything else."""
    parts = split(body.get("schema")) if isinstance(body, dict) else None
    return parts[0] if parts else ""


def kind_of(folder: Path) -> FolderKind | None:
    """Which artifact a folder holds, by its manifest."""
    for kind in FOLDER_KINDS:
        body = read_object(folder / kind.manifest)
        if body is not None and family(body) == kind.schema:
            return kind
    return None


def made_from(path: Path) -> list[str]:
    """Weights, data and the artifact that an artifact, or its manifest, says it was made from."""
    kind = kind_of(path) if path.is_dir() else None
    body = read_object(path / kind.manifest) if kind is not None else read_object(path) if path.suffix == ".json" else None
    if body is None or not family(body).startswith("moee."):
        return []
    folder, model, source = path if path.is_dir() else path.parent, body.get("model"), body.get("source")
    data = body.get("data")
    if isinstance(data, str) and data.partition(":")[0] in BUILT_IN_DATA:
        data = None
    named = [model.get("weights") if isinstance(model, dict) else None, data]
    named += [os.path.join(folder, source)] if isinstance(source, str) else []
    return [name for name in named if isinstance(name, str) and "\0" not in name]


def artifact_of(file: Path) -> tuple[Path, FolderKind] | None:
    """The folder, and what it is, whose manifest lists `file` or is it."""
    for folder in file.parents:
        for kind in FOLDER_KINDS:
            body = read_object(folder / kind.manifest)
            if body is None or family(body) != kind.schema or not isinstance(body.get("files"), dict):
                continue
            if file == folder / kind.manifest or str(file.relative_to(folder)) in body["files"]:
                return folder, kind
    return None


def files_below(folder: Path) -> Iterator[str]:
    """Relative names of everything below a folder that is no folder; what killed runs of ours left in it is not named."""
    for base, folders, files in os.walk(folder, onerror=_raise):
        linked = [name for name in folders if os.path.islink(os.path.join(base, name))]
        folders[:] = sorted(name for name in folders if not is_litter(name) and name not in linked)
        for name in sorted([*files, *linked]):
            if not is_litter(name):
                yield os.path.relpath(os.path.join(base, name), folder)


def _raise(error: OSError) -> None:
    raise error


def is_litter(name: str) -> bool:
    """Whether a file of this name may lie anywhere: what systems leave, or an unfinished file of ours."""
    return name in LITTER or OURS_UNFINISHED.fullmatch(name) is not None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a relative name is one of the patterns', part by part; a pattern that ends in `/*` holds at any depth below."""
    return any(_matches(name.split("/"), pattern.split("/")) for pattern in patterns)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    deep = len(pattern) > 1 and pattern[-1] == "*"
    fits = len(parts) >= len(pattern) if deep else len(parts) == len(pattern)
    return fits and all(map(fnmatch.fnmatchcase, parts, pattern))


def is_signed(path: Path, signs: Iterable[tuple[str, bytes]]) -> bool:
    """Whether a file is what one of the signs says."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    return any(fnmatch.fnmatchcase(path.name, pattern) and mark in head for pattern, mark in signs)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none, through a link neither."""
    try:
        body = None if path.is_symlink() else parse_json(path)
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None
