"""Narrower heads: what the closed form keeps, how widths are chosen, what is refused."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention

import moee.methods.heads.narrowing
from moee.errors import UserError
from moee.measure.metrics import dense_macs, model_cost, original_macs
from moee.methods.heads.fit import HeadMoments, dense_parts, find_bases, fit_projection, narrowed, projection_sums
from moee.methods.heads.method import HeadsOptions
from moee.methods.heads.narrowing import PROBES, TOKENS, _images, _standing_in, narrow, width_losses
from moee.methods.heads.widths import choose_widths, levels, moves
from moee.methods.recipe import make_recipe
from moee.mlps.attention import NarrowAttention, Widths, attention_macs, find_attentions, macs_saved, narrow_attentions
from moee.models.model import load_model, replace_module
from moee.tokens.prefix import token_weights
from tests.conftest import tiny_images, tiny_spec
from tests.moee.distributed_worker import Broken

SIZE = (3, 32, 32)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    made = Attention(48, num_heads=3, qkv_bias=True).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def tokens(count=40, dim=48):
    """Correlated tokens of `count` images: narrowing can use that."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -1.5, dim)
    return torch.randn(count, 11, dim, generator=generator) @ mix


def seen(attention, x, prefix=0):
    moments = HeadMoments(attention, prefix)
    for part in x.split(16):
        moments.add(part)
    return moments


def error(made, attention, x):
    with torch.no_grad():
        dense = attention(x)
        return float((made(x) - dense).square().sum() / (dense - dense.mean((0, 1))).square().sum())


@torch.no_grad()
def cut(attention, x, widths):
    moments = seen(attention, x)
    return narrowed(attention, find_bases(moments, None), widths, moments)


def test_all_dimensions_give_the_dense_attention(attention):
    x = tokens()
    assert error(cut(attention, x, Widths(16, 16)), attention, x) < 1e-9


def test_what_has_few_dimensions_is_narrowed_without_a_loss(attention):
    x = tokens()
    with torch.no_grad():
        weight, bias = attention.qkv.weight.view(3, 3, 16, 48), attention.qkv.bias.view(3, 3, 16)
        for part, rank in ((0, 7), (2, 8)):  # the bias adds no direction of its own to the values: it is their mean
            for head in range(3):
                inner = torch.linalg.qr(torch.randn(16, rank)).Q
                weight[part, head] = inner @ inner.T @ weight[part, head]
                bias[part, head] = inner @ inner.T @ bias[part, head]
    assert error(cut(attention, x, Widths(8, 8)), attention, x) < 1e-6
    for fewer in (Widths(6, 16), Widths(16, 6)):
        assert error(cut(attention, x, fewer), attention, x) > 1e-6


def test_dot_products_are_closer_than_with_any_dimensions_left_out(attention):
    """The head's own dimensions are one choice of coordinates, the closed form's are the best for independent q and k."""
    x = tokens(200)
    made = cut(attention, x, Widths(8, 16))
    with torch.no_grad():
        q, k, _ = dense_parts(attention, x)
        k = k - k.mean(2, keepdim=True)
        wanted = q @ k.mT * attention.scale
        small_q = made.q(x).view(200, 11, 3, 8).transpose(1, 2)
        small_k = made.k(x).view(200, 11, 3, 8).transpose(1, 2)
        got = small_q @ (small_k - small_k.mean(2, keepdim=True)).mT
        ours = (got - wanted).square().sum()
        strength = (q.square().sum((0, 2)) * k.square().sum((0, 2))).topk(8, dim=-1).indices
        picked = torch.stack([q[:, h][..., strength[h]] @ k[:, h][..., strength[h]].mT for h in range(3)], 1)
        theirs = (picked * attention.scale - wanted).square().sum()
    assert ours < 0.7 * theirs


def test_refit_lowers_the_error_of_narrowed_queries(attention):
    x, other = tokens(500)[:400], tokens(500)[400:]
    made = cut(attention, x, Widths(8, 8))
    before = error(made, attention, other)
    with torch.no_grad():
        fit_projection(made, projection_sums(made, attention, x))
    assert error(made, attention, other) < before


def test_class_tokens_count_for_more(attention, monkeypatch):
    """A class token unlike the patches: its weight decides which directions stay."""
    weights = token_weights(257, 1)
    assert weights[0] == 32 and (weights[1:] == 1).all() and (token_weights(9, 0) == 1).all()
    x = tokens(60)
    x[:, 0] = torch.randn(60, 48, generator=torch.Generator().manual_seed(2)) * 0.4

    def class_error(prefix):
        moments = seen(attention, x, prefix)
        with torch.no_grad():
            made = narrowed(attention, find_bases(moments, None), Widths(8, 8), moments)
            fit_projection(made, projection_sums(made, attention, x, prefix))
            return float((made(x) - attention(x))[:, 0].square().mean())

    monkeypatch.setattr("moee.tokens.prefix.PREFIX_SHARE", 10.0)
    assert class_error(1) < class_error(0)


@pytest.mark.parametrize(
    "dim, expected", [(64, [64, 56, 48, 40, 32]), (32, [32, 24, 16]), (20, [20, 16]), (16, [16, 8]), (8, [8]), (6, [6])]
)
def test_levels_are_multiples_of_eight_and_at_least_half(dim, expected):
    assert levels(dim) == expected
    assert len(moves(dim, False)) == 2 * len(moves(dim, True)) == 2 * (len(expected) - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=48, max_size=48), st.floats(0.55, 1.0), st.booleans())
def test_chosen_widths_meet_the_share(values, share, equal):
    attentions = {f"b{i}.attn": Attention(192, num_heads=3) for i in range(6)}
    shapes = {name: (1, 50) for name in attentions}
    found = iter(values)
    losses = {(name, w): next(found) for name in attentions for w in moves(64, equal)}
    chosen = choose_widths(attentions, shapes, losses, share, equal)
    whole = attention_macs(192, 3, Widths(64, 64), 1, 50) * 6
    macs = sum(attention_macs(192, 3, w, 1, 50) for w in chosen.values())
    assert macs < share * whole + 1, "MACs are whole numbers"
    assert all(w.qk in levels(64) and w.v in levels(64) and (w.qk == w.v or not equal) for w in chosen.values())


def test_the_cheapest_steps_are_taken_first():
    attentions = {name: Attention(64, num_heads=2) for name in ("a", "b")}
    shapes = dict.fromkeys(attentions, (1, 10))
    losses = {(name, w): 3.0 if 16 in (w.qk, w.v) else 1.0 for name in attentions for w in moves(32, False)}
    losses["b", Widths(32, 24)] = 0.9  # two steps at once cost less a MAC than any alone
    losses["b", Widths(32, 16)] = 1.1
    losses["a", Widths(32, 24)] = 0.8  # the cheapest alone
    assert choose_widths(attentions, shapes, losses, 0.9, False) == {"a": Widths(32, 32), "b": Widths(32, 16)}


def test_a_price_is_a_mac():
    """The wide layer's step costs more loss, and frees far more."""
    attentions = {"wide": Attention(512, num_heads=16), "thin": Attention(32, num_heads=1)}
    losses = {("wide", w): 2.0 for w in moves(32, False)} | {("thin", w): 1.0 for w in moves(32, False)}
    chosen = choose_widths(attentions, dict.fromkeys(attentions, (1, 10)), losses, 0.995, False)
    assert chosen["wide"] != Widths(32, 32) and chosen["thin"] == Widths(32, 32)


def test_narrowed_model_costs_what_is_counted(tiny_model):
    dense = copy.deepcopy(tiny_model)
    widths = narrow(tiny_model, tiny_images(24), SIZE, 0.8)
    assert widths and set(widths) == set(narrow_attentions(tiny_model))
    saved = macs_saved(tiny_model, SIZE)
    assert dense_macs(tiny_model, SIZE) == dense_macs(dense, SIZE) - saved
    assert original_macs(tiny_model, SIZE) == dense_macs(dense, SIZE)
    attention = sum(attention_macs(32, 2, Widths(16, 16), 1, 17) for _ in range(3))
    assert saved >= 0.2 * attention
    cost = model_cost(dense, tiny_model, {}, SIZE)
    assert cost["moee"]["macs"] == dense_macs(tiny_model, SIZE)
    assert cost["moee"]["params"] == sum(p.numel() for p in tiny_model.parameters())


def test_same_images_same_widths_and_weights(tiny_model):
    first, second = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    assert narrow(first, tiny_images(24), SIZE, 0.7) == narrow(second, tiny_images(24), SIZE, 0.7)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_equal_heads(tiny_model):
    assert all(w.qk == w.v for w in narrow(tiny_model, tiny_images(24), SIZE, 0.7, True).values())


def test_a_trial_leaves_the_model_as_it_was_and_equals_the_whole_pass(tiny_model):
    images = tiny_images(4).images
    attention = tiny_model.get_submodule("blocks.1.attn")
    inputs = []
    handle = tiny_model.blocks[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        before = tiny_model(images)
        handle.remove()
        block = tiny_model.blocks[1]
        made = cut(attention, block.norm1(inputs[0]), Widths(8, 8))
        with _standing_in(tiny_model, "blocks.1.attn", made, inputs[0]):
            short = tiny_model(images)
        assert torch.equal(tiny_model(images), before)
        replace_module(tiny_model, "blocks.1.attn", made)
        assert torch.equal(tiny_model(images), short) and not torch.equal(short, before)


@pytest.mark.parametrize(
    "name, part",
    [
        ("swin_tiny_patch4_window7_224", "WindowAttention"),
        ("convnext_tiny", "no attention"),
        ("cait_xxs24_224", "Attn"),
        ("eva02_tiny_patch14_224", "EvaAttention"),
    ],
)
def test_other_attention_is_refused(name, part):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=part):
        find_attentions(model)


def test_attention_with_a_norm_inside_is_refused():
    with pytest.raises(UserError, match="q_norm"):
        find_attentions(load_model(tiny_spec(qk_norm=True)))


def test_attention_that_a_hook_looks_at_is_refused(tiny_model):
    tiny_model.blocks[1].attn.proj.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(UserError, match="heads of `blocks.1.attn` cannot be narrowed, it has a forward hook"):
        find_attentions(tiny_model)


def test_a_forward_with_tensors_of_its_own_is_refused_in_a_sentence(tiny_model):
    tiny_model.blocks[1].forward = lambda x, *args, **kwargs: x + torch.ones(x.shape)
    with pytest.raises(UserError, match="the model does not run on shapes alone"):
        narrow(tiny_model, tiny_images(24), SIZE, 0.8)


def test_too_small_a_share(tiny_model):
    with pytest.raises(UserError, match="0.50 or more"):
        narrow(tiny_model, tiny_images(24), SIZE, 0.3)
    assert not narrow_attentions(tiny_model)


def test_exactly_the_least_share_is_met():
    attentions, shapes = {"a": Attention(123, num_heads=3)}, {"a": (1, 145)}
    losses = {("a", w): 1.0 for w in moves(41, False)}
    share = attention_macs(123, 3, Widths(24, 24), 1, 145) / attention_macs(123, 3, Widths(41, 41), 1, 145)
    assert choose_widths(attentions, shapes, losses, share, False) == {"a": Widths(24, 24)}


def test_broken_activations_and_too_few_images(tiny_model):
    with pytest.raises(UserError, match="at least 2"):
        narrow(tiny_model, tiny_images(1), SIZE, 0.8)
    few = Broken(tiny_images(24), set(range(20)))
    assert narrow(copy.deepcopy(tiny_model), few, SIZE, 0.8) and len(few.skipped) == 20
    with pytest.raises(UserError, match="2 readable"):
        narrow(tiny_model, Broken(tiny_images(24), set(range(23))), SIZE, 0.8)
    assert narrow(copy.deepcopy(tiny_model), tiny_images(2), SIZE, 0.8)
    with torch.no_grad():
        tiny_model.blocks[1].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"`blocks\.1\.attn` receives NaN"):
        narrow(tiny_model, tiny_images(24), SIZE, 0.8)
    assert not narrow_attentions(tiny_model)


def test_the_layer_that_needs_least_is_narrowed(tiny_model):
    """Queries of one block live in half of their dimensions: the measured losses say so, and nothing else is cut."""
    with torch.no_grad():
        attention = tiny_model.blocks[1].attn
        weight, bias = attention.qkv.weight.view(3, 2, 16, 32), attention.qkv.bias.view(3, 2, 16)
        for block in tiny_model.blocks:
            block.attn.qkv.weight.mul_(20)  # attention of random weights is flat: no direction matters
        weight[0, :, 8:], bias[0, :, 8:] = 0, 0
    one = attention_macs(32, 2, Widths(8, 16), 1, 17) + 2 * attention_macs(32, 2, Widths(16, 16), 1, 17)
    share = one / (3 * attention_macs(32, 2, Widths(16, 16), 1, 17))
    before = copy.deepcopy(tiny_model)
    assert narrow(tiny_model, tiny_images(48), SIZE, share) == {"blocks.1.attn": Widths(8, 16)}
    images = tiny_images(8).images
    with torch.no_grad():
        assert torch.allclose(tiny_model(images), before(images), atol=1e-3)


def test_layer_scale_and_centred_keys_decide_what_is_kept(attention):
    x = tokens(60)
    moments = seen(attention, x)
    with torch.no_grad():
        scale = torch.where(torch.arange(48) < 6, 100.0, 0.01)

        def left(basis):  # of the outputs that the scale keeps, and of all
            made = narrowed(attention, basis, Widths(16, 4), moments)
            return float(((made(x) - attention(x)) * scale).square().sum())

        assert left(find_bases(moments, scale)) < 0.8 * left(find_bases(moments, None))
        shifted = copy.deepcopy(attention)
        shifted.qkv.bias.view(3, 48)[1] += 50.0  # of the keys: a softmax does not see it
        made = cut(shifted, x, Widths(8, 16))
        assert error(made, shifted, x) == pytest.approx(error(cut(attention, x, Widths(8, 16)), attention, x), rel=0.05)


def test_probes_are_none_of_the_images_of_the_fit():
    probes, fit = _images(tiny_images(24), 17, 32, 3, PROBES, TOKENS)
    assert len(probes) == len(fit) == 12
    assert not any(torch.equal(a, b) for a in probes for b in fit)
    probes, fit = _images(tiny_images(24), 1 << 20, 1024, 24, PROBES, TOKENS)  # large models: fewer of both
    assert len(probes) == len(fit) == 4


def test_an_error_in_the_last_pass_leaves_the_model_as_it_was(tiny_model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr("moee.methods.heads.narrowing.fit_projection", fail)
    with pytest.raises(RuntimeError, match="stop"):
        narrow(tiny_model, tiny_images(24), SIZE, 0.7)
    assert len(find_attentions(tiny_model)) == 3


def test_activations_that_break_behind_a_narrowed_layer_name_the_attention(tiny_model, monkeypatch):
    """The trials saw the dense model's activations; the fit sees those that the narrowed layers before it make."""
    losses = width_losses(tiny_model, tiny_images(24), SIZE)
    real = moee.methods.heads.narrowing.fit_projection

    def broken(made, *args, **kwargs):
        real(made, *args, **kwargs)
        made.proj.bias.data[:] = float("inf")

    monkeypatch.setattr("moee.methods.heads.narrowing.fit_projection", broken)
    with pytest.raises(UserError, match=r"`blocks\.\d\.attn` receives NaN or infinite"):
        narrow(tiny_model, tiny_images(24), SIZE, 0.55, losses=losses)
    assert len(find_attentions(tiny_model)) == 3


def test_older_timm_has_no_gate(tiny_model):
    del tiny_model.blocks[0].attn.gate
    assert len(find_attentions(tiny_model)) == 3


def test_options():
    assert not make_recipe().first and not make_recipe("clear-moe").first
    assert not make_recipe(values={"attention_macs": 1.0}).first, "nothing to measure"
    for method in ("experts", "static", "clear-moe"):
        recipe = make_recipe(method, values={"attention_macs": 0.8, "attention_heads": "equal", "seed": 3})
        assert recipe.first == (HeadsOptions(attention_macs=0.8, attention_heads="equal", seed=3),) and recipe.cut.seed == 3
        with pytest.raises(UserError, match="--attention-macs"):
            make_recipe(method, values={"attention_heads": "equal"})
        with pytest.raises(UserError, match="--attention-macs"):
            make_recipe(method, values={"attention_macs": 1.5})


def test_masks_reach_the_products(attention):
    made: NarrowAttention = cut(attention, tokens(), Widths(16, 16))
    x = tokens(2)
    mask = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(0)) > 0.3
    mask |= torch.eye(11, dtype=torch.bool)
    with torch.no_grad():
        assert torch.allclose(made(x, attn_mask=mask), attention(x, attn_mask=mask), atol=1e-3)
        assert torch.allclose(made(x, is_causal=True), attention(x, is_causal=True), atol=1e-3)
