"""The layers that take an MLP's place, and their operators.

Tokens come in; tokens go out.
Imports nothing of the project but what everyone may use.
"""
