"""measure.sh and device.sh on a stand-in device: what they time, what they record, what they refuse. By dash and bash."""

import json
import shutil
import subprocess
import time

import pytest

from exporter.deploy import DEPLOY
from exporter.ship.deployment import write_sums
from exporter.targets.result import read_result
from tests.exporter.device_double import MODEL, path_with, write_tools

PLAIN, ROUTED, EMIT, DENSE = "a" * 64, "b" * 64, "e" * 64, "d" * 64
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)] or ["sh"]


@pytest.fixture
def sent(tmp_path):
    """A folder as `--emit` writes it, with a candidate of standard operators and one that needs the plugin; the graphs are
    stand-ins too."""
    folder = tmp_path / "sent"
    for name in ("dense/dense.onnx", f"candidates/{PLAIN}/tensorrt.onnx", f"candidates/{ROUTED}/tensorrt.onnx", "images.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "plugin").mkdir()
    values = f"EMIT={EMIT}\nDENSE={DENSE}\nINPUT=input\nSHAPE=3x32x32\nBATCH=8\nPRECISION=fp16\nPLUGIN=yes\n"
    (folder / "measure.env").write_text(values)
    (folder / "candidates.txt").write_text(f"{PLAIN} no\n{ROUTED} yes\n")
    for name in ("measure.sh", "device.sh"):
        shutil.copy2(DEPLOY / name, folder / name)
    write_sums(folder)
    return folder


@pytest.fixture
def tools(tmp_path):
    return write_tools(tmp_path / "bin")


def measure(folder, tools, *words, shell="sh"):
    command = [shell, str(folder / "measure.sh"), *(words or ("--rounds", "2"))]
    return subprocess.run(command, env=path_with(tools), capture_output=True, text=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_dense_and_candidates_are_timed_in_turns(sent, tools, shell):
    done = measure(sent, tools, "--rounds", "3", shell=shell)
    assert done.returncode == 0 and "RESULT.json written" in done.stdout, done.stderr
    result = read_result(sent / "RESULT.json")
    assert (result.emit, result.batch, result.precision, result.rounds) == (EMIT, 8, "fp16", 3)
    assert result.dense.gpu_ms == [10, 10, 10] and result.dense.host_ms == [110, 110, 110]
    assert {c.id: c.gpu_ms for c in result.candidates} == {PLAIN: [6, 6, 6], ROUTED: [12, 12, 12]}
    assert result.device.name == MODEL and result.device.gpu == "Orin" and result.tensorrt == "10.3.0"
    assert [e.power_mode for e in result.environment] == ["MAXN", "MAXN"]
    calls = (tools / "calls").read_text().splitlines()
    timed = [next(m for m in ("dense", PLAIN, ROUTED) if f"engines/{m}.plan" in c) for c in calls if "--loadEngine" in c]
    assert timed == ["dense", PLAIN, ROUTED, ROUTED, PLAIN, "dense", "dense", PLAIN, ROUTED], "the order alternates"
    for call in calls:
        assert ("--dynamicPlugins=" in call) == (ROUTED in call), call
        if "--loadEngine" in call:
            assert "--shapes=input:8x3x32x32 --loadInputs=input:images.bin" in call, "routing depends on the images"
        else:
            assert "--stronglyTyped" in call and "--optShapes=input:8x3x32x32" in call and "--skipInference" in call


@pytest.mark.parametrize("said, reason", [
    ("fail", 'no engine was built: [TRT] ModelImporter.cpp:951: Invalid Node - "x\\y"'),
    ("stop", "the engine does not run: Error occurred during inference"),
    ("inf", "trtexec printed no median: "),
    ("0", "trtexec printed no median: "),
])  # fmt: skip
def test_a_candidate_that_fails_is_recorded_with_its_reason(sent, tools, said, reason):
    (tools / "times").write_text(f"{PLAIN} {said}\n")
    assert measure(sent, tools).returncode == 0
    failed, timed = read_result(sent / "RESULT.json").candidates
    assert failed.id == PLAIN and failed.failed.startswith(reason) and failed.gpu_ms is None
    assert timed.id == ROUTED and timed.gpu_ms == [12, 12]


def test_a_plugin_that_does_not_compile_fails_what_needs_it_alone(sent, tools):
    (tools / "no-compiler").touch()
    assert measure(sent, tools).returncode == 0
    timed, failed = read_result(sent / "RESULT.json").candidates
    assert timed.gpu_ms == [6, 6] and failed.failed == "the plugin does not compile: error: NvInfer.h: No such file"


@pytest.mark.parametrize("said", ["fail", "stop", "inf"])
def test_without_the_dense_model_there_is_no_result_and_an_earlier_one_stays(sent, tools, said):
    (sent / "RESULT.json").write_text("earlier")
    (tools / "times").write_text(f"dense {said}\n")
    done = measure(sent, tools)
    assert done.returncode == 1 and "measure.sh: dense: " in done.stderr
    assert (sent / "RESULT.json").read_text() == "earlier" and not (sent / "RESULT.json.new").exists()


def test_what_cannot_be_measured_is_refused(sent, tools, tmp_path):
    for words in (["--rounds", "0"], ["--rounds", "100"], ["--seconds", "x"], ["--colour"], ["--rounds"]):
        done = measure(sent, tools, *words)
        assert done.returncode == 2 and "--rounds N" in done.stderr, words
    done = measure(sent, write_tools(tmp_path / "bare", "trtexec"))
    assert done.returncode == 3 and "trtexec not found" in done.stderr
    (sent / "images.bin").write_text("others")
    done = measure(sent, tools)
    assert done.returncode == 2 and "changed or cut short" in done.stderr and not (sent / "engines").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_an_interrupt_ends_trtexec_too(sent, tools, shell):
    (tools / "times").write_text("dense sleep\n")
    running = subprocess.Popen([shell, str(sent / "measure.sh")], env=path_with(tools), stdout=subprocess.PIPE, text=True)
    while not (tools / "calls").exists():
        time.sleep(0.02)
    began = time.monotonic()
    running.terminate()
    assert running.wait(30) == 143 and time.monotonic() - began < 20, "it does not wait for the minute that trtexec takes"
    assert running.stdout.read().endswith("building dense\n") and not (sent / "RESULT.json").exists(), "nobody holds the pipe"


def test_the_state_of_the_device_is_read_from_the_system(tmp_path):
    """As a Jetson Orin shows it; zones that are off cannot be read."""
    files = {
        "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000", "sys/class/devfreq/17000000.gpu/max_freq": "1300500000",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2201600",
        "sys/class/thermal/thermal_zone0/temp": "45312", "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "", "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
        "sys/class/thermal/thermal_zone2/temp": "-256", "sys/class/thermal/thermal_zone2/type": 'odd"\\\n\tzone',
        "proc/device-tree/model": "NVIDIA Orin NX Developer Kit\0",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = f". {DEPLOY}/device.sh; sys={tmp_path}/sys; proc={tmp_path}/proc; environment; echo; device_model"
    for shell in SHELLS:
        done = subprocess.run([shell, "-euc", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
        state, model = done.stdout.split("\n")
        assert model == "NVIDIA Orin NX Developer Kit" and done.stderr == ""
        assert json.loads(state) == {
            "power_mode": None,
            "clocks": [
                {"clock": "17000000.gpu", "mhz": 1020, "max_mhz": 1300.5}, {"clock": "cpu0", "mhz": 2201.6, "max_mhz": None},
            ],
            "temperatures": [{"zone": "cpu-thermal", "celsius": 45.312}, {"zone": 'odd"\\  zone', "celsius": -0.256}],
        }  # fmt: skip
