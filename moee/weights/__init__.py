"""Checkpoints as people have them: found, read safely, fitted to a model.

A file comes in; a state that fits goes out.
Imports interface and store.
"""
