#!/usr/bin/env bash
# The long form of the test with clients that come and go: requests over shared prefixes, most of them left
# half-way and asked again, a shard killed about every two seconds, with the release build. Every text must be the
# one that its request gives alone, and memory must not grow.
#
#   scripts/soak.sh [REQUESTS] [FAULTS] [SEED]     100,000 requests, 50 faults, seed 1
set -euo pipefail
cd "$(dirname "$0")/.."

requests=${1:-100000} faults=${2:-50} seed=${3:-1}
for number in "$requests" "$faults" "$seed"; do
  [[ $number =~ ^[0-9]+$ ]] || { echo "usage: scripts/soak.sh [REQUESTS] [FAULTS] [SEED]" >&2; exit 2; }
done
SOAK_REQUESTS=$requests SOAK_FAULTS=$faults SOAK_SEED=$seed cargo test --release --locked --quiet -p coordinator \
  --test cluster_up clients_that_come_and_go -- --nocapture
