"""The zoo's table covers the installed timm, its page shows the table, and a few of its models, whose kind people deploy, work.

The whole of it is `make test-zoo`.
"""

from pathlib import Path

import pytest
import timm
import torch

from tests.zoo.one import (
    REFUSED,
    UNEXPECTED,
    WORKS,
    WRONG,
    Command,
    Outcome,
    distance,
    overflows,
    run,
    write_images,
)
from tests.zoo.page import NOT_RUN, PAGE, page, row
from tests.zoo.table import ENTRIES, Entry

ROOT = Path(__file__).resolve().parent.parent.parent
OTHERS = {"torchvision", "transformers"}
FEW = (pytest.param("vit_base_patch16_siglip_224", marks=pytest.mark.slow), "regnety_002")


def test_every_family_of_timm_is_in_the_zoo():
    lacking = set(timm.list_modules()) - {entry.family for entry in ENTRIES}
    assert not lacking, f"timm has families that the zoo lacks: {', '.join(sorted(lacking))}; add a row to tests/zoo/table.py"
    gone = {entry.family for entry in ENTRIES} - set(timm.list_modules()) - OTHERS
    assert not gone, f"the zoo has families that timm lacks: {', '.join(sorted(gone))}"


@pytest.mark.parametrize("family", sorted({entry.family for entry in ENTRIES} - OTHERS))
def test_its_models_are_of_that_family(family):
    names = {entry.name.partition(".")[0] for entry in ENTRIES if entry.family == family}
    assert names <= set(timm.list_models(module=family))


def test_the_page_shows_every_model_and_none_is_wrong_or_unexpected():
    lines = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| family")]
    assert len(rows) == len(ENTRIES) == len({row(entry) for entry in ENTRIES}), "run make test-zoo"
    for entry in ENTRIES:
        (found,) = [line for line in rows if line.startswith(row(entry))]
        assert found.removeprefix(row(entry)).split("|")[0].strip() in (WORKS, REFUSED, NOT_RUN), found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("zoo") / "images")


@pytest.mark.parametrize("name", FEW)
def test_a_few_of_them(name, data, tmp_path):
    entry = next(entry for entry in ENTRIES if entry.name == name)
    outcome = run(entry, data, tmp_path)
    assert outcome.kind == (REFUSED if name == "regnety_002" else WORKS), outcome
    assert outcome.cut == (0 if name == "regnety_002" else 2) and outcome.half in ("", WORKS)


VIT = Entry("vision_transformer", "vit_tiny_patch16_224")


def commands(monkeypatch, codes, errors=""):
    """Commands that end with these codes, each in turn."""
    left = iter(codes)
    monkeypatch.setattr("tests.zoo.one.words", lambda entry, folder: [entry.name])
    monkeypatch.setattr("tests.zoo.one.command", lambda *argv: Command(next(left), errors, 1.0))


@pytest.mark.parametrize(
    ("codes", "errors", "kind"),
    [
        ((2,), "moee: vit has no MLP", REFUSED),
        ((2,), "", UNEXPECTED),  # no sentence
        ((2,), "moee: \x1b[96mstep 3/3", UNEXPECTED),
        ((2,), "Traceback (most recent call last)\nmoee: vit has no MLP", UNEXPECTED),
        ((1,), "moee: unexpected AssertionError: no", UNEXPECTED),
        ((3,), "moee: out of memory", UNEXPECTED),
        ((0, 2), "moee: cannot be exported", UNEXPECTED),  # after the work
        ((0, 0, 1), "", WRONG),
        ((0, 0, 2), "moee: not this model", UNEXPECTED),
    ],
)
def test_outcomes(codes, errors, kind, monkeypatch, tmp_path):
    commands(monkeypatch, codes, errors)
    assert run(VIT, tmp_path, tmp_path).kind == kind


def test_a_late_refusal_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.zoo.one.words", lambda entry, folder: [entry.name])
    monkeypatch.setattr("tests.zoo.one.command", lambda *argv: Command(2, "moee: no", 31.0))
    assert run(VIT, tmp_path, tmp_path).kind == UNEXPECTED
    monkeypatch.setattr("tests.zoo.one.command", lambda *argv: Command(2, "moee: no", 1.0))
    (tmp_path / "model").mkdir()
    assert run(VIT, tmp_path, tmp_path).kind == UNEXPECTED


def test_what_is_off_is_seen():
    wanted = torch.tensor([[1.0, -1.0]])
    assert distance(wanted, wanted + 0.01) == pytest.approx(0.01, rel=1e-3)
    assert distance(wanted, wanted[:, :1]) == distance(wanted, wanted * float("nan")) == float("inf")


def test_only_a_model_that_overflows_by_itself_is_excused():
    class Scaled(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(scale))

        def forward(self, x):
            return (x * self.scale * self.scale).mean((1, 2, 3))

    assert overflows(Scaled(1e4), (3, 8, 8))
    assert not overflows(Scaled(1.0), (3, 8, 8)) and not overflows(Scaled(float("nan")), (3, 8, 8))


def test_a_row_is_one_line():
    text = page({VIT: Outcome(WORKS, 1, 2, "a|b" * 200, "refused: no"), ENTRIES[0]: Outcome(REFUSED, reason="no MLP")})
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2 and all(line.replace("\\|", "").count("|") == 8 for line in rows)
