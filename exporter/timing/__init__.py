"""How long models, layers and engines take, measured or modelled.

Exports and models come in; times go out.
Imports moee, plugins, engines, passes, forms, runners and graph.
"""
