#!/usr/bin/env bash
# Runs slurm/job.sbatch with an srun, mpirun and quantmill that only tell how they were called.
set -euo pipefail
script=$1/slurm/job.sbatch
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset QUANTMILL_LAUNCHER QUANTMILL_MPI OMP_NUM_THREADS SLURM_NTASKS SLURM_CPUS_PER_TASK

# `fake NAME` reads what the fake program does from stdin.
fake() { { echo '#!/usr/bin/env bash'; cat; } >"$place/$1"; chmod +x "$place/$1"; }
# shellcheck disable=SC2016  # expanded by the fakes
{
  fake mpirun <<<'[ "$1" = --version ] && { echo "$MPI_NAME"; exit; }; echo "threads $OMP_NUM_THREADS: mpirun $*"'
  fake srun <<<'[ "$1" = --mpi=list ] && { echo "MPI plugin types are... $MPI_TYPES" >&2; exit; }
                echo "srun $*"; eval "$SRUN_DOES"'
  fake quantmill <<<':'
}
export PATH=$place:$PATH QUANTMILL=$place/quantmill MPI_NAME='mpirun (Open MPI) 4.1.4' MPI_TYPES='pmi2 none' SRUN_DOES=:

failures=0
# expect CODE TEXT COMMAND...: the exit code, and a part of the output.
expect() {
  local code=0 output
  output=$("${@:3}" 2>&1) || code=$?
  if [ "$code" != "$1" ] || [[ $output != *"$2"* ]]; then
    printf 'FAILED: %s\n  wanted code %s and: %s\n  got code %s and: %s\n' "${*:3}" "$1" "$2" "$code" "$output"
    failures=$((failures + 1))
  fi
}

expect 2 'usage: sbatch' "$script"
expect 2 'there is no program' env QUANTMILL=/nowhere "$script" job.yaml
expect 2 "it may be auto, srun or mpirun" env QUANTMILL_LAUNCHER=prun "$script" job.yaml
# Without pmix in Slurm: mpirun, with the options of Open MPI or of none.
expect 0 "threads 16: mpirun -n 8 --bind-to none -x OMP_NUM_THREADS $place/quantmill run job.yaml --set a=b c" \
  env SLURM_NTASKS=8 SLURM_CPUS_PER_TASK=16 "$script" job.yaml --set 'a=b c'
expect 0 "mpirun -n 1 $place/quantmill run job.yaml" env MPI_NAME='HYDRA build details:' "$script" job.yaml
# With it, or when told so: srun.
expect 0 "srun --mpi=pmix --kill-on-bad-exit=1 $place/quantmill run job.yaml" env MPI_TYPES='pmi2 pmix' "$script" job.yaml
expect 0 "srun --mpi=pmi2 --kill-on-bad-exit=1" env QUANTMILL_MPI=pmi2 "$script" job.yaml
expect 0 "mpirun -n 1" env MPI_TYPES='pmix_v4x' "$script" job.yaml
# The program's exit code is the script's.
expect 75 'exit code 75' env MPI_TYPES=pmix SRUN_DOES='exit 75' "$script" job.yaml

[ "$failures" -eq 0 ] && echo "all well"
