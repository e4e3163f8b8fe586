"""What a device gets: graphs, plugin, runner, scripts.

An export comes in; a folder goes out.
Imports deploy, engines, graph, moee, passes and plugins.
"""
