#!/bin/bash
# Programs and what they load, in one archive, for a GPU machine that has CUDA and NCCL but none of our libraries:
#   tools/gpu_bundle.sh BUILD ARCHIVE      build them first: ninja -C BUILD $(tools/gpu_bundle.sh --targets)
#   tools/gpu_bundle.sh --unpack ARCHIVE DIRECTORY      there; then `. DIRECTORY/environment`
#   tools/gpu_bundle.sh --demo DIRECTORY     the demo model (build/demo) as DIRECTORY/1 and DIRECTORY/2, for two journeys
#   tools/gpu_bundle.sh --unpack-demo TARGET DIRECTORY      there: first with DIRECTORY/1, then with DIRECTORY/2
# CUDA's libraries stay behind: `environment` finds those of the machine (toolkit or Python packages).
set -euo pipefail

programs=(quantmill bench_block bench_communicator bench_cuda_{forward,hessian,cholesky,solver,pack,links}
    test_cuda_backend test_{elementwise,error_propagation,gptq_solve,refine} comm_nccl_test comm_nccl_lost_rank)
if [ "${1:-}" = --targets ]; then
    echo "${programs[@]}"
    exit
fi

write_environment() {
    cat <<'ENVIRONMENT'
# Source this: paths of the programs, of their libraries, of a relocated Open MPI, and of this machine's CUDA.
bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cuda_paths=$(python3 - <<'PYTHON' 2>/dev/null || true
import glob, site, sysconfig
roots = {*site.getsitepackages(), sysconfig.get_path("purelib")}
found = [d for r in roots for d in glob.glob(f"{r}/nvidia/nccl/lib") + glob.glob(f"{r}/nvidia/cu13/lib") + glob.glob(f"{r}/nvidia/cublas/lib")]
print(":".join(found))
PYTHON
)
export PATH=$bundle/bin:$PATH
export LD_LIBRARY_PATH=$bundle/lib:/usr/local/cuda/lib64:$cuda_paths:${LD_LIBRARY_PATH:-}
export OPAL_PREFIX=$bundle OPAL_BINDIR=$bundle/bin OPAL_LIBDIR=$bundle/lib OPAL_PKGLIBDIR=$bundle/lib/openmpi
export OPAL_SYSCONFDIR=$bundle/etc OPAL_PKGDATADIR=$bundle/share/openmpi
export OMPI_MCA_mca_base_component_path=$bundle/lib/openmpi OMPI_MCA_mca_base_component_show_load_errors=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_plm=isolated OMPI_MCA_pml=ob1
export PMIX_MCA_pcompress_base_silence_warning=1
export OMPI_MCA_btl=self,vader OMPI_MCA_btl_base_warn_component_unused=0 OMPI_MCA_odls_base_sigkill_timeout=5
unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
ENVIRONMENT
}

if [ "${1:-}" = --unpack ]; then
    mkdir -p "$3"
    tar -xf "$2" -C "$3" 2>/dev/null || python3 -m tarfile -e "$2" "$3"
    chmod -R u+x "$3/bin"
    # What other programs of the machine load from LD_LIBRARY_PATH, too, and with more needs than ours.
    for name in libstdc++.so.6 libgcc_s.so.1 libgomp.so.1 libcrypto.so.3 libssl.so.3 libz.so.1 libzstd.so.1 libudev.so.1; do
        if ldconfig -p | grep -q "$name "; then rm -f "$3/lib/$name"; fi
    done
    # shellcheck disable=SC1091
    . "$3/environment"
    missing=$(for program in "$3"/bin/*; do ldd "$program" 2>&1 | grep -E 'not found' || true; done | sort -u)
    if [ -n "$missing" ]; then echo "not on this machine: $missing" >&2; exit 1; fi
    exit
fi

# The demo model travels as its GGUF file, cut in two; what else it is made of is as here.
demo=build/demo model=SmolLM2-135M-Instruct
if [ "${1:-}" = --demo ]; then
    mkdir -p "$2/1" "$2/2"
    head -c 40000000 "$demo/$model.Q4_1.gguf" >"$2/1/weights"
    tail -c +40000001 "$demo/$model.Q4_1.gguf" >"$2/2/weights"
    gguf=$(dirname "$(find build/python*/ -path '*/site-packages/gguf/__init__.py' | head -n 1)")
    tar -cJf "$2/2/rest.tar.xz" --exclude __pycache__ --exclude model.safetensors -C "$(dirname "$gguf")" gguf -C "$PWD/$demo" calib.h5 eval.h5 "$model"
    ls -l "$2"/*
    exit
fi
if [ "${1:-}" = --unpack-demo ]; then
    mkdir -p "$2"
    if [ -f "$3/1/weights" ]; then cp "$3/1/weights" "$2/weights.1"; fi
    if [ -f "$3/2/weights" ]; then
        cat "$2/weights.1" "$3/2/weights" >"$2/$model.Q4_1.gguf"
        python3 -m tarfile -e "$3/2/rest.tar.xz" "$2"
        PYTHONPATH=$2 python3 tools/gguf_to_hf.py "$2/$model.Q4_1.gguf" "$2/converted"
        mv "$2/converted/model.safetensors" "$2/$model/"
    fi
    exit
fi

build=$1 archive=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/lib/openmpi" "$work/etc" "$work/share/openmpi"
for name in "${programs[@]}"; do
    found=$(find "$build" -name "$name" -type f -perm -u+x | head -n 1)
    [ -n "$found" ] || { echo "$build has no $name: ninja -C $build $name" >&2; exit 1; }
    strip -o "$work/bin/$name" "$found"
done

# Open MPI with what ranks of one host need.
mpirun=$(readlink -f "$(command -v mpirun)")
cp "$mpirun" "$work/bin/mpirun"
cp "$(readlink -f "$(command -v orted)")" "$work/bin/orted"
plugins=$(dirname "$(find "$(ompi_info --path libdir --parsable | cut -d: -f3)" -name mca_pml_ob1.so | head -n 1)")
for plugin in "$plugins"/mca_*.so; do
    case $plugin in  # other networks, other launchers, parallel files, OpenSHMEM: heavy, and of no use on one host
        *ofi* | *ucx* | *openib* | *psm* | *slurm* | *gridengine* | *_io_* | *_fs_* | *fbtl* | *fcoll* | *sharedfp*) ;;
        *monitoring* | *treematch* | *spml* | *scoll* | *sshmem* | *memheap* | *atomic* | *vprotocol*) ;;
        *) cp "$plugin" "$work/lib/openmpi/" ;;
    esac
done
for texts in /usr/share/openmpi "$(dirname "$(dirname "$mpirun")")/share/openmpi"; do
    if [ -d "$texts" ]; then cp "$texts"/help-*.txt "$work/share/openmpi/"; break; fi
done

# What they load, without the C library's and CUDA's own.
libraries() { ldd "$@" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u; }
libraries "$work"/bin/* "$work"/lib/openmpi/*.so |
    grep -vE '/(libc|libm|libdl|librt|libpthread|libresolv|libutil|ld-linux[^/]*|libcuda|libcudart|libcublas|libcublasLt|libnccl)\.so' |
    while read -r library; do cp -L "$library" "$work/lib/"; done
write_environment >"$work/environment"
mkdir -p "$(dirname "$archive")"
tar -C "$work" -cf - . | xz -T0 -3 >"$archive"
ls -l "$archive"
