"""The memory and the disk that work will take, and those that are there.

Shapes and options come in; bytes, smaller batches, or a refusal go out.
Imports no other room.
"""
