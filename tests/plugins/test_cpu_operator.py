"""The operator in ONNX Runtime on the CPU against the nested loops in float64."""

import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from moee.errors import MissingDependency, StepFailed, UserError
from plugins import reference
from plugins.contract import ACTIVATIONS, INPUT_NAMES
from plugins.cpu import build
from tests.plugins import operator_session
from tests.plugins.cases import bound, operator

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "one token": (1, 64, [40, 40, 40], 100),
    "odd sizes: no multiple of a vector, a quad or a chunk": (67, 37, [133, 1, 202], 203),
    "smaller than a vector": (5, 3, [2, 1], 2),
    "an expert of no neurons": (40, 32, [0, 30, 17], 48),
    "no neurons at all": (6, 16, [0, 0], 4),
    "K = 1": (50, 48, [90], 96),
    "64 experts": (200, 32, [20] * 64, 128),
    "whole panels and a rest of every size": (150, 32, [70, 80], 130),
    "several blocks of hidden activations": (2800, 16, [400, 380], 450),
}


@pytest.mark.parametrize("widest", [16, 8, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_size_gives_what_float64_gives(case, widest):
    given = operator(*CASES[case], "float32")
    expected = reference.moee_ffn(given, activation=0)
    assert ((operator_session.run(given, widest=widest) - expected).abs() <= bound(expected, "float32")).all()


@pytest.mark.parametrize("widest", [16, 8, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, widest):
    given = operator(90, 40, [50, 64], 80, "float32")
    given["b_up"] *= 6  # far into both tails
    expected = reference.moee_ffn(given, activation=ACTIVATIONS.index(activation))
    y = operator_session.run(given, widest=widest, activation=activation)
    assert ((y - expected).abs() <= bound(expected, "float32")).all()


@pytest.mark.parametrize("widest", [16, 8, 4])
def test_the_erf_form_of_gelu_is_as_near_as_the_documentation_says(widest):
    """One neuron that hands its token on: docs/operator.md says 1e-7 beside one rounding."""
    ones = torch.ones(1, 1)
    given = {"x": torch.linspace(-9, 9, 8192)[:, None], "router": ones, "router_bias": torch.zeros(1)}
    given |= {"w_up": ones, "b_up": torch.zeros(1), "w_down": ones, "b_out": 0 * ones}
    given |= {"neurons": torch.zeros(1, dtype=torch.int32), "offsets": torch.tensor([0, 1], dtype=torch.int32)}
    expected = torch.nn.functional.gelu(given["x"].double())
    assert ((operator_session.run(given, widest=widest) - expected).abs() <= 1e-7 + expected.abs() * 2**-23).all()


@pytest.mark.parametrize("top_k", [2, 3])
def test_several_experts_a_token(top_k):
    given = operator(70, 24, [30, 0, 12, 20], 40, "float32")
    expected = reference.moee_ffn(given, activation=0, top_k=top_k)
    assert ((operator_session.run(given, top_k=top_k) - expected).abs() <= bound(expected, "float32")).all()


def told(given):
    """The experts that the operator takes: with no neurons, y is the output bias of the token's expert, which is its number."""
    experts, dim = given["router"].shape
    empty = {**given, "neurons": given["neurons"][:0], "offsets": torch.zeros(experts + 1, dtype=torch.int32)}
    empty["b_out"] = torch.arange(experts).float()[:, None].expand(experts, dim).contiguous()
    return operator_session.run(empty)[:, 0].long()


def test_routes_ties_and_tokens_that_are_not_finite():
    given = operator(300, 32, [8] * 5, 24, "float32")
    given["router"][3], given["router_bias"][3] = given["router"][1], given["router_bias"][1]  # 3 never wins against 1
    for row, value in ((0, math.nan), (1, math.inf), (2, -math.inf)):
        given["x"][row, 7] = value
    given["x"][3] = 0  # all scores are the biases
    expected = reference.routes(given["x"], given["router"], given["router_bias"])[:, 0]
    assert expected[:3].tolist() == [0, 0, 0] and (expected == 1).any()
    assert torch.equal(told(given), expected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17, 35])
def test_a_route_does_not_depend_on_the_tokens_around_it(tokens):
    """Tokens are scored by up to four rows, and in tasks of sixteen."""
    given = operator(35, 37, [8] * 7, 24, "float32")
    expected = told(given)
    given["x"] = given["x"][-tokens:].clone()
    assert torch.equal(told(given), expected[-tokens:])


def test_a_token_that_is_not_finite_spoils_no_other():
    given = operator(40, 32, [20, 24], 30, "float32")
    clean = operator_session.run(given)
    given["x"][5, 0] = math.nan
    spoilt = operator_session.run(given)
    assert spoilt[5].isnan().all()
    others = torch.arange(40) != 5
    assert spoilt[others].isfinite().all() and ((spoilt - clean)[others].abs() <= bound(clean, "float32")[others]).all()


def test_all_tokens_to_one_expert():
    given = operator(80, 32, [20, 24, 16], 30, "float32")
    given["router_bias"] = torch.tensor([0.0, 1e4, 0.0])
    expected = reference.moee_ffn(given, activation=0)
    assert (told(given) == 1).all()
    assert ((operator_session.run(given) - expected).abs() <= bound(expected, "float32")).all()


@pytest.mark.parametrize("tokens", [1, 65, 700])
def test_runs_and_numbers_of_threads_agree_to_the_bit(tokens):
    given = operator(tokens, 48, [100, 120, 60, 90], 150, "float32")
    one, two = (operator_session.session(operator_session.model(given), threads) for threads in (1, 2))
    first = one.run(None, {"x": given["x"].numpy()})[0].tobytes()
    for session in (one, two, two):
        assert session.run(None, {"x": given["x"].numpy()})[0].tobytes() == first


def test_leading_axes_are_kept_and_may_be_empty():
    given = operator(24, 16, [12, 9], 20, "float32")
    session = operator_session.session(operator_session.model({**given, "x": given["x"].reshape(2, 3, 4, 16)}))
    y = session.run(None, {"x": given["x"].reshape(2, 3, 4, 16).numpy()})[0]
    assert y.shape == (2, 3, 4, 16) and (y.reshape(24, 16) == operator_session.run(given).numpy()).all()
    assert session.run(None, {"x": given["x"].reshape(2, 3, 4, 16)[:0].numpy()})[0].shape == (0, 3, 4, 16)


@pytest.mark.parametrize(
    "break_, reason",
    [
        (lambda g: g["neurons"].__setitem__(0, 99), "outside the stores"),
        (lambda g: g["neurons"].__setitem__(1, int(g["neurons"][0])), "do not ascend"),
        (lambda g: g["offsets"].__setitem__(0, 1), "do not span"),
        (lambda g: g["offsets"].__setitem__(1, 100), "descend|outside"),
        (lambda g: g.__setitem__("b_up", g["b_up"][:-1]), "the shape of b_up"),
        (lambda g: g.__setitem__("router", g["router"][:, :-1].contiguous()), "does not fit"),
    ],
)
def test_tables_that_break_the_contract_are_refused(break_, reason):
    given = operator(4, 16, [12, 9], 20, "float32")
    break_(given)
    with pytest.raises(Exception, match=f"MoeeFfn: .*({reason})"):
        operator_session.session(operator_session.model(given, max_width=12))


def test_attributes_and_weights_that_the_operator_cannot_take_are_refused():
    given = operator(4, 16, [12, 9], 20, "float32")
    for wrong, reason in (
        ({"max_width": 11}, "max_width"), ({"top_k": 3}, "top_k"), ({"activation": "mish"}, "unknown activation mish"),
    ):  # fmt: skip
        with pytest.raises(Exception, match=f"MoeeFfn: .*{reason}"):
            operator_session.session(operator_session.model(given, **wrong))
    for name in INPUT_NAMES[1:]:
        with pytest.raises(Exception, match=f"MoeeFfn: {name} is not an initialiser"):
            operator_session.session(operator_session.model(given, variable=(name,)))
    session = operator_session.session(operator_session.model(given))
    with pytest.raises(Exception, match="the last axis of x"):
        session.run(None, {"x": given["x"][:, :-1].numpy()})


def test_a_library_says_what_it_is_for(tmp_path, monkeypatch):
    info = build.describe_operator(operator_session.library())
    assert (info.machine, info.api) == (build.platform.machine(), 18)
    other = tmp_path / build.LIBRARY
    content = bytearray(operator_session.library().read_bytes())
    content[18:20] = b"\xb7\x00" if info.machine == "x86_64" else b"\x3e\x00"
    other.write_bytes(content)
    with pytest.raises(UserError, match="was built for (aarch64|x86_64), this machine is"):
        build.describe_operator(other)
    other.write_bytes(content.replace(b"moee-onnxruntime-api", b"something-else-entire"))
    with pytest.raises(UserError, match="no operator library"):
        build.describe_operator(other)
    with pytest.raises(UserError, match="cannot be read"):
        build.describe_operator(tmp_path / "absent.so")


def test_without_a_compiler_and_with_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="C\\+\\+ compiler is not installed"):
        build.build_operator(tmp_path)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(StepFailed, match="compiling the operator for ONNX Runtime failed"):
        build.build_operator(tmp_path)
    assert not (tmp_path / build.LIBRARY).exists()


HOST = """
#include <cstdio>
#include "ort.h"
extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions*, const ort::ApiBase*);
static const char* said = nullptr;
static ort::Status* status(ort::ErrorCode, const char* text) {
    std::puts(text);
    return reinterpret_cast<ort::Status*>(&said);
}
static const void* table[300] = {reinterpret_cast<const void*>(&status)};
static const void* const* of(uint32_t version) { return version <= 17 ? table : nullptr; }
static const char* name() { return "1.17.3"; }
int main() {
    const ort::ApiBase base{of, name};
    return RegisterCustomOps(nullptr, &base) != nullptr ? 0 : 1;
}
"""


def test_an_older_runtime_is_refused_by_name(tmp_path):
    """A table of functions as the runtime before 1.18 has it."""
    (tmp_path / "host.cpp").write_text(HOST)
    program = tmp_path / "host"
    sources = [str(p) for p in build.sources() if p.suffix == ".cpp"]
    compiler = shutil.which("c++")
    command = [compiler, "-std=c++17", "-O1", "-I", str(build.SOURCES), "-o", str(program), str(tmp_path / "host.cpp"), *sources]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and "needs ONNX Runtime 1.18 or later, this is 1.17.3" in done.stdout


@pytest.mark.slow
def test_nothing_is_read_or_written_out_of_bounds():
    """ASan and UBSan over every width of vectors; leaks are the interpreter's own."""
    libraries = {widest: str(operator_session.library(True, widest)) for widest in (16, 8, 4)}
    find = partial(subprocess.run, capture_output=True, text=True, check=True)
    runtimes = [find(["c++", f"-print-file-name=lib{name}.so"]).stdout.strip() for name in ("asan", "ubsan")]
    script = (
        "from pathlib import Path\n"
        "from tests.plugins import operator_session as s, test_cpu_operator as t\n"
        f"s.library = lambda sanitize=False, widest=16: Path({libraries!r}[widest])\n"
        "for widest in (16, 8, 4):\n"
        "    for case in list(t.CASES)[:-1]: t.test_every_size_gives_what_float64_gives(case, widest)\n"
        "t.test_several_experts_a_token(2)\n"
    )
    given = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
