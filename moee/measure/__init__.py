"""How a changed model compares with the dense one.

Two models and images come in; accuracies with intervals, cosines and costs go out.
Imports interface, layers, parallel, space, models, data, mlps and tokens.
"""
