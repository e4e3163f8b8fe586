"""Versions of the JSON files: old ones are migrated, newer ones refused in one sentence."""

import json
from pathlib import Path

import pytest
import torch

from moee.artifacts import checkpoint
from moee.artifacts.checkpoint import SCHEMA
from moee.errors import UserError
from moee.kinds.routed import RoutedRecord
from moee.methods.recipe import read_recipe_json
from moee.models.model import ModelSpec
from moee.planning import found
from moee.schema import MIGRATIONS, split, upgraded
from moee.store.artifact import read_manifest, write_manifest

STORED = Path(__file__).parent / "stored"


def test_a_stored_manifest_of_version_1_still_reads():
    """Written by 0.1.0 and kept as it was: whoever changes the format must keep reading it, or migrate it."""
    body = upgraded(json.loads((STORED / "moee.model-1.json").read_text()), SCHEMA, STORED)
    assert body["schema"] == SCHEMA
    assert [RoutedRecord(**layer).name for layer in body["layers"]] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert ModelSpec(**body["model"]).timm_name == "vit_tiny_patch16_224"
    recipe = read_recipe_json(body["recipe"], STORED)
    assert recipe.cut.keep == 0.9 and recipe.method.name == "experts" and recipe.tune is None
    assert body["info"]["stages"]["extracted"]["retention"]["images"] == 719


STEPS = {
    ("moee.model", 1): lambda body: {**{k: v for k, v in body.items() if k != "data"}, "source": body["data"]},
    ("moee.model", 2): lambda body: {**body, "layers": [{**layer, "precision": "fp32"} for layer in body["layers"]]},
}


def test_an_old_file_goes_through_every_step():
    old = {"schema": "moee.model/1", "data": "digits", "layers": [{"name": "a"}]}
    new = upgraded(old, "moee.model/3", Path("moee.json"), STEPS)
    assert new == {"schema": "moee.model/3", "source": "digits", "layers": [{"name": "a", "precision": "fp32"}]}
    assert old["schema"] == "moee.model/1" and "data" in old, "the file's own content is left alone"
    assert upgraded(new, "moee.model/3", Path("moee.json"), STEPS) == new


@pytest.mark.parametrize(
    ("schema", "said"),
    [("moee.model/4", "a newer version wrote it; upgrade moee"), ("moee.model/0", "version 0 cannot be converted"),
     ("moee.export/3", "make it again"), ("moee.model", "make it again"), ("moee.model/x", "make it again"), (3, "make it again"),
     ("moee.model/²", "make it again"), (None, "make it again"), ("moee.model/-1", "make it again")],
)  # fmt: skip
def test_everything_else_is_one_sentence(schema, said):
    with pytest.raises(UserError, match=said) as error:
        upgraded({"schema": schema, "data": "x", "layers": []}, "moee.model/3", Path("moee.json"), STEPS)
    assert "expected 'moee.model/3'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("body", [[], "moee.model/1", None, 7])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(UserError, match="make it again"):
        upgraded(body, SCHEMA, Path("moee.json"))


def test_manifests_are_read_through_it(tmp_path):
    write_manifest(tmp_path, "moee.json", "moee.model/3", {})
    with pytest.raises(UserError, match="upgrade moee"):
        read_manifest(tmp_path, "moee.json", SCHEMA)


def test_migrations_form_whole_chains():
    """A step without its successors would strand a file halfway."""
    current = dict(map(split, (SCHEMA, found.SCHEMA)))
    assert {name for name, _ in MIGRATIONS} == set(current)
    for name, version in MIGRATIONS:
        reached = version
        while (name, reached) in MIGRATIONS:
            reached += 1
        assert reached == current[name]


def test_a_stored_artifact_of_version_1_still_computes_the_same():
    """Experts beside narrower heads, as the version before recipes wrote them, with its outputs on one image of ones."""
    moee = checkpoint.load(STORED / "moee.model-1")
    heads, experts = moee.recipe.steps
    assert (heads.attention_macs, heads.attention_heads) == (0.75, "equal")
    assert (experts.clustering, experts.clusters, experts.target_macs) == ("kmeans", 2, 0.75) and moee.recipe.tune is None
    with torch.no_grad():
        output = moee.model(torch.ones(1, 3, 32, 32))[0]
    expected = [-0.12417518347501755, 0.14122377336025238, -0.19683246314525604, 0.2551165223121643]
    torch.testing.assert_close(output, torch.tensor(expected), rtol=1e-4, atol=1e-5)
