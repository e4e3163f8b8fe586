"""Manifests from someone else: any value anywhere, names that leave the folder, models that would fill the memory."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st
from safetensors.torch import save_file

from exporter.report import collect, render
from moee.artifacts import checkpoint
from moee.artifacts.inspection import inspect_artifact
from moee.artifacts.model import recorded_data
from moee.errors import UserError
from moee.models.model import ModelSpec, load_model
from moee.store.artifact import read_json, read_manifest, sha256_file
from tests.untrusted.fuzzing import COUNTS, JSON, accepts_or_refuses, damaged, fuzz


@pytest.mark.parametrize("count", COUNTS)
def test_manifests_with_any_value_anywhere(made, tmp_path, count):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())

    @fuzz(count, damaged(body))
    def check(text):
        (folder / "moee.json").write_text(text)
        if accepts_or_refuses(checkpoint.load, folder):
            use(checkpoint.load(folder))
        render(collect([folder])) if accepts_or_refuses(collect, [folder]) else None


def use(moee):
    """What commands do with the free-form part of a manifest that loads."""
    accepts_or_refuses(recorded_data, moee.data)
    accepts_or_refuses(inspect_artifact, moee)
    assert isinstance(moee.info["stages"], dict) and isinstance(moee.info["layers"], list)
    json.dumps(moee.info, indent=2)


HUGE = [{"img_size": 10**9}, {"embed_dim": 12288}, {"depth": 10**9}, {"mlp_ratio": 9999.0}, {"img_size": 8192}, {"depth": 1000},
        {"img_size": [32, 10**9]}, {"img_size": float("nan")}, {"block_fn": {"a": [10**30]}}]  # fmt: skip


@pytest.mark.parametrize("kwargs", HUGE, ids=str)
def test_a_manifest_cannot_ask_for_a_huge_model(made, tmp_path, kwargs):
    """Refused before any memory is taken: the largest of these would need terabytes."""
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    body["model"]["kwargs"] |= kwargs
    (folder / "moee.json").write_text(json.dumps(body))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    assert not accepts_or_refuses(checkpoint.load, folder)
    assert time.perf_counter() - started < 5, "seconds"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


@pytest.mark.parametrize("count", COUNTS)
def test_any_json_as_a_manifest(tmp_path, count):
    @fuzz(count, JSON | st.dictionaries(st.sampled_from(["schema", "files", "layers", "model"]), JSON | st.just("moee.model/1")))
    def check(body):
        (tmp_path / "moee.json").write_text(json.dumps(body))
        accepts_or_refuses(checkpoint.load, tmp_path)


def test_a_deep_network_of_a_hierarchical_model_is_refused(made, tmp_path):
    """`depths` is a list; a number in it is as dangerous as one outside."""
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    body["model"] |= {"timm_name": "convnext_atto", "kwargs": {"depths": [2, 2, 10**6, 2]}}
    (folder / "moee.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="asks for 'depths' 1000000; expected at most"):
        checkpoint.load(folder)


NO_JSON = [b"", b"\xff\xfe", b'{"a":' * 100 + b"1" + b"}" * 100, b"[" * 200_000, b"{" * 10, b'{"a":' * 100_000, b"9" * 10_000,
           b"\0"]  # fmt: skip


@pytest.mark.parametrize("data", NO_JSON, ids=lambda data: repr(data[:8]))
def test_bytes_that_are_no_json(tmp_path, data):
    (tmp_path / "moee.json").write_bytes(data)
    assert not accepts_or_refuses(read_json, tmp_path / "moee.json") or data == b"9" * 10_000
    assert not accepts_or_refuses(read_manifest, tmp_path, "moee.json", "moee.model/1")


def test_files_that_are_no_manifests_for_their_size_or_kind(tmp_path):
    with open(tmp_path / "moee.json", "wb") as file:
        file.truncate(40 << 20)
    with pytest.raises(UserError, match="larger than 32 MiB"):
        read_json(tmp_path / "moee.json")
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="no ordinary file"):
            read_json(path)


def test_a_changed_file_of_weights_is_noticed(made, tmp_path):
    """The dense model of an artifact is loaded from where it lay; its hash is in the manifest."""
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    dense = load_model(ModelSpec(**body["model"])).state_dict()
    save_file(dense, tmp_path / "w.safetensors")
    body["model"] |= {"random_seed": None}
    body["model"] |= {"weights": str(tmp_path / "w.safetensors"), "weights_sha256": sha256_file(tmp_path / "w.safetensors")}
    (folder / "moee.json").write_text(json.dumps(body))
    checkpoint.load(folder).dense()
    save_file({name: value + 1 for name, value in dense.items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="have changed since the artifact was made"):
        checkpoint.load(folder).dense()


def test_data_that_a_manifest_names_is_not_fetched(made, tmp_path):
    for name in ("hfds/someone/dataset", "tfds/x", "torch/cifar10"):
        with pytest.raises(UserError, match="say so with --data"):
            recorded_data(name)
    (tmp_path / "wds").mkdir()
    for name in ("digits", "photos:64", "wds/shards", str(tmp_path / "wds")):  # wds/ opens folders of this machine alone
        assert recorded_data(name) == name


def test_files_without_a_hash_are_refused(made, tmp_path):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    del body["files"]["model.safetensors"]
    (folder / "moee.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="has no hash of model.safetensors"):
        checkpoint.load(folder)


ESCAPES = ["../secret", "/etc/passwd", "a/../../s", "link", "folder/secret", "", "a\0b", "x" * 5000, "loop/x", "pipe", "\ud800"]


@pytest.mark.parametrize("name", ESCAPES, ids=range(len(ESCAPES)))
def test_names_that_leave_the_folder(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "link").symlink_to("../secret")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    digest = sha256_file(tmp_path / "secret")
    (folder / "moee.json").write_text(json.dumps({"schema": "moee.model/1", "files": {name: digest}}))
    with pytest.raises(UserError, match="leaves its folder|is missing"):
        read_manifest(folder, "moee.json", "moee.model/1")
    assert "match" not in render(collect([folder])).split("hashes of its files")[1].split("</table>")[0]


def test_no_command_fetches_data_that_a_file_names(made, tmp_path, monkeypatch):
    """bench falls back to noise, int8 asks for --data; neither opens the data set."""
    from exporter.commands.engines import bench
    from exporter.graph.export import export

    def opened(source, *args):
        raise AssertionError(f"{source} was opened")

    monkeypatch.setattr("moee.data.sources.load_data", opened)
    manifest = json.loads((made / "export" / "export.json").read_text())
    assert bench._data(None, {**manifest, "data": "hfds/someone/dataset"}, made / "export") is None
    moee = checkpoint.load(made / "model")
    moee.data = "hfds/someone/dataset"
    with pytest.raises(UserError, match="int8 needs calibration images.*may be fetched"):
        export(moee, tmp_path / "export", precision="int8")
