#!/bin/sh
# Builds an engine of the dense model and of each candidate on this device, times them in turns and writes RESULT.json.
#   ./measure.sh [--rounds N] [--seconds N]      (5 rounds; 2 seconds a model and round)
# Needs TensorRT 10 or later with trtexec, and g++ and cmake for the plugin; JetPack ships all of them. No Python, no root.
set -eu
LC_ALL=C
export LC_ALL
cd "$(dirname "$0")"
. ./measure.env
. ./device.sh

rounds=5
seconds=2
while [ $# -gt 0 ]; do
    case "$1 ${2:-}" in
        "--rounds "[1-9]|"--rounds "[1-9][0-9]) rounds=$2 ;;
        "--seconds "[1-9]|"--seconds "[1-9][0-9]) seconds=$2 ;;
        *) sed -n '2,3s/^# *//p' measure.sh >&2; exit 2 ;;
    esac
    shift 2
done

echo "checking files"
sha256sum --check --quiet --strict SHA256SUMS \
    || { echo "measure.sh: the folder was changed or cut short; copy it again" >&2; exit 2; }
trtexec=$(find_trtexec)
[ -n "$trtexec" ] || { echo "measure.sh: trtexec not found; put it on PATH or set TENSORRT_ROOT" >&2; exit 3; }

child=
end() {
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    rm -f RESULT.json.new
    exit "$1"
}
trap 'end 130' INT
trap 'end 143' HUP TERM

# run LOG COMMAND...: a signal ends the command too, which it would not in the foreground
run() {
    log=$1
    shift
    "$@" > "$log" 2>&1 &
    child=$!
    code=0
    wait "$child" || code=$?
    child=
    return "$code"
}

# fail MODEL WHAT LOG: keeps why a candidate has no time. Without the dense model there is nothing to compare with.
fail() {
    said=$(sed -n 's/.*\[E\] *//p; s/.*\(error: .*\)/\1/p' "$3" | head -n 1)
    [ -n "$said" ] || said=$(grep -v '^[[:space:]]*$' "$3" | tail -n 1 || true)
    echo "$2: ${said:-it said nothing}" > "logs/$1.failed"
    echo "$(short "$1"): $2; see $3"
    if [ "$1" = dense ]; then
        echo "measure.sh: dense: $2: ${said:-it said nothing}; see $3" >&2
        exit 1
    fi
}

short() { printf '%.12s' "$1"; }  # of an id, for messages

needs_plugin() { grep -q "^$1 yes$" candidates.txt; }

rm -rf engines logs
mkdir engines logs
before=$(environment)
models=dense
while read -r id _; do models="$models $id"; done < candidates.txt

plugin=
if [ "$PLUGIN" = yes ]; then
    echo "compiling the plugin"
    plugin=$PWD/plugin/build/libmoee_plugin.so
    log=logs/plugin.configure
    if run "$log" cmake -S plugin -B plugin/build -DCMAKE_BUILD_TYPE=Release ${CMAKE_OPTIONS:-}; then
        log=logs/plugin.make
        run "$log" cmake --build plugin/build -j "${JOBS:-2}" || true
    fi
    if [ "$code" != 0 ]; then
        for model in $models; do
            if needs_plugin "$model"; then fail "$model" "the plugin does not compile" "$log"; fi
        done
    fi
fi

typed=
# TensorRT 11 has no such option: every network is strongly typed there
if "$trtexec" --help 2>&1 | grep -q -e --stronglyTyped; then typed=--stronglyTyped; fi
for model in $models; do
    [ ! -e "logs/$model.failed" ] || continue
    echo "building $(short "$model")"
    onnx=candidates/$model/tensorrt.onnx
    [ "$model" != dense ] || onnx=dense/dense.onnx
    set --
    if needs_plugin "$model"; then set -- --dynamicPlugins="$plugin"; fi
    run "logs/$model.build" "$trtexec" --onnx="$onnx" --saveEngine="engines/$model.plan" --timingCacheFile=timing.cache \
        --skipInference --minShapes="$INPUT:${BATCH}x$SHAPE" --optShapes="$INPUT:${BATCH}x$SHAPE" \
        --maxShapes="$INPUT:${BATCH}x$SHAPE" $typed "$@" || { fail "$model" "no engine was built" "logs/$model.build"; continue; }
    [ -s "engines/$model.plan" ] || fail "$model" "trtexec wrote no engine" "logs/$model.build"
done

# median LOG METRIC: milliseconds as trtexec's summary has them; fails where there is no finite positive number
median() {
    sed -n "s/.*\] $2: .*median = \([0-9.e+-]*\) ms.*/\1/p" "$1" | tail -n 1 \
        | awk '/^[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?$/ && $1 > 0 { print; found = 1 } END { exit !found }'
}

# sample FILE NUMBER: one more of a list that JSON takes
sample() {
    if [ -s "$1" ]; then printf ', ' >> "$1"; fi
    printf '%s' "$2" >> "$1"
}

backwards=
for model in $models; do backwards="$model $backwards"; done
round=1
while [ "$round" -le "$rounds" ]; do
    echo "round $round of $rounds"
    order=$models
    [ $((round % 2)) = 1 ] || order=$backwards
    for model in $order; do
        [ ! -e "logs/$model.failed" ] || continue
        log=logs/$model.time
        set --
        if needs_plugin "$model"; then set -- --dynamicPlugins="$plugin"; fi
        run "$log" "$trtexec" --loadEngine="engines/$model.plan" --shapes="$INPUT:${BATCH}x$SHAPE" \
            --loadInputs="$INPUT:images.bin" --warmUp=500 --duration="$seconds" --iterations=10 "$@" \
            || { fail "$model" "the engine does not run" "$log"; continue; }
        if gpu=$(median "$log" "GPU Compute Time") && host=$(median "$log" Latency); then
            sample "logs/$model.gpu" "$gpu"
            sample "logs/$model.host" "$host"
        else
            fail "$model" "trtexec printed no median" "$log"
        fi
    done
    round=$((round + 1))
done

samples() { printf '"gpu_ms": [%s], "host_ms": [%s]' "$(cat "logs/$1.gpu")" "$(cat "logs/$1.host")"; }

version=$(sed -n 's/.*TensorRT version: *\([0-9.]*\).*/\1/p' logs/dense.time | head -n 1)
[ -n "$version" ] || version=$(sed -n 's/.*\[TensorRT v\([0-9]*\)\].*/\1/p' logs/dense.time | head -n 1)
chip=$(sed -n 's/.*Selected Device: *//p' logs/dense.time | head -n 1)
release=$(head -n 1 /etc/nv_tegra_release 2>/dev/null || true)
{
    printf '{\n  "schema": "moee.measured/1",\n  "emit": "%s",\n' "$EMIT"
    printf '  "device": {"model": %s, "gpu": %s, "machine": %s, "kernel": %s, "release": %s},\n' "$(device_model | json)" \
        "$(printf %s "$chip" | json)" "$(uname -m | json)" "$(uname -r | json)" "$(printf %s "$release" | json)"
    printf '  "tensorrt": %s,\n  "batch": %s,\n  "precision": "%s",\n' "$(printf %s "$version" | json)" "$BATCH" "$PRECISION"
    printf '  "rounds": %s,\n  "seconds": %s,\n' "$rounds" "$seconds"
    printf '  "environment": [%s, %s],\n' "$before" "$(environment)"
    printf '  "dense": {"id": "%s", %s},\n  "candidates": [' "$DENSE" "$(samples dense)"
    separator=
    for model in $models; do
        [ "$model" != dense ] || continue
        if [ -e "logs/$model.failed" ]; then
            printf '%s\n    {"id": "%s", "failed": %s}' "$separator" "$model" "$(json < "logs/$model.failed")"
        else
            printf '%s\n    {"id": "%s", %s}' "$separator" "$model" "$(samples "$model")"
        fi
        separator=,
    done
    printf '\n  ]\n}\n'
} > RESULT.json.new
mv -f RESULT.json.new RESULT.json
echo "RESULT.json written: give it to moee plan --measured where these candidates were made"
