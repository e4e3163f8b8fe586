"""The routed-FFN operator: contract, Triton kernels, their ahead-of-time build, the TensorRT plugin."""
