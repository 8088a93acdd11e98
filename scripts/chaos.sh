#!/usr/bin/env bash
# The long form of the recovery tests, with the release build: kills shards at random under 64 streams, freezes them,
# or kills the coordinator, many times, and prints what was lost (nothing may be, but for open streams of a coordinator)
# and how long it took to go on.
#
#   scripts/chaos.sh [--freeze | --coordinator] [TIMES] [SEED]     200 kills, or 100 of the others; seed 1
set -euo pipefail
cd "$(dirname "$0")/.."

test=random_kills_under_64_streams_lose_nothing variable=CHAOS_KILLS times=200
if [[ ${1:-} == --coordinator ]]; then
  test=a_killed_coordinator_is_followed_by_one_that_loads_nothing variable=CHAOS_COORDINATOR_KILLS times=100
  shift
elif [[ ${1:-} == --freeze ]]; then
  test=a_frozen_shard_is_replaced_and_health_tells_the_truth variable=CHAOS_FREEZES times=100
  shift
fi
times=${1:-$times} seed=${2:-1}
[[ $times =~ ^[1-9][0-9]*$ && $seed =~ ^[0-9]+$ ]] \
  || { echo "usage: scripts/chaos.sh [--freeze | --coordinator] [TIMES] [SEED]" >&2; exit 2; }
env "$variable=$times" "CHAOS_SEED=$seed" cargo test --release --locked --quiet -p coordinator --test cluster_up \
  "$test" -- --nocapture
