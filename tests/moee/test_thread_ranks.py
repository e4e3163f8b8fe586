"""Ranks that share a refit or an elimination end with the bytes of one alone, on every rank."""

import copy

import pytest
import torch

from moee.calibrate.elimination import Elimination, eliminated
from moee.calibrate.layer_sums import CentredSums, LayerPart
from moee.calibrate.refit import refit_from_parts
from moee.calibrate.selection import Moments
from moee.errors import UserError
from moee.layers.routed import Experts, RoutedFFN
from moee.methods.neurons.allocation import Allocation, Candidate
from moee.models.ffn import FFN
from moee.parallel.group import SOLO
from moee.weights.fitting import Fit
from tests.moee.thread_ranks import on_ranks

DIM, HIDDEN = 12, 24


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(router=None):
    """Three experts of a dense MLP; the last two share no neuron."""
    ffn = FFN(
        "blocks.2.mlp", "gelu", drawn(HIDDEN, DIM), drawn(HIDDEN), drawn(DIM, HIDDEN), drawn(DIM), drawn(DIM, seed=3), False
    )
    neurons = torch.tensor([*range(0, 16), *range(0, 8), *range(8, 18)], dtype=torch.int32)
    experts = Experts(
        router=drawn(3, DIM, seed=1) if router is None else router, router_bias=torch.zeros(3), w_up=ffn.w_up[:18],
        b_up=ffn.b_up[:18],
        w_down=ffn.w_down.T[:18], b_out=ffn.b_down.expand(3, -1), neurons=neurons, offsets=torch.tensor([0, 16, 24, 34]),
        activation="gelu",
    )  # fmt: skip
    return RoutedFFN(experts), ffn


def parts(sizes):
    tokens = drawn(sum(sizes), DIM, seed=2).split(sizes)
    return [LayerPart(x, torch.ones(len(x)).index_fill_(0, torch.arange(len(x) // 4), 2.0)) for x in tokens]


def shares(world):
    """The parts 0 to 5 of the ranks: the last of three gets none."""
    return {1: [range(6)], 2: [range(2), range(2, 6)], 3: [range(1), range(1, 6), range(0)]}[world]


@pytest.mark.parametrize("ridge", [None, 0.01])
@pytest.mark.parametrize("world", [2, 3])
def test_a_refit_on_ranks_has_the_bytes_of_one(world, ridge):
    every = parts([90, 100, 80, 120, 60, 150])
    alone, ffn = routed()
    with torch.no_grad():
        report = refit_from_parts(alone, ffn, every, ridge)
    assert report.tokens == 600 and report.ridge is not None

    def work(group):
        layer, own = routed()
        return layer, refit_from_parts(layer, own, [every[i] for i in shares(world)[group.rank]], ridge, group)

    for layer, said in on_ranks(world, work):
        assert said == report
        assert all(torch.equal(value, layer.state_dict()[name]) for name, value in alone.state_dict().items())
    start = routed()[0]
    assert not torch.equal(alone.w_down, start.w_down) and not torch.equal(alone.b_out, start.b_out)


def test_an_expert_that_only_a_later_rank_sees_is_shifted_by_that_rank():
    """All tokens of rank 0 go to expert 0, those of rank 1 to expert 1; nobody's to expert 2, which keeps its bias."""
    router = torch.zeros(3, DIM)
    router[0, 0], router[1, 0], router[2, 1] = 1.0, -1.0, 1e-9
    x, y = drawn(200, DIM, seed=4), drawn(200, DIM, seed=5)
    x[:, 0], y[:, 0] = x[:, 0].abs() + 1, -y[:, 0].abs() - 1
    alone, ffn = routed(router)
    before = copy.deepcopy(alone)
    with torch.no_grad():
        report = refit_from_parts(alone, ffn, [LayerPart(x), LayerPart(y)], 0.01)

    def work(group):
        layer, own = routed(router)
        return layer, refit_from_parts(layer, own, [LayerPart((x, y)[group.rank])], 0.01, group)

    for layer, said in on_ranks(2, work):
        assert said == report
        assert torch.equal(layer.w_down, alone.w_down) and torch.equal(layer.b_out, alone.b_out)
    assert torch.equal(alone.b_out[2], before.b_out[2])
    for e, tokens in enumerate((x, y)):  # each expert's mean output is the dense one's
        dense = (torch.nn.functional.gelu(tokens @ ffn.w_up.T + ffn.b_up) @ ffn.w_down.T + ffn.b_down).mean(0)
        torch.testing.assert_close(alone(tokens).mean(0), dense, atol=1e-4, rtol=1e-4)
        assert not torch.equal(alone.b_out[e], before.b_out[e])


def test_nobody_changes_what_was_found():
    for kind in (Allocation, Candidate, CentredSums, Elimination, Experts, Fit, LayerPart, Moments):
        assert kind.__dataclass_params__.frozen, kind


def test_no_image_that_can_be_read_is_an_error_of_every_rank():
    def work(group):
        layer, ffn = routed()
        return refit_from_parts(layer, ffn, [], 0.01, group)

    for error in [*on_ranks(2, work), *on_ranks(1, lambda _: work(SOLO))]:
        assert isinstance(error, UserError) and "none of the images that `blocks.2.mlp` would be refitted on can be read" in str(
            error
        )


@pytest.mark.parametrize("metric", [None, drawn(DIM, DIM, seed=6) @ drawn(DIM, DIM, seed=6).T])
@pytest.mark.parametrize("world", [2, 3])
def test_an_elimination_on_ranks_chooses_what_one_does(world, metric):
    every = parts([30, 40, 20, 50, 25, 45])  # few enough that none of them is left out
    layer, ffn = routed()
    with torch.no_grad():
        kept, means = eliminated(layer, ffn, every, metric)

    def work(group):
        return eliminated(*routed(), [every[i] for i in shares(world)[group.rank]], metric, group)

    for theirs, theirs_means in on_ranks(world, work):
        assert [t.tolist() for t in theirs] == [t.tolist() for t in kept] and torch.equal(theirs_means, means)
    assert [len(ids) for ids in kept] == layer.widths
    routes = torch.cat([layer.routes(part.tokens)[:, 0] for part in every])
    hidden = torch.nn.functional.gelu(torch.cat([p.tokens for p in every]) @ ffn.w_up.T + ffn.b_up)
    counts = torch.cat([part.counts for part in every])
    for e in range(3):
        own = routes == e
        mean = (hidden[own] * counts[own, None]).sum(0) / counts[own].sum()
        torch.testing.assert_close(means[e].float(), mean, atol=1e-4, rtol=1e-4)
