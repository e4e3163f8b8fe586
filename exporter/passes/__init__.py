"""One rewrite of a graph a file.

A graph comes in; the same one with other nodes goes out.
Imports moee and plugins.
"""
