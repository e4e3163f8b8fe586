"""The product's bounds must hold for every pair, in every precision, on data made to break them."""

import numpy as np
import pytest
import torch

from moee.clustering.pairwise import Bounds, Points, exact_distances, full_precision_products

CPU_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
DTYPES = [
    torch.float64,
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not CPU_BFLOAT16, reason="the CPU does not multiply bfloat16 natively")
    ),
]


def clumps(rows, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, features, generator=generator)
    return centres[torch.arange(rows) % 5] + 1e-3 * torch.randn(rows, features, generator=generator)


CASES = {
    "gaussian": lambda: torch.randn(90, 200, generator=torch.Generator().manual_seed(1)),
    "clumps: cancellation inside, ordinary distances across": lambda: clumps(90, 300),
    "far from the origin": lambda: clumps(80, 64) + 1e4,
    "one huge row": lambda: torch.cat([clumps(60, 50), torch.full((1, 50), 1e6)]),
    "large values: squares overflow float32": lambda: clumps(60, 40) * 1e25,
    "small values: squares vanish in float32": lambda: clumps(60, 40) * 1e-25,
    "one feature": lambda: clumps(60, 1),
    "a feature of zero variance": lambda: torch.cat([clumps(60, 7), torch.full((60, 1), 3.0)], dim=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bounds_enclose_every_distance(case, dtype):
    x = CASES[case]()
    count = len(x)
    bounds = Bounds(Points.of(x), dtype)
    with full_precision_products():
        entries = (bounds.left(slice(0, count)) @ bounds.right(slice(0, count)).T).float()
    i, j = torch.triu_indices(count, count, 1)
    true = (x[i].double() - x[j].double()).norm(dim=1)
    low, high = bounds.lower(entries[i, j]), bounds.upper(entries[i, j], i, j)
    assert (low <= true * (1 + 1e-12)).all()
    assert (high >= true * (1 - 1e-12)).all()
    assert (entries[i, j] < bounds.reach(true)).all(), "a pair at most `true` apart must have an entry below reach(true)"
    assert (bounds.lower(bounds.reach(true)) > true).all(), "what lies beyond reach(true) must be proven farther"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_are_tight_enough_to_be_useful(dtype):
    x = torch.randn(128, 1536, generator=torch.Generator().manual_seed(2))
    bounds = Bounds(Points.of(x), dtype)
    entries = (bounds.left(slice(0, 128)) @ bounds.right(slice(0, 128)).T).float()
    i, j = torch.triu_indices(128, 128, 1)
    true = (x[i].double() - x[j].double()).norm(dim=1)
    slack = {torch.float64: 1e-6, torch.float32: 3e-4, torch.bfloat16: 0.02}[dtype]
    assert (bounds.lower(entries[i, j]) > true * (1 - slack)).all()
    assert (bounds.upper(entries[i, j], i, j) < true * (1 + slack)).all()


def test_blocks_made_anew_equal_kept_ones():
    points = Points.of(clumps(50, 33))
    kept, made = Bounds(points, torch.float32), Bounds(points, torch.float32, keep=False)
    assert torch.equal(kept.left(slice(10, 30)), made.left(slice(10, 30)))
    assert torch.equal(kept.right(torch.tensor([3, 1])), made.right(torch.tensor([3, 1])))


@pytest.mark.parametrize("features", [1, 2, 3, 7, 64, 1000])
def test_exact_distances(features):
    x = torch.randn(40, features, generator=torch.Generator().manual_seed(3)) + 100
    i, j = torch.triu_indices(40, 40, 1)
    got = exact_distances(x, i, j)
    want = np.sqrt(((x[i].numpy().astype(np.float64) - x[j].numpy().astype(np.float64)) ** 2).sum(1))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-14)
    assert torch.equal(got, exact_distances(x, j, i)), "symmetric to the last bit"
    alone = torch.cat([exact_distances(x, a[None], b[None]) for a, b in zip(i[:20], j[:20], strict=True)])
    assert torch.equal(got[:20], alone), "independent of the pairs computed beside it"
    assert exact_distances(x, i[:0], j[:0]).shape == (0,)


@pytest.mark.gpu
def test_exact_distances_on_the_gpu_equal_those_on_the_cpu():
    x = torch.randn(200, 333, generator=torch.Generator().manual_seed(4))
    i, j = torch.triu_indices(200, 200, 1)
    assert torch.equal(exact_distances(x, i, j), exact_distances(x.cuda(), i.cuda(), j.cuda()).cpu())


def test_precision_switches_are_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with full_precision_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
