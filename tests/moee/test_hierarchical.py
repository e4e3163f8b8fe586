"""Models whose layers see different numbers of tokens an image: each layer is fitted on tokens of its own number."""

import copy

import pytest
import torch
from torch import nn

import moee.calibrate.refit
import moee.calibrate.sensitivity
from exporter.terminal.ui import layer_notes
from moee.calibrate.entry import find_entry, gather, run_until_reached, taken_up
from moee.calibrate.image_budget import image_groups, spread, tokens_an_image
from moee.calibrate.refit import refit, refit_layer
from moee.calibrate.sensitivity import RoutedStats, measure_sensitivity
from moee.errors import UserError
from moee.layers.routed import Experts, RoutedFFN, routed_layers
from moee.measure.accuracy import Comparison
from moee.measure.evaluation import retention, run
from moee.methods.recipe import method_options
from moee.mlps.find import find_ffns
from moee.mlps.structure import read_mlp
from moee.models.ffn import FFN
from moee.models.model import ModelSpec, load_model, replace_module
from moee.space.limits import Limits
from tests.conftest import extract, tiny_images

SWIN = dict(img_size=32, patch_size=4, window_size=2, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), num_classes=10)
CONVNEXT = dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), num_classes=10)
MODELS = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "convnext": ("convnext_atto", CONVNEXT),
    "pit": ("pit_ti_224", dict(img_size=32, patch_size=4, stride=2, base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(2, 2, 4))),
}
CAIT = dict(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, depth_token_only=2, num_classes=10)
UNLABELLED = Comparison(8, 0, "no labels")
STATIC = dict(clustering="none", keep=0.6, width_multiple=1)


def hierarchical(name):
    timm_name, kwargs = MODELS[name]
    torch.manual_seed(0)
    return load_model(ModelSpec(name=name, timm_name=timm_name, kwargs=kwargs, random_seed=0))


def mean_compensated(model, data):
    """The model with static layers that are not refitted yet, and its dense MLPs."""
    ffns = {f.name: f for f in find_ffns(model).ffns}
    extract(model, data, method_options(compensation="mean", **STATIC))
    return ffns, routed_layers(model)


def counts_of(model, data):
    return tokens_an_image(model, {f.name: f.dim for f in find_ffns(model).ffns}, data.images[:1])


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_refitted_on_its_own_number_of_tokens(name):
    model = hierarchical(name)
    data = tiny_images(64)
    counts = counts_of(model, data)
    assert max(counts.values()) >= 13 * min(counts.values())
    reports = extract(model, data, method_options(refit_tokens=512, **STATIC))
    assert {report.name for report in reports} == set(counts)
    for report in reports:
        own = counts[report.name]
        assert report.refit.tokens == min(58, 512 // own) * own, "a tenth of the images is for tuning"
        assert report.to_json()["refit"]["tokens"] == report.refit.tokens


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_taking_the_pass_up_in_the_middle_gives_what_whole_passes_give(name, monkeypatch):
    model = hierarchical(name)
    data = tiny_images(64)
    ffns, layers = mean_compensated(model, data)
    other = copy.deepcopy(model)
    done = refit(model, layers, ffns, data, 512, ridge=None, limits=Limits(forward=7))
    counts = counts_of(hierarchical(name), data)
    for layer_name, layer in routed_layers(other).items():  # one whole pass a layer, over all of its images
        order = spread(64, min(64, 512 // counts[layer_name]))
        seen = []
        handle = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            other(data.images[order])
        handle.remove()
        tokens = seen[0].movedim(1, -1) if layer.channels_first else seen[0]
        facts = refit_layer(layer, ffns[layer_name], tokens.reshape(-1, tokens.shape[-1]))
        assert facts.tokens == done[layer_name].tokens and facts.ridge == done[layer_name].ridge
    state, expected = model.state_dict(), other.state_dict()
    for key in expected:
        torch.testing.assert_close(state[key], expected[key], rtol=1e-3, atol=1e-4)


def test_a_model_of_equal_layers_takes_its_images_in_one_go(tiny_model, monkeypatch):
    data = tiny_images(64)
    ffns, layers = mean_compensated(tiny_model, data)
    monkeypatch.setattr(moee.calibrate.refit, "find_entry", lambda *args: pytest.fail("nothing is to be taken up"))
    seen = []
    tiny_model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    refit(tiny_model, layers, ffns, data, 17 * 40, ridge=None)
    assert [len(images) for images in seen] == [1, 20, 20]  # one image tells the tokens; 256 tokens and more are a part
    torch.testing.assert_close(torch.cat(seen[1:]), data.images[torch.linspace(0, 63, 40).round().long()])


def test_groups_follow_the_order_of_the_layers():
    counts = {"a": 64, "b": 64, "c": 16, "d": 1, "e": 16}
    groups = image_groups(counts, images=100, tokens=160)
    assert [(g.names, g.images) for g in groups] == [(("a", "b"), 2), (("c",), 10), (("d",), 100), (("e",), 10)]
    assert [g.images for g in image_groups(counts, 100, 10**6)] == [100]
    assert [g.images for g in image_groups({"a": 64}, 100, 3, least=2)] == [2]


class Branch(nn.Module):
    """An MLP behind a linear map; the residual is added by its caller."""

    def __init__(self, dim):
        super().__init__()
        self.before = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x):
        return self.mlp(self.before(x))


class Late(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.one, self.two = Branch(dim), Branch(dim)

    def forward(self, x, table=None):
        x = x + self.one(x)
        return x + self.two(x) + (0 if table is None else table)


class Pooled(nn.Module):
    """Eight tokens an image, then two; `crossing` hands the early tokens past the late module."""

    def __init__(self, crossing=False, dim=6):
        super().__init__()
        self.early, self.late, self.last = Branch(dim), Late(dim), Branch(dim)
        self.crossing = crossing

    def forward(self, images):
        x = images.flatten(1)[:, : 8 * 6].view(-1, 8, 6)
        x = x + self.early(x)
        pooled = self.late(x.unflatten(1, (2, 4)).mean(2), table=torch.ones(6))
        return self.last(pooled + (x[:, :2] if self.crossing else 0))


def test_the_entry_is_the_innermost_module_that_residuals_do_not_pass():
    model, image = Pooled().eval(), torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        entry = find_entry(model, ["late.one.mlp", "late.two.mlp", "last.mlp"], ["early.mlp"], image)
    assert entry is not None
    assert (entry.name, entry.rows, entry.named, entry.numbers) == ("late", (True,), (), 12)


def test_no_entry_where_something_passes_every_module():
    model = Pooled(crossing=True).eval()
    with torch.inference_mode():
        assert find_entry(model, ["late.one.mlp", "last.mlp"], ["early.mlp"], torch.randn(1, 3, 8, 8)) is None


def test_gathered_batches_are_the_whole_pass():
    model, images = Pooled().eval(), torch.randn(5, 3, 8, 8)
    with torch.inference_mode():
        entry = find_entry(model, ["late.one.mlp", "last.mlp"], ["early.mlp"], images[:1])
        seen = []
        model.last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(images)
        with taken_up(model, entry, gather(model, entry, images.split(2), 9)):  # four of nine images could not be read
            run_until_reached(model, images[4:])
    torch.testing.assert_close(seen[1], seen[0])


def test_without_an_entry_the_layers_get_what_fits_and_the_report_says_so(monkeypatch):
    model = hierarchical("swin")
    data = tiny_images(64)
    ffns, layers = mean_compensated(model, data)
    monkeypatch.setattr(moee.calibrate.refit, "find_entry", lambda *args: None)
    done = refit(model, layers, ffns, data, 512, ridge=None)
    last = done["layers.3.blocks.0.mlp"]
    assert last.tokens == 8  # of the eight images that fill the first stage
    assert f"8 tokens for {last.neurons} neurons" in last.note


def test_layers_that_share_what_goes_past_them_get_a_pass_each():
    """Both of CaiT's class attentions read the patches, the second past the first. What is kept of them bounds the images."""
    model = load_model(ModelSpec(name="cait", timm_name="cait_xxs24_224", kwargs=CAIT, random_seed=0))
    names = ["blocks.0.mlp", "blocks.1.mlp", "blocks_token_only.0.mlp", "blocks_token_only.1.mlp"]
    ffns = {name: read_mlp(model, name) for name in names}
    layers = {name: halved(ffn) for name, ffn in ffns.items()}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    told = []
    done = refit(model, layers, ffns, tiny_images(64), 640, ridge=None, report=lambda *words: told.append(words))
    shown = [(taken, steps) for what, taken, steps in told if what.startswith("refit, images for blocks_token_only.1")]
    assert shown and shown == [(k + 1, len(shown)) for k in range(len(shown))], "one batch more each time, up to all"
    assert {name: report.tokens for name, report in done.items()} == dict(zip(names, (640, 640, 39, 39), strict=True))


def halved(ffn):
    """One expert of the first half of an MLP's neurons."""
    kept = ffn.hidden // 2
    experts = Experts(
        router=torch.zeros(1, ffn.dim), router_bias=torch.zeros(1), w_up=ffn.w_up[:kept], b_up=ffn.b_up[:kept],
        w_down=ffn.w_down.T[:kept], b_out=ffn.b_down[None], neurons=torch.arange(kept), offsets=torch.tensor([0, kept]),
        activation=ffn.activation,
    )  # fmt: skip
    return RoutedFFN(experts)


def test_memory_bounds_the_images_whose_inputs_are_kept(monkeypatch):
    model = hierarchical("swin")
    data = tiny_images(64)
    ffns, layers = mean_compensated(model, data)
    monkeypatch.setattr(moee.calibrate.refit, "KEPT", 0)
    assert refit(model, layers, ffns, data, 512, ridge=None)["layers.3.blocks.0.mlp"].tokens == 8


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_more_images_make_the_last_stage_generalise_better(name):
    """What the last layer misses of the dense output on images that no fit saw, few images against as many as it wants."""
    data, unseen = tiny_images(512), tiny_images(600).images[512:]
    errors = {}
    for kind in ("own", "first layer's"):
        model = hierarchical(name)
        ffns, layers = mean_compensated(model, data)
        last = list(layers)[-1]
        with pytest.MonkeyPatch.context() as patched:
            if kind == "first layer's":
                patched.setattr(moee.calibrate.refit, "find_entry", lambda *args: None)
            refit(model, layers, ffns, data, 1024, ridge=0.01)
        seen = []
        layers[last].register_forward_hook(lambda module, args, y, seen=seen: seen.append((args[0], y)))
        with torch.no_grad():
            model(unseen)
        (x, y), ffn = seen[0], ffns[last]
        rows, ours = (t.movedim(1, -1) if ffn.channels_first else t for t in (x, y))
        dense = torch.nn.functional.gelu(rows @ ffn.w_up.T + ffn.b_up) @ ffn.w_down.T + ffn.b_down
        errors[kind] = float((ours - dense).square().mean())
    assert errors["own"] < 0.7 * errors["first layer's"]


def test_sensitivity_sees_as_many_tokens_in_every_layer(monkeypatch):
    model = hierarchical("swin")
    data = tiny_images(64)
    seen = {}
    combine = moee.calibrate.sensitivity._combine

    def spy(layers, objectives):
        seen.update({name: (int(layer.count.sum()), layer.images) for name, layer in layers.items()})
        return combine(layers, objectives)

    monkeypatch.setattr(moee.calibrate.sensitivity, "_combine", spy)
    ffns = {f.name: f for f in find_ffns(model).ffns}
    stats = {n: RoutedStats(torch.zeros(1, f.dim), torch.zeros(1), torch.zeros(1, f.hidden)) for n, f in ffns.items()}
    error = {name: s.error for name, s in measure_sensitivity(model, ffns, stats, data, 512).items()}
    counts = counts_of(model, data)
    assert seen == {n: (min(64, 512 // t) * t, min(64, 512 // t)) for n, t in counts.items()}
    assert all(torch.isfinite(e).all() and (e >= 0).all() for e in error.values())
    # with all images in all layers a neuron's sensitivity is about the same: the scales fit together
    whole = {name: s.error for name, s in measure_sensitivity(model, ffns, stats, data, 10**6).items()}
    for name in ffns:
        ratio = float(error[name].sum() / whole[name].sum()) / float(
            sum(e.sum() for e in error.values()) / sum(e.sum() for e in whole.values())
        )
        assert 0.5 < ratio < 2, name


def test_objectives_are_weighed_as_if_every_layer_had_seen_as_many_images():
    """The first objective lies in the layer that saw few images, the second in the other; both are to weigh the same."""
    ffn = FFN("a", "gelu", torch.zeros(3, 2), torch.zeros(3), torch.zeros(2, 3), torch.zeros(2), None, False)
    layers = {}
    for position, images in enumerate((2, 8)):
        layer = moee.calibrate.sensitivity._Accumulator(ffn, RoutedStats(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 3)), 2)
        layer.images, layer.count = images, torch.tensor([float(images)], dtype=torch.float64)
        layer.sums[position] += images  # one an image
        layers[str(position)] = layer
    few, many = (of.error for of in moee.calibrate.sensitivity._combine(layers, 2).values())
    assert torch.allclose(few, many) and float(few[0, 0]) == pytest.approx(1 / 48)


def test_an_objective_that_the_model_cannot_have_is_refused(tiny_model):
    data = tiny_images(8)
    ffns = {f.name: f for f in find_ffns(tiny_model).ffns}
    stats = {n: RoutedStats(torch.zeros(1, f.dim), torch.zeros(1), torch.zeros(1, f.hidden)) for n, f in ffns.items()}
    forward = tiny_model.forward_features
    tiny_model.forward_features = lambda images, **kwargs: [forward(images, **kwargs)]
    tiny_model.forward_head = lambda features, head=tiny_model.forward_head: head(features[0])
    with pytest.raises(UserError, match="objective tokens"):
        measure_sensitivity(tiny_model, ffns, stats, data, 100, objective="tokens")


@pytest.mark.parametrize("name", MODELS)
def test_token_cosine_of_every_shape_of_feature_map(name):
    model = hierarchical(name)
    data = tiny_images(8)
    changed = copy.deepcopy(model)
    extract(changed, data, method_options(compensation="none", clustering="none", keep=0.2))
    kept = retention(run(model, data), run(changed, data), None, 0, UNLABELLED)
    with torch.no_grad():
        features, others = model.forward_features(data.images), changed.forward_features(data.images)
    axis = 1 if name == "convnext" else -1
    expected = torch.nn.functional.cosine_similarity(features.double(), others.double(), dim=axis).mean()
    assert kept.token_cosine == pytest.approx(float(expected), abs=1e-4) and kept.no_tokens == ""


@pytest.mark.parametrize("kind, why", [
    (lambda f: [f], "VisionTransformer has no single feature map"),
    (lambda f: (f, f), "VisionTransformer has no single feature map"),
    (lambda f: f[:, 0], "VisionTransformer has one feature vector an image"),
    (lambda f: f[:, :, :5], "VisionTransformer's feature map has no dimension of 32"),
])  # fmt: skip
def test_features_that_are_no_token_map_say_so(tiny_model, kind, why):
    forward = tiny_model.forward_features
    tiny_model.forward_features = lambda images, **more: kind(forward(images, **more))
    tiny_model.forward_head = lambda features: torch.zeros(4, 10)
    outputs = run(tiny_model, tiny_images(8), batch_size=4)
    kept = retention(outputs, outputs, None, 0, UNLABELLED)
    assert kept.token_cosine is None and kept.no_tokens == why and kept.to_json()["no_tokens"] == why


def test_too_many_token_features_say_so(tiny_model, monkeypatch):
    monkeypatch.setattr("moee.measure.evaluation.MAX_TOKEN_BYTES", 1000)
    assert "8 images" in run(tiny_model, tiny_images(8)).no_tokens


def test_what_the_stage_hands_to_all_its_blocks_makes_the_stage_the_entry():
    """GCViT's blocks get queries of the whole image as a second argument: the second block too, past the first."""
    torch.manual_seed(0)
    model = load_model(ModelSpec(name="gcvit", timm_name="gcvit_xxtiny", kwargs={"img_size": 64}, random_seed=0))
    names = [f.name for f in find_ffns(model).ffns if f.name.endswith(".mlp")]
    late = [name for name in names if name.startswith("stages.3")]
    with torch.inference_mode():
        entry = find_entry(model, late, names[: -len(late)], torch.randn(1, 3, 64, 64))
        alone = find_entry(model, late[:1], names[: -len(late)], torch.randn(1, 3, 64, 64))
    assert entry is not None and entry.name == "stages.3"
    assert alone is not None and alone.name == "stages.3.blocks.0" and alone.rows == (True, True)


def test_starved_layers_are_named_in_report_and_notes():
    model = hierarchical("swin")
    reports = extract(model, tiny_images(12), method_options(**STATIC))
    last = reports[-1].to_json()
    assert last["tokens"] == 12
    assert last["notes"][0] == "experts from 12 calibration tokens for 512 neurons: give more images, or more --tokens"
    assert reports[0].tokens == 12 * 64 and not reports[0].notes
    lines = layer_notes([r.to_json() for r in reports])
    assert f"{last['name']}: {last['refit']['note']}" in lines
    assert layer_notes([{"name": "a layer of an older artifact"}]) == []
