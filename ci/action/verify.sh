#!/usr/bin/env bash
# The action's last step: judges the implementation in SUBJECT, annotates the run, and sets the outputs `verdict` and
# `record`. Exit code: that of `verify run`.
set -euo pipefail

suite=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$suite/.venv/bin/python
checkout=$(realpath -- "$SUBJECT")
out=$(mktemp -d "${RUNNER_TEMP:-/tmp}/triattention-XXXXXX")
cd "$suite"

options=(--device "${DEVICE:-auto}")
if [[ -n ${PROFILE:-} ]]; then options+=(--profile "$PROFILE"); fi
if [[ -n ${EXPECT:-} ]]; then options+=(--expect "$EXPECT"); fi
if [[ -n ${PHASES:-} ]]; then options+=(--phases "$PHASES"); fi
code=0
"$python" -m verify run --subject "$checkout" --out "$out" "${options[@]}" || code=$?

record=$(find "$out" -name record.json -print -quit)
verdict="NO RECORD"
if [[ -n $record ]]; then
    read -r target verdict < <("$python" -m verify report --format json --records "$out" | "$python" -c '
import json, sys
print(*next((one["target"], one["verdict"]) for one in json.load(sys.stdin)["targets"] if one["newest_record"]))')
    "$python" -m verify report --format github --gpu "$target" --records "$out"
fi
printf 'verdict=%s\nrecord=%s\n' "$verdict" "$record" >> "${GITHUB_OUTPUT:-/dev/null}"
exit "$code"
