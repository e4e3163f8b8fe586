"""The model card of an artifact, an export or a bundle: one page in Markdown, made from the body of `moee.json` alone.

It holds what was cut, on which data, the accuracy with its interval, and the licence of the base model. What the manifest does
not say is "not known" there. The same body gives the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moee.artifacts.stages import latest
from moee.errors import plain
from moee.given.datasets import PREFIX
from moee.measure.accuracy import counted, drop_in_words, recorded_interval
from moee.methods.recipe import read_recipe_json
from moee.schema import data_title, shown
from moee.store.result_kinds import CARD

NOT_KNOWN = "not known"
SHOWN_CLASSES = 20
DID = {"extracted": "cut", "tuned": "tuned", "shrunk": "experts made fewer"}  # by the name of a stage
KIND = {"moee": "experts", "clear-moe": "CLEAR-MoE", "gated": "pruned, gated", "lowrank": "low rank"}


def model_card(body: Mapping[str, Any], export: Mapping[str, Any] | None = None) -> str:
    """The card of a checked body of `moee.json`; `export`: that of `export.json`, for the graphs that were made of it.

    Of an export whose artifact is not at hand the `body` may lack everything but `model` and `data`.
    """
    info = body.get("info") or {}
    parts = [
        [f"# Model card of {_code(body['model']['name'])}", "Written by `moee` from the manifest, and from nothing else."],
        ["## Base model", *_base(body["model"], info)],
        ["## What was cut", *_cut(body, info)],
        ["## Data", *_data(body, info)],
        ["## Figures", *_figures(info)],
        *([["## Graphs", *_graphs(export)]] if export is not None else []),
    ]
    return "\n\n".join("\n\n".join(part) for part in parts) + "\n"


def _code(text: Any, cell: bool = False) -> str:
    """A text from a manifest as Markdown shows it unchanged."""
    safe = shown(text, quoted=False).replace("`", "'")
    escaped = safe.replace("|", "\\|") if cell else safe
    return f"`{escaped}`"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _base(model: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    library, name = model.get("library", "timm"), model["timm_name"]
    others = {"hf": "of transformers", "python": "a function of the user's", "module": "a module given in Python"}
    made_by = others.get(library, f"of {library}")
    licence = info.get("licence")
    stated = f"{_code(licence['name'])}, stated by {plain(licence['stated_by'])}" if licence else NOT_KNOWN
    digest = model.get("weights_sha256")
    hashed = f"SHA-256 `{digest}`" if digest else f"SHA-256 {NOT_KNOWN}"
    if model.get("weights"):
        weights = f"the file {_code(Path(model['weights']).name)}, {hashed}"
    elif library == "module":
        weights = f"those of the module, {hashed}"
    elif model.get("pretrained"):
        weights = f"those that the {'function' if library == 'python' else 'library'} brings, {hashed}"
    elif model.get("random_seed") is not None:
        weights = f"drawn at random under seed {model['random_seed']}: nothing has trained them, {hashed}"
    else:
        weights = NOT_KNOWN
    return [_list([f"Model: {_code(name)}, {made_by}.", f"Weights: {weights}.", f"Licence of the weights: {stated}."])]


def _cut(body: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    if "layers" not in body:
        return [f"Layer by layer: {NOT_KNOWN}; the manifest of the artifact was not at hand."]
    layers, attention, merging = body["layers"], body.get("attention") or [], body.get("merging")
    lines = []
    hidden = {str(item.get("name")): item.get("hidden") for item in info.get("layers", []) if isinstance(item, dict)}
    if layers:
        rows = [_row(layer, hidden) for layer in layers]
        lines.append(_table(["MLP", "now", "experts", "neurons kept by any", "neurons before"], rows))
    if attention:
        rows = [[_code(item["name"], True), str(item["qk"]), str(item["v"])] for item in attention]
        lines.append(_table(["narrowed attention", "query and key, dimensions a head", "values, dimensions a head"], rows))
    if merging:
        merged = ", ".join(map(str, merging["merged"]))
        lines.append(f"Tokens merged, block by block: {merged}.")
    if not lines:
        return ["Nothing: this is the dense model."]
    if body.get("recipe"):
        text = read_recipe_json(body["recipe"], CARD).to_toml()
        lines += ["Recipe, for `moee extract --recipe`; what it leaves out is at its default:", _indented(text)]
    else:
        lines.append(f"Recipe: {NOT_KNOWN}.")
    return lines


def _row(layer: Mapping[str, Any], hidden: Mapping[str, Any]) -> list[str]:
    kind, experts = KIND.get(layer.get("kind", "moee"), str(layer.get("kind"))), layer.get("experts", 1)
    if experts == 1 and "kind" not in layer:
        kind = "pruned"
    kept, before = layer.get("union", layer.get("width")), layer.get("hidden", hidden.get(layer["name"]))
    factors = "–" if kept is None and "ranks" in layer else NOT_KNOWN if kept is None else str(kept)
    return [_code(layer["name"], True), kind, str(experts), factors, NOT_KNOWN if before is None else str(before)]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.strip().split("\n"))


def _data(body: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, stage in info.get("stages", {}).items():
        where = _source(stage.get("data") or body["data"])
        earlier = [before for before in stage.get("before", []) if isinstance(before, dict)]
        times = 1 + len(earlier)
        lines.append(f"{DID.get(name, plain(name)).capitalize()} on {where}{f', {times} times' if times > 1 else ''}.")
        for before in earlier:
            if before.get("data") and before["data"] != stage.get("data"):
                lines.append(f"Before that {DID.get(name, plain(name))} on {_source(before['data'])}.")
    lines = lines or [f"{_source(body['data'])}."]
    read = info.get("data_read") or {}
    counts = [f"{read[split]['images']} {words}" for split, words in (("train", "training images"), ("val", "held-out images"))
              if isinstance(read.get(split), dict) and "images" in read[split]]  # fmt: skip
    lines.append(f"Images read last: {' and '.join(counts) if counts else NOT_KNOWN}.")
    names = body.get("classes") or []
    some = ", ".join(map(_code, names[:SHOWN_CLASSES])) + (", ..." if len(names) > SHOWN_CLASSES else "")
    lines.append(f"Classes: {len(names)}, {some}." if names else f"Names of the classes: {NOT_KNOWN}.")
    return [_list(lines)]


def _source(data: str) -> str:
    if data.startswith(PREFIX):
        return f"images given in Python ({_code(data.removeprefix(PREFIX))})"
    return ("the folder " if Path(data).is_absolute() else "") + _code(data_title(data))


def _figures(info: Mapping[str, Any]) -> list[str]:
    stage = latest(dict(info))
    kept, cost = stage.get("retention"), stage.get("cost")
    if not kept:
        why = f" (measuring ended with {_code(stage['unmeasured'])})" if stage.get("unmeasured") else ""
        return [f"Accuracy, cost and likeness to the dense model: {NOT_KNOWN}; nothing was measured{why}."]
    images, labelled = kept.get("images"), kept.get("labelled")
    of = f"{NOT_KNOWN} how many images"
    if images:
        of = counted(images if labelled is None else labelled, images, bool(kept.get("probe")))
    rows = []
    if kept.get("accuracy") is not None and kept.get("dense_accuracy") is not None:
        rows.append(["top-1 accuracy", *(_share(kept, name) for name in ("dense_accuracy", "accuracy"))])
    else:
        rows.append(["top-1 accuracy", NOT_KNOWN, NOT_KNOWN])
    for what, key in (("MACs an image", "macs"), ("parameters", "params")):
        rows.append([what, *(_count(cost, model, key) for model in ("dense", "moee"))])
    lines = [f"In PyTorch, float32. Held out: {of}.", _table(["", "dense model", "this model"], rows)]
    reason = kept.get("no_accuracy")
    if reason:
        lines.append(f"Accuracy was not compared: {plain(reason)}.")
    more = []
    if kept.get("drop_interval_pp") and None not in (kept.get("accuracy"), kept.get("dense_accuracy")):
        drop, between = drop_in_words(100 * (kept["dense_accuracy"] - kept["accuracy"]), kept["drop_interval_pp"])
        more.append(f"{drop.capitalize()} of accuracy, 95 % interval {between}.")
    likeness = (
        ("Same class as the dense model", "top1_agreement", ".2%"),
        ("Cosine to the dense class feature", "class_cosine", ".4f"),
    )
    more += [f"{what}: {_number(kept.get(key), form)}." for what, key, form in likeness]
    among = info.get("chosen_among")
    more.append(
        f"It was chosen among {among} models by these images, on which it looks better than on others."
        if isinstance(among, int) else "Whether this model was chosen among others by the same images, the manifest does not say."
    )
    return [*lines, _list(more)]


def _share(kept: Mapping[str, Any], name: str) -> str:
    interval = recorded_interval(kept, name)
    within = f"95 % interval {interval[0]:.2%} to {interval[1]:.2%}" if interval else f"interval {NOT_KNOWN}"
    return f"{kept[name]:.2%} ({within})"


def _count(cost: Any, model: str, key: str) -> str:
    return f"{round(cost[model][key]):,}" if cost else NOT_KNOWN


def _number(value: float | None, form: str) -> str:
    return NOT_KNOWN if value is None else format(value, form)


def _graphs(export: Mapping[str, Any]) -> list[str]:
    nodes = export.get("plugin_nodes")
    return [_list([
        f"Precision: {_code(export.get('precision', 'fp32'))}.",
        "Layers of several experts, for which TensorRT needs the plugin and portable.onnx nothing: "
        f"{NOT_KNOWN if nodes is None else nodes}.",
        "The figures above are of the model before the export. `moee verify` compares the graphs with it.",
    ])]  # fmt: skip


def write_card(folder: Path, text: str) -> None:
    """Put a card into an artifact's folder; its manifest, which is written last, has the hash."""
    (folder / CARD).write_text(text, encoding="utf-8")


def pass_card(export_dir: Path, export: Mapping[str, Any], folder: Path) -> None:
    """Put the card of a checked export into what is made of it. One of before cards gets what its `export.json` says."""
    if (export_dir / CARD).is_file():
        shutil.copyfile(export_dir / CARD, folder / CARD)
        return
    write_card(folder, model_card({key: export[key] for key in ("model", "data", "classes") if key in export}, export))
