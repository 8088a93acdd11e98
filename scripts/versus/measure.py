"""What every peer is measured by: the same prompts, the same steps, one JSON line per measurement.

A peer's script loads its model and hands in `generate(prompts, count)`, which computes `count` tokens, greedy, for each
prompt (a list of token ids) and returns when the last one is there.

    python peer_x.py --model PATH --weights bf16 --threads 2 [--decode 1,8,16] [--prefill 512] [--context 64]
                     [--steps 32] [--repeats 3] [--started SECONDS]

Rates are those of `shard/examples/engine_speed`: decode counts the steps behind the first token, as the difference of
a run with them and a run without.

Invariant: no two calls have a prompt in common, so no prefix cache helps.
"""

import argparse
import json
import random
import statistics
import time

# Prompts are drawn from ids that every vocabulary has, and that are ordinary text.
FIRST_TOKEN, LAST_TOKEN = 300, 999


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode", type=numbers, default=[1, 8, 16])
    parser.add_argument("--prefill", type=numbers, default=[512])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    # The monotonic clock is the same in all processes of a machine.
    parser.add_argument("--started", type=float, default=time.monotonic())
    return parser.parse_args()


def numbers(text):
    return [int(item) for item in text.split(",") if item]


def say(**line):
    print(json.dumps(line), flush=True)


def measure(options, version, generate):
    """Says version, time to the first token, prefill and decode rates."""
    source = random.Random(0)

    def timed(batch, length, count):
        prompts = [
            [source.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)] for _ in range(batch)
        ]
        begun = time.perf_counter()
        generate(prompts, count)
        return time.perf_counter() - begun

    def median(*load):
        timed(*load)
        return statistics.median(timed(*load) for _ in range(options.repeats))

    timed(1, 32, 1)
    say(what="start", seconds=time.monotonic() - options.started, version=version)
    for tokens in options.prefill:
        say(what="prefill", tokens=tokens, tokens_per_s=tokens / median(1, tokens, 1))
    for batch in options.decode:
        without = median(batch, options.context, 1)
        steps = median(batch, options.context, 1 + options.steps) - without
        say(what="decode", batch=batch, tokens_per_s=batch * options.steps / steps)
