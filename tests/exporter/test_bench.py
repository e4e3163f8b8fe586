"""`moee bench`: timing in pairs, the verdict and its refusal, throughput, layers, what the machine shows."""

import json
import threading

import numpy as np
import pytest

from exporter import cli
from exporter.commands.engines import bench as bench_command
from exporter.engines import environment
from exporter.report import write_report
from exporter.runners import EngineRunner
from exporter.timing.latency import _flood, bench, percentiles, throughput, time_in_turns
from exporter.timing.layer_profile import place, sum_events
from exporter.verdict import MIN_PAIRS, judge
from moee.errors import MissingDependency, UserError
from moee.store.artifact import read_json, write_json
from tests.exporter.engines import CpuDevice, FakeBinding, write_engine


def noisy(count: int, seed: int) -> np.ndarray:
    """Times with what a shared machine does to them: slow drift, spikes, jitter."""
    random = np.random.default_rng(seed)
    drift = 1 + 0.2 * np.sin(np.arange(count) / count * 6 + seed)
    spikes = 1 + (random.random(count) < 0.05) * random.random(count)
    return drift * spikes * random.normal(1, 0.05, count).clip(0.8)


def test_identical_models_have_no_winner():
    """False verdicts among 200 pairs of noise that is the same for both."""
    wrong = 0
    for i in range(200):
        shared, random = noisy(40, i), np.random.default_rng(1000 + i)
        dense, moee = (shared * random.normal(1, 0.05, 40).clip(0.8) for _ in range(2))
        wrong += judge(dense, moee).winner is not None
    assert wrong <= 4  # 1 % expected


@pytest.mark.parametrize("count", [12, 40, 64])
def test_a_slow_second_run_of_every_pair_decides_nothing(count):
    """Two busy cores gave it: identical models were told apart in half of such timings of twelve pairs."""
    wrong, even = 0, np.arange(count) % 2 == 0
    for i in range(100):
        random = np.random.default_rng(i)
        dense, moee, late = random.normal(1, 0.3, count).clip(0.3), random.normal(1, 0.3, count).clip(0.3), 8.0
        verdict = judge(np.where(even, dense, dense * late), np.where(even, moee * late, moee))
        wrong += verdict.winner is not None
    assert wrong <= 7


@pytest.mark.parametrize("true", [1.3, 1.1, 0.8])
def test_a_real_difference_is_named_and_covered(true):
    covered = 0
    for i in range(50):
        shared, random = noisy(60, i), np.random.default_rng(i)
        dense, moee = (shared * random.normal(1, 0.05, 60).clip(0.8) for _ in range(2))
        verdict = judge(dense * true, moee)
        assert verdict.winner == ("moee" if true > 1 else "dense")
        covered += verdict.low <= true <= verdict.high
    assert covered >= 45


def test_few_pairs_and_small_differences_have_no_winner():
    ones = np.ones(MIN_PAIRS - 1)
    assert judge(2 * ones, ones).winner is None and "fewer than" in judge(2 * ones, ones).text
    ones = np.ones(40)
    assert judge(1.01 * ones, ones).winner is None and "the difference is below 2%" in judge(1.01 * ones, ones).text
    assert judge(1.05 * ones, ones).winner == "moee"
    assert "no winner, the noise is as large as the difference" in judge(ones, ones).text


class Clock:
    """A clock that only moves when a model runs."""

    def __init__(self):
        self.now, self.order = 0.0, []
        self.lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def model(self, name: str, seconds: float):
        def call():
            with self.lock:
                self.now += seconds
                self.order.append(name)

        return call


def test_pairs_are_interleaved_and_alternate():
    clock = Clock()
    times = time_in_turns((clock.model("d", 0.2), clock.model("m", 0.1)), runs=4, clock=clock)
    assert "".join(clock.order) == "dm" * 5 + "dmmd" * 2
    np.testing.assert_allclose(times, [[0.2] * 4, [0.1] * 4])
    assert percentiles(times[0]) == pytest.approx({"p50": 200, "p90": 200, "p95": 200, "p99": 200})


def test_duration_goes_on_beyond_the_runs():
    clock = Clock()
    assert time_in_turns((clock.model("d", 0.5), clock.model("m", 0.5)), runs=2, duration_s=10, clock=clock).shape == (2, 10)


def test_throughput_counts_images_of_all_streams():
    clock = Clock()
    rate = throughput((clock.model("d", 0.2), clock.model("m", 0.1)), batch=8, streams=1, seconds=12, clock=clock)
    assert rate == pytest.approx({"dense": 40, "moee": 80}, rel=0.05)
    with pytest.raises(ZeroDivisionError):
        _flood(lambda: 1 / 0, 2, 0.1, clock)


def test_profile_events_are_placed_by_name_and_by_neighbour():
    def event(name, ts, dur):
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur}

    run = [("blocks.1.norm/LN", 1), ("blocks.1.mlp.fc1/MatMul", 4), ("BiasGelu_3", 2), ("blocks.1.mlp.fc2/MatMul", 3),
           ("Fused_7", 5), ("blocks.10.mlp.fc1/MatMul", 6)]  # fmt: skip
    events, now = [], 0
    for repeat in range(3):  # one run of warm-up, ten times slower
        start, scale = now, 10 if repeat == 0 else 1
        for name, cost in run:
            events.append(event(name, now, 1000 * cost * scale))
            now += 1000 * cost * scale
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": now - start})
    times = sum_events(events, 1, 2)
    assert times["BiasGelu_3"] == 2.0 and list(times)[0] == "blocks.1.norm/LN"
    assert place(times, ["blocks.1.mlp", "blocks.10.mlp"]) == {"blocks.1.mlp": 9.0, "blocks.10.mlp": 6.0, "": 6.0}


def test_bench_of_a_tiny_export(tiny_export, tmp_path, capsys):
    command = ["bench", tiny_export.folder(), "--batch", 2, "--runs", 12, "--duration", 0, "--throughput", 0.2, "--profile"]
    code = cli.main([str(a) for a in [*command, "--threads", 1, "--out", tmp_path / "latency.json"]])
    assert code == 0
    text = capsys.readouterr().out
    assert "images a second" in text and "everything else" in text and "speed-up" in text
    body = json.loads((tmp_path / "latency.json").read_text())
    assert body["schema"] == "moee.latency/1" and body["runs"] == 12 and body["cuda_graph"] is None
    for side in ("dense_ms", "moee_ms"):
        assert 0 < body[side]["p50"] <= body[side]["p90"] <= body[side]["p95"] <= body[side]["p99"]
    assert body["verdict"]["low"] <= body["verdict"]["ratio"] <= body["verdict"]["high"]
    assert body["speedup"] == body["verdict"]["ratio"]
    assert [layer["name"] for layer in body["layers"]["layers"]] == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert all(layer["dense_ms"] > 0 and layer["moee_ms"] > 0 for layer in body["layers"]["layers"])
    assert body["throughput"]["dense"] > 0 and len(body["environment"]) == 2
    assert body["environment"][0]["cpu"]["cores"] >= 1 and body["images"] == "digits"
    for side in ("dense", "moee"):
        assert len(body["samples_ms"][side]) == 12
        assert np.percentile(body["samples_ms"][side], 50) == pytest.approx(body[f"{side}_ms"]["p50"], abs=1e-4)
    ratios = np.divide(body["samples_ms"]["dense"], body["samples_ms"]["moee"])
    assert np.median(np.sqrt(ratios[::2] * ratios[1::2])) == pytest.approx(body["speedup"], rel=1e-3)
    page = write_report([tmp_path / "latency.json"], tmp_path / "report.html").read_text()
    assert page.count('class="tick dense"') == page.count('class="tick moee"') == 12
    del body["samples_ms"]  # as files of before the runs were kept
    (tmp_path / "latency.json").write_text(json.dumps(body))
    page = write_report([tmp_path / "latency.json"], tmp_path / "report.html", force=True).read_text()
    assert 'class="tick' not in page and 'class="mark dense"' in page and "p95" in page


def test_bench_runs_on_the_data_that_it_is_given(tiny_export, tmp_path, capsys):
    """Routing depends on the images. Data that are elsewhere now are named; data that were asked for must be there."""
    folder = tiny_export.copy(tmp_path / "export")
    write_json(folder / "export.json", {**read_json(folder / "export.json"), "data": "elsewhere"})
    command = ["bench", str(folder), "--batch", "2", "--runs", "2", "--duration", "0", "--throughput", "0"]
    out = tmp_path / "latency.json"
    assert cli.main([*command, "--out", str(out)]) == 0
    assert "on noise: the data 'elsewhere' cannot be read here" in " ".join(capsys.readouterr().out.split())
    assert read_json(out)["images"] == "noise"
    assert cli.main([*command, "--data", "digits", "--out", str(out)]) == 0 and read_json(out)["images"] == "digits"
    assert cli.main([*command, "--data", "nowhere"]) == 2


def test_fail_if_slower_needs_a_verdict(tiny_export, monkeypatch, capsys):
    """Six tiny layers: routing costs more than it saves. A gate may fire on a verdict only."""
    import exporter.timing.latency

    times = {"value": np.ones((2, 40))}
    monkeypatch.setattr(exporter.timing.latency, "time_in_turns", lambda *args, **kwargs: times["value"])
    command = ["bench", str(tiny_export.folder()), "--batch", "1", "--throughput", "0", "--fail-if-slower"]
    assert cli.main(command) == 0 and "no winner" in capsys.readouterr().out
    times["value"] = np.stack([np.ones(40), np.full(40, 2.0)])
    assert cli.main(command) == 1 and "MoEE is slower than dense" in capsys.readouterr().out


def test_engines_are_timed_through_doubles(tiny_export, tmp_path, monkeypatch):
    engine, device = write_engine(tmp_path / "engine", tiny_export.folder()), CpuDevice()

    def double(folder, model, cuda_graph, trust):
        return EngineRunner(folder, model, cuda_graph=cuda_graph, trust=trust, binding=FakeBinding(), device=device)

    monkeypatch.setattr("exporter.timing.latency._engine_runner", double)
    result = bench(tiny_export.folder(), batch=2, runs=3, engine=engine, cuda_graph=True)
    assert result.runtime == "tensorrt-rtx 1.0 GPU" and result.cuda_graph is True and device.captured == 2
    assert result.layers is None and result.runs == 3
    write_json(engine / "engine.json", {**read_json(engine / "engine.json"), "source_sha256": "0" * 64})
    with pytest.raises(UserError, match="was built from another export than .*run moee build again"):
        bench(tiny_export.folder(), batch=2, runs=3, engine=engine)


def test_bench_refuses_what_it_cannot_time(tiny_export, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        bench(tiny_export.folder(), batch=0)
    with pytest.raises(MissingDependency):
        bench(tiny_export.folder(), provider="tensorrt")
    folder = tiny_export.copy(tmp_path / "bf16")
    manifest = read_json(folder / "export.json")
    write_json(folder / "export.json", {**manifest, "precision": "bf16"})
    with pytest.raises(UserError, match="no bfloat16 kernels on the CPU"):
        bench(folder)


def test_environment_reads_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CPU_FREQ", tmp_path)
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : A CPU @ 3 GHz\ncpu MHz : 2999.5\n")
    assert environment.cpu()["mhz"] == 2999.5 and environment.cpu()["governor"] is None
    for name, text in (("scaling_governor", "performance\n"), ("scaling_cur_freq", "3000000"), ("cpuinfo_max_freq", "4000000")):
        (tmp_path / name).write_text(text)
    shown = environment.cpu()
    assert (shown["model"], shown["governor"], shown["mhz"], shown["max_mhz"]) == ("A CPU @ 3 GHz", "performance", 3000, 4000)
    answers = {"nvidia-smi": "Orin, 540.4, P0, 1300, [N/A], 1300, 12.5, 40, 51, Enabled", "nvpmodel": "NV Power Mode: MAXN\n0"}
    monkeypatch.setattr(environment, "_command", lambda *command: answers.get(command[0]))
    assert environment.gpu()["temperature.gpu"] == "51" and environment.power_mode() == "MAXN"
    monkeypatch.setattr(environment, "_command", lambda *command: None)
    assert environment.gpu() is None and environment.power_mode() is None


@pytest.mark.slow
def test_two_benches_agree_and_a_model_does_not_beat_itself(tiny_export, tmp_path):
    """Real timings of a larger graph, so that a run takes milliseconds."""
    from exporter.graph.export import export
    from moee.artifacts.model import MoeeModel
    from moee.methods.recipe import Recipe, method_options
    from moee.models.model import load_model
    from tests.conftest import extract, tiny_images, tiny_spec

    spec = tiny_spec(embed_dim=192, num_heads=3, depth=6, img_size=64)
    model, config = load_model(spec), method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    extract(model, tiny_images(size=64), config)
    folder = tmp_path / "export"
    export(MoeeModel(model.eval(), spec, Recipe.of(config), "tiny"), folder)
    first, second = (bench(folder, 4, runs=80, threads=1, duration_s=5).verdict for _ in range(2))
    assert first.low <= second.high and second.low <= first.high
    for name in ("dense.onnx", "dense.data"):
        (folder / name.replace("dense.onnx", "portable.onnx")).write_bytes((folder / name).read_bytes())
    same = bench(folder, 4, runs=80, threads=1, duration_s=5).verdict
    assert same.winner is None, same.text


@pytest.mark.parametrize("load, said", [(3.1, "others were at work here (load 3.1 on 2 CPUs"), (2.0, "")])
def test_a_machine_that_others_load_is_said(load, said, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("moee.parallel.machine.usable_cpus", lambda: 2)
    found = bench_command._busy()
    assert found.startswith(said) and bool(found) == bool(said)
