"""Fill a model with the weights of a file: the part of it that fits best, or a sentence about what differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moee.errors import UserError
from moee.interface.adapted import bare
from moee.interface.spec import WeightsPart
from moee.schema import shown
from moee.weights.difference import difference
from moee.weights.fitting import Fit, best_fit, listed
from moee.weights.weights_file import containers, read_checkpoint, unusable


def load_weights(model: nn.Module, path: Path, part: WeightsPart | None = None) -> Fit:
    """Load a checkpoint into a model: the part of it that fits best, or `part`, through the filters of its library.

    Raises `UserError` that says what differs and which flag mends it; the model is as it was then.
    """
    content = read_checkpoint(path)
    classifier = classifier_names(model)
    only = None if part is None else (part.container, part.prefix)
    fit = best_fit(containers(content, path), model, classifier, only)
    refuse_misfit(fit, model, path, getattr(model, "pretrained_cfg", {}).get("architecture", ""), content)
    net = bare(model)
    wanted = net.state_dict().keys()
    try:
        net.load_state_dict({name: tensor for name, tensor in fit.state.items() if name in wanted}, strict=False)
    except RuntimeError as error:  # a damaged file whose shapes are right all the same
        reason = shown(next(reversed(str(error).strip().splitlines()), ""), quoted=False)
        raise UserError(f"checkpoint {path} cannot be loaded: {reason}") from error
    return fit


def refuse_misfit(fit: Fit, model: nn.Module, path: Path, name: str, content: Mapping[str, Any]) -> None:
    """Raise `UserError` if a checkpoint's best part is not the whole of the model called `name`, or holds NaN."""
    classifier, own = classifier_names(model), bare(model).state_dict().keys()
    useless = {key: kind for key, kind in unusable(content, fit.container).items()
               if key.startswith((fit.prefix, *(f"{head}." for head in classifier))) or key in own}  # fmt: skip
    if useless:
        key, kind = next(iter(useless.items()))
        raise UserError(
            f"checkpoint {path} holds {listed(useless)} without plain values: {shown(key, quoted=False)} is {kind}; save dense "
            "float tensors on the CPU"
        )
    if fit.rivals or not fit.complete:
        says = content.get("arch")  # timm's train.py writes it
        reason = difference(fit, model, name, classifier_names(model), says if isinstance(says, str) else None)
        raise UserError(f"checkpoint {path} does not fit: {reason}")
    given = {name: fit.state[name] for name, _ in bare(model).named_parameters() if name in fit.state}
    broken = [name for name, tensor in given.items() if not tensor.is_meta and not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"checkpoint {path} has numbers that are not finite in {listed(broken)}: its training diverged, or it is damaged; "
            "take an earlier one"
        )


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The modules that are the model's classifier, as timm names them: two for a distilled one."""
    name = getattr(model, "default_cfg", {}).get("classifier") or ()
    return (name,) if isinstance(name, str) else tuple(name)
