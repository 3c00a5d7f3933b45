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
tests=(test_cuda_backend test_{elementwise,gptq_solve,refine,error_propagation})
benches=(bench_cuda_{forward,hessian,cholesky,solver,pack,potrf})
if [ -n "$binaries" ]; then
    export LD_LIBRARY_PATH=$PWD/$binaries:${LD_LIBRARY_PATH:-}
fi

program() {
    if [ -n "$binaries" ]; then echo "$binaries/$1"; else find "$build" -name "$1" -type f -perm -u+x; fi
}
# "PROGRAM TEST" a line, but for what matches the patterns: tests on the GPU, of small shapes, since instrumented
# kernels are slow, and none that makes the API fail.
small_tests() {
    local name left_out='*/cpu:*several_panels*:Solve.agrees_with_the_cpu:*same_bytes*:Memory.out_of_memory*:Memory.a_limit*'
    left_out+=":Memory.failed_calls_are_named_with_arguments_status_and_device${1:+:$1}"
    for name in "${tests[@]}"; do
        "$(program "$name")" --gtest_list_tests --gtest_filter="-$left_out" |
            awk -v p="$(program "$name")" '/^[^ ]/ { suite = $1 } /^ / { print p, suite $1 }'
    done
}
# TOOL PATTERN [LEFT-OUT]: every small test in a process of its own, some side by side. Fails when a test does not
# end well or the tool's words match PATTERN.
sanitize() {
    local tool=$1 pattern=$2 logs program test log
    logs=$(mktemp -d)
    small_tests "${3:-}" >"$logs/tests"
    TOOL=$tool LOGS=$logs xargs -P "${QUANTMILL_CHECKS:-$(nproc)}" -L 1 bash -c \
        'compute-sanitizer --tool $TOOL --print-limit 100000 "$0" --gtest_brief=1 --gtest_filter="$1" >"$LOGS/${1//\//_}.log" 2>&1' \
        <"$logs/tests" || true
    while read -r program test; do
        log=$logs/${test//\//_}.log
        grep -q 'SUMMARY' "$log" && grep -q 'PASSED.* 1 test' "$log" ||
            { echo "$tool: $test of ${program##*/} did not end:"; tail -n 3 "$log"; return 1; }
    done <"$logs/tests"
    if grep -hE "$pattern" "$logs"/*.log | sort | uniq -c | head -n 5 | grep .; then return 1; fi
    echo "$tool: $(wc -l <"$logs/tests") tests, nothing found"
}

for step in "${steps[@]}"; do
    echo "== $step"
    case $step in
        build)
            if [ -z "$binaries" ]; then
                cmake -S . -B "$build" -G Ninja -DQUANTMILL_CUDA=ON \
                    -DQUANTMILL_CUDA_ARCHITECTURES="${QUANTMILL_CUDA_ARCHITECTURES:-native}"
                ninja -C "$build" "${tests[@]}" "${benches[@]}"
            fi ;;
        test)
            for name in "${tests[@]}"; do "$(program "$name")" --gtest_brief=1; done ;;
        memcheck) sanitize memcheck 'ERROR SUMMARY: [1-9]' ;;
        # cuBLASLt's kernels synchronize in ways that racecheck does not see: only hazards in ours count. A launch of a
        # solve takes it seconds, so Kinds/OneSolve and Cholesky.one_… stand for all of their kind; tests that keep the
        # GPU busy with cuBLASLt's products alone take minutes and have no kernel of ours.
        racecheck) sanitize racecheck '(at|in) .*quantmill' '*GptqSolve.*:Solve.*:Cholesky.factor_*:Cholesky.says_*:Memory.lanes_*:Memory.events_*' ;;
        # cuBLASLt's kernels read padding that nobody wrote: only what ours read counts.
        initcheck) sanitize initcheck ' at .*quantmill' ;;
        bench)
            for name in "${benches[@]}"; do "$(program "$name")"; done ;;
        *) echo "unknown step '$step'" >&2; exit 2 ;;
    esac
done
