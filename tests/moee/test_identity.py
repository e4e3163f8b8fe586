"""The identity check names the layer that was read wrongly; attention is proved before it is narrowed."""

import dataclasses

import pytest
import torch
from timm.layers import Attention
from torch import nn

from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.methods import identity
from moee.methods.heads.widths import check_share
from moee.methods.identity import _attention_distance, check_attentions, check_ffns, whole_attention
from moee.methods.recipe import make_recipe, method_options
from moee.mlps.attention import find_attentions
from moee.mlps.find import find_ffns
from moee.mlps.proof import random_images
from moee.models.model import load_model
from moee.stages.extract import run_extract
from moee.stages.session import Session
from tests.conftest import tiny_images, tiny_spec

SHAPE = (3, 32, 32)


@pytest.fixture
def images():
    return tiny_images(2).images


def changed(ffns, at, **values):
    return [dataclasses.replace(ffn, **values) if i == at else ffn for i, ffn in enumerate(ffns)]


def test_a_model_that_is_read_rightly_passes_and_stays_as_it_is(tiny_model, images):
    before = tiny_model(images)
    modules = list(tiny_model.modules())
    check_ffns(tiny_model, find_ffns(tiny_model).ffns, images)
    check_attentions(tiny_model, find_attentions(tiny_model), images)
    assert all(a is b for a, b in zip(modules, tiny_model.modules(), strict=True)) and torch.equal(tiny_model(images), before)
    assert not routed_layers(tiny_model)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("what", ["activation", "bias", "one neuron"])
def test_a_layer_that_is_read_wrongly_is_named(tiny_model, images, at, what):
    ffns = find_ffns(tiny_model).ffns
    ffn = ffns[at]
    values = {
        "activation": {"activation": "silu"},
        "bias": {"b_down": ffn.b_down + 1e-3},
        "one neuron": {"w_up": torch.cat([ffn.w_up[:1] * 1.01, ffn.w_up[1:]])},
    }[what]
    with pytest.raises(UserError, match=f"`blocks.{at}.mlp`: experts that keep every neuron .*--exclude blocks.{at}.mlp"):
        check_ffns(tiny_model, changed(ffns, at, **values), images)


def test_a_wrong_layer_behind_a_tiny_scale_is_named(images):
    """The model's output hides it: LayerScale starts at 1e-5."""
    model = load_model(tiny_spec(init_values=1e-6))
    with pytest.raises(UserError, match="`blocks.1.mlp`"):
        check_ffns(model, changed(find_ffns(model).ffns, 1, activation="relu"), images)


def test_a_parent_that_needs_the_original_is_named(tiny_model, images):
    """What surrounds the MLP may read its weights itself."""
    block = tiny_model.blocks[1]
    tiny_model.blocks[1] = Peeking(block)
    ffns = find_ffns(tiny_model).ffns
    cannot = "`blocks.1.block.mlp` cannot be replaced .*has no attribute 'fc1'.*--exclude blocks.1.block.mlp"
    with pytest.raises(UserError, match=cannot):
        check_ffns(tiny_model, ffns, images)


class Peeking(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return self.block(x) + self.block.mlp.fc1.bias.sum()


class Watching(nn.Module):
    """A block whose output depends on what kind of MLP it holds: no layer's own output differs."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return self.block(x) * (1.5 if hasattr(self.block.mlp, "router") else 1)


def test_a_difference_outside_the_layers_is_traced_to_one(tiny_model, images):
    tiny_model.blocks[2] = Watching(tiny_model.blocks[2])
    with pytest.raises(UserError, match="`blocks.2.block.mlp`: experts"):
        check_ffns(tiny_model, find_ffns(tiny_model).ffns, images)


def test_a_dense_model_of_nan_is_no_yardstick(tiny_model, images):
    ffns = find_ffns(tiny_model).ffns
    with torch.no_grad():
        tiny_model.head.bias[0] = float("inf")
    with pytest.raises(UserError, match="the dense model's output on the data is NaN or infinite"):
        check_ffns(tiny_model, ffns, images)


def test_patched_attention_is_not_narrowed(tiny_model, images):
    attention = tiny_model.blocks[1].attn
    forward = type(attention).forward
    attention.forward = lambda x, *args, **kwargs: forward(attention, x) * 1.01
    assert "blocks.1.attn" in find_attentions(tiny_model), "its class is that of timm's plain attention"
    with pytest.raises(UserError, match="`blocks.1.attn`: heads that keep every dimension .*leave --attention-macs out"):
        check_attentions(tiny_model, find_attentions(tiny_model), images)


def test_attention_with_a_mask_is_not_narrowed(tiny_model, images):
    class Masking(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, *args, **kwargs):
            return self.block(x, attn_mask=torch.zeros(x.shape[1], x.shape[1]).fill_diagonal_(-torch.inf))

    tiny_model.blocks[1] = Masking(tiny_model.blocks[1])
    with pytest.raises(UserError, match="`blocks.1.block.attn` .*more than its tokens, such as a mask"):
        check_attentions(tiny_model, find_attentions(tiny_model), images)


def test_extraction_refuses_before_the_work(tiny_model, tmp_path, monkeypatch):
    """Every method comes through the same check, once a session."""
    session = Session(tiny_spec(), "digits")
    monkeypatch.setattr(session.dense.blocks[1].attn, "forward", lambda x, *args, **kwargs: x)
    session.prove(make_recipe())
    monkeypatch.setattr("moee.methods.heads.narrowing.narrow", None)
    with pytest.raises(UserError, match="`blocks.1.attn`"):
        run_extract(tiny_spec(), "digits", make_recipe(values={"attention_macs": 0.9}), tmp_path / "out", session=session)
    assert not (tmp_path / "out").exists()
    check_share(session.dense, SHAPE, 0.9)  # nothing else would have refused
    monkeypatch.setattr("moee.stages.session.check_ffns", None)
    session.prove(make_recipe())


def test_wrong_reading_ends_every_method(tmp_path, monkeypatch):
    from moee.methods.clear_moe.options import ClearOptions

    whole = identity.whole_ffn
    monkeypatch.setattr(identity, "whole_ffn", lambda ffn: whole(dataclasses.replace(ffn, activation="relu")))
    for config in (
        method_options(clustering="none"), ClearOptions(experts=2),
        method_options(method="moefication", experts=4, top_k=2, compensation="mean"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="`blocks.0.mlp`: experts that keep every neuron"):
            run_extract(tiny_spec(), "digits", config, tmp_path / "out")


def test_random_images_do_not_touch_the_callers_random_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    random_images(SHAPE, torch.zeros(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dim", "heads"), [(32, 2), (384, 6)])
@pytest.mark.parametrize("sharp", [1, 4])
def test_the_bound_of_attention_holds_a_hundredth_at_any_width(dim, heads, sharp):
    torch.manual_seed(0)
    attention = Attention(dim, num_heads=heads, qkv_bias=True).eval()
    with torch.no_grad():
        attention.qkv.weight[: 2 * dim] *= sharp
        x = torch.randn(2, 50, dim)
        made, output = whole_attention(attention), attention(x)
        assert _attention_distance(made, x, made(x), output) < 0.5
        assert _attention_distance(made, x, made(x), output * 1.01) > 1


def test_a_model_that_is_no_number_on_rounded_images_has_no_yardstick(tiny_model, images):
    """Its noise would be NaN, and nothing is larger than a bound of NaN."""
    ffns, forward = find_ffns(tiny_model).ffns, tiny_model.forward
    tiny_model.forward = lambda x: forward(x).where(torch.arange(len(x))[:, None] < len(images), torch.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        check_ffns(tiny_model, ffns, images)
