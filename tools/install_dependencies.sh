#!/usr/bin/env bash
# Installs the system packages that are missing, on Debian 12, Ubuntu 24.04 or newer (root or sudo):
#   tools/install_dependencies.sh          what ./demo.sh needs: compiler, CMake, MPI, OpenBLAS, HDF5, …
#   tools/install_dependencies.sh --tests  also what ./test.sh needs: clang for fuzzing, MPICH beside Open MPI
# Says what it installs. Elsewhere, and on clusters, docs/cluster.md tells what to load.
set -euo pipefail

# A line each: a package, then what shows that it is not needed: "command" on PATH, or another package.
build='
g++               command g++
cmake             command cmake
ninja-build       command ninja
pkg-config        command pkg-config
git               command git
ccache            command ccache
libopenmpi-dev
openmpi-bin
libopenblas-dev   libopenblas-pthread-dev libopenblas-serial-dev libopenblas-openmp-dev
libhdf5-dev
libfmt-dev
libspdlog-dev
libyaml-cpp-dev
nlohmann-json3-dev
libcli11-dev
libssl-dev
libgtest-dev
ca-certificates
python3
python3-venv
'
tests='
clang             command clang++
libclang-rt-dev
libomp-dev
mpich
libmpich-dev
'

case "${1:-}" in
  "") wanted=$build ;;
  --tests) wanted=$build$tests ;;
  -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "$0: unknown argument '$1' (try --help)" >&2; exit 2 ;;
esac

if ! command -v apt-get >/dev/null; then
  echo "No apt-get here: CMake will say what is missing, docs/cluster.md how to get it." >&2
  exit 0
fi

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

needed() {
  local package=$1
  shift
  installed "$package" && return 1
  if [ "${1:-}" = command ]; then
    ! command -v "$2" >/dev/null
    return
  fi
  local other
  for other in "$@"; do ! installed "$other" || return 1; done
}

missing=()
while read -r -a line; do
  [ "${#line[@]}" -gt 0 ] || continue
  if needed "${line[@]}"; then missing+=("${line[0]}"); fi
done <<<"$wanted"
[ "${#missing[@]}" -gt 0 ] || exit 0

echo "Installing system packages: ${missing[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "$0: neither root nor sudo; ask an administrator for: apt-get install ${missing[*]}" >&2
    exit 2
  fi
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  "${missing[@]}" >/dev/null
