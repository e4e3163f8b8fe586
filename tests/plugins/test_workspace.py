"""Workspace arithmetic, grids and the tile look-up, over random sizes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins import interpreter
from plugins.contract import INPUT_NAMES
from plugins.kernels.common import find_tile
from plugins.kernels.spec import AXES, POINTERS, SCALARS, Block, KernelSpec, check_arguments
from plugins.tactics import SPECS, TACTICS, VARIANTS, config, grid_axes
from plugins.workspace import ALIGNMENT, KINDS, Sizes, bytes_needed, layout

SIZES = st.builds(
    Sizes,
    tokens=st.integers(1, 3000),
    dim=st.integers(1, 64).map(lambda n: 16 * n),
    experts=st.integers(1, 100),
    union_size=st.integers(1, 4096),
    max_width=st.integers(1, 4096),
    top_k=st.integers(1, 8),
)


@given(SIZES, st.sampled_from(["float32", "float16", "bfloat16"]), st.sampled_from(KINDS))
def test_buffers_are_aligned_and_disjoint(sizes, dtype, kind):
    space = layout(sizes, dtype, kind)
    end = 0
    for b in space.buffers:
        assert b.offset % ALIGNMENT == 0 and b.offset >= end
        end = b.offset + b.size
    assert end <= space.size
    assert all(
        layout(sizes, dtype, t.kind).size <= bytes_needed(sizes.as_dict(), dtype)
        for t in TACTICS
        if t.fits(sizes.tokens, sizes.dim, sizes.top_k)
    )
    zeroed = [b.name for b in space.buffers if b.offset < space.zeroed]
    assert zeroed == {"masked": ["counts", "member"], "group": [], "group_fused": []}.get(kind, ["counts"])
    names = [b.name for b in space.buffers]
    assert names == [n for n in ("counts", "member", "buckets", "routes", "hidden", "partial") if n in names]


def test_a_masked_tactic_counts_no_more_tokens_than_it_takes():
    """ViT-L at 518 pixels, 32 images: 343 MiB if the masked tactics ran on all tokens."""
    sizes = Sizes(tokens=32 * 1370, dim=1024, experts=4, union_size=4096, max_width=1536)
    assert bytes_needed(sizes.as_dict(), "float16") == layout(sizes, "float16", "tile").size == 135_553_536
    assert layout(sizes, "float16", "masked").size > 359_000_000


def test_layout_by_hand():
    space = layout(Sizes(tokens=10, dim=32, experts=3, union_size=50, max_width=17, top_k=2), "float16", "tile")
    found = [(b.name, b.offset, b.size) for b in space.buffers]
    assert found == [
        ("counts", 0, 12),
        ("buckets", 256, 120),
        ("routes", 512, 80),
        ("hidden", 768, 20 * 32 * 2),
        ("partial", 2048, 20 * 32 * 4),
    ]
    assert (space.zeroed, space.size) == (256, 4608)
    grouped = layout(Sizes(tokens=10, dim=32, experts=3, union_size=50, max_width=17), "float16", "group")
    assert [(b.name, b.offset, b.size) for b in grouped.buffers] == [("routes", 0, 40), ("hidden", 256, 10 * 32 * 2)]
    assert (grouped.zeroed, grouped.size) == (0, 1024)
    views = space.split(torch.zeros(space.size, dtype=torch.uint8))
    assert views["hidden"].shape == (20, 32) and views["hidden"].dtype == torch.float16


@given(SIZES, st.sampled_from([16, 32, 64, 128]), st.randoms())
@settings(max_examples=50)
def test_expert_tiles_are_enough(sizes, m, random):
    """ceil(T k / m) + K programs hold every tile, however the slots spread over the experts."""
    slots = sizes.tokens * sizes.top_k
    cuts = sorted(random.randint(0, slots) for _ in range(sizes.experts - 1))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, slots], strict=True)]
    assert sum(-(-c // m) for c in counts) <= AXES["expert_tiles"](sizes.as_dict(), m, 1)


@triton.jit
def tile_kernel(counts, out, experts, BM: tl.constexpr):
    pid = tl.program_id(0)
    expert, first, count, busy = find_tile(pid, counts, experts, BM)
    tl.store(out + pid * 4, tl.where(busy, expert, -1))
    tl.store(out + pid * 4 + 1, first)
    tl.store(out + pid * 4 + 2, count)


@given(st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 40]), min_size=1, max_size=140))
@settings(max_examples=15, deadline=None)
def test_find_tile_enumerates_every_tile_once(counts):
    programs = -(-sum(counts) // 16) + len(counts)
    out = torch.full((programs, 4), -7, dtype=torch.int32)
    arguments = {"counts": torch.tensor(counts, dtype=torch.int32), "out": out, "experts": len(counts), "BM": 16}
    interpreter.run(tile_kernel, (programs, 1, 1), arguments)
    want = [[e, first, c] for e, c in enumerate(counts) for first in range(0, c, 16)]
    assert out[: len(want), :3].tolist() == want
    assert (out[len(want) :, 0] == -1).all()


def test_arguments_are_the_operators():
    """Kernels name their arguments as the contract and the workspace do, and T stands where the contract says T."""
    for spec in SPECS.values():
        check_arguments(spec)
    from plugins.contract import INPUTS

    assert set(INPUT_NAMES) <= set(POINTERS)
    for i in INPUTS:
        assert POINTERS[i.name] == i.dtype
    with pytest.raises(ValueError, match="takes \\['ticket'\\]"):
        check_arguments(KernelSpec("odd", _Odd, print, ("one", "one", "one")))


class _Odd:
    class _P:
        name, is_constexpr = "ticket", False

    params = [_P]


def test_tactic_table():
    ids = [t.id for t in TACTICS]
    assert ids == list(dict.fromkeys(ids)) and min(ids) > 0
    for dtype, table in VARIANTS.items():
        used = {(s.role, s.variant) for t in TACTICS for s in t.launches}
        used |= {("route_load", v) for r, v in used if r == "route"}
        assert used == set(table), f"{dtype}: every variant belongs to a tactic"
        for (role, _), settings_ in table.items():
            names = {p.name for p in SPECS[role].fn.params if p.is_constexpr}
            assert names == set(dict(settings_.constants)), role
            block: Block = settings_.block
            assert dict(settings_.constants)["BM"] == block.m and dict(settings_.constants)["BN"] == block.n
            assert all(axis in AXES for axis in grid_axes(role, settings_))
    with pytest.raises(ValueError, match="no kernel route/none"):
        config("route", "none", "float16")


def test_fits():
    tactics = {tactic.id: tactic for tactic in TACTICS}
    assert tactics[7].name == "fused_d192"
    assert tactics[7].fits(10, 192, 1) and not tactics[7].fits(10, 208, 1)
    assert tactics[5].fits(512, 1024, 3) and not tactics[5].fits(513, 1024, 1)
    assert tactics[1].fits(10**6, 4096, 8)
    assert tactics[9].fits(10**6, 4096, 1) and not tactics[9].fits(10, 64, 2)
    assert tactics[10].fits(10, 384, 1) and not tactics[10].fits(10, 400, 1)
    assert set(SCALARS) >= {a for s in SPECS.values() for a in s.arguments if a not in POINTERS}
