#!/bin/sh
# The acceptance without a GPU: up to the first launch, in an environment like the machine's, offline (docs/gpu.md).
#   scripts/gpu_rehearse.sh [OUT] [--python python3.12]        OUT: build/gpu-rehearsal/results
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi; fi
exec "$PYTHON" -m tests.gpu.rehearse "$@"
