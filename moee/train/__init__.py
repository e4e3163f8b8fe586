"""Distillation from the dense model.

A model, its dense original and images come in; tuned weights go out.
Imports data, models, mlps, layers, measure, places and parallel.
"""
