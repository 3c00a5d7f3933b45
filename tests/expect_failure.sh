#!/usr/bin/env bash
# tests/expect_failure.sh STATUS PATTERN COMMAND…: passes when COMMAND ends with exactly this exit status
# and its output holds a match of the extended regular expression.
set -uo pipefail
status=$1 pattern=$2
shift 2
output=$("$@" 2>&1)
actual=$?
echo "$output"
if [ "$actual" -ne "$status" ]; then
  echo "exit status $actual, expected $status" >&2
  exit 1
fi
if ! grep -Eq -- "$pattern" <<<"$output"; then
  echo "no match of: $pattern" >&2
  exit 1
fi
