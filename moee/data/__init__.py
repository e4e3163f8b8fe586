"""Images with labels from folders, shards and built-in sets; class names.

A source comes in; numbered image sets go out.
Imports parallel, store and models.
"""
