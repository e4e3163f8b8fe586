"""Experts that are merged or dropped: against loops, and bit for bit where nothing may change."""

import itertools
from functools import partial

import pytest
import torch

import moee
from moee.data.image_set import TensorSet
from moee.errors import UserError
from moee.layers.routed import Experts, RoutedFFN, routed_layers
from moee.methods.recipe import method_options
from moee.models.model import load_model
from moee.progress import silent
from moee.shrinking.merge import alike, merged_groups, merged_layer
from moee.shrinking.mixture import Mixture, extremes, super_experts
from moee.shrinking.options import ShrinkConfig
from moee.shrinking.shrink import shrink
from moee.shrinking.specialise import dropped_experts, needs, without
from tests.conftest import extract, tiny_images, tiny_spec

DIM, UNION, WIDTHS = 6, 10, (4, 7, 3, 5)


def mixture(seed=0, widths=WIDTHS, top_k=1, bias=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    experts = len(widths)
    neurons = torch.cat([torch.randperm(UNION, generator=generator)[:w].sort().values for w in widths])
    made = Experts(
        router=draw(experts, DIM), router_bias=draw(experts) * bias, w_up=draw(UNION, DIM), b_up=draw(UNION),
        w_down=draw(UNION, DIM), b_out=draw(experts, DIM), neurons=neurons.to(torch.int32),
        offsets=torch.tensor([0, *widths]).cumsum(0).to(torch.int32),
        activation="gelu", top_k=top_k, load=(250_000,) * experts,
    )  # fmt: skip
    return Mixture("layer", RoutedFFN(made).eval())


@pytest.fixture
def tokens():
    return torch.randn(200, DIM, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(m, x, e):
    """Expert e's output for one token, neuron by neuron."""
    layer, y = m.layer, m.layer.b_out[e].clone()
    for n in m.experts()[e].tolist():
        y = y + torch.nn.functional.gelu(layer.w_up[n] @ x + layer.b_up[n]) * layer.w_down[n]
    return y


def missed_by_loops(m, tokens, group):
    """What the tokens of a group would miss of their experts' outputs by the weighted mean of the group's."""
    routes = m.layer.routes(tokens).flatten().tolist()
    counts = {e: routes.count(e) for e in group}
    total = 0.0
    for a in group:
        rest = []
        for x in (x for x, e in zip(tokens, routes, strict=True) if e == a):
            mean = sum(counts[g] / sum(counts.values()) * answer(m, x, g) for g in group)
            rest.append(answer(m, x, a) - mean)
        if rest:
            total += float((torch.stack(rest) - torch.stack(rest).mean(0)).square().sum())
    return total


def test_what_a_merge_costs_is_what_loops_find(tokens):
    m = mixture()
    found = alike(m, tokens)
    for group in ([0, 1], [1, 3], [0, 2, 3], [0, 1, 2, 3]):
        assert found.missed(group) == pytest.approx(missed_by_loops(m, tokens, group), rel=1e-4)


def test_the_pair_that_adds_least_is_merged_first(tokens):
    m = mixture()
    found = alike(m, tokens)
    cheapest = min(itertools.combinations(range(4), 2), key=lambda pair: missed_by_loops(m, tokens, pair))
    merges = merged_groups(found, 3)
    assert list(cheapest) in merges.groups and sorted(sum(merges.groups, [])) == [0, 1, 2, 3]
    one = merged_groups(found, 1)
    assert one.groups == [[0, 1, 2, 3]] and one.losses == sorted(one.losses) and len(one.losses) == 4


def test_the_protected_stay_alone(tokens):
    merges = merged_groups(alike(mixture(), tokens), 1, protected=[2])
    assert merges.groups == [[0, 1, 3], [2]]


def test_equal_experts_are_merged_for_nothing(tokens):
    m = mixture(widths=(5, 5))
    layer = m.layer
    layer.neurons.copy_(layer.neurons[:5].repeat(2))
    layer.b_out.data.copy_(layer.b_out[:1].expand(2, -1).clone())
    merges = merged_groups(alike(m, tokens), 1)
    made = merged_layer(m, merges.groups, tokens)
    assert merges.losses[-1] == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(made(tokens), layer(tokens))
    assert made.union == 5 and made.num_experts == 1


def test_a_merged_expert_is_as_wide_as_its_members_were_for_their_tokens(tokens):
    m = mixture()
    counts = torch.bincount(m.layer.routes(tokens).flatten(), minlength=4).double()
    made = merged_layer(m, [[0, 1], [2], [3]], tokens)
    shares = counts[:2] / counts[:2].sum()
    assert made.widths == [round(float(shares @ torch.tensor([4.0, 7.0], dtype=torch.float64))), 3, 5]
    torch.testing.assert_close(made.router[1:], m.layer.router[2:])


def test_a_router_of_nearest_means_stays_one(tokens):
    m = mixture(bias=True)
    m.layer.router_bias.copy_(-m.layer.router.detach().square().sum(1) / 2)
    made = merged_layer(m, [[0, 3], [1], [2]], tokens)
    torch.testing.assert_close(made.router_bias, -made.router.detach().square().sum(1) / 2)


@pytest.mark.parametrize("top_k", [1, 2])
def test_without_an_expert_the_others_answer_bit_for_bit(tokens, top_k):
    m = mixture(top_k=top_k)
    made = without(m, [1], torch.full((4,), 0.25))
    before = m.layer.routes(tokens)
    untouched = ~(before == 1).any(1)
    assert untouched.any() and not untouched.all()
    assert torch.equal(made(tokens[untouched]), m.layer(tokens[untouched]))
    after = torch.tensor([0, 2, 3])[made.routes(tokens)]
    assert not (after == 1).any() and torch.equal(after[untouched], before[untouched])
    only = set(m.experts()[1].tolist()) - set(torch.cat([m.experts()[e] for e in (0, 2, 3)]).tolist())
    assert made.union == m.layer.union - len(only) - (UNION - len(m.layer.neurons.unique()))


def test_need_is_the_norm_of_an_experts_outputs(tokens):
    m = mixture()
    routes = m.layer.routes(tokens).flatten().tolist()
    norms = [sum(float(answer(m, x, e).norm()) for x, r in zip(tokens, routes, strict=True) if r == e) for e in range(4)]
    torch.testing.assert_close(needs(m, tokens), torch.tensor(norms, dtype=torch.float64) / sum(norms), rtol=1e-5, atol=1e-8)


def test_the_least_needed_go_as_far_as_is_tolerated():
    need = torch.tensor([0.5, 0.004, 0.0, 0.005, 0.491], dtype=torch.float64)
    assert dropped_experts(need, 0.01, 1, []) == [1, 2, 3]
    assert dropped_experts(need, 0.005, 1, []) == [1, 2]
    assert dropped_experts(need, 0.01, 1, [2]) == [1, 3]
    assert dropped_experts(need, 0.0, 1, []) == [2]
    assert dropped_experts(need, 0.99, 4, []) == [2]


def test_an_expert_of_extreme_outputs_is_found_and_no_other(tokens):
    m = mixture()
    usual = extremes(m, tokens)
    assert super_experts({"layer": usual}) == {}
    m.layer.b_out.data[2] += 1000
    assert super_experts({"other": usual, "layer": extremes(m, tokens)}) == {"layer": [2]}
    assert super_experts({"layer": [0.0, 0.0]}) == {}


@pytest.fixture
def extracted(tiny_model):
    extract(tiny_model, tiny_images(), method_options(clustering="kmeans", clusters=4, cluster_tokens=500))
    return tiny_model.eval()


def test_a_model_is_shrunk_to_fewer_experts_near_what_it_was(extracted):
    with torch.no_grad():
        before = extracted(tiny_images().images)
        done = shrink(extracted, ShrinkConfig(experts=2), tiny_images())
        after = extracted(tiny_images().images)
    assert all(layer.experts == (4, 2) and len(layer.losses) == 3 and layer.refit is not None for layer in done)
    assert float(torch.nn.functional.cosine_similarity(before, after).mean()) > 0.95


def test_a_domain_of_one_class_needs_fewer_experts(extracted):
    with torch.no_grad():
        done = shrink(extracted, ShrinkConfig(specialise=True, tolerance=0.3), tiny_images())
    assert any(layer.dropped for layer in done)
    assert all(layer.given_up <= 0.3 and layer.experts[1] == 4 - len(layer.dropped) for layer in done)


def test_in_python_a_copy_is_shrunk(tmp_path):
    every = tiny_images(60)
    train, val = (TensorSet("tiny", every.images[rows], every.labels[rows], 4) for rows in (slice(48), slice(48, 60)))
    asked = {"clustering": "kmeans", "clusters": 4, "cluster_tokens": 500, "target_macs": 0.8, "refit_tokens": 500}
    tiny_moee = moee.extract(load_model(tiny_spec()), train, val, report=silent, **asked)
    before = [layer.num_experts for layer in routed_layers(tiny_moee.model).values()]
    smaller = moee.shrink(tiny_moee, train, val, experts=2, refit_tokens=500, out=tmp_path / "fewer", report=silent)
    assert [layer.num_experts for layer in routed_layers(tiny_moee.model).values()] == before
    assert [layer.num_experts for layer in routed_layers(smaller.model).values()] == [2, 2, 2]
    assert list(smaller.info["stages"])[-1] == "shrunk" and (tmp_path / "fewer" / "moee.json").is_file()
    with pytest.raises(UserError, match="nothing is asked for; give experts, specialise or both"):
        moee.shrink(tiny_moee, train, val)
    for call in (partial(moee.shrink, experts=2), moee.finetune, partial(moee.extract, num_classes=10, **asked)):
        model = tiny_moee if "num_classes" not in getattr(call, "keywords", {}) else tiny_moee.dense()
        with pytest.raises(UserError, match=r"takes about .*, and memory allows 100 MiB; give a larger memory, or "):
            call(model, train, val, memory="100M", report=silent)
        with pytest.raises(UserError, match="^memory: expected a size"):
            call(model, train, val, memory="much", report=silent)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(experts=4), "--experts 4 merges nothing: a layer has 4 experts at most"),
        (dict(experts=9), "--experts 9 merges nothing"),
    ],
)
def test_more_experts_than_there_are(extracted, options, says):
    with pytest.raises(UserError, match=says):
        shrink(extracted, ShrinkConfig(**options), tiny_images())


def test_one_expert_a_layer_has_nothing_to_shrink(tiny_model):
    extract(tiny_model, tiny_images(), method_options("static", keep=0.7))
    with pytest.raises(UserError, match="every layer has one expert"):
        shrink(tiny_model, ShrinkConfig(experts=1), tiny_images())
