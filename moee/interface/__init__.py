"""How any model speaks here, and how it is recorded.

A module comes in; one that speaks as timm's models do goes out, and the spec that makes it again.
Imports no other room.
"""
