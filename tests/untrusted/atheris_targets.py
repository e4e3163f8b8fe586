"""Coverage-guided fuzzing: `python -m tests.untrusted.atheris_targets TARGET FOLDER [libFuzzer options]`.

FOLDER holds `model` and `export` as the fixture `made` writes them; the targets work on copies. An input loads or is refused in
one sentence; any other exception ends the run with a report and a code other than 0.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["moee", "exporter"], enable_loader_override=False):
    from exporter.onnx_safety import check_onnx, load_ir
    from moee.artifacts import checkpoint
    from moee.errors import UserError
    from moee.methods.recipe import Recipe, method_options
    from moee.models.model import ModelSpec
    from moee.planning.plan import read_plan
    from moee.weights.weights_file import read_safetensors

from tests.untrusted.fuzzing import is_sentence, places, replaced

Target = tuple[Path, Callable[[], object]]  # where an input goes, and what reads it


def manifest(folder: Path) -> Target:
    return folder / "model" / "moee.json", lambda: checkpoint.load(folder / "model")


def plan(folder: Path) -> Target:
    spec = ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs={"depth": 2})
    body = {
        **{"schema": "moee.plan/2", "files": {}, "model": spec.model_dump(mode="json")},
        "winner": {"method": "kmeans", "recipe": Recipe.of(method_options()).to_json()},
    }
    (folder / "plan.json").write_text(json.dumps(body))
    return folder / "plan.json", lambda: read_plan(folder / "plan.json", spec)


def weights(folder: Path) -> Target:
    """A checkpoint's tensors under a hash that fits, so that everything behind the hash is reached."""
    path, described = folder / "model" / "model.safetensors", folder / "model" / "moee.json"
    body = json.loads(described.read_text())

    def load() -> None:
        body["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        described.write_text(json.dumps(body))
        try:
            read_safetensors(path)
        finally:
            checkpoint.load(folder / "model")

    return path, load


def graph(folder: Path) -> Target:
    path = folder / "export" / "tensorrt.onnx"

    def load() -> None:
        check_onnx(path)
        load_ir(path)

    return path, load


TARGETS: dict[str, Callable[[Path], Target]] = {"manifest": manifest, "plan": plan, "checkpoint": weights, "onnx": graph}


VALUES = [
    None, True, -1, 0, 1, 2**70, 1e308, float("nan"), "", "..", "/etc/passwd", "x" * 2000, "\x1b[2J", [], {}, [[[[]]]], [0] * 500,
]  # fmt: skip


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time a value of the JSON is replaced, so that inputs stay readable; else bytes are, as libFuzzer does."""
    source = random.Random(seed)
    try:
        body = json.loads(data) if source.random() < 0.5 else None
    except (ValueError, RecursionError):
        body = None
    spots = [p for p in places(body) if p] if isinstance(body, (dict, list)) else []
    if not spots:
        return atheris.Mutate(data, max_size)
    other = source.choice([*VALUES, *(dig(body, p) for p in source.sample(spots, min(3, len(spots))))])
    return json.dumps(replaced(body, source.choice(spots), other)).encode()[:max_size]


def dig(body: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        body = body[key]
    return body


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name) / "made", Path(name) / "corpus"
        shutil.copytree(sys.argv[2], folder)
        corpus.mkdir()
        path, load = TARGETS[sys.argv[1]](folder)
        shutil.copy(path, corpus / "good")

        def one_input(data: bytes) -> None:
            path.write_bytes(data)
            try:
                load()
            except UserError as error:
                assert is_sentence(error), repr(str(error))

        one_input((corpus / "good").read_bytes())
        options = [sys.argv[0], f"-artifact_prefix={folder}/", *sys.argv[3:], str(corpus)]
        atheris.Setup(options, one_input, **({"custom_mutator": mutate_json} if path.suffix == ".json" else {}))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
