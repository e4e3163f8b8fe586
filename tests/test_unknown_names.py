"""A choice by name has no default: an unknown name is refused by whatever takes it, and never stands for another."""

import pytest
import torch

from exporter.precision import dtype_of
from exporter.quantization.calibrate import Histogram
from moee.calibrate.selection import Moments, select_neurons
from moee.calibrate.sensitivity import measure_sensitivity
from moee.clustering.cluster import make_clusterer
from moee.data.sources import load_data
from moee.errors import chosen
from moee.layers.clear_dispatch import backend
from moee.layers.clear_routers import fit_router
from moee.layers.report import LayerReport
from moee.layers.routing import make_router
from moee.methods.clear_moe.decompose import up_metric
from moee.methods.exchange import pack_finding, unpack_finding
from moee.methods.experts import ExpertsOptions
from moee.methods.moefication.options import MoeficationOptions
from moee.methods.moefication.split import find_moefication
from moee.models.ffn import FFN
from moee.parallel.group import Parcel
from moee.train.step import AMP
from plugins.targets import target
from plugins.workspace import Sizes, layout

FACTOR = torch.randn(24, 16)
MLP = FFN("mlp", "gelu", FACTOR, torch.zeros(24), FACTOR.T, torch.zeros(16), None, False)
REPORT = LayerReport("mlp", "dense", 24, 0, 24, [], [], 0.0)
TOKENS, LABELS = torch.randn(40, 16), torch.arange(40) % 2
MOMENTS = Moments(torch.ones(2), *(torch.rand(2, 24) for _ in range(3)))


class Stored:
    """Calibration tokens in memory."""

    count = 40

    def load(self, rows):
        return TOKENS[rows]


def config(kind=MoeficationOptions, **changes):
    """Options with a value that their validation would not let in."""
    return kind(**({"experts": 2} if kind is MoeficationOptions else {})).model_copy(update=changes)


def histogram():
    found = Histogram()
    found.add(TOKENS)
    return found


CASES = {
    "criterion": lambda: select_neurons(MOMENTS, MLP, "unheard", 0.9),
    "clustering": lambda: make_clusterer(config(ExpertsOptions, clustering="unheard"), 100),
    "split": lambda: find_moefication(MLP, Stored(), config(split="unheard")),
    "selector": lambda: find_moefication(MLP, Stored(), config(selector="unheard")),
    "routing": lambda: make_router("unheard", TOKENS, LABELS, 2),
    "router": lambda: fit_router("unheard", TOKENS, LABELS, 2),
    "metric": lambda: up_metric(MLP, TOKENS, "unheard"),
    "backend": lambda: backend("unheard"),
    "objective": lambda: measure_sensitivity(torch.nn.Identity(), {}, {}, None, 10, objective="unheard"),
    "amp": lambda: chosen(AMP, "unheard", "amp"),
    "part of the data": lambda: load_data("digits", None, "unheard"),
    "message between ranks": lambda: unpack_finding(Parcel({**pack_finding(REPORT).body, "kind": "unheard"}), MLP),
    "precision": lambda: dtype_of("unheard"),
    "step of int8": lambda: histogram().step("unheard"),
    "tactic": lambda: layout(Sizes(4, 16, 2, 24, 12, 1), "float16", "unheard"),
    "kernel target": lambda: target(1234),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unknown_name_is_refused(case):
    with pytest.raises(ValueError, match="1234|unheard"):
        CASES[case]()


def test_the_known_ones_are_named():
    with pytest.raises(ValueError, match="unknown colour 'green'; expected one of red, blue"):
        chosen({"red": 1, "blue": 2}, "green", "colour")
