"""The registry of layer kinds: how each is recorded and rebuilt.

A layer comes in and its record goes out, and the other way round.
Imports layers, models, data, mlps and tokens.
"""
