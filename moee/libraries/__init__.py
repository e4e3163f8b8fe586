"""Models of other libraries behind one interface.

A module or a name comes in; a model that speaks as timm's do goes out.
Imports interface, store and weights.
"""
