"""The tactic table: which kernel variants make up a way to run the operator, and how each variant is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

from plugins.contract import DTYPES
from plugins.kernels import (
    combine,
    expert_down,
    expert_up,
    fused,
    group_down,
    group_fused,
    group_up,
    masked_down,
    masked_up,
    route,
    route_load,
)
from plugins.kernels.group import GROUP, SCORED
from plugins.kernels.spec import Block, KernelSpec
from plugins.targets import target

MODULES = (
    route, route_load, expert_up, expert_down, fused, masked_up, masked_down, combine, group_up, group_down, group_fused,
)  # fmt: skip
SPECS: dict[str, KernelSpec] = {m.SPEC.role: m.SPEC for m in MODULES}
GEMM_ROLES = tuple(role for role in SPECS if role not in ("route_load", "combine"))


@dataclass(frozen=True)
class Config:
    """How to compile one variant: tile, threads, pipeline depth, further compile-time constants."""

    block: Block
    num_warps: int
    num_stages: int
    constants: tuple[tuple[str, int], ...] = ()
    grid: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Launch:
    """One step of a tactic."""

    role: str
    variant: str


@dataclass(frozen=True)
class Tactic:
    """One way to run the operator. Ids are positive and never change meaning; limits of 0 mean none."""

    id: int
    name: str
    kind: str
    launches: tuple[Launch, ...]
    top_k: str = "any"
    max_d: int = 0
    max_tokens: int = 0

    def fits(self, tokens: int, dim: int, top_k: int) -> bool:
        """Whether the tactic can serve these sizes."""
        return (
            (self.top_k == "any" or top_k == 1)
            and (not self.max_d or dim <= self.max_d)
            and (not self.max_tokens or tokens <= self.max_tokens)
        )

    def most_tokens(self, tokens: int) -> int:
        """The most tokens that the tactic is given where a profile goes up to `tokens`."""
        return min(tokens, self.max_tokens) if self.max_tokens else tokens


def _tile(id: int, m: int) -> Tactic:
    launches = (
        Launch("route", "buckets"),
        Launch("expert_up", f"bm{m}"),
        Launch("expert_down", f"bm{m}"),
        Launch("combine", "sum"),
    )
    return Tactic(id, f"tile{m}", "tile", launches)


def _masked(id: int, m: int, max_tokens: int) -> Tactic:
    launches = (Launch("route", "members"), Launch("masked_up", f"bm{m}"), Launch("masked_down", f"bm{m}"))
    return Tactic(id, f"masked{m}", "masked", launches, max_tokens=max_tokens)


def _fused(id: int, max_d: int) -> Tactic:
    launches = (Launch("route", "buckets"), Launch("fused", f"d{max_d}"), Launch("combine", "sum"))
    return Tactic(id, f"fused_d{max_d}", "fused", launches, max_d=max_d)


def _group(id: int, m: int) -> Tactic:
    return Tactic(id, f"group{m}", "group", (Launch("group_up", f"r{m}"), Launch("group_down", f"r{m}")), top_k="one")


def _group_fused(id: int, max_d: int) -> Tactic:
    launches = (Launch("group_fused", f"d{max_d}"),)
    return Tactic(id, f"group_fused_d{max_d}", "group_fused", launches, top_k="one", max_d=max_d)


# The masked form computes every union neuron for every token: it can only win while reading weights dominates.
TACTICS: tuple[Tactic, ...] = (
    _tile(1, 16),
    _tile(2, 32),
    _tile(3, 64),
    _tile(4, 128),
    _masked(5, 16, 512),
    _masked(6, 64, 2048),
    _fused(7, 192),
    _fused(8, 384),
    _group(9, 16),
    _group_fused(10, 384),
)


def _config(m: int, n: int, k: int, warps: int, stages: int, grid=None, **constants: int) -> Config:
    return Config(Block(m, n, k), warps, stages, tuple(sorted({"BM": m, "BN": n, **constants}.items())), grid)


def _variants(wide: bool) -> dict[tuple[str, str], Config]:
    """`wide`: float32, whose products run on the ordinary cores, with smaller tiles."""
    k, s = (16, 2) if wide else (64, 3)
    table: dict[tuple[str, str], Config] = {}
    members = ("token_tiles", "union_tiles", "one")
    # 16 tokens a program: 32 spill on some SMs, and few tokens need many programs.
    # Three stages also for float32: with two, ptxas 12.9 spills on sm_86 to sm_89.
    table["route", "buckets"] = _config(16, 64, k, 4, 3, BK=k, MEMBERS=0)
    table["route", "members"] = _config(16, 64, k, 4, 3, members, BK=k, MEMBERS=1)
    table["route_load", "buckets"] = _config(16, 64, 0, 4, 1, MEMBERS=0)
    table["route_load", "members"] = _config(16, 64, 0, 4, 1, members, MEMBERS=1)
    for m, n, kk, warps, stages in (
        (16, 64, k, 4, s + 1),
        (32, 64, k, 4, s),
        (64, 64, k, 4, s),
        (128, 64 if wide else 128, 16 if wide else 32, 8, s),
    ):
        table["expert_up", f"bm{m}"] = _config(m, n, kk, warps, stages, BK=kk)
        # The look-up of neuron ids takes part of the pipeline's depth.
        table["expert_down", f"bm{m}"] = _config(m, n, kk, warps, stages + 2, BK=kk)
        if m in (16, 64):
            table["masked_up", f"bm{m}"] = _config(m, n, kk, warps, stages, BK=kk)
            table["masked_down", f"bm{m}"] = _config(m, n, kk, warps, stages, BK=kk)
    m, n = (16, 16) if wide else (32, 32)
    table["fused", "d192"] = _config(m, n, 192, 4, 1 if wide else 3, D0=128, D1=64)
    table["fused", "d384"] = _config(m, n, 384, 8, 1 if wide else 3, D0=256, D1=128)
    # Eight warps: with four, every thread holds twice as many scores, and the kernels are half as large again.
    group, scores = {"GROUP": GROUP, "SCORED": SCORED}, 16 if wide else 32
    table["group_up", "r16"] = _config(64, 64, k, 8, s, ROWS=16, BK=k, BS=scores, **group)
    table["group_down", "r16"] = _config(32, 64, k, 8, s + 2, ROWS=16, BK=k, **group)
    table["group_fused", "d384"] = _config(16, m, 384, 8, 1 if wide else 3, D0=256, D1=128, BS=scores, **group)
    table["combine", "sum"] = _config(16, 128, 0, 4, 1)
    return table


VARIANTS: dict[str, dict[tuple[str, str], Config]] = {dtype: _variants(dtype == "float32") for dtype in DTYPES}

# Settings of half precision that a search takes for an SM in the place of the table's: n and k of the tile, warps, stages. They
# are modelled: `python -m plugins.aot.search` prints them into docs/results/tiles.md. An SM that is not here was not searched.
# The rows of a tile stay: the tactic for sizes that nobody timed goes by them, whatever the SM.
SEARCHED: dict[int, dict[tuple[str, str], tuple[int, int, int, int]]] = {
    86: {("group_down", "r16"): (32, 64, 4, 7)},
    87: {
        ("expert_up", "bm16"): (128, 32, 2, 4),
        ("expert_up", "bm32"): (64, 64, 2, 3),
        ("expert_down", "bm16"): (64, 64, 2, 5),
        ("expert_down", "bm32"): (64, 64, 2, 5),
        ("group_up", "r16"): (64, 64, 4, 5),
        ("group_down", "r16"): (64, 64, 4, 5),
    },
    89: {("group_down", "r16"): (32, 64, 4, 5)},
    90: {
        ("expert_up", "bm16"): (64, 128, 2, 3),
        ("expert_down", "bm16"): (64, 128, 2, 5),
        ("group_up", "r16"): (64, 128, 4, 4),
        ("group_down", "r16"): (64, 128, 4, 5),
    },
    110: {
        ("expert_up", "bm16"): (64, 64, 2, 4),
        ("expert_up", "bm64"): (128, 64, 4, 3),
        ("expert_up", "bm128"): (128, 128, 8, 3),
        ("expert_down", "bm16"): (64, 64, 2, 5),
        ("expert_down", "bm64"): (128, 64, 4, 5),
        ("group_up", "r16"): (64, 128, 4, 4),
        ("group_down", "r16"): (64, 128, 4, 5),
    },
    120: {("expert_down", "bm16"): (32, 64, 4, 7), ("group_down", "r16"): (32, 64, 4, 7)},
}


def default_tactic(tokens: int, dim: int, top_k: int, experts: int, dtype: str) -> Tactic:
    """The tactic for sizes that nobody timed: the largest tile that an expert's tokens fill on average, else the smallest. One
    group of tokens and as many experts as are scored at a time take the first tactic that groups, for it has half the launches.

    `defaultTactic` of the C++ library follows the same rule. It is modelled (`plugins.account`), not measured.
    """
    fitting = [t for t in TACTICS if t.fits(tokens, dim, top_k)]
    groups = [t for t in fitting if t.kind == "group"]
    if groups and tokens <= GROUP and experts <= SCORED:
        return groups[0]
    average = tokens * top_k // experts
    tiles = {t: _token_tile(t, dtype) for t in fitting if t.kind in ("tile", "fused")}
    filled = [t for t, tile in tiles.items() if tile <= average]
    return max(filled, key=lambda t: tiles[t]) if filled else min(tiles, key=lambda t: tiles[t])


def _token_tile(tactic: Tactic, dtype: str) -> int:
    step = next(s for s in tactic.launches if s.role in ("expert_up", "fused"))
    return VARIANTS[dtype][step.role, step.variant].block.m


def config(role: str, variant: str, dtype: str, sm: int | None = None) -> Config:
    """Compile settings of one kernel; raises ValueError for one that does not exist.

    Without `sm` they are the table's for any SM; with it what a search takes for this SM goes first. Where there are no tensor
    cores to use (sm_75), every type takes the tiles of float32.
    """
    cores = sm is None or target(sm).tensor_cores
    try:
        listed = VARIANTS[dtype if cores else "float32"][role, variant]
    except KeyError:
        raise ValueError(f"no kernel {role}/{variant} for {dtype}; see plugins/tactics.py") from None
    found = SEARCHED.get(sm or 0, {}).get((role, variant))
    if found is None or dtype == "float32":
        return listed
    n, k, warps, stages = found
    return varied(listed, Block(listed.block.m, n, k), warps, stages)


def varied(settings: Config, block: Block, warps: int, stages: int) -> Config:
    """`settings` with another tile, number of warps and depth; constants that name the tile follow."""
    named = {"BM": block.m, "BN": block.n, "BK": block.k}
    constants = tuple((name, named.get(name, value)) for name, value in settings.constants)
    return replace(settings, block=block, num_warps=warps, num_stages=stages, constants=constants)


def grid_axes(role: str, settings: Config) -> tuple[str, str, str]:
    """Grid of a variant: its own, or its role's."""
    return settings.grid or SPECS[role].grid
