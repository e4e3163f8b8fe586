"""Every family is either read rightly, which the identity check shows, or left dense with the reason."""

import copy
import re

import pytest

from moee.errors import UserError
from moee.measure.metrics import dense_macs, dense_params, tokens_per_image
from moee.methods.identity import check_ffns
from moee.mlps.find import Found, find_ffns
from moee.mlps.gated import GatedMLP
from moee.mlps.proof import random_images
from moee.mlps.sites import mlp_module
from tests.moee.families import FAST, SLOW, Family


def found_in(family: Family, model) -> Found:
    """What `find_ffns` gives; where nothing can be cut, what its one sentence says."""
    if family.cut:
        return find_ffns(model, shape=family.shape)
    with pytest.raises(UserError, match="has no fc1-act-fc2 MLP to take experts from") as refusal:
        find_ffns(model, shape=family.shape)
    if family.gated:
        said = "(gated: only --preset static and --method corp cut it); use --preset static, or try --methods static,corp"
        assert str(refusal.value).endswith(said)
    for reason in family.dense:
        assert re.search(reason, str(refusal.value)), refusal.value
    return Found([])


def check(family: Family) -> None:
    model = family.model()
    found = found_in(family, model)
    assert len(found.ffns) == family.cut
    assert sum(ffn.scale is not None for ffn in found.ffns) == family.scaled and not found.unscaled
    shadow = copy.deepcopy(model).to("meta")
    by_shapes = found_in(family, shadow)
    assert [ffn.name for ffn in by_shapes.ffns] == [ffn.name for ffn in found.ffns] and by_shapes.dense == found.dense
    assert dense_macs(model, family.shape) > 0
    check_gated(family, model, shadow)
    if not found.ffns:
        return
    for reason in family.dense:
        assert any(re.search(reason, part.reason) for part in found.dense.values()), (reason, found.dense)
    for ffn in found.ffns:
        assert ffn.params == dense_params(mlp_module(model, ffn.name, ffn.bypassed)), ffn.name
    tokens = tokens_per_image(model, [ffn.name for ffn in found.ffns], family.shape)
    assert min(tokens.values()) > 1
    check_ffns(model, found.ffns, random_images(family.shape, found.ffns[0].w_up)[:2])


def check_gated(family: Family, model, shadow) -> None:
    """Static pruning takes the gated MLPs too, and by shapes alone they are the same."""
    if not family.gated:
        return
    found, by_shapes = (find_ffns(each, shape=family.shape, gated=True).ffns for each in (model, shadow))
    gated = [ffn for ffn in found if isinstance(ffn, GatedMLP)]
    assert len(gated) == family.gated and len(found) == family.cut + family.gated
    assert [(f.name, f.activation, f.w_gate.shape) for f in gated] == [
        (f.name, f.activation, f.w_gate.shape) for f in by_shapes if isinstance(f, GatedMLP)
    ]
    for ffn in gated:
        assert ffn.params == dense_params(model.get_submodule(ffn.name)), ffn.name
    check_ffns(model, gated, random_images(family.shape, gated[0].w_up)[:2])


@pytest.mark.parametrize("name", FAST)
def test_what_is_cut_gives_the_dense_output_and_the_rest_has_a_reason(name):
    check(FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_families(name):
    check(SLOW[name])
