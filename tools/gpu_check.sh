#!/bin/bash
# Builds the CUDA backend, runs its tests, the same under compute-sanitizer, and its benchmarks.
#   tools/gpu_check.sh [--build DIR] [--binaries DIR] [step …]
# Steps: build test memcheck racecheck initcheck bench (all of them when none is named).
# --binaries DIR takes programs and shared libraries from one folder instead of building, for a machine
# without the libraries' headers.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/gpu
binaries=
steps=()
while [ $# -gt 0 ]; do
    case $1 in
        --build) build=$2; shift 2 ;;
        --binaries) binaries=$2; shift 2 ;;
        *) steps+=("$1"); shift ;;
    esac
done
if [ ${#steps[@]} -eq 0 ]; then steps=(build test memcheck racecheck initcheck bench); fi

export QUANTMILL_REQUIRE_GPU=1
unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
programs=(test_cuda_backend bench_cuda_{forward,hessian,cholesky,solver,pack,potrf})
if [ -n "$binaries" ]; then
    export LD_LIBRARY_PATH=$PWD/$binaries:${LD_LIBRARY_PATH:-}
fi

program() {
    if [ -n "$binaries" ]; then echo "$binaries/$1"; else find "$build" -name "$1" -type f -perm -u+x; fi
}
sanitize() {  # tool, tests, options: small shapes only, instrumented kernels are slow
    compute-sanitizer --tool "$1" --error-exitcode 1 "${@:3}" "$(program test_cuda_backend)" \
        --gtest_brief=1 --gtest_filter="$2"
}
# All kernels must be watched, since ours read what cuBLASLt's write; only what ours read counts, since cuBLASLt's
# read padding that nobody wrote.
initcheck() {
    local log=${TMPDIR:-/tmp}/initcheck.log
    compute-sanitizer --tool initcheck --print-limit 100000 "$(program test_cuda_backend)" --gtest_brief=1 \
        --gtest_filter="$small" >"$log" 2>&1 || true
    tail -n 3 "$log"
    if grep -A1 'Uninitialized __global__ memory read' "$log" | grep -m 5 '    at .*quantmill'; then return 1; fi
    echo "initcheck: no kernel of ours read what nobody wrote"
}
# cuBLASLt's kernels synchronize in ways that racecheck does not see: only hazards in ours count. They also take
# it long, so each test has a process of its own, several side by side.
racecheck() {
    local logs test
    logs=$(mktemp -d)
    "$(program test_cuda_backend)" --gtest_list_tests --gtest_filter="$small" |
        awk '/^[^ ].*\.$/ { suite = $1 } /^ / { print suite $1 }' >"$logs/tests"
    xargs -P 8 -I{} sh -c 'compute-sanitizer --tool racecheck --print-limit 100000 "$1" --gtest_brief=1 \
        --gtest_filter="$2" >"$3/$2.log" 2>&1' _ "$(program test_cuda_backend)" {} "$logs" <"$logs/tests" || true
    while read -r test; do
        grep -q 'RACECHECK SUMMARY' "$logs/$test.log" && grep -q 'PASSED.* 1 test' "$logs/$test.log" ||
            { echo "racecheck: $test did not end:"; tail -n 3 "$logs/$test.log"; return 1; }
    done <"$logs/tests"
    if grep -h '  at .*quantmill\|in .*quantmill' "$logs"/*.log | sort | uniq -c | head -n 5 | grep .; then return 1; fi
    echo "racecheck: $(wc -l <"$logs/tests") tests, no hazard in kernels of ours"
}
small='-*several_panels*:Solve.agrees_with_the_cpu:*same_bytes*:Memory.out_of_memory*:Memory.a_limit*'

for step in "${steps[@]}"; do
    echo "== $step"
    case $step in
        build)
            if [ -z "$binaries" ]; then
                cmake -S . -B "$build" -G Ninja -DQUANTMILL_CUDA=ON \
                    -DQUANTMILL_CUDA_ARCHITECTURES="${QUANTMILL_CUDA_ARCHITECTURES:-native}"
                ninja -C "$build" "${programs[@]}"
            fi ;;
        test) "$(program test_cuda_backend)" --gtest_brief=1 ;;
        # Our own code checks what the API returns, and one test asks for a device that is not there.
        memcheck) sanitize memcheck "$small" --report-api-errors no ;;
        racecheck) racecheck ;;
        initcheck) initcheck ;;
        bench)
            for name in "${programs[@]:1}"; do "$(program "$name")"; done ;;
        *) echo "unknown step '$step'" >&2; exit 2 ;;
    esac
done
