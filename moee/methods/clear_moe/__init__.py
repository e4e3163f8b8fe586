"""CLEAR-MoE: selected MLPs become a shared low-rank basis plus small low-rank experts, after training, without gradients.

Four phases: score the layers (`scoring`), decompose both linear maps (`decompose`, `ranks`), train a light router (`routers`),
dispatch tokens (`dispatch`). `convert` runs them in two passes, `analysis` and `build`, with the `choice` of layers and ranks in
between; `layer.ClearFFN` is what takes an MLP's place.
"""

from moee.layers.clear import ClearFFN
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.clear_moe.convert import convert

__all__ = ["ClearOptions", "ClearFFN", "convert"]
