"""Find and prove what can be cut: MLPs, gated MLPs, attention.

A model comes in; its MLPs, with the reasons of what stays dense, go out.
Imports interface, layers, models and data.
"""
