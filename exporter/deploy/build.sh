#!/bin/sh
# Checks the bundle, compiles the runner and, if there is one, the plugin with its self-test, builds the engines and puts them in place. Run it on the device.
#   ./build.sh [--builder trtexec|moee] [--deepstream] [--compile-only] [-- CMAKE_OPTIONS]
set -eu
cd "$(dirname "$0")"
. ./bundle.env

builder=trtexec
deepstream=no
engines=yes
while [ $# -gt 0 ]; do
    case "$1" in
        --builder) builder=${2:?--builder takes trtexec or moee}; shift ;;
        --deepstream) deepstream=yes ;;
        --compile-only) engines=no ;;
        --) shift; break ;;
        *) sed -n '2,3s/^# *//p' "$0" >&2; exit 2 ;;
    esac
    shift
done
case "$builder" in trtexec|moee) ;; *) echo "build.sh: unknown builder $builder; expected trtexec or moee" >&2; exit 2 ;; esac

echo "checking files"
sha256sum --check --quiet --strict SHA256SUMS || { echo "build.sh: the bundle was changed or cut short; copy it again" >&2; exit 2; }

parts=runner
plugin=
if [ "$PLUGIN" = yes ]; then
    parts="plugin selftest runner"
    plugin=$PWD/plugin/build/libmoee_plugin.so
fi
for part in $parts; do
    echo "compiling $part"
    cmake -S "$part" -B "$part/build" -DCMAKE_BUILD_TYPE=Release "$@" > "$part.log" 2>&1 \
        && cmake --build "$part/build" -j "${JOBS:-2}" >> "$part.log" 2>&1 \
        || { tail -20 "$part.log" >&2; echo "build.sh: $part does not compile; see $part.log" >&2; exit 3; }
done
[ "$engines" = yes ] || exit 0

mkdir -p engines
if [ "$builder" = moee ]; then
    moee build models --backend tensorrt ${plugin:+--plugin "$plugin"} --min-shapes "$MIN_BATCH" --opt-shapes "$OPT_BATCH" \
        --max-shapes "$MAX_BATCH" --timing-cache timing.cache --out engines.new --force
    rm -rf engines && mv engines.new engines  # trtexec's have no manifest, and moee replaces nothing that it cannot tell
fi

trtexec=
for candidate in "$(command -v trtexec || true)" "${TENSORRT_ROOT:-}/bin/trtexec" /usr/src/tensorrt/bin/trtexec; do
    if [ -x "$candidate" ]; then trtexec=$candidate; break; fi
done

# engine ONNX [plugin options]
engine() {
    [ -n "$trtexec" ] || { echo "build.sh: trtexec not found; put it on PATH or set TENSORRT_ROOT" >&2; exit 3; }
    name=$1
    onnx=$2
    shift 2
    # TensorRT 11 has no such option: every network is strongly typed there
    if "$trtexec" --help 2>&1 | grep -q -e --stronglyTyped; then set -- "$@" --stronglyTyped; fi
    echo "building engines/$name.plan"
    "$trtexec" --onnx="$onnx" --saveEngine="engines/$name.plan" --timingCacheFile=timing.cache --skipInference \
        --minShapes="$INPUT:${MIN_BATCH}x$SHAPE" --optShapes="$INPUT:${OPT_BATCH}x$SHAPE" \
        --maxShapes="$INPUT:${MAX_BATCH}x$SHAPE" "$@" > "engines/$name.log" 2>&1 \
        || { tail -20 "engines/$name.log" >&2; echo "build.sh: engines/$name.plan was not built; see engines/$name.log" >&2; exit 1; }
}

if [ "$builder" = trtexec ]; then
    engine dense models/dense.onnx
    engine moee models/tensorrt.onnx ${plugin:+--dynamicPlugins="$plugin"}
fi
if [ "$deepstream" = yes ]; then
    engine pixels models/tensorrt_pixels.onnx ${plugin:+--dynamicPlugins="$plugin"}
fi

# name file: a link where the file system has them, a copy elsewhere
place() {
    folder=triton/model_repository/$1/1
    mkdir -p "$folder"
    ln -f "$2" "$folder/$3" 2>/dev/null || cp "$2" "$folder/$3"
}
place moee engines/moee.plan model.plan
place dense engines/dense.plan model.plan
place moee_onnx models/portable.onnx model.onnx
place moee_onnx models/moee.data moee.data
echo "done: README.md says how to run it"
