"""TensorRT engines from an export folder. TensorRT-RTX builds on a machine without a GPU; TensorRT needs one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from exporter.belonging import BELONGS_TO, export_ids
from exporter.manifests import BACKENDS, ENGINE, ENGINE_SCHEMA, read_engine, read_export
from exporter.onnx_safety import check_onnx
from moee.artifacts.card import pass_card
from moee.errors import MissingDependency, StepFailed, UserError
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.places.placement import check_all
from moee.store.artifact import read_manifest, sha256_file, write_manifest
from moee.store.result_kinds import ENGINE as ENGINE_FOLDER
from moee.store.result_kinds import TIMING_CACHE
from moee.store.scratch import temporary_folder
from plugins.contract import DOMAIN, OP_TYPE
from plugins.library.build import describe_plugin

SCHEMA = ENGINE_SCHEMA

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Engine:
    """One built engine. `file` is relative to the engine folder."""

    file: str
    sha256: str
    size_bytes: int
    build_s: float


@dataclass(frozen=True, repr=False)
class EngineReport:
    """What `build_engines` made; `plugin_layers` is counted in the parsed network."""

    folder: Path
    builder: str
    target: str
    batch: tuple[int, int, int]
    plugin: str
    plugin_layers: int
    dense: Engine
    moee: Engine

    def __repr__(self) -> str:
        """One line, as a notebook shows it."""
        low, optimal, high = self.batch
        return (
            f"EngineReport({self.dense.file} and {self.moee.file} in {str(self.folder)!r}, by {self.builder} for {self.target}, "
            f"batches {low} to {high}, tuned for {optimal}; {self.plugin_layers} layers by the plugin)"
        )


class BuildFailed(StepFailed):
    """TensorRT gave up or aborted; the message holds its last words."""


def build_engines(
    export_dir: Path,
    out_dir: Path,
    *,
    plugin: Path | None,
    backend: str = "tensorrt-rtx",
    batch: tuple[int, int, int] = (1, 8, 32),
    timing_cache: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    log: Path | None = None,
) -> EngineReport:
    """Build `dense.plan` and `moee.plan` from an export folder, and write them with `engine.json` to `out_dir`.

    `batch` is the profile's (min, opt, max). The plugin library is copied beside the engines; an export that needs none
    (CLEAR-MoE, layers of one expert) takes None. `log` receives TensorRT's verbose messages of the MoEE build, the plugin's call
    trace included.
    Raises `UserError` for bad input, `MissingDependency` if the back end is not installed, `BuildFailed` otherwise.
    """
    export_dir, out_dir = Path(export_dir), Path(out_dir)
    say = progress or (lambda text: None)
    low, opt, high = batch
    if not 1 <= low <= opt <= high:
        raise UserError(f"batch profile {low}/{opt}/{high} must satisfy 1 <= min <= opt <= max")
    require_backend(backend)
    inputs = source_paths(export_dir, plugin)
    output = OutputFolder(out_dir, ENGINE_FOLDER, force, inputs)
    cache = OutputFile(timing_cache, TIMING_CACHE, inputs=inputs, option="--timing-cache") if timing_cache is not None else None
    check_all([output, *([cache] if cache else [])])
    export = read_export(export_dir)
    graphs = {"dense": _graph(export_dir, export, "dense"), "moee": _graph(export_dir, export, "tensorrt")}
    nodes = count_plugin_nodes(graphs["moee"])
    if nodes == 0 and export.get("plugin_nodes") != 0:
        raise UserError(f"{graphs['moee']} has no {OP_TYPE} nodes; build from a folder that `moee export` wrote")
    if nodes and plugin is None:
        raise UserError(f"{graphs['moee']} has {nodes} {OP_TYPE} nodes, which need the plugin library; give it with --plugin")
    info = describe_plugin(Path(plugin)) if plugin is not None and nodes else None
    results: dict[str, dict[str, Any]] = {}
    with _timing_cache(cache) as cache_file, output.write() as folder:
        library = folder / Path(plugin).name if plugin is not None and info is not None else None
        if library is not None and plugin is not None:
            shutil.copy2(plugin, library)
        for name, graph in graphs.items():
            say(f"building {name}.plan with {backend}")
            spec = {
                **{"backend": backend, "onnx": str(graph.resolve()), "plan": str(folder / f"{name}.plan")},
                **{"plugin": str(library) if library is not None and name == "moee" else "", "batch": list(batch)},
                "timing_cache": cache_file,
                "log": str(Path(log).resolve()) if log and name == "moee" else "",
            }
            results[name] = run_worker(spec, _prefixed(say, name))
        if results["moee"]["plugin_layers"] != nodes:
            parsed = results["moee"]["plugin_layers"]
            raise BuildFailed(f"the graph has {nodes} {OP_TYPE} nodes, but TensorRT parsed {parsed} plugin layers")
        body = {
            "builder": _builder(backend, results["moee"]),
            "target": _target(backend),
            "batch": {"min": low, "opt": opt, "max": high},
            "plugin": {"file": "", "sha256": "", "headers": ""},  # of an export that needs none
            "plugin_layers": results["moee"]["plugin_layers"],
            "source_sha256": sha256_file(graphs["moee"]),
            BELONGS_TO: export_ids(export),
            "engines": {name: _engine(folder / f"{name}.plan", result) for name, result in results.items()},
        }
        if library is not None and info is not None:
            body["plugin"] = {"file": library.name, "sha256": sha256_file(library), "headers": info.headers}
        pass_card(export_dir, export, folder)
        write_manifest(folder, "engine.json", SCHEMA, body)
    return report_of(out_dir, body)


@contextmanager
def _timing_cache(place: OutputFile | None) -> Iterator[str]:
    """A copy of the timing cache for the workers, empty for none; what they leave in it takes its place at the end."""
    if place is None:
        yield ""
        return
    with temporary_folder() as scratch:
        copy = scratch / "timing.cache"
        if place.place.exists():
            shutil.copyfile(place.place, copy)
        try:
            yield str(copy)
        finally:  # a failed build has timed tactics too
            if copy.exists() and copy.stat().st_size:
                with place.write() as temporary:
                    shutil.copyfile(copy, temporary)


def _prefixed(say: Progress, name: str) -> Progress:
    return lambda text: say(f"{name}: {text}")


def read_engines(folder: Path) -> EngineReport:
    """The report of an engine folder, hashes checked. Raises `UserError` for a foreign or damaged one."""
    body = read_engine(folder)
    read_manifest(folder, ENGINE, ENGINE_SCHEMA)  # the hashes
    return report_of(Path(folder), body)


def report_of(folder: Path, body: dict[str, Any]) -> EngineReport:
    """`body` as written in engine.json."""
    batch = body["batch"]
    return EngineReport(
        folder,
        body["builder"],
        body["target"],
        (batch["min"], batch["opt"], batch["max"]),
        body["plugin"]["file"],
        body["plugin_layers"],
        *(Engine(**{f.name: body["engines"][name][f.name] for f in fields(Engine)}) for name in ("dense", "moee")),
    )


def require_backend(backend: str) -> None:
    """Raises `UserError` for an unknown back end, `MissingDependency` for one that is not installed."""
    if backend not in BACKENDS:
        raise UserError(f"unknown back end {backend!r}; expected one of {', '.join(BACKENDS)}")
    module, _, extra = BACKENDS[backend]
    if importlib.util.find_spec(module) is None:
        raise MissingDependency(f"{backend} is not installed; run `pip install 'moee[{extra}]'`")


def needs_plugin(export_dir: Path | str) -> bool:
    """Whether the TensorRT graph of an export folder holds plugin nodes; CLEAR-MoE layers and those of one expert are standard
    operators. Raises `UserError` for graphs that cannot be built, before minutes are spent on a plugin for them."""
    export = read_export(export_dir)
    for key in ("dense", "tensorrt"):
        _graph(Path(export_dir), export, key)
    return export.get("plugin_nodes") != 0


def count_plugin_nodes(graph: Path) -> int:
    """MoeeFfn nodes in an ONNX file (its weights are not read). Raises `UserError` if it cannot be read or is unsafe."""
    model = check_onnx(graph)
    return sum(node.op_type == OP_TYPE and node.domain == DOMAIN for node in model.graph.node)


def _graph(folder: Path, export: dict[str, Any], key: str) -> Path:
    name = export.get("graphs", {}).get(key, f"{key}.onnx")
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing; export.json names it as the {key} graph; export again")
    check_onnx(folder / name)
    return folder / name


def _engine(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"file": path.name, "sha256": sha256_file(path)},
        **{"size_bytes": path.stat().st_size, "build_s": result["build_s"]},
    }


def _builder(backend: str, result: dict[str, Any]) -> str:
    return f"{backend} {result['version']} (built on {'GPU' if result['gpus'] else 'CPU'})"


def _target(backend: str) -> str:
    if backend == "tensorrt-rtx":
        return "any GPU that TensorRT-RTX supports; compiled for it and tactics timed when it is first loaded"
    return "the GPU model that built it"


def library_path(backend: str, folder: Path) -> dict[str, str]:
    """Environment for the worker. TensorRT-RTX's ONNX parser opens `libtensorrt_rtx.so` by a name that its wheel does
    not install, and aborts without it: `folder` gets a link of that name, and the loader looks there first."""
    environment = dict(os.environ)
    wheel = BACKENDS[backend][1]
    spec = importlib.util.find_spec(wheel) if wheel else None
    if spec is None or not spec.submodule_search_locations:
        return environment
    for library in sorted(Path(spec.submodule_search_locations[0]).glob("lib*.so.*")):
        link = folder / f"{library.name.split('.so.')[0]}.so"
        if not link.exists():
            link.symlink_to(library)
    before = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = f"{folder}{os.pathsep}{before}" if before else str(folder)
    return environment


def run_worker(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Run one build in a child process and return its result. Raises `UserError` or `BuildFailed`."""
    with temporary_folder() as folder:
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        environment = library_path(spec["backend"], folder)
        root = str(Path(__file__).resolve().parent.parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "exporter.engines.worker", str(folder / "spec.json"), str(os.getpid())]
        last: dict[str, Any] = {}
        with open(folder / "stderr", "w+", encoding="utf-8", errors="replace") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    last = _message(line) or last
                    if "progress" in last:
                        progress(last["progress"])
                code = child.wait()
            finally:
                child.kill()
                child.wait()
            errors.seek(0)
            tail = " ".join(errors.read().split())[-600:]
    if "result" in last and code == 0:
        return last["result"]
    if last.get("kind") == "disk" and last["errno"] is not None:
        raise OSError(last["errno"], os.strerror(last["errno"]), last["file"] or spec["plan"])
    if "error" in last:
        raise (UserError if last["kind"] == "input" else BuildFailed)(last["error"])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    raise BuildFailed(f"the {spec['backend']} build of {spec['onnx']} {how}: {tail or 'it said nothing'}")


def _message(line: str) -> dict[str, Any] | None:
    """One line of the worker; TensorRT prints to stdout too, so other lines are skipped."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and value.keys() & {"progress", "result", "error"} else None
