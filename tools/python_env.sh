#!/usr/bin/env bash
# Creates (or reuses) the private Python environments of quantmill and prints where the chosen one is:
#   tools/python_env.sh            build/python          for the programs in tools/ and their tests
#   tools/python_env.sh --interop  build/python-interop  adds torch, transformers and GPTQModel (6 GB, 1-3 minutes)
# It installs only what is missing and takes no time when the requirements have not changed.
# PYTHON names the interpreter to use; otherwise the first Python >= 3.11 with the venv module is taken.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case "${1:-}" in
  "") venv=$root/build/python requirements=$root/tools/requirements.txt ;;
  --interop) venv=$root/build/python-interop requirements=$root/tests/interop/requirements.txt ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "$0: unknown argument '$1' (try --help)" >&2; exit 2 ;;
esac

# Usable: runs at all (a pyenv shim may not), is new enough, and can make environments (Debian packs that separately).
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

choose_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 /usr/bin/python3}; do
    if usable "$candidate"; then echo "$candidate"; return; fi
  done
  echo "$0: no Python >= 3.11 with the venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2
  exit 2
}

mkdir -p "$root/build"
exec 9>"$venv.lock"
flock 9  # tests may call this at the same time

[ -x "$venv/bin/python" ] && usable "$venv/bin/python" || rm -rf "$venv"
[ -d "$venv" ] || "$(choose_python)" -m venv "$venv"

stamp=$(cat "$root/tools/requirements.txt" "$requirements" "${BASH_SOURCE[0]}" | sha256sum)
if [ "$stamp" != "$(cat "$venv/stamp" 2>/dev/null)" ]; then
  echo "Installing into $venv ..." >&2
  "$venv/bin/pip" install --quiet --no-compile --disable-pip-version-check -r "$requirements" >&2
  if [ "${1:-}" = --interop ]; then
    # optimum without its dependencies: they would replace the versions that we pinned
    "$venv/bin/pip" install --quiet --no-compile --disable-pip-version-check --no-deps optimum==2.3.0 >&2
  fi
  echo "$stamp" >"$venv/stamp"
fi
echo "$venv"
