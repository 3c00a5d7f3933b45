#!/bin/bash
# GPTQModel for a machine that has torch and CUDA but no network:
#   bench/peers/bundle.sh ARCHIVE      here, from build/python-interop (tools/python_env.sh --interop); 10 MB
# There: unpack it and put its folder `py` into PYTHONPATH. It holds pure Python and what runs on any version of it; the
# compiled PyPcre stays behind, and a module of the same names over `re` takes its place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

archive=$(realpath -m "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/py/pcre" "$(dirname "$archive")"
packages=(gptqmodel gptqmodel_ext transformers tokenizers huggingface_hub accelerate datasets dill multiprocess _multiprocess
    tokenicer logbar defuser device_smi torchao httpx2 httpcore2 h11 anyio truststore fsspec filelock packaging)
cd build/python-interop/lib/python3*/site-packages
for package in "${packages[@]}"; do cp -r "$package" "$work/py/"; done
for package in "${packages[@]}" pypcre threadpoolctl typing_extensions; do
    cp -r "$package"-*.dist-info "$work/py/" 2>/dev/null || true  # a module of another's package has none
done
cp threadpoolctl.py typing_extensions.py "$work/py/"
find "$work/py" -name __pycache__ -prune -exec rm -rf {} +
find "$work/py/torchao" -name '*.so' -delete
cat >"$work/py/pcre/__init__.py" <<'PYTHON'
"""Stands in for PyPcre: the names that GPTQModel uses, over `re`."""
import re
from re import Pattern, compile, escape, split


class Flag:
    CASELESS = re.IGNORECASE
    DOTALL = re.DOTALL
    MULTILINE = re.MULTILINE
PYTHON
tar -C "$work" -cJf "$archive" py
ls -l "$archive"
