#!/usr/bin/env bash
# Checks the dependency tree against .deny.toml: licences, banned crates, sources. Advisories need the
# network's advisory database and are checked only with `--advisories`.
set -euo pipefail
cd "$(dirname "$0")/.."

checks=(bans licenses sources)
[ "${1:-}" = --advisories ] && checks+=(advisories)

if ! command -v cargo-deny >/dev/null; then
  export PATH="$PWD/target/tools/bin:$PATH"
  # It runs for a second: to optimise it would take minutes.
  command -v cargo-deny >/dev/null ||
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --debug --locked --quiet --version 0.20.2 --root target/tools cargo-deny
fi
# A build fetches what this machine needs; the policy is about all platforms.
cargo fetch --locked --quiet
cargo deny --offline --config .deny.toml check --hide-inclusion-graph "${checks[@]}"
