"""Exact HDBSCAN against a dense Kruskal tree, the `hdbscan` package and data made of ties."""

import subprocess
import sys

import hdbscan
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score

from moee.clustering.hdbscan import HDBSCAN, ClusteringStopped, unique_rows
from moee.errors import UserError
from tests.moee.hdbscan_reference import dense_reachability, is_tree, kruskal, merge_heights

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PRECISIONS = [torch.float32, torch.float64]
if torch.cpu._is_avx512_bf16_supported():
    PRECISIONS.append(torch.bfloat16)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(rows, features, groups=6, seed=0):
    """Gaussian clusters of different width, with a few far outliers."""
    centres = 3 * normal(groups, features, seed=seed)
    spread = 0.2 + torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed + 1))
    x = centres[torch.arange(rows) % groups] + spread * normal(rows, features, seed=seed + 2)
    x[:: max(1, rows // 7)] *= 4
    return x


def near_copies():
    """Forty rows that differ in their last bits, twice, among ordinary rows: products cannot tell them apart."""
    x = normal(140, 96, seed=5) + 3
    x[:40] = x[0] * (1 + 2**-22 * torch.rand(40, 96, generator=torch.Generator().manual_seed(6)))
    x[40:80] = x[40] * (1 + 2**-22 * torch.rand(40, 96, generator=torch.Generator().manual_seed(7)))
    return x


CASES = {
    "blobs, many features": lambda: blobs(230, 80),
    "blobs, two features": lambda: blobs(230, 2),
    "one feature": lambda: normal(150, 1),
    "two far groups: nearest-neighbour lists never leave them": lambda: torch.cat([normal(90, 70), normal(90, 70) + 50]),
    "nested groups": lambda: torch.cat([normal(60, 8) * s + 9 * s for s in (0.01, 0.1, 1.0)]),
    "lattice: every distance tied": lambda: torch.cartesian_prod(torch.arange(13.0), torch.arange(13.0)),
    "simplex: all distances equal": lambda: torch.eye(70),
    "few values: ties and copies": lambda: torch.randint(0, 3, (150, 4), generator=torch.Generator().manual_seed(1)).float(),
    "copies of ten rows": lambda: normal(10, 70)[torch.arange(120) % 10],
    "copies beside others": lambda: torch.cat([normal(80, 5), normal(6, 5, seed=9).repeat(12, 1)]),
    "near copies": near_copies,
    "far from the origin": lambda: blobs(150, 16) + 1e5,
    "one huge row": lambda: torch.cat([blobs(150, 16), torch.full((1, 16), 1e8)]),
    "constant": lambda: torch.full((50, 3), 0.25),
    "one dimension of zero variance": lambda: torch.cat([normal(100, 3), torch.zeros(100, 1)], dim=1),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("min_samples", [1, 4, 30])
@pytest.mark.parametrize("case", CASES)
def test_tree_is_the_unique_one(case, min_samples, precision, device):
    x = CASES[case]()
    tree = HDBSCAN(5, min_samples, block=48, precision=precision).fit(x.to(device)).minimum_spanning_tree_
    edges, weights = kruskal(x, min_samples)
    assert np.array_equal(tree.weights.numpy(), weights)
    assert np.array_equal(tree.edges.numpy(), edges)


@pytest.mark.parametrize("method", ["eom", "leaf"])
@pytest.mark.parametrize(("size", "samples"), [(5, 5), (5, 1), (15, 5), (10, 40)])
@pytest.mark.parametrize("features", [2, 16, 384])
def test_agrees_with_the_package(features, size, samples, method):
    x = blobs(500, features, seed=features)
    ours = HDBSCAN(size, samples, method, block=128).fit(x)
    theirs = hdbscan.HDBSCAN(
        size, samples, cluster_selection_method=method, gen_min_span_tree=True, algorithm="prims_kdtree"
    ).fit(x.double().numpy())
    compare(ours, theirs)


def compare(ours, theirs):
    """Same hierarchy always; same labels unless ties, which the package orders by chance, decide between them."""
    tree, spanning = ours.minimum_spanning_tree_, theirs._min_spanning_tree
    assert is_tree(tree.edges.numpy(), len(ours.labels_))
    assert float(tree.weights.sum()) == pytest.approx(spanning[:, 2].sum(), rel=1e-12)
    mine = merge_heights(tree.edges.numpy(), tree.weights.numpy())
    np.testing.assert_allclose(mine, merge_heights(spanning[:, :2], spanning[:, 2]), rtol=1e-9)
    score = adjusted_rand_score(theirs.labels_, ours.labels_.numpy())
    if score < 1:
        assert len(np.unique(tree.weights.numpy())) < len(tree.weights), f"ARI {score} without a single tie"


def test_labels_equal_the_package_where_nothing_ties():
    # With min_samples = 1 only mutual nearest neighbours tie, and those pairs leave no choice.
    x = blobs(600, 100, groups=8, seed=3)
    ours = HDBSCAN(8, 1).fit(x)
    theirs = hdbscan.HDBSCAN(8, 1, algorithm="prims_kdtree").fit(x.double().numpy())
    assert ours.labels_.max() >= 3
    assert adjusted_rand_score(theirs.labels_, ours.labels_.numpy()) == 1.0
    np.testing.assert_allclose(np.sort(ours.probabilities_.numpy()), np.sort(theirs.probabilities_), atol=1e-9)
    assert len(ours.condensed_tree_.to_numpy()) == len(theirs.condensed_tree_.to_numpy())


@settings(max_examples=60, deadline=None)
@given(
    x=st.integers(2, 40).flatmap(
        lambda n: st.integers(1, 4).flatmap(lambda f: arrays(np.float32, (n, f), elements=st.integers(-3, 3).map(float)))
    ),
    min_samples=st.integers(1, 12),
    block=st.integers(1, 17),
)
def test_ties_and_copies(x, min_samples, block):
    tree = HDBSCAN(2, min_samples, block=block).fit(x).minimum_spanning_tree_
    edges, weights = kruskal(torch.from_numpy(x), min_samples)
    assert np.array_equal(tree.weights.numpy(), weights)
    assert np.array_equal(tree.edges.numpy(), edges)


@settings(max_examples=40, deadline=None)
@given(
    x=arrays(np.float32, st.tuples(st.integers(6, 30), st.integers(1, 5)), elements=st.floats(-1e6, 1e6, width=32)),
    size=st.integers(2, 6),
    samples=st.integers(1, 8),
)
def test_any_small_data_agrees_with_the_package(x, size, samples):
    ours = HDBSCAN(size, samples, block=8).fit(x)
    theirs = hdbscan.HDBSCAN(size, samples, gen_min_span_tree=True, algorithm="generic").fit(x.astype(np.float64))
    total = theirs._min_spanning_tree[:, 2].sum()  # "generic" computes distances by products: 1e-5, near copies less
    largest = float(np.abs(x).max())
    assert float(ours.minimum_spanning_tree_.weights.sum()) == pytest.approx(total, rel=1e-5, abs=1e-6 * largest * len(x))


def test_core_distances_count_neighbours_not_the_point():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    core, _ = dense_reachability(x, 1)
    assert core.tolist() == [1, 1, 2, 4]
    assert HDBSCAN(2, 1).fit(x).minimum_spanning_tree_.weights.tolist() == [1, 2, 4]


@pytest.mark.parametrize("neighbours", [1, 3, 400])
def test_list_length_changes_nothing(neighbours):
    x = blobs(200, 20)
    short = HDBSCAN(5, 6, block=64, neighbours=neighbours).fit(x).minimum_spanning_tree_
    assert torch.equal(short.edges, HDBSCAN(5, 6).fit(x).minimum_spanning_tree_.edges)


def test_threads_and_blocks_change_nothing():
    x = blobs(400, 128)
    fits = []
    for threads, block in ((1, 400), (2, 400), (2, 150)):
        torch.set_num_threads(threads)
        fits.append(HDBSCAN(10, 5, block=block).fit(x))
    for fit in fits[1:]:
        assert torch.equal(fit.labels_, fits[0].labels_)
        assert torch.equal(fit.minimum_spanning_tree_.edges, fits[0].minimum_spanning_tree_.edges)
        assert torch.equal(fit.minimum_spanning_tree_.weights, fits[0].minimum_spanning_tree_.weights)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x.numpy(), lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, :12]],
    ids=["float64", "numpy", "transposed", "strided"],
)
def test_input_forms(change):
    x = blobs(150, 12)
    assert torch.equal(HDBSCAN(5, 3).fit_predict(change(x)), HDBSCAN(5, 3).fit_predict(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_taken_at_its_values(dtype):
    x = blobs(150, 12).to(dtype)
    assert torch.equal(HDBSCAN(5, 3).fit_predict(x), HDBSCAN(5, 3).fit_predict(x.float()))


def test_read_only_input_is_left_alone():
    x = blobs(60, 4).numpy()
    copy = x.copy()
    x.setflags(write=False)
    HDBSCAN(5).fit(x)
    assert np.array_equal(x, copy)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0.0, 1], [float("nan"), 1], [2, float("inf")]] * 4), "8 of 12 rows"),
        (torch.full((12, 2), 1e300, dtype=torch.float64), "12 of 12 rows"),
        (torch.zeros(4, 3), "min_cluster_size = 5 rows, got 4"),
        (torch.zeros(20), r"\[N, F\]"),
        (torch.zeros(20, 0), r"\[N, F\]"),
        (torch.zeros(20, 2, dtype=torch.int64), "floating-point"),
    ],
    ids=["NaN and infinity", "overflows float32", "too few rows", "one dimension", "no features", "integers"],
)
def test_bad_input_is_refused(x, message):
    with pytest.raises(UserError, match=message):
        HDBSCAN(5).fit(x)


@pytest.mark.parametrize(
    "options",
    [{"min_cluster_size": 1}, {"min_samples": 0}, {"cluster_selection_method": "dbscan"}, {"block": 0}, {"neighbours": 0}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        HDBSCAN(**options)


def test_constant_data_is_all_noise_as_in_the_package():
    x = np.full((40, 3), 2.5, dtype=np.float32)
    assert (HDBSCAN(5).fit_predict(x) == -1).all()
    assert (hdbscan.HDBSCAN(5).fit_predict(x) == -1).all()


def test_no_dense_groups_are_all_noise():
    assert (HDBSCAN(40, 5).fit_predict(normal(60, 50)) == -1).all()


def test_one_cluster_when_allowed():
    x = normal(200, 3)
    x[:5] += 30
    ours = HDBSCAN(20, 5, allow_single_cluster=True).fit(x)
    theirs = hdbscan.HDBSCAN(20, 5, allow_single_cluster=True, algorithm="prims_kdtree").fit(x.numpy())
    assert set(ours.labels_.tolist()) <= {-1, 0} and (ours.labels_ == 0).sum() >= 20
    assert adjusted_rand_score(theirs.labels_, ours.labels_.numpy()) > 0.99


def test_unique_rows():
    x = torch.tensor([[1.0, 2], [0.0, 3], [1, 2], [-0.0, 3], [5, 5]])
    first, which = unique_rows(x)
    assert first.tolist() == [0, 1, 4] and which.tolist() == [0, 1, 0, 1, 2]


def test_progress_reaches_its_total():
    calls = []
    HDBSCAN(5, 3, block=32, progress=lambda *call: calls.append(call)).fit(blobs(200, 10))
    first = [call for call in calls if call[2] == "nearest neighbours"]
    assert first == calls[: len(first)] and first == [(done + 1, len(first), first[0][2]) for done in range(len(first))]


def test_later_passes_say_how_far_they_are():
    """Rows of whole numbers are full of ties, which one list of neighbours cannot settle."""
    calls = []
    x = torch.randint(0, 3, (600, 6), generator=torch.Generator().manual_seed(0)).float()
    HDBSCAN(5, 3, block=64, neighbours=1, progress=lambda *call: calls.append(call)).fit(x)
    passes = [call for call in calls if call[2] == "core distances, pass 1"]
    assert passes and passes == [(done + 1, len(passes), passes[0][2]) for done in range(len(passes))]
    joined = [done for done, total, message in calls if message.startswith("joining ") and total == 0]
    assert joined == sorted(joined) and all(done < 600 for done in joined)


@pytest.mark.parametrize("threads", [1, 2])
def test_stop_is_honoured_at_the_next_block(threads):
    torch.set_num_threads(threads)
    count = 0

    def stop():
        nonlocal count
        count += 1
        return count == 3

    with pytest.raises(ClusteringStopped, match="after 3 of"):
        HDBSCAN(5, 3, block=32, should_stop=stop).fit(blobs(200, 10))
    assert count == 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_square():
    # 12,000 rows: one float32 N x N array would be 549 MiB. Fitting runs in its own process: a peak never falls.
    code = (
        "import resource, torch; from moee.clustering.hdbscan import HDBSCAN; torch.set_num_threads(1);"
        "x = torch.randn(12000, 2, generator=torch.Generator().manual_seed(0));"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024;"
        "HDBSCAN(5).fit(x[:500]); before = peak(); HDBSCAN(50, 5, block=1024).fit(x); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def photograph_patches(rows, features):
    """Random 16 x 32 colour patches of a real photograph, as rows."""
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut()).float() / 255
    generator = torch.Generator().manual_seed(0)
    top, left = (torch.randint(512 - size, (rows,), generator=generator).tolist() for size in (16, 32))
    patches = [image[a : a + 16, b : b + 32].reshape(-1) for a, b in zip(top, left, strict=True)]
    return torch.stack(patches)[:, torch.randperm(1536, generator=generator)[:features]].contiguous()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "samples"), [(5, 5), (30, 5), (15, 15), (50, 1)])
@pytest.mark.parametrize("data", [blobs, photograph_patches], ids=["random", "photograph"])
@pytest.mark.parametrize("features", [2, 16, 384, 1536])
@pytest.mark.parametrize("rows", [1000, 2000, 4000, 8000])
def test_agrees_with_the_package_at_size(rows, features, data, size, samples):
    if rows * features > 4000 * 1536 and (size, samples) != (30, 5):
        pytest.skip("the package takes minutes: one setting is enough")
    x = data(rows, features)
    torch.set_num_threads(2)
    ours = HDBSCAN(size, samples).fit(x)
    theirs = hdbscan.HDBSCAN(size, samples, gen_min_span_tree=True, algorithm="prims_kdtree").fit(x.double().numpy())
    compare(ours, theirs)
