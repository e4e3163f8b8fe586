"""`moee compress`: one command from a model and images to a bundle within a budget and a time."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from exporter import cli
from exporter.compression import job
from exporter.compression.announcement import allowance
from exporter.compression.clock import Clock, Trials, duration, images_within, remaining, seconds_of
from exporter.compression.job import Job
from exporter.compression.request import ALLOCATION, BASE, METHODS, Request, every_method, possible_heads, widened
from exporter.compression.tuning import epochs_within, too_short, within
from exporter.compression.verdicts import choice_line
from exporter.deploy.run import main as run_main
from exporter.deploy.run import opened
from exporter.timing.latency import bench
from moee.artifacts import checkpoint
from moee.data.transform import decoded
from moee.errors import BudgetUnmet, StepFailed, UserError
from moee.models.model import ModelSpec, build_model
from moee.places.staged_folder import StagedFolder
from moee.planning.budget import COST_TOLERANCE, Budget
from moee.planning.plan import make_plan
from moee.planning.search import variants
from moee.stages.session import Session
from moee.store.tensor_file import write_tensors
from tests.conftest import TINY, teach, tiny_images, tiny_spec

FAST = dict(methods=("static",), heads=(1.0,), batch=4)


class Faked:
    """Time that passes when it is told to."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


@pytest.mark.parametrize("trial_s, last", [(None, 60), (0.5, 16), (3.0, 36), (6.0, 60), (40.0, 60)])
def test_the_last_stages_of_a_small_model_are_short(trial_s, last):
    clock = Clock(60.0, Faked(), trial_s=trial_s)
    assert clock.finish == pytest.approx(last) and clock.trials_end <= 60 - last


def test_trials_end_when_one_more_would_not_fit():
    now = Faked()
    clock = Clock(600.0, now)
    said, begun = [], []
    trials = Trials(clock, said.append)
    while not trials(fresh=not begun):
        now.time += 40.0 if begun else 130.0  # the first one's way had to be prepared
        begun.append(now.time)
    assert now.time <= clock.trials_end == pytest.approx(0.7 * 540)
    assert begun[-1] + 40 * 1.1 > clock.trials_end, "and no sooner"
    assert said == ["the first trial took 2 min 10 s; 4 min 8 s are left for others"]
    assert remaining(-3.0) == remaining(0.4) == "no time is left"
    assert trials.expected(fresh=True) == 130.0 and trials.expected(fresh=False) == 40.0


def test_a_trial_that_does_not_fit_leaves_a_shorter_one_its_time():
    now, said = Faked(), []
    trials = Trials(Clock(600.0, now), said.append)
    for seconds, fresh in ((150.0, True), (40.0, False), (90.0, True)):
        assert not trials(fresh)
        now.time += seconds
    assert trials(fresh=True) and trials(fresh=True), "98 of 120 seconds are left"
    assert not trials(fresh=False)
    now.time += 40.0
    assert trials.expected(fresh=False) == 40.0 and trials.expected(fresh=True) == 120.0 and len(said) == 1


def test_preparation_is_not_counted_for_the_next_trial():
    now = Faked()
    trials = Trials(Clock(600.0, now), lambda sentence: None)
    trials(fresh=True)
    now.time += 90.0
    trials.ready()
    now.time += 40.0
    trials(fresh=False)
    assert trials.expected(fresh=False) == 40.0 and trials.expected(fresh=True) == 130.0


def test_a_job_that_will_take_longer_says_so_when_its_first_trial_shows_it():
    now, said = Faked(), []
    clock = Clock(600.0, now)
    trials = Trials(clock, said.append)
    trials(fresh=True)
    now.time += 300.0
    assert clock.overrun == ""
    now.time += 700.0
    trials.ready()
    late = "this takes longer than the 10 min that it was given: about 17 min 40 s in all"
    assert said == [f"the first trial is slower than the dense model's speed had promised; {late}"] and clock.overrun == late
    trials.ready()
    assert len(said) == 1 and Clock(None, now).overrun == ""
    short = Trials(Clock(50.0, now), said.append)  # the last stages alone take longer: nothing was promised
    short(fresh=True)
    short.ready()
    assert said[1:] == ["this takes longer than the 50 s that it was given: about 60 s in all"]


def test_trials_get_the_time_of_a_tuning_that_no_longer_fits():
    now = Faked()
    clock = Clock(600.0, now, image_s=0.05, held_out=20, training=180)
    whole = 600 - 60 - 8
    assert clock.tunes and clock.trials_end == pytest.approx(0.7 * whole)
    now.time = whole - 100.0
    assert clock.trials_end == pytest.approx(whole) and not epochs_within(clock)
    assert too_short(clock) == f"1 min 40 s were left, and 2 epochs take about {duration(clock.least_tuning)}"
    now.time = 600.0
    assert too_short(clock).startswith("no time was left, and 2 epochs")


@pytest.mark.parametrize("drop, labelled, said", [(1, 80, "1.25 points of accuracy, so none may be lost"),
                                                  (1, 200, "0.5 points of accuracy, so 2 may be lost"),
                                                  (1, 719, ""), (None, 80, ""), (1, 0, "")])  # fmt: skip
def test_what_a_drop_is_in_images(drop, labelled, said):
    found = allowance(Budget(max_drop=drop) if drop else Budget(min_cosine=0.9), labelled)
    assert said in found and bool(said) == bool(found)


def test_tuning_gets_what_is_left_and_none_where_few_epochs_fit():
    now = Faked()
    clock = Clock(600.0, now, image_s=0.05, held_out=100, training=100)
    assert clock.tunes and clock.trials_end == pytest.approx(0.7 * (600 - 60 - 8 * 5))
    now.time = 300.0
    assert clock.tuning == pytest.approx(300 - 60 - 8 * 5)
    assert epochs_within(clock) == 5, "after the trial of the learning rate"
    now.time = 420.0
    assert epochs_within(clock) == 0, "one would fit"
    many = Clock(600.0, now, image_s=0.05, held_out=100, training=1000)
    assert not many.tunes and many.trials_end == pytest.approx(600 - 60 - 8 * 5), "trials get all of the time"
    assert epochs_within(Clock(None, now, image_s=0.05, training=10**6)) == 10


def test_a_report_shows_as_many_images_as_the_time_allows():
    now = Faked()
    assert images_within(Clock(None, now, image_s=9.0, held_out=1000)) == 400
    clock = Clock(600.0, now, image_s=0.5, held_out=1000)
    assert images_within(clock) == 200, "half of the time, three passes of half a second an image"
    now.time += 560
    assert images_within(clock) == 0, "thirteen images say nothing"
    assert images_within(Clock(0.0, now, image_s=0.0, held_out=7)) == 7


@pytest.mark.parametrize(("text", "seconds"), [("15m", 900), ("900", 900), ("90s", 90), ("1.5h", 5400), ("2 h", 7200)])
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "ten", "5d", "-", "1e", "m5"])
def test_no_times(text):
    with pytest.raises(ValueError):
        seconds_of(text)


@pytest.mark.parametrize(("seconds", "text"), [(75, "75 s"), (200, "3 min 20 s"), (180, "3 min"), (7320, "2 h 2 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--target-macs", "0.7"], "give --max-drop, --min-cosine or --target-latency-ms"),
        (["--time", "5"], "expected a time such as 15m"),
        (["--time", "soon"], "expected a time such as 15m"),
        (["--time", "59s"], "from 1m to 168h"),
        (["--device", "toaster"], "unknown device 'toaster'; expected one of cpu, cuda, tensorrt, ssh:HOST"),
        (["--sm", "toaster"], "unknown device 'toaster'"),
        (["--device", "cuda"], "say it with --sm"),
        (["--device", "ssh:jetson"], "say it with --sm"),
        (["--methods", "static, magic"], "unknown method magic; expected"),
        (["--attention-macs", "2"], "expected shares of the MACs between 0 and 1, or 1"),
        (["--max-drop", "-1"], "--max-drop"),
    ],
)
def test_bad_input_is_refused_at_once(line, said, tmp_path, capsys):
    words = ["compress", "test_vit", "--random-weights", "0", "--data", "digits", "--out", str(tmp_path / "out"), *line]
    try:
        code = cli.main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_line_asks_for_what_it_says(tmp_path, monkeypatch):
    asked = []

    def made(session, place, request, *args, **kwargs):
        asked.append(request)
        return SimpleNamespace(run=lambda: SimpleNamespace(lines=()))

    monkeypatch.setattr(job, "Job", made)
    monkeypatch.setattr("exporter.commands.models.compress.session_of", lambda *args: SimpleNamespace(spec=tiny_spec()))
    words = "--max-drop 1 --device rtx-4090 --batch 4 --time 2m --methods static --attention-macs 1,0.7 --token-macs 1,0.8"
    line = ["compress", "tiny", "--data", "digits", "--out", str(tmp_path / "out")]
    assert cli.main([*line, *words.split(), "--confirm", "more"]) == 0 and cli.main(line) == 0
    assert cli.main([*line, "--methods", "all"]) == 0
    every = asked.pop().methods
    assert every[:3] == METHODS and sorted(every) == sorted(variants()), "every way once, the usual ones first"
    assert asked == [
        Request(Budget(max_drop=1), "rtx-4090", 89, 4, 120.0, ("static",), (1.0, 0.7), tokens=(1.0, 0.8), confirm="more"),
        Request(),
    ]  # fmt: skip


@pytest.fixture
def session(monkeypatch, tmp_path):
    """A taught tiny classifier with its images."""
    train, held = tiny_images(40, classes=10), tiny_images(30, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (train, held))
    model = teach(build_model(tiny_spec()).eval(), train)
    weights = tmp_path / "weights.safetensors"
    write_tensors(model.state_dict(), weights)
    spec = ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, weights=str(weights))
    return Session(spec, "tiny")


@pytest.fixture
def quick(monkeypatch):
    """Timings of a few runs, in which ours is twice as fast."""

    def timed(folder, batch, **options):
        result = bench(folder, batch, runs=2, images=options["images"])
        return result

    monkeypatch.setattr("exporter.compression.job.bench", timed)
    monkeypatch.setattr("exporter.compression.job.target_of", lambda *args, **kwargs: SimpleNamespace(timing=lambda *args: None))
    monkeypatch.setattr(job, "slower", lambda *args: "")


def test_a_report_says_that_there_was_no_time_for_examples(session, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.compression.job.images_within", lambda clock: 0)
    result = Job(session, StagedFolder(tmp_path / "out"), Request(Budget(min_cosine=0.9), time_s=None, **FAST)).run()
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"There was no time for examples. moee plots {tmp_path / 'out' / result.part} --out plots makes them." in page
    assert result.part in ("extracted", "tuned") and "Examples (examples.json)" not in page


def test_it_ships_what_meets_the_budget_and_says_so(session, quick, tmp_path, monkeypatch):
    said = []
    out = tmp_path / "out"
    monkeypatch.setattr("moee.stages.confirmation.load_data", lambda *args, **kwargs: tiny_images(70, classes=10))
    asked = Request(Budget(min_cosine=0.9), time_s=None, confirm="more", **FAST)
    job = Job(session, StagedFolder(out), asked, say=said.append)
    result = job.run()
    assert result.shipped == "static" and [line.partition(":")[0] for line in result.lines] == [
        "accuracy", "speed", "size", "chosen", "bundle"
    ]  # fmt: skip
    state = json.loads((out / "compress.json").read_text())
    assert "; on 30 images of more that nothing was chosen by: 100.00%, dense 100.00% (drop 0.00 points" in result.lines[0]
    assert state["stages"]["confirm"]["retention"]["images"] == 30, "40 were trained on"
    assert state["done"] and state["result"]["lines"] == list(result.lines)
    assert {path.name for path in out.iterdir()} >= {"plan", "extracted", "export", "verify", "bundle", "report.html"}
    assert not list(out.glob("*.resume"))
    shown = json.loads((out / "examples.json").read_text())
    assert shown["images"] == 30 and len(shown["classes"]["rows"]) == 10
    assert "Accuracy of each class" in (out / "report.html").read_text()
    with pytest.raises(UserError, match="exists"):
        StagedFolder(out).check()
    shipped = checkpoint.load(out / state["result"]["model"])
    assert shipped.info["layers"] and "on the CPU" not in result.lines[0]
    # the bundle's own script gives the model's class, and refuses a changed file
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8))
    image.save(tmp_path / "image.png")
    ran = subprocess.run([sys.executable, out / "bundle" / "run.py", tmp_path / "image.png"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    from moee.data.transform import evaluation

    with torch.inference_mode():
        best = int(shipped.model(evaluation(session.transform)(image)[None]).argmax())
    assert f": {best} (" in ran.stdout, "its class is called by its number"
    closed = subprocess.run(
        f"{sys.executable} {out / 'bundle' / 'run.py'} {tmp_path / 'image.png'} {tmp_path / 'image.png'} | true", shell=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert closed.stderr == "", "a reader that goes away is no error"
    (out / "bundle" / "models" / "preprocess.txt").write_text("size 1 1\n")
    ran = subprocess.run([sys.executable, out / "bundle" / "run.py", tmp_path / "image.png"], capture_output=True, text=True)
    assert ran.returncode == 1 and "preprocess.txt is missing or was changed" in ran.stderr
    (out / "bundle" / "SHA256SUMS").unlink()
    ran = subprocess.run([sys.executable, out / "bundle" / "run.py", tmp_path / "image.png"], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr == "SHA256SUMS is missing or was changed; copy the bundle again\n"


@pytest.mark.slow
def test_no_method_beats_what_all_of_them_choose_by_more_than_two_thousandths(tmp_path, monkeypatch):
    """Successive halving of every way, held against every way made at the cost of what it chose."""
    splits = tiny_images(30, classes=10), tiny_images(20, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: splits)
    session = Session(tiny_spec(depth=1, num_classes=0), "tiny")

    class Never:
        def __call__(self, fresh):
            return False

        def ready(self):
            pass

    asked = dict(methods=every_method(), allocations=ALLOCATION, base={**BASE, "cluster_tokens": 400})
    chosen = make_plan(session, Budget(min_cosine=0.97), tmp_path / "raced", over=Never(), **asked)["winner"]
    made = make_plan(session, Budget(target_macs=chosen["macs"]), tmp_path / "all", **asked)
    others = {p["method"]: p["cosine"] for p in made["points"] if p["macs"] <= chosen["macs"] + COST_TOLERANCE}
    assert chosen["cosine"] >= 0.97 and len(others) >= 3, "the others cannot be made at this cost"
    assert max(others.values()) <= chosen["cosine"] + 0.002, f"{chosen['method']} {chosen['macs']}: {others}"


def test_a_budget_that_any_model_would_keep_is_refused_before_anything_is_written(session, tmp_path):
    with pytest.raises(UserError, match=r"--max-drop 90 limits nothing: .* one class for all is right on 10.00%"):
        Job(session, StagedFolder(tmp_path / "out"), Request(Budget(max_drop=90), time_s=None, **FAST)).run()
    assert not (tmp_path / "out" / "plan").exists() and not (tmp_path / "out" / "compress.json").exists()


@pytest.mark.parametrize("levels", [np.uint16, np.int32])
def test_the_bundles_script_scales_16_bit_grey_as_the_model_was_measured(levels, session, tmp_path):
    grey = np.arange(4000).reshape(50, 80).astype(levels) * 16
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    ours, theirs = np.asarray(opened(str(tmp_path / "grey.tif"))), decoded(str(tmp_path / "grey.tif"), session.transform)
    assert ours.max() == 249 and np.array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("content", [None, b"text", np.full((4, 4), 0.5, np.float32)])
def test_the_bundles_script_names_a_file_that_is_no_image_and_goes_on(content, tmp_path, monkeypatch, capsys):
    path, image = tmp_path / "given.tif", tmp_path / "image.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        Image.fromarray(content).save(path)
    Image.new("RGB", (8, 8)).save(image)
    size, colours = ["8", "8"], {"mean": ["0"] * 3, "std": ["1"] * 3}
    recipe = {"size": size, "resize": size, "crop": ["center"], "filter": ["bicubic"], **colours}
    monkeypatch.setattr("exporter.deploy.run.check_files", lambda: None)
    monkeypatch.setattr("exporter.deploy.run.load", lambda: (None, "portable.onnx", recipe, ["cat"], True))
    monkeypatch.setattr("exporter.deploy.run.tells_classes", lambda: True)
    monkeypatch.setattr("exporter.deploy.run.run", lambda *args: np.zeros((1, 1), np.float32))
    assert run_main([str(path), str(image)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{image}: cat (100.0%)\n" and f"{path} cannot be read as an image" in err


def test_an_interrupted_job_goes_on_where_it_was(session, quick, tmp_path, monkeypatch):
    out = tmp_path / "out"
    request = Request(Budget(min_cosine=0.9), time_s=None, **FAST)
    monkeypatch.setattr(session, "trial_seconds", 2.5)
    for stage in ("make_plan", "run_extract", "run_finetune", "export", "verify", "write_cpu_bundle", "write_report"):
        with monkeypatch.context() as patch:
            patch.setattr(f"exporter.compression.job.{stage}", interrupted)
            with pytest.raises(KeyboardInterrupt) as raised:
                Job(session, StagedFolder(out), request).run()
            assert "it goes on from what is in" in raised.value.__notes__[0]
        assert not json.loads((out / "compress.json").read_text())["done"]
    monkeypatch.setattr("exporter.compression.job.make_plan", interrupted)
    monkeypatch.setattr("exporter.compression.job.run_extract", interrupted)
    monkeypatch.setattr(session, "trial_seconds", None)
    last = Job(session, StagedFolder(out), request)
    assert last.run().shipped == "static", "what is done is not done again"
    assert last.clock.trial_s == 2.5, "and the time of the last stages is estimated as before"


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_another_request_does_not_go_on_from_it(session, quick, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("exporter.compression.job.make_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Job(session, StagedFolder(out), Request(Budget(min_cosine=0.9), time_s=None, **FAST)).run()
    before = (out / "compress.json").read_text()
    with pytest.raises(UserError, match=r"holds a compression with budget.min_cosine 0.9, now 0.8"):
        Job(session, StagedFolder(out), Request(Budget(min_cosine=0.8), time_s=None, **FAST)).run()
    assert (out / "compress.json").read_text() == before


def test_nothing_faster_ships_the_dense_model(session, quick, tmp_path, monkeypatch):
    said = "the timing at the end says: dense is faster: 0.9x"
    monkeypatch.setattr(job, "slower", lambda latencies, *_: said if latencies else "")
    out = tmp_path / "out"
    result = Job(session, StagedFolder(out), Request(Budget(min_cosine=0.9), time_s=None, **FAST)).run()
    assert result.shipped == "dense"
    assert "the dense model, since the timing at the end says: dense is faster: 0.9x" in result.lines[3]
    assert (out / "extracted").is_dir(), "it is kept beside"
    manifest = json.loads((out / "export" / "export.json").read_text())
    assert manifest["routed_layers"] == [] and manifest["source"] is None
    assert json.loads((out / "verify" / "parity.json").read_text())["passed"]


def test_a_budget_that_nothing_meets_names_the_nearest(session, quick, tmp_path, monkeypatch):
    fake = {"kind": "measured on CPU", "device": "cpu", "batch": 4, "dense_ms": 2.0, "moee_ms": 1.0, "speedup": 2.0}
    from moee.planning.forms import Latency

    timing = Latency("cpu", lambda model: fake)
    monkeypatch.setattr("exporter.compression.job.target_of", lambda *_, **kwargs: SimpleNamespace(timing=lambda *_: timing))
    with pytest.raises(BudgetUnmet, match="nothing meets the budget; nearest is static"):
        Job(session, StagedFolder(tmp_path / "out"), Request(Budget(target_latency_ms=0.5), time_s=None, **FAST)).run()
    assert not (tmp_path / "out" / "plan").exists() and (tmp_path / "out" / "plan.resume").is_dir()


def test_what_does_not_verify_is_not_bundled(session, quick, tmp_path, monkeypatch):
    from exporter.compression import job

    def failing(*args, **kwargs):
        result = verify(*args, **kwargs)
        object.__setattr__(result, "dense_failure", "broken")
        return result

    verify = job.verify
    monkeypatch.setattr(job, "verify", failing)
    with pytest.raises(StepFailed, match="does not verify"):
        Job(session, StagedFolder(tmp_path / "out"), Request(Budget(min_cosine=0.9), time_s=None, **FAST)).run()
    assert not (tmp_path / "out" / "bundle").exists() and (tmp_path / "out" / "verify" / "junit.xml").is_file()


def test_heads_that_cannot_be_narrowed_are_left_out(session):
    assert possible_heads(session, (1.0, 0.75)) [0] in ((1.0,), (1.0, 0.75))
    kept, why = possible_heads(session, (0.01,))
    assert kept == (1.0,) and "--attention-macs" in why


def test_the_line_of_the_choice_says_how_many_were_tried():
    def point(method, share, recipe):
        return {"method": method, "attention": share, "recipe": recipe, "allocation": ""}

    static, experts = point("static", 1.0, {"a": 1}), point("kmeans-8", 0.75, {"b": 1})
    dense = point("dense", 1.0, None)
    plan, budget = {"points": [static, experts, dense], "left_out": 3}, Budget(min_cosine=0.98)
    line = choice_line(plan, experts, budget, tuned=", tuned for 2 epochs")
    assert "experts (kmeans-8) beside 75% of the attention's MACs, tuned for 2 epochs" in line
    assert line.endswith("the best of 2 candidates with a cosine of at least 0.98. No time was left for 3 further trials")
    passed = {**plan, "winner": experts, "passed_over": [static]}
    said = "the best of 2 candidates (static pruning measured faster, but within the noise) with"
    assert said in choice_line(passed, experts, budget)
    assert "noise" not in choice_line({**passed, "winner": static}, experts, budget), "said of the plan's own winner alone"
    assert "none of 2 candidates is faster" in choice_line(plan, dense, budget)
    within_limit = choice_line(plan, dense, Budget(target_latency_ms=9))
    assert "the dense model: it keeps to at most 9 ms a batch itself" in within_limit
    nothing = {"points": [dense], "obstacle": "no MLP is faster than dense"}
    line = choice_line(nothing, dense, Budget(min_cosine=0.9))
    assert line.endswith("no candidate could be made: no MLP is faster than dense")
    alone = choice_line({**plan, "points": [experts, dense]}, experts, budget)
    assert "the one candidate with a cosine of at least 0.98. No time was left for 3 further trials" in alone
    assert "chosen: low-rank maps: " in choice_line(plan, point("lowrank", 1.0, {"c": 1}), budget), "which hold no experts"
    assert "the one candidate is not faster with" in choice_line({**plan, "points": [experts, dense]}, dense, budget)


def test_the_line_of_the_choice_names_what_was_never_tried():
    point = {"method": "static", "attention": 1.0, "recipe": {"a": 1}, "allocation": ""}
    untried = [{"method": name, "allocation": "", "attention": 0.75, "tokens": 1.0} for name in ("static", "tokens")]
    plan = {"points": [point], "left_out": 9, "untried": untried[:1]}
    line = choice_line(plan, point, Budget(min_cosine=0.98))
    assert ". No time was left for 9 further trials; not tried at all: static pruning beside 75% of the attention's MACs" in line
    once = choice_line({**plan, "left_out": 1, "untried": []}, point, Budget(min_cosine=0.98))
    assert once.endswith("0.98. No time was left for 1 further trial")
    line = choice_line({**plan, "untried": untried}, point, Budget(min_cosine=0.98))
    assert line.endswith("attention's MACs, merged tokens beside 75% of the attention's MACs")
    many = [{**untried[0], "method": f"kmeans-{n}"} for n in range(9)]
    line = choice_line({**plan, "untried": many}, point, Budget(min_cosine=0.98))
    assert line.endswith(", experts (kmeans-3) beside 75% of the attention's MACs, and 5 more ways")


def kept(accuracy, cosine):
    return {"accuracy": accuracy, "dense_accuracy": 0.8, "class_cosine": cosine}


def test_what_was_not_measured_keeps_to_no_limit():
    budget = Budget(max_drop=1.0, min_cosine=0.95)
    assert within(budget, kept(0.79, 0.96)) and not within(budget, kept(0.78, 0.96)) and not within(budget, kept(0.8, 0.94))
    assert not within(budget, kept(None, 0.99)) and not within(budget, kept(0.8, float("nan")))
    assert within(Budget(min_cosine=0.95), kept(None, 0.95))


def test_trials_may_miss_what_tuning_brings_back():
    wide = widened(Budget(max_drop=1.0, min_cosine=0.96))
    assert wide.max_drop == 3.0 and wide.min_cosine == pytest.approx(0.95)
    assert widened(Budget(target_latency_ms=3.0)) is None


@pytest.mark.parametrize("learned", [True, False])
def test_a_candidate_beyond_the_budget_is_shipped_only_if_tuning_brings_it_within(session, quick, tmp_path, monkeypatch, learned):
    """The fastest point misses the cosine until it is tuned; the winner within the budget is another one."""
    def tuned(path, config, out, **options):
        moee = checkpoint.load(path)
        stage = moee.info["stages"]["extracted"]
        cosine = 1.0 if learned else stage["retention"]["class_cosine"]
        moee.info["stages"]["tuned"] = {**stage, "best_epoch": 1, "retention": {**stage["retention"], "class_cosine": cosine}}
        checkpoint.save(moee, out, force=True)
        return moee

    monkeypatch.setattr("exporter.compression.job.run_finetune", tuned)
    strict = 0.99999
    request = Request(Budget(min_cosine=strict), time_s=None, **FAST)
    monkeypatch.setattr("exporter.compression.job.widened", lambda budget: Budget(min_cosine=0.5))
    job = Job(session, StagedFolder(tmp_path / "out"), request)
    result = job.run()
    plan = json.loads((tmp_path / "out" / "plan" / "plan.json").read_text())
    state = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert plan["ambitious"]["recipe"] != plan["winner"]["recipe"] and plan["ambitious"]["cosine"] < strict
    assert ("fallback" in state["stages"]) is not learned
    assert plan["winner"]["recipe"] is None and (tmp_path / "out" / "tuned").exists() is learned, "nothing of what did not do"
    assert state["result"]["model"] == ("tuned" if learned or plan["winner"]["recipe"] else "dense")
    assert result.shipped == (plan["ambitious"] if learned else plan["winner"])["method"]
