"""The bundle's text files: Triton Inference Server, DeepStream, pre-processing, settings of build.sh, README."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

TRITON_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
LABELS = "labels.txt"
QUEUE_US = 1000  # how long a request waits for others: a fraction of what a batch takes on an Orin


@dataclass(frozen=True)
class Facts:
    """What the texts say. `given` and `output` are `bundle.Tensor`, `recipe` is `bundle.Preprocessing`, `batch` (min, opt, max).

    `classes` is None where neither the graph nor a classifier beside it gives classes; `classifies`: the graph does.
    `names` of the classes are printable and differ, as manifests are checked; none where they are not known. `plugin`: the MoEE
    engine needs it.
    """

    given: Any
    output: Any
    recipe: Any
    batch: tuple[int, int, int]
    classes: int | None
    classifies: bool
    sm: int
    model: str
    names: tuple[str, ...] = ()
    plugin: bool = True


def files(facts: Facts) -> dict[str, str]:
    """Path in the bundle to its text."""
    texts = {
        "README.md": readme(facts),
        "bundle.env": environment(facts),
        "models/preprocess.txt": preprocess(facts.recipe),
        "triton/start.sh": triton_start(facts.plugin),
        "deepstream/config_infer_moee.txt": deepstream(facts),
    }
    for name, platform in (("moee", "tensorrt_plan"), ("dense", "tensorrt_plan"), ("moee_onnx", "onnxruntime_onnx")):
        texts[f"triton/model_repository/{name}/config.pbtxt"] = triton(facts, name, platform)
        if facts.classifies and facts.names:
            texts[f"triton/model_repository/{name}/{LABELS}"] = lines(facts.names)
    if facts.names:
        texts[f"models/{LABELS}"] = lines(facts.names)
    if facts.classifies:
        numbers = tuple(f"class {i}" for i in range(facts.classes or 0))
        # nvinfer separates the labels by semicolons
        texts[f"deepstream/{LABELS}"] = ";".join(name.replace(";", ",") for name in facts.names or numbers) + "\n"
    return texts


def lines(names: tuple[str, ...]) -> str:
    """A name a line."""
    return "".join(f"{name}\n" for name in names)


def preprocess(recipe: Any) -> str:
    """What `readRecipe` of the runner reads. Nine digits carry a float32 unchanged."""
    lines = [
        "# timm's evaluation transform: the image covers `resize` (height width), middle `size`, 0..1, (x - mean) / std",
        f"size {recipe.size[0]} {recipe.size[1]}",
        f"resize {recipe.resize[0]} {recipe.resize[1]}",
        f"crop {recipe.crop}",
        f"filter {recipe.filter}",
        "mean " + " ".join(f"{v:.9g}" for v in recipe.mean),
        "std " + " ".join(f"{v:.9g}" for v in recipe.std),
    ]
    return "\n".join(lines) + "\n"


def environment(facts: Facts) -> str:
    """Shell variables for build.sh; the input's name comes from the graph, hence quoted."""
    shape = "x".join(map(str, facts.given.shape))
    values = {"INPUT": facts.given.name, "SHAPE": shape, "SM": facts.sm, "PLUGIN": "yes" if facts.plugin else "no"}
    values |= dict(zip(("MIN_BATCH", "OPT_BATCH", "MAX_BATCH"), facts.batch, strict=True))
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())


def text_string(value: str) -> str:
    """A string literal of protobuf's text format."""
    escaped = "".join(c if 32 <= ord(c) < 127 and c not in '"\\' else "".join(f"\\{b:03o}" for b in c.encode()) for c in value)
    return f'"{escaped}"'


def triton(facts: Facts, name: str, platform: str) -> str:
    """`config.pbtxt` of one model of the repository."""
    low, opt, high = facts.batch
    preferred = ", ".join(map(str, sorted({opt, high})))
    plugin = "start.sh preloads the plugin: --backend-config=tensorrt,plugins=.../libmoee_plugin.so"
    if not facts.plugin:
        plugin = "standard operators, no plugin"
    notes = {"moee": plugin, "dense": "the dense model, for comparison", "moee_onnx": "ONNX Runtime, no plugin, CPU or GPU"}
    blocks = [
        f"# {notes[name]}",
        f"name: {text_string(name)}",
        f"platform: {text_string(platform)}",
        f"max_batch_size: {high}",
        _tensor("input", facts.given),
        _tensor("output", facts.output, LABELS if facts.classifies and facts.names else None),
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if platform == 'tensorrt_plan' else 'KIND_AUTO'} }} ]",
        f"dynamic_batching {{\n  preferred_batch_size: [ {preferred} ]\n  max_queue_delay_microseconds: {QUEUE_US}\n}}",
    ]
    if platform == "tensorrt_plan":
        dims = ", ".join(map(str, facts.given.shape))
        kind = TRITON_TYPES[facts.given.type]
        warm = f"key: {text_string(facts.given.name)} value {{ data_type: {kind} dims: [ {dims} ] random_data: true }}"
        blocks.append(f'model_warmup [ {{ name: "largest batch" batch_size: {high} inputs {{ {warm} }} }} ]')
    if low > 1:
        blocks.insert(1, f"# the engine's smallest batch is {low}: single requests fail until others join them")
    return "\n".join(blocks) + "\n"


def _tensor(kind: str, tensor: Any, labels: str | None = None) -> str:
    dims = ", ".join(map(str, tensor.shape))
    fields = f"name: {text_string(tensor.name)} data_type: {TRITON_TYPES[tensor.type]} dims: [ {dims} ]"
    if labels is not None:
        fields += f" label_filename: {text_string(labels)}"
    return f"{kind} [ {{ {fields} }} ]"


def triton_start(plugin: bool) -> str:
    """`start.sh`, which loads the plugin if the engine needs it."""
    loaded = ' \\\n  --backend-config=tensorrt,plugins="$here/../plugin/build/libmoee_plugin.so"' if plugin else ""
    return TRITON_START.format(loaded=loaded, how=" with the plugin loaded" if plugin else "")


TRITON_START = """#!/bin/sh
# Starts Triton Inference Server on this repository{how}. More options are passed on.
# The server's TensorRT must be the version that built the engines.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec tritonserver --model-repository="$here/model_repository"{loaded} "$@"
"""


def deepstream(facts: Facts) -> str:
    """nvinfer's configuration. The graph normalises by itself, so pixels pass as they are."""
    values: dict[str, Any] = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,
        "batch-size": facts.batch[1],
        "onnx-file": "../models/tensorrt_pixels.onnx",
        "model-engine-file": "../engines/pixels.plan",
        **({"custom-lib-path": "../plugin/build/libmoee_plugin.so"} if facts.plugin else {}),
        "net-scale-factor": 1.0,
        "offsets": "0;0;0",
        "model-color-format": 0,
        "infer-dims": ";".join(map(str, facts.given.shape)),
        "maintain-aspect-ratio": 0,
        "output-blob-names": facts.output.name,
        "network-mode": 2 if facts.given.type == "float16" else 0,
    }
    if facts.classifies:
        values |= {"network-type": 1, "classifier-threshold": 0.0, "labelfile-path": LABELS}
    else:
        values |= {"network-type": 100, "output-tensor-meta": 1}
    head = [
        "# nvinfer for DeepStream 6.3 and later. `build.sh --deepstream` makes the engine"
        + ("; custom-lib-path opens the plugin." if facts.plugin else "."),
        "# nvinfer resizes the whole frame to the network's size, without timm's centre crop.",
        "[property]",
    ]
    return "\n".join([*head, *(f"{key}={value}" for key, value in values.items())]) + "\n"


def readme(facts: Facts) -> str:
    """README.md of a bundle."""
    head = "" if facts.classifies else " --output features" if facts.classes is None else " --head models/head.bin"
    (height, width), (low, _, high) = facts.recipe.size, facts.batch
    option, row, preload, graph, test = PLUGIN_TEXTS if facts.plugin else ("", "", "", "standard operators", "")
    return README.format(
        model=facts.model.replace("`", "'"), sm=facts.sm, head=head, height=height, width=width, low=low, high=high,
        names=" by its name in models/labels.txt" if facts.names else "",
        plugin=option, plugin_row=row.format(sm=facts.sm), preloads=preload, graph=graph, selftest=test,
    )


PLUGIN_TEXTS = (
    " --plugin plugin/build/libmoee_plugin.so", "| plugin/ | the plugin's source and its kernels for sm_{sm} |\n"
    "| selftest/ | a program that checks the kernels on the GPU, and times three layers against dense ones |\n",
    ", which preloads the plugin", "plugin",
    """
Are the kernels right on this GPU, and what do they gain? `build.sh --compile-only` is enough for it:

    selftest/build/selftest         # checks every kernel, times three layers against dense ones, writes selftest.json
""",
)  # fmt: skip
README = """# {model}, dense and MoEE, for sm_{sm}

    ./build.sh                      # checks the files, compiles, builds engines/moee.plan and engines/dense.plan
    ./build.sh --builder moee       # the same by `moee build`, where this project's package is installed
    ./build.sh --deepstream         # also engines/pixels.plan, for DeepStream
    ./build.sh --compile-only       # no engines

Needs g++ (C++17), cmake 3.16, TensorRT 10 or later with its headers and trtexec; JetPack ships all of them. Engines fit the
GPU and the TensorRT that built them: build on the device.
{selftest}
Run on images, and compare with the dense model:

    mogrify -format ppm -path ppm photos/*.jpg        # ImageMagick; the runner reads PPM and PGM
    runner/build/moee_run --engine engines/moee.plan{plugin} --images ppm{head}
    runner/build/moee_run --engine engines/dense.plan --images ppm{head}

It resizes, crops and normalises as timm does, prints the top-1 class of each image{names}, and p50 and p95 of the execution
(copies not included). `--raw FILE` takes float32 tensors [N, 3, {height}, {width}] instead. Batches from {low} to {high}.

| part | holds |
|---|---|
| models/ | dense.onnx, portable.onnx (standard operators), tensorrt.onnx ({graph}), tensorrt_pixels.onnx (on raw pixels) |
{plugin_row}| runner/ | moee_run and moee_preprocess |
| triton/ | a model repository and start.sh{preloads}; build.sh puts the models in place |
| deepstream/ | nvinfer's configuration |
| MODEL_CARD.md | what was cut, on which data, the accuracy with its interval, the licence of the base model |
| SHA256SUMS, deployment.json | hashes; build.sh checks them first |

An engine is code. Load only engines that you built, or that come from someone you trust.
"""
