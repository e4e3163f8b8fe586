"""Options that would do nothing beside others are refused before anything is read."""

import pytest

from exporter import cli

LINES = {
    "bench E --trust-engine": "--trust-engine is for engines, which --engine names; leave it out",
    "bench E --trust-engine --cuda-graph": "--trust-engine and --cuda-graph are for engines, which --engine names",
    "bench E --engine N --provider cuda --threads 2": "--provider and --threads are for graphs that ONNX Runtime runs",
    "bench E --engine N --profile": "--profile is for graphs that ONNX Runtime runs",
    "bench E --provider cuda --profile": "--profile is for ONNX Runtime on the CPU, and --provider is cuda",
    "bench E --throughput 0 --streams 3": "--streams is for the throughput, and --throughput 0 measures none",
    "bench E --batches 1,8 --batch 4": "--batch is for one export at one --batch",
    "build E --plugin P --sm orin --out O": "--sm is for the plugin that is compiled",
    "extract M --data D --out O --min-samples 3": "--min-samples is for --clustering hdbscan, dbscan and optics, and it",
    "extract M --data D --out O --min-cluster-size 0.1": "--min-cluster-size is for --clustering hdbscan and optics",
    "extract M --data D --out O --objective tokens": "--objective is for --criterion sensitivity, taylor, atomic or",
    "extract M --data D --out O --compensation mean --refit-tokens 9": "--refit-tokens is for --compensation refit, and it is",
    "extract M --data D --out O --compensation none --refit-lambda 1": "--refit-lambda is for --compensation refit",
    "finetune M --force-amp --out O": "--force-amp does nothing without --amp",
    "verify E --trust-engine": "--trust-engine is for engines",
    "verify E --quick --trust-engine": "--quick does not take --trust-engine",
    "plan test_vit --data digits --max-drop 1 --out O --batch 4": "--batch is for a device that models are timed on",
    "plan test_vit --data digits --max-drop 1 --out O --sm orin --candidates 2": "--candidates and --sm are for a device",
    "bench-dispatch --layer blocks.0.mlp": "--layer is for a layer of a model, whose folder is not given",
    "bench-dispatch M --dim 8": "--dim is for a layer of random weights, and M has layers of its own",
    "shrink M --experts 2 --tolerance 0.1 --out O": "--tolerance does nothing without --specialise",
    "shrink M --specialise --refit-lambda 1 --out O": "--refit-lambda does nothing without --experts",
}


@pytest.mark.parametrize("line", LINES)
def test_an_option_that_does_nothing_is_refused(line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    said = capsys.readouterr().err
    assert LINES[line] in said and "cannot be read" not in said
    assert not list(tmp_path.iterdir())


TAKEN = ["bench E --throughput 0 --streams 2", "bench E --batches 1 --batch 8", "shrink M --experts 2 --tolerance 0.01 --out O"]


@pytest.mark.parametrize("line", TAKEN)
def test_the_value_that_it_has_anyway_is_taken(line, capsys, monkeypatch, tmp_path):
    """What is refused is the folder, which is not there."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    said = capsys.readouterr().err
    assert "leave it out" not in said and "does nothing" not in said
