"""Manifests from someone else: any value anywhere, names that leave the folder, models that would fill the memory."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from exporter.report import collect, render
from moee import checkpoint
from moee.artifact import read_json, read_manifest, sha256_file
from moee.errors import UserError
from tests.untrusted.fuzzing import COUNTS, JSON, accepts_or_refuses, fuzz


def places(body, path=()):
    """Every position in a JSON value."""
    yield path
    children = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def replaced(body, path, value):
    if not path:
        return value
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[path[0]] = replaced(body[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("count", COUNTS)
def test_manifests_with_any_value_anywhere(made, tmp_path, count):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    spots = [p for p in places(body) if p and p[0] != "tools"]

    @fuzz(count, st.sampled_from(spots), JSON)
    def check(spot, value):
        (folder / "moee.json").write_text(json.dumps(replaced(body, spot, value)))
        accepts_or_refuses(checkpoint.load, folder)
        render(collect([folder])) if accepts_or_refuses(collect, [folder]) else None


HUGE = [{"img_size": 10**9}, {"embed_dim": 12288}, {"depth": 10**9}, {"mlp_ratio": 9999.0}, {"img_size": 8192}]


@pytest.mark.parametrize("kwargs", HUGE, ids=str)
def test_a_manifest_cannot_ask_for_a_huge_model(made, tmp_path, kwargs):
    """Refused before any memory is taken: the largest of these would need terabytes."""
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    body = json.loads((folder / "moee.json").read_text())
    body["model"]["kwargs"] |= kwargs
    (folder / "moee.json").write_text(json.dumps(body))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not accepts_or_refuses(checkpoint.load, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


@pytest.mark.parametrize("count", COUNTS)
def test_any_json_as_a_manifest(tmp_path, count):
    @fuzz(count, JSON | st.dictionaries(st.sampled_from(["schema", "files", "layers", "model"]), JSON | st.just("moee.model/1")))
    def check(body):
        (tmp_path / "moee.json").write_text(json.dumps(body))
        accepts_or_refuses(checkpoint.load, tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 200_000, b"{" * 10, b'{"a":' * 100_000, b"9" * 10_000, b"\0"])
def test_bytes_that_are_no_json(tmp_path, data):
    (tmp_path / "moee.json").write_bytes(data)
    assert not accepts_or_refuses(read_json, tmp_path / "moee.json") or data == b"9" * 10_000
    assert not accepts_or_refuses(read_manifest, tmp_path, "moee.json", "moee.model/1")


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
