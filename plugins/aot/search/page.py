"""The results of the search as Markdown: docs/results/tiles.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from plugins.account import EFFICIENCY, L2_BYTES, bucket_forms
from plugins.aot.search.choice import (
    GAIN,
    LEAST,
    WORST,
    WORTH,
    Known,
    State,
    chosen,
    gain,
    gain_there,
    geometric_mean,
    taken,
    times,
    weakest,
)
from plugins.aot.search.model import (
    EXPERTS,
    L2_LATENCY,
    MEMORY_LATENCY,
    PRODUCT_LATENCY,
    SETTINGS,
    SHARED_BYTES,
    STEP,
    board_of,
    bound_by,
    layers,
)
from plugins.aot.search.trials import label
from plugins.targets import target

States = dict[tuple[str, str], State]

HEADER = """# Tiles: the tactic table against a search

**Modelled**, all of it; nothing was run on a GPU. Made by

    python -m plugins.aot.search > docs/results/tiles.md

The command compiles settings around those that `plugins/tactics.py` lists for any SM (columns and depth of the tile, warps,
stages; of the group kernels the tokens too), drops what spills, has a stack, exceeds
shared memory or loses its tensor cores, and models the others. What came of each candidate stays in `build/tiles.jsonl`;
`--minutes 4` stops in between, and the same command goes on. What it takes stands in `SEARCHED` of that file, and the kernels of
this SM are built so, for float16 and bfloat16; a test holds the two together. No device has timed it. On a device TensorRT times
the tactics and keeps the fastest for each layer; these settings decide only how each tactic is compiled.

## What the model assumes

A launch takes the board's microseconds and the longest of five times. The first three are those of the
[account](kernels.md#what-a-layer-costs-and-what-fewer-launches-reach), with its boards, layers and sources.

- **Memory**: weights that any expert keeps and tokens, once.
- **Products** of the busiest multiprocessor, at {efficiency} of the peak. With fewer than four warps a multiprocessor reaches as
  many quarters of that.
- **L2**: each program's tiles, at {l2_bytes} bytes a clock and multiprocessor.
- **Shared memory**: tiles written once and read by every warp that needs them, at {shared} bytes a clock (CUDA C++ Programming
  Guide: 32 banks of 4 bytes). Warps divide a product into about square pieces. On sm_90 and sm_100 to sm_110 products of 64
  rows read it themselves.
- **Waits**: programs run in waves of as many as fit, by registers and shared memory of the binary. A step of a program takes
  the longer of two: a load's latency over the tiles on their way; or {step} cycles for a barrier and the read before the
  products, and these, which for each 16 columns of the sum take {product} cycles at least. A load takes {memory} cycles in the
  first wave, from memory, and {l2} later, from L2. How many tiles are on their way follows from the binary's shared memory.

The cycles are assumptions of ours, one set for all boards. Of one there is a source: an L40's L2 takes 222 to 339 (arXiv
2606.22588).

Not modelled: activations, the sorting of a group's tokens, bank conflicts, other instructions, clocks under load, experts of
unequal load.

Layers: ViT-S and ViT-B, 65, 197, 257 and 577 tokens, batch 1, 8 and 32, {experts} experts, half of the neurons each; `fused` has
those of ViT-S.

A candidate may be *best* if it is never below {worst} times as fast, nor its geometric mean over these layers below {least}, also
where the model assumes something else:

{settings}

It is **taken** if its mean is at least {gain}, also over the layers at which its tile is chosen. Candidates whose estimate before
compiling promises less than {worth} are not compiled.
"""
COLUMNS = """
- *sizes*: layers, of {count}, at which this tile is the fastest or within 5 %, by the table's kernels; other tiles serve the
  rest.
- *table*: what the tactic table lists for any SM.
- *bound by*: what the table's kernel meets at those sizes, and how often. Where it is `launch`, the launch takes longer than the
  work, and no tile helps.
- *regs, KiB, at once*: registers a thread, shared memory a program, programs on a multiprocessor at once.
- *gain*: geometric mean (worst case) over all layers; *at its sizes*: geometric mean there; *lowest*: lowest mean (lowest worst
  case) over all assumptions, and the assumption of the lowest mean.
- *compiled*: candidates compiled, how many of them were dropped.
"""


LAYER_HEADER = """
What that makes of a whole layer: microseconds of the fastest form by the table's kernels over those with the best found. Forms
are `tile` with clear and route, `group` and, for ViT-S, `fused`; `masked` and `group_fused` were not searched. The last column
is the launches' part of a layer's time, which no tile changes.

| SM | board | layers | all gains: mean (worst) | only those taken: mean (worst) | launches, median (most) |
|---|---|---|---|---|---|"""
TABLE = ("kernel", "sizes", "bound by", "table", "regs, KiB, at once", "best found", "regs, KiB, at once", "gain", "at its sizes",
         "lowest", "compiled")  # fmt: skip


def text(states: Sequence[State], most: int) -> str:
    """The whole page, of searches that may be unfinished, which their rows then say."""
    settings = "\n".join(f"- {setting.name}" for setting in SETTINGS[1:])
    experts = " and ".join(map(str, EXPERTS))
    header = HEADER.format(efficiency=EFFICIENCY, l2_bytes=L2_BYTES, shared=SHARED_BYTES, product=PRODUCT_LATENCY, step=STEP,
                           memory=MEMORY_LATENCY, l2=L2_LATENCY, worth=WORTH, gain=GAIN, worst=WORST, least=LEAST,
                           settings=settings, experts=experts)  # fmt: skip
    by_sm = {sm: {(s.group.role, s.group.variant): s for s in states if s.group.sm == sm} for sm in _sms(states)}
    parts = [header, "## Result\n", *_verdict(states, by_sm), "\n## Each search", COLUMNS.format(count=len(layers(0)))]
    parts.append(f"A search compiles at most {most} candidates.")
    for sm, own in by_sm.items():
        parts += _table(sm, own)
    return "\n".join(parts) + "\n"


def _sms(states: Sequence[State]) -> list[int]:
    return list(dict.fromkeys(state.group.sm for state in states))


def _name(state: State) -> str:
    return f"sm_{state.group.sm} {state.group.role} {state.group.variant}"


def _verdict(states: Sequence[State], by_sm: dict[int, States]) -> Iterator[str]:
    unfinished = [state for state in states if not state.finished]
    if unfinished:
        yield f"**Unfinished**: {len(unfinished)} of {len(states)} searches. Run the command again; nothing follows yet."
        return
    found = [state for state in states if taken(by_sm[state.group.sm], state)]
    count = sum(state.compiled for state in states)
    yield f"{count} kernels were compiled, {sum(state.dropped for state in states)} of them dropped."
    yield f"{len(found)} of {len(states)} searches found settings that are taken" + (":\n" if found else ".\n")
    lowest = []
    for state in found:
        assert state.best is not None and state.listed is not None
        least = weakest(state.group, state.listed.kernel, state.best.kernel)[0].mean
        mean = gain(state.group, state.listed.kernel, state.best.kernel).mean
        settings = f"{label(state.best.settings)} for {label(state.listed.settings)}"
        yield f"- {_name(state)}: {settings}: {mean:.2f}, lowest {least:.2f}"
        lowest.append(least)
    if found:
        vanish = sum(least < WORTH for least in lowest)
        yield f"\nIn {vanish} of them the gain vanishes (below {WORTH}) under an assumption that makes another bound longer."
    left = [f"{_name(state)} ({state.left})" for state in states if state.left]
    if left:
        yield f"\nCut off at the number that a search may compile, with promising candidates left: {', '.join(left)}."
    yield LAYER_HEADER
    for sm, own in by_sm.items():
        row = _layer_row(own)
        if row:
            yield f"| {sm} | {board_of(sm).profile.name} | {len(layers(0))} | {row}"


def _layer_row(own: States) -> str | None:
    """None where a role was not searched, so that no form is whole."""
    before = _forms(own, lambda state: state.listed)
    after = _forms(own, lambda state: state.best)
    only = _forms(own, lambda state: state.best if taken(own, state) else state.listed)
    if before is None or after is None or only is None:
        return None
    cells = []
    for forms in (after, only):
        ratios = [a[0] / b[0] for a, b in zip(before, forms, strict=True)]
        cells.append(f"{geometric_mean(ratios):.3f} ({min(ratios):.2f})")
    shares = [launches / total for total, launches in before]
    return f"{' | '.join(cells)} | {median(shares):.0%} ({max(shares):.0%}) |"


def _forms(own: States, pick) -> list[tuple[float, float]] | None:
    """(microseconds, of which launches) of the fastest form at each layer."""
    found: list[tuple[float, float]] = []
    kernels = {key: pick(state) for key, state in own.items()}
    tiles = [variant for role, variant in own if role == "expert_up" and ("expert_down", variant) in own]
    if not tiles or ("group_up", "r16") not in own or ("group_down", "r16") not in own:
        return None
    sample = next(iter(own.values())).group
    board = board_of(sample.sm)

    def of(role: str, variant: str) -> tuple[float, ...]:
        known: Known = kernels[role, variant]
        return times(own[role, variant].group, known.kernel)

    narrow = {layer: i for i, layer in enumerate(layers(384))}
    for i, layer in enumerate(layers(0)):
        route = board.time_us(next(bucket_forms(layer, sample.sm))[:2])
        forms = [(route + of("expert_up", v)[i] + of("expert_down", v)[i], 4) for v in tiles]
        forms.append((of("group_up", "r16")[i] + of("group_down", "r16")[i], 2))
        if layer in narrow and ("fused", "d384") in own:
            forms.append((route + of("fused", "d384")[narrow[layer]], 3))
        total, count = min(forms)
        found.append((total, count * board.profile.launch_us))
    return found


def _resources(known: Known) -> str:
    return f"{known.trial.registers}, {known.trial.shared_bytes / 1024:.0f}, {known.kernel.resident}"


def _table(sm: int, own: States) -> Iterator[str]:
    board = board_of(sm)
    yield f"\n### sm_{sm} ({target(sm).boards}), as {board.profile.name} with {board.multiprocessors} multiprocessors\n"
    yield f"| {' | '.join(TABLE)} |\n|{'---|' * len(TABLE)}"
    for state in own.values():
        yield _row(state, own)


def _row(state: State, own: States) -> str:
    group = state.group
    name = f"| {group.role} {group.variant} |"
    counted = f"{state.compiled}, {state.dropped} |"
    if state.listed is None or state.best is None:
        return f"{name} | | {label(group.listed)} | | unfinished | | | | | {counted}"
    at = chosen(own, group)
    every = layers(group.max_dim)
    where = range(len(every)) if at is None else at
    bounds = Counter(bound_by(every[i], state.listed.kernel, board_of(group.sm)) for i in where)
    cells = [
        "–" if at is None else str(len(at)),
        ", ".join(f"{bound} {count}" for bound, count in bounds.most_common()) or "–",
        label(state.listed.settings),
        _resources(state.listed),
    ]
    if not state.finished:
        cells += ["unfinished", "", "", "", ""]
    elif state.best is state.listed:
        cells += ["the table's", "", "1", "", ""]
    else:
        all_over = gain(group, state.listed.kernel, state.best.kernel)
        least, assumption = weakest(group, state.listed.kernel, state.best.kernel)
        there = gain_there(own, state)
        cells += [
            label(state.best.settings) + (" (**taken**)" if taken(own, state) else ""), _resources(state.best),
            f"{all_over.mean:.2f} ({all_over.worst:.2f})", "–" if there is None else f"{there:.2f}",
            f"{least.mean:.2f} ({least.worst:.2f}): {assumption}",
        ]  # fmt: skip
    return f"{name} {' | '.join(cells)} | {counted}"
