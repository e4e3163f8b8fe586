"""Prefixes and infixes that wrappers leave in the names of a checkpoint's tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.", "ema_model.", "model_ema.", "ema.",
            "teacher.", "student.")  # fmt: skip
MAX_WRAPPERS = 4  # around one another: module._orig_mod.model.backbone.
MAX_PREFIXES = 16  # tried of a container; files have two or three
MAX_DEPTH = 12  # dots of a name that are looked at
INSIDE = re.compile(r"(?<=\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")  # of a compiled or wrapped part
T = TypeVar("T")


def is_average(name: str) -> bool:
    """Whether a container or a prefix is of a running average of the weights, as timm's `state_dict_ema`."""
    return not {"ema", "teacher"}.isdisjoint(re.split(r"[._]", name.lower()))  # DINO's teacher is its student's average


def prefixes(names: Iterable[str]) -> list[str]:
    """The combinations of wrappers' prefixes that any of the names has, at most `MAX_PREFIXES`; none first. A first part that
    names an average (`net_ema.`) is a wrapper too."""
    names = list(names)
    averages = [f"{first}." for first in dict.fromkeys(name.partition(".")[0] for name in names) if is_average(first)]
    wrappers = dict.fromkeys([*averages, *PREFIXES])
    found = level = [""]
    for _ in range(MAX_WRAPPERS):
        level = [p + w for p in level for w in wrappers if any(name.startswith(p + w) for name in names)][:MAX_PREFIXES]
        found = found + level
    return found[:MAX_PREFIXES]


def shared_prefixes(names: Iterable[str], least: int) -> list[str]:
    """Every prefix with a dot at its end that at least `least` names have, those of most names first, at most `MAX_PREFIXES`."""
    parts = (name.split(".", MAX_DEPTH)[:-1] for name in names)
    counts = Counter(".".join(path[: depth + 1]) + "." for path in parts for depth in range(len(path)))
    return [prefix for prefix, count in counts.most_common() if count >= least][:MAX_PREFIXES]


def without_wrappers(tensors: Mapping[str, T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """Tensors without the wrappers' names inside of theirs (`blocks.0._orig_mod.norm1.weight`), and which names those were;
    as they are where two would have one name."""
    plain = {INSIDE.sub("", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        return dict(tensors), ()
    return plain, tuple(dict.fromkeys(found[1] for name in tensors for found in INSIDE.finditer(name)))
