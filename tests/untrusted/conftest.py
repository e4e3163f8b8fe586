"""A small checkpoint and its export, for the tests of damaged ones."""

import pytest

from exporter.graph.export import export
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model
from tests.conftest import extract, tiny_images, tiny_spec


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A small checkpoint and its export."""
    folder = tmp_path_factory.mktemp("made")
    spec = tiny_spec(depth=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEE_CACHE", str(folder / "cache"))
        model = load_model(spec)
        config = method_options(clustering="kmeans", clusters=3, cluster_tokens=300)
        extract(model, tiny_images(24), config)
    moee = MoeeModel(model.eval(), spec, Recipe.of(config), "tiny", None, {"stages": {}, "layers": []})
    checkpoint.save(moee, folder / "model")
    export(moee, folder / "export", source=folder / "model")
    return folder
