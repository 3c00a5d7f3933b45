#!/usr/bin/env bash
# tests/lint.sh        checks the layout of all C++ and CUDA files and runs clang-tidy on the .cpp files
# tests/lint.sh --fix  lays the files out instead
# The tools are pinned, since each version lays out differently; they go to build/python-lint.
# A file is checked again only when it, a header or the settings have changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=build/python-lint
requirements="clang-format==19.1.7 clang-tidy==22.1.8"
if [ "$(cat $tools/requirements 2>/dev/null)" != "$requirements" ]; then
  echo "Installing $requirements into $tools" >&2
  python=python3
  $python -c 'import venv, ensurepip' 2>/dev/null || python=/usr/bin/python3
  $python -m venv --clear $tools
  # shellcheck disable=SC2086  # two words
  $tools/bin/pip install --quiet --disable-pip-version-check $requirements
  echo "$requirements" >$tools/requirements
fi

files() { git ls-files --cached --others --exclude-standard -- "$@" | while read -r file; do [ ! -f "$file" ] || echo "$file"; done; }

if [ "${1:-}" = --fix ]; then
  files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $tools/bin/clang-format -i
  exit
fi
files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $tools/bin/clang-format --dry-run -Werror ||
  { echo "tests/lint.sh --fix lays these files out." >&2; exit 1; }
echo "clang-format: all files are laid out."

cmake --preset tidy >/dev/null
cmake --build build/tidy --target quantmill_commit >/dev/null

# What a file's verdict depends on, beside itself.
settings=$({ files '*.h' '*.h.in'; echo .clang-tidy tests/lint.sh; } | xargs cat | sha256sum)
export tools settings

tidy() {
  local file=$1 stamp verdict
  stamp=build/tidy/clang-tidy/${file//\//.}
  verdict=$(echo "$settings" | cat - "$file" | sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" != "$verdict" ] || return 0
  "$tools/bin/clang-tidy" -p build/tidy --quiet --extra-arg=-Wno-unknown-warning-option \
    --extra-arg=-isystem"$PWD/build/tidy/include" "$file" 2> >(grep -v 'warnings\? generated' >&2) ||
    { echo "clang-tidy: $file"; return 1; }
  echo "$verdict" >"$stamp"
}
export -f tidy

mkdir -p build/tidy/clang-tidy build/tidy/include
# This clang-tidy comes without omp.h; the system's clang has it (libomp-dev).
ln -sf "$(clang++ -print-resource-dir)/include/omp.h" build/tidy/include/omp.h
# Only what the CPU build compiles; kernels/cuda needs another compiler's headers.
grep -o '"file": "[^"]*' build/tidy/compile_commands.json | cut -d'"' -f4 | sed "s#^$PWD/##" | sort -u |
  grep '\.cpp$' | xargs -P "$(nproc)" -I{} bash -c 'tidy "$1"' _ {}
echo "clang-tidy: no warnings."
