"""`moee ablate paper`: which tables run here, and what the others would take."""

import shlex

import pytest

from exporter import cli
from moee.ablation import paper
from moee.ablation.grid import TABLES
from moee.config import FinetuneConfig
from tests.moee.test_inspection import PAPER


def test_the_models_are_the_papers_and_their_blocks_hold_their_macs():
    assert [m.name for m in paper.MODELS] == list(PAPER)
    for model in paper.MODELS:
        assert (model.macs / 1e9, model.params / 1e6) == pytest.approx(PAPER[model.name])
        inside = sum(2 * layer.dim * layer.hidden * layer.tokens for layer in model.shape.layers)
        weights = sum(2 * layer.dim * layer.hidden for layer in model.shape.layers)
        assert 0.55 < inside / model.macs < 0.99 and 0.55 < weights / model.params < 0.99, model.name
    assert set(paper.TABLES) < set(TABLES)


def test_hours_follow_from_the_macs_and_the_line_is_one_that_moee_takes():
    small = next(m for m in paper.MODELS if m.name == "deit_small_patch16_224")
    flops = 30 * 1_281_167 * 8 * 4.61e9  # teacher and student forward, and twice that backward
    assert FinetuneConfig().epochs == 30 and small.tuning_hours == pytest.approx(flops / 9.75e12 / 3600)
    assert small.clustering_hours == pytest.approx(12 * 170 / 3600)
    said = paper.lines()
    assert "were not run. Modelled" in said[0] and len(said) == 2 + len(PAPER)
    parts = [shlex.split(part.partition("|| ")[2]) for part in said[-1].split("; ") if "|| " in part]
    assert [cli.build_parser().parse_args(words[1:]).command for words in parts] == ["extract", "finetune"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["table"], "ablate 'table': expected paper, or nothing"), (["paper", "--tables", "2"], "leave --tables out")],
)
def test_what_does_not_go_is_refused(words, said, tmp_path, capsys):
    assert cli.main(["ablate", *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
