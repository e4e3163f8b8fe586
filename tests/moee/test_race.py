"""Ways are bisected side by side within a time."""

from types import SimpleNamespace

import pytest

from moee.planning.budget import COST_TOLERANCE, Budget, Point, choose
from moee.planning.forms import Latency, LayerChoices
from moee.planning.race import FIRST, GOING_ON, Racer, may_cost_more, race, rounds_of
from moee.planning.search import Way, variants

SLOW = [name for name, (method, _) in variants().items() if method.calibrated]  # all others take their turns at once
GOOD, POOR, LATE = Way("static", "sensitivity"), Way("kmeans-8", "sensitivity"), Way("hdbscan", "sensitivity")


class Until:
    """Time that is over by the answers given, and as the last of them says from then on; never without any."""

    def __init__(self, *answers):
        self.answers, self.over, self.prepared = iter(answers), False, 0

    def __call__(self, fresh):
        self.over = next(self.answers, self.over)
        return self.over

    def ready(self):
        self.prepared += 1


def planner(least, budget, impossible=()):
    """Ways that meet a cosine of 0.98 from a target on; their latency is their MACs."""
    asked = []

    def point(way, target):
        asked.append((way, target))
        if target < dict(impossible).get(way, 0):
            return None
        cosine = 0.99 if target >= least[way] else 0.9
        latency = {"moee_ms": 10 * target, "dense_ms": 10.0}
        return Point(way.method, way.allocation, target, target, cosine, None, None, None, latency, {"way": way.method})

    return SimpleNamespace(budget=budget, point=point, asked=asked)


def test_the_better_way_gets_the_trials_and_comes_near_its_limit():
    ours = planner({GOOD: 0.5, POOR: 0.8, LATE: 0.95}, Budget(min_cosine=0.98))
    points, left, untried = race(ours, [GOOD, POOR, LATE], Until())
    assert left == 0 and not untried
    tried = [target for way, target in ours.asked if way is GOOD]
    assert tried[0] == FIRST and len(tried) == 4 and min(t for t in tried if t >= 0.5) - 0.5 < 0.07
    assert len([way for way, _ in ours.asked if way is LATE]) < 4
    assert all(target > FIRST for way, target in ours.asked[3:] if way is POOR), "it missed the budget, so it must cost more"


def test_of_many_ways_all_are_tried_and_half_go_on():
    assert rounds_of(3) == rounds_of(6) == GOING_ON and rounds_of(21) == (21, 11, *GOING_ON)
    many = [Way(name, "sensitivity") for name in SLOW[:9]]
    last = many[-1].method
    ours = planner({way: 0.5 if way.method == last else 0.9 for way in many}, Budget(min_cosine=0.98))
    points, left, untried = race(ours, many, Until())
    assert [way for way, _ in ours.asked[:9]] == many and left == 0, "the last one too"
    tried = [target for way, target in ours.asked if way.method == last]
    assert len(tried) == 5 and min(t for t in tried if t >= 0.5) - 0.5 < 0.05
    assert choose(points, ours.budget).recipe == {"way": last}
    points, left, untried = race(ours, many, Until(*[False] * 5, True))
    assert len(points) == 5 and left == 9 - 5 + sum(GOING_ON) + 8
    assert untried == many[5:], "what had no trial is named"


def test_no_other_way_is_better_at_the_cost_of_what_is_chosen():
    """A way that was left behind, since it holds less where little is saved, and that holds more where much is."""
    many = [Way(name, "sensitivity") for name in SLOW[:9]]
    third, least = many[2], 0.48

    def point(way, target):
        cosine = 0.9 if target < least or way not in many[:3] else 0.9826 if way is third else 0.995 if target > 0.6 else 0.9801
        return Point(way.method, way.allocation, target, target, cosine, None, None, None, None, {way.method: target})

    ours = SimpleNamespace(budget=Budget(min_cosine=0.98), point=point)
    points, left, untried = race(ours, many, Until())
    best = choose(points, ours.budget)
    assert left == 0 and best.method == third.method and best.macs < 0.5
    assert all(p.cosine <= best.cosine + 0.002 for p in points if abs(p.macs - best.macs) <= COST_TOLERANCE)
    assert choose(points[: sum(rounds_of(9))], ours.budget).cosine < best.cosine - 0.002, "the rounds alone do not see it"


def test_the_first_point_is_made_and_the_rest_when_there_is_time():
    ours = planner({GOOD: 0.5, POOR: 0.8}, Budget(min_cosine=0.98))
    # asked before the first too, so that its time is known
    points, left, untried = race(ours, [GOOD, POOR], Until(True, False, True))
    assert [p.method for p in points] == ["static", "kmeans-8"] and left == 8 - 2


def test_what_needs_no_preparation_is_tried_where_the_time_does_not_serve_for_others():
    """Merging tokens waits for nothing; one expert was prepared before."""

    class Short(Until):
        def __call__(self, fresh):
            return fresh or super().__call__(fresh)

    merged = Way("tokens", "")
    ours = planner({GOOD: 0.9, POOR: 0.5, merged: 0.5}, Budget(min_cosine=0.98))
    points, left, untried = race(ours, [GOOD, POOR, merged], Short())
    assert [way for way, _ in ours.asked[:2]] == [GOOD, merged] and POOR not in {way for way, _ in ours.asked}
    assert {way for way, _ in ours.asked[2:]} >= {GOOD, merged} and left > 0 and len(points) == len(ours.asked)
    assert untried == [POOR]
    assert choose(points, ours.budget).recipe == {"way": "tokens"} and min(p.macs for p in points if p.cosine > 0.98) < 0.6
    assert race(ours, [GOOD, merged], Short(*[False] * 2, True))[0] != points, "nor is there time for ever"
    heads = merged._replace(attention=0.75)
    narrowed = planner({GOOD: 0.5, heads: 0.5}, ours.budget)
    race(narrowed, [GOOD, heads], Short())
    assert heads not in {way for way, _ in narrowed.asked}, "narrower heads are calibrated first"


def test_what_learns_from_no_image_is_bisected_first_and_the_others_begin_at_its_cost():
    """Of a long list nothing but the first trial of each had time, and merged tokens, which take seconds, stayed at the first."""
    merged = Way("tokens", "")
    ways = [GOOD, merged, *(Way(name, "sensitivity") for name in SLOW if name != "static")]
    ours = planner({way: 0.55 if way is merged else 0.7 for way in ways}, Budget(min_cosine=0.98))
    points, left, untried = race(ours, ways, Until(*[False] * (len(ways) + len(GOING_ON) - 1), True))
    asked = [target for way, target in ours.asked if way is merged]
    assert [way for way, _ in ours.asked[:6]] == [GOOD, *[merged] * 4, ways[2]] and not untried and left > 0
    best = choose(points, ours.budget)
    assert best.recipe == {"way": "tokens"} and 0.55 <= best.macs < 0.6 and asked[0] == FIRST
    assert {target for way, target in ours.asked[5:]} == {best.macs}, "a dearer one would not be chosen"
    only = planner({merged: 0.55}, Budget(min_cosine=0.98))
    assert len(race(only, [merged], Until())[0]) == len(GOING_ON)


def test_what_cannot_be_made_is_looked_for_dearer():
    ours = planner({GOOD: 0.0}, Budget(min_cosine=0.98), impossible={GOOD: 0.75})
    points, *_ = race(ours, [GOOD], Until())
    assert points and all(point.macs >= 0.75 for point in points)
    assert [target for _, target in ours.asked][:2] == [FIRST, pytest.approx(0.86)]


def test_under_a_limit_of_the_latency_the_dearest_below_it_is_looked_for():
    ours = planner({GOOD: 0.0}, Budget(target_latency_ms=8.0))
    points, *_ = race(ours, [GOOD], Until())
    assert max(p.macs for p in points if not p.shortfalls(ours.budget)) == pytest.approx(0.781, abs=0.02)


def test_a_point_of_no_number_is_missed_quality():
    broken = Point("static", "", 0.5, 0.5, float("nan"), None, None, None, None, {})
    assert may_cost_more(broken, Budget(min_cosine=0.9)) and broken.lacks_quality(Budget(min_cosine=0.9))
    assert broken.lacks_quality(Budget(max_drop=1.0)), "an accuracy that nobody measured is none that is good enough"
    assert Racer(GOOD).target() == Racer(GOOD).target(broken.__class__(**{**vars(broken), "macs": 0.9})) == FIRST
    assert Racer(GOOD).target(broken) == 0.5, "no dearer than what would be chosen"


def test_what_the_forms_said_is_kept_for_the_run_that_goes_on(tmp_path):
    """Times that are measured again differ; a resumed plan must come to the same recipes and find its points."""

    def choices_of(answer):
        forms = SimpleNamespace(choices=lambda share, experts: LayerChoices(one_expert=answer, exclude=[], mac_times={"b": 1.5}))
        return Latency("cpu", lambda model: {}, forms).choices(8, tmp_path)

    assert choices_of(["a"]).one_expert == ["a"] and choices_of([]).one_expert == ["a"]
    assert choices_of([]).mac_times == {"b": 1.5}
