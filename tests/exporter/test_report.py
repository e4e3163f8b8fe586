"""The report: well-formed, self-contained, escaped, and true to the artifacts; what is missing is said."""

import contextlib
import json
import re
import shlex
from html.parser import HTMLParser
from typing import get_args, get_origin

import pytest
from pydantic import ValidationError

from exporter import cli
from exporter.report import collect, render, write_report
from exporter.report.commands import commands
from exporter.report.page import MAX_BYTES
from exporter.terminal.options import given_options
from moee.errors import UserError
from moee.expected import plain_type
from moee.methods.heads.method import HeadsOptions
from moee.methods.recipe import Recipe, make_recipe, read_recipe
from moee.methods.registry import METHODS
from moee.methods.static import StaticOptions
from tests.exporter.report_data import EVIL, write_run

VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Checks nesting while it parses, and keeps what the tests ask about."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.addresses: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> repeats an attribute"
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[key] for key in ("href", "src", "srcset", "action", "data", "poster") if key in given]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def page_of(*paths) -> Page:
    return Page(render(collect(paths)))


def test_self_contained_and_well_formed(run):
    text = render(collect([run]))
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False)), "a heading level is skipped"
    assert all(a.startswith(("#", "data:")) for a in page.addresses), page.addresses
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text), "the page names something outside itself"
    assert not [t for t, a in page.tags if any(k.startswith("on") or k == "style" for k in a)], "inline handlers or styles"
    assert len(text.encode()) < MAX_BYTES
    labelled = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert labelled and set(labelled) <= set(page.ids)
    assert all(a.get("aria-label") for t, a in page.tags if t == "svg")


def test_figures_are_those_of_the_artifacts(run):
    text = page_of(run).text
    for figure in ("94.00%", "dense 95.00%, −1.00 points", "−50.0%", "−25.0%", "2.00×", "passed", "8.00e-05",
                   "2.000 G", "1.000 G (−50.0%)", "p50 5.00 ms, p95 6.50 ms", "1.80 to 2.20", "80% of the ideal 2.50×",
                   "1/8/32", "3 plugin layers", "3.0 MiB", "3 experts, top 70%", "match", "95.00% (90.00% to 98.00%)",
                   "drop 0.25 points (-0.50 to 1.00)", "Verdict: MoEE is faster", "moee 180.5", "2.500 1.250",
                   "cpu model a CPU"):  # fmt: skip
        assert figure in text, figure
    assert "not found" not in text.lower() and "is not shown" not in text


def test_timings_at_several_batches_stand_side_by_side(run):
    body = json.loads((run / "latency.json").read_text())
    (run / "one").mkdir()
    one = {**body, "batch": 1, "speedup": 0.5, "verdict": {**body["verdict"], "text": "dense is faster"}}
    (run / "one" / "latency.json").write_text(json.dumps(one))
    text = page_of(run).text
    for figure in ("2.00×", "0.50× at batch 1", "Verdict: MoEE is faster", "Verdict: dense is faster"):
        assert figure in text, figure
    assert "is not shown" not in text
    (run / "one" / "latency.json").write_text(json.dumps(body))  # the same batch twice
    assert "latency.json is not shown" in page_of(run).text


def test_what_was_read_is_shown(run):
    text = render(collect([run]))
    section = text.split("Images that the model was made on")[-1]
    assert "1,078" in section and "Classes 0 to 1: &lt;b&gt;zero, one." in section and "only val has images of" in section


def test_routing_entropy_stands_beside_each_layer_of_several_experts(run):
    page = page_of(run)
    assert "routing entropy" in page.words and "0.56" in page.words  # (.7 ln .7 + .3 ln .3) / -ln 3
    body = json.loads((run / "tuned" / "moee.json").read_text())
    body["info"]["stages"]["tuned"]["shares"] = {"blocks.0.mlp": [1.0]}
    (run / "tuned" / "moee.json").write_text(json.dumps(body))
    assert "routing entropy" not in page_of(run).words


def test_names_from_manifests_are_escaped(tmp_path):
    page = page_of(write_run(tmp_path / "run", layer=EVIL, model=EVIL))
    assert [t for t, _ in page.tags].count("script") == 1
    assert page.text.count("<script>alert(1)</script>") > 4, "the names are shown as text"
    commands_shown = commands(collect([tmp_path / "run"]))
    assert commands_shown[0].startswith("moee extract '<script>alert(1)</script>\"'")


def test_layers_sort_by_their_numbers(run):
    page = page_of(run)
    rows, keys = [], []
    page.tags = page.tags[[a.get("id") for _, a in page.tags].index("layers") :]
    for tag, attributes in page.tags:
        if tag == "table" and attributes.get("id") != "layers":
            break
        if tag == "tr":
            keys = []
            rows.append(keys)
        if "data-sort" in attributes:
            keys.append(attributes["data-sort"])
    head, *body = rows
    assert len(body) == 3 and all(len(row) == 12 for row in body)
    assert [row[0] for row in body] == ["0", "1", "2"], "layers stand in the model's order"
    assert [float(row[4]) for row in body] == [100, 9, 50], "sorted as numbers, 9 comes before 50"
    heads = [a for t, a in page.tags if t == "th" and "aria-sort" in a]
    buttons = [a for t, a in page.tags if t == "button"]
    assert len(heads) == len(buttons) == 12 and {a["aria-sort"] for a in heads} == {"none"}


@pytest.mark.parametrize(
    ("absent", "said"),
    [("parity.json", "moee verify export --out verify"), ("latency.json", "moee bench export --out latency.json"),
     ("engine/engine.json", "moee build export --out engine"), ("tuned/moee.json", "extracted"),
     ("plan/plan.json", "A plan (plan.json) was not found"), ("plots/examples.json", "moee plots MODEL --out plots")],
)  # fmt: skip
def test_missing_parts_are_said_to_be_missing(run, absent, said):
    (run / absent).unlink()
    assert said in page_of(run).text


def test_failures_are_listed(run):
    body = json.loads((run / "parity.json").read_text())
    body |= {"passed": False, "first_deviation": {"layer": "blocks.1.mlp", "reason": "weights"}}
    body["cases"].append({"group": "routes", "name": "blocks.1.mlp", "failure": "7 of 9 tokens take another expert"})
    (run / "parity.json").write_text(json.dumps(body))
    text = page_of(run).text
    assert "Parity FAILED" in text and "routes blocks.1.mlp: 7 of 9 tokens" in text
    assert "first deviation: layer blocks.1.mlp, reason weights" in text


def test_a_single_file_is_enough(run):
    text = page_of(run / "parity.json").text
    assert "A model's manifest (moee.json) was not found" in text and "torch against onnxruntime" in text
    assert "tokens on the same expert" in text and "tokens on the same expert" not in page_of(run).text


def test_a_changed_file_is_named(run):
    (run / "export" / "moee.data").write_bytes(b"changed")
    assert "moee.data was changed" in page_of(run).text


def test_damaged_foreign_and_newer_files_are_problems(run):
    (run / "parity.json").write_text("{")
    (run / "latency.json").write_text(json.dumps({"schema": "moee.latency/9", "dense_ms": {"p50": 1e9}}))
    (run / "engine" / "engine.json").write_text(json.dumps(["moee.engine/1"]))
    text = page_of(run).text
    assert "parity.json is not readable JSON" in text and "engine.json has schema None" in text
    assert "moee.latency/9, newer than this report reads" in text and "1000000000" not in text


@pytest.mark.parametrize("nonsense", [None, "x", {}, 1e999, [1, "x", None]])
def test_nonsense_in_any_field_shows_as_a_dash(run, nonsense):
    dashes, more = page_of(run).text.count("–"), 0
    for path in run.rglob("*.json"):
        body = json.loads(path.read_text())
        for key in set(body) - {"schema"}:
            path.write_text(json.dumps({**body, key: nonsense}))
            text = page_of(run).text
            assert not set(re.findall(r"\w+", text)) & {"None", "inf", "nan"}, (path.name, key)
            more += text.count("–") > dashes
        for stage in (body.get("info") or {}).get("stages", {}).values():
            for key in list(stage):
                kept, stage[key] = stage[key], nonsense
                path.write_text(json.dumps(body))
                page_of(run)
                stage[key] = kept
        path.write_text(json.dumps(body))
    assert more > 5, "fields that show as a dash"


def test_plots_are_embedded_as_pictures_within_the_limit(run):
    (run / "plots" / "examples.json").unlink()
    (run / "plots" / "experts.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (run / "plots" / "huge.svg").write_text("<svg>" + " " * (3 << 20) + "</svg>")
    text = render(collect([run]))
    page = Page(text)
    assert [t for t, _ in page.tags].count("img") == 1 and [t for t, _ in page.tags].count("script") == 1
    assert "Left out for their size: huge.svg" in page.text and len(text.encode()) < MAX_BYTES


def test_the_command(run, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli.main(["report", str(run), "--out", str(out)]) == 0
    assert "report written to" in capsys.readouterr().out and out.stat().st_size > 5000
    assert cli.main(["report", str(run), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--out", str(out), "--force"]) == 0
    assert cli.main(["report", str(tmp_path / "absent"), "--out", str(tmp_path / "x.html")]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "x.html")]) == 2
    assert "no results in" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_commands_reproduce_the_configuration(run):
    lines = commands(collect([run]))
    how = "--preset compensated --clustering kmeans --clusters 3 --keep 0.9"
    assert lines[0] == f"moee extract tiny --data digits {how} --out extracted"
    assert lines[1] == "moee finetune extracted --epochs 2 --lr 1e-06 --out tuned"
    parser = cli.build_parser()
    for line in lines:
        parser.parse_args(line.split()[1:])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_setting_is_in_the_command(tmp_path, method):
    """Each option of every method in turn, at a value that is not its default; the command parses to the same value."""
    run = write_run(tmp_path / "run")
    path = run / "tuned" / "moee.json"
    body = json.loads(path.read_text())
    for name, info in method.options.model_fields.items():
        kind = plain_type(info.annotation)
        choices = [choice for choice in get_args(kind) if choice != info.default]
        value = ["a"] if get_origin(kind) is tuple else choices[0] if choices else (not info.default) if kind is bool else 7
        body["recipe"] = {"steps": [{"method": method.name, name: value}]}
        path.write_text(json.dumps(body))
        words = shlex.split(commands(collect([run]))[0])[1:]
        given = {name: tuple(value) if isinstance(value, list) else value}
        with contextlib.suppress(ValidationError):
            if name in method.options(**given).idle():  # alone it does nothing, and a command that names it would be refused
                given = {}
        assert given_options(cli.build_parser(method.name).parse_args(words), [method.options]) == given


def test_an_unknown_path_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="not found; give folders"):
        collect([tmp_path / "absent"])


def test_steps_that_flags_cannot_say_are_a_file(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "tuned" / "moee.json"
    body = json.loads(path.read_text())
    recipe = Recipe((HeadsOptions(attention_macs=0.8, seed=5, collages=2), StaticOptions(keep=0.5)))
    body["recipe"] = recipe.to_json()
    path.write_text(json.dumps(body))
    written, extract = commands(collect([run]))[:2]
    assert extract.endswith("--recipe recipe.toml --out extracted") and written.endswith("> recipe.toml")
    (tmp_path / "recipe.toml").write_text(shlex.split(written)[2])
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_what_else_a_command_needs_is_there(tmp_path):
    """Classes in another order than the folders', a function of one's own, and every tuning."""
    run = write_run(tmp_path / "run")
    path = run / "tuned" / "moee.json"
    body = json.loads(path.read_text())
    body["classes"] = ["red", "blue"]
    body["model"] |= {"library": "python", "name": "mine:make"}
    tuned = body["info"]["stages"]["tuned"]
    tuned |= {"data": "more", "before": [{"data": "digits", "config": {"epochs": 7}}]}
    path.write_text(json.dumps(body))
    lines = commands(collect([run]))
    assert shlex.split(lines[0])[2:] == ["red\nblue\n", ">", "classes.txt"] and "--class-map classes.txt" in lines[1]
    assert lines[2] == "moee finetune extracted --model mine:make --epochs 7 --out tuned"
    assert lines[3].startswith("moee finetune tuned --model mine:make --data more --epochs 2")
    first = {"data": "digits", "config": {"experts": 8}, "tunings": 1}
    body["info"]["stages"]["shrunk"] = {"data": "more", "config": {"specialise": True}, "tunings": 2, "before": [first]}
    path.write_text(json.dumps(body))
    made = [line.split(" ", 2)[1:] for line in commands(collect([run]))[2:6]]
    assert [command for command, _ in made] == ["finetune", "shrink", "finetune", "shrink"]
    assert made[1][1] == "tuned --model mine:make --experts 8 --out shrunk" and made[2][1].startswith("shrunk ")
    assert made[3][1] == "tuned2 --model mine:make --data more --specialise --out shrunk2"


def test_the_command_makes_the_same_recipe(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "tuned" / "moee.json"
    body = json.loads(path.read_text())
    heads = {"attention_macs": 0.8, "seed": 5}
    clear = {"rank": 8, "residual_rank": 4, "router": "mlp", "compensation": "mean", "score": False, "seed": 5}
    for method, values in (("clear-moe", clear), ("static", {"keep": 0.5, "exclude": ("a", "b"), "seed": 5}),
                           ("moefication", {"experts": 8, "top_k": 2, "seed": 5}), ("experts", {"seed": 5}),
                           ("experts", {"keep": 0.5, "clusters": 4, "seed": 5})):  # fmt: skip
        recipe = make_recipe(method, values={**heads, **values})
        body["recipe"] = recipe.to_json()
        path.write_text(json.dumps(body))
        args = cli.build_parser(method).parse_args(shlex.split(commands(collect([run]))[0])[1:])
        assert make_recipe(args.method, args.preset, given_options(args, [m.options for m in METHODS])) == recipe
    body["recipe"] = make_recipe("clear-moe", values=clear).to_json()
    body["info"]["layers"][0]["ranks"] = [8, 4, 8, 4]
    path.write_text(json.dumps(body))
    engine = json.loads((run / "engine" / "engine.json").read_text())
    engine |= {"plugin": {"file": "", "sha256": "", "headers": ""}, "plugin_layers": 0}
    (run / "engine" / "engine.json").write_text(json.dumps(engine))
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "A CLEAR-MoE layer holds no neurons" in page and "Standard operators alone, no plugin." in page
