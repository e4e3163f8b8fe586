"""The methods that cut a model; `registry` lists them.

A model, options and a context come in; the model with its layers replaced and a report a layer go out.
Imports clustering, interface, layers, parallel, space, store, models, data, mlps, tokens, calibrate, kinds, measure and train.
"""
