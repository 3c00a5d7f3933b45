#!/bin/bash
# The whole program on a machine with one NVIDIA GPU, judged there:
#   tools/gpu_pipeline.sh PROGRAMS DIRECTORY step …     PROGRAMS: a folder with quantmill and bench_block
# Steps:
#   block   seconds a block of Llama-3-8B's and 70B's shapes, and 70B within 24 GB: the same bytes, and the peak of
#           memory within 10% of the plan's
#   ranks   1, 2 and 4 ranks that share the GPU, several memory budgets, twice: the same bytes
#   checkpoints  DIRECTORY/W2, W3, W4, W8 of the job that tests/interop/make_cuda_job.py made in DIRECTORY
set -euo pipefail

programs=$1 directory=$2
shift 2
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 QUANTMILL_LOG=warn
mkdir -p "$directory"

hash_of() { (cd "$1" && sha256sum -- *.safetensors | sha256sum | cut -c1-16); }

block() {  # SHAPE BLOCKS NAME [--set …]
  "$programs/bench_block" --shape "$1" --blocks "$2" --directory "$directory/$1" --set compute.backend=cuda "${@:4}" \
    >"$directory/$3.log" 2>&1 || { tail -20 "$directory/$3.log"; return 1; }
  sed -n '/tokens, /,$p' "$directory/$3.log"
  peak_and_plan "$directory/$1" "$3" "${@:4}"
  echo "bytes $(hash_of "$directory/$1/out")"
}

# Fails when the peak lies more than 10% off the plan or above a budget.
peak_and_plan() {  # DIRECTORY NAME [--set …]
  "$programs/quantmill" plan "$1/job.yaml" --overwrite --no-measure --set compute.backend=cuda "${@:3}" >"$directory/$2.plan"
  awk -v took="$(sed -n 's/.*"peak_memory": *\([0-9]*\).*/\1/p' "$1/out/report.json")" -v settings="${*:3}" '
    / together;/ { split("kB MB GB TB", units); for (u in units) if ($2 == units[u]) planned = $1 * 1000 ^ u }
    END {
      off = 100 * (took / planned - 1)
      printf "peak %.2f GB, planned %.2f GB: %+.1f%%\n", took / 1e9, planned / 1e9, off
      budget = settings ~ /device_memory=24GB/ ? 24e9 : took
      exit !(off <= 10 && off >= -10 && took <= budget)
    }' "$directory/$2.plan"
}

ranks_share() {  # RANKS MEMORY
  mpirun --bind-to none --oversubscribe -n "$1" "$programs/bench_block" --shape tiny --blocks 3 --sequences 48 \
    --length 700 --directory "$directory/tiny" --set compute.backend=cuda --set compute.communicator=mpi \
    --set compute.device_memory="$2" >"$directory/ranks.log" 2>&1 || { tail -20 "$directory/ranks.log"; return 1; }
  echo "$1 rank(s), device_memory $2: bytes $(hash_of "$directory/tiny/out")"
}

for step in "$@"; do
  echo "== $step"
  case $step in
    block)
      block llama-3-8b 6 8b
      block llama-3-70b 4 70b
      block llama-3-70b 4 70b-24GB --set compute.device_memory=24GB ;;
    ranks)
      for memory in free 300MB 200MB; do ranks_share 1 $memory; done
      for ranks in 1 2 4; do ranks_share $ranks free; done
      ranks_share 2 200MB ;;
    checkpoints)
      for bits in 2 3 4 8; do
        "$programs/quantmill" run "$directory/job.yaml" --overwrite --set quantization.bits=$bits \
          --set output.directory=W$bits | tail -n 3
      done ;;
    *) echo "unknown step '$step'" >&2; exit 2 ;;
  esac
done
