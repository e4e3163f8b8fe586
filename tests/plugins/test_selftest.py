"""The self-test on the driver double: all checks pass, every planted fault is caught by name, bad input is one sentence."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache

import pytest
import torch

from moee.errors import UserError
from plugins.library.cases import (
    CASE_BYTES,
    HEADER_BYTES,
    LayerCase,
    answer,
    case_bytes,
    decided,
    random_inputs,
    rounded,
    synthetic_cases,
    write_cases,
)
from plugins.library.selftest import read_selftest
from plugins.reference import moee_ffn, routes
from plugins.tactics import TACTICS
from plugins.workspace import Sizes, bytes_needed
from tests.plugins import built
from tests.plugins import selftest_double as double

# A fault that the double plants, and the check that must name it. Others may fail as well.
FAULTS = {
    "wrong_offset": "accuracy",
    "tanh_gelu": "accuracy",
    "tf32": "accuracy",
    "lost_partial": "accuracy",
    "nan_spreads": "accuracy",
    "empty_expert": "accuracy",
    "one_tactic": "accuracy",
    "missing_barrier": "accuracy",
    "swapped_expert": "routes",
    "tie_to_highest": "routes",
    "unwritten_row": "written",
    "short_grid": "written",
    "output_overrun": "bounds",
    "workspace_overrun": "bounds",
    "input_written": "inputs",
    "last_bit": "repeat",
    "stale_counter": "graph",
    "graph_unsafe_call": "graph",
    "shared_buckets": "streams",
    "stale_shape": "shapes",
    "leak": "memory",
    "launch_failure": "calls",
    "group_barrier": "accuracy",
    "wrong_tile": "accuracy",
    "off_by_one": "written",
    "last_group": "written",
    "stale_routes": "routes",
    "long_run": "timed",
}


@cache
def right() -> tuple[subprocess.CompletedProcess, dict]:
    """A whole run without a fault, under the sanitizers."""
    out = double.ROOT / "right.json"
    done = double.run(out, "--quick", "--batch", "2", cases_=double.cases())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done, json.loads(out.read_text())


def test_everything_is_right_under_the_sanitizers():
    done, body = right()
    assert done.stderr == ""
    assert body["passed"] and body["native"] and body["label"] == "native"
    assert all(check["passed"] and check["comparisons"] > 0 for check in body["checks"])
    assert "accuracy" in done.stdout and "WRONG" not in done.stdout


def test_every_tactic_type_and_case_is_measured_against_its_bound():
    _, body = right()
    seen = {(a["tactic"], a["type"]) for a in body["accuracy"]}
    assert seen == {(t.name, dtype) for t in TACTICS for dtype in ("float32", "float16", "bfloat16")}
    assert {a["case"] for a in body["accuracy"]} == {"blocks.3.mlp", *(c.name for c in synthetic_cases())}
    assert all(0 <= a["error"] <= a["bound"] for a in body["accuracy"])
    # A bound that nothing comes near would let a fault pass.
    assert max(a["error"] / a["bound"] for a in body["accuracy"] if a["bound"]) > 0.05


def test_workspaces_and_tactics_are_those_of_python():
    """plugins/workspace.py and plugins/tactics.py against the library."""
    _, body = right()
    facts = {c["name"]: c for c in body["cases"]}
    assert {workspace["case"] for workspace in body["workspaces"]} == set(facts)
    for workspace in body["workspaces"]:
        case = facts[workspace["case"]]
        sizes = Sizes(*(case[key] for key in ("tokens", "dim", "experts", "union", "max_width", "top_k")))
        fitting = [t for t in TACTICS if t.fits(0, sizes.dim, sizes.top_k)]
        assert workspace["bytes"] == bytes_needed(sizes.as_dict(), workspace["type"], fitting)
    for name, case in facts.items():
        fitting = {t.name for t in TACTICS if t.fits(case["tokens"], case["dim"], case["top_k"])}
        assert {a["tactic"] for a in body["accuracy"] if a["case"] == name} == fitting


def test_timing_says_what_it_compared():
    done, body = right()
    assert len(body["timing"]) == 1
    timing = body["timing"][0]
    assert (timing["case"], timing["batch"], timing["tokens"], timing["type"]) == ("blocks.3.mlp", 2, 34, "float16")
    assert timing["winner"] in {t["name"] for t in timing["tactics"]} and timing["buffer_sets"] >= 2
    assert timing["dense"]["by"].startswith("our own kernels") and "libcublasLt was not found" in timing["dense"]["note"]
    assert timing["ratio"] == pytest.approx(timing["dense"]["p50_us"] / min(t["p50_us"] for t in timing["tactics"]), rel=1e-3)
    assert timing["mac_share"] == pytest.approx((2 * 24 + 4) / (2 * 96), rel=1e-5)
    assert timing["ideal_share"] == pytest.approx(timing["ratio"] * timing["mac_share"], rel=1e-3)
    assert "our own kernels" in done.stdout


def test_dense_by_cublaslt_with_clocks_and_power(tmp_path):
    """Layouts, bias and epilogue of both products: the program computes two tokens itself before it believes a time."""
    done = double.run(tmp_path / "out.json", "--quick", "--batch", "1", library_path=double.libraries())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    timing = json.loads((tmp_path / "out.json").read_text())["timing"][0]
    assert timing["dense"]["by"] == "cuBLASLt 13.0.2" and timing["dense"]["note"] == "cuBLASLt's GELU is the tanh form"
    assert (timing["sm_mhz"], timing["memory_mhz"], timing["temperature_c"]) == (1980, 2619, 41)
    assert timing["power_w"] == pytest.approx(123.456)


@pytest.mark.parametrize("fault, words", [("dense_without_bias", "is wrong at token 0"), ("dense_without_algorithm", "failed")])
def test_a_dense_ffn_that_is_wrong_is_not_compared_with(fault, words, tmp_path):
    done = double.run(tmp_path / "out.json", "--quick", "--batch", "1", library_path=double.libraries(), fault=fault)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    dense = json.loads((tmp_path / "out.json").read_text())["timing"][0]["dense"]
    assert dense["by"].startswith("our own kernels") and words in dense["note"]


def test_results_keep_to_the_schema(tmp_path):
    _, body = right()
    path = tmp_path / "selftest.json"
    path.write_text(json.dumps(body))
    assert read_selftest(path).checks[0].name == "accuracy"
    path.write_text(json.dumps({**body, "checks": "none"}))
    with pytest.raises(UserError, match="checks"):
        read_selftest(path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_name(fault, tmp_path):
    arguments = ["--quick", "--batch", "9"] if FAULTS[fault] == "timed" else ["--check-only"]
    done = double.run(tmp_path / "out.json", *arguments, fault=fault)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr
    body = json.loads((tmp_path / "out.json").read_text())
    failed = {check["name"]: check["failures"] for check in body["checks"] if not check["passed"]}
    assert not body["passed"] and FAULTS[fault] in failed
    assert failed[FAULTS[fault]], "it says where"
    line = next(line for line in done.stdout.splitlines() if line.startswith(FAULTS[fault]))
    assert "WRONG" in line and failed[FAULTS[fault]][0] in line
    if fault == "one_tactic":
        assert all("masked16" in where for where in failed["accuracy"])
    if fault in ("group_barrier", "wrong_tile", "off_by_one", "last_group", "stale_routes"):
        assert all(", group" in where for where in failed[FAULTS[fault]])
    if fault == "lost_partial":
        assert {where.split(",")[0] for where in failed["accuracy"]} == {"ties"}


@pytest.mark.parametrize(
    "arguments, label",
    [(["--sms", "5"], "emulated: 8 of 16 multiprocessors"), (["--code", "80"], "emulated: code of sm_80")],
    ids=["sms", "code"],
)
def test_what_is_emulated_is_called_so(arguments, label, tmp_path):
    done = double.run(tmp_path / "out.json", "--quick", "--batch", "1", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    body = json.loads((tmp_path / "out.json").read_text())
    assert not body["native"] and body["label"] == label and all(t["emulated"] for t in body["timing"])
    assert done.stdout.count(label) >= 2
    assert bool(body["compiled_ptx"]) == ("--code" in arguments)


@pytest.mark.parametrize("sm, fault", [("90", ""), ("87", "refuses_cubins")], ids=["no cubin", "old driver"])
def test_ptx_that_the_driver_compiles_is_said(sm, fault, tmp_path):
    """A GPU without a cubin of its own, and a driver that is too old for the cubins: both take the PTX of sm_80."""
    done = double.run(tmp_path / "out.json", "--check-only", fault=fault, MOEE_FAKE_SM=sm)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert re.search(r"\d+ kernels are PTX that the driver compiled", done.stdout)
    assert all(text.endswith(f"for sm_{sm}") for text in json.loads((tmp_path / "out.json").read_text())["compiled_ptx"])


def refused(done: subprocess.CompletedProcess, code: int, words: str) -> None:
    assert done.returncode == code, done.stdout[-1000:] + done.stderr
    assert done.stderr.startswith("selftest: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--batch", "0"], "--batch takes a whole number from 1 to 1024; came '0'"),
        (["--batch", "1,,2"], "came ''"),
        (["--sms", "x"], "--sms takes a whole number"),
        (["--sms", "17"], "this GPU has 16 multiprocessors"),
        (["--code", "89"], "holds no PTX of sm_89"),
        (["--cases"], "--cases needs a value"),
        (["--cases", "/nowhere/cases.bin"], "cannot be read"),
        (["--plugin", "/nowhere/plugin.so"], "cannot be loaded"),
        (["--plugin", "libc.so.6"], "libc.so.6"),
        (["--out", "/nowhere/out.json"], "cannot be written"),
        (["--fast"], "unknown option '--fast'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, tmp_path):
    refused(double.run(tmp_path / "out.json", *arguments), 2, words)
    assert not list(tmp_path.iterdir())


def test_a_missing_environment_is_one_sentence(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("earlier results")
    empty = tmp_path / "empty"
    empty.mkdir()
    if subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout.find("libcuda.so.1") < 0:
        refused(double.run(out, library_path=empty), 3, "no CUDA driver")
    refused(double.run(out, fault="no_gpu"), 3, "finds no GPU")
    refused(double.run(out, MOEE_FAKE_SM="75"), 3, "no kernels for this GPU, sm_75; it was built for 80, 87")
    refused(double.run(out, MOEE_FAKE_MEMORY="30000"), 3, "too little GPU memory")
    assert out.read_text() == "earlier results"


def test_damaged_cases_are_refused(tmp_path):
    whole = double.cases().read_bytes()
    damaged = {
        "has 1000 bytes, and should have": whole[:1000],
        "is no file of cases": b"PK" + whole[2:],
        "its checksum is another one": whole[:-1] + bytes([whole[-1] ^ 1]),
        "holds format 1 for plugin version 9": whole[:12] + bytes([9]) + whole[13:],
    }
    for words, content in damaged.items():
        path = tmp_path / "damaged.bin"
        path.write_bytes(content)
        refused(double.run(tmp_path / "out.json", "--cases", str(path)), 2, words)


def test_other_kernels_than_the_plugins_are_refused(tmp_path):
    other = tmp_path / "libmoee_plugin.so"
    digest = json.loads((built.kernels() / "kernels.json").read_text())["source_sha256"].encode()
    other.write_bytes(built.plugin().read_bytes().replace(digest, b"0" * 64))
    refused(double.run(tmp_path / "out.json", "--plugin", str(other)), 2, "was built with other kernels (000000000000)")


def test_answers_are_the_references():
    inputs = random_inputs(23, 32, [9, 4, 16], 20, 3)
    chosen, y, scale = answer(inputs, 0, 2)
    assert torch.equal(chosen, routes(inputs["x"], inputs["router"], inputs["router_bias"], 2))
    torch.testing.assert_close(y, moee_ffn(inputs, activation=0, top_k=2))
    assert (scale >= y.abs().amax(1)).all()


def test_values_are_exact_in_every_type_of_their_case():
    values = torch.randn(4000, dtype=torch.float64) * torch.logspace(-9, 4, 4000, dtype=torch.float64)
    kept = rounded(values, ("float32", "float16", "bfloat16"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(kept.to(dtype).double(), kept)
    with pytest.raises(UserError, match="beyond float16"):
        rounded(torch.tensor([1e5]), ("float16",))
    assert torch.isinf(rounded(torch.tensor([float("inf")]), ("float16",))).all()


def test_tokens_between_two_experts_are_left_out():
    inputs = random_inputs(5, 16, [4, 4], 8)
    inputs["router_bias"][:] = 0
    inputs["x"][2] = inputs["x"][2] - inputs["x"][2] @ (inputs["router"][0] - inputs["router"][1]) / (
        inputs["router"][0] - inputs["router"][1]).square().sum() * (inputs["router"][0] - inputs["router"][1])
    assert decided(inputs, 1).tolist() == [True, True, False, True, True]
    with pytest.raises(UserError, match="every token lies between two experts"):
        case_bytes(LayerCase(name="even", inputs={**inputs, "router": torch.ones(2, 16)}))


def test_a_file_of_cases_is_as_long_as_it_says(tmp_path):
    content = write_cases(tmp_path / "cases.bin").read_bytes()
    assert len(content) % 16 == 0 and int.from_bytes(content[24:32], "little") == len(content)
    assert content[HEADER_BYTES : HEADER_BYTES + CASE_BYTES].startswith(b"one token\0")
