#!/usr/bin/env bash
# Makes the Python environments that the scripts and a few tests use, under `target/`.
#
#   scripts/python_env.sh             target/venv: torch, transformers, tokenizers, safetensors, numpy
#   scripts/python_env.sh --client    target/venv-client: the `openai` client alone (small)
#
# Building and running the project needs neither. `target/venv` trains the built-in model and makes
# the model fixtures; `target/venv-client` drives the HTTP interface with the official client.
#
# Not its job: anything with a GPU. The torch wheel is linked against the CUDA libraries and
# does not import without them, so those it links to are installed, one by one; Triton, cuSOLVER,
# NVTX and the Python bindings (1 GB) are not.
#
# Invariant: versions are pinned, and a second run with the same pins changes nothing and needs no
# network. A run that was cut off is started again from the beginning by the next one.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}

# Everything in this list is pure Python or small, and is resolved by pip with its dependencies.
MODEL_PINS=(
    transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6 jinja2==3.1.6
    filelock==4.2.11 fsspec==2026.9.0 networkx==3.6.1 sympy==1.14.0 typing_extensions==4.16.0
    setuptools==80.9.0
)
# Installed without dependencies: torch, then the shared libraries that `import torch` opens.
TORCH_PINS=(
    torch==2.15.0
    nvidia-cublas==13.4.1.3 nvidia-cuda-cupti==13.2.86 nvidia-cuda-nvrtc==13.2.86
    nvidia-cuda-runtime==13.2.86 nvidia-cudnn-cu13==9.26.0.51 nvidia-cufft==12.2.0.57
    nvidia-cufile==1.17.1.22 nvidia-cusparse==12.7.10.12 nvidia-cusparselt-cu13==0.8.1
    nvidia-nccl-cu13==2.30.7 nvidia-nvjitlink==13.2.86 nvidia-nvshmem-cu13==3.7.2
)
CLIENT_PINS=(openai==3.52.0)

usage() {
    echo "usage: scripts/python_env.sh [--client]" >&2
    exit 2
}

# install DIR CHECK PIN... [-- PIN_WITHOUT_DEPENDENCIES...]: CHECK is the Python line that must run.
install() {
    local dir=$1 check=$2 with_deps=() without_deps=()
    shift 2
    while (($#)) && [[ $1 != -- ]]; do with_deps+=("$1"); shift; done
    if (($#)); then shift; without_deps=("$@"); fi

    local stamp="$dir/pins" wanted
    wanted=$(printf '%s\n' "${with_deps[@]}" "${without_deps[@]}")
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$dir/bin/python" -c "$check"; then
        echo "$dir: up to date"
        return
    fi
    rm -f "$stamp"
    # `--clear` also removes what a cut-off run or other pins left behind.
    "$PYTHON" -m venv --clear "$dir"
    local pip=("$dir/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "${with_deps[@]}"
    if ((${#without_deps[@]})); then "${pip[@]}" --no-deps "${without_deps[@]}"; fi
    "$dir/bin/python" -c "$check"
    printf '%s\n' "$wanted" >"$stamp"
    echo "$dir: installed, $(du -sh "$dir" | cut -f1)"
}

command -v "$PYTHON" >/dev/null || {
    echo "python_env.sh needs Python 3.11 or newer; set PYTHON to its path." >&2
    exit 1
}

mkdir -p target
# Two callers at once would write into the same directory: the second waits and finds it done.
exec 9>target/.python_env.lock
flock 9

case "${1:-}" in
    "")
        install target/venv "import torch, transformers; torch.ones(2, 2) @ torch.ones(2, 2)" \
            "${MODEL_PINS[@]}" -- "${TORCH_PINS[@]}"
        ;;
    --client)
        install target/venv-client "import openai" "${CLIENT_PINS[@]}"
        ;;
    *) usage ;;
esac
