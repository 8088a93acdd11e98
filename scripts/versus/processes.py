"""Child processes with a deadline, bound to cores, ended with all that they started.

Invariant: a process leads a group of its own, and only such groups are signalled.
"""

import json
import os
import signal
import subprocess
import tempfile
import time

STOP_LIMIT = 30


class Failed(Exception):
    """Why something could not be measured, in a sentence for a table."""


def start(command, env, cores, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
    threads = {"OMP_NUM_THREADS": str(len(cores))}
    try:
        return subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | threads | env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    except OSError as error:
        raise Failed(f"does not start: {error}") from error


def signal_group(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def stop(process):
    signal_group(process, signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        pass
    # What it started may have outlived it.
    signal_group(process, signal.SIGKILL)
    process.wait()


def lines_of(command, env, cores, deadline):
    """The JSON objects that a command prints, one a line; `Failed` if it ends badly or too late."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = start(command, env, cores, out, errors)
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            stop(process)
        out.seek(0)
        for line in out:
            if line.startswith("{"):
                yield json.loads(line)
        if late:
            raise Failed("did not end within its time limit")
        if process.returncode:
            raise Failed(reason(errors, process.returncode))


def reason(errors, code):
    """The last line that tells something."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    errors = [line for line in lines if "Error" in line or "error" in line]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return last[:160]


def memory_of(pid):
    """Bytes of memory of a process and all below it, shared pages divided among those who share them."""
    total = 0
    for process in descendants(pid):
        try:
            with open(f"/proc/{process}/smaps_rollup") as file:
                pss = [line for line in file if line.startswith("Pss:")]
            total += sum(int(line.split()[1]) << 10 for line in pss)
        except OSError:
            continue
    return total


def descendants(pid):
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    # The name in brackets may hold anything.
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            parents.setdefault(parent, []).append(int(name))
    found, left = [], [pid]
    while left:
        process = left.pop()
        found.append(process)
        left += parents.get(process, [])
    return found
