"""The operator on the CPU, for ONNX Runtime: a C++ library that registers `moee::MoeeFfn`, and what builds it.

Sources come in; `libmoee_onnxruntime.so` goes out.
"""
