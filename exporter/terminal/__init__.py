"""What commands share: flags, progress and tables, exit codes, ranks.

A command line comes in; options, outputs and sessions go out.
Imports moee and graph.
"""
