"""A pickle is never opened, whatever it is called and wherever it lies."""

import json
import os
import shutil
from pathlib import Path

import pytest

from exporter import cli
from moee.models.model import ModelSpec, load_model
from moee.store.artifact import sha256_file
from tests.untrusted.fuzzing import accepts_or_refuses


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """(pickle bytes, the folder that appears if anyone opens them)."""
    pickle = __import__("pickle")
    return pickle.dumps(Canary(tmp_path / "opened")), tmp_path / "opened"


def test_the_canary_sings(canary):
    data, opened = canary
    __import__("pickle").loads(data)
    assert opened.is_dir(), "a canary that never sings proves nothing"


def test_a_pickle_is_never_opened(made, tmp_path, canary, monkeypatch):
    """Under every name and in every place where a file goes in; `torch.load` with its guard off is caught as well."""
    data, opened = canary
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    names = ["w.pth", "w.pt", "w.bin", "w.pkl", "w.safetensors", "w.safetensors.pth"]
    for name in names:
        (tmp_path / name).write_bytes(data)
        command = ["extract", "vit_tiny_patch16_224", "--data", "digits", "--checkpoint", tmp_path / name]
        assert cli.main([*map(str, command), "--out", str(tmp_path / "o")]) == 2
    for argument in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        spec = ModelSpec(name="x", timm_name="vit_tiny_patch16_224", kwargs={argument: str(tmp_path / "w.pth")}, random_seed=0)
        assert not accepts_or_refuses(load_model, spec)
    for name in ("w.pth", "w.safetensors"):  # a manifest that vouches for the file it names
        folder = Path(shutil.copytree(made / "model", tmp_path / f"names-{name}"))
        manifest = json.loads((folder / "moee.json").read_text())
        file = {"weights": str(tmp_path / name), "weights_sha256": sha256_file(tmp_path / name)}
        manifest["model"] |= {"random_seed": None, **file}
        (folder / "moee.json").write_text(json.dumps(manifest))
        for command in (["finetune", folder, "--data", "digits"], ["export", folder]):
            assert cli.main([*map(str, command), "--out", str(tmp_path / "o")]) == 2
        hub = tmp_path / f"hub-{name}"
        hub.mkdir()
        (hub / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
        shutil.copy(tmp_path / name, hub / {"w.pth": "pytorch_model.bin", "w.safetensors": "model.safetensors"}[name])
        assert cli.main(["extract", f"local-dir:{hub}", "--data", "digits", "--out", str(tmp_path / "o")]) == 2
    for file in ("model.safetensors", "moee.json", "probe.safetensors"):
        folder = Path(shutil.copytree(made / "model", tmp_path / f"model-{file}"))
        (folder / file).write_bytes(data)
        manifest = json.loads((made / "model" / "moee.json").read_text())
        if file != "moee.json":
            manifest["files"][file] = sha256_file(folder / file)
            (folder / "moee.json").write_text(json.dumps(manifest))
        for command in (["finetune", folder, "--data", "digits"], ["export", folder]):
            assert cli.main([*map(str, command), "--out", str(tmp_path / "o")]) == 2
    for file in ("tensorrt.onnx", "export.json", "moee.data"):
        folder = Path(shutil.copytree(made / "export", tmp_path / f"export-{file}"))
        (folder / file).write_bytes(data)
        for command in (["bundle", "--sm", "87"], ["verify"], ["build", "--plugin", tmp_path / "w.pth"]):
            code = cli.main([*map(str, command), str(folder), "--out", str(tmp_path / "o")])
            assert code in (2, 3), (command, file)
    (tmp_path / "pickle.json").write_bytes(data)
    assert cli.main(["report", str(tmp_path / "pickle.json"), "--out", str(tmp_path / "r.html")]) == 2
    assert not opened.exists(), "a pickle was opened"
