"""Whether accuracy can be compared, its interval, and probes of two classes, of gaps in the numbering and of absent classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from moee.data.class_names import Labels
from moee.data.validation import Part
from moee.errors import UserError
from moee.measure.accuracy import CHANCE_P, NO_ANSWER, agreement, comparison, paired_drop, recorded_interval, top1, wilson
from moee.measure.evaluation import Outputs, retention
from moee.measure.metrics import mean_cosine
from moee.measure.probe import fit_probe
from moee.methods.recipe import method_options
from moee.models.model import ModelSpec
from moee.planning.budget import Budget, Point, choose, pareto
from moee.planning.plan import make_plan
from moee.stages.extract import run_extract
from moee.stages.session import Session
from tests.conftest import TINY, teach, tiny_images, tiny_spec


def scores(answers, classes):
    """Logits [N, classes] whose largest is at `answers`."""
    return torch.nn.functional.one_hot(torch.tensor(answers), classes).float()


labelled = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.just(k),
        st.lists(st.tuples(st.integers(-1, k - 1), st.integers(0, k - 1)), min_size=1, max_size=60),
    )
)


@given(labelled)
def test_a_comparison_is_allowed_only_above_chance(case):
    classes, rows = case
    labels, answers = [r[0] for r in rows], [r[1] for r in rows]
    found = comparison(labels, classes, classes, "data", logits=scores(answers, classes))
    known = [(label, answer) for label, answer in rows if label >= 0]
    assert (found.images, found.labelled) == (len(rows), len(known))
    if not known:
        assert found.reason == "data has no labels of two classes or more"
        return
    hits = sum(label == answer for label, answer in known)
    guess = max(np.bincount([label for label, _ in known])) / len(known)
    above = binomtest(hits, len(known), guess, alternative="greater").pvalue < CHANCE_P
    assert bool(found) == above == (found.reason == "")
    if found:
        assert found.dense == wilson(hits, len(known))


@given(labelled, st.randoms())
def test_order_names_and_unlabelled_images_do_not_matter(case, random):
    classes, rows = case
    names = list(range(classes))
    random.shuffle(names)
    shuffled = [(names[label] if label >= 0 else -1, names[answer]) for label, answer in rows]
    random.shuffle(shuffled)

    def verdict(rows):
        found = comparison([r[0] for r in rows], classes, classes, "data", logits=scores([r[1] for r in rows], classes))
        return bool(found), found.dense

    assert verdict(rows) == verdict(shuffled) == verdict([*rows, (-1, 0)])


@given(labelled)
def test_a_constant_answer_is_never_good_enough(case):
    classes, rows = case
    labels = [r[0] for r in rows]
    for constant in range(classes):
        assert not comparison(labels, classes, classes, "data", logits=scores([constant] * len(rows), classes))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_a_share(case):
    hits, count = case
    found = wilson(hits, count)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    exact = binomtest(hits, count).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize(
    "labels, classes, told, reason",
    [
        ([-1] * 40, 0, 10, "data has no labels of two classes or more"),
        ([-1] * 40, 4, 4, "data has no labels of two classes or more"),
        ([0, 1] * 20, 2, 0, "the model has neither a classifier nor a probe"),
        ([0, 1] * 20, 2, 1, "the model's head gives one number an image, which names no class"),
        ([0, 1] * 20, 2, 1000, "the model tells 1000 classes apart, data has 2"),
        ([3, 7] * 20, 2, 2, "the model tells 2 classes apart, data has 8"),
        ([1] * 40, 2, 2, "the 40 labelled images from data are all of one class, so that a constant answer is always right"),
        ([0, 1, 0], 2, 2, "data has 3 labelled images, too few to tell any model from a guess"),
    ],
)  # fmt: skip
def test_what_is_known_before_anything_has_run(labels, classes, told, reason):
    assert comparison(labels, classes, told, "data").reason == reason
    assert comparison([0, 1] * 20, 2, 2, "data").reason == ""


def test_labels_that_have_nothing_to_do_with_the_head_are_said_to():
    labels, answers = [i % 10 for i in range(10)], [(i + 1) % 10 for i in range(10)]
    reason = comparison(labels, 10, 10, "data", logits=scores(answers, 10)).reason
    assert reason.startswith("the dense model is right on 0 of 10 images in data, no better than a guess")


def test_a_probe_that_is_no_better_than_a_guess_wants_more_images():
    labels, answers = [i % 2 for i in range(40)], [(i // 2) % 2 for i in range(40)]
    reason = comparison(labels, 2, 2, "data", logits=scores(answers, 2), probe=True).reason
    assert reason.startswith("a linear probe on the dense model's features is right on 20 of 40 images in data, no better than a")
    assert reason.endswith("more labelled images a class would help it") and "classes than the model's" not in reason


def test_an_output_that_is_no_number_is_right_for_no_class_and_agrees_with_none():
    logits = torch.tensor([[math.nan, 1.0], [2.0, 1.0], [math.inf, 0.0], [-math.inf, 0.0]])
    assert top1(logits).tolist() == [NO_ANSWER, 0, NO_ANSWER, 1]
    assert agreement(logits, logits).tolist() == [False, True, False, True]


def test_intervals_of_records_that_have_none_come_from_their_images():
    assert recorded_interval({"accuracy": 0.9, "images": 40}, "accuracy") == wilson(36, 40).interval
    assert recorded_interval({"accuracy": 0.9, "images": 40, "accuracy_interval": [0.8, 0.95]}, "accuracy") == (0.8, 0.95)
    for broken in ({}, {"accuracy": None, "images": 40}, {"accuracy": 3.0, "images": 40}, {"accuracy": 0.9, "images": 0}):
        assert recorded_interval(broken, "accuracy") is None


def clouds(labels, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(labels) + 1, dim, generator=generator) * 3
    return centres[labels] + torch.randn(len(labels), dim, generator=generator), torch.tensor(labels)


def test_a_probe_of_two_classes_tells_them_apart_with_the_binary_models_probabilities():
    x, labels = clouds([0, 1] * 30)
    probe = fit_probe(x, labels, 2)
    assert probe.weight.shape == (2, 6) and probe.bias.shape == (2,)
    reference = LogisticRegression(max_iter=2000).fit(x.double().numpy(), labels.numpy())
    assert (probe.logits(x).argmax(1) == labels).all()
    np.testing.assert_allclose(probe.logits(x).softmax(1), reference.predict_proba(x.double().numpy()), atol=1e-5)


@pytest.mark.parametrize("numbers", [(3, 7), (1, 4, 6)], ids=str)
def test_labels_keep_their_own_numbers_and_absent_classes_never_win(numbers):
    x, labels = clouds([numbers[i % len(numbers)] for i in range(60)])
    probe = fit_probe(x, labels, 9)
    assert probe.weight.shape == (9, 6)
    assert (probe.logits(x).argmax(1) == labels).all()
    everywhere = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) * 100
    assert set(probe.logits(everywhere).argmax(1).tolist()) <= set(numbers)
    assert probe.logits(x).softmax(1)[:, 0].max() < 1e-20 and probe.logits(everywhere).isfinite().all()


def test_images_without_a_label_are_left_out_of_the_fit():
    x, labels = clouds([0, 1, 2] * 20)
    extra = torch.cat([x, torch.full((5, 6), 1e3)])
    probe, same = fit_probe(x, labels, 3), fit_probe(extra, torch.cat([labels, torch.full((5,), -1)]), 3)
    assert torch.equal(probe.weight, same.weight) and torch.equal(probe.bias, same.bias)


def test_a_probe_of_one_class_or_of_features_that_are_no_numbers_is_refused():
    x, labels = clouds([0, 1] * 10)
    with pytest.raises(UserError, match="two classes or more"):
        fit_probe(x, torch.zeros_like(labels), 2)
    x[3, 0] = math.nan
    with pytest.raises(UserError, match="not finite on 1 of 20 training images"):
        fit_probe(x, labels, 2)


def backbone_session(monkeypatch, train, held):
    torch.manual_seed(0)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (train, held))
    return Session(tiny_spec(num_classes=0), "tiny")


def test_two_classes_are_measured_as_two(monkeypatch):
    session = backbone_session(monkeypatch, tiny_images(40, classes=2), tiny_images(24, classes=2))
    probe = session.probe()
    assert session.early_comparison().reason == ""
    kept = session.measure(session.dense, probe, "")["retention"]
    assert kept["probe"], "the accuracy is no classifier's"
    assert kept["dense_accuracy"] == kept["accuracy"] > 0.9 and kept["no_accuracy"] == "" and kept["labelled"] == 24
    assert kept["accuracy_interval"] == list(wilson(kept["accuracy"] * 24, 24).interval)
    dense = session.reference
    mirrored = Outputs(2 * dense.features.mean(0) - dense.features, None, dense.labels)
    lost = retention(dense, mirrored, probe, 2, session.comparison(probe))
    assert lost.accuracy < 0.5 and lost.top1_agreement < 0.5, "a model that swaps the classes is not the dense one's equal"


def test_unlabelled_images_are_counted_and_left_out(monkeypatch):
    train, held = tiny_images(40), tiny_images(40)
    held.labels = [label if i % 4 else -1 for i, label in enumerate(held.labels)]
    session = backbone_session(monkeypatch, train, held)
    kept = session.measure(session.dense, session.probe(), "")["retention"]
    assert (kept["images"], kept["labelled"], kept["accuracy"]) == (40, 30, 1.0)
    assert session.comparison(session.probe()).counted == "30 of 40 images that have a label"


def test_a_class_without_training_images_is_named_and_one_class_gives_no_probe(monkeypatch, caplog):
    train, held = tiny_images(40), tiny_images(24)
    keep = [i for i, label in enumerate(train.labels) if label != 2]
    train.images, train.labels = train.images[keep], [train.labels[i] for i in keep]
    session = backbone_session(monkeypatch, train, held)
    assert session.probe().weight.shape[0] == 4
    assert "has no training image of '2': the probe never answers so" in caplog.text
    train.labels = [1] * len(train)
    session = backbone_session(monkeypatch, train, held)
    assert session.probe() is None and "are of one class: no probe is fitted" in caplog.text
    assert session.early_comparison().reason == "the model has neither a classifier nor a probe"


def test_a_head_of_one_logit_has_neither_accuracy_nor_agreement(monkeypatch):
    torch.manual_seed(0)
    data = tiny_images(24, classes=2)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (data, data))
    session = Session(tiny_spec(num_classes=1), "tiny")
    kept = session.measure(session.dense, session.probe(), "")["retention"]
    assert kept["accuracy"] is None and kept["top1_agreement"] is None and "names no class" in kept["no_accuracy"]
    assert not kept["probe"] and "--num-classes 0" in session.early_comparison().advised


@pytest.mark.parametrize("classes, said", [(4, True), (10, False)])
def test_other_classes_than_the_models_are_told_before_the_work(classes, said, monkeypatch, tmp_path, caplog):
    torch.manual_seed(0)
    data = tiny_images(24, classes=classes)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (data, data))
    monkeypatch.setattr("moee.stages.session.Session.prove", lambda *args: pytest.fail("the work began"))
    with pytest.raises(pytest.fail.Exception):
        run_extract(tiny_spec(num_classes=10), "tiny", method_options("static"), tmp_path / "out")
    told = "will not be compared: the model tells 10 classes apart, tiny has 4; extract with --num-classes 0" in caplog.text
    assert told == said


def test_the_cosine_of_single_outputs_is_more_than_their_sign():
    """A budget of cosine 0.99 was met by any model whose logits had the dense one's signs."""
    dense = torch.tensor([[1.0], [2.0], [3.0], [-1.0]])
    assert mean_cosine(dense, dense * 2) == pytest.approx(1.0)
    assert mean_cosine(dense, torch.tensor([[9.0], [0.1], [0.1], [-0.1]])) < 0.7


def test_a_head_that_was_drawn_passes_no_gate_by_chance(monkeypatch, tmp_path):
    """Drawn under some seeds, a head tells separable classes apart better than a guess."""
    torch.manual_seed(0)
    data = tiny_images(40, classes=10)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (data, data))
    session = Session(tiny_spec(), "tiny")
    teach(session.dense, data)  # as chance might have it
    assert "--random-weights drew" in session.early_comparison().advised
    assert "--random-weights drew" in session.comparison(None).reason
    kept = session.measure(session.dense, session.probe(), "")["retention"]
    assert kept["accuracy"] is None and "means nothing" in kept["no_accuracy"]
    features = Session(tiny_spec(num_classes=0), "tiny")
    assert features.early_comparison() and features.comparison(features.probe()), "a probe is no head, and was fitted"


@pytest.mark.parametrize(
    "classes, reason, ran, drawn",
    [
        (10, "no better than a guess", True, False),
        (10, "--random-weights drew", False, True),
        (4, "tells 10 classes apart, tiny has 4", False, True),
    ],
)
def test_a_plan_whose_accuracy_cannot_be_measured_is_refused_before_any_point(
    classes, reason, ran, drawn, monkeypatch, tmp_path
):
    """A head of 10 classes and labels that have nothing to do with it: a model of cosine 0.02 used to win."""
    torch.manual_seed(0)
    data = tiny_images(40, classes=classes)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (data, data))
    session = Session(ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, random_seed=0), "tiny")
    if not drawn:
        session.spec = session.spec.model_copy(update={"random_seed": None})
    monkeypatch.setattr("moee.planning.search.Planner.point", lambda *a: pytest.fail("a point was made"))
    cure = "" if ran else "--num-classes 0.*"
    with pytest.raises(UserError, match=f"--max-drop cannot be checked: .*{reason}.*{cure}use --min-cosine"):
        make_plan(
            session, Budget(max_drop=0.5), tmp_path / "plan", methods=("static",), targets=(0.5,), base={"cluster_tokens": 300}
        )
    assert not list(tmp_path.iterdir()), "a refused plan leaves nothing"
    assert (session._reference is not None) == ran


def point(**figures):
    values = dict(method="static", allocation="share", macs=0.5, params=0.5, cosine=0.99, token_cosine=None, accuracy=0.9)
    return Point(**{**values, "drop": 0.0, "latency": None, "recipe": {}, **figures})


NAN = math.nan
TIMED = {"moee_ms": 1.0, "dense_ms": 2.0}


@pytest.mark.parametrize(
    "figures, budget, name",
    [
        ({"drop": None}, {"max_drop": 0.5}, "accuracy"),
        ({"drop": NAN}, {"max_drop": 0.5}, "accuracy"),
        ({"cosine": NAN}, {"min_cosine": 0.5}, "cosine"),
        ({"cosine": NAN}, {"target_macs": 0.6}, "cosine"),
        ({"macs": NAN}, {"target_macs": 0.6}, "MACs"),
        ({"params": NAN}, {"target_params": 0.6}, "parameters"),
        ({"latency": None}, {"target_latency_ms": 5.0}, "latency"),
        ({"latency": {**TIMED, "moee_ms": NAN}}, {"target_latency_ms": 5.0}, "latency"),
    ],
)  # fmt: skip
def test_an_unknown_figure_meets_no_budget(figures, budget, name):
    broken, limits = point(**figures), Budget(**budget)
    assert broken.shortfalls(limits) == {name: math.inf}
    assert choose([broken], limits) is None
    fine = point(latency=TIMED)
    assert choose([broken, fine], limits) is fine and fine.shortfalls(limits) == {}
    if name == "cosine":
        assert pareto([broken, fine]) == [fine]


@pytest.mark.parametrize(
    ("counts", "drop", "low", "high"),
    [
        ((0, 40, 0, 0), 100, 87.61, 100), ((0, 0, 40, 0), -100, -100, -87.61), ((20, 0, 0, 20), 0, -4.68, 4.68),
        ((30, 10, 0, 0), 25, 11.08, 40.19), ((1, 1, 7, 12), -28.57, -50.69, -2.56), ((40, 0, 0, 0), 0, -8.76, 8.76),
    ],
)  # fmt: skip
def test_the_drop_and_its_interval(counts, drop, low, high):
    """`counts` of images on which both models are right, the dense one alone, the cut one alone, none. The fifth is the textbook
    example of Newcombe's interval for paired proportions (airway hyper-responsiveness of 21 children)."""
    dense, ours = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
    found, interval = paired_drop(dense, ours)
    assert (found, *interval) == pytest.approx((drop, low, high), abs=0.01)


def test_labels_of_other_classes_are_not_called_none():
    """As of shards, whose classes are numbers, beside a folder of names."""
    data = tiny_images(40)
    data.classes = ("cat", "dog", "emu", "fox")
    data.renumber(("0", "1"), Labels(("0", "1")).number)
    part = Part(data, range(20))
    found = comparison(part.labels, part.num_classes, 2, "new", unknown=part.unknown)
    said = "new has no labels of two classes or more that the model has: its 'cat', 'dog' and others are none of the model's"
    assert found.reason == f"{said} classes" and not found
    assert comparison([-1] * 20, 0, 0, "new", unknown=["cat"]).reason == "new has no labels of two classes or more", "a backbone"


def test_the_interval_of_the_drop_covers_what_it_says_on_few_images():
    """Of 32 images most samples show no or one difference, of which a bootstrap makes an interval of no width."""
    generator, chances, inside = np.random.default_rng(0), (0.9, 0.04, 0.02, 0.04), 0
    for _ in range(400):
        cells = generator.choice(4, 32, p=chances)
        low, high = paired_drop(cells < 2, cells % 2 == 0)[1]
        inside += low <= 100 * (chances[1] - chances[2]) <= high
    assert inside >= 0.95 * 400
