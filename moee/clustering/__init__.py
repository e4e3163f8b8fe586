"""Clusterings of hidden activations behind one interface: `options` chooses one, `cluster` runs it.

Activations and options come in; a label for each token goes out.
Imports no other room.
"""
