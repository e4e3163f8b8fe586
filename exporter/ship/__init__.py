"""What a device gets: graphs, plugin, runner, scripts.

An export comes in; a folder goes out.
Imports graph, engines, deploy, plugins and moee.
"""
