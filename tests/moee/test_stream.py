"""The residual stream as the target of a refit: where it is read, what the target is, and that it makes good earlier losses."""

import copy

import pytest
import timm
import torch
from torch import nn

from moee.calibrate.refit import refit
from moee.calibrate.stream import target_of
from moee.errors import UserError
from moee.methods.context import Context
from moee.methods.heads.narrowing import narrow
from moee.methods.recipe import make_recipe, method_options
from moee.methods.registry import method_of
from moee.mlps.attention import NarrowAttention, narrow_attentions
from moee.mlps.find import find_ffns
from moee.mlps.residual import Reader, residual_readers
from moee.models.model import replace_module
from tests.conftest import extract, tiny_images
from tests.moee.test_hierarchical import halved

SMALL = dict(img_size=32, embed_dim=32, num_classes=0)
MODELS = {  # what reads the stream in front of the first MLP of each; None: nothing does
    "vit_tiny_patch16_224": (dict(SMALL, patch_size=8, depth=2, num_heads=2, init_values=0.1), "blocks.0.norm2"),
    "swin_tiny_patch4_window7_224": (dict(SMALL, depths=(1, 1), num_heads=(2, 4), window_size=4), "layers.0.blocks.0.norm2"),
    "convnext_atto": (dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=0), "stages.0.blocks.0.conv_dw"),
    "cait_xxs24_224": (dict(SMALL, patch_size=4, depth=1, num_heads=2, depth_token_only=1), "blocks.0.norm2"),  # tiny LayerScale
    "vit_small_patch16_36x1_224": (dict(SMALL, patch_size=8, depth=1, num_heads=2), "blocks.0.norm2"),
    "fastvit_t8": (dict(layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_classes=0), "stages.0.blocks.0.mlp"),  # a dropout
    # stands behind both maps of its MLP: behind a tiny LayerScale, what it reads last looks like the stream
    "swinv2_cr_tiny_224": (dict(SMALL, depths=(1, 1), num_heads=(2, 4), window_size=4), None),  # its norm stands behind the MLP
}


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_found_where_a_module_reads_it(name):
    kwargs, reader = MODELS[name]
    model = timm.create_model(name, **kwargs).eval()
    for path, p in model.named_parameters():
        nn.init.normal_(p, std=1e-4 if "gamma_" in path else 1e-6 if "layer_scale" in path else 0.3)
    found = find_ffns(model, shape=(3, 32, 32)).ffns
    readers = residual_readers(model, found, torch.randn(1, 3, 32, 32))
    assert readers == {} if reader is None else readers[found[0].name] == Reader(reader, "conv" in reader or name == "fastvit_t8")


def test_the_target_brings_the_stream_to_the_dense_one():
    dense, own, scale = torch.randn(6, 32), torch.randn(6, 32), torch.rand(32) + 0.1
    scale[3] = 0
    after = own + scale * target_of(dense, own, scale)
    after[:, 3] = dense[:, 3]  # nothing reaches this one
    torch.testing.assert_close(after, dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_refit_solves_for_the_dense_stream_on_its_own_inputs(tiny_model):
    """Layer by layer against two whole forward passes and one least-squares problem each."""
    dense, data, ridge = copy.deepcopy(tiny_model), tiny_images(40), 0.01
    ffns = {ffn.name: ffn for ffn in find_ffns(dense).ffns}
    layers = {name: halved(ffn) for name, ffn in ffns.items()}
    before = {name: layer.w_down.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        replace_module(tiny_model, name, layer)
    refit(tiny_model, layers, ffns, data, 10**6, ridge=ridge, dense=dense)
    seen = {}

    def watch(model, kind):
        for at, block in enumerate(model.blocks):
            block.norm2.register_forward_pre_hook(lambda m, a, at=at: seen.__setitem__((kind, at, "stream"), a[0].flatten(0, 1)))
            block.mlp.register_forward_pre_hook(lambda m, a, at=at: seen.__setitem__((kind, at, "in"), a[0].flatten(0, 1)))
            block.register_forward_hook(lambda m, a, y, at=at: seen.__setitem__((kind, at, "out"), y.flatten(0, 1)))
        model(data.images)

    watch(dense, "dense")
    watch(tiny_model, "cut")
    weights = torch.ones(len(data), 17)
    weights[:, 0] = 2.0  # the class token: an eighth of the patches
    weights = weights.flatten()[:, None]
    for at, (name, layer) in enumerate(layers.items()):
        hidden = layer.activations(seen["cut", at, "in"], torch.arange(layer.union))
        target = seen["dense", at, "out"] - seen["cut", at, "stream"]
        hidden, target = (each - (each * weights).sum(0) / weights.sum() for each in (hidden, target))
        gram = (hidden * weights).T @ hidden
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
        change = torch.linalg.solve(gram, (hidden * weights).T @ (target - hidden @ before[name]))
        torch.testing.assert_close(layer.w_down, before[name] + change, rtol=1e-2, atol=1e-3)
        missed = (seen["cut", at, "out"] - seen["dense", at, "out"]) * weights
        assert missed.mean(0).abs().max() < 1e-3, "the bias leaves no mean error in the stream"


@torch.no_grad()
def test_projections_of_narrowed_heads_solve_for_the_dense_stream_too(tiny_model):
    """The first layers against whole forward passes and one least-squares problem: projection, then down map behind it."""
    dense, data = copy.deepcopy(tiny_model), tiny_images(64)
    narrow(tiny_model, data, (3, 32, 32), 0.75)
    ffns = {ffn.name: ffn for ffn in find_ffns(dense).ffns}
    layers = {name: halved(ffn) for name, ffn in ffns.items()}
    for name, layer in layers.items():
        replace_module(tiny_model, name, layer)
    before = copy.deepcopy(narrow_attentions(tiny_model))
    first = next(iter(before))
    block = int(first.split(".")[1])
    refit(tiny_model, layers, ffns, data, 10**6, ridge=0.01, dense=dense)
    assert {name: type(part) for name, part in narrow_attentions(tiny_model).items()} == dict.fromkeys(before, NarrowAttention)
    seen = {}
    for kind, model in (("dense", dense), ("cut", tiny_model)):
        at = model.blocks[block]
        at.norm1.register_forward_pre_hook(lambda m, a, kind=kind: seen.__setitem__((kind, "before"), a[0].flatten(0, 1)))
        at.attn.register_forward_pre_hook(lambda m, a, kind=kind: seen.__setitem__((kind, "in"), a[0]))
        at.norm2.register_forward_pre_hook(lambda m, a, kind=kind: seen.__setitem__((kind, "after"), a[0].flatten(0, 1)))
        model(data.images)
    weights = torch.ones(len(data), 17)
    weights[:, 0] = 2.0
    weights = weights.flatten().sqrt()[:, None]
    read = before[first].attend(seen["cut", "in"]).flatten(0, 1)
    read = torch.cat([read, torch.ones(len(read), 1)], 1)
    target = seen["dense", "after"] - seen["cut", "before"]
    solution = torch.linalg.lstsq((read * weights).double(), (target * weights).double()).solution
    best = ((target - read @ solution.float()) * weights).square().sum()
    ours = ((seen["cut", "after"] - seen["dense", "after"]) * weights).square().sum()
    started = ((target - before[first].proj(read[:, :-1])) * weights).square().sum()
    assert best * 0.999 < ours < best + 0.02 * (started - best), (best, ours, started)


def test_where_nothing_reads_the_stream_the_target_is_the_dense_output_and_the_note_says_so():
    kwargs, _ = MODELS["swinv2_cr_tiny_224"]
    model = timm.create_model("swinv2_cr_tiny_224", **kwargs).eval()
    ffns = {ffn.name: ffn for ffn in find_ffns(model, shape=(3, 32, 32)).ffns}
    states = []
    for dense in (None, copy.deepcopy(model)):
        cut, layers = copy.deepcopy(model), {name: halved(ffn) for name, ffn in ffns.items()}
        for name, layer in layers.items():
            replace_module(cut, name, layer)
        done = refit(cut, layers, ffns, tiny_images(8), 256, ridge=0.01, dense=dense)
        states.append(torch.cat([layer.w_down.flatten() for layer in layers.values()]))
        assert all(("no module reads what it is added to" in report.note) == (dense is not None) for report in done.values())
    assert torch.equal(*states)


def test_merged_tokens_have_no_stream_to_follow_and_the_report_says_so(tiny_model):
    recipe = make_recipe("static", values={"token_macs": 0.8, "keep": 0.7, "refit_target": "stream"})
    data, dense = tiny_images(24), copy.deepcopy(tiny_model)
    for step in recipe.steps:
        reports = method_of(step).convert(tiny_model, step, Context(data, dense=dense))
    assert reports and all("merged tokens are others in the dense model" in report.refit.note for report in reports)


def test_a_stream_without_a_refit_is_refused():
    with pytest.raises(UserError, match="--refit-target stream is for the refit; compensation mean has none"):
        make_recipe("static", values={"compensation": "mean", "refit_target": "stream"})


def test_the_last_layers_make_good_what_the_first_lost(tiny_model):
    """The tokens of the last feature map are nearer to the dense ones, on images that no fit has seen."""
    seen, missed = tiny_images(160).images[96:], {}
    for target in ("layer", "stream"):
        model = copy.deepcopy(tiny_model)
        extract(model, tiny_images(96), method_options("static", target_macs=0.6, refit_target=target))
        with torch.no_grad():
            missed[target] = float((model.forward_features(seen) - tiny_model.forward_features(seen)).square().mean())
    assert 0 < missed["stream"] < 0.9 * missed["layer"], missed
