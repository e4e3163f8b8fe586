"""Token merging against a nested-loop reference, and what it costs, refuses and leaves as it was."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from moee.calibrate.image_budget import image_groups, likeness
from moee.errors import OutOfReach, UserError
from moee.measure.metrics import dense_macs, model_cost, original_macs, saved_macs, tokens_per_image
from moee.methods.identity import check_merging
from moee.methods.recipe import make_recipe
from moee.methods.tokens import TokensOptions, schedule
from moee.mlps.attention import NarrowAttention, Widths
from moee.planning.plan import check_ways
from moee.planning.search import Way, recipe_of, ways
from moee.tokens.block import install_merging, merged_tokens, plain_blocks
from moee.tokens.merge import Choice, Merged, TokenMerge, restored
from moee.tokens.prefix import holds_prefix
from moee.tokens.schedule import BlockCost, Costs, block_costs, schedule_of, spread

SHAPE = (3, 24, 24)


def small(**changes) -> VisionTransformer:
    """Three blocks on 36 patches; registers, class token and attention pooling by `changes`."""
    torch.manual_seed(0)
    given = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5, **changes}
    return VisionTransformer(**given).eval()


def merge_by_loops(x, sizes, keys, merged, prefix):
    """ToMe's merge of one image, one token at a time: x [N, D], sizes [N], keys [N, d] in float64. Returns tokens, sizes, and for
    each patch where it went."""
    patches = list(range(prefix, len(x)))
    first, second = patches[0::2], patches[1::2]
    likeness = {}
    for a in first:
        cosines = [keys[a] @ keys[b] / np.linalg.norm(keys[a]) / np.linalg.norm(keys[b]) for b in second]
        best = max(range(len(second)), key=lambda i: (cosines[i], -i))
        likeness[a] = (cosines[best], second[best])
    source = sorted(first, key=lambda a: (-likeness[a][0], a))[:merged]
    held = {b: [b] for b in second}
    for a in sorted(source):
        held[likeness[a][1]].append(a)
    kept = [a for a in first if a not in source]
    rows = [x[i] for i in range(prefix)] + [x[a] for a in kept]
    counts = [sizes[i] for i in range(prefix)] + [sizes[a] for a in kept]
    for b in second:
        total = sum(sizes[i] for i in held[b])
        rows.append(sum(x[i] * sizes[i] for i in held[b]) / total)
        counts.append(total)
    places = {a: at for at, a in enumerate(kept)} | {i: len(kept) + at for at, b in enumerate(second) for i in held[b]}
    return np.stack(rows), np.array(counts), [places[i] for i in patches]


def by_loops(model, x, merged):
    """The blocks of a model on tokens x [N, D] of one image, by loops and in float64: attention with log sizes, merge, MLP."""
    sizes, prefix = np.ones(len(x)), model.num_prefix_tokens
    place = list(range(len(x) - prefix))
    for block, count in zip(model.blocks, merged, strict=True):
        heads, h = block.attn.num_heads, block.norm1(x)
        q, k, v = block.attn.qkv(h).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) * block.attn.scale + torch.from_numpy(sizes).log()
        x = x + block.ls1(block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)))
        if count:
            rows, sizes, moved = merge_by_loops(x.numpy(), sizes, k.mean(0).numpy(), count, prefix)
            x, place = torch.from_numpy(rows), [moved[p] for p in place]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return torch.cat([x[:prefix], x[prefix:][place]])


@pytest.mark.parametrize(
    "changes, merged",
    [
        ({}, [4, 7, 5]),  # an odd number of patches in the second block and the third
        ({"class_token": False, "global_pool": "avg"}, [18, 9, 4]),  # as many as there are, no prefix
        ({"reg_tokens": 4, "init_values": 0.5}, [0, 3, 0]),  # registers; blocks that merge nothing before and behind
        ({"class_token": False, "global_pool": "map", "qkv_bias": False}, [1, 1, 1]),
    ],
)
@torch.no_grad()
def test_merging_is_the_reference_by_loops(changes, merged):
    model = small(**changes).double()
    images = torch.randn(2, *SHAPE, dtype=torch.float64)
    ours = copy.deepcopy(model)
    install_merging(ours, merged)
    assert merged_tokens(ours) == merged
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    expected = model.norm(torch.stack([by_loops(model, x, merged) for x in tokens]))
    torch.testing.assert_close(ours.forward_features(images), expected)
    torch.testing.assert_close(ours(images), model.forward_head(expected))
    assert ours.float().forward_features(images.float()).shape == expected.shape


@torch.no_grad()
def test_sizes_sum_to_the_tokens_and_prefix_tokens_stand_alone():
    merge = TokenMerge(torch.randn(4, 8), torch.randn(4), 5, 3)
    x = torch.randn(2, 3 + 17, 8)
    one = merge(x, Merged(x))
    two = merge(one.x, one)
    for given, left in ((one, 15), (two, 10)):
        assert given.x.shape[1] == left and bool((given.size.sum(1) == 20).all())
        assert bool((given.size[:, :3] == 1).all()) and torch.equal(given.x[:, :3], x[:, :3])
        counts = torch.stack([torch.bincount(p, minlength=left - 3) for p in given.place])
        assert torch.equal(counts.float(), given.size[:, 3:]), "each patch is where the sizes say"
    assert restored(two, 3).shape == x.shape


def test_equal_cosines_go_to_the_lower_place_and_a_choice_can_be_dictated():
    merge = TokenMerge(torch.eye(4), torch.zeros(4), 2, 0)
    choice = merge.choose(torch.ones(1, 9, 4))
    assert choice.order.tolist() == [[0, 1, 2, 3, 4]] and choice.best.tolist() == [[0] * 5]
    x = torch.arange(9.0)[None, :, None].expand(1, 9, 4)
    merge.choose = lambda h: Choice(torch.tensor([[4, 2, 0, 1, 3]]), torch.tensor([[3, 3, 1, 0, 0]]))
    done = merge(x, Merged(x))
    assert done.x[0, :, 0].tolist() == [0, 2, 6, 4.5, 3.5, 5, 7] and done.size.tolist() == [[1, 1, 1, 2, 2, 1, 1]]
    assert done.place.tolist() == [[0, 3, 1, 4, 4, 5, 2, 6, 3]]


@torch.no_grad()
def test_no_merged_token_is_the_dense_output_and_a_broken_block_is_named():
    model = small(reg_tokens=2)
    images = torch.randn(2, *SHAPE)
    same = copy.deepcopy(model)
    install_merging(same, [0, 0, 0])
    assert torch.equal(same(images), model(images))
    before = list(model.blocks)
    check_merging(model, images)
    assert all(a is b for a, b in zip(before, model.blocks, strict=True))
    model.blocks[1].forward = lambda x, **_: 2 * x  # what a block of someone's own does
    with pytest.raises(UserError, match="blocks that merge no tokens do not give the dense output"):
        check_merging(model, images)


@pytest.mark.parametrize("narrow", [False, True])
def test_counted_macs_are_those_of_the_running_model(narrow):
    model = small(reg_tokens=1)
    if narrow:
        for block in model.blocks:
            block.attn = NarrowAttention(24, 3, 8, Widths(4, 8))
    whole, costs = dense_macs(model, SHAPE), block_costs(model, SHAPE)
    before = original_macs(model, SHAPE)
    merged = [6, 0, 5]
    ours = copy.deepcopy(model)
    install_merging(ours, merged)
    assert whole - dense_macs(ours, SHAPE) == costs.macs([0, 0, 0]) - costs.macs(merged)
    assert original_macs(ours, SHAPE) == before and saved_macs(ours, SHAPE) == before - dense_macs(ours, SHAPE)
    cost = model_cost(small(reg_tokens=1), ours, {}, SHAPE)
    assert cost["moee"]["macs"] == dense_macs(ours, SHAPE) and cost["dense"]["macs"] == before
    assert tokens_per_image(ours, ["blocks.0.mlp", "blocks.2.mlp"], SHAPE) == {"blocks.0.mlp": 32, "blocks.2.mlp": 27}


def test_a_share_of_the_macs_makes_a_schedule():
    model = small()
    merged = schedule(model, SHAPE, TokensOptions(token_macs=0.8))
    assert merged == spread(3, sum(merged))
    for total, least in ((sum(merged), 0.0), (sum(merged) - 1, 0.8)):
        ours = copy.deepcopy(model)
        install_merging(ours, spread(3, total))
        share = dense_macs(ours, SHAPE) / dense_macs(model, SHAPE)
        assert least < share <= 0.8 + least
    assert schedule(model, SHAPE, TokensOptions(merge_tokens=4)) == [4, 4, 4]


def test_where_late_blocks_run_out_of_patches_each_merges_less_than_the_one_before():
    costs = Costs((BlockCost(4 * 384**2, 8 * 384**2, 2 * 384, 384, 64),) * 12, 65, 1)  # ViT-S at 8 x 8 patches
    whole = costs.macs([0] * 12)
    for share in (0.8, 0.6, 0.5, 0.45, 0.4, 0.3):
        merged = schedule_of(costs, whole, share)
        assert costs.macs(merged) <= share * whole < costs.macs(merged) + 0.03 * whole, share
        assert costs.overfull(merged) is None
        assert merged[-2] >= merged[0] / 3 or share < 0.45, "as gently as serves"
        assert merged == sorted(merged) or share <= 0.5 and merged == sorted(merged, reverse=True), "constant while that serves"
    with pytest.raises(OutOfReach, match="leaves 0.[0-9]+ of the MACs at least, 0.05 was") as raised:
        schedule_of(costs, whole, 0.05)
    least = float(re.search(r"leaves (\S+) of", str(raised.value))[1])
    assert costs.macs(schedule_of(costs, whole, least)) <= least * whole, "what it names can be had"
    assert spread(4, 10) == [2, 2, 3, 3] and spread(1, 7, 0.5) == [7] and spread(3, 70, 0.25) == [40, 20, 10]
    assert all(sum(spread(12, total, ratio)) == total for total in range(70) for ratio in (1, 0.95, 0.3, 0.05))


def test_what_cannot_be_merged_is_refused():
    model = small()
    with pytest.raises(UserError, match="--merge-tokens 13: `blocks.1` has 23 patches left, of which 11 can merge; give 9 or"):
        schedule(model, SHAPE, TokensOptions(merge_tokens=13))
    with pytest.raises(OutOfReach, match="token merging alone leaves 0.[0-9]+ of the MACs at least, 0.1 was asked for"):
        schedule(model, SHAPE, TokensOptions(token_macs=0.1))
    with pytest.raises(UserError, match="`blocks.1` has 2 patches left, of which 1 can merge; give 1$"):
        schedule(small(img_size=8, depth=2), (3, 8, 8), TokensOptions(merge_tokens=2))
    with pytest.raises(UserError, match="`blocks.3` has 1 patches left, of which 0 can merge; not every block can merge"):
        schedule(small(img_size=8, depth=4), (3, 8, 8), TokensOptions(merge_tokens=1))
    with pytest.raises(OutOfReach, match="merging tokens saves none of the MACs of a model with 1 patches; merge none"):
        schedule(small(img_size=4), (3, 4, 4), TokensOptions(token_macs=0.9))
    with pytest.raises(UserError, match="--token-macs finds how many tokens merge"):
        make_recipe("tokens", None, {"token_macs": 0.8, "merge_tokens": 3})
    for name, said in (
        ("swin_tiny_patch4_window7_224", "this is SwinTransformer"), ("convnext_atto", "ConvNeXt"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
    ):  # fmt: skip
        with torch.device("meta"), pytest.raises(UserError, match=said):
            plain_blocks(timm.create_model(name))
    with pytest.raises(UserError, match="`blocks.0.attn`, it has a q_norm"):
        plain_blocks(small(qk_norm=True))
    seen = small()
    seen.blocks[1].mlp.register_forward_hook(lambda module, args, output: None)
    assert len(plain_blocks(seen)) == len(seen.blocks)  # its parts stay
    seen.blocks[2].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(UserError, match="`blocks.2`, it has a forward hook, which would no longer run; leave token merging out"):
        plain_blocks(seen)


def test_merging_stands_alone_or_between_the_others():
    alone = make_recipe("tokens", None, {"token_macs": 0.75})
    assert alone.to_toml() == 'seed = 0\n\n[[step]]\nmethod = "tokens"\ntoken_macs = 0.75\n'
    both = make_recipe("static", None, {"token_macs": 0.8, "attention_macs": 0.9, "target_macs": 0.6})
    assert [step["method"] for step in both.to_json()["steps"]] == ["heads", "tokens", "static"]
    assert [step["method"] for step in make_recipe("static", None, {}).to_json()["steps"]] == ["static"]
    with pytest.raises(UserError, match="leave it out"):
        make_recipe("tokens", None, {"target_macs": 0.8})


def test_a_plan_tries_merging_alone_and_before_the_others():
    tried = ways(("static", "tokens"), ("share",), (1.0,), (1.0, 0.85))
    assert tried == [Way("static", "share"), Way("tokens", ""), Way("static", "share", 1.0, 0.85)]
    steps = recipe_of(tried[2], {"tokens": 2000}).to_json()["steps"]
    assert [step["method"] for step in steps] == ["tokens", "static"]
    assert steps[0]["token_macs"] == 0.85 and steps[1]["tokens"] == 2000
    made = recipe_of(tried[1], {})
    assert made.method.within(made.cut, 0.8, small(), SHAPE).token_macs == 0.8
    with pytest.raises(UserError, match="--methods tokens: it merges tokens itself"):
        check_ways(("tokens",), ("share",), (1.0,), {}, (0.85,))


def test_layers_of_slowly_fewer_tokens_are_one_group_of_images():
    counts = {"a": 100, "b": 80, "c": 51, "d": 40}
    assert [group.names for group in image_groups(counts, 1000, 1000, alike=2)] == [("a", "b", "c"), ("d",)]
    assert len(image_groups(counts, 1000, 1000)) == 4
    model = small()
    assert likeness(model) == 1 and not holds_prefix(model, 36)
    install_merging(model, [1, 0, 0])
    assert likeness(model) == 2 and holds_prefix(model, 36), "37 tokens less one are no patches alone"


def test_gradients_pass_merged_tokens_with_and_without_checkpointing():
    model = small(reg_tokens=1)
    install_merging(model, [4, 3, 2])
    images = torch.randn(2, *SHAPE)
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        found.append([output.detach(), *[part.grad.clone() for part in model.parameters()]])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))
    assert all(float(part.abs().sum()) > 0 for part in found[0])
