"""How long models, layers and engines take, measured or modelled.

Exports and models come in; times go out.
Imports engines, forms, graph, moee, passes, plugins and runners.
"""
