#!/usr/bin/env bash
# The long form of the simulation: many seeds of faults against the real engine, scheduler and fleet on simulated
# machines, and prints what they saw. A seed that fails is printed with its log up to there.
#
#   scripts/simulate.sh [SEEDS] [FIRST]     20000 seeds from seed 1000
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=${1:-20000} first=${2:-1000}
[[ $seeds =~ ^[1-9][0-9]*$ && $first =~ ^[0-9]+$ ]] || { echo "usage: scripts/simulate.sh [SEEDS] [FIRST]" >&2; exit 2; }
SIMULATE_SEEDS=$seeds SIMULATE_FIRST=$first cargo test --release --locked --quiet -p coordinator --lib \
  simulation::seeds_of_the_long_form -- --nocapture
