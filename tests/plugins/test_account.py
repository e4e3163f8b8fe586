"""The account of launches: figures by hand, floors that no form goes below, every board and one sentence on bad input."""

from __future__ import annotations

import json

import pytest

from plugins.account import (
    EXPERTS,
    TOKENS,
    Layer,
    boards,
    bucket_forms,
    dense,
    idle_share,
    one_launch,
    packed_bytes,
    scoring,
    times_us,
    two_launches,
)
from plugins.aot.resources import main
from tests.plugins.synthetic import write_kernels

ORIN = boards()[0]


def test_a_layer_by_hand():
    """ViT-S, 197 tokens, 8 experts: 25 tokens each, two tiles of 16; half of 1,536 neurons, the union is all."""
    layer = Layer(197, 384, 1536, 8)
    assert layer.flops == 4 * 197 * 384 * 768 + 2 * 197 * 384 * 8
    assert layer.bytes == 2 * (2 * 1536 * 384 + 2 * 197 * 384)
    assert layer.tiles(16) == 16 and layer.tiles(32) == 8 and layer.tiles(16, 3) == 3
    assert Layer(197, 384, 1536, 1).bytes == 2 * (2 * 768 * 384 + 2 * 197 * 384)
    up, down = two_launches(layer)
    assert (up.programs, down.programs) == (4 * 12, 7 * 6)
    assert up.macs == scoring(layer)[0] + 4 * 16 * 64 * 384 and down.macs == 3 * 16 * 64 * 768
    (single,) = one_launch(layer)
    assert single.programs == 16 and one_launch(Layer(197, 768, 3072, 8)) is None


def test_copies_and_partial_tiles_by_hand():
    assert packed_bytes(Layer(1, 384, 1536, 8)) == 8 * 2 * 768 * 384 * 2
    assert idle_share(768, 64, 64) == 0
    widths = range(705, 769)  # each as often as the others
    assert idle_share(768, 1, 64) == pytest.approx(sum(1 - w / 768 for w in widths) / 64)
    assert idle_share(768, 16, 64) == pytest.approx((1 - 720 / 768 + 1 - 736 / 768 + 1 - 752 / 768) / 4)


def test_no_form_is_faster_than_its_floors():
    for board in boards():
        for dim, hidden in ((384, 1536), (768, 3072)):
            for tokens in TOKENS:
                for experts in EXPERTS[1:]:
                    layer = Layer(tokens, dim, hidden, experts)
                    single = one_launch(layer)
                    forms = [*bucket_forms(layer), two_launches(layer)] + ([single] if single else [])
                    assert {len(form) for form in forms} <= {1, 2, 3, 4}
                    for form in forms:
                        floor = max(layer.bytes / board.profile.gbytes / 1e3, layer.flops / board.profile.tflops / 1e6)
                        assert board.time_us(form) >= floor and board.time_us(form) >= len(form) * board.profile.launch_us
                        assert sum(s.programs * s.macs for s in form) * 2 >= layer.flops, "every tile is counted"


def test_fewer_launches_reach_more_where_launches_cost():
    """Few tokens on Orin: today's forms lose to dense, one launch does not. Many experts lose in every form."""
    few = times_us(ORIN, Layer(65, 384, 1536, 8))
    assert few["one"] < few["dense"] < few["today"]
    many = times_us(ORIN, Layer(65, 384, 1536, 32))
    assert many["dense"] < min(many["today"], many["two"], many["one"])
    static = times_us(ORIN, Layer(65, 384, 1536, 1))
    assert set(static) == {"dense", "static"} and static["static"] < static["dense"]
    assert min(map(ORIN.time_us, dense(Layer(65, 384, 1536, 1), 1536))) == static["dense"]


def test_the_page_holds_every_board(tmp_path, capsys):
    folder = write_kernels(tmp_path / "kernels", tuple(board.profile.sm for board in boards()), ("float16",))
    assert main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "**Modelled**" in shown and all(f"### {board.profile.name}\n" in shown for board in boards())
    assert shown.count("| ViT-B | 577 | 32 |") == 1 + len(boards())
    assert "No form of 32 experts beats dense at: ViT-S 65 × 1" in shown
    body = json.loads((folder / "kernels.json").read_text())
    body["kernels"] = [kernel for kernel in body["kernels"] if kernel["sm"] != 110]
    (folder / "kernels.json").write_text(json.dumps(body))
    assert main([str(folder)]) == 0
    assert "thor" not in capsys.readouterr().out, "there are no kernels whose programs could be counted"


@pytest.mark.parametrize("arguments, words", [([], "usage"), (["/nowhere"], "not found")])
def test_bad_input_is_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
