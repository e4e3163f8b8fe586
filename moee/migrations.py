"""From the files of earlier versions to those of this one.

Each step takes the body of a file and gives that of the next version of its schema; `moee.schema` applies them. What the options
were called then is written down here and nowhere else, since the code that knew them is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Migration = Callable[[dict[str, Any]], dict[str, Any]]
_CALIBRATION = ("seed", "exclude", "tokens", "collages")
_NEURONS = (
    *_CALIBRATION, "criterion", "keep", "target_macs", "allocation", "objective", "sensitivity_tokens", "compensation",
    "refit_lambda", "refit_tokens", "augment",
)  # fmt: skip
_OPTIONS = {
    "static": _NEURONS,
    "experts": (
        *_NEURONS, "clustering", "components", "cluster_tokens", "min_cluster_size", "min_samples", "clusters", "eps",
        "statistics", "routing",
    ),
    "moefication": (*_CALIBRATION, "experts", "top_k", "split", "selector", "compensation"),
    "clear-moe": (
        "seed", "exclude", "experts", "rank", "residual_rank", "energy", "target_macs", "layers", "router", "router_width",
        "calibration_images", "tokens", "metric", "refit_lambda", "score",
    ),
}  # fmt: skip


def recipe_of(config: dict[str, Any]) -> dict[str, Any]:
    """The recipe of the options that were one object for experts, static pruning and MoEfication, with narrower heads as fields
    of every method's."""
    method = config.get("method", "moee")
    if method == "moee":
        method = "static" if config.get("clustering") == "none" else "experts"
    names = _OPTIONS.get(method)
    cut = {k: v for k, v in config.items() if names is None or k in names} | {"method": method}
    if method == "clear-moe" and "refit" in config:
        cut["compensation"] = "refit" if config["refit"] else "mean"
    steps = [cut]
    if config.get("attention_macs") not in (None, 1):
        heads = ("seed", "attention_macs", "attention_heads", "collages")
        steps = [{"method": "heads", **{k: config[k] for k in heads if k in config}}, cut]
    return {"steps": steps, "tune": None}


def _model_2(body: dict[str, Any]) -> dict[str, Any]:
    config = body.pop("config", None)
    return {**body, "recipe": recipe_of(config) if isinstance(config, dict) and config else config or None}


def _plan_2(body: dict[str, Any]) -> dict[str, Any]:
    def of_point(point: Any) -> Any:
        if not isinstance(point, dict):
            return point
        config = point.get("config")
        rest = {k: v for k, v in point.items() if k != "config"}
        share = config.get("attention_macs") if isinstance(config, dict) else None
        recipe = recipe_of(config) if isinstance(config, dict) and config else config or None
        return {**rest, "recipe": recipe, "attention": share if isinstance(share, (int, float)) else 1.0}

    points = {k: [of_point(p) for p in body[k]] for k in ("points", "front") if isinstance(body.get(k), list)}
    return {**body, **points, "winner": of_point(body.get("winner"))}


# (name, version) to the step that makes version + 1 of it
MIGRATIONS: Mapping[tuple[str, int], Migration] = {("moee.model", 1): _model_2, ("moee.plan", 1): _plan_2}
