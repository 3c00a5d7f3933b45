#!/usr/bin/env bash
# ./test.sh [--quick] [--gpu]: installs what is missing, builds, and runs all tests; ends with ctest's closing lines.
#   --quick  for daily work: only the C++ tests of the CPU build, no sanitizers, lint, fuzzing, MPICH, Python peers
#   --gpu    demands a GPU: runs the tests of the CUDA backend, which are skipped without one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

quick=false gpu=false
for argument in "$@"; do
  case "$argument" in
    --quick) quick=true ;;
    --gpu) gpu=true ;;
    -h | --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "$0: unknown argument '$argument' (try --help)" >&2; exit 2 ;;
  esac
done

times="" stage="System packages" begin=0
say() {
  times+=" $stage $((SECONDS - begin)) s;"
  stage=$* begin=$SECONDS
  printf '\n== %s (%s)\n' "$*" "$(date +%T)"
}
jobs=$(nproc)

build() {  # PRESET [CMake options…]
  # Newer compilers warn of other things; the one that must find nothing is Debian 12's, which CI has.
  local strict=OFF
  if [ "$(c++ -dumpversion)" = 12 ]; then strict=ON; fi
  cmake --preset "$1" -DQUANTMILL_WARNINGS_AS_ERRORS=$strict "${@:2}"
  cmake --build --preset "$1" --parallel "$jobs"
}
test_in() { ctest --test-dir "build/$1" --output-on-failure --parallel "$jobs" --no-tests=error "${@:2}"; }

if $quick; then
  tools/install_dependencies.sh
else
  tools/install_dependencies.sh --tests
  say "Demo model and texts"
  tools/demo_data.sh
  # 6 GB of torch and its peers, and where CUDA is missing its compiler: the network brings them while the processors compile.
  { tools/python_env.sh --interop && tools/cuda_toolkit.sh; } >build/downloads.log 2>&1 &
  downloads=$!
  export QUANTMILL_REQUIRE_PYTHON=1  # a Python test that is skipped has failed
fi

say "CPU build"
build cpu

if ! $quick; then
  say "Layout and clang-tidy"
  tests/lint.sh

  say "Sanitized build"
  build asan
  say "Sanitized tests"
  # Seven ranks on two cores take minutes and show nothing that four do not; nor do repetitions of whole runs, and
  # programs this slow cannot be told from stalled ones (workers_layer_run runs the same code).
  test_in asan --label-regex quick --exclude-regex '\.np7$|^e2e_(same_bytes|layer_groups)$'

  say "Fuzzing"
  build fuzz
  mkdir -p build/fuzz/found
  build/fuzz/tests/fuzz/fuzz_safetensors -max_total_time=20 -max_len=4096 -print_final_stats=1 \
    -dict=tests/fuzz/safetensors.dict build/fuzz/found tests/fuzz/corpus/*/ 2>&1 | tail -n 12

  say "MPICH build"
  if grep -q 'VERSION_ID="24.04"' /etc/os-release; then
    echo "Skipped: the MPICH of Ubuntu 24.04 starts lone processes (bug 2072338 of its package)."
  else
    build mpich  # only what sees MPI differs from the CPU build; the rest comes from ccache
    say "MPICH tests"
    # All tests that start ranks; the others are the CPU build's own programs.
    test_in mpich --label-regex quick --tests-regex '^(comm_|workers_|test_workers|e2e_)' --exclude-regex '\.np7$|\.tcp$'
  fi

  say "Waiting for downloads"
  wait $downloads || { cat build/downloads.log >&2; exit 1; }
fi

if $gpu || ! $quick; then
  say "CUDA build"
  build cuda -DCUDAToolkit_ROOT="$(tools/cuda_toolkit.sh)"
  # Without a GPU they are listed as skipped.
  if $gpu; then export QUANTMILL_REQUIRE_GPU=1; fi
  test_in cuda --label-regex gpu
fi

say "Tests"
echo "Stages before this one:${times%;}"  # ctest itself says how long this one takes
if $quick; then
  test_in cpu --label-regex quick
else
  test_in cpu
fi
