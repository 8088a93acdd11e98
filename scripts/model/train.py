"""Trains the built-in model on the corpus that `corpus.py` wrote.

    train.py --data target/model --out coordinator/builtin [--threads 2]

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

# The phases: the corpus files, read in turns, and the step before which the phase ends.
PHASES = [(["early"], 1600), (["late"], 3760), (["long"], 4000), (["late"], 5200), (["long"], 5400), (["late", "long"], 6000)]
LENGTHS = {"early": 256, "late": 256, "long": 1024}  # of a file's rows
# The cycles of the learning rate: its height, the step at which it starts to fall, the step at which it is nothing.
CYCLES = [(2e-3, 2400, 4000), (1.2e-3, 4100, 5400), (1e-3, 5500, 6000)]
WARM_UP = 100  # steps at the start of a cycle
CHECKPOINT_SECONDS = 150
COPIED = ["tokenizer.json", "tokenizer_config.json", "heldout.jsonl"]


def parse():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--data", type=pathlib.Path, default=pathlib.Path("target/model"))
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path("coordinator/builtin"))
    args.add_argument("--batch-tokens", type=int, default=2048)
    args.add_argument("--export-every", type=int, default=1000)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--seed", type=int, default=1)
    return args.parse_args()


def rate(step):
    """The learning rate: in each cycle a warm-up, a plateau, then half a cosine down to nothing."""
    begin = 0
    for height, fall, end in CYCLES:
        if step < end:
            fallen = max(0.0, (step - fall) / (end - fall))
            return height * min(1.0, (step - begin + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * fallen))
        begin = end
    raise ValueError(f"step {step} is after the last cycle")


def set_threads(threads):
    """One thread while others use the machine: two that wait for each other would be slower than one."""
    running = int(pathlib.Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    torch.set_num_threads(1 if running > 1 else threads)


class Rows:
    """Fixed-length rows of a token file, in a shuffled order that (seed, pass) determines."""

    def __init__(self, data, phase, length, seed):
        tokens = np.fromfile(data / f"{phase}_tokens.bin", dtype=np.uint16)
        counts = np.fromfile(data / f"{phase}_weights.bin", dtype=np.uint8)
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
                                  lr=CYCLES[0][0], betas=(0.9, 0.98), fused=True)
    checkpoint, first, seconds = args.data / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    rows_of = {name: Rows(args.data, name, length, args.seed) for name, length in LENGTHS.items()}
    steps = PHASES[-1][1]
    begin = saved = shown = time.monotonic()
    total, shown_step = 0.0, first
    for step in range(first, steps):
        names = next(names for names, end in PHASES if step < end)
        name = names[step % len(names)]
        # Every phase reads its own shuffled rows; which ones depends on the step alone.
        tokens, counts = rows_of[name].batch(step, args.batch_tokens // LENGTHS[name])
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
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
        if now - saved > CHECKPOINT_SECONDS or done == steps:
            save(checkpoint, model, optimizer, done, seconds + now - begin)
            saved = now
        if done % args.export_every == 0 and done != steps:
            publish(model, args, show_wrong=8)
            shown = time.monotonic()
    print(f"trained {steps} steps, {steps * args.batch_tokens} tokens, "
          f"{(seconds + time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    publish(model, args, show_wrong=30)


if __name__ == "__main__":
    main()
