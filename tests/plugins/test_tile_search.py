"""The search for tiles: what is tried, what is dropped, the model by hand, and a run that goes on where it stopped."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.account import Layer, scoring
from plugins.aot.compile import Compiled
from plugins.aot.manifest import Kernel
from plugins.aot.search import __main__ as command
from plugins.aot.search import choice
from plugins.aot.search import trials as trials_module
from plugins.aot.search.candidates import GROUP_ROLES, VARIANTS, Group, accumulators, candidates, least_shared
from plugins.aot.search.choice import LEAST, WORST, chosen, estimate, gain, geometric_mean, state, taken, weakest
from plugins.aot.search.model import (
    SETTINGS,
    Setting,
    board_of,
    bound_by,
    bounds_us,
    layers,
    part_of,
    tile,
    time_us,
    warp_grid,
    work,
)
from plugins.aot.search.trials import Trial, Trials, compile_trial, key_of, label
from plugins.kernels.spec import Block
from plugins.tactics import SEARCHED, config
from plugins.targets import target

ORIN = Group(87, "expert_up", "bm16", "float16")
GROUPS = [Group(sm, role, v, "float16") for sm in command.SMS for role in VARIANTS for v in VARIANTS[role]]


def trial(group, settings, reason="", registers=64, shared=None):
    shared = least_shared(group, settings) if shared is None else shared
    return Trial(key=key_of((group, settings)), label=label(settings), reason=reason, registers=registers, shared_bytes=shared,
                 warps=settings.num_warps)  # fmt: skip


@pytest.fixture
def few(monkeypatch):
    """Forty candidates for each kernel."""
    monkeypatch.setattr(choice, "candidates", lambda group: candidates(group)[:40])
    choice._promises.cache_clear()
    yield
    choice._promises.cache_clear()


@pytest.fixture
def compiles(monkeypatch):
    """In the compiler's place: resources as estimated from a table's kernel of 64 registers. Lists what was compiled."""
    seen = []

    def fake(wanted, name):
        group, settings = wanted
        seen.append(wanted)
        anchor = trial(group, group.listed)
        kernel = estimate(group, anchor, settings)
        return trial(group, settings, registers=max(40, 48 + accumulators(group.role, kernel.block, kernel.warps)))

    monkeypatch.setattr(trials_module, "compile_trial", fake)
    return seen


def test_candidates_begin_with_the_table_and_keep_its_constants():
    for group in GROUPS:
        first, *others = candidates(group)
        assert first == config(group.role, group.variant, "float16") and len(others) > 10
        assert len({first, *others}) == len(others) + 1
        for other in others:
            named, kept = dict(other.constants), dict(first.constants)
            assert named["BM"] == other.block.m and named["BN"] == other.block.n and named.get("BK", 0) in (0, other.block.k)
            assert {k: v for k, v in named.items() if k[0] != "B" or k == "BS"} == {
                k: v for k, v in kept.items() if k[0] != "B" or k == "BS"
            }
            assert group.role in GROUP_ROLES or other.block.m == first.block.m
            assert least_shared(group, other) <= target(group.sm).shared_block
    small, large = (candidates(Group(sm, "expert_up", "bm64", "float16")) for sm in (86, 87))
    assert set(small) < set(large)
    assert all(least_shared(ORIN, c) > target(86).shared_block for c in set(large) - set(small))


def test_depth_follows_from_the_binary():
    """Figures of docs/results/kernels.md: a down kernel has half of its stages; sm_90 has one tile more, which is being read."""
    for role, block, stages, shared, sm, depth in (
        ("expert_up", Block(16, 64, 64), 4, 30720, 87, 3),
        ("expert_down", Block(16, 64, 64), 6, 20992, 87, 2),
        ("expert_up", Block(64, 64, 64), 3, 32768, 87, 2),
        ("expert_up", Block(64, 64, 64), 3, 49152, 90, 2),
        ("expert_down", Block(128, 128, 32), 5, 49424, 110, 2),
        ("group_up", Block(64, 64, 64), 3, 27648, 90, 2),
        ("expert_up", Block(16, 64, 64), 4, 0, 87, 1),
    ):
        assert tile(role, block, 4, stages, registers=64, shared_bytes=shared, sm=sm).depth == depth
    assert tile("expert_up", Block(16, 64, 64), 4, 4, registers=63, shared_bytes=30720, sm=87).resident == 5


def test_one_launch_by_hand():
    """ViT-S, 65 tokens, 8 experts on Orin: 8 tiles of 16 rows by 12 of 64 columns on 16 multiprocessors, 6 each, 5 at once."""
    layer, board = Layer(65, 384, 1536, 8), board_of(87)
    kernel = tile("expert_up", Block(16, 64, 64), 4, 4, registers=63, shared_bytes=30720, sm=87)
    task = work(layer, "expert_up", kernel.block, 4, 87)
    assert (task.programs, task.steps, task.macs, task.chain) == (96, 6, 16 * 64 * 64, 4)
    assert warp_grid(16, 64, 4) == (1, 4) and warp_grid(64, 64, 4) == (2, 2)
    assert task.shared == 2 * 64 * (4 * 16 + 64) + task.l2 and task.l2 == 2 * 80 * 64
    bounds = bounds_us(task, kernel, board, SETTINGS[0])
    rate = 42.5e6 / 2 / 16 * 0.6  # MACs a microsecond and multiprocessor
    assert bounds["products"] == pytest.approx(6 * 6 * task.macs / rate)
    assert bounds["L2"] == pytest.approx(6 * 6 * task.l2 / 64 / 1300)
    assert bounds["shared memory"] == pytest.approx(6 * 6 * task.shared / 128 / 1300)
    assert bounds["memory"] == pytest.approx(layer.bytes / 2 / 204.8e3)
    steps = [max(wait / 3, 60 + 4 * 33) for wait in (560, 280)]
    assert bounds["waits"] == pytest.approx((4 * 560 + 6 * steps[0] + 4 * 280 + 6 * steps[1]) / 1300)
    assert time_us(layer, kernel, board) == pytest.approx(6 + max(v for k, v in bounds.items() if k != "launch"))
    assert bound_by(layer, kernel, board) == "memory" and bound_by(layer, replace(kernel, sm=90), board_of(90)) == "launch"
    two = replace(kernel, warps=2, resident=1)
    assert bounds_us(task, two, board, SETTINGS[0])["products"] == pytest.approx(2 * bounds["products"])


def test_the_groups_score_before_they_multiply():
    layer = Layer(197, 384, 1536, 32)
    up = work(layer, "group_up", Block(64, 64, 64), 8, 87)
    assert (up.before, up.before_macs) == (2 * 12, scoring(layer)[0]) and up.tiles >= 8
    assert work(layer, "group_down", Block(64, 64, 64), 8, 87).before == 0
    fused = work(layer, "fused", Block(32, 32, 384), 8, 87)
    assert fused.programs * fused.steps * fused.macs == layer.tiles(32) * 2 * 32 * 768 * 384


def test_more_at_once_and_deeper_is_never_slower():
    for role, block in (("expert_up", Block(64, 64, 64)), ("group_down", Block(32, 64, 64)), ("fused", Block(32, 32, 384))):
        base = tile(role, block, 8, 3, registers=128, shared_bytes=33000, sm=120)
        for layer in layers(384):
            kernels = [replace(base, depth=d, resident=r) for d, r in ((1, 1), (2, 1), (2, 2), (4, 4))]
            times = [time_us(layer, kernel, board_of(120)) for kernel in kernels]
            assert times == sorted(times, reverse=True)


def test_other_assumptions_change_what_they_name():
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS) and SETTINGS[0] == Setting(SETTINGS[0].name)
    assert layers(0, 15)[0].width == 720 and layers(0)[0].width == 768 and len(layers(0)) == 48 and len(layers(384)) == 24
    board, part = board_of(120), part_of(board_of(120), 4)
    assert part.multiprocessors == 42 and part.profile.tflops / 42 == pytest.approx(board.profile.tflops / 170)
    for group in GROUPS[:3]:
        own = estimate(group, trial(group, group.listed), group.listed)
        assert weakest(group, own, own)[0].mean == 1
    with pytest.raises(ValueError, match="sm_80 has no board to model it by; expected some of 86, 87, 89, 90, 110, 120"):
        board_of(80)
    with pytest.raises(ValueError, match="no values"):
        geometric_mean([])


def test_a_search_ends_with_the_best_and_never_with_what_was_dropped(compiles, tmp_path):
    trials = Trials(tmp_path / "t.jsonl")
    group = Group(87, "expert_down", "bm16", "float16")
    (found,) = command.search([group], trials, 40, float("inf"), 1)
    assert found.finished and found.compiled == len(compiles) > 1 and found.best is not found.listed
    reached = weakest(group, found.listed.kernel, found.best.kernel)[0]
    assert reached.mean >= LEAST and reached.worst >= WORST
    assert gain(group, found.listed.kernel, found.best.kernel).mean >= max(reached.mean, 1.05)
    assert not taken({}, found), "at which layers its tile is chosen is not known"
    (down,) = command.search([Group(87, "group_down", "r16", "float16")], trials, 40, float("inf"), 1)
    assert taken({}, down) and not taken({}, replace(down, best=down.listed))
    spilt = trial(group, found.best.settings, reason="spills 8 bytes")
    trials.known[spilt.key] = spilt
    after = state(group, trials, 40)
    assert after.dropped == 1 and after.best.settings != found.best.settings
    with pytest.raises(ValueError, match="the table's own kernel was dropped"):
        trials.known[key_of((group, group.listed))] = trial(group, group.listed, reason="spills 8 bytes")
        state(group, trials, 40)


def test_a_kernel_that_is_slower_somewhere_is_not_best(few, tmp_path):
    """Tiles that gain in the mean and lose at some layer, or under another assumption."""
    trials, group = Trials(tmp_path / "t.jsonl"), Group(87, "group_down", "r16", "float16")
    own = trial(group, group.listed).tile(group, group.listed)
    for settings in choice.candidates(group):
        trials.known[key_of((group, settings))] = trial(group, settings)
    kernels = {c: k for c in choice.candidates(group) if (k := trial(group, c).tile(group, c)).resident}
    found = state(group, trials, 10_000)
    losing = [c for c, k in kernels.items() if weakest(group, own, k)[0].worst < WORST]
    faster = [c for c in losing if gain(group, own, kernels[c]).mean > gain(group, own, found.best.kernel).mean]
    assert faster and found.best.settings not in losing and found.best is not found.listed and not found.dropped


def test_a_stopped_run_is_gone_on_from(compiles, tmp_path, capsys):
    file = tmp_path / "new" / "t.jsonl"
    words = ["--sm", "orin", "--role", "fused", "--results", str(file), "--workers", "1"]
    assert command.main([*words, "--minutes", "1e-9"]) == 1
    out = capsys.readouterr().out
    assert "**Unfinished**: 1 of 1 searches" in out and "unfinished" in out and not compiles
    assert command.main([*words, "--most", "3"]) == 0
    first, shown = len(compiles), capsys.readouterr()
    assert 1 <= first <= 3 and f"{first}, 0 |" in shown.out and "**Modelled**" in shown.out and "[0/1]" in shown.err
    with file.open("a") as lines:
        lines.write('{"key":"half a li')
    assert command.main([*words, "--most", "3"]) == 0 and len(compiles) == first
    assert capsys.readouterr().out == shown.out and file.read_text().endswith("}\n")
    compiled = list(trials_module.compiled(None, [(ORIN, ORIN.listed)], time.monotonic() - 1))
    assert compiled == []


def test_the_page_of_an_sm(compiles, few, tmp_path, capsys):
    assert command.main(["--sm", "87", "--most", "1", "--results", str(tmp_path / "t.jsonl"), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "### sm_87 (Jetson Orin), as orin-agx with 16 multiprocessors" in out and "| 87 | orin-agx | 48 | " in out
    rows = [line for line in out.splitlines() if line.startswith("| ") and " warps, " in line]
    assert len(rows) == 11 and all(row.count(" | ") == 10 for row in rows)
    states = {(g.role, g.variant): state(g, Trials(tmp_path / "t.jsonl"), 1) for g in GROUPS if g.sm == 87}
    at = [chosen(states, group) for group in GROUPS if group.sm == 87 and group.role == "expert_up"]
    assert set().union(*at) == set(range(48)), "some tile is the fastest at every size"
    assert chosen({("expert_up", "bm16"): states["expert_up", "bm16"]}, ORIN) is None
    assert len(compiles) == 11 and any(s.left for s in states.values())
    assert "Cut off at the number that a search may compile" in out


def kernel_with(**changes):
    fields = {"role": "expert_up", "variant": "bm16", "dtype": "float16", "sm": 87, "symbol": "s", "cubin": "c", "ptx": "p",
              "sha256": "0", "num_warps": 4, "shared_bytes": 30720, "registers": 63, "spill_bytes": 0, "stack_bytes": 0,
              "mma_count": 8, "cp_async_count": 20, "ptx_version": 78, "block": {"m": 16, "n": 64, "k": 64},
              "grid": ["expert_tiles", "width_tiles", "one"], "args": []}  # fmt: skip
    return Compiled(Kernel.model_validate(fields | changes), b"", "")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"stack_bytes": 8}, "stack 8"),
        ({"shared_bytes": 200_000}, "wants 200000 bytes of shared memory"),
        ({"mma_count": 0}, "has no tensor-core instruction"),
    ],
)
def test_what_breaks_a_promise_is_dropped(changes, reason, monkeypatch):
    monkeypatch.setattr(trials_module, "compile_apart", lambda *a, **k: kernel_with(**changes))
    made = compile_trial((ORIN, ORIN.listed), "k")
    assert reason in made.reason and bool(made.reason) == bool(reason)
    assert (made.tile(ORIN, ORIN.listed) is None) == bool(reason) and made.shared_bytes == changes.get("shared_bytes", 30720)


def test_a_compiler_that_fails_drops_one_candidate_and_a_full_disk_stops(monkeypatch):
    def fails(error):
        def compile_apart(*arguments, **options):
            raise error

        monkeypatch.setattr(trials_module, "compile_apart", compile_apart)
        return compile_trial((ORIN, ORIN.listed), "k")

    assert fails(RuntimeError("PassManager::run failed\nat é")).reason == (
        "does not compile: RuntimeError: PassManager::run failed at ?"
    )
    with pytest.raises(OSError, match="no space"):
        fails(OSError("no space"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sm", "80"], "sm_80 has no board to model it by"),
        (["--sm", "abacus"], "unknown device 'abacus'"),
        (["--most", "0"], "--most: expected a number above 0 (came 0)"),
        (["--minutes", "nan"], "--minutes: expected a number above 0 (came nan)"),
        (["--workers", "-1"], "--workers: expected a number above 0 (came -1)"),
    ],
)
def test_bad_input_is_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"key": 1}\n', "\0\xff"])
def test_another_file_is_refused_and_left(text, tmp_path, capsys):
    file = tmp_path / "t.jsonl"
    file.write_text(text, encoding="latin-1")
    assert command.main(["--sm", "87", "--results", str(file)]) == 2
    assert "pass another --results" in capsys.readouterr().err and file.read_text(encoding="latin-1") == text


def test_the_table_holds_what_the_committed_page_takes():
    """Every search of the default command has a row with the table's settings, none is unfinished. Kernels of the SM are compiled
    with what its rows take, and with nothing else."""
    text = (Path(__file__).parents[2] / "docs" / "results" / "tiles.md").read_text()
    assert "nfinished" not in text and set(SEARCHED) <= set(command.SMS)
    taken_ones = 0
    for group in GROUPS:
        section = text.split(f"### sm_{group.sm} ")[1].split("### ")[0]
        (row,) = [line for line in section.splitlines() if line.startswith(f"| {group.role} {group.variant} |")]
        cells = row.split(" | ")
        assert cells[3] == label(group.listed)
        best = cells[5].removesuffix(" (**taken**)")
        used = [config(group.role, group.variant, dtype, group.sm) for dtype in command.DTYPES]
        assert {label(each) for each in used} == {best if best != cells[5] else cells[3]}, row
        taken_ones += best != cells[5]
    assert taken_ones == sum(map(len, SEARCHED.values())) > 0


def test_settings_of_an_sm_keep_the_rows_and_serve_half_precision_alone():
    for sm, found in SEARCHED.items():
        for role, variant in found:
            listed, used = config(role, variant, "float16"), config(role, variant, "float16", sm)
            assert used != listed and used.block.m == listed.block.m and used == config(role, variant, "bfloat16", sm)
            assert dict(used.constants)["BN"] == used.block.n and dict(used.constants)["BK"] == used.block.k
            assert config(role, variant, "float32", sm) == config(role, variant, "float32")
            assert config(role, variant, "float16", 80) == listed  # another SM keeps the table's


@pytest.mark.slow
def test_real_candidates_of_two_classes(tmp_path, capsys):
    """A handful through Triton and ptxas: resources come from the binaries, what does not fit is dropped with its reason."""
    file = tmp_path / "t.jsonl"
    assert command.main(["--sm", "86", "--sm", "90", "--role", "group_down", "--most", "3", "--results", str(file)]) == 0
    made = Trials(file).known.values()
    assert 2 <= len(made) <= 6 and any(not t.reason and t.registers > 32 and t.shared_bytes > 4096 for t in made)
    listed = Group(86, "group_down", "r16", "float16")
    own = Trials(file).get((listed, listed.listed))
    assert own.shared_bytes == 20992 and 64 < own.registers < 160, "as docs/results/kernels.md has it"
    shown = capsys.readouterr()
    assert "| group_down r16 |" in shown.out and "sm_86 group_down" in shown.err
    large = next(c for c in candidates(ORIN) if c.block.n == 256 and c.block.k == 32 and c.num_warps == 4 and c.num_stages == 2)
    assert compile_trial((ORIN, large), "k").registers > compile_trial((ORIN, ORIN.listed), "k").registers
