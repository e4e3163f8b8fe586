"""Which files belong together: an export to the artifact that it was made from, a result or an engine to its export.

Files say it under `belongs_to`, as digests of what they were made from or measured. A file of before that field says nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moee.errors import UserError
from moee.store.artifact import read_json, sha256_file
from moee.store.result_kinds import CARD

BELONGS_TO = "belongs_to"
ARTIFACT, EXPORT = "artifact", "export"
# What makes a graph, also in a bundle, which holds no reference.onnx.
GRAPH_FILES = ("dense.onnx", "portable.onnx", "tensorrt.onnx", "runtime.onnx", "dense.data", "moee.data")


def artifact_ids(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What identifies the artifact of a `moee.json`: the hashes of its weights, and what it says of model and layers."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        return {}
    weights = {name: digest for name, digest in files.items() if name != CARD}  # whose words are no part of the model
    facts = {"files": weights, **{key: manifest.get(key) for key in ("model", "layers", "attention")}}
    if manifest.get("merging") is not None:  # artifacts of before have none
        facts["merging"] = manifest["merging"]
    return {ARTIFACT: _digest(facts)}


def export_ids(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What identifies an `export.json`, by the hashes of its graphs and weights, and the artifact that it was made from. This is
    what a result of the export records."""
    files = manifest.get("files")
    graphs = {name: files[name] for name in GRAPH_FILES if name in files} if isinstance(files, dict) else {}
    own = {EXPORT: _digest(graphs)} if graphs else {}
    said = recorded(manifest)
    return {**({ARTIFACT: said[ARTIFACT]} if ARTIFACT in said else {}), **own}


def recorded(body: Mapping[str, Any]) -> dict[str, str]:
    """What a file says that it belongs to; nothing for an older file."""
    said = body.get(BELONGS_TO)
    given = said if isinstance(said, dict) else {}
    return {key: given[key] for key in (ARTIFACT, EXPORT) if isinstance(given.get(key), str)}


def source_ids(source: Path | str | None) -> dict[str, str]:
    """What identifies the artifact in the folder `source`; nothing where none lies there."""
    path = Path(source) / "moee.json" if source is not None else None
    body = read_json(path) if path is not None and path.is_file() else None
    return artifact_ids(body) if isinstance(body, dict) else {}


def dense_ids(model: Any) -> dict[str, str]:
    """What identifies a dense model that was exported as it is, by its description in a manifest: never what was cut from it."""
    return {ARTIFACT: _digest({"dense": model})}


def same(one: Mapping[str, str], other: Mapping[str, str]) -> bool | None:
    """Whether two files are of one model and, where both say it, of one export; None where they do not tell."""
    common = one.keys() & other.keys()
    return all(one[key] == other[key] for key in common) if common else None


def built_from(engine: Mapping[str, Any], export: Mapping[str, Any], graph: Path) -> bool | None:
    """Whether an `engine.json` is of an `export.json`, whose graph with plugin nodes is the file `graph`; None where the engine
    does not tell: the hash of the graph alone tells no weights, which lie in another file."""
    source = engine.get("source_sha256")
    if source is not None and source != sha256_file(graph):
        return False
    return same(recorded(engine), export_ids(export))


def refuse_replaced(export: Mapping[str, Any], source: Path) -> None:
    """Raise `UserError` if another model lies now where the artifact of an `export.json` was."""
    if same(source_ids(source), {key: value for key, value in recorded(export).items() if key == ARTIFACT}) is False:
        raise UserError(f"the model in {source} is not the one that was exported, it was made again; export again")


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
