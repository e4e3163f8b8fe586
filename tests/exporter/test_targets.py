"""Targets of this machine: words, what they lack here, and the GPU's with doubles in the place of the GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from exporter import cli
from exporter.engines.build import BuildFailed
from exporter.targets import file, here
from exporter.targets.candidates import Exported
from exporter.targets.here import Board, Cpu, Gpu
from exporter.targets.registry import target_of
from exporter.targets.roofline import board_of, device_of
from exporter.targets.target import latency
from exporter.verdict import Verdict
from moee.errors import MissingDependency, StepFailed, UserError
from moee.models.model import ModelSpec
from moee.planning.budget import Budget, Point, StoredLatency
from moee.planning.emitted import Sending, Sent
from moee.planning.forms import Latency
from moee.planning.plan import make_plan
from moee.planning.shortlist import Candidate, Shortlist
from moee.progress import silent
from moee.stages.session import Session
from tests.conftest import TINY, tiny_images

FAST = dict(methods=("static",), targets=(0.85, 0.7), base={"cluster_tokens": 300})


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (tiny_images(40), tiny_images(24)))
    return Session(ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, random_seed=0), "tiny")


def test_words():
    kinds = {"cpu": Cpu, "cuda": Gpu, "tensorrt": Gpu, "orin-agx": Board, "RTX 4090": Board}
    assert {word: type(target_of(word)) for word in kinds} == kinds
    assert target_of("RTX 4090", batch=4).label == "rtx-4090 (modelled), batch 4"
    assert target_of("cuda", batch=4, precision="fp16").label == "cuda, batch 4, fp16"
    with pytest.raises(UserError, match="expected one of cpu, cuda, tensorrt, ssh:HOST, RESULT.json, rtx-3090"):
        target_of("abacus")


@pytest.mark.slow
def test_points_are_timed_as_they_are_made_on_the_cpu_and_modelled_for_a_board(session):
    cpu, board = (target_of(word, batch=4).timing(session, silent) for word in ("cpu", "orin-agx"))
    assert isinstance(cpu, Latency) and cpu.label == "cpu, batch 4", "as in earlier versions, whose points are kept"
    assert isinstance(board, Latency) and board.of(session.dense)["kind"] == "modelled"


@pytest.mark.parametrize("word", ["cuda", "tensorrt"])
def test_without_a_gpu_the_command_ends_before_a_model_is_loaded(word, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(here, "device_count", lambda: 0)
    monkeypatch.setattr("exporter.commands.models.plan.session_of", lambda *a: pytest.fail("the model was loaded"))
    words = ["plan", "tiny", "--data", "digits", "--min-cosine", "0.9", "--out", str(tmp_path / "plan"), "--device", word]
    assert cli.main(words) == 3
    assert f"--device {word} needs an NVIDIA GPU with its driver" in capsys.readouterr().err


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a known name, as far as a check and a name go."""
    monkeypatch.setattr(here, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(here, "_installed", lambda backend: False)


def test_what_lacks_is_named_with_the_command_that_installs_it(gpu, monkeypatch):
    with pytest.raises(MissingDependency, match=r"pip install 'moee\[trt\]'` or `pip install onnxruntime-gpu"):
        target_of("cuda").check()
    monkeypatch.setattr(here, "provider_works", lambda provider: provider == "cuda")
    target_of("cuda").check()
    monkeypatch.setattr(here, "require_backend", lambda backend: (_ for _ in ()).throw(MissingDependency(backend)))
    with pytest.raises(MissingDependency, match="tensorrt"):
        target_of("tensorrt").check()


@pytest.fixture
def candidates(monkeypatch):
    """Two that are exported already, of which the second needs the plugin."""
    def exported(given, session, precision, batch, place, *, report):
        for number, candidate in enumerate(given):
            modelled = {"rtx-4090": StoredLatency(dense_ms=1.0, moee_ms=0.5 + number)}
            yield Exported("ab"[number] * 64, place / candidate.point.method, number == 1, modelled)

    monkeypatch.setattr(here, "exported", exported)
    names = ("static", "kmeans-8")
    return [Candidate(Point(m, "", 0.7, 0.7, 0.9, 0.9, None, None, None, {"method": m}), lambda: None) for m in names]


def times(dense_ms, moee_ms):
    """What `bench` gives, as far as it is read."""
    verdict, samples = Verdict(dense_ms / moee_ms, 0.9 * dense_ms / moee_ms, 1.1 * dense_ms / moee_ms, 40), {"dense": [1.0]}
    p50 = {"dense_ms": {"p50": dense_ms}, "moee_ms": {"p50": moee_ms}}
    return SimpleNamespace(runtime="double", samples_ms=samples, verdict=verdict, **p50)


def test_without_tensorrt_candidates_are_timed_by_onnx_runtime(gpu, session, candidates, monkeypatch):
    def bench(export, batch, *, provider, images, **options):
        assert provider == "cuda" and images.shape == (batch, 3, 32, 32)
        return times(4.0, 2.0 if export.name == "static" else 5.0)

    monkeypatch.setattr(here, "bench", bench)
    timing = target_of("cuda", batch=2, most=2).timing(session, silent)
    assert isinstance(timing, Shortlist) and timing.ranking.label == "rtx-4090, batch 2"
    timed = timing.time(candidates)
    assert [(said["kind"], said["speedup"]) for said in timed.latencies] == [
        ("measured on NVIDIA GeForce RTX 4090", 2.0), ("measured on NVIDIA GeForce RTX 4090", 0.8),
    ]  # fmt: skip
    assert timed.latencies[0]["speedup_range"] == [pytest.approx(1.8), pytest.approx(2.2)], "its interval"
    assert timed.dense["moee_ms"] == timed.dense["dense_ms"] == 4.0 and timed.facts["name"] == "NVIDIA GeForce RTX 4090"
    assert timed.facts["roofline"]["candidates"] == [4.0, pytest.approx(10 / 3)] and timed.scale.dense == 4.0


def test_engines_are_built_and_what_cannot_be_built_is_recorded(gpu, session, candidates, tmp_path, monkeypatch):
    built = []

    def build(export, out, **options):
        built.append(options)
        if options["plugin"] is not None:
            raise BuildFailed("no such tactic")

    def bench(export, batch, *, engine, images, **options):
        assert engine.name == "engine"
        return times(4.0, 2.0)

    monkeypatch.setattr(here, "bench", bench)
    monkeypatch.setattr(here, "build_engines", build)
    monkeypatch.setattr(here.plugin_cache, "ensure_plugin", lambda sms, report: tmp_path / f"plugin-{sms[0]}.so")
    timing = target_of("tensorrt", batch=2).timing(session, silent)
    timed = timing.time(candidates)
    assert all(o["backend"] == "tensorrt" and o["batch"] == (2, 2, 2) and o["timing_cache"] for o in built)
    assert [o["plugin"] for o in built] == [None, tmp_path / "plugin-89.so"]
    assert timed.latencies[0]["speedup"] == 2.0 and timed.latencies[1] == "no engine was built: no such tactic"
    assert timed.facts["candidates"][1] == {"id": "b" * 64, "failed": "no engine was built: no such tactic"}
    with pytest.raises(StepFailed, match="none of the candidates could be timed on NVIDIA .*; of the first: no engine"):
        monkeypatch.setattr(here, "build_engines", lambda *a, **k: build(*a, **{**k, "plugin": 1}))
        timing.time(candidates)


def test_a_result_file_is_known_by_the_ids_of_the_candidates_that_are_made_again(session, candidates, tmp_path, monkeypatch):
    sending = Sending(emit="e" * 64, dense="d" * 64, batch=2, precision="fp32", candidates=[Sent(id="a" * 64), Sent(id="b" * 64)])
    monkeypatch.setattr(file, "collect", lambda folder, given, *a, **k: (sending, set()))
    state = {"power_mode": None, "clocks": [], "temperatures": []}
    ms = {"gpu_ms": [4.0, 4.0], "host_ms": [5.0, 5.0]}
    body = {
        "schema": "moee.measured/1", "emit": "e" * 64, "device": {"model": "x", "gpu": None}, "tensorrt": None, "batch": 2,
        "precision": "fp32", "rounds": 2, "environment": [state, state], "dense": {"id": "d" * 64, **ms},
        "candidates": [{"id": "b" * 64, **ms, "gpu_ms": [2.0, 8.0]}, {"id": "a" * 64, "failed": "no"}],
    }  # fmt: skip
    path = tmp_path / "RESULT.json"
    path.write_text(json.dumps(body))
    target = target_of(str(path), batch=2)
    target.check()
    timing = target.timing(session, silent)
    assert timing.most == 2
    failed, timed = timing.time(candidates).latencies
    assert failed == "no" and timed["kind"] == "measured on x" and timed["speedup_range"] == [0.5, 2.0]
    with pytest.raises(UserError, match="was measured with batch 2, expected 4"):
        monkeypatch.setattr(file, "collect", lambda *a, **k: (sending.model_copy(update={"batch": 4}), set()))
        timing.time(candidates)
    path.write_text("{}")
    with pytest.raises(UserError, match="expected 'moee.measured/1'"):
        target.check()


def test_a_figure_of_the_roofline_meets_no_limit_where_the_device_was_to_be_measured(session, tmp_path):
    """Nothing but dense is faithful enough, and dense alone is not measured: its time stays unknown."""
    ranking = Latency("modelled", lambda model: latency("modelled", "orin-agx", 2, 1.0, 0.5))
    timing = Shortlist(1, lambda chosen: pytest.fail("there is nothing to time"), ranking)
    budget = Budget(min_cosine=1.0, target_latency_ms=5.0)
    with pytest.raises(UserError, match="it misses .*latency, which could not be measured"):
        make_plan(session, budget, tmp_path / "plan", latency=timing, **FAST)
    plan = make_plan(session, Budget(min_cosine=1.0), tmp_path / "plan", latency=timing, **FAST)
    assert plan["winner"]["method"] == "dense" and not any(p["latency"] for p in plan["points"])


@pytest.mark.gpu
@pytest.mark.trt
def test_a_plan_is_measured_on_the_gpu_here(session, tmp_path):
    """The tests above do the same with doubles in the place of the GPU."""
    target = target_of("cuda", batch=2, most=1)
    try:
        target.check()
    except MissingDependency as missing:
        pytest.skip(str(missing))
    plan = make_plan(session, Budget(min_cosine=0.1), tmp_path / "plan", latency=target.timing(session, silent), **FAST)
    assert plan["winner"]["latency"]["kind"] == f"measured on {torch.cuda.get_device_name()}"


def test_what_a_device_cannot_time_leaves_the_points(session, tmp_path):
    def fail(chosen):
        raise MissingDependency("the device is gone")

    with pytest.raises(MissingDependency) as error:
        make_plan(session, Budget(min_cosine=0.1), tmp_path / "plan", latency=Shortlist(1, fail), **FAST)
    assert error.value.__notes__ == [f"the points are kept in {tmp_path / 'plan.resume'}, and the same command goes on from them"]
    assert len(list((tmp_path / "plan.resume").iterdir())) > 2


@pytest.mark.parametrize("name, device, board", [
    ("NVIDIA Jetson AGX Orin Developer Kit", "orin-agx", "orin-agx"),
    ("NVIDIA Jetson Orin Nano Developer Kit", "orin-nano", "orin-nano"),
    ("NVIDIA Orin NX Developer Kit", "orin-nx", None),
    ("Orin", "orin", None),
    ("NVIDIA Jetson AGX Thor Developer Kit", "thor-agx", "thor-agx"),
    ("NVIDIA GeForce RTX 4090", "rtx-4090", "rtx-4090"),
    ("NVIDIA L4", "l4", "l4"),
    ("NVIDIA L40S", None, None),
    ("", None, None),
])  # fmt: skip
def test_the_makers_name_says_which_device_it_is(name, device, board):
    found = device_of(name)
    assert (found and found.name) == device and board_of(name) == board
