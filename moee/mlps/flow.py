"""MLPs whose parts are not one module: what runs after what in one forward pass.

The linear maps outside the modules that are MLPs already are watched. An up map, an activation and a down map belong together
where each gets what the one before it gave, by value; modules that pass their input on (dropout, identity) may lie between them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moee.interface.computed import is_leaf, is_parametrisation
from moee.layers.activations import ACTIVATIONS, KNOWN
from moee.mlps.structure import INERT, SHARED, Dense, is_map, read_split, runs_several_times, shared_parameters
from moee.models.ffn import FFN

WINDOW = 8  # maps whose output is kept at a time: what runs beside an MLP between its up and its down map
CLOSE = 1e-5  # of a function's values: where only its name is asked for
FUNCTION = "its activation is a function, not a module: use nn.GELU() or another module"
Judge = Callable[[FFN, tuple, dict, Any], tuple[str, int]]  # what a call shows against an MLP ("": nothing), its tokens an image


@dataclass(frozen=True)
class Site:
    """Three modules `parts` (paths of up map, activation, down map) that follow one another: an MLP, or what speaks against it.
    It sees `tokens` an image. `proved`: they compute an MLP, whatever speaks against taking them out."""

    parts: tuple[str, str, str]
    read: FFN | Dense
    tokens: int = 0
    proved: bool = False


@dataclass(frozen=True)
class Near:
    """Two maps of an MLP's widths that run one after the other, with a function between them, more than an activation, or what
    another map gave of the same tokens."""

    parts: tuple[str, str]
    read: Dense
    kind: Literal["function", "more", "gated"]


@dataclass
class _Pending:
    """An up map's call that no down map has taken up. `act` is the function module that got its output, `given` what that gave.
    `alone`: no other weights have come since. `ended`: something else got the output or what came of it."""

    path: str
    call: tuple[tuple, dict]
    output: Tensor
    act: str = ""
    given: Tensor | None = None
    alone: bool = True
    ended: bool = False


class Flow:
    """What the parts of `model` do in one forward pass, outside of the modules `whole`, which are MLPs as they are. `judge` holds
    an MLP's input and output against the formula. Watches nothing where no two maps fit together."""

    def __init__(self, model: nn.Module, whole: set[str], judge: Judge):
        inside = tuple(f"{name}." for name in whole)
        self.model, self.judge = model, judge
        self.parts: dict[str, Any] = {
            path: part for path, part in model.named_modules()
            if path and path not in whole and not path.startswith(inside) and not is_parametrisation(path)
            and (is_leaf(part) or _has_state(part)) and not isinstance(part, INERT)
        }  # fmt: skip
        self.maps = {path for path, part in self.parts.items() if is_map(part) and is_leaf(part)}
        sizes = Counter(tuple(self.parts[path].weight.shape[:2]) for path in self.maps)
        if not any(sizes[d, h] > (d == h) for h, d in list(sizes)):
            self.parts, self.maps = {}, set()
        self.hooked = {path for path, part in self.parts.items() if _has_hooks(part)}
        self.counts: Counter[str] = Counter()
        self.near: dict[str, Near] = {}
        self._sites: dict[str, Site] = {}
        self._pending: deque[_Pending] = deque(maxlen=WINDOW)
        self._linked: dict[str, _Pending] = {}
        self._reading = False  # an activation is told by what it gives, and that is no call of the model's

    def watch(self) -> list[Any]:
        """Put hooks on the model; returns their handles."""
        handles = []
        for path, part in self.parts.items():
            if path in self.maps:
                handles.append(part.register_forward_pre_hook(self._before_map(path), with_kwargs=True))
                handles.append(part.register_forward_hook(self._after_map(path), with_kwargs=True))
            elif _has_state(part):
                handles.append(part.register_forward_pre_hook(self._before_other))
            else:
                handles.append(part.register_forward_pre_hook(self._before_function(path)))
                handles.append(part.register_forward_hook(self._after_function(path)))
        return handles

    def sites(self) -> dict[str, Site]:
        """By the up map's path what followed one another in the pass, with what only its end shows. No two share a part."""
        self._pending.clear()
        shared, taken = shared_parameters(self.model), set[str]()
        result = {}
        for site in sorted(self._sites.values(), key=lambda site: not self._widens(site)):
            if not taken.isdisjoint((site.parts[0], site.parts[2])):
                continue
            taken.update((site.parts[0], site.parts[2]))
            obstacle = self._obstacle(site, shared) if site.proved else ""
            if obstacle:
                site = replace(site, read=Dense(obstacle, site.read.hidden))
            result[site.parts[0]] = site
        return result

    def _widens(self, site: Site) -> bool:
        """Of maps one after another, each pair would do: those that widen and narrow are meant."""
        hidden, dim = self.parts[site.parts[0]].weight.shape[:2]
        return hidden > dim

    def _obstacle(self, site: Site, shared: set[int]) -> str:
        """What speaks against taking the parts of an MLP out ("": nothing)."""
        up, act, down = site.parts
        for path in (up, down):
            if self.counts[path] > 1:
                return f"`{path}` {runs_several_times(self.counts[path])}"
            if any(id(p) in shared for p in self.parts[path].parameters()):
                return SHARED
        if self.counts[act] > 1:
            return f"its activation `{act}` runs {self.counts[act]} times in one forward pass: give each MLP one of its own"
        hooked = [path for path in site.parts if path in self.hooked]
        return f"`{hooked[0]}` carries hooks of its own" if hooked else ""

    def _before_map(self, path: str):
        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.counts[path] += 1
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                x = args[0]
                chain = _last([p for p in self._pending if p.given is not None and not p.ended and _same(p.given, x)])
                if chain is not None:
                    self._linked[path] = chain
                elif self._pending:
                    self._note(self._pending[-1], path, x)
            self._interrupt()

        return see

    def _after_map(self, path: str):
        def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            chain = self._linked.pop(path, None)
            if chain is not None and chain.path not in self._sites:
                self._read((chain.path, chain.act, path), chain, output)
            if isinstance(output, Tensor):
                self._pending.append(_Pending(path, (args, kwargs), output))

        return see

    def _before_function(self, path: str):
        def see(module: nn.Module, args: tuple) -> None:
            if self._reading:
                return
            self.counts[path] += 1
            if len(args) == 1 and isinstance(args[0], Tensor):
                source = _last([p for p in self._pending if not p.act and _same(p.output, args[0])])
                if source is not None:
                    source.act = path

        return see

    def _after_function(self, path: str):
        def see(module: nn.Module, args: tuple, output: Any) -> None:
            source = _last([p for p in self._pending if p.act == path and p.given is None])
            if source is not None and isinstance(output, Tensor):
                source.given = output

        return see

    def _before_other(self, module: nn.Module, args: tuple) -> None:
        """A module with numbers of its own, such as a norm, ends a chain: drawn at random it may change nothing, trained it
        does."""
        for pending in self._pending:
            pending.alone &= not has_weights(module)
            reached = pending.output if pending.given is None else pending.given
            pending.ended |= any(isinstance(x, Tensor) and _same_values(reached, x) for x in args)

    def _interrupt(self) -> None:
        for pending in self._pending:
            pending.alone = False

    def _read(self, paths: tuple[str, str, str], chain: _Pending, output: Any) -> None:
        """Judge three modules that follow one another, now that the last has run."""
        if not self._fit(paths[0], paths[2]):
            return  # of a stack of maps
        self._reading = True
        read, tokens = read_split(paths, *(self.parts[path] for path in paths)), 0
        self._reading = False
        if isinstance(read, FFN):
            obstacle, tokens = self.judge(read, *chain.call, output)
            read = Dense(obstacle, read.hidden) if obstacle else read
        if read is not None:
            self._sites[paths[0]] = Site(paths, read, tokens, isinstance(read, FFN))

    def _fit(self, up: str, down: str) -> bool:
        (hidden, dim), (out, read) = (self.parts[path].weight.shape[:2] for path in (up, down))
        return hidden == read and dim == out

    def _note(self, before: _Pending, path: str, x: Tensor) -> None:
        """Note two maps of an MLP's widths that run one after the other, between which something else than one module lies."""
        if not before.alone or not self._fit(before.path, path) or before.path in self.near:
            return
        hidden, dim = self.parts[before.path].weight.shape[:2]
        is_function = not before.act and not before.ended and _is_known_function(before.output, x)
        if before.output.shape != x.shape or (not is_function and (hidden <= dim or not self._in_one_block(before.path, path))):
            return
        kind: Literal["function", "more", "gated"]
        beside = [p for p in self._pending if p is not before and _same_input(p, before)]
        if any(p.output.shape != before.output.shape for p in beside):
            return  # attention's
        if beside:
            kind, reason = "gated", f"gated: `{beside[0].path}` and `{before.path}` read the same tokens"
        elif before.act or before.ended:
            kind, reason = "more", f"more than an activation lies between `{before.path}` and `{path}`"
        elif is_function or x.is_meta:
            kind, reason = "function", FUNCTION
        else:
            kind, reason = "function", f"what lies between `{before.path}` and `{path}` is none of {KNOWN}"
        self.near[before.path] = Near((before.path, path), Dense(reason, int(hidden)), kind)

    def _in_one_block(self, up: str, down: str) -> bool:
        """Whether two maps are of one block: in the innermost module around both, the parts that hold them hold nothing else."""
        a, b = up.split("."), down.split(".")
        depth = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        around = (self.model.get_submodule(".".join(path[: depth + 1])) for path in (a, b))
        return all(sum(map(has_weights, part.modules())) == 1 for part in around)


def has_weights(module: nn.Module) -> bool:
    """Whether a module holds a matrix or a kernel itself, not in a part."""
    return any(p is not None and sum(size > 1 for size in p.shape) > 1 for p in module._parameters.values())


def _has_state(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _has_hooks(module: nn.Module) -> bool:
    """Whether something else looks at what a module gets or gives."""
    return any((module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks))


def _last(pending: list[_Pending]) -> _Pending | None:
    return pending[-1] if pending else None


def _same_input(a: _Pending, b: _Pending) -> bool:
    one, other = (p.call[0][0] if len(p.call[0]) == 1 else None for p in (a, b))
    return isinstance(one, Tensor) and isinstance(other, Tensor) and _same(one, other)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values; without memory: lie in the same place."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.is_meta:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.stride() == b.stride()
    return torch.equal(a, b)


def _same_values(a: Tensor, b: Tensor) -> bool:
    """As `_same`, in any shape."""
    if a.is_meta or b.is_meta:
        return a.is_meta == b.is_meta and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return _same(a.reshape(-1), b.reshape(-1))


def _is_known_function(before: Tensor, after: Tensor) -> bool:
    """Whether a known activation makes one tensor of the other."""
    if before.is_meta or before.shape != after.shape or before.dtype != after.dtype:
        return False
    return any(torch.allclose(row.forward(before), after, rtol=CLOSE, atol=CLOSE) for row in ACTIVATIONS.values())
