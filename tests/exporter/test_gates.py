"""A gate that had nothing to check, or met a figure that is no number, has not passed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from exporter import cli
from exporter.parity import ParityResult
from exporter.parity.layers import LayerParity
from exporter.parity.outputs import batch_error
from exporter.parity.stats import error_stats, within
from exporter.parity.ties import only_ties
from exporter.quantization.calibrate import calibrate, sqnr_db
from exporter.runners import PluginCheck
from exporter.verdict import MIN_PAIRS, judge
from exporter.verification.graph_accuracy import GraphAccuracy
from exporter.verification.result import EngineParity, VerifyResult
from moee.errors import UserError
from moee.parallel.group import SOLO
from moee.progress import silent
from tests.conftest import tiny_images

HALF = np.array([[1.0, 1.0, 1.0], [np.nan, np.nan, np.nan]], np.float32)
ONES, NANS = np.ones((2, 3), np.float32), np.full((2, 3), np.nan, np.float32)


def compared(got=ONES, reference=ONES, torch_error=0.0):
    return batch_error(2, got, reference, torch_error, torch_error, dtype=torch.float16)


def layer(**changes):
    stats = error_stats(ONES, ONES)
    found = LayerParity("mlp", 4, 1.0, 0, None, None, 0, 0.0, stats, 0.1, stats, 0.1, stats, None, 0.0, 0.1, experts=2)
    return replace(found, **changes)


def parity(batches=None, layers=None):
    batches, layers = [compared()] if batches is None else batches, [layer()] if layers is None else layers
    routes = {one.name: one.agreement for one in layers}
    return ParityResult("runtime", list(batches), routes, 1.0, 2, layers=list(layers), min_route_agreement=0.9999)


def result(parity, engine=None):
    return VerifyResult("export", parity, None, "no labels", engine, 0.0)


def failures(found):
    return [f"{case.group} {case.name}" for case in found.cases() if case.failure]


def test_a_full_comparison_passes():
    assert parity() and result(parity()) and not failures(result(parity()))


@pytest.mark.parametrize(
    "batch",
    [
        compared(NANS, NANS), compared(NANS), compared(ONES, NANS), compared(torch_error=math.inf),
        compared(NANS, ONES, math.inf),
        compared(HALF, HALF), compared(HALF), compared(ONES, HALF), compared(HALF * math.inf, HALF * math.inf),
    ],
    ids=[
        "no number in either", "none from the runtime", "none from torch", "torch overflows", "both overflow", "half of both",
        "half from the runtime", "half from torch", "infinite in both",
    ],
)  # fmt: skip
def test_outputs_that_are_no_numbers_do_not_pass(batch):
    assert not batch.passed and not parity([batch]) and failures(result(parity([batch]))) == ["parity batch 2"]
    assert result(parity([batch])).to_json()["passed"] is False


def test_one_value_that_is_no_number_is_counted_and_said():
    got = np.array([[1.0, np.nan]])
    stats = error_stats(got, got)
    assert stats.count == 1 and stats.max_abs_error == math.inf
    assert "some outputs are no numbers" in compared(got, got).message
    assert "some of its values are no numbers" in layer(local=error_stats(HALF, HALF)).output_message


def test_no_batches_or_layers_do_not_pass():
    assert failures(result(parity(batches=()))) == ["parity batches"] and not parity(batches=())
    assert failures(result(parity(layers=()))) == ["parity layers"] and not parity(layers=())
    assert parity(batches=()).to_json()["max_abs_error"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"local": error_stats(HALF, HALF)},
        {"tokens": 0}, {"local": error_stats(np.empty(0), np.empty(0))}, {"probe": error_stats(NANS, NANS)},
        {"local_tolerance": math.inf}, {"probe_tolerance": math.nan}, {"wrong_routes": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_layer_of_which_nothing_was_compared_does_not_pass(changes):
    broken = layer(**changes)
    assert not broken.passed and not parity(layers=[broken]) and failures(result(parity(layers=[broken])))


def test_routes_that_were_not_compared_are_not_near_ties():
    assert not only_ties([])
    assert not parity(layers=[layer(agreement=math.nan)])
    assert only_ties([layer()]) and not only_ties([layer(input_drift=math.inf, input_tolerance=math.inf)])


def test_an_engine_whose_outputs_were_not_compared_does_not_pass():
    plugin = PluginCheck("lib.so", "0" * 64, "0" * 64)
    assert plugin.passed
    empty = EngineParity("engine", plugin, True)
    assert not empty.passed and failures(result(parity(), empty)) == ["engine batches"] and not result(parity(), empty)
    unknown = EngineParity("engine", plugin, None, [compared()])
    assert unknown.passed and [c.name for c in result(parity(), unknown).cases() if c.skipped] == ["drop", "source"]


def test_within_is_false_for_whatever_is_unknown():
    nan, inf = math.nan, math.inf
    assert within(0.0, 0.0) and within(1.0, 2.0)
    for error, allowed in ((nan, 1.0), (1.0, nan), (inf, inf), (0.0, inf), (inf, 1.0), (nan, nan), (2.0, 1.0)):
        assert not within(error, allowed)


def test_noise_that_is_no_number_is_not_lossless():
    ones = torch.ones(4)
    assert sqnr_db(ones, ones) == math.inf and sqnr_db(ones, ones + 0.1) == pytest.approx(20.0, abs=1e-4)
    for reference, noisy in ((ones, ones * math.nan), (ones * math.nan, ones), (ones, ones * math.inf), (0 * ones, ones)):
        assert sqnr_db(reference, noisy) == -math.inf


def test_int8_of_a_model_that_gives_no_numbers_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    nn.init.constant_(model[1].bias, math.nan)
    with pytest.raises(UserError, match="outputs on tiny are not finite"):
        calibrate(model.eval(), tiny_images(8), torch.float32, 4)


def test_times_that_tell_nothing_have_no_verdict():
    assert not judge(np.ones(MIN_PAIRS - 1), np.ones(MIN_PAIRS - 1)).decidable
    assert judge(np.ones(40), np.ones(40)).decidable
    with np.errstate(divide="ignore", invalid="ignore"):
        stopped = judge(np.zeros(40), np.zeros(40))
    assert not stopped.decidable and stopped.winner is None and "no time that the clock can tell" in stopped.text


def test_fail_if_slower_fails_where_nothing_could_be_told(tiny_export, monkeypatch, capsys):
    command = ["bench", str(tiny_export.folder()), "--batch", "1", "--throughput", "0", "--fail-if-slower", "--runs", "3"]
    assert cli.main([*command, "--duration", "0"]) == 2
    assert "needs 10 pairs of runs or more, came --runs 3" in capsys.readouterr().err
    monkeypatch.setattr("exporter.timing.latency.time_in_turns", lambda *args, **kwargs: np.ones((2, 3)))
    assert cli.main(command) == 1 and "FAILED: whether MoEE is slower could not be told" in capsys.readouterr().out
    assert cli.main([a for a in command if a != "--fail-if-slower"]) == 0


def test_a_random_head_has_no_accuracy_that_a_gate_could_be_held_against(tiny_export):
    """Its images are told apart without an error here, as a lucky draw might."""
    moee = tiny_export.moee
    drawn = replace(moee, spec=moee.spec.model_copy(update={"weights": None, "weights_sha256": None, "random_seed": 0}))
    for model, refused in ((moee, False), (drawn, True)):
        check = GraphAccuracy(tiny_export.folder(), model, tiny_export.data, None, "cpu", None, silent, SOLO)
        answers = check.outputs("dense")
        assert ("--random-weights drew" in check.early().reason) == refused
        assert bool(check.judge(answers, None)[0]) == refused
