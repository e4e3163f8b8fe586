"""k-means on a device: the clusters of scikit-learn, by products where the points are."""

import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.metrics import adjusted_rand_score

from moee.clustering import lloyd as file
from moee.clustering.kmeans import KMeans
from moee.clustering.lloyd import lloyd
from tests.stand_in import DEVICE, StandIn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "far apart": (lambda: 20 * normal(5, 30)[torch.arange(400) % 5] + normal(400, 30, seed=1), 5),
    "overlapping, far from the origin": (lambda: normal(6, 50)[torch.arange(1500) % 6] + normal(1500, 50, seed=1) + 100, 6),
    "one heap": (lambda: normal(2000, 40), 8),
    "more clusters than a small set has": (lambda: normal(40, 8), 20),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_the_clusters_are_those_of_scikit_learn(case, device, monkeypatch):
    monkeypatch.setattr(file, "ROWS", 256)  # several blocks
    make, clusters = CASES[case]
    x = make()
    for seed in (0, 1):
        want = SklearnKMeans(clusters, n_init=1, random_state=seed).fit(x.numpy()).labels_
        labels = lloyd(x.to(device), clusters, seed)
        assert labels.dtype == torch.int64 and labels.device.type == "cpu"
        assert adjusted_rand_score(want, labels.numpy()) > 0.99
        assert case != "far apart" or torch.equal(labels, torch.from_numpy(want).long())


def test_a_cluster_that_loses_its_points_takes_the_farthest():
    x = torch.tensor([[0.0], [1.0], [10.0], [30.0]])
    means = file._means(x, torch.tensor([0, 0, 0, 0]), torch.tensor([[0.0], [99.0]]))
    assert means.tolist() == [[pytest.approx(11 / 3)], [30.0]]
    same = torch.ones(6, 4)
    assert len(lloyd(same, 3, 0).unique()) == 1, "copies of one point stay together"


def test_on_a_device_the_products_run_there(monkeypatch):
    make, clusters = CASES["one heap"]
    x = make()
    want = lloyd(x, clusters, 0)
    monkeypatch.setattr("sklearn.cluster.KMeans", lambda *a, **k: pytest.fail("scikit-learn runs on the CPU"))
    with StandIn() as device:
        labels = KMeans(clusters).fit_predict(x.to(DEVICE))
    assert torch.equal(labels, want) and device.counts["aten.mm.default"] > 20
