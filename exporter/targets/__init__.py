"""Where models will run: what `--device` may name, and how candidates are timed there.

Models come in; their times, measured or modelled, go out.
Imports moee, plugins, deploy, engines, runners, graph, ship and timing.
"""
