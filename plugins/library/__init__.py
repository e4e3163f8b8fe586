"""The TensorRT plugin library: kernels become C++ tables, and the sources of `csrc/` with them a shared library.

A folder with `kernels.json` comes in; `libmoee_plugin.so` goes out, or a folder that compiles to it on a device.
"""
