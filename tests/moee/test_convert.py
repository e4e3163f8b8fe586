"""Extraction and refit on a tiny model."""

import copy

import pytest
import torch

from moee.calibrate.calibration import collect_tokens, hidden_activations
from moee.calibrate.grouping import find_routes
from moee.calibrate.refit import refit_layer
from moee.data.image_set import TensorSet, batches
from moee.errors import UserError
from moee.layers.routed import RoutedFFN, routed_layers
from moee.methods.neurons.assembly import build_layer
from moee.methods.neurons.choice import choose_neurons
from moee.methods.recipe import method_options
from moee.methods.registry import method_of
from moee.mlps.find import find_ffns
from tests.conftest import extract, tiny_images

KMEANS = dict(clustering="kmeans", clusters=4, cluster_tokens=500)


def first_inputs(model, name, images):
    """Input tokens of one module, [N, D]."""
    kept = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: kept.append(a[0].reshape(-1, a[0].shape[-1])))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[0]


def test_calibration_keeps_every_token_when_the_budget_allows(tiny_model, tmp_path):
    data, ffns = tiny_images(40), find_ffns(tiny_model).ffns
    sampled = collect_tokens(tiny_model, ffns, data, tmp_path, budget=10**6)
    expected = first_inputs(tiny_model, ffns[1].name, data.images)
    assert sampled[1].count == 40 * 17
    torch.testing.assert_close(sampled[1].load(), expected, rtol=1e-3, atol=1e-3)  # float16 on disk


def test_calibration_sample_is_uniform_and_within_budget(tiny_model, tmp_path):
    data, ffns = tiny_images(64), find_ffns(tiny_model).ffns
    sampled = collect_tokens(tiny_model, ffns, data, tmp_path, budget=300, seed=3)
    assert [s.count for s in sampled] == [300] * 3
    assert sampled[0].path.stat().st_size == 300 * 32 * 2
    everything = first_inputs(tiny_model, ffns[0].name, data.images).half().float()
    position = {row.numpy().tobytes(): i for i, row in enumerate(everything)}
    drawn = sorted(position[row.numpy().tobytes()] for row in sampled[0].load())
    assert len(set(drawn)) == 300
    halves = sum(p < len(everything) // 2 for p in drawn)
    assert 110 < halves < 190, "the sample leans to one half of the data"


def test_full_share_reproduces_the_dense_model(tiny_model):
    dense, data = copy.deepcopy(tiny_model), tiny_images()
    for compensation in ("none", "mean", "refit"):
        model = copy.deepcopy(dense)
        extract(model, data, method_options(keep=1.0, compensation=compensation, **KMEANS))
        with torch.no_grad():
            torch.testing.assert_close(model(data.images), dense(data.images), rtol=1e-3, atol=1e-4)


def test_each_step_of_compensation_brings_the_output_closer(tiny_model):
    dense, data = copy.deepcopy(tiny_model), tiny_images(64)
    errors = {}
    for compensation in ("none", "mean", "refit"):
        model = copy.deepcopy(dense)
        extract(model, data, method_options(keep=0.7, compensation=compensation, **KMEANS))
        with torch.no_grad():
            errors[compensation] = float((model(data.images) - dense(data.images)).square().mean())
    assert errors["refit"] < errors["mean"] < errors["none"]


def test_refit_leaves_no_mean_error_and_solves_the_ridge_problem(tiny_model):
    data, ffn = tiny_images(64), find_ffns(tiny_model).ffns[0]
    tokens = first_inputs(tiny_model, ffn.name, data.images)
    model = copy.deepcopy(tiny_model)
    extract(model, data, method_options(keep=0.6, compensation="mean", **KMEANS))
    layer = routed_layers(model)[ffn.name]
    dense_out = hidden_activations(ffn, tokens) @ ffn.w_down.T + ffn.b_down
    before = (layer(tokens) - dense_out).square().mean()
    refit_layer(layer, ffn, tokens, ridge=1e-6)
    error = layer(tokens) - dense_out
    assert error.square().mean() < before
    routes = layer.routes(tokens)[:, 0]
    for e in routes.unique().tolist():
        assert error[routes == e].mean(0).abs().max() < 1e-4, "an expert's mean output must equal the dense one"
    # at the optimum of an (almost) unpenalised least-squares fit the residual is orthogonal to the masked activations
    bounds = layer.offsets.tolist()
    gradient = torch.zeros_like(layer.w_down)
    for e in range(layer.num_experts):
        rows, kept = routes == e, layer.neurons[bounds[e] : bounds[e + 1]].long()
        hidden = torch.nn.functional.gelu(tokens[rows] @ layer.w_up[kept].T + layer.b_up[kept])
        gradient[kept] += (hidden - hidden.mean(0)).T @ error[rows]
    assert gradient.abs().max() / len(tokens) < 1e-5


def test_same_seed_same_experts_bit_for_bit(tiny_model):
    states = []
    for _ in range(2):
        model = copy.deepcopy(tiny_model)
        extract(model, tiny_images(), method_options(min_cluster_size=0.02, keep=0.8, cluster_tokens=400))
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_static_preset_is_one_expert(tiny_model):
    reports = extract(tiny_model, tiny_images(), method_options("static", keep=0.9))
    assert [r.experts for r in reports] == [1, 1, 1]
    assert all(r.union == r.widths[0] < r.hidden for r in reports)


def test_reports_agree_with_the_layers(tiny_moee):
    model, _, _, _, reports = tiny_moee
    assert [report.name for report in reports] == list(routed_layers(model))
    for report in reports:
        layer = routed_layers(model)[report.name]
        assert report.widths == layer.widths and report.union == layer.union
        assert abs(sum(report.share) - 1) < 1e-9 and abs(sum(layer.load) - 1e6) < 10


def test_excluded_layers_stay_as_they_are(tiny_model):
    extract(tiny_model, tiny_images(), method_options(exclude=("blocks.1",), **KMEANS))
    assert list(routed_layers(tiny_model)) == ["blocks.0.mlp", "blocks.2.mlp"]


def test_a_layer_without_clusters_stays_dense(tiny_model, monkeypatch):
    import moee.calibrate.grouping

    answers = iter([0, 4, 4])

    def labels(activations, config, report, name):
        count = next(answers)
        return torch.arange(len(activations)) % count if count else torch.full((len(activations),), -1)

    monkeypatch.setattr(moee.calibrate.grouping, "cluster_tokens", labels)
    reports = extract(tiny_model, tiny_images(), method_options(**KMEANS))
    assert reports[0].status == "dense: 0 clusters, 100% noise"
    assert [r.status for r in reports[1:]] == ["routed", "routed"]
    assert not isinstance(tiny_model.blocks[0].mlp, RoutedFFN)


def test_no_clusters_anywhere_is_refused(tiny_model, monkeypatch):
    import moee.calibrate.grouping

    monkeypatch.setattr(moee.calibrate.grouping, "cluster_tokens", lambda a, *rest: torch.full((len(a),), -1))
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    with pytest.raises(UserError, match="would stay dense"):
        extract(tiny_model, tiny_images(), method_options(**KMEANS))
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())


def test_too_little_calibration_is_refused(tiny_model):
    one = TensorSet("one", tiny_images(1).images, [0], 4)
    with pytest.raises(UserError, match="minimum cluster size|clusters needs"):
        extract(tiny_model, one, method_options(clustering="kmeans", clusters=40))


def test_nan_activations_name_the_layer(tiny_model):
    with torch.no_grad():
        tiny_model.blocks[1].norm2.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="`blocks.1.mlp` receives NaN"):
        extract(tiny_model, tiny_images(), method_options(**KMEANS))


def test_cluster_statistics_use_the_members_only(tiny_model, tmp_path):
    data, ffns = tiny_images(), find_ffns(tiny_model).ffns
    sampled = collect_tokens(tiny_model, ffns, data, tmp_path, 10**6)
    routed, cluster = (
        build_layer(found, kept[ffns[0].name], config.compensation)[0]
        for config in (method_options(keep=0.7, **KMEANS), method_options("paper", **KMEANS))
        for found in [find_routes(ffns[0], sampled[0], config)]
        for kept in [choose_neurons(tiny_model, {ffns[0].name: found}, {}, data, config)]
    )
    assert torch.equal(routed.router, cluster.router)
    assert torch.equal(cluster.b_out, ffns[0].b_down.expand_as(cluster.b_out)), "the paper compensates nothing"
    assert not torch.equal(routed.b_out, cluster.b_out)


def test_unreadable_images_are_skipped_and_counted(caplog):
    class Broken(TensorSet):
        def load(self, index):
            if index in (2, 5):
                raise OSError("truncated")
            return super().load(index)

    data = Broken("broken", torch.zeros(8, 3, 4, 4), [0] * 8, 0)
    seen = [int(i) for batch in batches(data, 3) for i in batch.indices]
    assert seen == [0, 1, 3, 4, 6, 7] and sorted(data.skipped) == [2, 5]
    assert "skipped unreadable image broken[2]" in caplog.text


def test_finished_layers_are_not_clustered_again(tiny_model, tmp_path, monkeypatch):
    import moee.calibrate.grouping
    from moee.store import cache

    monkeypatch.setenv("MOEE_CACHE", str(tmp_path))
    monkeypatch.setattr(moee.calibrate.grouping, "read_labels", cache.read_labels)
    monkeypatch.setattr(moee.calibrate.grouping, "write_labels", cache.write_labels)
    real, clustered = moee.calibrate.grouping.cluster_tokens, []

    def counted(activations, config, report, name):
        clustered.append(name)
        if len(clustered) == 3:
            raise KeyboardInterrupt
        return real(activations, config, report, name)

    monkeypatch.setattr(moee.calibrate.grouping, "cluster_tokens", counted)
    config = method_options(**KMEANS)
    with pytest.raises(KeyboardInterrupt):
        extract(copy.deepcopy(tiny_model), tiny_images(), config)
    resumed = copy.deepcopy(tiny_model)
    extract(resumed, tiny_images(), config)
    assert clustered == [f"cluster blocks.{i}.mlp" for i in (0, 1, 2, 2)]
    whole = copy.deepcopy(tiny_model)
    monkeypatch.setattr(moee.calibrate.grouping, "read_labels", lambda key, count: None)
    extract(whole, tiny_images(), config)
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))
    for file in (tmp_path / "labels").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert cache.read_labels(next((tmp_path / "labels").iterdir()).stem, 500) is None, "a damaged entry is no entry"


@pytest.mark.parametrize(
    "options, said", [({}, "512 tokens"), ({"cluster_tokens": 400}, "400 tokens"), ({"cluster_tokens": 200}, ""),
                      ({"clustering": "kmeans"}, "512 tokens"), ({"clustering": "kmeans", "clusters": 4}, ""),
                      ({"clustering": "none"}, "")],
)  # fmt: skip
def test_long_clusterings_are_told_with_what_makes_them_short(options, said, monkeypatch, caplog):
    monkeypatch.setattr("moee.methods.experts.MANY_TOKENS", 300)
    caplog.set_level("INFO", "moee")
    options = method_options(**options)
    method_of(options).announce([100, 512], options)
    assert ("--cluster-tokens 6000" in caplog.text) == bool(said) and said in caplog.text


def test_jobs_do_not_change_the_result(tiny_model):
    states = []
    for jobs in (1, 3):
        model = copy.deepcopy(tiny_model)
        extract(model, tiny_images(), method_options(**KMEANS), jobs=jobs)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("clustering", ["hdbscan", "dbscan", "optics", "kmeans", "birch", "random"])
def test_every_clustering_finds_experts(tiny_model, clustering):
    settings = dict(clustering=clustering, components=8, cluster_tokens=300, min_cluster_size=0.02, compensation="mean")
    reports = extract(tiny_model, tiny_images(), method_options(**settings))
    assert any(r.experts >= 2 for r in reports)


@pytest.mark.parametrize("routing", ["cosine", "euclidean", "hash", "random"])
def test_every_routing_spreads_the_tokens(tiny_model, routing):
    reports = extract(tiny_model, tiny_images(), method_options(routing=routing, **KMEANS))
    assert all(max(r.share) < 0.95 for r in reports), "an expert took everything"


def test_euclidean_routing_goes_to_the_nearest_mean():
    from moee.layers.routing import euclidean_router, route

    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(200, 6, generator=generator) + 3, torch.arange(200) % 5
    router, bias = euclidean_router(tokens, labels, 5)
    means = torch.stack([tokens[labels == e].mean(0) for e in range(5)])
    assert torch.equal(route(tokens, router, bias)[:, 0], torch.cdist(tokens, means).argmin(1))


def test_hash_routing_is_the_sign_pattern_for_a_power_of_two():
    from moee.layers.routing import hash_router, route

    tokens = torch.randn(300, 12, generator=torch.Generator().manual_seed(1)) + 2
    router, bias = hash_router(tokens, 8, seed=5)
    planes = torch.stack([(router[1 << i] - router[0]) / 2 for i in range(3)])
    bits = ((tokens - tokens.mean(0)) @ planes.T > 0).long()
    assert torch.equal(route(tokens, router, bias)[:, 0], (bits * torch.tensor([1, 2, 4])).sum(1))


@pytest.mark.parametrize("criterion", ["magnitude", "weight", "random"])
def test_criteria_to_compare_with_cost_what_variance_costs(tiny_model, criterion):
    widths = {}
    for name in ("variance", criterion):
        model = copy.deepcopy(tiny_model)
        reports = extract(model, tiny_images(), method_options(criterion=name, compensation="mean", **KMEANS))
        widths[name] = [r.widths for r in reports]
    assert widths["variance"] == widths[criterion]
