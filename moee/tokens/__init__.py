"""Token merging (ToMe): blocks that merge alike patches, what they cost, and how many each merges.

A model and a number a block come in; the model with merging blocks goes out.
Imports interface, models and mlps.
"""
