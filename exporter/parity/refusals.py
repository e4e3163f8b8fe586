"""What is refused before anything is compared."""

from __future__ import annotations

from pathlib import Path

from exporter.manifests import read_export
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.schema import shown
from moee.tokens.block import token_merges


def refuse_unrouted(moee: MoeeModel, min_route_agreement: float | None) -> None:
    """Raise `UserError` for a share of equal routes that is wanted of a model which chooses no routes."""
    if min_route_agreement is not None and all(layer.num_experts < 2 for layer in routed_layers(moee.model).values()):
        raise UserError("--min-route-agreement has nothing to check: no layer has more than one expert; leave it out")


def refuse_foreign(folder: Path, moee: MoeeModel) -> None:
    """Raise `UserError` for an export of another model than `moee`, as far as `export.json` tells without running anything."""
    manifest = read_export(folder, verify=False)
    layers = {name: layer.num_experts for name, layer in routed_layers(moee.model).items()}
    differs = ""
    if manifest["model"]["timm_name"] != moee.spec.timm_name:
        differs = f"that was {shown(manifest['model']['timm_name'])}, this is {shown(moee.spec.timm_name)}"
    elif set(manifest["routed_layers"]) != set(layers):
        name = sorted(set(manifest["routed_layers"]) ^ set(layers))[0]
        differs = f"only one of the two has experts in {shown(name)}"
    merged = {name: merge.merged for name, merge in token_merges(moee.model).items()}
    if not differs and manifest.get("merged_tokens", {}) != merged:
        there, here = (sum(counts.values()) for counts in (manifest.get("merged_tokens", {}), merged))
        differs = f"{there} tokens are merged there, {here} here" + ("" if there != here else ", in other blocks")
    for name, count in manifest.get("experts", {}).items():
        if not differs and layers.get(name) != count:
            differs = f"{shown(name)} has {count} experts there, {layers.get(name, 0)} here"
    if differs:
        raise UserError(
            f"{folder} was not exported from the model it is held against: {differs}; give --model the artifact that it was made "
            "from, or export again"
        )
