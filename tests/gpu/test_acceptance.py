"""The acceptance itself, without a GPU: what counts as passed, limits, and what is written."""

import json
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.gpu import __main__ as acceptance
from tests.gpu import install
from tests.gpu.parts import ROOT, Folders, all_parts, gpu_tests
from tests.gpu.running import EMPTY, FAILED, IMPOSSIBLE, LATE, LEFT, PASSED, REHEARSED, Part, run_part

GOOD = {"passed": True, "checks": [{"name": "a", "passed": True}]}


def python(code: str, name: str = "part", limit_s: float = 20.0, **more) -> Part:
    return Part(name, [sys.executable, "-c", code], limit_s, "more", **more)


def writes(path: Path, body: dict, code: int = 0) -> str:
    return f"import pathlib, sys; pathlib.Path({str(path)!r}).write_text({json.dumps(body)!r}); sys.exit({code})"


@pytest.mark.parametrize("body, code, status, words, ran", [
    (GOOD, 0, PASSED, "", 1),
    (GOOD, 1, FAILED, "exit code 1", 1),
    (GOOD, 3, IMPOSSIBLE, "", 1),
    ({**GOOD, "checks": []}, 0, EMPTY, "nothing was checked", 0),
    ({"passed": False, "checks": [{"name": "routes", "passed": False}]}, 1, FAILED, "wrong: routes", 1),
    ({"passed": False, "checks": [{"name": "routes", "passed": False}]}, 3, FAILED, "wrong: routes", 1),
    ({"checks": 3}, 0, FAILED, "no result", 0),
])  # fmt: skip
def test_a_program_passes_only_by_a_result_that_holds_checks(tmp_path, body, code, status, words, ran):
    result = tmp_path / "r.json"
    outcome = run_part(python(writes(result, body, code), result=result), 60)
    assert (outcome.status, outcome.ran) == (status, ran) and words in outcome.reason


def test_an_earlier_result_does_not_count(tmp_path):
    result = tmp_path / "r.json"
    result.write_text(json.dumps(GOOD))
    assert run_part(python("pass", result=result), 60).status == EMPTY
    assert run_part(python("raise SystemExit(1)", result=result), 60).status == FAILED


TESTS = {
    "passes": ("def test_a(): pass", PASSED, 1),
    "fails": ("def test_a(): assert False\ndef test_b(): pass", FAILED, 2),
    "is skipped": ("import pytest\n@pytest.mark.skip(reason='no TensorRT')\ndef test_a(): pass", EMPTY, 0),
    "has no tests": ("", EMPTY, 0),
    "cannot be imported": ("import nothing_of_that_name", FAILED, 1),
}


@pytest.mark.parametrize("what", TESTS)
def test_a_file_of_tests_passes_only_if_a_test_did(tmp_path, what):
    text, status, ran = TESTS[what]
    (tmp_path / "test_it.py").write_text(text)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    command.append(f"--junitxml={report}")
    bare = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # starts faster
    outcome = run_part(Part("tests", command, 60, "more", report=report, environment=bare), 60)
    assert (outcome.status, outcome.ran) == (status, ran), outcome.output
    if what == "is skipped":
        assert outcome.details["why_skipped"] == ["no TensorRT"]


def test_what_is_late_is_ended_with_all_that_it_started(tmp_path):
    child = tmp_path / "child"
    code = "import subprocess, pathlib; p = subprocess.Popen(['sleep', '60']); "
    code += f"pathlib.Path({str(child)!r}).write_text(str(p.pid)); p.wait()"
    began = time.monotonic()
    outcome = run_part(python(code, limit_s=2.0), 60)
    assert outcome.status == LATE and time.monotonic() - began < 15
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"
    assert run_part(python("pass"), 1.0).status == LEFT


def test_what_a_machine_does_not_allow_is_no_failure_and_no_success(tmp_path):
    says = "print('Device not supported'); raise SystemExit(9)"
    refused = python(says, result=tmp_path / "r", refusals=("Device not supported",))
    assert run_part(refused, 60).status == IMPOSSIBLE
    assert run_part(python("pass", files=[tmp_path / "selftest"]), 60).status == IMPOSSIBLE
    assert run_part(Part("tool", ["/nonexistent/tool"], 5, "more"), 60).status == IMPOSSIBLE


def run_all(monkeypatch, out, parts, *more):
    monkeypatch.setattr(acceptance, "all_parts", lambda folders, rehearsal: iter(parts))
    monkeypatch.setattr(acceptance, "device_here", lambda: {"name": "NVIDIA H200"})
    code = acceptance.main([str(out), *more])
    return code, json.loads((out / "acceptance.json").read_text())


def test_a_failure_stops_nothing_and_the_summary_counts_only_what_passed(monkeypatch, tmp_path, capsys):
    result = tmp_path / "good.json"
    bad, empty = python("raise SystemExit('broken')", "bad"), python("", "empty")
    good = python(writes(result, GOOD), "good", result=result)
    code, body = run_all(monkeypatch, tmp_path / "a", [bad, good, empty])
    assert code == 1 and not body["passed"] and body["counts"] == {FAILED: 1, PASSED: 1, EMPTY: 1}
    assert [part["name"] for part in body["parts"]] == ["bad", "good", "empty"] and body["device"]["name"] == "NVIDIA H200"
    assert "broken" in (tmp_path / "a" / "log.txt").read_text()
    code, body = run_all(monkeypatch, tmp_path / "b", [good, empty])
    assert code == 0 and body["passed"]
    code, body = run_all(monkeypatch, tmp_path / "c", [empty])
    assert code == 1 and not body["passed"], "nothing ran"
    code, body = run_all(monkeypatch, tmp_path / "d", [good], "--rehearse")
    assert code == 0 and not body["passed"] and body["counts"] == {REHEARSED: 1}
    assert "a device would add: more" in capsys.readouterr().out


def test_without_a_gpu_nothing_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(acceptance, "device_here", lambda: None)
    assert acceptance.main([str(tmp_path / "out")]) == 3 and "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out" / "acceptance.json").exists()


def test_every_gpu_test_is_a_part_and_few_files_come_out(tmp_path):
    at = Folders(tmp_path / "pack", tmp_path / "out", tmp_path / "scratch")
    names = [part.name for part in all_parts(at, False)]
    marked = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if "mark." + "gpu" in path.read_text()}
    assert marked == set(gpu_tests()) and marked <= set(names) and names[0] == "selftest" and len(names) == len(set(names))
    kept = {part.result for part in all_parts(at, False) if part.result and part.result.parent == at.out}
    assert len(kept) + 2 <= 8, "with acceptance.json and log.txt"
    rehearsed = {part.name: part for part in all_parts(at, True)}
    assert set(names) - marked <= rehearsed.keys() and marked <= set(rehearsed["GPU tests"].command)


def test_only_missing_packages_are_unpacked(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("pytest-1.0-py3-none-any", "brought_along-1.0-py3-none-any"):
        with zipfile.ZipFile(wheels / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name.split('-')[0]}/__init__.py", "")
    assert install.main([str(tmp_path), str(tmp_path / "site")]) == 0
    assert sorted(os.listdir(tmp_path / "site")) == ["brought_along"]
    with zipfile.ZipFile(wheels / "other-1.0-cp27-cp27mu-any.whl", "w"):
        pass
    assert install.main([str(tmp_path), str(tmp_path / "site")]) == 3
    assert install.main([str(tmp_path / "nothing"), str(tmp_path / "site")]) == 3
