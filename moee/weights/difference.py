"""What differs between a checkpoint and a model, and the flag that mends it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from moee.interface.adapted import bare
from moee.schema import shown
from moee.weights.fitting import Fit, Shape, classes_of, holds_head, is_head, listed

SAVE = "and save its state dict again"
COMPUTED = tuple((kind, re.compile(pattern), f"{cure} {SAVE}") for kind, pattern, cure in (
    ("factors of LoRA", r"(^|[._])lora_|\.base_layer\.", "merge them into the model (in peft merge_and_unload())"),
    ("parametrisations", r"\.parametrizations\.", "take them off the model (torch.nn.utils.parametrize.remove_parametrizations)"),
    ("masks of pruning", r"\.(weight|bias)_mask$", "take them off the model (torch.nn.utils.prune.remove)"),
    ("weight norm", r"\.weight_g$", "take it off the model (torch.nn.utils.remove_weight_norm)"),
    ("spectral norm", r"\.weight_orig$", "take it off the model (torch.nn.utils.remove_spectral_norm)"),
))  # fmt: skip


def difference(fit: Fit, model: nn.Module, name: str, classifier: tuple[str, ...], says: str | None) -> str:
    """What differs between a checkpoint and the model `name`, and the flag that mends it. `says` is the architecture that the
    file names for itself."""
    expected = bare(model).state_dict()
    if fit.rivals:
        seen = listed([fit.prefix, *fit.rivals])
        return f"its names have the prefixes {seen}, and under each lie other weights of {name}: save those that you mean alone"
    for kind, pattern, cure in COMPUTED:
        names = [key for key in fit.state if key not in fit.fitting and pattern.search(key)]
        if names:
            return f"it holds {kind} in place of plain weights ({listed(names)}): {cure}"
    shapes = {key: pair for key, pair in fit.mismatched.items() if pair[0] != pair[1]}
    if len(shapes) < len(fit.mismatched):
        key = next(key for key in fit.mismatched if key not in shapes)
        alone = replace(fit, mismatched={key: fit.mismatched[key]}, missing=(), unexpected=())
        return f"{_first(alone)} of real ones: store it as floating-point numbers"
    heads = {key: pair for key, pair in shapes.items() if is_head(key, classifier)}
    if heads and len(shapes) == len(heads) and not fit.missing and not fit.unexpected:
        ours, theirs = getattr(model, "num_classes", 0), classes_of(fit.state, classifier)
        if theirs != ours and all(came[1:] == wanted[1:] for came, wanted in heads.values()):
            return f"the file has {theirs} classes, {name} has {ours}: add --num-classes {theirs}"
        key, (came, wanted) = max(heads.items(), key=lambda item: len(item[1][0]))  # a weight before a bias
        turned = len(came) == len(wanted) == 2 and came[0] == wanted[1] != came[1]
        cure = "it is transposed, store it the other way round" if turned else "check the file, or add --num-classes 0"
        return f"{shown(key, quoted=False)} of the classifier is {list(came)}, {name} takes {list(wanted)}: {cure}"
    if fit.missing and all(is_head(key, classifier) for key in fit.missing) and not fit.unexpected and not fit.mismatched:
        cure = "add --num-classes 0 to compare features"
        if holds_head(fit.state, classifier):
            return f"the file has only a part of the classifier and lacks {listed(fit.missing)}: store that too, or {cure}"
        return f"the file has no classifier, {name} has one: {cure}"
    channels = _channels(fit, model)
    if channels is not None:
        return f"the file has {channels[0]} input channels, {name} has {channels[1]}: add --in-chans {channels[0]}"
    if says and says != name and 2 * len(fit.fitting) < len(expected):
        return f"the file says that it is {shown(says, quoted=False)}; {_counts(fit, expected)} of {name}: give that name"
    if 2 * len(fit.fitting) < len(expected):
        return f"{_counts(fit, expected)} of {name}: it belongs to another model; {_first(fit)}"
    if "fc_norm.weight" in fit.unexpected and "norm.weight" in fit.missing:
        return f"the file's last norm is fc_norm, {name} pools its class token: add --model-kwargs global_pool=avg"
    position = fit.mismatched.get("pos_embed")
    size = image_size(position[0], model) if position else None
    if size is not None and position is not None and size != image_size(position[1], model):
        return f"the file was trained on {size} pixels, {name} takes another size: add --img-size {size}"
    return f"{_counts(fit, expected)} of {name}: {_first(fit)}; check the model's name, --img-size and --model-kwargs"


def _counts(fit: Fit, expected: Mapping[str, Tensor]) -> str:
    under = f" under {shown(fit.prefix, quoted=False)}" if fit.prefix else ""
    return f"{len(fit.fitting)} of its {len(fit.state)} tensors{under} fit the {len(expected)}"


def _first(fit: Fit) -> str:
    parts = []
    if fit.mismatched:
        key, (came, wanted) = next(iter(fit.mismatched.items()))
        kind = f"{fit.state[key].dtype} ".removeprefix("torch.") if came == wanted else ""
        parts.append(f"{shown(key, quoted=False)} is {kind}{list(came)}, expected {list(wanted)}")
    if fit.missing:
        parts.append(f"{len(fit.missing)} tensors missing ({listed(fit.missing)})")
    if fit.unexpected:
        parts.append(f"{len(fit.unexpected)} unexpected ({listed(fit.unexpected)})")
    return ", ".join(parts) or "nothing in common"


def _channels(fit: Fit, model: nn.Module) -> tuple[int, int] | None:
    """Input channels of the file and of the model, if that is what differs."""
    convs = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    for name in (convs,) if isinstance(convs, str) else convs:
        came, wanted = fit.mismatched.get(f"{name}.weight", ((), ()))
        if len(came) == len(wanted) == 4 and came[1] != wanted[1] and came[0] == wanted[0]:
            return came[1], wanted[1]
    return None


def image_size(position: Shape, model: nn.Module) -> int | None:
    """Pixels a side of the square images that a position embedding [1, tokens, D] was trained on, if it can be told."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None or len(position) != 3:
        return None
    extra = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    side = math.isqrt(max(position[1] - extra, 0))
    return side * patch[0] if side and side * side == position[1] - extra else None
