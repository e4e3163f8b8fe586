"""Ranks, their devices, and what they tell each other.

A launcher's environment comes in; a group goes out.
Imports nothing of the project but what everyone may use.
"""
