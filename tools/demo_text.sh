#!/usr/bin/env bash
# Makes English prose for the demo from documentation packages of Debian or Ubuntu, without root:
#   tools/demo_text.sh OUTPUT_DIR
# writes calibration.txt (debian-policy, debian-faq) and evaluation.txt (developers-reference, less every paragraph that
# calibration.txt has too), one paragraph a line. Nothing is done when both are there already.
set -euo pipefail
export LC_ALL=C
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

case "${1:-}" in
  "" | -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ -n "${1:-}" ]; exit ;;
esac
output=$1
if [ -s "$output/calibration.txt" ] && [ -s "$output/evaluation.txt" ]; then
  echo "$output/calibration.txt and evaluation.txt are there already"
  exit
fi
mkdir -p "$output"
output=$(cd "$output" && pwd)
scratch=$(mktemp -d "$output/debian.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# Prints the prose of the English pages (no language in the name, or .en) of the packages named.
prose_of() {
  local package
  for package in "$@"; do
    mkdir "$scratch/$package"
    (cd "$scratch/$package" && apt-get -qq -o APT::Sandbox::User= download "$package") >&2 || {
      echo "$0: cannot download the package $package (as root: apt-get update)" >&2
      return 1
    }
    dpkg-deb -x "$scratch/$package"/*.deb "$scratch/$package"
    find -L "$scratch/$package/usr/share" -type f -name '*.html' | grep -Ev '\.[a-z]{2}(_[A-Z]{2}|-[a-z]{2})?\.html' >"$scratch/pages" || true
    sort "$scratch/pages" | xargs python3 "$tools/html_to_text.py"
  done
}

prose_of debian-policy debian-faq >"$scratch/calibration.txt"
prose_of developers-reference >"$scratch/other.txt"
grep -vxFf "$scratch/calibration.txt" "$scratch/other.txt" >"$scratch/evaluation.txt"

# Enough for 128 and 64 sequences of 512 tokens, at somewhat more than 4 characters a token.
enough() {
  local size
  size=$(wc -c <"$scratch/$1")
  [ "$size" -ge "$2" ] || { echo "$0: $1 has $size characters, fewer than $2: these packages have changed" >&2; return 1; }
  mv "$scratch/$1" "$output/$1"
  echo "Wrote $output/$1 ($size characters)"
}
enough calibration.txt 360000
enough evaluation.txt 180000
