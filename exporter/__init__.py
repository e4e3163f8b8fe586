"""ONNX export, engines, parity, latency and the command line for routed ViTs."""
