#!/usr/bin/env bash
# The long form of the recovery test: kills shards at random under 64 streams, many times, with the release
# build, and prints what was lost (nothing may be) and how long it took to go on.
#
#   scripts/chaos.sh [KILLS] [SEED]     200 kills, seed 1
set -euo pipefail
cd "$(dirname "$0")/.."

kills=${1:-200} seed=${2:-1}
[[ $kills =~ ^[1-9][0-9]*$ && $seed =~ ^[0-9]+$ ]] || { echo "usage: scripts/chaos.sh [KILLS] [SEED]" >&2; exit 2; }
CHAOS_KILLS=$kills CHAOS_SEED=$seed cargo test --release --locked --quiet -p coordinator --test cluster_up \
  random_kills_under_64_streams_lose_nothing -- --nocapture
