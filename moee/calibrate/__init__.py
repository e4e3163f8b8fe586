"""What calibration tokens tell of an MLP: statistics, sensitivity, refit.

A model and images come in; tokens, moments and corrections go out.
Imports clustering, interface, layers, parallel, space, store, models, data, mlps and tokens.
"""
