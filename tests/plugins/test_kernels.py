"""Every tactic and every kernel in Triton's interpreter, against loops in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins import dispatch, interpreter, reference
from plugins.contract import ACTIVATIONS
from plugins.interpreter import Watch, watching
from plugins.kernels.group import arrange, tile_tokens
from plugins.tactics import SEARCHED, SPECS, TACTICS, config
from plugins.workspace import Sizes, layout
from tests.plugins.cases import bound, operator, poison

NAMES = {t.name: t for t in TACTICS}
SEVERAL = [t.name for t in TACTICS if t.fits(1, 16, 2)]  # that take several experts a token
GROUPS = ["group16", "group_fused_d384"]
# Sizes and why: (tokens, dim, widths, union).
SHAPES = {
    "odd": (
        37,
        48,
        (5, 33, 17, 70, 1),
        70,
    ),  # D not a power of two, widths around the tiles' edges, U not a multiple of 16
    "one-token": (1, 32, (16, 20), 40),  # a single row
    "one-expert": (20, 64, (50,), 50),  # K = 1: static pruning
    "empty-expert": (24, 32, (16, 0, 20), 40),  # an expert without neurons: only its bias
    "narrow": (9, 16, (3, 2), 4),  # D = 16, U below every tile
}


@triton.jit
def tiles_kernel(chosen, out, tokens, experts, BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr):
    index = tl.arange(0, BM)
    own = tl.load(chosen + index, mask=index < tokens, other=0)
    place, tiles = arrange(own, index < tokens, experts, BM, BN, ROWS)
    for tile in range(0, tiles):
        expert, token, live = tile_tokens(place, own, tile, BM, ROWS)
        tl.store(out + tile * (ROWS + 1), expert)
        tl.store(out + tile * (ROWS + 1) + 1 + tl.arange(0, ROWS), tl.where(live, token, -1))


def run_checked(tactic, inputs, *, top_k=1, activation=0, seed=None, load_cdf=None):
    """Run with poisoned memory under full observation; check addresses, write counts and untouched NaNs."""
    sizes = dispatch.sizes_of(inputs, top_k)
    dtype = str(inputs["x"].dtype).removeprefix("torch.")
    space = layout(sizes, dtype, tactic.kind)
    memory = poison(torch.empty(space.size, dtype=torch.uint8))
    y = poison(torch.empty(inputs["x"].numel() * inputs["x"].element_size(), dtype=torch.uint8))
    y = y.view(inputs["x"].dtype).view(inputs["x"].shape)
    watch = Watch(seed=seed)
    y, buffers = dispatch.run(tactic, inputs, top_k=top_k, activation=activation, memory=memory, y=y, watch=watch,
                              load_cdf=load_cdf)  # fmt: skip
    assert (watch.write_counts(y) == 1).all(), "every output element must be stored exactly once"
    assert (watch.write_counts(buffers["routes"]) == 1).all()
    if "partial" in buffers:
        assert (watch.write_counts(buffers["partial"]) == 1).all()
    if "hidden" in buffers:
        assert watch.write_counts(buffers["hidden"]).max() <= 1
    return y, buffers


def close(y, inputs, buffers, *, top_k=1, activation=0):
    """Assert that y is the operator's result for the routes the kernel chose."""
    dtype = str(inputs["x"].dtype).removeprefix("torch.")
    chosen = buffers["routes"].view(-1, top_k).long()
    want = reference.moee_ffn(inputs, activation=activation, top_k=top_k, chosen=chosen)
    error = (y.double() - want).abs()
    worst = int((error / bound(want, dtype)).argmax())
    assert (error <= bound(want, dtype)).all(), f"element {worst}: {y.flatten()[worst]} for {want.flatten()[worst]}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_tactic_odd_shapes(name, dtype):
    inputs = operator(*SHAPES["odd"], dtype)
    y, buffers = run_checked(NAMES[name], inputs)
    close(y, inputs, buffers)
    assert torch.equal(
        buffers["routes"].view(-1, 1).long(), reference.routes(inputs["x"], inputs["router"], inputs["router_bias"])
    )


# One SM for each tactic and pair of tiles that a search took for it.
OF_AN_SM = [("tile16", 87), ("tile16", 90), ("tile16", 120), ("tile64", 110), ("tile128", 110), ("group16", 86), ("group16", 90)]


@pytest.mark.parametrize(("name", "sm"), OF_AN_SM)
def test_tiles_of_an_sm(name, sm, monkeypatch):
    """Widths around these tiles' edges, too."""
    monkeypatch.setattr(dispatch, "sm_of", lambda tensor: sm)
    inputs = operator(37, 48, (5, 33, 17, 150, 1), 150, "float16")
    y, buffers = run_checked(NAMES[name], inputs)
    close(y, inputs, buffers)


def test_every_tile_of_an_sm_is_tried():
    """Warps and stages do nothing in the interpreter; tiles do."""
    launches = {(t.name, s.role, s.variant) for t in TACTICS for s in t.launches}
    tried = {
        (role, config(role, variant, "float16", sm).block)
        for name, sm in OF_AN_SM for tactic, role, variant in launches if tactic == name
    }  # fmt: skip
    wanted = {(role, config(role, v, "float16", sm).block) for sm, found in SEARCHED.items() for role, v in found}
    assert wanted - tried <= {(role, config(role, v, "float16").block) for _, role, v in launches}


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "odd"])
@pytest.mark.parametrize("name", NAMES)
def test_tactic_edge_shapes(name, shape):
    inputs = operator(*SHAPES[shape], "float16", seed=3)
    y, buffers = run_checked(NAMES[name], inputs)
    close(y, inputs, buffers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SEVERAL)
def test_tactic_top_k(name, dtype):
    inputs = operator(19, 32, (20, 7, 18, 30), 40, dtype, seed=1)
    y, buffers = run_checked(NAMES[name], inputs, top_k=3)
    close(y, inputs, buffers, top_k=3)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("name", ["tile16", "masked16", "fused_d192", *GROUPS])
def test_activations(name, activation):
    inputs = operator(8, 32, (20, 18), 24, "float32", seed=2)
    inputs["b_up"] *= 3  # hidden values far from 0 too, where clipped forms differ
    y, buffers = run_checked(NAMES[name], inputs, activation=activation)
    close(y, inputs, buffers, activation=activation)


def test_a_code_that_the_contract_lacks_is_no_other_function(monkeypatch):
    monkeypatch.setattr(dispatch, "ACTIVATIONS", (*ACTIVATIONS, "unheard"))
    for name in ("tile16", "masked16", "fused_d192", *GROUPS):
        y, _ = dispatch.run(NAMES[name], operator(8, 32, (20, 18), 24, "float32", seed=2), activation=len(ACTIVATIONS))
        assert y.isnan().all(), name


@pytest.mark.parametrize("name", ["tile16", "tile128", "masked16", "fused_d384"])
def test_program_order_does_not_matter(name):
    """Buckets fill in another order, the result is the same to the bit."""
    inputs = operator(70, 32, (20, 33, 18), 48, "float16", seed=4)
    runs = [run_checked(NAMES[name], inputs, top_k=2, seed=seed)[0] for seed in (None, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("tokens", [127, 128, 129, 300])
def test_groups_of_tokens_are_independent(name, tokens):
    """At the edges of a group, of its tiles and of the grid; in any order of the programs the bits are the same."""
    inputs = operator(tokens, 32, (20, 33, 0, 18, 3), 48, "float16", seed=tokens)
    inputs["router_bias"][3] += 3.0  # whole tiles of one expert, and a few rows of the others
    runs = [run_checked(NAMES[name], inputs, seed=seed) for seed in (None, 1, 2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][0], runs[2][0])
    y, buffers = runs[0]
    close(y, inputs, buffers)
    want = reference.routes(inputs["x"], inputs["router"], inputs["router_bias"])
    assert torch.equal(buffers["routes"].view(-1, 1).long(), want)
    one = {**inputs, "x": inputs["x"][-1:].clone()}
    assert torch.equal(run_checked(NAMES[name], one)[0], y[-1:]), "a token's output does not depend on the others"


def test_tiles_of_a_group_hold_each_token_once():
    """By hand: two experts with more than a tile, one with one row, one with none, dead tokens, tokens of no expert."""
    chosen = torch.tensor([0] * 20 + [3] + [1] * 33 + [0] * 2 + [7] * 3 + [4] * 5, dtype=torch.int32)
    out = torch.full((8, 17), -7, dtype=torch.int32)
    sizes = {"tokens": len(chosen), "experts": 5, "BM": 64, "BN": 4, "ROWS": 16}
    interpreter.run(tiles_kernel, (1, 1, 1), {"chosen": chosen, "out": out, **sizes})
    zero, one = [*range(20), 54, 55], [*range(21, 54)]
    want = [(0, zero[:16]), (0, zero[16:]), (1, one[:16]), (1, one[16:32]), (1, one[32:]), (3, [20]), (4, [*range(59, 64)])]
    assert out[7].eq(-7).all(), "seven tiles"
    for (expert, tokens), row in zip(want, out.tolist(), strict=False):
        assert row == [expert, *tokens, *[-1] * (16 - len(tokens))]


@pytest.mark.parametrize("name", ["tile16", "masked16", "fused_d192", *GROUPS])
def test_all_tokens_to_one_expert(name):
    inputs = operator(40, 32, (20, 33, 18), 48, "float16", seed=5)
    inputs["router_bias"] = torch.tensor([0.0, 1e4, 0.0])
    y, buffers = run_checked(NAMES[name], inputs)
    assert (buffers["routes"] == 1).all()
    close(y, inputs, buffers)


@pytest.mark.parametrize("name", ["tile16", "masked16", *GROUPS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite(name, value):
    """They go to experts 0 .. top_k - 1 and spoil no other row."""
    top_k = 2 if name in SEVERAL else 1
    inputs = operator(20, 32, (20, 33, 18), 48, "float32", seed=6)
    inputs["x"][[3, 17]] = value
    y, buffers = run_checked(NAMES[name], inputs, top_k=top_k)
    assert buffers["routes"].view(20, top_k)[[3, 17]].tolist() == [[0, 1][:top_k]] * 2
    assert torch.isfinite(y).all(1).tolist() == [t not in (3, 17) for t in range(20)]
    others = [t for t in range(20) if t not in (3, 17)]
    clean = {**inputs, "x": inputs["x"][others].contiguous()}
    want = reference.moee_ffn(clean, activation=0, top_k=top_k)
    assert ((y[others].double() - want).abs() <= bound(want, "float32")).all()


@pytest.mark.parametrize(
    ("experts", "best", "want"), [(4, [1, 2, 3], [1, 2]), (70, [3, 66], [3, 66]), (70, [65, 68], [65, 68])]
)
def test_ties_go_to_the_lowest_id(experts, best, want):
    """Also where the equal scores stand in different blocks of 64 experts."""
    inputs = operator(5, 16, (4,) * experts, 8, "float32")
    inputs["router"].zero_()
    inputs["router_bias"] = torch.zeros(experts)
    inputs["router_bias"][best] = 2.0
    for top_k in (1, 2):
        _, buffers = run_checked(NAMES["tile16"], inputs, top_k=top_k)
        assert buffers["routes"].view(5, top_k).tolist() == [want[:top_k]] * 5
    assert run_checked(NAMES["group16"], inputs)[1]["routes"].tolist() == [want[0]] * 5


@pytest.mark.parametrize(("name", "top_k"), [("tile16", 1), ("tile16", 3), *((name, 1) for name in GROUPS)])
def test_more_experts_than_one_block(name, top_k):
    """70 experts: the router's second block, its look-up in the GEMMs, and the rounds after the first."""
    inputs = operator(12, 16, (3,) * 70, 16, "float32", seed=7)
    inputs["router_bias"][65:] += 2.0
    y, buffers = run_checked(NAMES[name], inputs, top_k=top_k)
    want = reference.routes(inputs["x"], inputs["router"], inputs["router_bias"], top_k)
    assert torch.equal(buffers["routes"].view(-1, top_k).long(), want)
    assert (want >= 64).any() and (want < 64).any()
    close(y, inputs, buffers, top_k=top_k)


def test_bucket_invariants():
    """Each slot stands in exactly one bucket, in the bucket of its expert."""
    inputs = operator(50, 32, (20, 33, 18), 48, "float32", seed=8)
    _, buffers = run_checked(NAMES["tile16"], inputs, top_k=2, seed=3)
    counts = buffers["counts"].tolist()
    assert sum(counts) == 100
    placed = []
    for e, count in enumerate(counts):
        slots = buffers["buckets"][e, :count].tolist()
        assert all(buffers["routes"][s] == e for s in slots)
        assert (buffers["buckets"][e, count:] == -1).all(), "nothing may be written behind the bucket's end"
        placed += slots
    assert sorted(placed) == list(range(100))


@pytest.mark.parametrize(
    ("name", "top_k"), [(name, top_k) for name in ("tile16", "masked16") for top_k in (1, 2)] + [(name, 1) for name in GROUPS]
)
def test_route_load_follows_the_calibrated_load(name, top_k):
    """The build phase ignores x: experts get their share to within one token in a hundred, never twice a token."""
    inputs = operator(200, 16, (4, 4, 4, 4), 8, "float32", seed=9)
    load = torch.tensor([500_000, 100_000, 250_000, 150_000])
    cdf = load.cumsum(0).int()
    y, buffers = run_checked(NAMES[name], inputs, top_k=top_k, load_cdf=cdf)
    routes = buffers["routes"].view(200, top_k)
    share = torch.bincount(routes.flatten(), minlength=4).double() / routes.numel()
    assert (share - load / 1e6).abs().max() < 0.01
    assert all(len(set(row)) == top_k for row in routes.tolist())
    close(y, inputs, buffers, top_k=top_k)
    step = dispatch.run(NAMES[name], inputs, top_k=top_k, load_cdf=cdf, execute=dispatch.launch_reference)
    assert torch.equal(step[1]["routes"], buffers["routes"])


def test_route_load_survives_a_wrong_load():
    """Loads above 1/top_k cannot be served; experts stay distinct and in range, so no bucket overflows."""
    inputs = operator(64, 16, (4, 4, 4), 8, "float32")
    for cdf in ([1_000_000] * 3, [0, 0, 1_000_000], [0, 0, 0]):
        _, buffers = run_checked(NAMES["tile16"], inputs, top_k=2, load_cdf=torch.tensor(cdf, dtype=torch.int32))
        rows = buffers["routes"].view(64, 2).tolist()
        assert all(a != b and 0 <= a < 3 and 0 <= b < 3 for a, b in rows)


@given(
    name=st.sampled_from(["tile16", "tile32", "masked16", "fused_d192", *GROUPS]),
    dtype=st.sampled_from(["float32", "float16"]),
    tokens=st.integers(1, 40),
    dim=st.integers(1, 6).map(lambda n: 16 * n),
    widths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    union=st.integers(40, 60),
    data=st.data(),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_sizes(name, dtype, tokens, dim, widths, union, data):
    if not any(widths):
        widths[0] = 1
    top_k = data.draw(st.integers(1, len(widths) if name in SEVERAL else 1))
    inputs = operator(tokens, dim, widths, union, dtype, seed=tokens)
    y, buffers = run_checked(NAMES[name], inputs, top_k=top_k, seed=dim)
    close(y, inputs, buffers, top_k=top_k)


@pytest.mark.parametrize(("name", "top_k"), [(name, 1) for name in NAMES] + [(name, 2) for name in SEVERAL])
def test_references_equal_the_kernels(name, top_k):
    """Each kernel's PyTorch reference, step by step in the same buffers, gives the same result."""
    inputs = operator(21, 32, (20, 33, 18), 48, "float32", seed=10)
    y, buffers = dispatch.run(NAMES[name], inputs, top_k=top_k)
    z, others = dispatch.run(NAMES[name], inputs, top_k=top_k, execute=dispatch.launch_reference)
    assert torch.equal(buffers["routes"], others["routes"])
    if "counts" in buffers and NAMES[name].kind != "masked":
        assert torch.equal(buffers["counts"], others["counts"])
    if "member" in buffers:
        assert torch.equal(buffers["member"], others["member"])
    assert (y - z).abs().max() < 1e-5


def test_launch_budget():
    """At most three kernels for one expert a token, four with `combine`; of groups two or one, and nothing to clear."""
    for t in TACTICS:
        single = [s for s in t.launches if s.role != "combine"]
        assert len(single) <= 3 and len(t.launches) <= 4
        clears = layout(Sizes(9, 32, 3, 20, 10), "float16", t.kind).zeroed > 0
        assert clears == (t.name not in GROUPS)
    assert [len(NAMES[name].launches) for name in GROUPS] == [2, 1]


def test_dispatch_refuses_what_does_not_fit():
    inputs = operator(4, 400, (4, 4), 8, "float32")
    with pytest.raises(ValueError, match="fused_d384 does not serve"):
        dispatch.run(NAMES["fused_d384"], inputs)
    with pytest.raises(ValueError, match="group16 does not serve T=4, D=400, top_k=2"):
        dispatch.run(NAMES["group16"], inputs, top_k=2)
    with pytest.raises(ValueError, match="top_k must lie in 1..2"):
        dispatch.run(NAMES["tile16"], inputs, top_k=3)
    with pytest.raises(ValueError, match="w_up must have shape"):
        dispatch.run(NAMES["tile16"], {**inputs, "w_up": inputs["w_up"][:3]})
    with pytest.raises(ValueError, match="multiple of 16"):
        dispatch.run(NAMES["tile16"], {**inputs, "x": inputs["x"][:, :100]})
    with pytest.raises(ValueError, match="activation must be"):
        dispatch.run(NAMES["tile16"], inputs, activation=len(ACTIVATIONS))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape",
    [
        (257, 192, tuple(range(30, 46)), 768),  # DeiT-T
        (197, 384, tuple(range(200, 264, 8)), 1531),  # DeiT-S, U not a multiple of the tile
        (70, 768, (500, 400, 300), 1000),  # DeiT-B
        (33, 1024, (100, 90), 200),  # ViT-L
        (300, 64, tuple(range(1, 65)), 100),  # K = 64
    ],
    ids=["deit-t", "deit-s", "deit-b", "vit-l", "k64"],
)
def test_tactic_broad(name, dtype, shape):
    tactic = NAMES[name]
    if not tactic.fits(shape[0], shape[1], 1):
        pytest.skip("outside the tactic's limits")
    inputs = operator(*shape, dtype, seed=11)
    for top_k in (1, 2) if name in SEVERAL else (1,):
        y, buffers = run_checked(tactic, inputs, top_k=top_k, seed=5)
        close(y, inputs, buffers, top_k=top_k)
        want = reference.routes(inputs["x"], inputs["router"], inputs["router_bias"], top_k)
        agreement = (want == buffers["routes"].view(-1, top_k)).float().mean()
        assert agreement > 0.995, f"only {agreement:.4f} of the routes agree with float64"


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_tactic_on_the_device(name, dtype, top_k):
    """The same check with real launches; the interpreter tests above cover the logic without a GPU."""
    tactic = NAMES[name]
    for shape in (SHAPES["odd"], (197, 192, (300, 200, 250, 100), 700), (500, 384, tuple(range(100, 132)), 1501)):
        if not tactic.fits(shape[0], shape[1], top_k):
            continue
        inputs = operator(*shape, dtype, seed=12)
        device = {n: t.cuda() for n, t in inputs.items()}
        sizes = Sizes(shape[0], shape[1], len(shape[2]), shape[3], max(shape[2]), top_k)
        memory = poison(torch.empty(layout(sizes, dtype, tactic.kind).size, dtype=torch.uint8, device="cuda"))
        results = [dispatch.run(tactic, device, top_k=top_k, memory=memory) for _ in range(2)]
        assert torch.equal(results[0][0], results[1][0]), "two runs must agree to the bit"
        y, buffers = results[0]
        close(y.cpu(), inputs, {n: b.cpu() for n, b in buffers.items()}, top_k=top_k)


@pytest.mark.parametrize("role", ["expert_up", "expert_down"])
def test_offsets_beyond_two_to_the_31(role):
    """Slot 70,000 of a buffer with rows of 32,768: in 32 bits the offset would turn negative.

    The big buffer is never filled, so it takes address space, not memory.
    """
    slot, stride = 70_000, 32_768
    spec, setting = SPECS[role], config(role, "bm16", "float16")
    inputs = operator(slot + 1, 16, (16,), 16, "float16", seed=13)
    hidden = torch.empty(slot + 1, stride, dtype=torch.float16)
    buckets = torch.full((1, slot + 1), slot, dtype=torch.int32)
    extra = {"hidden": hidden, "counts": torch.ones(1, dtype=torch.int32), "buckets": buckets, "y": inputs["x"].clone()}
    extra |= {"tokens": slot + 1, "dim": 16, "experts": 1, "max_width": stride, "top_k": 1, "activation": 2}
    available = {**inputs, **extra, "partial": extra["y"]}
    hidden[slot, :16] = 1.0
    watch = Watch()
    watch.allow({n: t for n, t in available.items() if isinstance(t, torch.Tensor)})
    with watching(watch):
        dispatch.launch(spec, setting, (1, 1, 1), {a: available[a] for a in spec.arguments})
    if role == "expert_up":
        want = (inputs["w_up"].float() @ inputs["x"][slot].float() + inputs["b_up"].float()).relu()
        assert torch.allclose(hidden[slot, :16].float(), want[inputs["neurons"].long()], atol=0.02)
    else:
        want = inputs["w_down"].float().sum(0) + inputs["b_out"][0].float()
        assert torch.allclose(extra["y"][slot].float(), want, atol=0.02)
