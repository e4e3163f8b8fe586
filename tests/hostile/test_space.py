"""Space for what is kept while a command runs: where it lies, and what is said where the disk lacks it."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest

from exporter import cli
from exporter.terminal.failures import explain
from moee.calibrate import calibration
from moee.errors import UserError
from moee.store.scratch import scratch_in, temporary_folder
from tests.conftest import tiny_images
from tests.reliability.tiny_vit import NAME


def test_scratch_folders_lie_where_the_user_says(tmp_path, tried):
    before = tempfile.gettempdir()
    with scratch_in(tmp_path):
        with temporary_folder() as folder:
            assert folder.parent == tmp_path and os.environ["TMPDIR"] == str(tmp_path)
        assert list(tmp_path.iterdir()) == []
    with scratch_in(None), temporary_folder() as folder:
        assert str(folder.parent) == before
    tried("space", "a folder of the user's", "done")


@pytest.mark.parametrize("place", ["nowhere", "file", "/proc", "/dev/null"])
def test_a_scratch_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys, place, tried):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    before = tempfile.gettempdir()
    line = ["extract", NAME, "--random-weights", "0", "--data", "digits", "--out", "out", "--scratch", place]
    assert cli.main(line) == 2 and tempfile.gettempdir() == before
    assert f"--scratch {place}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    tried("space", f"scratch in {place}", "refused")


def test_a_full_disk_says_how_much_a_layer_needs(tmp_path, monkeypatch, tiny_model, tried):
    """With the first batch, before the calibration has run."""
    from moee.mlps.find import find_ffns

    def full(path, size_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(calibration, "reserve", full)
    ran, ffns = [], find_ffns(tiny_model).ffns
    tiny_model.register_forward_pre_hook(lambda module, inputs: ran.append(1))
    said = r"No space left on device: the tokens of `blocks.0.mlp` take \d+ MiB .* --scratch DIR, or fewer --tokens"
    with pytest.raises(UserError, match=said) as refused:
        calibration.collect_tokens(tiny_model, ffns, tiny_images(80), tmp_path, 1000)
    assert explain(refused.value)[0] == 3 and len(ran) == 1
    tried("space", "a full disk", "refused")
