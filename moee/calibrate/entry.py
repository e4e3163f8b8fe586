"""Where a forward pass can be taken up again: the input of a module that is all the layers behind it need of the images.

The early stages of a hierarchical model have many times more tokens an image than the late ones. To run many images through the
late stages together, the early ones see them in batches, and the inputs of the first late block are kept. Then one image goes
through the early stages once more and those inputs take the place of its own. That this changes nothing is tried, not assumed:
models hand things past a block, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moee.interface.watch import watched

TOLERANCE = 1e-4  # of the largest value: what the order of additions may change
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)  # of a model whose inputs do not fit together


class Reached(Exception):
    """Ends a forward pass of which nothing more is needed."""


@dataclass(frozen=True)
class Entry:
    """A module and which of its arguments have rows an image: `rows` positional ones, `named` keyword ones; `numbers` are the
    values of one image in all of them."""

    name: str
    rows: tuple[bool, ...]
    named: tuple[str, ...]
    numbers: int


@dataclass(frozen=True)
class Inputs:
    """What an entry got: values of all images where the entry says so, None elsewhere."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_entry(model: nn.Module, names: Sequence[str], earlier: Iterable[str], image: Tensor) -> Entry | None:
    """The innermost module around the layer `names[0]`, with none of the `earlier` layers in it, behind which all of `names` see
    the same whether the model runs as a whole or is taken up there. None if no module does. `image` [1, C, H, W] gives the size.
    """
    pair = torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(0)).to(image)
    expected = _inputs_of(model, names, pair)
    earlier = tuple(earlier)
    block = names[0].rpartition(".")[0]
    while block and not any(name.startswith(f"{block}.") for name in earlier):
        try:
            entry = _describe(model, block, pair)
            if entry is not None:
                with taken_up(model, entry, gather(model, entry, [pair], 2)):
                    got = _inputs_of(model, names, pair[1:])
                if all(_alike(a, b) for a, b in zip(got, expected, strict=True)):
                    return entry
        except FAILURES:  # its inputs depend on the number of images in a way that arguments do not show
            pass
        block = block.rpartition(".")[0]
    return None


def gather(model: nn.Module, entry: Entry, batches: Iterable[Tensor], images: int) -> Inputs:
    """What the entry gets for the images [B, C, H, W] of all `batches`, at most `images` of them; the model runs no further."""
    stores: dict[int | str, Tensor] = {}
    filled = 0

    def keep(key: int | str, value: Tensor, size: int) -> None:
        rows = len(value) // size  # of one image
        if key not in stores:
            stores[key] = value.new_empty((images * rows, *value.shape[1:]))
        stores[key][filled * rows : (filled + size) * rows] = value

    for batch in batches:
        args, kwargs = _arguments(model, entry.name, batch)
        for position, wanted in enumerate(entry.rows):
            if wanted:
                keep(position, args[position], len(batch))
        for name in entry.named:
            keep(name, kwargs[name], len(batch))
        filled += len(batch)
    whole = {key: store[: len(store) // images * filled] for key, store in stores.items()}
    return Inputs(tuple(whole.get(i) for i in range(len(entry.rows))), {name: whole[name] for name in entry.named})


@contextmanager
def taken_up(model: nn.Module, entry: Entry, inputs: Inputs) -> Iterator[None]:
    """The model with `inputs` in the place of what the entry would get: run it on one image, once. Passes that wait within such
    blocks do not disturb each other."""
    put_in = False

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal put_in
        if put_in:
            return None
        put_in = True
        chosen = (ours if wanted else own for own, ours, wanted in zip(args, inputs.args, entry.rows, strict=True))
        return tuple(chosen), {**kwargs, **inputs.kwargs}

    with _hooked(model, entry.name, put):
        yield


def _describe(model: nn.Module, block: str, pair: Tensor) -> Entry | None:
    """The entry at a module that runs once, told by which arguments double with the number of images; None for others."""
    calls = 0

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += 1

    with _hooked(model, block, count):
        model(pair[1:])
    if calls != 1:
        return None
    (args, kwargs), (one, one_named) = _arguments(model, block, pair), _arguments(model, block, pair[1:])
    rows = tuple(_doubles(a, b) for a, b in zip(args, one, strict=True))
    named = tuple(name for name in kwargs if _doubles(kwargs[name], one_named[name]))
    values = [a for a, wanted in zip(one, rows, strict=True) if wanted] + [one_named[name] for name in named]
    return Entry(block, rows, named, sum(v.numel() for v in values)) if values else None


def _doubles(two: Any, one: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(two, Tensor) and one.dim() > 0 and len(two) == 2 * len(one)


def _arguments(model: nn.Module, name: str, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a module for some images; the model runs no further."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise Reached

    with _hooked(model, name, stop):
        run_until_reached(model, images)
    return calls[0]


def _inputs_of(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Tensor]:
    """Inputs of the named layers; the model runs no further than the last."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        inputs[name] = x.detach().clone()
        if len(inputs) == len(names):
            raise Reached

    with watched(model, names, keep):
        run_until_reached(model, images)
    return [inputs[name] for name in names]


def run_until_reached(model: nn.Module, images: Tensor) -> None:
    """Run the model until something raises `Reached`, or to its end."""
    try:
        model(images)
    except Reached:
        pass


@contextmanager
def _hooked(model: nn.Module, name: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=TOLERANCE * float(b.abs().max()))
