"""`moee plan` from the command line, the latency it is given, and the plan held to its word."""

import copy
import dataclasses
import io
import json

import pytest
import torch

from exporter import cli
from exporter.commands.models.plan import parse_shares, points_table, verdict
from exporter.forms import roofline
from exporter.forms.roofline import operation_ms, routed_ms
from exporter.terminal.ui import plain_console
from exporter.timing.device import dense_facts, latency_of, modelled
from moee.data.image_set import image_shape
from moee.errors import UserError
from moee.methods.clear_moe.convert import convert
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.registry import METHODS
from moee.models.model import ModelSpec
from moee.planning.budget import Budget
from moee.planning.plan import make_plan
from moee.stages.session import Session
from plugins import tactics
from plugins.devices import PROFILES
from tests.conftest import TINY, tiny_images


def test_a_gpu_figure_is_labelled_modelled_and_falls_with_the_width(tiny_moee):
    model, dense, data, *_ = tiny_moee
    shape = image_shape(data.images)
    whole = modelled(PROFILES["orin-agx"], dense, copy.deepcopy(dense), dense_facts(dense, shape), 8)
    assert whole["kind"] == "modelled" and whole["speedup"] == pytest.approx(1.0)
    ours = modelled(PROFILES["orin-agx"], dense, model, dense_facts(dense, shape), 8)
    assert ours["dense_ms"] == whole["dense_ms"] and ours["moee_ms"] != whole["moee_ms"]


def test_clear_moe_is_modelled_by_the_products_that_tensorrt_gets(tiny_moee):
    """Masked products: more experts of the same rank cost time, which the MACs of a token's own expert do not show."""
    _, dense, data, *_ = tiny_moee
    device, shape = PROFILES["orin-nano"], image_shape(data.images)

    def milliseconds(experts, rank):
        model = copy.deepcopy(dense)
        convert(model, data, ClearOptions(experts=experts, rank=rank, residual_rank=2, calibration_images=16, score=False))
        return modelled(device, dense, model, dense_facts(dense, shape), 4096)["moee_ms"]

    few, many, wide = milliseconds(2, 4), milliseconds(8, 4), milliseconds(2, 8)
    assert few < many and few < wide


def test_roofline_takes_the_slower_of_arithmetic_and_memory():
    device = PROFILES["rtx-4090"]
    assert operation_ms(device, 0, device.gbytes * 1e6, 0) == pytest.approx(1.0)
    assert operation_ms(device, 1e12, 0, 0) > 10 * operation_ms(device, 1e10, 0, 0)
    assert operation_ms(device, 0, 0, 10) == pytest.approx(device.launch_us * 1e-2)


def test_the_roofline_takes_the_forms_that_the_plugin_has():
    """Its launches, tiles and limits are those of the tactics, which it does not import: they need Triton."""
    forms = {t.name: t for t in tactics.TACTICS}
    up, fused = (tactics.VARIANTS["float16"][role].block for role in (("group_up", "r16"), ("group_fused", "d384")))
    steps = [s.role for s in forms["tile64"].launches if s.role != "combine"]  # which sums several experts of a token
    assert roofline.TILED_LAUNCHES == len(["clear", *steps])
    assert roofline.GROUP_LAUNCHES == len(forms["group16"].launches)
    assert roofline.GROUP_FUSED_LAUNCHES == len(forms["group_fused_d384"].launches)
    assert (roofline.GROUP, roofline.SCORED) == (tactics.GROUP, tactics.SCORED)
    assert (up.m, up.n) == roofline.GROUP_UP and fused.m == roofline.FUSED_TOKENS == roofline.GROUP_TILE
    assert roofline.FUSED_DIM == forms["group_fused_d384"].max_d


def test_a_routed_layer_takes_as_few_launches_as_its_sizes_allow():
    """Next to nothing to compute or to read: what is left of the time are the launches."""
    device = dataclasses.replace(PROFILES["orin-agx"], tflops=1e9, gbytes=1e9)

    def launches(dim, top_k):
        return round(routed_ms(device, dim, [64] * 4, [0.25] * 4, tokens=65, top_k=top_k) / device.launch_us * 1e3, 6)

    assert (launches(384, 1), launches(768, 1), launches(384, 2)) == (1, 2, 5)


def test_many_tokens_take_the_form_that_scores_each_once():
    device = PROFILES["orin-agx"]
    widths, load, tokens = [768] * 64, [1 / 64] * 64, 1 << 16
    routed = routed_ms(device, 768, widths, load, tokens=tokens, top_k=1)
    scores = operation_ms(device, tokens * 768 * 64, 2 * tokens * 768, 2)
    moved = 2 * (2 * tokens * 768 + 2 * 64 * 768 * 768 + 2 * tokens * 768)
    assert routed == pytest.approx(scores + operation_ms(device, 2 * tokens * 768 * 768, moved, 2))


def test_small_batches_pay_for_tiles(tiny_moee):
    """At one image the experts' tiles are mostly empty: the modelled gain must shrink or turn into a loss."""
    model, dense, data, *_ = tiny_moee
    device, shape = PROFILES["orin-agx"], image_shape(data.images)
    facts = dense_facts(dense, shape)
    assert modelled(device, dense, model, facts, 1)["speedup"] < modelled(device, dense, model, facts, 512)["speedup"]


def test_latency_is_measured_on_the_cpu_for_every_point(monkeypatch, tmp_path):
    torch.manual_seed(0)
    train, held = tiny_images(40), tiny_images(24)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (train, held))
    session = Session(ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, random_seed=0), "tiny")
    plan = make_plan(
        session, Budget(target_latency_ms=10_000.0), tmp_path / "plan", methods=("static",), targets=(0.8,),
        base={"cluster_tokens": 300},
        latency=latency_of("cpu", session, 4),
    )  # fmt: skip
    assert {p["method"] for p in plan["points"]} == {"static", "dense"}
    assert all(p["latency"]["kind"] == "measured on CPU" and p["latency"]["moee_ms"] > 0 for p in plan["points"])
    ranges = {p["method"]: p["latency"].get("speedup_range") for p in plan["points"]}
    assert ranges["dense"] is None and 0 < ranges["static"][0] <= plan["points"][0]["latency"]["speedup"] <= ranges["static"][1]
    with pytest.raises(UserError, match="misses latency"):
        make_plan(
            session, Budget(target_latency_ms=1e-6), tmp_path / "none", methods=("static",), targets=(0.8,),
            base={"cluster_tokens": 300},
            latency=latency_of("cpu", session, 4),
        )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--targets", "0.5,much"], "expected shares such as"),
        (["--targets", "1.5"], "between 0 and 1"),
        (["--min-cosine", "0.9", "--attention-macs", "1,2"], "--attention-macs 1,2: expected shares"),
        (["--min-cosine", "0.9", "--attention-macs", "1,0.3"], "give 0.50 or more"),
        (["--min-cosine", "0.9", "--attention-heads", "equal"], "give that too"),
        ([], "a plan needs a budget"),
        (["--min-cosine", "0.9", "--methods", "magic"], "unknown method magic"),
        (["--min-cosine", "0.9", "--device", "abacus"], "unknown device 'abacus'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    spec = ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, random_seed=0)
    monkeypatch.setattr("exporter.pretrained.resolve", lambda *a, **k: spec)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *a, **k: (tiny_images(8), tiny_images(8)))
    assert cli.main(["plan", "tiny", "--data", "digits", "--out", str(tmp_path / "p"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "p").exists()


def test_all_names_every_method_that_is_registered(monkeypatch, tmp_path, capsys):
    spec = ModelSpec(name="tiny", timm_name="vit_tiny_patch16_224", kwargs=TINY, random_seed=0)
    monkeypatch.setattr("exporter.pretrained.resolve", lambda *a, **k: spec)
    monkeypatch.setattr("moee.stages.session.load_splits", lambda *a, **k: (tiny_images(8), tiny_images(8)))
    asked = {}

    def stop(*_, methods, **__):
        asked["methods"] = methods
        raise UserError("stopped here")

    monkeypatch.setattr("moee.planning.plan.make_plan", stop)
    line = ["plan", "tiny", "--data", "digits", "--out", str(tmp_path / "p"), "--min-cosine", "0.9", "--methods", "all"]
    assert cli.main(line) == 2 and "stopped here" in capsys.readouterr().err
    assert asked["methods"] == tuple(name for method in METHODS for name in method.variants) and "lowrank" in asked["methods"]


def test_shares_are_parsed():
    assert parse_shares("--targets", "0.8,0.6,0.8") == (0.8, 0.6)
    assert parse_shares("--targets", None) is None
    assert parse_shares("--attention-macs", "1,0.8", whole=True) == (1.0, 0.8)
    for text, whole in (("", False), ("1", False), ("0", True), ("nan", True)):
        with pytest.raises(UserError, match="--targets"):
            parse_shares("--targets", text, whole)


def test_the_table_has_the_attention_where_a_point_is_narrower():
    def shown(attention):
        point = {
            "method": "static", "allocation": "share", "macs": 0.6, "params": 0.7, "cosine": 0.98, "accuracy": None,
            "latency": None, "recipe": {"steps": []}, "attention": attention,
        }  # fmt: skip
        dense = {**point, "method": "dense", "allocation": "", "recipe": None, "attention": 1.0}
        plan = {"model": {"name": "m"}, "data": "d", "points": [point, dense], "front": [point], "winner": point, "margins": {}}
        console = plain_console(width=120, record=True, file=io.StringIO())
        console.print(points_table(plan))
        return console.export_text(), verdict(plan)[0]

    table, sentence = shown(0.75)
    assert "attention" in table and "75.00%" in table and "beside 75.00% of the attention at 60.00%" in sentence
    table, sentence = shown(1.0)
    assert "attention" not in table and "attention" not in sentence


@pytest.mark.slow
def test_the_plan_meets_its_budget_on_the_cpu(tmp_path):
    """Real training, real plan, real extraction: accuracy within the drop, MACs as promised, latency measured."""
    plan, model = tmp_path / "plan", tmp_path / "model"
    assert cli.main([
        "plan", "vit-scratch", "--data", "digits", "--max-drop", "1", "--device", "cpu", "--methods", "kmeans-8,static",
        "--targets", "0.8,0.6", "--cluster-tokens", "3000", "--refit-tokens", "20000", "--out", str(plan),
    ]) == 0  # fmt: skip
    found = json.loads((plan / "plan.json").read_text())
    assert cli.main(["extract", "vit-scratch", "--data", "digits", "--plan", str(plan), "--out", str(model)]) == 0
    stage = json.loads((model / "moee.json").read_text())["info"]["stages"]["extracted"]
    kept, cost = stage["retention"], stage["cost"]
    assert kept["dense_accuracy"] - kept["accuracy"] <= 0.01
    assert cost["moee"]["macs"] / cost["dense"]["macs"] == pytest.approx(found["winner"]["macs"], abs=0.005)
    assert found["winner"]["latency"]["moee_ms"] < found["winner"]["latency"]["dense_ms"] or found["winner"]["method"] == "dense"
