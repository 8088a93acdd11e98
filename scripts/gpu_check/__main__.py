"""Runs the checks of the CUDA path and prints a table; see scripts/gpu_check.sh.

Every check is a function that returns rows of (what, found, wanted, passed). A check that fails, takes too long or
cannot run is a row that did not pass, and the others go on.

Invariant: the exit code is 0 only if all rows passed; the time given is kept, whatever hangs.
"""

import argparse
import importlib.util
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import server

ROOT = Path(__file__).resolve().parent.parent
# H100 is what the project's targets are for.
TARGETS = {"decode 1": 0.85, "decode 64": 0.75, "prefill 2048": 0.60, "warm start": 4.0}
# Microseconds of a decode step of that batch before the first kernel and after the last.
OUTSIDE = {64: 200}
SKIPPED = re.compile(r"(?:^|\.\.\. )(?:skipped|not tested)\b", re.M)


class Checks:
    """What the checks share: where things are, and how much time is left."""

    def __init__(self, args):
        self.args = args
        self.end = time.monotonic() + args.seconds
        self.work = args.work
        self.programs = self.work / "programs"
        self.model = self.work / f"llama-8b-shape-{args.layers}"
        self.card = None
        self.speed = {}
        # Wherever the machine's own NCCL is, this one is what is being proved.
        os.environ["CLUSTER_NCCL_SO_PATH"] = str(self.programs / "lib/libnccl.so.2")
        os.environ["CLUSTER_TEST_FIXTURES"] = str(self.work / "fixtures")
        # A failed test's sentence is enough.
        os.environ["RUST_BACKTRACE"] = "0"
        # PyTorch brings cuBLASLt; its folder is found even where this Python is not the first on the PATH.
        packages = importlib.util.find_spec("nvidia")
        places = [Path(place) / "cu13/lib" for place in packages.submodule_search_locations] if packages else []
        if places:
            os.environ.setdefault("CLUSTER_CUDA_LIBRARIES", ":".join(map(str, places)))

    def left(self):
        return max(self.end - time.monotonic(), 1)

    def unpack(self):
        for folder in [self.programs, self.work / "fixtures"]:
            shutil.rmtree(folder, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        with lzma.open(ROOT / "programs.tar.xz") as packed, tarfile.open(fileobj=packed) as tar:
            tar.extractall(self.work, filter="data")

    def run(self, command, seconds=120, **variables):
        """Runs a program; its output. Raises with the end of that where it fails or takes too long."""
        limit = min(seconds, self.left())
        # A group of its own: what it started ends with it.
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | variables,
            cwd=ROOT,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            raise RuntimeError(f"not done after {limit:.0f} s: {brief(output)}") from None
        (self.work / "log.txt").open("a").write(f"$ {' '.join(map(str, command))}\n{output}\n")
        if process.returncode != 0:
            raise RuntimeError(f"exit code {process.returncode}: {brief(output)}")
        return output

    def python(self, module, *arguments, seconds=150):
        if not importlib.util.find_spec("torch"):
            raise RuntimeError(f"{sys.executable} has no PyTorch; name a Python that has it, with transformers, in PYTHON")
        output = self.run([sys.executable, "-m", f"gpu_check.{module}", *arguments], seconds)
        return output

    def tests(self, name, *arguments, seconds=150, **variables):
        """Runs a test program: how many passed. One that was skipped has not run."""
        output = self.run([self.programs / f"test-{name}", *arguments], seconds, **variables)
        if SKIPPED.search(output):
            line = next(line for line in output.splitlines() if SKIPPED.search(line))
            raise RuntimeError(line)
        passed = re.search(r"(\d+) passed", output)
        count = int(passed[1]) if passed else output.count("... ok")
        if count == 0:
            raise RuntimeError("no test ran")
        return count, output

    def cuda_tests(self):
        listed = self.run([self.programs / "test-kernels", "--list"], 30)
        names = re.findall(r"^(\S+): test$", listed, re.M)
        return [name for name in names if re.search(r"cuda|twin|device|flashinfer|kernel", name)]


def brief(text, characters=600):
    """On one line, without the middle of what is longer: programs say what is wrong first or last."""
    line = " | ".join(text.strip().splitlines())
    half = characters // 2
    return line if len(line) <= characters else f"{line[:half]} ... {line[-half:]}"


def device(checks):
    """What the driver says. Without a GPU the other checks run all the same, and say so each."""
    found = json.loads(checks.run([checks.programs / "cluster", "shard", "--probe"], 30).splitlines()[-1])
    host = found.get("Ok")
    if host is None:
        raise RuntimeError(f"there is no GPU to check: {found['Err']}")
    names = ", ".join(f"{gpu['name']}, {gpu['total_bytes'] >> 30} GiB" for gpu in host["gpus"])
    yield "0 GPU, and NCCL of this folder", f"{names}; {host['nccl']}", "both", bool(names and host["nccl"])


def kernels(checks):
    names = checks.cuda_tests()
    count, _ = checks.tests("kernels", "--exact", *names, "--nocapture")
    yield "1 kernels against their twins", f"{count} tests", "all", count == len(names)


def sanitizer(checks):
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if not tool:
        raise RuntimeError("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin; it comes with CUDA's toolkit")
    names = [name for name in checks.cuda_tests() if not re.search("attention|linear|load|graphs|trials", name)]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", checks.programs / "test-kernels"]
    output = checks.run([*command, "--exact", *names, "--test-threads", "1", "--nocapture"], 100)
    errors = re.search(r"ERROR SUMMARY: (\d+) error", output)
    found = f"{len(names)} tests, {errors[1] if errors else '?'} errors"
    yield "1 memcheck of the small ones", found, "0 errors", bool(errors) and errors[1] == "0"


def fixtures(checks):
    count, output = checks.tests("engine", "cuda", "--nocapture", seconds=200)
    cases = re.findall(r"(\S+)( over \d)?( in \w+)? on CUDA: off by (\S+)", output)
    kinds = {"f32": [], "16 bits": [], "quantised, f32": [], "quantised, 16 bits": []}
    for folder, _, dtype, off in cases:
        bits = "16 bits" if "16" in dtype else "f32"
        kinds[f"quantised, {bits}" if "/quantised/" in folder else bits].append(float(off))
    # The tests hold each case to its limit; fewer cases are tests that did not run.
    for (kind, off), (limit, least) in zip(kinds.items(), [("1e-3", 20), ("0.05", 20), ("1e-3", 18), ("0.3", 18)]):
        found = f"{len(off)} cases in {count} tests, worst {max(off, default=float('nan')):.1e}"
        yield f"2 fixtures' logits, {kind}", found, f"< {limit}", len(off) >= least


def nccl_replays(checks):
    count, _ = checks.tests("processes", "replayed_steps", CLUSTER_TEST_GPU="0")
    yield "2 replayed steps, TP 2 over NCCL", "tokens of queued ones", "the same", count == 1


def nccl_fixtures(checks):
    count, output = checks.tests("processes", "two_processes", CLUSTER_TEST_GPU="0")
    cases = re.findall(r"over 2 processes: off by (\S+)", output)
    worst = max(map(float, cases), default=float("nan"))
    found = f"{len(cases)} fixtures, worst {worst:.1e}"
    yield "2 fixtures' logits, TP 2 over NCCL", found, "< 1e-3", count == 1 and len(cases) >= 8


def text(checks):
    common = ["--dtype", "float32", "--max-model-len", "1024"]
    cpu = server.texts(checks.programs, ["--cpus", "2", *common], checks.left())
    for gpus in ["0", "0,0"]:
        gpu = server.texts(checks.programs, ["--gpus", gpus, "--gpu-memory-utilization", "0.3", *common], checks.left())
        same = sum(a == b for a, b in zip(cpu, gpu))
        what = f"2 greedy text, --gpus {gpus} and CPU"
        yield what, f"{same} of {len(cpu)} equal", "all", same == len(cpu)


def checkpoint(checks):
    begun = time.monotonic()
    checks.python("checkpoint", checks.model, "--layers", checks.args.layers)
    yield "3 a checkpoint of Llama-3.1-8B's shape", f"written in {time.monotonic() - begun:.0f} s", "there", True


def card(checks):
    checks.card = json.loads(checks.python("ceilings").splitlines()[-1])
    found = f"{checks.card['bytes_per_s'] / 1e12:.2f} TB/s, {checks.card['flops_per_s'] / 1e12:.0f} TFLOP/s"
    yield f"3 {checks.card['name']}: copy, 8192^3 product", found, "measured", True


def engine(checks, *arguments, seconds=150):
    model = ["--model", checks.model, "--device", "cuda:0"]
    output = checks.run([checks.programs / "engine_speed", *model, *arguments], seconds)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {(line["what"], line.get("batch", line.get("tokens"))): line for line in lines}


def target(name, share):
    wanted = TARGETS.get(name)
    return ("no target", True) if wanted is None else (f">= {wanted:.0%}", share >= wanted)


def speed(checks):
    checks.speed = engine(checks)
    for (what, size), line in checks.speed.items():
        if what == "decode":
            share = line["bytes_per_step"] / line["step_us"] * 1e6 / checks.card["bytes_per_s"]
            wanted, passed = target(f"decode {size}", share)
            found = f"{line['tokens_per_s']:.0f} tok/s, {line['step_us']:.0f} us, {share:.0%} of the copy"
            yield f"3 decode, batch {size}", found, wanted, passed
            limit, outside = OUTSIDE.get(size), line["outside_us"]
            alone = line["outside_alone_us"]
            found = f"{outside:.0f} us of {line['step_us']:.0f} ({alone:.0f} us where steps wait for each other)"
            wanted = f"< {limit} us" if limit else "measured"
            # Zero is a device that did not measure, but where it goes from step to step.
            passed = alone > 0 and (not limit or outside < limit)
            yield f"3 decode, batch {size}: outside kernels", found, wanted, passed
        elif what == "prefill":
            share = line["flops"] / line["step_us"] * 1e6 / checks.card["flops_per_s"]
            wanted, passed = target(f"prefill {size}", share)
            found = f"{line['tokens_per_s']:.0f} tok/s, {share:.0%} of the product"
            yield f"3 prefill, {size} tokens", found, wanted, passed


def speed_eager(checks):
    lines = engine(checks, "--enforce-eager", "true", "--decode", "1,64", "--prefill", "", "--steps", "16")
    for (what, size), line in lines.items():
        if what == "decode":
            replayed = checks.speed["decode", size]["step_us"]
            found = f"{line['step_us']:.0f} us, {line['step_us'] / replayed:.2f} times as long as replayed"
            yield f"3 decode, batch {size}, --enforce-eager", found, ">= 0.98", line["step_us"] >= 0.98 * replayed


def speed_tp2(checks):
    # Two processes take turns on the card, so the collectives are dearer than between two cards.
    lines = engine(checks, "--tp", "2", "--decode", "1,64", "--prefill", "2048", "--steps", "16")
    for (what, size), line in lines.items():
        if what != "load":
            share = line["collective_us"] / line["step_us"]
            found = f"{line['step_us']:.0f} us, {share:.0%} in collectives"
            yield f"3 TP 2 on the card, {what} {size}", found, "measured", line["collective_us"] > 0


def peer(checks):
    found = json.loads(checks.python("ceilings", "--model", checks.model).splitlines()[-1])
    for batch, theirs in found["decode_us"].items():
        ours = checks.speed["decode", int(batch)]["step_us"]
        what = f"4 decode, batch {batch}: transformers {found['version']}"
        yield what, f"{theirs:.0f} us a step, ours is {theirs / ours:.2f} times as fast", "> 1", theirs > ours
    for tokens, theirs in found["prefill_us"].items():
        ours = checks.speed["prefill", int(tokens)]["step_us"]
        what = f"4 prefill, {tokens} tokens: transformers"
        yield what, f"{theirs:.0f} us, ours is {theirs / ours:.2f} times as fast", "> 1", theirs > ours


def drop_caches(folder):
    """Takes a model's files out of the file cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def starts(checks):
    arguments = ["--gpus", "0", "--model", str(checks.model), "--max-model-len", "8192"]
    for kind in ["cold", "warm"]:
        if kind == "cold":
            drop_caches(checks.model)
        ready, first, phases = server.start(checks.programs, arguments, checks.left())
        found = f"ready {ready:.2f} s, first token {first:.2f} s ({phases})"
        if kind == "cold":
            yield "5 start, file cache cold", found, "measured", True
        else:
            limit = TARGETS["warm start"]
            yield "5 start, file cache warm", found, f"<= {limit:.0f} s", ready <= limit


def killed(checks):
    _, output = checks.tests("processes", "a_killed_rank", CLUSTER_TEST_GPU="0")
    after = re.findall(r"rank \d was out of its collective (\S+) after the abort", output)
    found = f"out after {', '.join(after)}; replaced, text went on"
    yield "6 kill -9 of a rank in an all-reduce", found, "<= 2 s", len(after) == 3


# Those of a group run side by side: what is timed, and ranks that take turns on the card, run alone.
GROUPS = [
    [device], [sanitizer, kernels, fixtures, checkpoint], [nccl_fixtures], [nccl_replays], [text], [killed],
    [card], [speed], [starts], [peer], [speed_tp2], [speed_eager],
]
CHECKS = [check for group in GROUPS for check in group]


def rows_of(check, checks):
    """A check's rows, and how long it took; every failure is a row."""
    rows, since = [], time.monotonic()
    try:
        rows.extend(check(checks))
    except Exception as error:  # the next check runs all the same
        rows.append((check.__name__, brief(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}", 400), "to run", False))
    return rows, time.monotonic() - since


def main():
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=", ".join(names))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cluster-gpu-check")
    parser.add_argument("--seconds", type=float, default=470)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    unknown = set(args.only) - set(names)
    if unknown:
        parser.error(f"{', '.join(unknown)} is not among {', '.join(names)}")

    begun = time.monotonic()
    checks = Checks(args)
    checks.unpack()
    rows = []
    for group in GROUPS:
        wanted = [check for check in group if check.__name__ in args.only]
        with ThreadPoolExecutor(len(group)) as pool:
            results = pool.map(lambda check: rows_of(check, checks), wanted)
            for check, (found, seconds) in zip(wanted, results):
                rows.extend(found)
                for row in found:
                    print("PASS" if row[3] else "FAIL", *row[:3], sep="  ")
                print(f"      {check.__name__}: {seconds:.0f} s")

    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    revision = (ROOT / "revision").read_text().strip()
    print(f"\nrevision {revision}, {time.monotonic() - begun:.0f} s")
    print("| " + " | ".join(f"{title:{width}}" for title, width in zip(["check", "found", "wanted"], widths)) + " |      |")
    print("|-" + "-|-".join("-" * width for width in widths) + "-|------|")
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row[:3], widths)]
        print("| " + " | ".join(cells) + f" | {'PASS' if row[3] else 'FAIL'} |")
    return 0 if rows and all(row[3] for row in rows) else 1


sys.exit(main())
