"""Damage to manifests, weights and graphs that hashes do not show, and what is said of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def changed_manifest(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change the manifest of an artifact in place."""
    body = json.loads((folder / "moee.json").read_text())
    change(body)
    (folder / "moee.json").write_text(json.dumps(body))


def layer(**fields) -> Callable[[dict], Any]:
    return lambda body: body["layers"][0].update(fields)


def stage(**fields) -> Callable[[dict], Any]:
    return lambda body: body["info"].update(stages={"extracted": {"data": "digits", **fields}})


COST = {"macs": 2.0, "params": 1.0}
MANIFESTS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "load of another length": (lambda body: body["layers"][0]["load"].append(0), "load of "),
    "load below zero": (lambda body: body["layers"][0]["load"].__setitem__(0, -1), "load.0: "),
    "load above all tokens": (lambda body: body["layers"][0]["load"].__setitem__(0, 10**6 + 1), "load.0: "),
    "load of 10^40": (lambda body: body["layers"][0]["load"].__setitem__(0, 10**40), "load.0: "),
    "load as text": (layer(load="half"), "load: "),
    "unknown activation": (layer(activation="mish"), "unknown activation 'mish'"),
    "activation of another type": (layer(activation=7), "activation: "),
    "a surrogate in a name": (layer(name="blocks.0.\ud800"), "name: "),
    "a hyperlink in a name": (layer(name="[link=file:///etc/passwd]x"), "[link=file:///etc/passwd]x"),
    "an escape in a name": (layer(name="\x1b]8;;file:///x\x07y"), "control characters"),
    "a line end in a name": (layer(name="blocks\n0"), "control characters"),
    "more experts a token than there are": (layer(top_k=99), "top_k 99 exceeds"),
    "experts without end": (layer(experts=10**12), "should have shape"),
    "a figure without its cost": (stage(retention={"accuracy": 0.5}), "has its cost too"),
    "accuracy as text": (stage(retention={"accuracy": "good"}, cost={"dense": COST, "moee": COST}), "accuracy: "),
    "MACs of nothing": (stage(retention={}, cost={"dense": {"macs": 0.0, "params": 1.0}, "moee": COST}), "macs: "),
    "shares that are no shares": (stage(shares={"blocks.0.mlp": [2.0]}), "shares.blocks.0.mlp.0: "),
    "shares of other experts": (stage(shares={"blocks.0.mlp": [0.5] * 99}), "99 shares for the"),
    "a seed of 10^40": (lambda body: body["recipe"]["steps"][0].update(seed=10**40), "seed: expected a whole number"),
    "a share of 90": (lambda body: body["recipe"]["steps"][0].update(keep=90), "keep: expected a share"),
    "an unknown method": (lambda body: body["recipe"]["steps"][0].update(method="magic"), "unknown method 'magic'"),
    "a recipe without steps": (lambda body: body.update(recipe={"steps": []}), "no step that cuts MLPs"),
    "no layers": (lambda body: body.update(layers=[]), "expected layers, or merging"),
    "merging as text": (lambda body: body.update(merging="half"), "merging: "),
    "a layer twice": (lambda body: body["layers"].append(body["layers"][0]), "lists a layer twice"),
    "a layer that is not there": (layer(name="blocks.99.mlp"), "which VisionTransformer does not have"),
    "no hashes": (lambda body: body.update(files={}), "has no hash of"),
    "hashes as a list": (lambda body: body.update(files=[]), "lists no files"),
    "a file outside": (lambda body: body["files"].update({"../x": "0" * 64}), "leaves its folder"),
    "a model from the network": (lambda body: body["model"].update(timm_name="hf-hub:x/y", name="x"), "unknown model"),
    "an argument that opens a file": (lambda body: body["model"]["kwargs"].update(checkpoint_path="/x"), "it would open files"),
    "a newer version": (lambda body: body.update(schema="moee.model/99"), "a newer version wrote it"),
    "another schema": (lambda body: body.update(schema="other/1"), "has schema 'other/1'"),
    "a switch that is no switch": (lambda body: body["model"].update(pretrained="perhaps"), "pretrained: "),
}  # fmt: skip

ROUTER = "blocks.0.mlp.router"


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill_(0, torch.tensor([0]), value)


WEIGHTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    **{f"NaN in {part}": (f"blocks.0.mlp.{part}", filled(float("nan")), "not finite")
       for part in ("router", "router_bias", "w_up", "b_up", "w_down", "b_out")},
    "infinity in the router": (ROUTER, filled(float("inf")), "not finite"),
    "NaN in the attention": ("blocks.0.attn.qkv.weight", filled(float("nan")), "not finite"),
    "NaN in the head": ("head.weight", filled(float("nan")), "not finite"),
    **{f"a router as {str(kind).removeprefix('torch.')}": (ROUTER, lambda t, kind=kind: t.to(kind),
        "router should be torch.float32")
       for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool,
                    torch.complex64, torch.float8_e4m3fn)},
    "a router without rows": (ROUTER, lambda t: t[:0], "should have shape"),
    "a router of one more row": (ROUTER, lambda t: torch.cat([t, t[:1]]), "should have shape"),
    "a router transposed": (ROUTER, lambda t: t.T, "should have shape"),
    "neuron ids past the store": ("blocks.0.mlp.neurons", lambda t: t.index_fill_(0, torch.tensor([len(t) - 1]), 2**30),
    "lies outside"),
    "neuron ids below zero": ("blocks.0.mlp.neurons", lambda t: t.index_fill_(0, torch.tensor([0]), -1), "lies outside"),
    "offsets that fall": ("blocks.0.mlp.offsets", lambda t: t.flip(0), "do not rise"),
    "offsets that wrap round": (
        "blocks.0.mlp.offsets", lambda t: torch.cat([t[:1], torch.tensor([2**31 - 1, -2], dtype=torch.int32), t[3:]]),
        "do not rise"
    ),
}  # fmt: skip


def _node(model: ModelProto) -> NodeProto:
    return next(node for node in model.graph.node if node.op_type == "MoeeFfn")


def attribute(name: str, value: Any) -> Callable[[ModelProto], None]:
    """Set an attribute of the first MoeeFfn."""

    def change(model: ModelProto) -> None:
        node = _node(model)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def table(index: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ModelProto], None]:
    """Change the initialiser behind an input of the first MoeeFfn."""

    def apply(model: ModelProto) -> None:
        name = _node(model).input[index]
        tensor = next(each for each in model.graph.initializer if each.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy())), name))

    return apply


def _without(name: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        node = _node(model)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)

    return change


def _twice(model: ModelProto) -> None:
    node = _node(model)
    node.attribute.append(next(each for each in node.attribute if each.name == "max_width"))


def _opset(domain: str, version: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        for opset in model.opset_import:
            if opset.domain == domain:
                opset.version = version

    return change


def _from_later(model: ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def _no_initialiser(model: ModelProto) -> None:
    name = _node(model).input[3]
    kept = [each for each in model.graph.initializer if each.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _initialiser_twice(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _other_domain(model: ModelProto) -> None:
    model.graph.node[0].domain = "com.example"


def _outside(location: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def _terabyte(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**20, 2**20]


GRAPHS: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "an unknown attribute": (attribute("temperature", 2), "attribute 'temperature' is unknown"),
    "load as text": (attribute("load", "x"), "'load' is not of the type ints"),
    "load of another length": (attribute("load", [1]), "load must be"),
    "load below zero": (attribute("load", [-1, 0, 0]), "load must be"),
    "load above all tokens": (attribute("load", [2**40, 0, 0]), "load must be"),
    "unknown activation": (attribute("activation", "mish"), "activation 'mish'"),
    "activation as a number": (attribute("activation", 1), "'activation' is not of the type string"),
    "top_k of none": (attribute("top_k", 0), "top_k 0"),
    "top_k of more": (attribute("top_k", 99), "top_k 99"),
    "top_k as a share": (attribute("top_k", 0.5), "'top_k' is not of the type int"),
    "max_width too small": (attribute("max_width", 1), "max_width 1"),
    "max_width too large": (attribute("max_width", 2**40), "max_width 1099511627776"),
    "no max_width": (_without("max_width"), "'max_width' is missing"),
    "an attribute twice": (_twice, "is given twice"),
    "a graph in an attribute": (attribute("load", helper.make_graph([], "g", [], [])), "is a loop|not of the type"),
    "ONNX of the future": (_opset("", 99), "needs version 99"),
    "ONNX of version 0": (_opset("", 0), "needs version 0"),
    "the plugin of the future": (_opset("moee", 2), "needs version 2 of the operators of moee"),
    "another domain": (_other_domain, "operator com.example::"),
    "a cycle": (_from_later, "before it is made"),
    "a missing initialiser": (_no_initialiser, "before it is made"),
    "an initialiser twice": (_initialiser_twice, "stands twice"),
    "data above the folder": (_outside("../x"), "no name in the file's own folder"),
    "data at an absolute path": (_outside("/etc/passwd"), "no name in the file's own folder"),
    "data that is missing": (_outside("nothing"), "which is missing"),
    "a terabyte declared": (_terabyte, "its shape needs"),
    "offsets that fall": (table(8, lambda a: a[::-1]), "offsets do not rise"),
    "offsets as int64": (table(8, lambda a: a.astype(np.int64)), "must be int32"),
    "offsets of one less": (table(8, lambda a: a[:-1]), "offsets do not rise"),
    "neuron ids past the store": (table(7, lambda a: np.where(np.arange(len(a)) == len(a) - 1, 2**30, a).astype(np.int32)),
    "lies outside"),
    "neuron ids below zero": (table(7, lambda a: np.where(np.arange(len(a)) == 0, -1, a).astype(np.int32)), "lies outside"),
    "NaN in the router": (table(1, lambda a: a * np.float32("nan")), "router holds numbers that are not finite"),
    "infinity in the router's bias": (table(2, lambda a: a + np.float32("inf")), "router_bias holds numbers that are not finite"),
    "a neuron twice": (table(7, lambda a: np.where(np.arange(len(a)) == 1, a[0], a).astype(np.int32)), "do not ascend"),
}  # fmt: skip
