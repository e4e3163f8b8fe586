"""One module a command: `add_parser` declares its flags, `run` calls one function, shows the result, returns the exit code.

Parsed flags come in; an exit code goes out.
Imports moee, plugins, engines, front, plots, quantization, graph, ship, terminal, timing, targets, report, verification,
compression, clear_ablation, demo and doctor.
"""
