"""Files of one model alone stand side by side: in a report, in a bundle, and where an engine is held against an export."""

import json
import shutil

import pytest

from exporter import cli
from exporter.belonging import built_from, export_ids, recorded, same, source_ids
from exporter.manifests import read_engine
from exporter.report import collect, render
from exporter.ship.contents import Tensor, read_head
from exporter.timing.latency import bench
from moee.errors import UserError
from moee.store.artifact import read_json, write_json
from tests.exporter.engines import write_engine
from tests.exporter.report_data import write_run

RESULTS = ("parity.json", "latency.json")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def other(tmp_path):
    return write_run(tmp_path / "other", weights=b"of another model")


def forget(*paths):
    """Make files as they were before they recorded what they belong to."""
    for path in paths:
        write_json(path, {key: value for key, value in read_json(path).items() if key != "belongs_to"})


def test_a_run_belongs_together_without_a_word(run):
    sources = collect([run])
    assert sources.problems == [] and sources.doubts == {} and len(sources.artifacts) == 7
    assert sources.artifacts["moee.model"].folder.name == "tuned"
    assert collect([run, run / "tuned", run / "parity.json"]).problems == [], "the same files once more"


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_of_another_model_is_not_shown(run, other, name):
    (run / name).unlink()
    sources = collect([run, other / name])
    assert f"moee.{name.removesuffix('.json')}" not in sources.artifacts
    assert any(f"other/{name} is of another model: not shown" in problem for problem in sources.problems)
    text = render(sources)
    assert text.count("is of another model: not shown") == 2, "in its section and among the sources"
    assert "Parity passed" not in text if name == "parity.json" else "2.00×" not in text


def test_a_chain_that_was_broken_by_a_new_model(run, tmp_path):
    """The model was made again in its place; its export and the result are the former one's."""
    new = write_run(tmp_path / "new", weights=b"made again")
    sources = collect([new / "tuned", run / "export", run / "parity.json", run / "engine"])
    assert set(sources.artifacts) == {"moee.model"} and len(sources.problems) == 3
    text = render(sources)
    assert "not verified" in text and "passed" not in text


def test_a_result_of_another_export_of_the_same_model(run):
    body = read_json(run / "parity.json")
    write_json(run / "parity.json", {**body, "belongs_to": {**body["belongs_to"], "export": "0" * 64}})
    sources = collect([run])
    assert [p.split("run/")[1] for p in sources.problems] == ["parity.json is of another export: not shown"]
    forget(run / "tuned" / "moee.json")
    assert "moee.parity" not in collect([run / "export", run / "parity.json"]).artifacts


@pytest.mark.parametrize("old", [("export/export.json", *RESULTS), ("parity.json",), ("engine/engine.json",)])
def test_old_files_are_shown_and_said_to_be_unknown(run, old):
    forget(*[run / name for name in old])
    sources = collect([run])
    assert len(sources.artifacts) == 7 and len(sources.problems) == len(old)
    assert all("it cannot be told whether" in problem and "belong together" in problem for problem in sources.problems)
    assert "It cannot be told whether" in render(sources) or old[0].startswith("export")


def test_two_of_a_kind_are_named(run, other):
    sources = collect([run, other])
    assert sources.artifacts["moee.model"].path == run / "tuned" / "moee.json"
    assert any(f"{other / 'tuned' / 'moee.json'} is not shown: {run / 'tuned' / 'moee.json'} is" in p for p in sources.problems)
    assert sources.artifacts["moee.parity"].path == run / "parity.json"
    assert any(f"{other / 'parity.json'} is of another model" in problem for problem in sources.problems)


def test_the_result_that_belongs_is_taken_wherever_it_stands(run, other):
    sources = collect([other / "parity.json", other / "export", run])
    assert sources.artifacts["moee.parity"].path == run / "parity.json"
    assert sources.artifacts["moee.export"].path == run / "export" / "export.json"


def test_arguments_that_hold_nothing_are_refused(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "foreign.json").write_text("{}")
    for path, said in ((tmp_path / "images", "no results in"), (tmp_path / "foreign.json", "nothing for a report in")):
        assert cli.main(["report", str(run), str(path), "--out", str(tmp_path / "r.html")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def test_the_command_says_what_is_not_shown(run, other, tmp_path, caplog):
    assert cli.main(["report", str(run / "tuned"), str(other / "parity.json"), "--out", str(tmp_path / "r.html")]) == 0
    assert "parity.json is of another model: not shown" in caplog.text and (tmp_path / "r.html").exists()


def test_plots_of_another_model_are_not_shown(run, tmp_path):
    for name, said in (("ours", source_ids(run / "tuned")), ("theirs", {"artifact": "0" * 64})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "routing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
        write_json(tmp_path / name / "routing.json", {"belongs_to": said})
    sources = collect([run, tmp_path / "ours", tmp_path / "theirs"])
    assert sources.plots == [tmp_path / "ours" / "routing.svg"]
    assert any("theirs/routing.svg is of another model: not shown" in problem for problem in sources.problems)


def test_an_export_says_what_it_was_made_from(tiny_export):
    manifest = read_json(tiny_export.folder() / "export.json")
    assert export_ids(manifest)["export"] and recorded(manifest) == recorded(json.loads(json.dumps(manifest)))
    result = bench(tiny_export.folder(), batch=1, runs=1)
    assert result.to_json()["belongs_to"] == export_ids(manifest)


def test_the_hash_of_a_graph_alone_tells_no_weights(tiny_export, tmp_path):
    """Two exports of equal layers differ in their weights' file; an engine of the one is not the other's."""
    first = tiny_export.copy(tmp_path / "first")
    engine = write_engine(tmp_path / "engine", first)
    manifest = read_json(first / "export.json")
    second = {**manifest, "files": {**manifest["files"], "moee.data": "0" * 64}}
    assert built_from(read_engine(engine), manifest, first / "tensorrt.onnx") is True
    assert built_from(read_engine(engine), second, first / "tensorrt.onnx") is False
    forget(engine / "engine.json")
    assert built_from(read_engine(engine), manifest, first / "tensorrt.onnx") is None


def test_a_bundle_takes_no_head_of_a_model_that_came_later(run, tmp_path):
    manifest = {"source": "run/tuned", "belongs_to": source_ids(run / "tuned")}
    assert read_head(tmp_path, manifest, Tensor("output", "float32", (32,))) is None
    shutil.rmtree(run)
    write_run(run, weights=b"made again")
    with pytest.raises(UserError, match="is not the one that was exported, it was made again; export again"):
        read_head(tmp_path, manifest, Tensor("output", "float32", (32,)))


def test_identity_is_of_weights_and_layers_not_of_time(run):
    path = run / "tuned" / "moee.json"
    before = source_ids(run / "tuned")
    write_json(path, {**read_json(path), "info": {"seconds": 7}})
    assert source_ids(run / "tuned") == before
    write_json(path, {**read_json(path), "layers": [{"name": "another"}]})
    assert same(source_ids(run / "tuned"), before) is False and same({}, before) is None
