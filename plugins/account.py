"""An account of one FFN layer on GPUs: what must be moved, computed and launched, and what each form of the operator would reach.

Everything here is *modelled* from shapes, tiles and data sheets; nothing was run on a GPU. A launch takes
`launch_us` and the longest of three times: bytes from memory, the products of the busiest multiprocessor, its bytes from L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from plugins.aot.manifest import Manifest
from plugins.devices import Profile, profile_named
from plugins.kernels.group import GROUP, SCORED
from plugins.tactics import TACTICS, VARIANTS, config
from plugins.targets import occupancy

EFFICIENCY = 0.6  # of the peak that products reach, as in the planner's roofline
L2_BYTES = 64  # a clock and multiprocessor
BYTES = 2  # float16
DTYPE = "float16"
DENSE_TILES = ((64, 64), (128, 64), (128, 128))
BOARDS: tuple[tuple[str, int, float], ...] = (  # profile, multiprocessors, GHz
    ("orin-agx", 16, 1.3), ("thor-agx", 20, 1.57), ("rtx-4060", 24, 2.46), ("rtx-5090", 170, 2.41), ("h200", 132, 1.98),
)  # fmt: skip
MODELS = (("ViT-S", 384, 1536), ("ViT-B", 768, 3072))
TOKENS, BATCHES, EXPERTS = (65, 197, 257, 577), (1, 8, 32), (1, 4, 8, 32)


@dataclass(frozen=True)
class Layer:
    """T tokens, D, dense hidden width, K experts that keep half of the neurons each; of several experts the union is all."""

    tokens: int
    dim: int
    hidden: int
    experts: int

    @property
    def width(self) -> int:
        return self.hidden // 2

    @property
    def flops(self) -> int:
        routing = 2 * self.tokens * self.dim * self.experts if self.experts > 1 else 0
        return 4 * self.tokens * self.dim * self.width + routing

    @property
    def bytes(self) -> int:
        """Weights that any expert keeps, tokens in and out; hidden values stay in L2."""
        union = self.width if self.experts == 1 else self.hidden
        return BYTES * (2 * union * self.dim + 2 * self.tokens * self.dim)

    def tiles(self, rows: int, tokens: int | None = None) -> int:
        """Row tiles of all experts, if each gets as many tokens as the others."""
        count = self.tokens if tokens is None else tokens
        return sum(ceil((count // self.experts + (e < count % self.experts)) / rows) for e in range(self.experts))


@dataclass(frozen=True)
class Launch:
    """Programs, what each computes (MACs) and reads through L2 (bytes), and bytes from memory of all together."""

    programs: int = 0
    macs: int = 0
    l2: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Board:
    """A profile with what the account needs beside it."""

    profile: Profile
    multiprocessors: int
    ghz: float

    def time_us(self, launches: list[Launch]) -> float:
        """Modelled time of launches one after another, the first of which reads the weights."""
        total = 0.0
        for step in launches:
            most = ceil(step.programs / self.multiprocessors)
            products = 2 * most * step.macs / (self.profile.tflops * 1e6 * EFFICIENCY / self.multiprocessors)
            l2 = most * step.l2 / (L2_BYTES * self.ghz * 1e3)
            total += self.profile.launch_us + max(step.memory / (self.profile.gbytes * 1e3), products, l2)
        return total


def dense(layer: Layer, width: int) -> Iterator[list[Launch]]:
    """Two products, in each tile shape that libraries choose from."""
    weights, tokens = BYTES * width * layer.dim, BYTES * layer.tokens * layer.dim
    for m, n in DENSE_TILES:
        rows = ceil(layer.tokens / m)
        yield [
            Launch(rows * ceil(out / n), m * n * inner, BYTES * (m + n) * inner, weights + tokens)
            for out, inner in ((width, layer.dim), (layer.dim, width))
        ]


def bucket_forms(layer: Layer, sm: int | None = None) -> Iterator[list[Launch]]:
    """Today's tactics: clear, route, then up and down or both at once, in the tiles of an SM."""
    t, d, w = layer.tokens, layer.dim, layer.width
    half = layer.bytes // 2
    before = [Launch(), Launch(ceil(t / 16), 16 * 64 * d, BYTES * (16 + 64) * d, BYTES * t * d)]
    for tactic in TACTICS:
        if not tactic.fits(t, d, 1) or tactic.kind not in ("tile", "masked", "fused"):
            continue
        steps = [config(s.role, s.variant, DTYPE, sm).block for s in tactic.launches if s.role not in ("route", "combine")]
        m, n = steps[0].m, steps[0].n
        if tactic.kind == "fused":
            yield [*before, Launch(layer.tiles(m), 2 * m * w * d, BYTES * (2 * w + m) * d, 2 * half)]
            continue
        rows, inner = (layer.tiles(m), w) if tactic.kind == "tile" else (ceil(t / m), layer.hidden)
        up = Launch(rows * ceil(inner / n), m * n * d, BYTES * (m + n) * d, half)
        yield [*before, up, Launch(rows * ceil(d / n), m * n * inner, BYTES * (m + n) * inner, half)]


def groups(layer: Layer, block: int) -> tuple[int, int]:
    """Programs over tokens, and tiles of the one that has most, where a group has a program for every `block` tokens."""
    found = []
    for start in range(0, layer.tokens, GROUP):
        tokens = min(GROUP, layer.tokens - start)
        found.append(ceil(layer.tiles(16, tokens) / ceil(tokens / block)))
    return ceil(layer.tokens / block), max(found)


def scoring(layer: Layer) -> tuple[int, int]:
    """MACs and bytes of a group's scores."""
    blocks = ceil(layer.experts / SCORED)
    return GROUP * SCORED * blocks * layer.dim, BYTES * blocks * (GROUP + SCORED) * layer.dim


def two_launches(layer: Layer, sm: int | None = None) -> list[Launch]:
    """`group_up`, `group_down`."""
    up, down = (config(role, "r16", DTYPE, sm).block for role in ("group_up", "group_down"))
    (macs, read), half = scoring(layer), layer.bytes // 2
    programs, tiles = groups(layer, up.m)
    first = Launch(programs * ceil(layer.width / up.n), macs + tiles * 16 * up.n * layer.dim,
                   read + tiles * BYTES * (16 + up.n) * layer.dim, half)  # fmt: skip
    programs, tiles = groups(layer, down.m)
    return [first, Launch(programs * ceil(layer.dim / down.n), tiles * 16 * down.n * layer.width,
                          tiles * BYTES * (16 + down.n) * layer.width, half)]  # fmt: skip


def one_launch(layer: Layer, sm: int | None = None) -> list[Launch] | None:
    """`group_fused`; None for tokens that are too wide for it."""
    if not any(t.kind == "group_fused" and t.fits(layer.tokens, layer.dim, 1) for t in TACTICS):
        return None
    m = config("group_fused", "d384", DTYPE, sm).block.m
    count = ceil(layer.tokens / GROUP)
    size = ceil(layer.tokens / count)
    programs, tiles = ceil(layer.tokens / m) + layer.experts, layer.tiles(m, size)
    share = ceil(tiles * count / programs)
    busy = count * ceil(tiles / share)  # those without a tile score their group too
    macs, read = (x * programs // busy for x in scoring(layer))
    return [Launch(busy, macs + share * 2 * m * layer.width * layer.dim,
                   read + share * BYTES * (2 * layer.width + m) * layer.dim, layer.bytes)]  # fmt: skip


def boards() -> list[Board]:
    """The boards of the account."""
    return [Board(profile_named(name), count, ghz) for name, count, ghz in BOARDS]


def times_us(board: Board, layer: Layer) -> dict[str, float]:
    """Modelled microseconds: dense, today's best tactic, two launches, one. One expert is a plain MLP: dense and static."""
    fastest = min(board.time_us(form) for form in dense(layer, layer.hidden))
    if layer.experts == 1:
        return {"dense": fastest, "static": min(board.time_us(form) for form in dense(layer, layer.width))}
    sm = board.profile.sm
    today = min(map(board.time_us, bucket_forms(layer, sm)))
    times = {"dense": fastest, "today": today, "two": board.time_us(two_launches(layer, sm))}
    single = one_launch(layer, sm)
    return times if single is None else {**times, "one": board.time_us(single)}


def text(build: Manifest) -> str:
    """The account as Markdown, of the boards that `build` has kernels for: their registers and shared memory say how many
    programs run at once."""
    parts = [HEADER.format(efficiency=EFFICIENCY, l2=L2_BYTES), *_shapes(), BOARDS_HEADER]
    built = [board for board in boards() if board.profile.sm in build.sms]
    for board in built:
        p = board.profile
        figures = (board.multiprocessors, board.ghz, f"{p.tflops:g}", f"{p.gbytes:g}", f"{p.launch_us:g}")
        parts.append(f"| {p.name} | sm_{p.sm} | {' | '.join(map(str, figures))} | {p.source} |")
    for board in built:
        parts += _board(board, build)
    return "\n".join([*parts, *_layout()]) + "\n"


def packed_bytes(layer: Layer) -> int:
    """Bytes of a layer's weights with a copy of its rows for every expert."""
    return BYTES * 2 * layer.experts * layer.width * layer.dim


def idle_share(width: int, multiple: int, tile: int) -> float:
    """Share of a tile's columns that do nothing, on average over widths about `width` that are multiples of `multiple`."""
    widths = range(width - tile + multiple - width % multiple, width + multiple, multiple)
    return sum(1 - w / (ceil(w / tile) * tile) for w in widths) / len(widths)


def _layout() -> Iterator[str]:
    yield LAYOUT_HEADER
    yield "| layer | store MiB | ids / weights | packed MiB, K = 4, 8, 32 | µs on orin-agx: store, packed at K = 4, 8, 32 |"
    yield "|---|---|---|---|---|"
    gbytes = profile_named("orin-agx").gbytes
    for name, dim, hidden in MODELS:
        layers = [Layer(1, dim, hidden, k) for k in EXPERTS[1:]]
        store = BYTES * 2 * hidden * dim
        packed = [packed_bytes(layer) for layer in layers]
        sizes = ", ".join(f"{b / 2**20:.1f}" for b in packed)
        times = ", ".join(f"{b / gbytes / 1e3:.0f}" for b in (store, *packed))
        yield f"| {name} | {store / 2**20:.1f} | {4 / (BYTES * dim):.2%} | {sizes} | {times} |"
    yield TILES_HEADER
    columns = sorted({c.block.n for (role, _), c in VARIANTS[DTYPE].items() if role in ("expert_up", "group_up")})
    yield "| layer | tile | any width | multiples of 8 | 16 | 32 | 64 |\n|---|---|---|---|---|---|---|"
    for name, _, hidden in MODELS:
        for tile in columns:
            cells = (f"{idle_share(hidden // 2, multiple, tile):.1%}" for multiple in (1, 8, 16, 32, 64))
            yield f"| {name}, {hidden // 2} neurons an expert | {tile} | " + " | ".join(cells) + " |"


def _cases() -> Iterator[tuple[str, int, int, list[Layer]]]:
    for name, dim, hidden in MODELS:
        for tokens in TOKENS:
            for batch in BATCHES:
                yield name, tokens, batch, [Layer(tokens * batch, dim, hidden, k) for k in EXPERTS]


def _shapes() -> Iterator[str]:
    yield "| layer | tokens | batch | " + " | ".join(f"K = {k}" for k in EXPERTS) + " |"
    yield "|---|---|---|" + "---|" * len(EXPERTS)
    for name, tokens, batch, layers in _cases():
        cells = [f"{x.flops / 1e6:.0f} / {x.bytes / 2**20:.1f} / {x.tiles(16)}" for x in layers]
        yield f"| {name} | {tokens} | {batch} | " + " | ".join(cells) + " |"


def _board(board: Board, build: Manifest) -> Iterator[str]:
    up = build.find("group_up", "r16", "float16", board.profile.sm)
    at_once = board.multiprocessors * occupancy(board.profile.sm, up.registers, up.shared_bytes, up.num_warps)
    yield f"\n### {board.profile.name}\n"
    names = ["K = 1" if k == 1 else f"K = {k}: today, two, one" for k in EXPERTS]
    floors = "floors µs, K = 8: memory, products, 4 / 2 / 1 launches"
    yield f"| layer | tokens | batch | dense µs | {floors} | waves | " + " | ".join(names) + " |"
    yield "|---|---|---|---|---|---|" + "---|" * len(EXPERTS)
    lost: dict[int, list[str]] = {}
    for name, tokens, batch, layers in _cases():
        eight, p = layers[EXPERTS.index(8)], board.profile
        floors = f"{eight.bytes / p.gbytes / 1e3:.1f}, {eight.flops / p.tflops / 1e6:.1f}, "
        floors += " / ".join(f"{n * p.launch_us:g}" for n in (4, 2, 1))
        waves = ceil(two_launches(eight, p.sm)[0].programs / at_once)
        cells, whole = [], 0.0
        for layer in layers:
            times = times_us(board, layer)
            whole = times.pop("dense")
            cells.append(", ".join(f"{whole / t:.2f}" for t in times.values()))
            if layer.experts > 1 and whole / min(times.values()) <= 1:
                lost.setdefault(layer.experts, []).append(f"{name} {tokens} × {batch}")
        yield f"| {name} | {tokens} | {batch} | {whole:.1f} | {floors} | {waves} | " + " | ".join(cells) + " |"
    for k in EXPERTS[1:]:
        yield f"\nNo form of {k} experts beats dense at: {', '.join(lost.get(k, ['no size of the table']))}."


HEADER = """## What a layer costs, and what fewer launches reach

**Modelled**, all of it: `python -m plugins.aot.resources build/kernels` computes these tables from shapes, tiles and data
sheets (`plugins/account.py`); nothing was run on a GPU. One FFN in float16, experts keep half of the neurons each, the union of
several experts is every neuron, and all experts get alike many tokens. A launch costs the board's µs and the longest of three
times: bytes from memory; the products of the busiest multiprocessor at {efficiency} of the peak; its tiles' bytes from L2 at
{l2} bytes a clock (an assumption: A100's L2 gives 5,120 bytes a clock to 108 multiprocessors, NVIDIA A100 white paper).

- *Dense* is two products, each in the best of three tile shapes. K = 1 is a plain MLP of half the width, without the plugin.
- *Today* is the best of the tactics that clear, route and then compute. *Two* is `group16`, *one* `group_fused_d384`, which
  serves D up to 384. Their figures are speed-ups over dense: below 1 is slower.
- *Waves* are those of `group_up` at K = 8, by the registers and shared memory of its binary.

Millions of FLOPs / MiB that must be moved (weights once, tokens in and out) / row tiles of 16 tokens:
"""
BOARDS_HEADER = """
Boards. Microseconds a launch are an assumption (`plugins/devices.py`): what a kernel waits for the one before it and for its
first instructions. `selftest` and `moee bench` measure it on a device. Clocks are the boards' boost clocks.

| board | SM | multiprocessors | GHz | TFLOP/s | GB/s | µs a launch | source |
|---|---|---|---|---|---|---|---|"""
LAYOUT_HEADER = """
## One store, or a copy for every expert

The kernels read the rows of an expert from one store of all neurons that any expert keeps, by ids. A row is contiguous and as
wide as a token, so reading by ids costs the ids alone: 4 bytes beside a row. A copy of its rows for every expert (packed) would
save these, and multiply the weights that must come from memory by what experts share. **It was not built**: with few tokens
memory is the floor of a layer, and there the copies would cost more than the ids by far (modelled, as above: every expert has
tokens and keeps half of the neurons; weights alone).
"""
TILES_HEADER = """
What a packed layout would do for tiles, widths do: a tile of the up product that an expert fills in part costs as a whole one.
Share of its columns that do nothing, on average over widths about half of the layer's (`--width-multiple`, 16 where presets and
plans choose; 64 leaves no partial tile in most forms):
"""
