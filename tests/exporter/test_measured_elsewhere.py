"""`moee plan --emit`, `--measured` and `--device ssh:HOST`, end to end against a stand-in device."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from exporter import cli
from exporter.commands.models.elsewhere import measurement_lines
from exporter.engines import plugin_cache
from exporter.targets.result import read_result
from moee.models.model import ModelSpec
from moee.stages.session import Session
from moee.store.artifact import read_manifest
from plugins.library.build import select_headers
from tests.conftest import TINY, tiny_images
from tests.exporter.device_double import MODEL, path_with, write_device, write_tools
from tests.plugins import built

SPEC = ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, random_seed=0)
WAYS = ["--min-cosine", "0.1", "--methods", "kmeans-8,static", "--allocations", "share", "--targets", "0.85,0.7"]
PLAN = ["plan", "tiny", "--data", "digits", "--cluster-tokens", "300", "--batch", "4", "--no-trial-export", *WAYS]


@pytest.fixture(scope="module", autouse=True)
def model():
    """A small model of random weights on small images, and kernels that are not compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.pretrained.resolve", lambda *a, **k: SPEC)
        patch.setattr("moee.stages.session.load_splits", lambda *a, **k: (tiny_images(40), tiny_images(24)))
        patch.setattr(plugin_cache, "ensure_kernels", lambda sms, report: built.kernels())
        yield


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """A plan that has emitted its candidates, and the result of the stand-in device."""
    place = tmp_path_factory.mktemp("emitted")
    out = ["--out", str(place / "plan"), "--emit", str(place / "emit"), "--device", "orin-agx", "--precision", "fp16"]
    assert cli.main([*PLAN, *out, "--candidates", "2"]) == 0
    measure(place / "emit", write_tools(place / "bin"))
    return place


@pytest.fixture
def begun(emitted, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(emitted, tmp_path / "begun"))


def measure(folder, tools, **environment):
    done = subprocess.run(["./measure.sh"], cwd=folder, env={**path_with(tools), **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "RESULT.json"


def go_on(place, *words):
    typed = [] if "--precision" in words else ["--precision", "fp16"]
    return cli.main([*PLAN, "--out", str(place / "plan"), "--measured", str(place / "emit" / "RESULT.json"), *typed, *words])


def read_plan(place):
    return json.loads((place / "plan" / "plan.json").read_text())


def kept(place):
    return {path.name: path.read_bytes() for path in (place / "plan.resume").iterdir()}


def test_the_folder_for_a_device_holds_each_part_once(emitted):
    folder = emitted / "emit"
    body = read_manifest(folder, "emit.json", "moee.emit/1")
    assert body["batch"] == 4 and body["precision"] == "fp16" and body["sm"] == 87 and not (emitted / "plan").exists()
    files = set(body["files"])
    assert {name for name in files if name.startswith("dense/")} == {"dense/dense.onnx", "dense/dense.data"}
    assert len(body["candidates"]) == 2
    for name in body["candidates"]:
        assert {f"candidates/{name}/tensorrt.onnx", f"candidates/{name}/moee.data"} <= files
    assert "plugin/CMakeLists.txt" in files and sum(name.endswith("CMakeLists.txt") for name in files) == 1
    assert not [name for name in files if name.endswith(".py") or "portable" in name]
    assert (folder / "images.bin").stat().st_size == 4 * 3 * 32 * 32 * 4
    listed = [line.split() for line in (folder / "candidates.txt").read_text().splitlines()]
    assert [name for name, _ in listed] == body["candidates"] and {needs for _, needs in listed} == {"yes", "no"}


def test_the_choice_is_made_by_what_the_device_measured(begun, capsys):
    """There the plugin's candidates are slower than dense, and the others faster, whatever their MACs."""
    before = kept(begun)
    assert go_on(begun) == 0
    said = " ".join(capsys.readouterr().out.split())
    plan = read_plan(begun)
    assert plan["winner"]["method"] == "static" and plan["winner"]["latency"]["kind"] == f"measured on {MODEL}"
    assert plan["winner"]["latency"]["moee_ms"] == 6 and plan["winner"]["latency"]["dense_ms"] == 10
    ids = read_result(begun / "emit" / "RESULT.json").candidates
    assert {e["id"] for e in plan["measurement"]["candidates"]} == {c.id for c in ids}
    assert plan["measurement"]["dense"]["gpu_ms"] == [10] * 5 and plan["measurement"]["tensorrt"] == "10.3.0"
    points = json.loads(before["emitted.json"])["points"]
    measured = [p for p in plan["points"] if p["latency"] and p["latency"]["kind"].startswith("measured")]
    assert len(plan["points"]) == len(points) + 1 and len(measured) == len(ids) + 1, "the points and dense"
    roofline = plan["measurement"]["roofline"]
    assert roofline["board"] == "orin-agx", "by the name of the device"
    modelled = {s["id"]: s["modelled"]["orin-agx"] for s in json.loads(before["emitted.json"])["candidates"]}
    first = plan["measurement"]["candidates"][0]
    assert roofline["candidates"][0] == pytest.approx(first["gpu_ms"][0] / modelled[first["id"]]["moee_ms"])
    for part in (f"measured on {MODEL} in batches of 4 (TensorRT 10.3.0, fp16, power mode MAXN)", "the roofline of orin-agx"):
        assert part in said
    assert not (begun / "plan.resume").exists()


def test_points_that_were_not_measured_are_not_chosen_and_their_figures_are_scaled(begun):
    before = json.loads((begun / "plan.resume" / "emitted.json").read_text())
    (begun / "bin" / "times").write_text("".join(f"{candidate['id']} 11\n" for candidate in before["candidates"]))
    measure(begun / "emit", begun / "bin")
    assert go_on(begun) == 0
    plan = read_plan(begun)
    assert plan["winner"]["method"] == "dense", "all that was measured is slower there"
    scale = plan["measurement"]["roofline"]["median"]
    others = [n for n in range(len(before["points"])) if n not in before["chosen"]]
    assert others
    for n in others:
        now, then = plan["points"][n]["latency"], before["points"][n]["latency"]
        assert now["kind"] == "modelled, scaled to what was measured" and now["moee_ms"] == pytest.approx(then["moee_ms"] * scale)


def test_a_candidate_that_failed_there_is_named_and_not_chosen(begun, capsys):
    body = json.loads((begun / "plan.resume" / "emitted.json").read_text())
    places = {s["id"]: body["points"][n]["method"] for s, n in zip(body["candidates"], body["chosen"], strict=True)}
    (begun / "bin" / "times").write_text("".join(f"{name} fail\n" for name, method in places.items() if method == "static"))
    measure(begun / "emit", begun / "bin")
    assert go_on(begun) == 0
    plan = read_plan(begun)
    assert plan["winner"]["method"] == "dense"
    failed = [e for e in plan["measurement"]["candidates"] if "failed" in e]
    assert failed and all(e["method"] == "static" and "Invalid Node" in e["failed"] for e in failed)
    assert "of the MACs failed there: no engine was built: [TRT] ModelImporter" in " ".join(capsys.readouterr().out.split())


def test_a_limit_that_nothing_meets_there_keeps_the_points(begun, capsys):
    before = kept(begun)
    assert go_on(begun, "--target-latency-ms", "5") == 1
    assert "nothing meets the budget; nearest is static" in capsys.readouterr().err
    assert kept(begun) == before and not (begun / "plan").exists()
    assert go_on(begun, "--target-latency-ms", "7") == 0, "and the same times serve another budget"


def damaged(**changes):
    return lambda body: {**body, **changes}


def changed(number, **changes):
    def change(body):
        entries = [{**entry, **changes} if n == number else entry for n, entry in enumerate(body["candidates"])]
        return {**body, "candidates": entries}

    return change


REFUSED = {
    "of other candidates": (damaged(emit="0" * 64), "is of other candidates"),
    "of one other candidate": (changed(0, id="0" * 64), "is of other candidates"),
    "lacks one": (lambda body: {**body, "candidates": body["candidates"][1:]}, "lacks 1 of the"),
    "twice the same": (lambda body: {**body, "candidates": body["candidates"][:1] * 2}, "expected each candidate once"),
    "text for a number": (changed(0, gpu_ms=["6"] * 5), "candidates.0.gpu_ms.0"),
    "no number": (changed(0, gpu_ms=[math.nan] * 5), "finite number"),
    "a time of nothing": (changed(0, gpu_ms=[0.0] * 5), "greater than 0"),
    "a round too few": (changed(0, gpu_ms=[6.0] * 4), "expected a time of each of the 5 rounds"),
    "neither times nor a reason": (changed(0, gpu_ms=None, host_ms=None), "or why the candidate failed"),
    "another batch": (damaged(batch=8), "measured with batch 8, expected 4"),
    "another dense model": (
        lambda body: {**body, "dense": {**body["dense"], "id": "1" * 64}}, "measured with dense",
    ),
    "a later version": (damaged(schema="moee.measured/2"), "a newer version wrote it"),
    "another file": (damaged(schema="moee.latency/1"), "expected 'moee.measured/1'"),
    "a name that moves the cursor": (damaged(device={"model": "\x1b[2J", "gpu": None}), "without control characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_foreign_or_damaged_result_is_one_sentence_before_a_model_is_loaded(begun, monkeypatch, case, capsys):
    monkeypatch.setattr("exporter.commands.models.elsewhere.session_of", lambda *a: pytest.fail("the model was loaded"))
    change, said = REFUSED[case]
    path, before = begun / "emit" / "RESULT.json", kept(begun)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert go_on(begun) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and kept(begun) == before and not (begun / "plan").exists()


@pytest.mark.parametrize("rounds, span, said", [
    (1, [1.005, 1.005], "one round gave 1.005x, and how far rounds differ is not known; measure more with --rounds"),
    (5, [0.99, 1.02], "its timings reach from 0.990x to 1.020x"), (5, [1.01, 1.02], ""),
])  # fmt: skip
def test_a_gain_that_the_rounds_do_not_show_is_said(rounds, span, said):
    measured = {
        "name": "x", "batch": 4, "precision": "fp16", "rounds": rounds, "environment": [], "candidates": [], "roofline": None,
    }  # fmt: skip
    lines = measurement_lines({"measurement": measured, "winner": {"latency": {"speedup_range": span}}})
    assert lines[1:] == [f"that the winner is faster than dense is not shown: {said}"] * bool(said)


def test_a_truncated_result_and_one_without_candidates_are_refused(begun, tmp_path, capsys):
    path = begun / "emit" / "RESULT.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    assert go_on(begun) == 2 and "is not readable JSON" in capsys.readouterr().err
    path.write_text(text)
    assert go_on(begun, "--batch", "1") == 2
    assert "written with --batch 4, and now it is 1; give --batch 4" in capsys.readouterr().err
    for words, said in (
        (("--targets", "0.5"), "with --targets 0."), (("--methods", "lowrank"), "now it is lowrank; give --methods "),
        (("--attention-macs", "0.7,1"), "were written with --attention-macs 1.0, and now it is 0.7,1; give"),
    ):  # fmt: skip
        assert go_on(begun, *words) == 2 and said in capsys.readouterr().err
    assert go_on(begun, "--precision", "fp32") == 2 and "give --precision fp16" in capsys.readouterr().err
    words = ["--out", str(tmp_path / "none"), "--measured", str(path)]
    assert cli.main([*PLAN, *words]) == 2 and "write them with --emit DIR first" in capsys.readouterr().err
    (begun / "plan.resume" / "emitted.json").write_text("{}")
    assert go_on(begun) == 2 and "emitted.json" in capsys.readouterr().err
    assert path.read_text() == text


@pytest.mark.parametrize(
    "words, said",
    [
        (["--emit", "e"], "give --sm, such as --sm orin"),
        (["--emit", "e", "--sm", "abacus"], "unknown device 'abacus'"),
        (["--emit", "e", "--device", "ssh:jetson"], "unknown device 'ssh:jetson'; expected one of rtx-3090, orin-agx"),
        (["--emit", "e", "--measured", "r"], "give one of them"),
        (["--measured", "r.json", "--device", "cpu"], "unknown device 'cpu'"),
        (["--device", "none.json"], "no candidates were written for this --out"),
        (["--candidates", "0"], "expected a whole number from 1 to 20"),
        (["--precision", "int8"], "invalid choice"),
        (["--device", "cpu", "--precision", "bf16"], "no bfloat16 kernels on the CPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "elsewhere"):
        monkeypatch.setattr(f"exporter.commands.models.{command}.session_of", lambda *a: pytest.fail("the model was loaded"))
    try:
        code = cli.main([*PLAN, "--out", "plan", *words])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture
def device(tmp_path, monkeypatch):
    reach = write_device(tmp_path / "device")
    monkeypatch.setenv("PATH", path_with(reach)["PATH"])
    return tmp_path / "device"


def by_ssh(tmp_path):
    return cli.main([*PLAN, "--out", str(tmp_path / "plan"), "--device", "ssh:jetson", "--candidates", "1"])


def test_one_command_does_both_ends_by_ssh_and_goes_on_after_a_failure(device, tmp_path, capsys, monkeypatch):
    (device / "bin" / "times").write_text("dense fail\n")
    assert by_ssh(tmp_path) == 1
    error = capsys.readouterr().err
    assert "measuring on jetson failed: measure.sh: dense: no engine was built" in error and "the points are kept in" in error
    assert not list((device / "tmp").iterdir()) and list((tmp_path / "plan.resume").glob("*.json"))
    (device / "bin" / "times").unlink()
    monkeypatch.setattr(Session, "measure", lambda *a: pytest.fail("a point was made again"))
    assert by_ssh(tmp_path) == 0
    plan = read_plan(tmp_path)
    (measured,) = plan["measurement"]["candidates"]
    faster = measured["gpu_ms"] == [6.0] * 5
    assert plan["winner"]["method"] == (measured["method"] if faster else "dense")
    assert plan["winner"]["latency"]["kind"] == f"measured on {MODEL}"
    calls = (device / "ssh-calls").read_text()
    assert calls.count("-o BatchMode=yes") == calls.count(" -- jetson exec sh -c ") == 4
    assert "StrictHostKeyChecking" not in calls and "sudo" not in calls
    assert not list((device / "tmp").iterdir()) and not list((device / "home").iterdir()), "nothing is left on the device"
    assert not (tmp_path / "plan.resume").exists() and "measure on jetson: done" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text, code, said",
    [
        ("refused", "ssh: connect to host jetson port 22: No route to host\n", 3, "No route to host; `ssh jetson true`"),
        ("refused", "Host key verification failed.\n", 3, "Host key verification failed.; `ssh jetson true` must work unasked"),
        ("mute", "", 3, "jetson answers nothing"),
        ("bin/uid", "0", 2, "nothing is run as root"),
        ("bin/trtexec", None, 3, "jetson has no trtexec"),
        ("bin/nvidia-smi", None, 2, "does not say which GPU it has"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_measure_is_refused_before_a_model_is_loaded(
    device, tmp_path, monkeypatch, capsys, name, text, code, said
):
    monkeypatch.setattr("exporter.commands.models.plan.session_of", lambda *a: pytest.fail("the model was loaded"))
    if text is None:
        (device / name).unlink()
    else:
        (device / name).write_text(text)
    assert by_ssh(tmp_path) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "plan.resume").exists()


@pytest.mark.slow
def test_the_plugin_of_the_folder_compiles_on_the_device(begun):
    """The stand-in's cmake left out: the real one, with TensorRT's headers."""
    (begun / "bin" / "cmake").unlink()
    measure(begun / "emit", begun / "bin", CMAKE_OPTIONS=f"-DTENSORRT_ROOT={select_headers().include}")
    assert (begun / "emit" / "plugin" / "build" / "libmoee_plugin.so").stat().st_size > 100_000
    assert all(candidate.failed is None for candidate in read_result(begun / "emit" / "RESULT.json").candidates)
