"""What calibration tokens tell of an MLP: statistics, sensitivity, refit.

A model and images come in; tokens, moments and corrections go out.
Imports data, models, mlps, layers, clustering and parallel.
"""
