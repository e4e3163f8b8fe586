"""What a device gets: graphs, plugin, runner, scripts.

An export comes in; a folder goes out.
Imports moee, plugins, deploy, engines, passes, runners, graph and parity.
"""
