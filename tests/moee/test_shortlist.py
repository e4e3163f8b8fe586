"""Which points are timed on a device, and what becomes of the others."""

import pytest

from moee.planning.budget import Budget, Point
from moee.planning.shortlist import Scale, Timed, with_times, worth_measuring


def point(method, macs, cosine, latency=None, params=0.8):
    return Point(method, "share", macs, params, cosine, cosine, None, 0.0, latency, {"method": method, "macs": macs})


POINTS = [point(method, macs, cosine) for method, cosines in (
    ("static", {0.8: 0.99, 0.7: 0.98, 0.6: 0.96, 0.5: 0.90}), ("kmeans-8", {0.8: 0.995, 0.7: 0.99, 0.6: 0.98, 0.5: 0.97})
) for macs, cosine in cosines.items()]  # fmt: skip


def named(points):
    return [(p.method, p.macs) for p in points]


def test_methods_take_turns_the_cheapest_first_under_a_limit_of_quality():
    """Fewer MACs of experts may be slower on the device than more of one expert."""
    found = named(worth_measuring(POINTS, Budget(min_cosine=0.97), 3))
    assert found == [("kmeans-8", 0.5), ("static", 0.7), ("kmeans-8", 0.6)]


def test_the_most_faithful_come_first_under_a_limit_of_cost():
    assert named(worth_measuring(POINTS, Budget(target_macs=0.7), 3)) == [("kmeans-8", 0.7), ("static", 0.7), ("kmeans-8", 0.6)]


def test_a_limit_of_latency_alone_wants_points_from_all_over_the_front():
    found = named(worth_measuring(POINTS[:4], Budget(target_latency_ms=1.0), 3))
    assert found[0] == ("static", 0.8) and found[-1] == ("static", 0.5) and len(found) == 3
    assert len(worth_measuring(POINTS, Budget(target_latency_ms=1.0), 20)) == 8
    assert named(worth_measuring(POINTS[:4], Budget(target_latency_ms=1.0), 1)) == [("static", 0.8)]


def test_what_cannot_win_is_not_measured():
    beaten, dense = point("static", 0.75, 0.9), Point("dense", "", 1.0, 1.0, 1.0, 1.0, None, 0.0, None, None)
    found = worth_measuring([*POINTS, beaten, dense, point("static", 0.4, float("nan"))], Budget(min_cosine=0.97), 20)
    assert set(named(found)) == {("static", 0.8), ("static", 0.7), *(("kmeans-8", m) for m in (0.8, 0.7, 0.6, 0.5))}
    assert worth_measuring(POINTS, Budget(min_cosine=0.999), 20) == []


def test_a_modelled_figure_ranks_before_macs():
    slow = point("static", 0.5, 0.98, {"kind": "modelled", "device": "orin-agx", "dense_ms": 10.0, "moee_ms": 11.0})
    fast = point("static", 0.6, 0.99, {"kind": "modelled", "device": "orin-agx", "dense_ms": 10.0, "moee_ms": 7.0})
    assert worth_measuring([slow, fast], Budget(min_cosine=0.97), 1) == [fast]


def test_times_of_the_device_replace_figures_and_scale_those_of_the_others():
    modelled = {"kind": "modelled", "device": "orin-agx", "dense_ms": 10.0, "moee_ms": 8.0, "speedup": 1.25}
    other = {**modelled, "device": "rtx-4090"}
    points = [point("static", 0.8, 0.99, modelled), point("static", 0.7, 0.98, modelled), point("static", 0.6, 0.97, modelled),
              point("static", 0.5, 0.9, other)]  # fmt: skip
    measured = {"kind": "measured on x", "dense_ms": 20.0, "moee_ms": 15.0}
    timed = Timed({**measured, "moee_ms": 20.0}, [measured, "no engine was built"], {}, Scale("orin-agx", 2.0, 3.0))
    everything, eligible = with_times(points, points[:2], timed)
    assert [p.latency and p.latency["moee_ms"] for p in everything] == [15.0, None, 24.0, 8.0]
    assert eligible == everything[:1], "what failed, and what was not measured, cannot be chosen"
    assert everything[2].latency["speedup"] == pytest.approx(20 / 24) and "scaled" in everything[2].latency["kind"]
    assert everything[3].latency == other
