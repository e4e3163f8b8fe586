"""The figures that gates judge, by hand; each limit holds at its own value and not beyond."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from exporter.commands.engines.verify import _show
from exporter.compression.verdicts import accuracy_line
from exporter.forms.form import WeightProblem
from exporter.parity.merges.judge import MergeParity
from exporter.parity.operator import OperatorParity
from exporter.parity.outputs import SAFETY, BatchError, batch_error, tolerance
from exporter.parity.result import ParityResult
from exporter.parity.stats import ErrorStats, error_stats
from exporter.report.agreement import _intervals
from exporter.runners import PluginCheck
from exporter.terminal.ui import plain_console
from exporter.verification.accuracy import AccuracyResult, calibration_error, compare_accuracy, kl_divergence
from exporter.verification.markdown import to_markdown
from exporter.verification.result import Case, EngineParity, VerifyResult
from moee.measure.accuracy import drop_in_words, wilson
from tests.exporter.test_gates import compared, failures, layer, parity, result


def logits(count=200, classes=7, seed=0, scale=2.0):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * scale


LABELS = torch.arange(200) % 7


def expected_calibration_error(given, labels):
    shares = (torch.exp(given.double()) / torch.exp(given.double()).sum(1, keepdim=True)).numpy()
    total = 0.0
    for low in range(15):
        inside = [i for i, row in enumerate(shares) if low / 15 < row.max() <= (low + 1) / 15]
        if inside:
            right = np.mean([shares[i].argmax() == labels[i] for i in inside])
            total += len(inside) / len(shares) * abs(right - np.mean([shares[i].max() for i in inside]))
    return total


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_calibration_is_that_of_fifteen_bins(scale):
    given = logits(scale=scale)
    given[:40] += 4 * torch.nn.functional.one_hot(LABELS[:40], 7)
    assert calibration_error(given, LABELS) == pytest.approx(expected_calibration_error(given, LABELS.tolist()), abs=1e-12)
    broken = given.clone()
    broken[50:] = math.nan
    assert calibration_error(broken, LABELS) == pytest.approx(expected_calibration_error(given[:50], LABELS.tolist()), abs=1e-12)
    assert math.isnan(calibration_error(broken[50:], LABELS[50:]))


def test_the_lowest_bins_are_bins_of_their_own():
    """40 classes: images of a confidence of 0.05 that are all right, and of 0.1 that are all wrong."""
    given = torch.zeros(100, 40)
    given[:50, 0], given[50:, 0] = math.log(0.05 * 39 / 0.95), math.log(0.1 * 39 / 0.9)
    labels = torch.zeros(100, dtype=torch.int64).index_fill_(0, torch.arange(50, 100), 1)
    assert calibration_error(given, labels) == pytest.approx(0.5 * 0.95 + 0.5 * 0.1, abs=1e-6)


def test_divergence_is_of_the_cut_model_from_the_dense_one():
    dense, cut = logits(), logits(seed=1)
    p, q = (torch.exp(x.double()) / torch.exp(x.double()).sum(1, keepdim=True) for x in (dense, cut))
    assert kl_divergence(dense, cut) == pytest.approx(float((p * (p.log() - q.log())).sum() / 200), rel=1e-12)
    assert kl_divergence(dense, dense) == 0 and kl_divergence(dense, cut) != pytest.approx(kl_divergence(cut, dense), rel=1e-3)


@pytest.mark.parametrize("classes", [5, 6, 7])
def test_accuracies_and_their_drop_are_counted(classes):
    dense, cut, labels = logits(classes=classes), logits(classes=classes, seed=1), LABELS % classes
    dense[:120] += 9 * torch.nn.functional.one_hot(labels[:120], classes)
    cut[:90] += 9 * torch.nn.functional.one_hot(labels[:90], classes)
    cut[199] = math.nan
    found = compare_accuracy(dense, cut, labels, 1.0, unlabelled=3, probe=True)
    told = [[int(row.argmax()) if bool(row.isfinite().all()) else -1 for row in x] for x in (dense, cut)]
    right = [sum(a == b for a, b in zip(some, labels.tolist(), strict=True)) for some in told]
    assert (found.images, found.of_images, found.probe) == (200, 203, True)
    assert found.dense_top1 == wilson(right[0], 200) and found.moee_top1 == wilson(right[1], 200)
    assert found.drop_pp == pytest.approx(100 * (right[0] - right[1]) / 200)
    low, high = found.drop_interval_pp
    assert low < found.drop_pp < high
    if classes == 5:
        assert found.dense_top5 is None and found.moee_top5 is None
    else:
        order = [[int(j) for j in row.argsort(descending=True)[:5]] for row in dense]
        five = sum(int(label) in some for label, some in zip(labels, order, strict=True))
        assert found.dense_top5 == wilson(five, 200)
        answered = sum(int(label) in row.topk(5).indices.tolist() for label, row in zip(labels[:199], cut[:199], strict=True))
        assert found.moee_top5 == wilson(answered, 200), "what is no number is not among the best five"
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(dense[:199], cut[:199], strict=True))
    assert found.agreement == wilson(same, 200)


def test_a_drop_passes_at_its_own_printed_value():
    found = compare_accuracy(logits(), logits(seed=1), LABELS)
    assert found.passed and found.to_json()["passed"] is True, "no limit"
    for drop, limit, passes in (
        (1.0, 1.0, True),
        (1.0000004, 1.0, True),
        (1.000001, 1.0, False),
        (-3.0, 0.0, True),
        (0.5, 0.0, False),
    ):
        assert replace(found, drop_pp=drop, max_drop_pp=limit).passed == passes, (drop, limit)
    failed = replace(found, drop_pp=2.0, max_drop_pp=1.0, drop_interval_pp=(0.5, 3.5))
    whole = replace(result(parity()), accuracy=failed)
    assert not whole and not whole.passed and failures(whole) == ["accuracy drop"]
    (case,) = [case for case in whole.cases() if case.failure]
    assert case.failure.startswith("drop 2.00 points (0.50 to 3.50) on") and case.failure.endswith("; at most 1 allowed")
    good = replace(result(parity()), accuracy=replace(failed, max_drop_pp=2.0))
    assert good and not failures(good) and good.to_json()["passed"] and not whole.to_json()["passed"]


def test_a_broken_dense_graph_fails_whatever_else_holds():
    found = replace(result(parity()), dense_failure="its outputs are NaN")
    assert not found and failures(found) == ["accuracy dense outputs"] and found.to_json()["passed"] is False


def test_error_statistics_by_hand():
    reference = np.array([1.0, -2.0, 1e-9, 4.0])
    got = reference + np.array([0.1, -0.4, 0.001, 0.0])
    stats, rms = error_stats(got, reference), math.sqrt((1 + 4 + 1e-18 + 16) / 4)
    assert (stats.count, stats.rms) == (4, pytest.approx(rms))
    assert stats.max_abs_error == pytest.approx(0.4) and stats.mean_abs_error == pytest.approx(0.501 / 4)
    assert stats.max_rel_error == pytest.approx(0.001 / (1e-3 * rms)) and stats.p99_abs_error == pytest.approx(0.4)
    assert stats.mean_rel_error == pytest.approx((0.1 + 0.2 + 0.001 / (1e-3 * rms)) / 4)
    with np.errstate(over="ignore"):
        many = error_stats(np.arange(1000.0), np.zeros(1000))
    assert many.p99_abs_error == 990.0 and many.rms == 0.0 and many.max_rel_error > 1e300
    assert error_stats(np.empty(0), np.empty(0)).count == 0 and error_stats(np.empty(0), np.empty(0)).rms == 0
    half = error_stats(np.array([1.0, 2.0]), np.array([1.0, np.inf]))
    assert (half.count, half.rms, half.max_abs_error, half.max_rel_error) == (1, 1.0, math.inf, math.inf)


def test_tolerances_by_hand():
    eps = torch.finfo(torch.float32).eps
    assert tolerance(1e-3, 2.0, torch.float32) == SAFETY * 1e-3 and tolerance(0.0, 2.0, torch.float32) == SAFETY * eps * 2
    assert tolerance(1e-3, 2.0, torch.float32, safety=3.0) == 3e-3
    assert (
        tolerance(9.0, 2.0, torch.float32, rtol=0.1) == pytest.approx(0.2) and tolerance(9.0, 2.0, torch.float32, atol=0.1) == 0.1
    )
    assert tolerance(9.0, 2.0, torch.float32, rtol=0.1, atol=0.05) == pytest.approx(0.25)
    assert tolerance(9.0, 2.0, torch.float32, rtol=0.0) == 0.0, "asked for, and not the usual one"
    reference = np.full((2, 3), 2.0, np.float32)
    for torch_error, widest in ((1e-3, 1e-4), (1e-4, 1e-3)):
        found = batch_error(2, reference + 0.01, reference, torch_error, widest, dtype=torch.float32)
        assert found.tolerance_abs == SAFETY * 1e-3 and found.torch_max_abs_error == torch_error and found.batch == 2
    assert (found.values, found.passed, found.output_rms) == (6, False, 2.0)
    assert found.relative == pytest.approx(0.005, rel=1e-3) and found.message.startswith("largest error 0.01 of 0.008 allowed")
    assert batch_error(2, reference, reference, 1e-3, 0.0, dtype=torch.float32).passed
    nothing = replace(found, values=0, max_abs_error=0.0)
    assert not nothing.passed and nothing.message == "no output is a number, so nothing was compared"
    assert replace(found, output_rms=0.5).relative == found.max_abs_error / 0.5
    assert replace(found, output_rms=0.0).relative == found.max_abs_error / 1e-30


def test_nobody_changes_a_result():
    for kind in (AccuracyResult, BatchError, Case, EngineParity, ErrorStats, ParityResult, VerifyResult):
        assert kind.__dataclass_params__.frozen, kind


def test_one_batch_that_fails_fails_the_parity():
    good, bad = compared(), replace(compared(), max_abs_error=1.0)
    assert parity([good, good]) and not parity([good, bad]) and not parity([bad, good])
    assert parity([good, bad]).max_abs_error == 1.0 and isinstance(bad, BatchError)


def test_routes_pass_at_their_floor():
    assert parity(layers=[layer(agreement=0.9999)]) and not parity(layers=[layer(agreement=0.9998, flips=2)])
    two = parity(layers=[layer(), replace(layer(agreement=0.5), name="other")])
    assert not two.routes_passed and two.mean_route_agreement == 0.75 and parity().mean_route_agreement == 1.0
    ties = replace(two, only_ties=True)
    assert ties.routes_passed and ties and not failures(result(ties))
    assert replace(parity(), route_agreement={}).mean_route_agreement is None


def test_damaged_weights_merges_and_operators_fail():
    damaged = replace(parity(), weight_problems=[WeightProblem("mlp", "w_up", "w_up differs")])
    assert not damaged and failures(result(damaged)) == ["weights mlp"]
    elsewhere = replace(parity(), weight_problems=[WeightProblem("other", "w_up", "w_up differs")])
    assert failures(result(elsewhere)) == ["weights other"]
    merge = MergeParity("blocks.1", 10, 0, 0.0)
    assert replace(parity(), merges=[merge]) and not replace(parity(), merges=[merge, replace(merge, wrong=1)])
    wrong = replace(parity(), merges=[merge, MergeParity("blocks.2", 10, 3, 0.1)])
    assert failures(result(wrong)) == ["merges blocks.2"] and wrong.first_deviation.layer == "blocks.2"
    assert replace(parity(layers=()), merges=[merge]), "a model that only merges has layers enough"
    assert replace(parity(layers=()), dense=True) and not replace(parity(batches=()), dense=True)
    operator = OperatorParity("onnxruntime", [compared()])
    assert replace(parity(), operator=operator)
    broken = replace(operator, batches=[replace(compared(), max_abs_error=1.0)])
    assert not replace(parity(), operator=broken) and failures(result(replace(parity(), operator=broken))) == ["operator batch 2"]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []), ({"built_from_this_export": False}, ["engine source"]), ({"built_from_this_export": None}, []),
        ({"batches": []}, ["engine batches"]), ({"batches": [replace(compared(), max_abs_error=1.0)]}, ["engine batch 2"]),
        ({"batches": [compared(), replace(compared(), max_abs_error=1.0)]}, ["engine batch 2"]),
        ({"plugin": PluginCheck("lib.so", "0" * 64, "1" * 64), "batches": []}, ["engine plugin"]),
    ],
)  # fmt: skip
def test_an_engine_passes_with_its_plugin_its_export_and_its_batches(changes, failed):
    engine = replace(EngineParity("engine", PluginCheck("lib.so", "0" * 64, "0" * 64), True, [compared()]), **changes)
    whole = result(parity(), engine)
    assert engine.passed == whole.passed == bool(whole) == (not failed) and failures(whole) == failed
    assert whole.to_json()["engine"]["passed"] == (not failed)


def test_cases_say_of_which_layer_what_was_compared():
    plain = parity(layers=[layer(), replace(layer(), name="plain", kind="plain", experts=1)])
    said = {(case.group, case.name): case.detail for case in result(plain).cases()}
    assert said["weights", "mlp"] == "tensorrt.onnx holds the model's weights"
    assert said["weights", "plain"] == "tensorrt.onnx holds the model's weights and computes the layer"
    flipped = parity(layers=[layer(agreement=0.75, flips=1, flip_margin_max=0.5, flip_margin_median=0.5)])
    (case,) = [case for case in result(flipped).cases() if case.group == "routes"]
    assert case.detail == "75.0000% equal, 1 flips, margin at most 0.5 of the median gap"
    assert case.failure == "only 75.0000% of the routes are equal, 99.9900% wanted"
    (case,) = [case for case in result(parity(layers=[layer(wrong_routes=3)])).cases() if case.group == "routes"]
    assert case.failure == "3 of 4 tokens take an expert that is not their best, and no near tie"


def test_a_gain_is_called_one_wherever_a_drop_is_shown(capsys):
    assert drop_in_words(2.5, (-0.25, 5.25)) == ("drop 2.50 points", "-0.25 to 5.25")
    assert drop_in_words(-2.5, (-5.25, 0.25)) == ("gain 2.50 points", "-0.25 to 5.25")
    assert drop_in_words(-0.001, (0.0, 0.0)) == drop_in_words(0.0, (0.0, 0.0)) == ("drop 0.00 points", "0.00 to 0.00")
    found = replace(compare_accuracy(logits(), logits(seed=1), LABELS), drop_pp=-2.5, drop_interval_pp=(-5.25, 0.25))
    verified = replace(result(parity()), accuracy=found)
    assert "Gain 2.50 points (-0.25 to 5.25; no gate)" in to_markdown(verified)
    assert " of pictures (95 % interval) |" in to_markdown(replace(verified, data="/home/somebody/pictures"))
    assert "gain 2.50 points (-0.25 to 5.25) on 200" in next(c.detail for c in verified.cases() if c.group == "accuracy")
    assert "Top-1 gain 2.50 points (-0.25 to 5.25); " in str(_intervals({"accuracy": found.to_json()})[1])
    assert "Top-1 drop –; " in str(_intervals({"accuracy": {**found.to_json(), "drop_pp": None}})[1])
    kept = {
        "images": 200, "labelled": 200, "class_cosine": 0.99, "dense_accuracy": 0.8, "accuracy": 0.825, "probe": False,
        "drop_interval_pp": [-5.25, 0.25],
    }  # fmt: skip
    line = accuracy_line(kept, {"data": "new", "retention": {**kept, "accuracy": 0.81}}, 1.0)
    assert "(gain 2.50 points, 95 % interval -0.25 to 5.25)" in line
    assert "(gain 1.00 points, 95 % interval -0.25 to 5.25, 1.50 worse than where it was chosen)" in line
    _show(plain_console(width=400), verified, False)
    assert "gain 2.50 points (-0.25 to 5.25), agreement" in capsys.readouterr().out
