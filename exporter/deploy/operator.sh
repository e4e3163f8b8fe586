#!/bin/sh
# Compiles the operator that models/runtime.onnx needs, for this machine's ONNX Runtime (1.18 or later). Needs a C++17 compiler.
#   operator/build.sh
set -eu
cd "$(dirname "$0")"
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null || { echo "no C++ compiler here; run: apt-get install g++" >&2; exit 3; }
"$compiler" @FLAGS@ -o libmoee_onnxruntime.so csrc/*.cpp
echo "operator/libmoee_onnxruntime.so built; run.py uses it"
