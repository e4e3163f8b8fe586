"""The report's section on the self-test: figures of several GPUs, what is emulated, what is wrong or missing."""

import json
import re

from exporter.report import write_report
from plugins.library.selftest import read_selftest

CHECK = {"name": "accuracy", "meaning": "the output is the answer", "passed": True, "comparisons": 9, "failed": 0, "failures": []}
TIMING = {
    "case": "blocks.3.mlp", "type": "float16", "batch": 8, "tokens": 1576, "emulated": False, "buffer_sets": 9, "samples": 50,
    "winner": "tile64",
    "tactics": [{"name": "tile16", "p50_us": 50.0, "p95_us": 51.0}, {"name": "tile64", "p50_us": 40.25, "p95_us": 42.0}],
    "dense": {"by": "cuBLASLt 13.0.2", "note": "", "p50_us": 61.5, "p95_us": 63.0}, "ratio": 1.528, "mac_share": 0.5,
    "ideal_share": 0.764, "sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 300.0, "temperature_c": 41.0,
}  # fmt: skip
NONE = {"multiprocessors": None, "code": None}
BODY = {
    "schema": "moee.selftest/1", "passed": True, "native": True, "label": "native", "emulated": NONE, "kernels": "0" * 64,
    "device": {"name": "NVIDIA H200", "sm": 90}, "compiled_ptx": [], "types_without_kernels": [], "cases": [], "checks": [CHECK],
    "accuracy": [], "workspaces": [], "timing": [TIMING], "not_timed": None, "seconds": 1.5,
}  # fmt: skip


def page(folder, **changes) -> str:
    """The words of a report about one file with `changes`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selftest.json").write_text(json.dumps({**BODY, **changes}))
    read_selftest(folder / "selftest.json")  # what the program writes may be shown
    text = write_report([folder], folder / "report.html", force=True).read_text()
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text[text.index('id="selftest-heading"') :]))


def test_checks_and_times_are_shown(tmp_path):
    words = page(tmp_path)
    assert "On the GPU passed" in words and "NVIDIA H200, sm_90, native" in words
    assert "blocks.3.mlp float16 8 tile64 40.2 61.5 1.53× 76" in words and "cuBLASLt 13.0.2" in words


def test_what_is_emulated_says_so_in_every_caption(tmp_path):
    label = "emulated: 8 of 16 multiprocessors"
    words = page(tmp_path, native=False, label=label, emulated={"multiprocessors": 8, "code": None})
    assert words.count(label) == 2 and "native" not in words.partition("Names of layers")[0]
    words = page(tmp_path, native=False)  # a label that the rest does not bear out
    assert "emulated or not, it does not say" in words


def test_what_is_wrong_or_not_checked_is_no_success(tmp_path):
    wrong = {**CHECK, "passed": False, "failed": 1, "failures": ["top-2, float16, tile16: token 3 is 1 <b>"]}
    none = {**CHECK, "name": "routes", "passed": False, "comparisons": 0}
    words = page(tmp_path, passed=False, checks=[wrong, none], timing=[], not_timed="a check failed")
    assert "On the GPU FAILED" in words and "WRONG: top-2, float16, tile16: token 3 is 1 &lt;b&gt;" in words
    assert "not checked" in words and "Not timed: a check failed." in words


def test_several_gpus_stand_in_one_report(tmp_path):
    page(tmp_path / "a")
    page(tmp_path / "b", device={"name": "Orin", "sm": 87}, passed=False)
    text = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text()
    assert "NVIDIA H200, sm_90" in text and "Orin, sm_87" in text and ">FAILED<" in text
