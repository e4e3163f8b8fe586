"""The last lines of extract, finetune and bench: what the figures say, what is not known, and what to do next."""

from types import SimpleNamespace

import pytest

from exporter.terminal.advice import after_bench, after_extract, after_finetune
from exporter.verdict import Verdict

ROUTED = [{"name": "a", "experts": 8}, {"name": "b", "experts": 0}]
ONE = [{"name": "a", "experts": 1}]


def stage(macs=0.7, accuracy=0.97, dense=0.975, cosine=0.99, **more):
    kept = {"accuracy": accuracy, "dense_accuracy": dense, "class_cosine": cosine}
    return {"retention": kept, "cost": {"dense": {"macs": 1000}, "moee": {"macs": 1000 * macs}}, **more}


@pytest.mark.parametrize(
    "layers, figures, said",
    [
        (ROUTED, {}, "saves 30% of the MACs; accuracy 97.00%, dense 97.50%. How fast it is was not measured; "
                     "next: moee export 'my model' --out export"),
        (ROUTED, {"macs": 0.99}, "saves 1% of the MACs, less than routing costs, and will be slower than dense: "
                                 "try --method static --target-macs 0.7"),
        (ROUTED, {"macs": 0.999}, "saves less than 1 % of the MACs, less than routing costs"),
        (ROUTED, {"macs": 1.02}, "needs 2% more MACs than dense and will be slower: try --method static"),
        (ONE, {"macs": 0.95}, "saves 5% of the MACs; accuracy"),
        (ROUTED, {"accuracy": 0.9}, "saves 30% of the MACs, but accuracy 90.00%, dense 97.50%: "
                                    "next tune it, moee finetune 'my model' --out tuned, or save less (--target-macs)"),
        (ROUTED, {"accuracy": None, "dense": None}, "its outputs' cosine to the dense ones is 0.990, accuracy not known. How"),
        (ROUTED, {"accuracy": None, "cosine": 0.7}, "but its outputs' cosine to the dense ones is 0.700, accuracy not known:"),
        (ROUTED, {"accuracy": None, "cosine": None}, "how much it keeps is not known. How fast"),
    ],
)  # fmt: skip
def test_after_extract(layers, figures, said):
    assert said in after_extract({"stages": {"extracted": stage(**figures)}, "layers": layers}, "my model", less="--target-macs")


def test_a_method_without_a_target_is_given_no_flag_for_one():
    assert after_extract({"stages": {"extracted": stage(cosine=0.7, accuracy=0.5)}, "layers": ONE}, "m").endswith("or save less")


def test_commands_of_a_function_of_the_users_name_it_again():
    info = {"stages": {"extracted": stage()}, "layers": ROUTED}
    assert after_extract(info, "m", ["--model", "mine:make"]).endswith("next: moee export m --model mine:make --out export")


def tuned(best, validation, **more):
    losses = {"train": [], "validation": validation}
    return {"stages": {"tuned": stage(best_epoch=best, losses=losses, config={"lr": 1.5e-5}, **more)}}


@pytest.mark.parametrize(
    "info, said",
    [
        (tuned(0, [0.01, 0.08, 0.07]), "nothing was learned: the validation loss was 0.01 at the start and 0.07 at best after "
         "it, so out has the weights of in; try --lr 2e-06, or go on with in: moee export in --out export"),
        (tuned(1, [0.01, 0.008, 0.009]), "epoch 1 of 2 was best: validation loss 0.01 to 0.008; accuracy 97.00%, dense 97.50%. "
         "Next: moee export out --out export"),
        (tuned(2, [0.1, 0.08, 0.07], accuracy=0.8), "dense 97.50%; it was still falling, so more --epochs may help. Next"),
    ],
)  # fmt: skip
def test_after_finetune(info, said):
    assert said in after_finetune(info, "in", "out")


@pytest.mark.parametrize(
    "held_out, accuracy, said",
    [("a", 0.99, "; accuracy 97.00%, dense 97.50%, less than the 99.00% as extracted. Next"), ("a", 0.97, "dense 97.50%. Next"),
     ("b", 0.99, "dense 97.50%. Next"), ("a", None, "dense 97.50%. Next")],
)  # fmt: skip
def test_an_accuracy_that_fell_while_the_loss_fell_is_said(held_out, accuracy, said):
    info = tuned(1, [0.01, 0.008, 0.009], held_out="a")
    stages = {"extracted": {**stage(accuracy=accuracy), "held_out": held_out}, **info["stages"]}
    assert said in after_finetune({"stages": stages}, "in", "out")


def timed(ratio, low, high, ideal=1.4, pairs=40):
    return SimpleNamespace(
        batch=8, runtime="onnxruntime CPU", ideal_speedup=ideal, verdict=Verdict(ratio, low, high, pairs),
    )  # fmt: skip


@pytest.mark.parametrize(
    "result, said",
    [
        (timed(1.31, 1.2, 1.4), "1.31x as fast as dense at batch 8, measured with onnxruntime CPU; "
                                "next: moee bundle e --sm orin --out bundle"),
        (timed(0.8, 0.7, 0.9), "0.80x as fast as dense at batch 8, measured with onnxruntime CPU, while its MACs allow 1.40x: "
                               "try a larger --batch, or extract with fewer experts"),
        (timed(0.8, 0.7, 0.9, ideal=1.01), "it saves too few MACs to be faster; extract again, try --method static"),
        (timed(0.8, 0.7, 0.9, ideal=None), "measured with onnxruntime CPU: try a larger --batch"),
        (timed(1.05, 0.9, 1.2), "not to be told from dense; time it longer"),
        (timed(1.31, 1.2, 1.4, pairs=3), "whether it is faster is not known: time it longer, with --duration 30"),
    ],
)  # fmt: skip
def test_after_bench(result, said):
    assert said in after_bench(result, "e")
