#!/bin/bash
# The program on several GPUs of one host, judged there:
#   tools/gpu_multi.sh [--gpus N] [--blocks N] [--rehearse] DIRECTORY step …   DIRECTORY: memory-backed, 60 GB for all steps
# The programs are looked for in PATH (tools/gpu_bundle.sh). Steps, each ended when it takes too long:
#   tests    the Communicator over NCCL: 1, 2, 4 … N ranks
#   bytes    a small random model: every placement writes the bytes of one GPU
#   demo     the same on the demo model, if DIRECTORY/SmolLM2-135M-Instruct and DIRECTORY/calib.h5 are there
#   comm     bandwidths of the Communicator beside what the links carry
#   scaling  blocks of Llama-3-70B on 1 and more GPUs, 128 x 2048: seconds a block, the plan's, efficiency
#   scaling512  the same, 512 x 2048
#   faults   a rank killed, and one stopped, amid NCCL work: all end within 30 s with who and where
# --rehearse: two CPU ranks over MPI and a tiny model stand in for GPUs, to try the script.
set -uo pipefail

gpus=0 backend=cuda communicator=nccl shape=llama-3-70b blocks=8 size=(--sequences 128 --length 2048) stall=5
small=(--sequences 96 --length 700)  # several micro-batches and shards a rank
while [[ ${1:-} == --* ]]; do
    case $1 in
        --gpus) gpus=$2; shift 2 ;;
        --blocks) blocks=$2; shift 2 ;;  # of the scaling; 8 when it is not named
        --rehearse) backend=cpu communicator=mpi shape=tiny size=(--sequences 128 --length 256) stall=15
            small=(--sequences 16 --length 100); shift ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
done
directory=$1
shift
mkdir -p "$directory"
if [ "$gpus" = 0 ]; then gpus=$(nvidia-smi --list-gpus | wc -l); fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 NCCL_NVLS_ENABLE=0 QUANTMILL_LOG=warn GTEST_COLOR=no
counts=() failed=()
for ((n = 2; n <= gpus; n *= 2)); do counts+=("$n"); done

hash_of() { (cd "$1" && sha256sum -- *.safetensors | sha256sum | cut -c1-16); }
fail() { echo "FAILED: $*"; failed+=("$*"); }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }

# SECONDS NAME program …: its output in DIRECTORY/NAME.log, the end of it here when it fails.
logged() {
    local seconds=$1 name=$2
    shift 2
    timeout -k 5 "$seconds" "$@" >"$directory/$name.log" 2>&1 && return
    fail "$name ($?)"
    tail -n 15 "$directory/$name.log"
    return 1
}

tests() {
    local n log=$directory/tests.log
    for n in 1 "${counts[@]}"; do
        QUANTMILL_REQUIRE_GPU=1 QUANTMILL_TIMEOUT=60 \
            logged 120 tests mpirun --bind-to none --oversubscribe -n "$n" "$1" --gtest_brief=1 || continue
        echo "$n rank(s): $(grep -hE 'PASSED|SKIPPED|SEED' "$log" | tr '\n' ' ')"
    done
}

# NAME RANKS EXPECTED run-of-one …: runs, and compares what it wrote to DIRECTORY/out with EXPECTED, none: prints it
same_bytes() {
    local name=$1 n=$2 expected=$3 got begin
    shift 3
    begin=$(now)
    rm -rf "$out"
    logged 90 run mpirun --bind-to none --oversubscribe -n "$n" "$@" || return
    got=$(hash_of "$out")
    echo "$name: $got ($(since "$begin") s)"
    if [ -n "$expected" ] && [ "$got" != "$expected" ]; then fail "$name wrote other bytes"; fi
    last_hash=$got
}

# program …: every placement of both propagations beside one rank.
placements() {
    local propagate n groups expected sequential
    for propagate in quantized original; do
        for sequential in true false; do
            if [ $propagate-$sequential = original-false ]; then continue; fi
            last_hash=
            local job=("$@" --set "compute.backend=$backend" --set "quantization.propagate=$propagate"
                --set "quantization.true_sequential=$sequential")
            same_bytes "$propagate (sequential $sequential) 1 GPU" 1 "" "${job[@]}" || continue
            expected=$last_hash
            for n in "${counts[@]}"; do
                for ((groups = 1; groups <= n; ++groups)); do
                    if [ $((n % groups)) != 0 ]; then continue; fi
                    if [ $sequential = false ] && [ $groups != 1 ]; then continue; fi
                    same_bytes "$propagate (sequential $sequential) $groups groups x $((n / groups))" "$n" "$expected" \
                        "${job[@]}" --set "compute.communicator=$communicator" --set "compute.layer_groups=$groups"
                done
                same_bytes "$propagate (sequential $sequential) $n through the host" "$n" "$expected" "${job[@]}" \
                    --set compute.communicator=mpi
            done
        done
    done
}

bytes() {
    out=$directory/small/out
    placements bench_block --no-inspect --shape tiny --blocks 6 "${small[@]}" --directory "$directory/small"
}

demo() {
    if [ ! -f "$directory/SmolLM2-135M-Instruct/model.safetensors" ]; then
        echo "no demo model in $directory: skipped"
        return
    fi
    out=$directory/demo/out
    mkdir -p "$directory/demo"
    cat >"$directory/demo/job.yaml" <<JOB
model: $directory/SmolLM2-135M-Instruct
output: {directory: $out}
calibration: {tokens: $directory/calib.h5}
quantization: {group_size: 64}
JOB
    placements quantmill run "$directory/demo/job.yaml"
}

comm() {
    if [ $backend = cpu ]; then
        logged 120 comm mpirun --bind-to none --oversubscribe -n "$gpus" bench_communicator --backend cpu --divide 64
        cat "$directory/comm.log"
        return
    fi
    nvidia-smi topo -m | head -n $((gpus + 1)) | cut -f 1-$((gpus + 1))
    nvidia-smi nvlink -s -i 0 | sort | uniq -c | sort -rn | head -n 4
    logged 60 links bench_cuda_links && cat "$directory/links.log"
    local n
    for n in "${counts[@]}"; do
        logged 120 comm mpirun --bind-to none --oversubscribe -n "$n" bench_communicator && cat "$directory/comm.log"
    done
}

# NAME RANKS --set …: prints the table of bench_block, and efficiency beside the last run of one rank: of a block amid
# the others with quantized, with original of the whole run from the first weights read to the last tensor written. What
# comes before (MPI, CUDA, NCCL, measuring for the plan) takes as long for 80 blocks; bench_block prints it by itself.
# Shards of 1 GB: a whole model has many more of them than there are groups, so that most tensors are written by the rank
# that made them; in one shard of 5 GB these few blocks would all go to one rank.
one_scaling() {
    local name=$1 n=$2 seconds
    shift 2
    rm -rf "$directory/$shape/out"
    logged 150 "$name" mpirun --bind-to none --oversubscribe -n "$n" bench_block --no-inspect --shape "$shape" \
        --blocks $blocks --directory "$directory/$shape" --set "compute.backend=$backend" --set output.max_shard_size=1GB \
        "$@" || return
    echo "-- $name"
    sed -n '/tokens, /,$p' "$directory/$name.log"
    seconds=$(awk '$1 == "block" { print $2 }' "$directory/$name.log")
    if [ "$n" = 1 ]; then alone=$seconds; fi
    awk -v one="$alone" -v all="$seconds" -v n="$n" \
        'BEGIN { printf "%d GPU(s): %.3f s a block, %.2f times one, efficiency %.1f%%\n", n, all, one / all, 100 * one / all / n }'
    echo "bytes $(hash_of "$directory/$shape/out")"
}

scaling() {  # SUFFIX, then sequences and length
    local suffix=$1 n groups chosen=
    shift
    alone=1
    one_scaling "original$suffix-1" 1 "$@" --set quantization.propagate=original
    for n in "${counts[@]}"; do
        for groups in auto 1 "$n"; do
            if [ "$groups" = "${chosen:-}" ]; then continue; fi  # as auto did
            one_scaling "original$suffix-$n-$groups" "$n" "$@" --set quantization.propagate=original \
                --set "compute.layer_groups=$groups" --set "compute.communicator=$communicator"
            if [ -n "$suffix" ]; then break; fi  # auto only
            if [ "$groups" = auto ]; then
                chosen=$(sed -nE 's/.* in ([0-9]+) group\(s\).*/\1/p' "$directory/original$suffix-$n-auto.log")
            fi
        done
        chosen=
    done
    for n in 1 "${counts[@]}"; do
        one_scaling "quantized$suffix-$n" "$n" "$@"
    done
    rm -rf "$directory/$shape/out"
}

# The process of a rank of our run, by its command and environment.
pid_of_rank() {
    local entry
    for entry in /proc/[0-9]*; do
        if tr '\0' ' ' 2>/dev/null <"$entry/cmdline" | grep -q "quantmill run $directory/$shape/job.yaml" &&
            tr '\0' '\n' 2>/dev/null <"$entry/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$1"; then
            echo "${entry#/proc/}"
            return
        fi
    done
}

# Whether a process is more than an entry that nobody has collected.
alive() { grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status"; }

# HOW RANK PROPAGATE WHILE: stops or kills a rank once it says WHILE, and times the end of all.
fault() {
    local how=$1 rank=$2 propagate=$3 doing=$4 log=$directory/fault.log begin pid job status words
    rm -rf "$directory/$shape/out-fault"
    timeout -k 5 90 mpirun --bind-to none --oversubscribe -n "$gpus" quantmill run "$directory/$shape/job.yaml" --overwrite \
        --log-level debug --set "output.directory=$directory/$shape/out-fault" --set "compute.backend=$backend" \
        --set "compute.communicator=$communicator" --set "quantization.propagate=$propagate" \
        --set "compute.stall_timeout=${stall}s" >"$log" 2>&1 &
    job=$!
    for ((i = 0; i < 1200; ++i)); do
        if grep -qE ":$rank\] debug .*$doing" "$log" || ! kill -0 $job 2>/dev/null; then break; fi
        sleep 0.02
    done
    pid=$(pid_of_rank "$rank")
    begin=$(now)
    if [ -z "$pid" ]; then fail "$how: no process of rank $rank"; tail -n 5 "$log"; kill $job 2>/dev/null; return; fi
    kill "-$how" "$pid"
    wait $job
    status=$?
    words=$(grep -vE '\] debug ' "$log" | grep -E "rank $rank on [^ ]+ (was lost|has stalled)" | head -n 2)
    echo "$how of rank $rank, $propagate, '$doing': all ended after $(since "$begin") s, exit status $status: ${words:-NOT NAMED}"
    if [ -z "$words" ] || [ $status = 0 ] || awk -v s="$(since "$begin")" 'BEGIN { exit s <= 30 }'; then
        fail "$how of rank $rank, $propagate"
        tail -n 8 "$log"
    fi
    for ((i = 0; i < 100; ++i)); do alive "$pid" || return; sleep 0.02; done
    fail "$how: rank $rank lives on"
    kill -KILL "$pid"
}

# The last rank does not come to a sum that the others wait for, inside NCCL; the deadline is 5 s.
lost() {
    local how=$1 pattern=$2 begin status log=$directory/lost.log
    begin=$(now)
    QUANTMILL_TIMEOUT=5 timeout -k 5 60 mpirun --bind-to none -n "$gpus" comm_nccl_lost_rank "$how" >"$log" 2>&1
    status=$?
    echo "$how: ended after $(since "$begin") s, exit status $status: $(grep -m 1 -E "$pattern" "$log" || echo NOT NAMED)"
    if [ $status = 0 ] || ! grep -qE "$pattern" "$log" || awk -v s="$(since "$begin")" 'BEGIN { exit s <= 30 }'; then
        fail "lost rank: $how"
        tail -n 8 "$log"
    fi
}

faults() {
    local last=$((gpus - 1))
    if [ $backend = cuda ]; then
        lost throw "rank $last on [^ ]+ fails"
        lost stop 'rank [0-9]+ of [0-9]+ on [^ ]+, CUDA device [0-9]+: a sum of .* waited 5 s for the other ranks'
        lost kill "rank $last with PID|exited on signal 9|waited 5 s"
    fi
    logged 120 model bench_block --prepare --shape "$shape" --blocks $blocks "${size[@]}" --directory "$directory/$shape" ||
        return
    fault STOP "$last" quantized 'block 2 .*summing Hessians'
    fault KILL "$last" quantized 'block 2 .*summing Hessians'
    fault STOP 0 original 'streaming, micro-batch 3/'
    fault KILL 0 original 'streaming, micro-batch 3/'
    fault STOP "$last" original 'block .*: solving rows'
    rm -rf "$directory/$shape/out" "$directory/$shape/out-fault"
}

for step in "$@"; do
    echo "== $step"
    step_begin=$(now)
    case $step in
        tests) if [ $backend = cuda ]; then tests comm_nccl_test; else tests comm_communicator_test; fi ;;
        bytes | demo | comm | faults) "$step" ;;
        scaling) scaling "" "${size[@]}" ;;
        scaling512) scaling -512 --sequences 512 "${size[@]:2}" ;;
        *) echo "unknown step '$step'" >&2; exit 2 ;;
    esac
    echo "== $step took $(since "$step_begin") s"
done
if [ ${#failed[@]} != 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all steps went well"
