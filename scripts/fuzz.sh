#!/usr/bin/env bash
# Coverage-guided fuzzing of everything that reads what others wrote: bodies of requests, frames between processes,
# headers of weight files, the topology file, chat templates. Ends at the first input that breaks a promise, and
# leaves it in the target's artifacts. `cargo test --test fuzz` runs the same targets over a seed corpus.
#
#   scripts/fuzz.sh [SECONDS] [TARGET...]     60 seconds each; http wire safetensors topology template
#
# Needs no nightly compiler: libFuzzer comes as a crate (a C++ compiler builds it), and stable rustc instruments.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "usage: scripts/fuzz.sh [SECONDS] [TARGET...]" >&2; exit 2; }
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(http wire safetensors topology template)

command -v cargo >/dev/null || { echo "fuzz.sh: cargo is missing; install Rust" >&2; exit 1; }
[ -n "${CXX:-}" ] || command -v c++ >/dev/null || {
  echo "fuzz.sh: a C++ compiler is missing, which builds libFuzzer; install g++ or clang++, or set CXX" >&2
  exit 1
}
host=$(rustc -vV | sed -n 's/^host: //p')
work=${CARGO_TARGET_DIR:-target}/fuzz
mkdir -p "$work"
work=$(cd "$work" && pwd)

# Counters of edges and traces of comparisons are what libFuzzer is led by. With --target, build scripts and
# procedural macros stay as they are.
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
bins=()
for target in "${targets[@]}"; do bins+=(--bin "$target"); done
RUSTFLAGS="$flags" CARGO_TARGET_DIR="$work/build" cargo build --release --locked --quiet \
  --manifest-path scripts/fuzz/Cargo.toml --target "$host" "${bins[@]}"

for target in "${targets[@]}"; do
  found=$work/$target
  mkdir -p "$found/corpus" "$found/artifacts"
  printf '\n== %s, %s s\n' "$target" "$seconds"
  # An input that takes 5 s or 1 GB is a finding too.
  "$work/build/$host/release/$target" "$found/corpus" "coordinator/tests/fuzz/corpus/$target" \
    -max_total_time="$seconds" -timeout=5 -rss_limit_mb=1024 -max_len=4096 -print_final_stats=1 -verbosity=0 \
    -artifact_prefix="$found/artifacts/" 2>&1 | tail -n 40
done
