#!/usr/bin/env bash
# Does what the README tells a newcomer: runs its first command, pastes the printed `curl` line,
# presses Ctrl-C, and looks for processes that stayed behind. Needs port 8000, curl and pgrep.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in curl pgrep; do
  command -v "$tool" >/dev/null || { echo "smoke: $tool is missing: apt-get install -y curl procps"; exit 1; }
done

# The README's first command, taken from the README so that the two cannot differ.
first_command=$(sed -n '/^```sh/,/^```/p' README.md | grep -m1 '^cargo run')
log=$(mktemp)
trap 'rm -f "$log"; [ -z "${group:-}" ] || kill -KILL -- "-$group" 2>/dev/null || true' EXIT

echo "smoke: $first_command"
set -m # a process group of its own, so that Ctrl-C reaches all of it as in a terminal
$first_command >"$log" 2>&1 &
group=$!
set +m

for _ in $(seq 1 1200); do # building may come first
  grep -q '^ *curl ' "$log" && break
  kill -0 "$group" 2>/dev/null || { cat "$log"; echo "smoke: it ended before it was ready"; exit 1; }
  sleep 1
done
cat "$log"
curl_line=$(grep -m1 '^ *curl ' "$log") || { echo "smoke: no curl line was printed"; exit 1; }

answer=$(bash -c "$curl_line")
echo "smoke: $answer"
grep -q '12' <<<"$answer" || { echo "smoke: 7 plus 5 is not in the answer"; exit 1; }
# From here on only HTTP status codes matter.
for path in health ready v1/models metrics; do
  curl -fsS -o /dev/null "http://127.0.0.1:8000/$path" || { echo "smoke: /$path failed"; exit 1; }
done

# Shards have process groups of their own; cargo has become the coordinator.
shards=$(pgrep -P "$group" -f 'cluster shard' || true)
[ -n "$shards" ] || { echo "smoke: no shard processes were seen"; exit 1; }
kill -INT -- "-$group"
wait "$group" || { cat "$log"; echo "smoke: Ctrl-C did not end it with 0"; exit 1; }
sleep 0.5
left=$(pgrep -g "$group" || true; for shard in $shards; do ps -o pid= -p "$shard" || true; done)
[ -z "$left" ] || { echo "smoke: processes were left behind: $left"; exit 1; }
group=
echo "smoke: passed"
