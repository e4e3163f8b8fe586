"""Which part of a checkpoint is the model's, and what differs.

People's files hold their weights in containers (`state_dict_ema`, `model`) and under prefixes of wrappers (`module.`,
`_orig_mod.`, `backbone.`). What counts is what then fits: each container is tried without each prefix that its names have, passed
through timm's own filter of the architecture (which renames and resizes), and compared with the model by name and shape.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from moee.interface.adapted import AdaptedModel, StateFilter, bare
from moee.schema import shown
from moee.weights.weights_file import is_average

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "ema_model.", "model_ema.", "ema.",
            "teacher.", "student.")  # fmt: skip
MAX_WRAPPERS = 4  # around one another: module._orig_mod.model.backbone.
MAX_PREFIXES = 16  # tried of a container; files have two or three
MAX_TRIED = 8  # containers that are tried, those with most tensors: an optimiser's states are small ones
MAX_LISTED = 3
COUNTERS = "num_batches_tracked"  # of a BatchNorm: older files lack it, and nothing in eval mode reads it
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """A container without a prefix, held against a model. `state` has the model's names and float32."""

    container: str
    prefix: str
    state: dict[str, Tensor]
    fitting: frozenset[str] = frozenset()
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # in the file, in the model
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()  # beside the prefix, and not the model's
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # by timm's filter: before, after

    @property
    def complete(self) -> bool:
        return not (self.mismatched or self.missing or self.unexpected)

    @property
    def rank(self) -> tuple[int, int]:
        """Larger is better."""
        return len(self.fitting), -len(self.mismatched) - len(self.unexpected)

    def sentence(self) -> str:
        """What was taken: "state_dict_ema, 120 tensors, prefix module. removed"."""
        words = [self.container] if self.container else []
        words.append(f"{len(self.fitting)} tensors")
        if self.prefix:
            words.append(f"prefix {self.prefix} removed")
        words += [f"{name} resized from {list(old)} to {list(new)}" for name, (old, new) in list(self.resized.items())[:1]]
        if len(self.resized) > 1:
            words[-1] += f" and {len(self.resized) - 1} more"
        if self.outside:
            words.append(f"{listed(self.outside)} left out")
        return ", ".join(shown(word, quoted=False) for word in words)


def listed(names: Iterable[str], most: int = MAX_LISTED) -> str:
    """Names as a message shows them: the first few and how many there are."""
    names = list(names)
    text = ", ".join(shown(name, quoted=False, limit=80) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def best_fit(
    containers: list[tuple[str, dict[str, Tensor]]], model: nn.Module, classifier: tuple[str, ...],
    only: tuple[str, str] | None = None,
) -> Fit:  # fmt: skip
    """The container and prefix that fit `model` (which may have no memory) best; of equal ones averaged weights, then the first.

    `classifier` names the model's heads: they fit whatever their number of classes, for that is asked later. `only` is the
    (container, prefix) that an artifact recorded, which is then taken as it is.
    """
    best: Fit | None = None
    if only is not None:
        containers = [item for item in containers if item[0] == only[0]]
    largest = sorted(range(len(containers)), key=lambda i: len(containers[i][1]), reverse=True)[:MAX_TRIED]
    for name, tensors in (containers[i] for i in sorted(largest)):
        tensors = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
        for prefix in sorted(prefixes(tensors), key=lambda p: not is_average(p)) if only is None else (only[1],):
            for fit in _fits(name, prefix, tensors, model, classifier):
                if best is None or fit.rank > best.rank:
                    best = fit
                if fit.complete:
                    return best
    return best or Fit("", "", {}, missing=tuple(bare(model).state_dict()))


def alternatives(
    containers: list[tuple[str, dict[str, Tensor]]], model: nn.Module, classifier: tuple[str, ...], taken: Fit
) -> list[str]:
    """What else in a file is a whole set of weights of `model`, and another one than `taken`: containers and prefixes, under
    whatever name. Averaged weights are taken before plain ones by rule, which are then no alternative."""
    expected = [key for key in bare(model).state_dict() if not _is_head(key, classifier)][:1]
    averaged = is_average(f"{taken.container}.{taken.prefix}")
    others = []
    largest = sorted(range(len(containers)), key=lambda i: len(containers[i][1]), reverse=True)[:MAX_TRIED]
    for name, tensors in (containers[i] for i in sorted(largest)):
        unknown = [key.removesuffix(own) for own in expected for key in tensors if key.endswith(f".{own}")][:MAX_PREFIXES]
        for prefix in dict.fromkeys([*prefixes(tensors), *unknown]):
            if (name, prefix) == (taken.container, taken.prefix) or (averaged and not is_average(f"{name}.{prefix}")):
                continue
            for fit in _fits(name, prefix, tensors, model, classifier):
                if fit.complete and any(not t.equal(taken.state[key].to(t.dtype)) for key, t in fit.state.items()
                                        if key in fit.fitting and key in taken.fitting):  # fmt: skip
                    others.append(".".join(word for word in (name, prefix.removesuffix(".")) if word) or "the whole file")
                    break
    return others


def prefixes(names: Iterable[str]) -> list[str]:
    """The combinations of wrappers' prefixes that any of the names has, at most `MAX_PREFIXES`; none first."""
    names = list(names)
    found = level = [""]
    for _ in range(MAX_WRAPPERS):
        level = [p + w for p in level for w in PREFIXES if any(name.startswith(p + w) for name in names)][:MAX_PREFIXES]
        found = found + level
    return found[:MAX_PREFIXES]


def _fits(
    container: str, prefix: str, tensors: dict[str, Tensor], model: nn.Module, classifier: tuple[str, ...]
) -> Iterator[Fit]:  # fmt: skip
    expected = bare(model).state_dict()
    inside = {key[len(prefix):]: t for key, t in tensors.items() if key.startswith(prefix)}  # fmt: skip
    beside = {key: t for key, t in tensors.items() if not key.startswith(prefix)}
    own = {key: t for key, t in beside.items() if key not in inside and _same(t, expected.get(key), _is_head(key, classifier))}
    state = {**inside, **own}
    outside = tuple(key for key in beside if key not in own)
    for convert in _filters(model):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # one of timm's filters prints
                converted = convert(dict(state), model)
        except Exception:  # the filters take names and shapes for granted
            converted = state
        yield _compared(container, prefix, state, converted, expected, outside, classifier)


def _same(tensor: Tensor, other: Tensor | None, head: bool) -> bool:
    return other is not None and (tensor.shape == other.shape or (head and tensor.shape[1:] == other.shape[1:]))


def _is_head(name: str, classifier: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{head}." for head in classifier))


def _compared(
    container: str, prefix: str, before: Mapping[str, Tensor], state: Mapping[str, Any], expected: Mapping[str, Tensor],
    outside: tuple[str, ...], classifier: tuple[str, ...],
) -> Fit:  # fmt: skip
    found = {key: t for key, t in state.items() if isinstance(t, Tensor)}
    shapes = {key: (tuple(t.shape), tuple(expected[key].shape)) for key, t in found.items() if key in expected}
    fitting = frozenset(
        key for key, (came, wanted) in shapes.items()
        if came == wanted
        and (found[key].is_floating_point() == expected[key].is_floating_point() or key.endswith(COUNTERS))  # cast with the rest
    )  # fmt: skip
    unexpected = tuple(key for key in found if key not in expected)
    if not any(_is_head(key, classifier) for key in expected):  # asked for features: a head is no sign of another model
        outside += tuple(key for key in unexpected if _is_head(key, classifier))
        unexpected = tuple(key for key in unexpected if not _is_head(key, classifier))
    return Fit(
        container, prefix, found, fitting,
        {key: pair for key, pair in shapes.items() if key not in fitting},
        tuple(key for key in expected if key not in found and not key.endswith(COUNTERS)),
        unexpected, outside,
        {key: (tuple(before[key].shape), tuple(found[key].shape)) for key in fitting
         if key in before and before[key].shape != found[key].shape},
    )  # fmt: skip


def _filters(model: nn.Module) -> list[Callable[[dict[str, Tensor], nn.Module], Mapping[str, Any]]]:
    """The library's filters for the architecture; where its original files come in two spellings, one a spelling."""
    if isinstance(model, AdaptedModel):
        return [lambda state, model: state, *(partial(_bare_filter, each) for each in model.filters)]
    found = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if found is None:
        return [lambda state, model: state]
    plain: Callable[..., Mapping[str, Any]] = found
    if "adapt_layer_scale" not in inspect.signature(plain).parameters:
        return [plain]
    return [plain, lambda state, model: plain(state, model, adapt_layer_scale=True)]  # DeiT III


def _bare_filter(convert: StateFilter, state: dict[str, Tensor], model: nn.Module) -> Mapping[str, Any]:
    return convert(state, bare(model))


def classes_of(state: Mapping[str, Tensor], classifier: tuple[str, ...]) -> int:
    """How many classes the classifier in `state` tells apart, of a transposed one too if it has biases; 0 for none."""
    for key, weight in state.items():
        if _is_head(key, classifier) and key.endswith("weight") and weight.ndim > 1:
            bias = state.get(f"{key.removesuffix('weight')}bias")
            turned = bias is not None and weight.ndim == 2 and tuple(bias.shape) == (weight.shape[1],)
            return weight.shape[1 if turned else 0]
    return 0


def holds_head(state: Mapping[str, Tensor], classifier: tuple[str, ...]) -> bool:
    """Whether a state has tensors of the classifier, in whatever form."""
    return any(_is_head(key, classifier) for key in state)


def difference(fit: Fit, model: nn.Module, name: str, classifier: tuple[str, ...], says: str | None) -> str:
    """What differs between a checkpoint and the model `name`, and the flag that mends it. `says` is the architecture that the
    file names for itself."""
    expected = bare(model).state_dict()
    shapes = {key: pair for key, pair in fit.mismatched.items() if pair[0] != pair[1]}
    if len(shapes) < len(fit.mismatched):
        key = next(key for key in fit.mismatched if key not in shapes)
        alone = replace(fit, mismatched={key: fit.mismatched[key]}, missing=(), unexpected=())
        return f"{_first(alone)} of real ones: store it as floating-point numbers"
    heads = {key: pair for key, pair in shapes.items() if _is_head(key, classifier)}
    if heads and len(shapes) == len(heads) and not fit.missing and not fit.unexpected:
        ours, theirs = getattr(model, "num_classes", 0), classes_of(fit.state, classifier)
        if theirs != ours and all(came[1:] == wanted[1:] for came, wanted in heads.values()):
            return f"the file has {theirs} classes, {name} has {ours}: add --num-classes {theirs}"
        key, (came, wanted) = max(heads.items(), key=lambda item: len(item[1][0]))  # a weight before a bias
        turned = len(came) == len(wanted) == 2 and came[0] == wanted[1] != came[1]
        cure = "it is transposed, store it the other way round" if turned else "check the file, or add --num-classes 0"
        return f"{shown(key, quoted=False)} of the classifier is {list(came)}, {name} takes {list(wanted)}: {cure}"
    if fit.missing and all(_is_head(key, classifier) for key in fit.missing) and not fit.unexpected and not fit.mismatched:
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
    return f"{len(fit.fitting)} of its {len(fit.state)} tensors fit the {len(expected)}"


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
