"""`moee compress`: from a model and images to the fastest model that keeps to a budget, in one call.

A model, images, a budget and a time go in; a folder with every stage's artifact and a verdict comes out.
Imports moee, plugins, engines, plots, graph, ship, terminal, timing, targets, report and verification.
"""
