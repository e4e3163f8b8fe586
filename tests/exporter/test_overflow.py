"""Weights and outputs that are too large for half precision: refused by the export, never blamed on the labels."""

import copy
import json
import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from exporter.graph.export import export
from exporter.parity.refusals import refuse_foreign
from exporter.precision import refuse_overflow
from exporter.verification import verify
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.accuracy import NO_ANSWER, comparison, shared_answers, top1
from tests.exporter.conftest import rehash


def model_of(value: float) -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[2, 3] = value
        model[0].weight.fill_(1e6)  # norms stay in float32
    return model


@pytest.mark.parametrize(
    ("value", "precision", "cure"),
    [(1e5, "fp16", "fp16: `1.weight` of it holds 1e+05, and float16 ends at 65504; use --precision bf16 or fp32"),
     (3.4e38, "bf16", "bf16: `1.weight` of it holds 3.4e+38, and bfloat16 ends at .*; use --precision fp32")],
)  # fmt: skip
def test_a_weight_beyond_a_type_is_refused_with_what_holds_it(value, precision, cure):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with pytest.raises(UserError, match=cure.replace("+", r"\+")):
        refuse_overflow(model_of(value), dtype, precision, "it")
    refuse_overflow(model_of(60_000.0), dtype, precision, "it")
    refuse_overflow(model_of(value), torch.float32, "fp32", "it")


def test_weights_that_all_become_zero_are_said(caplog):
    model = model_of(0.0)
    nn.init.constant_(model[1].bias, 1e-9)
    with caplog.at_level(logging.INFO, "moee"):
        refuse_overflow(model, torch.bfloat16, "bf16", "it")
        assert not caplog.messages
        refuse_overflow(model, torch.float16, "fp16", "it")
    assert caplog.messages == ["--precision fp16: all of `1.bias` of it is too small for it and becomes zero"]


@pytest.mark.parametrize("part", ["w_down", "b_out"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_export_that_would_hold_infinite_weights_is_not_written(tiny_export, tmp_path, part, precision):
    ours = copy.deepcopy(tiny_export.moee.model)
    getattr(routed_layers(ours)["blocks.1.mlp"], part).data.view(-1)[0] = 1e5
    moee = MoeeModel(ours, tiny_export.moee.spec, tiny_export.moee.recipe, "digits")
    with pytest.raises(UserError, match=rf"`blocks.1.mlp.{part}` of the model with experts holds 1e\+05"):
        export(moee, tmp_path / "out", precision=precision, calibration=tiny_export.data, calibration_images=8)
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_no_numbers_fail_and_are_not_blamed_on_the_labels(tiny_export, tmp_path):
    """The dense graph is broken: with and without a gate of accuracy that is a failure, not bad input."""
    folder = tiny_export.copy(tmp_path / "export")
    graph = onnx.load(folder / "dense.onnx")
    bias = next(t for t in graph.graph.initializer if t.name.endswith("head.bias"))
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.inf, np.float32), bias.name))
    onnx.save(graph, folder / "dense.onnx", save_as_external_data=True, location="dense.data")
    rehash(folder)
    for gate in (None, 1.0):
        result = verify(folder, tiny_export.moee, tiny_export.data, sizes=(2,), max_drop_pp=gate)
        assert not result and result.parity and result.accuracy is None
        failed = [case for case in result.cases() if case.failure]
        said = f"NaN or infinite on {len(tiny_export.data)} of {len(tiny_export.data)} images"
        assert [case.name for case in failed] == ["dense outputs"] and said in failed[0].failure
        assert said in result.no_accuracy and "labels" not in result.no_accuracy
        assert json.loads(json.dumps(result.to_json()))["passed"] is False


def test_a_comparison_says_that_the_outputs_are_no_numbers():
    labels = torch.tensor([0, 1] * 20)
    logits = torch.nn.functional.one_hot(labels, 2).float()
    logits[3] = float("nan")
    assert int((top1(logits) == NO_ANSWER).sum()) == 1
    reason = comparison(labels, 2, 2, "d", logits=logits).reason
    assert reason == "the dense model's outputs are NaN or infinite on 1 of 40 images in d"


def test_an_export_of_another_model_is_refused_by_its_manifest(tiny_export, tmp_path):
    folder = tiny_export.copy(tmp_path / "export")
    refuse_foreign(folder, tiny_export.moee)
    path = folder / "export.json"
    body = json.loads(path.read_text())
    assert body["experts"] == {name: 4 for name in body["routed_layers"]}
    for change, said in (
        ({"experts": {**body["experts"], "blocks.2.mlp": 5}}, "'blocks.2.mlp' has 5 experts there, 4 here"),
        ({"routed_layers": body["routed_layers"][:2]}, "only one of the two has experts in 'blocks.2.mlp'"),
        ({"model": {**body["model"], "timm_name": "vit_small_patch16_224"}}, "that was 'vit_small_patch16_224', this is"),
    ):
        path.write_text(json.dumps({**body, **change}))
        with pytest.raises(UserError, match=said):
            refuse_foreign(folder, tiny_export.moee)
    del body["experts"]  # of earlier versions
    path.write_text(json.dumps(body))
    refuse_foreign(folder, tiny_export.moee)


def test_an_agreement_that_any_constant_has_is_none():
    same, other = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert shared_answers(same, same) is None
    assert shared_answers(same, other) == 0.75, "where they differ, it is worth saying"
    assert shared_answers(other, other) == 1.0 and shared_answers(same[:1], same[:1]) == 1.0


def test_a_model_of_constant_output_is_said_to_show_little(tiny_export, tmp_path):
    ours = copy.deepcopy(tiny_export.moee.model)
    nn.init.zeros_(ours.head.weight)
    moee = MoeeModel(ours, tiny_export.moee.spec, tiny_export.moee.recipe, "digits")
    export(moee, tmp_path / "out")
    result = verify(tmp_path / "out", moee, tiny_export.data, sizes=(2,), images=0)
    assert result.parity and result.parity.top1_agreement is None
    same, agreement = result.parity.notes
    assert "every image the same output" in same and "top-1 agreement is not shown" in agreement
    assert verify(tiny_export.folder(), tiny_export.moee, tiny_export.data, sizes=(2,), images=0).parity.notes == []
