#!/usr/bin/env bash
# ./demo.sh: quantizes a small real language model on this machine's CPU, from nothing to a checkpoint.
# Installs what is missing (system packages with root or sudo; Python packages under build/python), builds,
# fetches SmolLM2-135M-Instruct, tokenizes documentation texts, quantizes to 4 bits (preset: balanced) on two MPI ranks and
# compares perplexity before and after. A second run reuses everything up to the quantization;
# ./demo.sh --fresh makes the inputs again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

demo=build/demo
job=jobs/examples/demo-smollm2.yaml
model=$demo/SmolLM2-135M-Instruct
output=out/SmolLM2-135M-W4g64
case "${1:-}" in
  "") ;;
  --fresh) rm -rf "$demo" ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "$0: unknown argument '$1' (try --help)" >&2; exit 2 ;;
esac

say() { printf '\n== %s\n' "$*"; }

say "System packages (only what is missing)"
tools/install_dependencies.sh

say "Build (build/cpu)"
[ -f build/cpu/build.ninja ] || cmake --preset cpu
cmake --build --preset cpu --target quantmill

say "Python packages for tokenizing (build/python), model and texts ($demo)"
tools/demo_data.sh
python=$(tools/python_env.sh)/bin/python

# Two ranks share the cores. The launcher is that of the MPI library that CMake found.
launcher=$(sed -n 's/^MPIEXEC_EXECUTABLE:FILEPATH=//p' build/cpu/CMakeCache.txt)
mpirun=("$launcher")
if [[ $("$launcher" --version 2>&1) =~ Open\ MPI|OpenRTE|PRRTE ]]; then  # its mpiexec calls itself OpenRTE
  mpirun+=(--bind-to none --oversubscribe)  # by default it would pin each rank to one core
  if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
fi
mpirun+=(-n 2)
cores=$(nproc)
export OMP_NUM_THREADS=$((cores > 2 ? cores / 2 : 1))
unset OPENBLAS_CORETYPE  # a preset may choose kernels for another processor

say "Perplexity before: ${mpirun[*]} build/cpu/quantmill eval --model $model --tokens $demo/eval.h5"
if [ -f $demo/before.json ]; then
  echo "$demo/before.json is there already"
else
  "${mpirun[@]}" build/cpu/quantmill eval --model $model --tokens $demo/eval.h5 --json $demo/before.json
fi

say "Quantize: ${mpirun[*]} build/cpu/quantmill run $job --overwrite"
start=$(date +%s)
"${mpirun[@]}" build/cpu/quantmill run $job --overwrite
seconds=$(($(date +%s) - start))

say "Perplexity after"
"${mpirun[@]}" build/cpu/quantmill eval --model $output --tokens $demo/eval.h5 --json $demo/after.json

perplexity() { "$python" -c 'import json, sys; print("%.2f" % json.load(open(sys.argv[1]))["perplexity"])' "$1"; }
megabytes() { cat "$1"/*.safetensors | wc -c | awk '{ printf "%.1f MB", $1 / 1e6 }'; }
row() { printf '  %-24s %10s  %10s  %8s  %s\n' "$@"; }
say "Result"
row "" perplexity size time directory
row "SmolLM2-135M-Instruct" "$(perplexity $demo/before.json)" "$(megabytes $model)" "" $model
row "4 bits, group size 64" "$(perplexity $demo/after.json)" "$(megabytes $output)" "$seconds s" $output
cat <<END

Next:
  build/cpu/quantmill inspect $output
  build/cpu/quantmill run $job --overwrite --set quantization.bits=3
END
