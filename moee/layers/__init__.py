"""The layers that take an MLP's place, and their operators.

Tokens come in; tokens go out.
Imports no other room.
"""
