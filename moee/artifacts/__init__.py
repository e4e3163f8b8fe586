"""Models with replaced layers in memory and on disk.

A model and what is known of it come in; a folder goes out, and the other way round.
Imports interface, layers, store, weights, libraries, models, data, mlps, tokens, given, places, kinds, measure and methods.
"""
