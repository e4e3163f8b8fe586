"""Settings around those of the tactic table: what may be compiled, and how near to the table each is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from plugins.aot.compile import Job
from plugins.aot.search.model import ASYNC_ROWS, DOWN_ROLES, GROUP_ROLES, ROWS, asynchronous, step_bytes
from plugins.kernels.group import GROUP
from plugins.kernels.spec import Block
from plugins.tactics import Config, config, varied
from plugins.targets import target

# Which variants are searched. The account has no tokens as narrow as `fused` d192 takes.
VARIANTS: dict[str, tuple[str, ...]] = {
    "expert_up": ("bm16", "bm32", "bm64", "bm128"),
    "expert_down": ("bm16", "bm32", "bm64", "bm128"),
    "group_up": ("r16",),
    "group_down": ("r16",),
    "fused": ("d384",),
}
MAX_DIM = {"fused": 384}
COLUMNS, INNER, WARPS = (16, 32, 64, 128, 256), (32, 64, 128), (2, 4, 8)
GROUP_TOKENS = (16, 32, 64, GROUP)
MOST_ACCUMULATORS = 128  # registers a thread: with more, nothing is left for addresses and operands


@dataclass(frozen=True)
class Group:
    """One search: a role's variant for an SM and a token type."""

    sm: int
    role: str
    variant: str
    dtype: str

    @property
    def job(self) -> Job:
        """What is compiled, in whichever settings."""
        return Job(self.role, self.variant, self.dtype, self.sm)

    @property
    def listed(self) -> Config:
        """The tactic table's settings for any SM, which the search begins with."""
        return config(self.role, self.variant, self.dtype)

    @property
    def max_dim(self) -> int:
        """The widest tokens that the role takes, 0 for any."""
        return MAX_DIM.get(self.role, 0)


def accumulators(role: str, block: Block, warps: int) -> int:
    """Registers a thread that sums in float32 take."""
    columns = block.k + block.n if role == "fused" else block.n
    return (ROWS if role in GROUP_ROLES else block.m) * columns // (32 * warps)


def least_shared(group: Group, settings: Config) -> int:
    """Shared memory that a pipeline of this depth takes at least, in bytes: an estimate, to leave out what cannot fit and to
    order the rest. The look-up of neuron ids halves the depth of the down kernels."""
    block, stages = settings.block, settings.num_stages
    rows = ROWS if group.role in GROUP_ROLES else block.m
    buffers = (stages - 1) // (2 if group.role in DOWN_ROLES else 1)
    if group.role == "fused":
        return step_bytes(group.role, rows, block) * stages // 2
    return step_bytes(group.role, rows, block) * (max(1, buffers) + asynchronous(group.sm, rows))


@cache
def candidates(group: Group) -> tuple[Config, ...]:
    """The table's settings first, then all that are worth compiling, those that differ in the fewest ways first.

    Left out: a tile with more sums than registers, a pipeline that exceeds the SM's shared memory, warps without rows or columns
    of their own, and fewer than four warps where products need four.
    """
    listed = group.listed
    found = [c for c in _all(group, listed) if c != listed and _possible(group, c)]
    return (listed, *sorted(found, key=lambda c: changes(listed, c)))


def changes(listed: Config, other: Config) -> tuple[int, int]:
    """In how many ways settings differ from the table's, and how far, in doublings and stages."""
    pairs = [(getattr(listed.block, name), getattr(other.block, name)) for name in ("m", "n", "k")]
    pairs.append((listed.num_warps, other.num_warps))
    stages = abs(listed.num_stages - other.num_stages)
    far = sum(abs(a.bit_length() - b.bit_length()) for a, b in pairs) + stages
    return sum(a != b for a, b in pairs) + (stages > 0), far


def _all(group: Group, listed: Config) -> Iterator[Config]:
    block = listed.block
    fused = group.role == "fused"
    # Other tactics are chosen by their rows of tokens where nobody timed, on whichever SM: these stay.
    tokens = GROUP_TOKENS if group.role in GROUP_ROLES else (block.m,)
    columns = (16, 32, 64) if fused else COLUMNS
    inner = (block.k,) if fused else INNER
    stages = (3, 5, 7, 9) if group.role in DOWN_ROLES else (2, 3, 4, 5, 6)
    for m, n, k, warps, depth in product(tokens, columns, inner, WARPS, stages):
        yield varied(listed, Block(m, n, k), warps, depth)


def _possible(group: Group, settings: Config) -> bool:
    block, warps = settings.block, settings.num_warps
    rows = ROWS if group.role in GROUP_ROLES else block.m
    pieces = (rows // 16) * (block.n // 8)  # of a product, the least that a warp takes
    return (
        accumulators(group.role, block, warps) <= MOST_ACCUMULATORS
        and least_shared(group, settings) <= target(group.sm).shared_block
        and (group.role == "fused" or warps <= pieces)
        and (warps >= 4 or rows < ASYNC_ROWS)
        and (warps >= 4 or group.role not in (*GROUP_ROLES, "fused"))
    )
