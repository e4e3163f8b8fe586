"""Two runs that would go on from one state: the second one is refused before any work, and the first one's state is left
alone."""

import subprocess
import sys

import pytest

import moee
from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.methods.recipe import method_options
from moee.places.resume import alone_on
from moee.planning.budget import Budget
from moee.planning.plan import make_plan
from moee.stages.extract import run_extract
from moee.stages.finetune import run_finetune
from moee.stages.session import Session
from tests.conftest import tiny_images, tiny_spec

KMEANS = dict(clustering="kmeans", clusters=3, cluster_tokens=300)


@pytest.fixture
def work(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    splits = tiny_images(24, classes=10), tiny_images(24, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: splits)
    return tmp_path


def test_a_second_fine_tuning_on_a_place_is_refused_while_the_first_one_lives(work, monkeypatch):
    run_extract(tiny_spec(), "digits", method_options(**KMEANS), work / "model")
    config, out = FinetuneConfig(epochs=1, batch_size=8), work / "tuned"
    with alone_on(work / "tuned.resume"):
        with pytest.raises(UserError, match="another run is working on .*tuned at this moment; wait for it, or choose"):
            run_finetune(work / "model", config, out)
        with pytest.raises(UserError, match="another run is working on .*tuned at this moment"):
            moee.finetune(moee.load(work / "model"), "digits", out=out, epochs=1)
        with pytest.raises(UserError, match="another run"):  # by another path to the same place
            run_finetune(work / "model", config, work / "cache" / ".." / "tuned")
        run_finetune(work / "model", config, work / "other")
    run_finetune(work / "model", config, out)
    assert (out / "moee.json").is_file() and not (work / "tuned.resume").exists()


def test_a_second_plan_on_a_place_is_refused(work):
    session = Session(tiny_spec(), "digits")
    with alone_on(work / "plan.resume"), pytest.raises(UserError, match="another run is working on .*plan at this moment"):
        make_plan(session, Budget(min_cosine=0.1), work / "plan", methods=("static",), targets=(0.8,))
    assert not (work / "plan.resume").exists()


def test_the_lock_ends_with_its_process(work):
    place = work / "tuned.resume"
    code = f"from pathlib import Path; from moee.places.resume import alone_on; import os\n\
with alone_on(Path({str(place)!r})): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    with alone_on(place), pytest.raises(UserError, match="another run"), alone_on(place):
        pass
    with alone_on(place), alone_on(place, leader=False):  # other ranks of the same run
        pass


def test_a_cache_that_cannot_be_written_to_locks_nothing(work, monkeypatch):
    (work / "file").write_text("no folder")
    monkeypatch.setenv("MOEE_CACHE", str(work / "file"))
    with alone_on(work / "tuned.resume"), alone_on(work / "tuned.resume"):
        entered = True
    assert entered, "a lock that cannot be kept keeps nobody out"
