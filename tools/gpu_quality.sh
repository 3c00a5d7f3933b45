#!/bin/bash
# What the quality options are worth, on a machine with one NVIDIA GPU:
#   tools/gpu_quality.sh PROGRAMS DEMO WORK step …
# PROGRAMS: a folder with quantmill; DEMO: one with SmolLM2-135M-Instruct, calib.h5 and eval.h5 (tools/gpu_bundle.sh --demo).
# Figures go on from bench/quality.json in WORK/quality.json. Steps, one after the other:
#   times   seconds of a run of each row at 4 bits
#   table   what the figures lack of all rows in four orders, five runs side by side: 2.5 seconds a run, 12 minutes for all
#   budget  bench/bit_budget.py: a minute
#   peers   GPTQModel's best settings (in PYTHONPATH: bench/peers/bundle.sh), twelve runs side by side: 4 minutes. They share
#           the GPU through NVIDIA's MPS, without which they take turns and three times as long.
set -euo pipefail
cd "$(dirname "$0")/.."

programs=$1 demo=$2 work=$3
shift 3
mkdir -p "$work"
inputs=(--quantmill "$programs/quantmill" --model "$demo/SmolLM2-135M-Instruct" --calibration "$demo/calib.h5" --evaluation "$demo/eval.h5")
[ -f "$work/quality.json" ] || cp bench/quality.json "$work/"
quality() { python3 bench/quality.py "${inputs[@]}" --backend cuda --work "$work/runs" --output "$work/quality.json" "$@"; }

peers() {
    if command -v nvidia-cuda-mps-control >/dev/null; then
        export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$work/mps
        mkdir -p "$work/mps"
        setsid nvidia-cuda-mps-control -d </dev/null >/dev/null 2>&1
        trap 'echo quit | nvidia-cuda-mps-control' EXIT
    fi
    OMP_NUM_THREADS=2 quality --rows "GPTQModel GAR, mse, GPTAQ" --bits 4 3 2 --orders 4 --jobs 12
}

for step in "$@"; do
    echo "== $step"
    case $step in
        times) quality --bits 4 --time 1 ;;
        table) quality --bits 4 3 2 --orders 4 --jobs 5 ;;
        budget)
            python3 bench/bit_budget.py "${inputs[@]}" --work "$work/budgets" --output "$work/bit_budget.json" \
                --set compute.backend=cuda --eval=--backend --eval=cuda ;;
        peers) peers ;;
        *) echo "unknown step '$step'" >&2; exit 2 ;;
    esac
done
