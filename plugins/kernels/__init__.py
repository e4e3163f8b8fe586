"""The Triton kernels of the routed FFN, one a file: PyTorch reference, kernel, launch description (`SPEC`)."""
