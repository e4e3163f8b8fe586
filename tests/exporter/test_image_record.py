"""Every command reads the images of an artifact as it was made from them: the same division, the same classes."""

import numpy as np
import pytest
from PIL import Image

from exporter import cli
from exporter.onnx_export import export
from moee import checkpoint
from moee.checkpoint import MoeeModel
from moee.config import make_extract_config
from moee.convert import extract
from moee.models import load_model
from tests.conftest import tiny_images, tiny_spec

SEED, CLASSES = 3, tuple("abcdefghij")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact of a folder without splits, of which the seed decides what is held out; and its export."""
    root = tmp_path_factory.mktemp("record")
    random = np.random.default_rng(0)
    for number in range(40):
        place = root / "pictures" / CLASSES[number % 10]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEE_CACHE", str(root / "cache"))
        model = load_model(tiny_spec())
        config = make_extract_config(clustering="kmeans", clusters=2, cluster_tokens=300, seed=SEED)
        extract(model, tiny_images(), config)
    moee = MoeeModel(model.eval(), tiny_spec(), config, str(root / "pictures"), classes=CLASSES)
    checkpoint.save(moee, root / "model")
    export(moee, root / "export", source=root / "model")
    return root


class Stop(Exception):
    pass


COMMANDS = {
    "verify": ("verify", "EXPORT"),
    "verify --data": ("verify", "EXPORT", "--data", "DATA"),
    "plots": ("plots", "MODEL", "--out", "OUT"),
    "bench": ("bench", "EXPORT"),
    "bench --data": ("bench", "EXPORT", "--data", "DATA"),
    "export": ("export", "MODEL", "--precision", "int8", "--out", "OUT"),
    "export --data": ("export", "MODEL", "--precision", "int8", "--data", "DATA", "--out", "OUT"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_divides_and_numbers_the_images_alike(made, tmp_path, monkeypatch, name):
    seen = []

    def opened(source, transform, *rest):
        split, *read = rest if isinstance(rest[0], str) else ("both", *rest)
        seen.append((source, transform.shape, split, *read[:3]))
        raise Stop

    for function in ("load_data", "load_splits"):
        monkeypatch.setattr(f"moee.sources.{function}", opened)
    places = {"EXPORT": made / "export", "MODEL": made / "model", "DATA": made / "pictures", "OUT": tmp_path / "out"}
    assert cli.main([str(places.get(word, word)) for word in COMMANDS[name]]) == 1
    split = {"plots": "both", "export": "train"}.get(name.split()[0], "val")
    assert seen == [(str(made / "pictures"), (3, 32, 32), split, SEED, CLASSES, 10)]


def test_int8_calibrates_on_no_held_out_image(made, tmp_path, monkeypatch):
    used = []

    def calibrate(model, data, *rest):
        used.append({data.describe(i) for i in range(len(data))})
        raise Stop

    monkeypatch.setattr("exporter.onnx_export.calibrate", calibrate)
    moee = checkpoint.load(made / "model")
    held_out = moee.record.images("val")
    for data in ((), ("--data", str(made / "pictures"))):
        assert cli.main(["export", str(made / "model"), "--precision", "int8", "--out", str(tmp_path / "out"), *data]) == 1
    assert len(used) == 2 and all(used) and not used[0] & {held_out.describe(i) for i in range(len(held_out))}
    assert used[0] == used[1]
