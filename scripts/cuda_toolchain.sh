#!/usr/bin/env bash
# Installs what compiles the CUDA kernels: nvcc with the static CUDA runtime, and FlashInfer's headers.
#
#   scripts/cuda_toolchain.sh     target/cuda: bin/nvcc, include, lib, nvvm, flashinfer/{include,cccl,cutlass}
#
# Needed to build with `--features cuda` where no CUDA toolkit (CUDA_HOME, or nvcc on the PATH) is there;
# FlashInfer's headers are needed in either case. Running what was built needs neither.
# CARGO_TARGET_DIR is honoured, as cargo does.
#
# Not its job: the driver, cuBLASLt and NCCL, which the binary looks for when it runs.
#
# Invariant: versions are pinned, and a second run with the same pins changes nothing and needs no
# network. A run that was cut off is started again from the beginning by the next one.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TARGET=${CARGO_TARGET_DIR:-target}

# The compiler's parts must be of one version. The disassemblers read the code of older compilers too.
PINS=(
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
    flashinfer-python==0.7.2.post1
)

# A kernel that uses the headers of both, as the first proof that the pieces fit.
check() {
    local dir=$1 probe
    probe=$(mktemp -d)
    cat >"$probe/probe.cu" <<'CU'
#include <cuda_bf16.h>
#include <cuda_runtime.h>
__global__ void twice(__nv_bfloat16* x) { x[threadIdx.x] += x[threadIdx.x]; }
int main() { twice<<<1, 1>>>(nullptr); return cudaGetLastError() == cudaSuccess; }
CU
    "$dir/bin/nvcc" -std=c++17 -gencode=arch=compute_90a,code=sm_90a -isystem "$dir/flashinfer/cccl/libcudacxx/include" \
        -L"$dir/lib" -o "$probe/probe" "$probe/probe.cu"
    rm -rf "$probe"
    [[ -f $dir/flashinfer/include/flashinfer/attention/prefill.cuh ]]
}

command -v "$PYTHON" >/dev/null || {
    echo "cuda_toolchain.sh needs Python 3 with pip; set PYTHON to its path." >&2
    exit 1
}
command -v g++ >/dev/null || {
    echo "cuda_toolchain.sh needs g++, which nvcc compiles host code with (apt-get install g++)." >&2
    exit 1
}

mkdir -p "$TARGET"
# Two callers at once would write into the same directory: the second waits and finds it done.
exec 9>"$TARGET/.cuda_toolchain.lock"
flock 9

dir=$TARGET/cuda
stamp=$dir/pins
wanted=$(printf '%s\n' "${PINS[@]}")
if [[ -f $stamp && $(<"$stamp") == "$wanted" && -x $dir/bin/nvcc ]]; then
    echo "$dir: up to date"
    exit 0
fi

rm -rf "$dir" "$dir.new"
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --root-user-action=ignore \
    --only-binary=:all: --target "$dir.new/site" "${PINS[@]}"
site=$dir.new/site
mkdir "$dir.new/cuda"
mv "$site"/nvidia/cu13/* "$dir.new/cuda/"
# nvcc looks for libraries here.
ln -s lib "$dir.new/cuda/lib64"
flashinfer=$dir.new/cuda/flashinfer
mkdir -p "$flashinfer/cccl/libcudacxx" "$flashinfer/cutlass"
mv "$site/flashinfer/data/include" "$flashinfer/"
mv "$site/flashinfer/data/cccl/cub" "$site/flashinfer/data/cccl/thrust" "$flashinfer/cccl/"
mv "$site/flashinfer/data/cccl/libcudacxx/include" "$flashinfer/cccl/libcudacxx/"
mv "$site/flashinfer/data/cutlass/include" "$flashinfer/cutlass/"
check "$dir.new/cuda"
mv "$dir.new/cuda" "$dir"
rm -rf "$dir.new"
printf '%s\n' "$wanted" >"$stamp"
echo "$dir: installed, $(du -sh "$dir" | cut -f1); $("$dir/bin/nvcc" --version | tail -1)"
