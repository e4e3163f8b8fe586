"""CLEAR-MoE: selected MLPs become a shared low-rank basis plus small low-rank experts, after training, without gradients.

`method` is the method among others, `options` its options.

Four phases: score the layers (`scoring`), decompose both linear maps (`decompose`, `ranks`), train a light router (`routers`),
dispatch tokens (`dispatch`). `convert` runs them in two passes, `analysis` and `build`, with the `choice` of layers and ranks in
between; `moee.layers.clear.ClearFFN` is what takes an MLP's place.
"""
