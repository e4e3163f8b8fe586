"""The front of a plan: every candidate where its figures are, kinds of time apart, and what is not drawn is said."""

import json
import xml.etree.ElementTree as ET

import pytest

from exporter import cli
from exporter.front import panels, read_front, sheet
from exporter.front.scale import Scale, span, useful_span
from exporter.report import collect, render
from moee.store.artifact import write_manifest
from tests.exporter.report_data import plan_body, point, timed, write_plan, write_run
from tests.exporter.test_report import Page


def drawn(panel):
    """Where the marks of a panel are, by candidate: (x, y, classes)."""
    found = {}
    for group in ET.fromstring(panel).iter("g"):
        shape = group[0]
        name = shape.find("title").text.partition(":")[0]
        if shape.tag == "circle":
            at = float(shape.get("cx")), float(shape.get("cy"))
        else:
            corners = [tuple(map(float, pair.split(","))) for pair in shape.get("points").split()]
            at = tuple(sum(axis) / len(corners) for axis in zip(*corners, strict=True))
        found[name] = (*at, shape.get("class"), len(group) == 2)
    return found


def test_marks_lie_where_their_figures_are():
    front = read_front(plan_body())
    time, size = panels(front)
    marks = drawn(time)
    assert set(marks) == {"static, share", "kmeans-8, share", "hdbscan, share, attention 85%", "dense"}
    static, kmeans, hdbscan, dense = (marks[c.name] for c in front.candidates)
    assert static[0] < kmeans[0] < hdbscan[0] < dense[0], "by time"
    assert (hdbscan[0] - kmeans[0]) == pytest.approx(kmeans[0] - static[0], abs=0.3), "half, six and seven tenths of dense"
    assert dense[1] == kmeans[1] < hdbscan[1] < static[1], "by accuracy, upwards"
    assert [m[2].split()[1] for m in (static, kmeans, hdbscan, dense)] == ["f-static", "f-routed", "f-routed", "f-dense"]
    assert [m[3] for m in (static, kmeans, hdbscan, dense)] == [False, True, False, False], "the chosen one has a ring"
    assert "chosen: kmeans-8" in time and "accuracy over time, share of dense (batch 8, measured on CPU)" in time
    assert "parameters, share of dense" in size and ">80%<" in size
    lines = [line for line in ET.fromstring(time).iter("line") if line.get("class") == "f-budget"]
    flat, upright = (line for line in lines)
    assert hdbscan[1] == pytest.approx(float(flat.get("y1")), abs=0.2), "0.95 less 2 points is its accuracy"
    assert float(upright.get("x1")) - hdbscan[0] == pytest.approx(hdbscan[0] - kmeans[0], abs=0.3), "8 of 10 ms"
    assert "6 ms" in time, "ticks have milliseconds of the dense model's median beneath"


def test_cosine_stands_where_nothing_is_labelled_or_the_budget_asks_for_it():
    unlabelled = panels(read_front(plan_body(labelled=False)))
    assert len(unlabelled) == 2 and all("cosine to dense" in panel and "accuracy" not in panel for panel in unlabelled)
    body = plan_body()
    body["budget"]["min_cosine"] = 0.99
    assert len(panels(read_front(body))) == 4, "accuracy and cosine, each over time and size"


def test_kinds_of_time_never_share_an_axis():
    body = plan_body()
    body["points"][2]["latency"] = timed(7.0, kind="modelled", device="orin-agx")
    cpu, modelled, size = panels(read_front(body))
    assert "modelled for orin-agx" in modelled and "measured" not in modelled
    assert list(drawn(modelled)) == ["hdbscan, share, attention 85%"] and "f-hollow" in modelled
    assert len(drawn(cpu)) == 3 and "1 without both figures" in cpu and "f-hollow" not in cpu
    assert len(drawn(size)) == 4
    body["points"][2]["latency"] = timed(7.0, kind="measured", device="orin-agx")
    assert "measured, orin-agx" in panels(read_front(body))[1]


def test_a_broken_candidate_does_not_press_the_others_together():
    body = plan_body()
    body["points"] += [point("moefication", 0.55, 0.1, timed(5.5)), point("clear-moe", 0.6, 0.92, timed(6.5))]
    marks = drawn(panels(read_front(body))[0])
    assert marks["static, share"][1] - marks["kmeans-8, share"][1] > 60, "pixels"
    assert marks["moefication, share"][1] == max(m[1] for m in marks.values())
    assert "1 below this range, down to 10.0%" in panels(read_front(body))[0]


def test_what_is_no_figure_is_not_drawn():
    body = plan_body()
    for index, bad in enumerate((float("nan"), 1e308, "0.9")):
        body["points"][index]["cosine"] = body["points"][index]["accuracy"] = bad
        body["points"][index]["latency"]["moee_ms"] = -1
    front = read_front(body)
    assert panels(front) == [] and [c.timing for c in front.candidates[:3]] == [None] * 3
    assert panels(read_front({"points": 7, "winner": [], "budget": "much"})) == []


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.9], [-3.0, 5e6], [0.97, 0.9701]])
def test_ticks_are_round_and_within_the_range(values):
    scale = Scale(*span(values, 0.02), 0, 100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 6 and all(scale.low <= t <= scale.high for t in ticks)
    assert scale(scale.low) == 0 and scale(scale.high) == 100 and scale(scale.high + 1e9) == 100


def test_the_range_holds_what_decides():
    low, high = useful_span([0.1, 0.96, 0.97, 0.98, 0.98], [0.98, 0.95], 0.02)
    assert 0.9 < low < 0.95 and high > 0.98
    assert useful_span([0.9, 0.96, 0.97], [0.97, 0.93], 0.02)[0] < 0.9, "all of them where the rest lies near"


def test_several_devices_stand_in_one_report(tmp_path):
    run = write_run(tmp_path / "run")
    write_plan(tmp_path / "orin", kind="measured on orin-agx", device="orin-agx")
    write_plan(tmp_path / "other", model="b").joinpath("plan.json").write_text(
        (tmp_path / "other" / "plan.json").read_text().replace("vit_tiny_patch16_224", "vit_base_patch16_224")
    )
    page = Page(render(collect([run, tmp_path / "orin", tmp_path / "other"])))
    assert "Measured on CPU, batch 8 (plan)" in page.text and "Measured on orin-agx, batch 8 (orin)" in page.text
    assert [a["class"] for t, a in page.tags if t == "svg"].count("front") == 4
    assert page.text.count("Chosen: kmeans-8, share, cosine 0.9960, 60.0% of the MACs") == 2
    assert "accuracy at most 2 points below dense" in page.text and "at most 8 ms a batch" in page.text
    assert "other/plan.json is a plan of another model: not shown" in page.text
    assert read_front({"points": [], "budget": {"max_drop": 1}}).limits() == ["accuracy at most 1 point below dense"]


def test_a_plan_alone_is_enough(tmp_path):
    page = Page(render(collect([write_plan(tmp_path / "plan")])))
    assert "MoEE report: tiny on digits" in page.text and "speed-up" not in page.text


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "recipe.toml").write_text("x = 1\n")
    write_manifest(tmp_path / "plan", "plan.json", "moee.plan/2", plan_body())
    return tmp_path / "plan"


def test_the_command_writes_the_picture(plan, tmp_path, capsys):
    out = tmp_path / "front"
    assert cli.main(["plots", str(plan), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip().endswith("front.json, front.svg")
    picture = ET.parse(out / "front.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg" and "chosen: kmeans-8" in (out / "front.svg").read_text()
    assert json.loads((out / "front.json").read_text())["candidates"][0]["timing"]["ms"] == 5.0
    assert cli.main(["plots", str(plan), "--out", str(out)]) == 2 and "--force" in capsys.readouterr().err
    assert cli.main(["plots", str(plan), "--out", str(out), "--force"]) == 0
    (tmp_path / "retouched").mkdir()
    for file in out.iterdir():
        (tmp_path / "retouched" / file.name).write_text(file.read_text() + " " * (file.suffix == ".svg"))
    assert cli.main(["plots", str(plan), "--out", str(tmp_path / "retouched"), "--force"]) == 2
    assert "its front.svg is not the file that moee wrote" in capsys.readouterr().err
    page = Page(render(collect([write_run(tmp_path / "run"), out])))
    assert not [a for t, a in page.tags if t == "img" and a["alt"] == "front"], "the page draws it itself"


def test_the_command_refuses_in_one_sentence(plan, tmp_path, capsys):
    argv = ["plots", str(plan), "--out", str(tmp_path / "front")]
    assert cli.main([*argv, "--data", "digits"]) == 2 and "drawn from its plan.json alone" in capsys.readouterr().err
    (plan / "recipe.toml").write_text("x = 2\n")
    assert cli.main(argv) == 2 and "does not match the hash" in capsys.readouterr().err
    (plan / "recipe.toml").unlink()
    write_manifest(plan, "plan.json", "moee.plan/2", {**plan_body(), "points": []})
    assert cli.main(argv) == 2 and "no candidate with a quality and a cost" in capsys.readouterr().err
    assert not (tmp_path / "front").exists()


def test_the_file_is_the_same_twice_and_names_cannot_become_markup():
    body = plan_body(model="</title><script>alert(1)</script>")
    body["points"][0]["method"] = "<b>&"
    front = read_front(body)
    first = sheet(front, front.model)
    assert first == sheet(front, front.model) and "<script" not in first and ET.fromstring(first) is not None
