#!/bin/sh
# Gathers what a bare machine with a GPU lacks: wheels, the selftest, its plugin and cases, at most 48 MiB (docs/gpu.md).
#   scripts/gpu_pack.sh [OUT] [--python 3.12]        OUT: build/gpu
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi; fi
exec "$PYTHON" -m tests.gpu.pack "$@"
