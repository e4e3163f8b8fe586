#!/bin/sh
# Runs everything that wants a GPU, most important first, in under eight minutes (docs/gpu.md). Needs build/gpu of scripts/gpu_pack.sh.
#   scripts/gpu_acceptance.sh OUT        OUT: acceptance.json, the parts' results, log.txt
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { echo "expected the folder for the results: scripts/gpu_acceptance.sh OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$root"
python=${PYTHON:-python3}
site=$root/build/gpu-site/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -m tests.gpu.install build/gpu "$site"
export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "$python" -m tests.gpu "$out" "$@"
