"""What one kernel of a tile shape would take on a board: the account's bounds, and what a program waits for. All *modelled*.

A launch takes the board's microseconds and the longest of five times: bytes from memory; and on the busiest multiprocessor its
products, its bytes from L2, its bytes through shared memory, and its programs' waits one wave after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from plugins.account import BATCHES, BYTES, EFFICIENCY, L2_BYTES, MODELS, TOKENS, Board, Layer, boards, groups, scoring
from plugins.devices import profile_named
from plugins.kernels.group import SCORED
from plugins.kernels.spec import Block
from plugins.targets import occupancy

EXPERTS = (8, 32)
# Cycles, assumed for all boards. An L40's L2 takes 222 to 339 (arXiv 2606.22588); that memory takes twice as long, and a product
# of 16 x 8 x 16 with float32 sums about 33, nobody looked up.
L2_LATENCY, MEMORY_LATENCY, PRODUCT_LATENCY = 280, 560, 33
STEP = 60  # a barrier and a read of shared memory (about 30) before a step's products
SHARED_BYTES = 128  # a clock and multiprocessor, CUDA C++ Programming Guide: 32 banks of 4 bytes
QUARTERS = 4  # of a multiprocessor, each with a tensor core that its own warps use alone
ASYNC_SMS, ASYNC_ROWS = (90, 100, 103, 110), 64  # where products of this many rows read their operands from shared memory
DOWN_ROLES, GROUP_ROLES = ("expert_down", "group_down"), ("group_up", "group_down")
ROWS = 16  # of a tile of the group kernels
SCORE_K = 32  # columns of a group's scores at a time


@dataclass(frozen=True)
class Setting:
    """What is assumed. `share`: part of the neurons that an expert keeps, in 32nds; `part`: such a part of the board is there."""

    name: str
    efficiency: float = EFFICIENCY
    latency: float = 1.0
    l2: int = L2_BYTES
    shared: int = SHARED_BYTES
    share: int = 16
    part: int = 1


SETTINGS = (
    Setting("no other"),
    Setting("latencies × 0.6", latency=0.6),
    Setting("latencies × 1.6", latency=1.6),
    Setting("products at 0.4 of the peak", efficiency=0.4),
    Setting("products at 0.8 of the peak", efficiency=0.8),
    Setting("L2 at 32 bytes a clock", l2=32),
    Setting("shared memory at 256 bytes a clock", shared=256),
    Setting("experts of 15/32 of the neurons", share=15),
    Setting("a quarter of the board", part=4),
)


@dataclass(frozen=True)
class Tile:
    """One kernel: `depth` tiles are on their way while one is computed, `resident` programs are on a multiprocessor at once."""

    role: str
    block: Block
    warps: int
    depth: float
    resident: int
    sm: int

    @property
    def rows(self) -> int:
        """Rows of its products."""
        return ROWS if self.role in GROUP_ROLES else self.block.m


@dataclass(frozen=True)
class Work:
    """Programs of a launch and what one has to do: `tiles`, each of `steps`, after `before` steps of scoring. A step: MACs, bytes
    from L2, bytes through shared memory, products that wait for one another (`chain`)."""

    programs: int
    tiles: int
    steps: int
    macs: int
    l2: int
    shared: int
    chain: int
    loads: int  # that wait for one another before a tile's first step
    memory: int  # bytes, all programs together
    before: int = 0
    before_macs: int = 0
    before_l2: int = 0


def asynchronous(sm: int, rows: int) -> bool:
    """Whether a product of so many rows reads both operands from shared memory by itself (HGMMA, UTCHMMA)."""
    return sm in ASYNC_SMS and rows >= ASYNC_ROWS


def step_bytes(role: str, rows: int, block: Block) -> int:
    """Bytes that one step of a program loads."""
    return BYTES * (2 * block.n * block.k if role == "fused" else (rows + block.n) * block.k)


def tile(role: str, block: Block, warps: int, stages: int, *, registers: int, shared_bytes: int, sm: int) -> Tile:
    """From what the compiler made. How many tiles are on their way follows from the shared memory that it took: that is fewer
    than was asked for where a load waits for another. `resident` is 0 where not one program fits."""
    rows = ROWS if role in GROUP_ROLES else block.m
    buffers = shared_bytes / step_bytes(role, rows, block) - asynchronous(sm, rows)
    depth = min(stages - 1, buffers if role == "fused" else int(buffers))
    return Tile(role, block, warps, max(1.0, depth), occupancy(sm, registers, shared_bytes, warps), sm)


def warp_grid(rows: int, columns: int, warps: int) -> tuple[int, int]:
    """Warps along rows and columns of a product, as Triton divides it: about square pieces, at least 16 rows each."""
    down, across = 1, 1
    while down * across < warps:
        if rows // 16 // down >= columns // 16 // across and down < rows // 16:
            down *= 2
        else:
            across *= 2
    return down, across


@cache
def work(layer: Layer, role: str, block: Block, warps: int, sm: int) -> Work:
    """What the programs of a role do for a layer; tokens fall on experts alike."""
    d, w = layer.dim, layer.width
    if role == "fused":
        # Both products of BN neurons a step; the second waits for the first.
        return Work(layer.tiles(block.m), 1, ceil(w / block.n), 2 * block.m * block.n * d, BYTES * 2 * block.n * d, 0,
                    ceil(d / 16) + ceil(block.n / 16), 4, layer.bytes)  # fmt: skip
    down = role in DOWN_ROLES
    inner, out = (w, d) if down else (d, w)
    rows = ROWS if role in GROUP_ROLES else block.m
    steps, columns, half = ceil(inner / block.k), ceil(out / block.n), layer.bytes // 2
    macs, l2, chain = rows * block.n * block.k, BYTES * (rows + block.n) * block.k, ceil(block.k / 16)
    if asynchronous(sm, rows):
        reads = rows + block.n * ceil(rows / ASYNC_ROWS)
    else:
        along, across = warp_grid(rows, block.n, warps)
        reads = rows * across + block.n * along
    shared = BYTES * reads * block.k + l2
    if role not in GROUP_ROLES:
        return Work(layer.tiles(rows) * columns, 1, steps, macs, l2, shared, chain, 4, half)
    programs, tiles = groups(layer, block.m)
    scores, read = (0, 0) if down else scoring(layer)
    before = 0 if down else ceil(layer.experts / SCORED) * ceil(d / SCORE_K)
    return Work(programs * columns, tiles, steps, macs, l2, shared, chain, 3, half, before, scores, read)


def bounds_us(task: Work, kernel: Tile, board: Board, setting: Setting) -> dict[str, float]:
    """Microseconds of each bound by name; the launch's own are the first."""
    rate = board.profile.tflops * 500 / (board.multiprocessors * board.ghz) * setting.efficiency  # MACs a clock
    most = ceil(task.programs / board.multiprocessors)
    resident = max(1, kernel.resident)
    used = min(1.0, min(resident, most) * kernel.warps / QUARTERS)
    alone = task.macs / (rate * min(1.0, kernel.warps / QUARTERS))
    chain = STEP + max(task.chain * PRODUCT_LATENCY, alone)
    score = STEP + PRODUCT_LATENCY * SCORE_K // 16

    def path(latency: float) -> float:
        wait = latency * setting.latency
        return task.before * max(wait / kernel.depth, score) + task.tiles * (
            task.loads * wait + task.steps * max(wait / kernel.depth, chain)
        )

    work_steps, clock = task.tiles * task.steps, board.ghz * 1e3
    return {
        "launch": board.profile.launch_us,
        "memory": task.memory / (board.profile.gbytes * 1e3),
        "products": most * (task.before_macs + work_steps * task.macs) / (rate * used) / clock,
        "L2": most * (task.before_l2 + work_steps * task.l2) / setting.l2 / clock,
        "shared memory": most * work_steps * task.shared / setting.shared / clock,
        "waits": (path(MEMORY_LATENCY) + (ceil(most / resident) - 1) * path(L2_LATENCY)) / clock,
    }


def time_us(layer: Layer, kernel: Tile, board: Board, setting: Setting = SETTINGS[0]) -> float:
    """Microseconds of one launch."""
    bounds = bounds_us(work(layer, kernel.role, kernel.block, kernel.warps, kernel.sm), kernel, board, setting)
    return bounds.pop("launch") + max(bounds.values())


def bound_by(layer: Layer, kernel: Tile, board: Board) -> str:
    """Which bound a launch meets; `launch` where the launch itself takes more than the longest of them."""
    bounds = bounds_us(work(layer, kernel.role, kernel.block, kernel.warps, kernel.sm), kernel, board, SETTINGS[0])
    return max(bounds, key=lambda name: bounds[name])


def board_of(sm: int) -> Board:
    """The account's board of an SM; `ValueError` for an SM without one. An RTX 3090 (82 multiprocessors, 1.70 GHz: NVIDIA GA102
    white paper) stands for sm_86."""
    known = {board.profile.sm: board for board in boards()} | {86: Board(profile_named("rtx-3090"), 82, 1.70)}
    if sm not in known:
        raise ValueError(f"sm_{sm} has no board to model it by; expected some of {', '.join(map(str, sorted(known)))}")
    return known[sm]


def part_of(board: Board, part: int) -> Board:
    """A smaller board of the same multiprocessors: about one such part of them, of their products and of the memory's rate."""
    count = board.multiprocessors // part
    share = count / board.multiprocessors
    profile = replace(board.profile, tflops=board.profile.tflops * share, gbytes=board.profile.gbytes * share)
    return Board(profile, count, board.ghz)


@cache
def layers(max_dim: int, share: int = 16) -> tuple[Layer, ...]:
    """The account's layers of 8 and of 32 experts, for tokens no wider than `max_dim` (0: any)."""
    return tuple(_layers(max_dim, share))


def _layers(max_dim: int, share: int) -> Iterator[Layer]:
    for _, dim, hidden in MODELS:
        if max_dim and dim > max_dim:
            continue
        for tokens in TOKENS:
            for batch in BATCHES:
                for experts in EXPERTS:
                    yield Layer(tokens * batch, dim, hidden * share // 16, experts)
