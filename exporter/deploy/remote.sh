#!/bin/sh
# Runs measure.sh for somebody who waits at the other end of standard input, and ends it when nobody does any more.
#   remote.sh ROUNDS MARK
# After the line MARK comes RESULT.json.
set -eu
cd "$(dirname "$0")"
exec 3<&0
./measure.sh --rounds "$1" < /dev/null &
measuring=$!
trap 'kill "$measuring" 2>/dev/null || true; wait "$measuring" || true; exit 143' HUP INT TERM
{ cat <&3; kill "$measuring"; } > /dev/null 2>&1 &
watching=$!
code=0
wait "$measuring" || code=$?
kill "$watching" 2>/dev/null || true
[ "$code" = 0 ] || exit "$code"
printf '%s\n' "$2"
cat RESULT.json
