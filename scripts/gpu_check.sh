#!/usr/bin/env bash
# Proves on a machine with a GPU that the CUDA path works and how fast it is: a table, one row per check.
#
#   gpu_check.sh [--only NAME,...] [--work DIR] [--seconds 470] [--layers N]
#
# Runs from the folder that scripts/gpu_bundle.sh makes. Needs a driver, CUDA's libraries, and Python with PyTorch
# and transformers; nothing is installed, nothing is fetched. Leaves the GPU's settings alone.
#
# Invariant: the exit code is 0 only if every check ran and passed, in less than 8 minutes.
set -euo pipefail
cd "$(dirname "$0")"
[[ -f programs.tar.xz ]] || {
    echo "gpu_check.sh runs from the folder that scripts/gpu_bundle.sh makes" >&2
    exit 2
}
exec "${PYTHON:-python3}" -u -m gpu_check "$@"
