"""How long models, layers and engines take, measured or modelled.

Exports and models come in; times go out.
Imports graph, forms, runners, engines and moee.
"""
