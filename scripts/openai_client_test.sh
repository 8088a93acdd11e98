#!/usr/bin/env bash
# Runs the official `openai` client's checks against the release binary with the built-in model at
# tensor-parallel sizes 1, 2 and 4: every size must pass, and all must say the same.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --locked --quiet -p coordinator --bin cluster
scripts/python_env.sh --client >/dev/null

log=$(mktemp)
server=
stop() { if [ -n "$server" ]; then kill -INT "$server" 2>/dev/null && wait "$server" || true; fi; }
trap 'stop; rm -f "$log"' EXIT

for size in 1 2 4; do
  target/release/cluster up --cpus 2 --tensor-parallel-size "$size" --port 0 >"$log" 2>&1 &
  server=$!
  for _ in $(seq 1 300); do
    address=$(grep -om1 'http://127\.0\.0\.1:[0-9]*' "$log" || true)
    [ -n "$address" ] && break # it is printed when requests are served
    kill -0 "$server" 2>/dev/null || { cat "$log"; exit 1; }
    sleep 0.1
  done
  [ -n "$address" ] || { cat "$log"; echo "it was not ready within 30 s"; exit 1; }
  echo "tensor-parallel size $size at $address"
  target/venv-client/bin/python scripts/openai_client_test.py "$address/v1" || { cat "$log"; exit 1; }
  stop
  server=
done
