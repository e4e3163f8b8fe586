"""The licence of a model's own weights, where something states it. What nobody states is not known, and never guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm

from moee.interface.spec import ModelSpec
from moee.schema import parse_json, shown
from moee.weights.hub import CONFIG

FOLDERS = ("local-dir:", "hf-hub:", "hf:")  # names of models whose folder may state a licence
README = "README.md"
MAX_HEAD = 1 << 16  # bytes of a README within which its front matter ends
MAX_NAME = 200  # characters
NOTHING = ("", "unknown", "other")  # as timm and the hub write that they do not know
ALIASES = {"dinov2-s": ("apache-2.0", "THIRD_PARTY_NOTICES.md of this project, for DINOv2; the file itself states none")}


def licence_of(spec: ModelSpec) -> dict[str, str] | None:
    """The licence of the weights of `spec` as {"name", "stated_by"}; None where nothing states one.

    It is read from timm's or torchvision's table for their pretrained weights, and from the model's own folder in the hub's
    layout (`license` in config.json or at the head of README.md). A checkpoint alone, a module and a function state none, and
    weights that were drawn at random have none.
    """
    if spec.pretrained and spec.library == "timm":
        return _stated(getattr(timm.get_pretrained_cfg(spec.timm_name), "license", None), f"timm {timm.__version__}")
    if spec.pretrained and spec.library == "torchvision":
        import torchvision

        weights = torchvision.models.get_model_weights(spec.timm_name).DEFAULT
        return _stated(weights.meta.get("license"), f"torchvision {torchvision.__version__}")
    if spec.name in ALIASES and spec.weights is not None:
        return _stated(*ALIASES[spec.name])
    if spec.name.startswith(FOLDERS) and spec.weights is not None:
        folder = Path(spec.weights).parent
        return _in_config(folder / CONFIG) or _in_readme(folder / README)
    return None


def _stated(name: Any, by: str) -> dict[str, str] | None:
    if not isinstance(name, str) or name.strip().lower() in NOTHING:
        return None
    return {"name": shown(name.strip(), quoted=False, limit=MAX_NAME), "stated_by": by}


def _in_config(path: Path) -> dict[str, str] | None:
    """As timm saves it, in `pretrained_cfg` or beside it."""
    try:
        body = parse_json(path)
    except (OSError, ValueError):
        return None
    parts = [body.get("pretrained_cfg"), body] if isinstance(body, dict) else []
    names = [part["license"] for part in parts if isinstance(part, dict) and "license" in part]
    return _stated(names[0], f"{path.name} beside the weights") if names else None


def _in_readme(path: Path) -> dict[str, str] | None:
    """The line `license: NAME` between the two lines `---` with which a model card of the hub begins."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_HEAD).decode("utf-8-sig", errors="replace")
    except OSError:
        return None
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*([^\s#]+)", head[1], re.MULTILINE) if head else None
    return _stated(found[1].strip("'\""), f"{path.name} beside the weights") if found else None
