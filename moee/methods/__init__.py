"""The methods that cut a model; `registry` lists them.

A model, options and a context come in; the model with its layers replaced and a report a layer go out.
Imports every room but artifacts, train, planning and ablation.
"""
