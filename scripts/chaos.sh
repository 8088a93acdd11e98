#!/usr/bin/env bash
# The long form of the recovery tests, with the release build: kills shards at random under 64 streams, or the
# coordinator, many times, and prints what was lost (nothing may be, but for open streams of a coordinator) and how
# long it took to go on.
#
#   scripts/chaos.sh [--coordinator] [KILLS] [SEED]     200 kills of shards, or 100 of coordinators; seed 1
set -euo pipefail
cd "$(dirname "$0")/.."

test=random_kills_under_64_streams_lose_nothing variable=CHAOS_KILLS kills=200
if [[ ${1:-} == --coordinator ]]; then
  test=a_killed_coordinator_is_followed_by_one_that_loads_nothing variable=CHAOS_COORDINATOR_KILLS kills=100
  shift
fi
kills=${1:-$kills} seed=${2:-1}
[[ $kills =~ ^[1-9][0-9]*$ && $seed =~ ^[0-9]+$ ]] \
  || { echo "usage: scripts/chaos.sh [--coordinator] [KILLS] [SEED]" >&2; exit 2; }
env "$variable=$kills" "CHAOS_SEED=$seed" cargo test --release --locked --quiet -p coordinator --test cluster_up \
  "$test" -- --nocapture
