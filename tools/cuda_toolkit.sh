#!/usr/bin/env bash
# Prints the CUDA toolkit to build with: that of the nvcc on PATH or in /usr/local/cuda, else one made of NVIDIA's Python
# packages in build/cuda-toolkit (compiler, headers, cuBLAS, NCCL; 1 GB). Enough to compile and link; running needs a GPU's driver.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

for nvcc in "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
  if [ -x "$nvcc" ]; then
    dirname "$(dirname "$(readlink -f "$nvcc")")"
    exit
  fi
done

requirements="nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-crt==13.0.* nvidia-cuda-runtime==13.0.*
  nvidia-cuda-cccl==13.0.* nvidia-cublas==13.0.* nvidia-nccl-cu13==2.28.*"
target=$root/build/cuda-toolkit
toolkit=$target/nvidia/cu13
if [ "$(cat "$target/requirements" 2>/dev/null)" != "$requirements" ]; then
  echo "Installing NVIDIA's compiler and libraries into $target ..." >&2
  rm -rf "$target"
  python=$("$root/tools/python_env.sh")/bin/python
  # shellcheck disable=SC2086  # several words
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$target" $requirements >&2
  # The packages carry libcublas.so.13 and the like, without the names that a linker looks for.
  cp -r "$target"/nvidia/nccl/include/. "$toolkit/include/"
  cp "$target"/nvidia/nccl/lib/libnccl.so.2 "$toolkit/lib/"
  for library in "$toolkit"/lib/*.so.*; do ln -sf "$(basename "$library")" "${library%.so.*}.so"; done
  ln -sfn lib "$toolkit/lib64"
  echo "$requirements" >"$target/requirements"
fi
echo "$toolkit"
