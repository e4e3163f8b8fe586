"""Ranks, their devices, and what they tell each other.

A launcher's environment comes in; a group goes out.
Imports no other room.
"""
