"""Ablations: the paper's tables and sweeps at the scale of one machine, resumable, with a verdict on each published ordering.

Imports space, store, calibrate, mlps, places, measure, methods and stages.
"""
