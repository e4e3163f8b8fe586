"""TensorRT engines and what building them needs.

An export comes in; engines go out.
Imports moee and plugins.
"""
