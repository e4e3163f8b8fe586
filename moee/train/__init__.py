"""Distillation from the dense model.

A model, its dense original and images come in; tuned weights go out.
Imports interface, layers, parallel, store, weights, models, data, mlps, places and measure.
"""
