"""Search for tiles: which (n, k, warps, stages) of a kernel the model prefers on an SM, out of what compiles within its limits.

    python -m plugins.aot.search > docs/results/tiles.md

`candidates` lists settings around the tactic table's, `trials` compiles them and keeps what came out, `model` says what a kernel
would take, `choice` picks, `page` writes. All times are modelled.
"""
