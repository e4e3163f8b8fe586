"""A device without hardware: a folder of tools that stand in for trtexec, ssh and what a Jetson has, for a PATH.

trtexec "builds" an engine that names its graph, and prints times as TensorRT 10.3 does. `times` in the folder says them, a line a
model: its id (or dense) and milliseconds, or `fail` for one that cannot be built, `stop` for one that does not run, `inf` for one
without a median, `sleep` for one that takes a minute.
"""

from __future__ import annotations

import os
from pathlib import Path

MODEL = "NVIDIA Jetson AGX Orin Developer Kit"
TRTEXEC = r"""#!/bin/sh
here=$(dirname "$0")
onnx= save= load= plugin=
for word in "$@"; do
    case "$word" in
        --help) echo "  --stronglyTyped             Create a strongly typed network."; exit 0 ;;
        --onnx=*) onnx=${word#*=} ;;
        --saveEngine=*) save=${word#*=} ;;
        --loadEngine=*) load=${word#*=} ;;
        --loadInputs=*) [ -s "${word##*:}" ] || exit 1 ;;
        --dynamicPlugins=*) plugin=${word#*=}; [ -s "$plugin" ] || { echo "[E] cannot open $plugin"; exit 1; } ;;
    esac
done
echo "$@" >> "$here/calls"
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec $*"
echo "[11/30/2026-10:00:00] [I] Selected Device: Orin"
echo "[11/30/2026-10:00:00] [I] TensorRT version: 10.3.0"
[ -z "$load" ] || onnx=$(cat "$load")
case "$onnx" in dense/*) model=dense ;; *) model=${onnx#candidates/}; model=${model%/*} ;; esac
[ -s "$onnx" ] || { echo "[11/30/2026-10:00:01] [E] Could not open file $onnx"; exit 1; }
if [ "$model" = dense ]; then ms=10; elif [ -n "$plugin" ]; then ms=12; else ms=6; fi
said=$(sed -n "s/^$model //p" "$here/times" 2>/dev/null)
ms=${said:-$ms}
if [ "$ms" = sleep ]; then exec sleep 60; fi
if [ -n "$save" ]; then
    if [ "$ms" = fail ]; then
        echo '[11/30/2026-10:00:01] [E] [TRT] ModelImporter.cpp:951: Invalid Node - "x\y"'
        echo "[11/30/2026-10:00:01] [E] Engine set up failed"
        echo "&&&& FAILED TensorRT.trtexec [TensorRT v100300] # trtexec $*"
        exit 1
    fi
    printf %s "$onnx" > "$save"
    exit 0
fi
if [ "$ms" = stop ]; then echo "[11/30/2026-10:00:01] [E] Error occurred during inference"; exit 1; fi
all="min = 0.1 ms, max = 99.5 ms, mean = $ms ms, median = $ms ms, percentile(90%) = 98 ms, percentile(99%) = 99.5 ms"
echo "[11/30/2026-10:00:02] [I] === Performance summary ==="
echo "[11/30/2026-10:00:02] [I] Throughput: 151.8 qps"
echo "[11/30/2026-10:00:02] [I] Latency: $(echo "$all" | sed "s/median = \([0-9]\)/median = 1\1/")"
echo "[11/30/2026-10:00:02] [I] Enqueue Time: $all"
echo "[11/30/2026-10:00:02] [I] H2D Latency: min = 0.1 ms, max = 0.2 ms, mean = 0.1 ms, median = 0.11 ms, percentile(99%) = 0 ms"
echo "[11/30/2026-10:00:02] [I] GPU Compute Time: $all"
echo "[11/30/2026-10:00:02] [I] D2H Latency: min = 0.1 ms, max = 0.2 ms, mean = 0.1 ms, median = 0.12 ms, percentile(99%) = 0 ms"
echo "[11/30/2026-10:00:02] [I] Total Host Walltime: 2.01 s"
echo "[11/30/2026-10:00:02] [I] Total GPU Compute Time: 1.99 s"
echo "&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec $*"
"""
CMAKE = r"""#!/bin/sh
here=$(dirname "$0")
[ ! -e "$here/no-compiler" ] || { echo "plugin.cpp:1:10: error: NvInfer.h: No such file"; exit 1; }
[ "$1" != --build ] || { mkdir -p "$2"; echo library > "$2/libmoee_plugin.so"; }
"""
# The rest of the device: its name and mode, and a user who is not root.
TOOLS = {
    "trtexec": TRTEXEC,
    "cmake": CMAKE,
    "nvpmodel": "#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n",
    "nvidia-smi": f"""#!/bin/sh
case "$1" in
    --query-gpu=name) echo '{MODEL}' ;;
    --query-gpu=compute_cap) echo 8.7 ;;
    *) echo '[N/A], [N/A]' ;;
esac
""",
    "id": '#!/bin/sh\ncat "$(dirname "$0")/uid" 2>/dev/null || echo 1000\n',
}
# Runs the command on "the device": in its folder, with its PATH alone. `refused` holds what an ssh that fails says.
SSH = r"""#!/bin/sh
device={device}
echo "$@" >> "$device/ssh-calls"
while [ "$1" != -- ]; do shift; done
if [ -e "$device/refused" ]; then cat "$device/refused" >&2; exit 255; fi
if [ -e "$device/silent" ]; then exec sleep 60; fi
if [ -e "$device/mute" ]; then exit 0; fi
cd "$device/home"
exec env -i HOME="$device/home" TMPDIR="$device/tmp" PATH="$device/bin:/usr/bin:/bin" {shell} -c "$3"
"""


def write_tools(folder: Path, *left_out: str) -> Path:
    """The tools, ready for a PATH."""
    folder.mkdir(parents=True)
    for name, text in TOOLS.items():
        if name not in left_out:
            _script(folder / name, text)
    return folder


def write_device(place: Path, *left_out: str, shell: str = "sh") -> Path:
    """A device in the folder `place`, and the folder with an ssh that reaches it, for this machine's PATH."""
    write_tools(place / "bin", *left_out)
    for name in ("home", "tmp", "reach"):
        (place / name).mkdir()
    _script(place / "reach" / "ssh", SSH.format(device=place, shell=shell))
    return place / "reach"


def path_with(folder: Path) -> dict[str, str]:
    """An environment whose PATH begins with the folder."""
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def _script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
