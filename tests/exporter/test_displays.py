"""What a notebook shows of the results of the Python interface: figures and verdicts, and no page of fields."""

import importlib
import re
import warnings
from pathlib import Path

import moee
from exporter.compression.state import Compressed
from exporter.engines.build import Engine, EngineReport
from exporter.report.page import _method
from exporter.timing.latency import LatencyResult
from exporter.verdict import Verdict
from exporter.verification.quick import QuickCheck
from moee.measure.evaluation import Retention


def test_latencies_show_the_verdict_and_the_medians():
    times = {"p50": 4.0, "p90": 5.0, "p95": 6.0, "p99": 7.0}
    result = LatencyResult(
        "onnxruntime CPU", 8, 2, 40, times, {**times, "p50": 3.25}, 1.25, 1.1, 1.3, 1.4, Verdict(1.25, 1.2, 1.3, 40),
        samples_ms={"dense": [4.0] * 500, "moee": [3.25] * 500},
    )  # fmt: skip
    assert repr(result) == (
        "MoEE is faster: 1.250x (99% interval 1.200 to 1.300, 40 pairs)\n"
        "median of batch 8: dense 4.00 ms, MoEE 3.25 ms; onnxruntime CPU"
    )
    few = LatencyResult("r", 1, 1, 2, {}, {}, 1.0, 1.0, 1.0, None, Verdict(1.0, 0.9, 1.1, 2))
    assert repr(few).startswith("no winner, fewer than")


def test_what_was_retained_shows_what_could_not_be_compared():
    cosines = dict(top1_agreement=None, class_cosine=0.98765)
    assert repr(Retention(8, **cosines, token_cosine=None, labelled=0, no_accuracy="no labels", no_tokens="no feature map")) == (
        "Retention(8 images, accuracy not compared (no labels), class cosine 0.9877, no token cosine (no feature map))"
    )
    kept = Retention(
        40, top1_agreement=0.975, class_cosine=0.98, token_cosine=0.97, labelled=32, no_accuracy="", dense_accuracy=0.9,
        accuracy=0.875, accuracy_interval=(0.8, 0.95),
    )  # fmt: skip
    assert repr(kept) == (
        "Retention(40 images, accuracy 87.50% (95 % interval 80.0% to 95.0%, dense 90.00%, 32 labelled), same class 97.50%, "
        "class cosine 0.9800, token cosine 0.9700)"
    )


def test_a_quick_check_shows_what_failed_and_what_nobody_checked():
    good = QuickCheck(Path("e"), "an export", ["3 hashes"], ["accuracy"])
    assert repr(good) == "quick check of an export 'e' passed\nchecked: 3 hashes\nnot checked: accuracy"
    good.failures.append("dense.onnx has changed")
    assert repr(good).startswith("quick check of an export 'e' failed\nfailed: dense.onnx has changed\n")
    assert re.search(r"\bfailed$", repr(QuickCheck(Path("e"), "an export"))), "nothing was checked"


def test_engines_and_a_finished_job_show_their_lines():
    dense, engine = (Engine(file, "0" * 64, 1, 0.5) for file in ("dense.plan", "moee.plan"))
    report = EngineReport(Path("out"), "TensorRT-RTX 1", "any", (1, 8, 32), "p.so", 3, dense, engine)
    assert repr(report) == (
        "EngineReport(dense.plan and moee.plan in 'out', by TensorRT-RTX 1 for any, batches 1 to 32, tuned for 8; "
        "3 layers by the plugin)"
    )
    assert repr(Compressed(Path("out"), "static", "tuned", ("accuracy: 1", "speed: 2"), 3.0, {"plan": {"points": [1] * 99}})) == (
        "accuracy: 1\nspeed: 2"
    )


def test_a_report_names_no_share_that_the_budget_decided():
    step = {"method": "static", "target_macs": 0.72, "keep": 0.95}
    assert _method({"recipe": {"steps": [step]}}) == "static, target macs 0.72."
    assert _method({"recipe": {"steps": [{**step, "target_macs": None}]}}) == "static, keep 0.95."


def test_a_notebook_shows_no_warning_of_bars_that_nobody_draws():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(moee)
        warnings.warn("IProgress not found. Please update jupyter and ipywidgets.", UserWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]
