"""Which part of a checkpoint is the model's, and what differs.

People's files hold their weights in containers (`state_dict_ema`, `model`) and under prefixes of wrappers (`module.`,
`_orig_mod.`, `backbone.`). What counts is what then fits: each container is tried without each prefix that its names have, passed
through timm's own filter of the architecture (which renames and resizes), and compared with the model by name and shape. Where no
usual prefix fits, any other that most names have is tried, and two that fit as well are refused.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from moee.interface.adapted import AdaptedModel, StateFilter, bare
from moee.schema import shown
from moee.weights.prefixes import MAX_PREFIXES, is_average, prefixes, shared_prefixes, without_wrappers

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
    beside: tuple[str, ...] = ()  # the model's, though they stand beside the prefix
    wrappers: tuple[str, ...] = ()  # names of wrappers that were left out inside of names
    rivals: tuple[str, ...] = ()  # other prefixes that fit as well, none of which is a usual one

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
        if self.wrappers:
            words.append(f"{listed(self.wrappers)} inside of names removed")
        if self.beside and self.prefix:
            words.append(f"{listed(self.beside)} from beside it")
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
    expected = bare(model).state_dict()
    if only is None and (best is None or 2 * len(best.fitting) < len(expected)):
        best = _under_any_prefix([containers[i] for i in sorted(largest)], model, classifier) or best
    return best or Fit("", "", {}, missing=tuple(expected))


def _under_any_prefix(
    containers: list[tuple[str, dict[str, Tensor]]], model: nn.Module, classifier: tuple[str, ...]
) -> Fit | None:
    """What fits best under whatever prefix many names share, if at least half of the model's tensors do; with its rivals."""
    half = len(bare(model).state_dict()) // 2
    for name, tensors in containers:
        tensors = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
        fits = []
        for prefix in shared_prefixes(tensors, max(half, 1)):
            fits += sorted(_fits(name, prefix, tensors, model, classifier), key=lambda fit: fit.rank)[-1:]
        most = max((len(fit.fitting) for fit in fits), default=0)
        best = [fit for fit in fits if len(fit.fitting) == most]
        best = [fit for fit in best if is_average(fit.prefix)] or best
        if most and most >= half:
            others = [fit.prefix for fit in best[1:] if _differ(fit, best[0])]
            return replace(best[0], rivals=tuple(others))
    return None


def _differ(fit: Fit, other: Fit) -> bool:
    """Whether two fits are different weights."""
    both = fit.fitting & other.fitting
    return any(not fit.state[key].equal(other.state[key].to(fit.state[key].dtype)) for key in both)


def alternatives(
    containers: list[tuple[str, dict[str, Tensor]]], model: nn.Module, classifier: tuple[str, ...], taken: Fit
) -> list[str]:
    """What else in a file is a whole set of weights of `model`, and another one than `taken`: containers and prefixes, under
    whatever name. Averaged weights are taken before plain ones by rule, which are then no alternative."""
    expected = [key for key in bare(model).state_dict() if not is_head(key, classifier)][:1]
    averaged = is_average(f"{taken.container}.{taken.prefix}")
    others = []
    largest = sorted(range(len(containers)), key=lambda i: len(containers[i][1]), reverse=True)[:MAX_TRIED]
    for name, tensors in (containers[i] for i in sorted(largest)):
        unknown = [key.removesuffix(own) for own in expected for key in tensors if key.endswith(f".{own}")][:MAX_PREFIXES]
        for prefix in dict.fromkeys([*prefixes(tensors), *unknown]):
            if (name, prefix) == (taken.container, taken.prefix) or (averaged and not is_average(f"{name}.{prefix}")):
                continue
            for fit in _fits(name, prefix, tensors, model, classifier):
                if fit.complete and _differ(fit, taken):
                    others.append(".".join(word for word in (name, prefix.removesuffix(".")) if word) or "the whole file")
                    break
    return others


def _fits(
    container: str, prefix: str, tensors: dict[str, Tensor], model: nn.Module, classifier: tuple[str, ...]
) -> Iterator[Fit]:  # fmt: skip
    expected = bare(model).state_dict()
    inside, wrappers = without_wrappers({key[len(prefix):]: t for key, t in tensors.items() if key.startswith(prefix)})
    beside = {key: t for key, t in tensors.items() if not key.startswith(prefix)}
    own = {key: t for key, t in beside.items() if key not in inside and _same(t, expected.get(key), is_head(key, classifier))}
    state = {**inside, **own}
    outside = tuple(key for key in beside if key not in own)
    for convert in _filters(model):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # one of timm's filters prints
                converted = convert(dict(state), model)
        except Exception:  # the filters take names and shapes for granted
            converted = state
        fit = _compared(container, prefix, state, converted, expected, outside, classifier)
        yield replace(fit, beside=tuple(own), wrappers=wrappers)


def _same(tensor: Tensor, other: Tensor | None, head: bool) -> bool:
    return other is not None and (tensor.shape == other.shape or (head and tensor.shape[1:] == other.shape[1:]))


def is_head(name: str, classifier: tuple[str, ...]) -> bool:
    """Whether a tensor is of the classifier."""
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
    if not any(is_head(key, classifier) for key in expected):  # asked for features: a head is no sign of another model
        outside += tuple(key for key in unexpected if is_head(key, classifier))
        unexpected = tuple(key for key in unexpected if not is_head(key, classifier))
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
        if is_head(key, classifier) and key.endswith("weight") and weight.ndim > 1:
            bias = state.get(f"{key.removesuffix('weight')}bias")
            turned = bias is not None and weight.ndim == 2 and tuple(bias.shape) == (weight.shape[1],)
            return weight.shape[1 if turned else 0]
    return 0


def holds_head(state: Mapping[str, Tensor], classifier: tuple[str, ...]) -> bool:
    """Whether a state has tensors of the classifier, in whatever form."""
    return any(is_head(key, classifier) for key in state)
