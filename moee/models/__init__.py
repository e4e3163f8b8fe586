"""Load a model by name with the weights that a person has.

A name, options and a file come in; a model and its spec go out.
Imports interface, layers, store, weights and libraries.
"""
