"""Models with replaced layers in memory and on disk.

A model and what is known of it come in; a folder goes out, and the other way round.
Imports every room but train, planning and ablation.
"""
