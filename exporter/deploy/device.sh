# What this device is and how it stands, as JSON. measure.sh reads this file; nothing in it needs root or Python.
sys=/sys
proc=/proc

# Standard input as a JSON string of at most 300 printable ASCII characters; null for nothing.
json() {
    text=$(tr -d '\000' | tr '\n\t' '  ' | tr -cd '\040-\176' | cut -c1-300 | sed 's/\\/\\\\/g; s/"/\\"/g; s/ *$//')
    if [ -n "$text" ]; then printf '"%s"' "$text"; else printf null; fi
}

# number FILE DIVISOR: the whole number in a file, divided; null where there is none
number() {
    value=$(cat "$1" 2>/dev/null || true)
    case "${value#-}" in
        ''|*[!0-9]*) printf null ;;
        *) awk -v value="$value" -v by="$2" 'BEGIN { printf "%.10g", value / by }' ;;
    esac
}

# The device's name as its maker writes it: of a Jetson the device tree's, else the graphics card's.
device_model() {
    if [ -r "$proc/device-tree/model" ]; then
        tr -d '\000' < "$proc/device-tree/model"
    elif command -v nvidia-smi > /dev/null; then
        nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true
    fi
}

# The capability of the GPU, such as 8.7, where its driver says it.
compute_capability() {
    if command -v nvidia-smi > /dev/null; then
        { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } | sed -n '1s/^ *\([0-9]*\.[0-9]*\) *$/\1/p'
    fi
}

power_mode() {
    if command -v nvpmodel > /dev/null; then
        { nvpmodel -q 2>/dev/null || true; } | sed -n 's/.*Power Mode: *//p' | head -n 1
    fi
}

# [{"clock", "mhz", "max_mhz"}]: what the system shows of GPU, memory and the first core
clocks() {
    separator=
    printf '['
    for folder in "$sys"/class/devfreq/*; do
        [ -r "$folder/cur_freq" ] || continue
        printf '%s{"clock": %s, "mhz": %s, "max_mhz": %s}' "$separator" "$(basename "$folder" | json)" \
            "$(number "$folder/cur_freq" 1000000)" "$(number "$folder/max_freq" 1000000)"
        separator=', '
    done
    folder=$sys/devices/system/cpu/cpu0/cpufreq
    if [ -r "$folder/scaling_cur_freq" ]; then
        printf '%s{"clock": "cpu0", "mhz": %s, "max_mhz": %s}' "$separator" "$(number "$folder/scaling_cur_freq" 1000)" \
            "$(number "$folder/cpuinfo_max_freq" 1000)"
        separator=', '
    fi
    if command -v nvidia-smi > /dev/null; then  # a Jetson's shows no figures
        { nvidia-smi --query-gpu=clocks.sm,clocks.max.sm --format=csv,noheader,nounits 2>/dev/null || true; } \
            | awk -F ', *' -v separator="$separator" 'NR == 1 && $1 ~ /^[0-9]+$/ && $2 ~ /^[0-9]+$/ {
                  printf "%s{\"clock\": \"sm\", \"mhz\": %s, \"max_mhz\": %s}", separator, $1, $2 }'
    fi
    printf ']'
}

# [{"zone", "celsius"}]; zones that cannot be read are left out
temperatures() {
    separator=
    printf '['
    for folder in "$sys"/class/thermal/thermal_zone*; do
        celsius=$(number "$folder/temp" 1000)
        [ "$celsius" != null ] || continue
        name=$(cat "$folder/type" 2>/dev/null | json)
        printf '%s{"zone": %s, "celsius": %s}' "$separator" "$name" "$celsius"
        separator=', '
    done
    printf ']'
}

environment() {
    printf '{"power_mode": %s, "clocks": %s, "temperatures": %s}' "$(power_mode | json)" "$(clocks)" "$(temperatures)"
}

# Where trtexec lies; nothing if it is not there.
find_trtexec() {
    for candidate in "$(command -v trtexec || true)" "${TENSORRT_ROOT:-}/bin/trtexec" /usr/src/tensorrt/bin/trtexec; do
        if [ -x "$candidate" ]; then
            printf '%s' "$candidate"
            return
        fi
    done
}
