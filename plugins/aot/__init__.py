"""Ahead of time: the Triton kernels become cubins and PTX for each GPU, on a CPU, with a manifest that says how to launch them.

Kernels and a list of SMs come in; a folder with `kernels.json` goes out, which `plugins.library` embeds.
"""
