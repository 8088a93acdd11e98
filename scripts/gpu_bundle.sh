#!/usr/bin/env bash
# Makes one folder with everything that scripts/gpu_check.sh needs on a machine with a GPU.
#
#   scripts/gpu_bundle.sh [--arch 90a] [--out DIR]       (default: target/gpu-bundle)
#
# Such a machine has a driver, CUDA's libraries, and Python with PyTorch and transformers; no Rust, no network.
# The folder holds the scripts and one archive: the release binary and the test programs for one architecture,
# stripped; NCCL for it; the fixtures. The built-in model is inside the binary. Run there: DIR/gpu_check.sh
#
# Invariant: the folder is below 60 MiB, or the script fails.
set -euo pipefail
cd "$(dirname "$0")/.."

arch=90a out= limit_mib=60
while (($#)); do
    case $1 in
        --arch) arch=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) echo "usage: scripts/gpu_bundle.sh [--arch 90a] [--out DIR]" >&2; exit 2 ;;
    esac
done
target=${CARGO_TARGET_DIR:-target}
out=${out:-$target/gpu-bundle}
work=$target/gpu-bundle-work
mkdir -p "$work"
PYTHON=${PYTHON:-python3}
NCCL=nvidia-nccl-cu13==2.30.7

echo "== the compiler for CUDA"
scripts/cuda_toolchain.sh

echo "== programs for sm_$arch"
export CLUSTER_CUDA_ARCHS=$arch
cargo build --release --locked -p coordinator -p shard --features coordinator/cuda,shard/cuda \
    --bin cluster --example engine_speed
cargo test --release --locked -p kernels -p shard --features kernels/cuda,shard/cuda \
    --lib --test engine --test processes --no-run --message-format=json >"$work/tests.json"

echo "== NCCL"
if ! [[ -f $work/libnccl.so.2 && $(<"$work/nccl-pin") == "$NCCL" ]]; then
    rm -rf "$work/wheel" "$work/nccl-pin"
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/wheel" \
        --only-binary=:all: "$NCCL"
    "$PYTHON" -c "
import sys, zipfile, pathlib
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob('*.whl')))
name = next(name for name in wheel.namelist() if name.endswith('/libnccl.so.2'))
pathlib.Path(sys.argv[2]).write_bytes(wheel.read(name))" "$work/wheel" "$work/libnccl.so.2"
    rm -rf "$work/wheel"
    echo "$NCCL" >"$work/nccl-pin"
fi
programs=$work/programs
rm -rf "$programs"
mkdir -p "$programs/lib"
"$PYTHON" scripts/prune_nccl.py "$work/libnccl.so.2" "$programs/lib/libnccl.so.2" --arch "${arch%%[a-z]}"

echo "== the folder"
install -s "$target/release/cluster" "$programs/cluster"
install -s "$target/release/examples/engine_speed" "$programs/engine_speed"
# The test programs' names end in a hash; cargo says which they are.
"$PYTHON" -c "
import json, sys
for line in open(sys.argv[1]):
    found = json.loads(line)
    if found.get('executable') and found['profile']['test']:
        package = found['package_id'].split('#')[0].rsplit('/', 1)[-1]
        kind = found['target']['kind'][0]
        print(found['executable'], package if kind == 'lib' else found['target']['name'])
" "$work/tests.json" | while read -r executable name; do
    # What the shard's own tests check needs no GPU.
    [[ $name == shard ]] && continue
    install -s "$executable" "$programs/test-$name"
done
for name in kernels engine processes; do
    [[ -x $programs/test-$name ]] || { echo "gpu_bundle: test-$name was not built" >&2; exit 1; }
done
rm -rf "$out"
mkdir -p "$out"
cp scripts/gpu_check.sh "$out/"
cp -r scripts/gpu_check "$out/gpu_check"
git rev-parse HEAD >"$out/revision" 2>/dev/null || echo unknown >"$out/revision"
# One archive, because the programs share most of their kernels; Python unpacks it where there is no xz.
"$PYTHON" -c "
import lzma, sys, tarfile
filters = [{'id': lzma.FILTER_LZMA2, 'preset': 6, 'dict_size': 192 << 20}]
with lzma.open(sys.argv[2], 'wb', filters=filters) as packed, tarfile.open(fileobj=packed, mode='w') as tar:
    tar.add(sys.argv[1], arcname='programs')
    tar.add('shard/tests/fixtures', arcname='fixtures')
" "$programs" "$out/programs.tar.xz"

size=$(du -sm --apparent-size "$out" | cut -f1)
du -a --apparent-size -h -d 1 "$out" | sort -h
echo "gpu_bundle: $out, $size MiB"
((size < limit_mib)) || { echo "gpu_bundle: that is not below $limit_mib MiB" >&2; exit 1; }
