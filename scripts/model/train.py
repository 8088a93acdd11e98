"""Trains the built-in model on the corpus that `corpus.py` wrote.

    train.py --data target/model --out coordinator/builtin [--steps 4600] [--threads 2]

Resumes from the last checkpoint in the data directory, prints loss and tokens per second, and at the
end (and with `--export-every`, on the way) writes the published files to `--out` and prints the
held-out accuracy of those files. Invariant: batches are a function of (seed, step), so a run that
was cut off and resumed sees the same data as one that was not.
"""

import argparse
import math
import pathlib
import shutil
import time

import numpy as np
import torch

import evaluate
from llama import CONFIG, Llama, export

LENGTH = 256          # of a training row, but for the last phase
LONG_LENGTH = 1024    # of a row in the last phase: the whole context
CHECKPOINT_SECONDS = 150
COPIED = ["tokenizer.json", "tokenizer_config.json", "heldout.jsonl"]


def parse():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--data", type=pathlib.Path, default=pathlib.Path("target/model"))
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path("coordinator/builtin"))
    args.add_argument("--steps", type=int, default=4600)
    args.add_argument("--batch-tokens", type=int, default=2048)
    args.add_argument("--lr", type=float, default=2e-3)
    args.add_argument("--long-share", type=float, default=0.06, help="share of the steps with rows of the whole context")
    args.add_argument("--decay-share", type=float, default=0.4, help="share of the steps over which the rate falls to nothing")
    args.add_argument("--export-every", type=int, default=1000)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--seed", type=int, default=1)
    return args.parse_args()


def rate(step, args):
    """Warm-up, a plateau, then half a cosine down to nothing."""
    start = args.steps * (1 - args.decay_share)
    fall = max(0.0, (step - start) / (args.steps - start))
    return args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * fall))


def set_threads(threads):
    """One thread while others use the machine: two that wait for each other would be slower than one."""
    running = int(pathlib.Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    torch.set_num_threads(1 if running > 1 else threads)


class Rows:
    """Fixed-length rows of a token file, in a shuffled order that (seed, pass) determines."""

    def __init__(self, data, prefix, length, seed):
        tokens = np.fromfile(data / f"{prefix}tokens.bin", dtype=np.uint16)
        counts = np.fromfile(data / f"{prefix}weights.bin", dtype=np.uint8)
        rows = len(tokens) // (length + 1)
        self.tokens = tokens[: rows * (length + 1)].reshape(rows, length + 1)
        self.counts = counts[: rows * (length + 1)].reshape(rows, length + 1)
        self.seed, self.orders = seed, {}

    def batch(self, step, size):
        """Rows `step * size ..` of the endless shuffled sequence: tokens, counts."""
        picks = []
        for index in range(step * size, (step + 1) * size):
            turn, at = divmod(index, len(self.tokens))
            if turn not in self.orders:
                self.orders = {turn: np.random.default_rng([self.seed, turn]).permutation(len(self.tokens))}
            picks.append(self.orders[turn][at])
        return torch.from_numpy(self.tokens[picks].astype(np.int64)), torch.from_numpy(self.counts[picks])


def save(path, model, optimizer, step, seconds):
    """Writes a checkpoint whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def publish(model, args, show_wrong):
    """Exports to `--out` and prints the held-out accuracy of what was written."""
    export(model, args.out)
    for name in COPIED:
        shutil.copyfile(args.data / name, args.out / name)
    return evaluate.print_table(evaluate.accuracy(args.out, show_wrong)[0])


def main():
    args = parse()
    torch.manual_seed(args.seed)
    model = Llama(CONFIG)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {args.threads} threads", flush=True)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98), fused=True)
    checkpoint, first, seconds = args.data / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    short, long = Rows(args.data, "", LENGTH, args.seed), Rows(args.data, "long_", LONG_LENGTH, args.seed)
    last_short = round(args.steps * (1 - args.long_share))
    begin = saved = shown = time.monotonic()
    total, shown_step = 0.0, first
    for step in range(first, args.steps):
        if step < last_short:
            tokens, counts = short.batch(step, args.batch_tokens // LENGTH)
        else:
            tokens, counts = long.batch(step - last_short, args.batch_tokens // LONG_LENGTH)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        set_threads(args.threads)
        loss = model.loss(tokens, counts)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        now = time.monotonic()
        done = step + 1
        if done % 50 == 0:
            speed = (done - shown_step) * args.batch_tokens / (now - shown)
            print(f"step {done} loss {total / (done - shown_step):.4f} {speed:.0f} tokens/s "
                  f"{(seconds + now - begin) / 60:.1f} min", flush=True)
            total, shown_step, shown = 0.0, done, now
        if now - saved > CHECKPOINT_SECONDS or done == args.steps:
            save(checkpoint, model, optimizer, done, seconds + now - begin)
            saved = now
        if done % args.export_every == 0 and done != args.steps:
            publish(model, args, show_wrong=8)
            shown = time.monotonic()
    print(f"trained {args.steps} steps, {args.steps * args.batch_tokens} tokens, "
          f"{(seconds + time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    publish(model, args, show_wrong=30)


if __name__ == "__main__":
    main()
