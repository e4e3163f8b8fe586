"""Run by test_extending.py in a copy of the project that has the activation of docs/extending.md: a model with it, from its
recognition to its verified export, as JSON."""

import json
import sys
from pathlib import Path

import onnx

from exporter.graph.export import export
from exporter.verification import verify
from moee.artifacts.model import MoeeModel
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe, method_options
from moee.mlps.find import find_ffns
from moee.models.model import load_model
from tests.conftest import extract, tiny_images, tiny_spec


def main(folder: Path) -> None:
    spec, data = tiny_spec(act_layer="relu6"), tiny_images()
    model = load_model(spec)
    recognised = [ffn.activation for ffn in find_ffns(model).ffns]
    options = method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    extract(model, data, options)
    moee = MoeeModel(model.eval(), spec, Recipe.of(options), "tiny")
    export(moee, folder)
    graph = onnx.load(folder / "tensorrt.onnx", load_external_data=False).graph
    facts = {
        "recognised": recognised,
        "routed": [layer.activation for layer in routed_layers(model).values()],
        "plugin_nodes": [a.s.decode() for node in graph.node for a in node.attribute if a.name == "activation"],
        "verified": bool(verify(folder, moee, data, sizes=(1, 4), images=0)),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
