"""Tiny exports, traced once a session and copied by the tests that damage them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from exporter.graph.export import export
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.data.image_set import TensorSet
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model
from moee.store.artifact import read_manifest, write_json
from moee.store.artifact import sha256_file as sha256
from moee.store.tensor_file import write_tensors
from tests.conftest import extract, teach, tiny_images, tiny_spec


@dataclass(frozen=True)
class TinyExport:
    """A model with Euclidean routing (its biases are not zero), its images, its artifact, and its exports by precision."""

    moee: MoeeModel
    data: TensorSet
    root: Path

    def folder(self, precision: str = "fp32") -> Path:
        path = self.root / precision
        if not path.exists():
            export(self.moee, path, source=self.root / "model", precision=precision)
        return path

    def copy(self, target: Path, precision: str = "fp32") -> Path:
        shutil.copytree(self.folder(precision), target)
        return target


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory) -> TinyExport:
    torch.manual_seed(0)
    data = tiny_images(classes=10)
    model = teach(load_model(tiny_spec()), data)
    root = tmp_path_factory.mktemp("tiny-export")
    weights = root / "dense.safetensors"
    write_tensors(model.state_dict(), weights)
    found = {"weights": str(weights), "weights_sha256": sha256(weights), "random_seed": None}
    spec = tiny_spec().model_copy(update=found)
    config = method_options(clustering="kmeans", clusters=4, cluster_tokens=500, routing="euclidean")
    extract(model, data, config)
    moee = MoeeModel(model.eval(), spec, Recipe.of(config), "digits")
    checkpoint.save(moee, root / "model")
    return TinyExport(moee, data, root)


def rehash(folder: Path, name: str = "export.json") -> None:
    """Make a damaged folder's manifest agree with its files again: a wrong exporter would have written it so."""
    manifest = read_manifest(folder, name, {"export.json": "moee.export/1", "engine.json": "moee.engine/1"}[name], verify=False)
    manifest["files"] = {item: sha256(folder / item) for item in manifest["files"]}
    write_json(folder / name, manifest)
