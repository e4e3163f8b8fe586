"""Figures as tables show them: small models in millions, and layers of one expert as what they are."""

import pytest

from exporter.figures import macs_unit, status_of
from exporter.terminal.ui import layer_table, stage_table
from tests.exporter.test_accuracy_shown import stage, text_of


@pytest.mark.parametrize("macs, shown", [(3.1e6, (1e6, "M")), (99e6, (1e6, "M")), (1e8, (1e9, "G")), (4.6e9, (1e9, "G"))])
def test_macs_below_a_tenth_of_a_billion_are_shown_in_millions(macs, shown):
    assert macs_unit(macs) == shown


def test_a_small_model_is_told_from_its_cut_one():
    small = stage(0.9)
    small["cost"] = {"dense": {"macs": 3.1e6, "params": 2e5}, "moee": {"macs": 3.0e6, "params": 1e5}}
    assert "MACs (M) 3.100 3.000 (-3.2%)" in text_of(stage_table({"stages": {"extracted": small}}, "t"))
    assert "MACs (G) 2.000 1.000 (-50.0%)" in text_of(stage_table({"stages": {"extracted": stage(0.9)}}, "t"))


@pytest.mark.parametrize(
    "status, experts, shown", [("routed", 1, "pruned"), ("routed", 4, "routed"), ("dense: 1 cluster", 0, "dense: 1 cluster")]
)
def test_a_layer_of_one_expert_is_pruned(status, experts, shown):
    layer = {"name": "l", "status": status, "experts": experts, "union": 4, "mean_width": 4.0, "hidden": 8, "noise": 0.0}
    assert status_of(layer) == shown and f"l {shown} {experts}" in text_of(layer_table([layer]))
    assert layer["status"] == status, "what is recorded stays"
