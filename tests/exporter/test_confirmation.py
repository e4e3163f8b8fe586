"""Images that confirm a choice are new ones."""

from types import SimpleNamespace

import pytest
import torch

from exporter.compression import job
from exporter.compression.request import Request
from exporter.compression.state import State
from exporter.compression.verdicts import confirmed_by
from moee.data.image_set import Division, TensorSet
from moee.errors import UserError
from moee.models.model import load_model
from moee.places.staged_folder import StagedFolder
from moee.stages import confirmation
from moee.stages.confirmation import confirmed, fresh_images
from moee.stages.session import Session
from tests.conftest import teach, tiny_images, tiny_spec


@pytest.fixture
def session(monkeypatch):
    """Of 48 images, of which the last 12 are held out, and a dense model that tells them apart."""
    images = tiny_images(48, classes=10)
    parts = [TensorSet("tiny", images.images[rows], images.labels[rows], 10) for rows in (slice(36), slice(36, 48))]
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: parts)
    made = Session(tiny_spec(), "tiny")
    teach(made.dense, images)
    return made


def other_images(count, division=None):
    generator = torch.Generator().manual_seed(5)
    old = tiny_images(48, classes=10)
    images = torch.cat([old.images[:3], old.images[40:42], torch.randn(count, 3, 32, 32, generator=generator)])
    found = TensorSet("other", torch.cat([images, images[-1:]]), [i % 10 for i in range(len(images) + 1)], 10)
    found.division = division
    return found


def test_images_that_were_seen_before_and_copies_are_left_out(session, monkeypatch):
    monkeypatch.setattr(confirmation, "load_data", lambda *args, **kwargs: other_images(7))
    (found,) = fresh_images(session, "other")
    assert found.positions == list(range(5, 12)) and len(found) == 7


def test_all_of_a_source_without_splits_is_taken_once(session, monkeypatch):
    asked = []

    def load(source, transform, split, **kwargs):
        asked.append(split)
        return other_images(7, Division(12)) if split == "val" else other_images(9)

    monkeypatch.setattr(confirmation, "load_data", load)
    found = fresh_images(session, "other")
    assert asked == ["val", "train"] and sum(map(len, found)) == 9  # the same generator: seven of the nine are the same images


def test_too_many_are_spread_over_the_source(session, monkeypatch):
    monkeypatch.setattr(confirmation, "load_data", lambda *args, **kwargs: other_images(40))
    monkeypatch.setattr(confirmation, "MOST", 10)
    (found,) = fresh_images(session, "other")
    assert len(found) == 10 and found.positions == sorted(set(found.positions)) and found.positions[-1] > 38


def test_nothing_new_confirms_nothing(session, monkeypatch):
    monkeypatch.setattr(confirmation, "load_data", lambda *args, **kwargs: session.held_out)
    with pytest.raises(UserError, match="none of the 12 images of tiny is new"):
        fresh_images(session, "tiny")


def test_the_dense_model_confirms_itself(session, monkeypatch):
    monkeypatch.setattr(confirmation, "load_data", lambda *args, **kwargs: other_images(30))
    found = confirmed(session, load_model(tiny_spec()), None, fresh_images(session, "other"), "other")
    assert found["data"] == "other" and found["retention"]["images"] == 30 and found["retention"]["class_cosine"] < 0.99
    same = confirmed(session, session.dense, None, fresh_images(session, "other"), "other")
    assert same["retention"]["class_cosine"] == pytest.approx(1) and same["retention"]["top1_agreement"] == 1


def test_a_resumed_job_confirms_again_by_images_that_are_others_now(session, tmp_path, monkeypatch):
    """The folder's name and its labels are the same; a run that names no images has no figure of theirs."""
    asked = []

    def measured(session, model, probe, images, source):
        asked.append(images)
        return {"data": source, "retention": {"class_cosine": len(asked)}}

    monkeypatch.setattr(job, "confirmed", measured)

    def confirmation(fresh, source="more"):
        made = job.Job(session, StagedFolder(tmp_path / "out"), Request(confirm=source))
        made.fresh = [TensorSet("more", fresh, [0, 1], 10)]
        state = State(made.place, {"a": 1})
        state.open()
        found = made._confirm(state, "extracted", SimpleNamespace(model=None, probe=None))
        return found and found["retention"]["class_cosine"]

    first, other = torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
    assert [confirmation(first), confirmation(first), confirmation(other), confirmation(other)] == [1, 1, 2, 2]
    assert confirmation(other, source=None) is None


def test_the_line_counts_labelled_images_and_says_what_the_budget_does_not_allow():
    kept = {
        "images": 100, "labelled": 20, "class_cosine": 0.99, "dense_accuracy": 0.85, "accuracy": 0.80,
        "drop_interval_pp": [0.0, 15.0],
    }  # fmt: skip
    line = confirmed_by({"data": "new", "retention": kept}, 2.0, 1.0)
    assert line == (
        "; on 20 images of new that nothing was chosen by: 80.00%, dense 85.00% (drop 5.00 points, 95 % interval 0.00 to 15.00, "
        "3.00 worse than where it was chosen, more than the 1 of the budget); cosine 0.9900"
    )
    assert "20 " not in confirmed_by({"data": "new", "retention": {**kept, "accuracy": None}})
