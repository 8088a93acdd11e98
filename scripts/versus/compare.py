"""Runs the cluster and its peers side by side, alternating, and prints the table. `scripts/versus.sh` calls it.

Not its job: installing anything; a peer that is not there is a row that says so. Needs Python's own library only.

Invariant: every process is bound to the same cores, has a time limit, is started by this script and ended by it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import table
from processes import Failed, lines_of, memory_of, start, stop

HERE = Path(__file__).resolve().parent
ENGINE_LIMIT, SWEEP_LIMIT, START_LIMIT = 600, 1200, 300
PORT = 18977
PARTS = ("engines", "http")


def names(text):
    return [name for name in text.split(",") if name]


def parts(text):
    found = names(text)
    if not found or set(found) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{text} is not some of {','.join(PARTS)}")
    return found


def absolute(text):
    # Not resolved: where links lead to is nobody's name, and a program in the working directory is still found.
    return Path(text).absolute()


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default=[], type=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=list(PARTS), type=parts)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=absolute, required=True)
    parser.add_argument("--folder", type=absolute, required=True, help="venvs and GGUF files")
    parser.add_argument("--cluster", type=absolute, required=True)
    parser.add_argument("--engine", type=absolute, required=True)
    parser.add_argument("--kernels", type=absolute, required=True)
    parser.add_argument("--skip", action="append", default=[], metavar="PEER=WHY")
    return parser.parse_args()


class Versus:
    """The runs, and what came of them so far."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.records = []
        self.failures = {}
        self.cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.results = arguments.folder / f"results-{stamp}.jsonl"
        self.decode = [1, 8] if arguments.quick else [1, 8, 16, 32]
        self.loads = [1, 8] if arguments.quick else [1, 2, 4, 8, 16, 32, 64]
        self.steps = 8 if arguments.quick else 32
        skipped = dict(skip.split("=", 1) for skip in arguments.skip)
        for peer in arguments.peers:
            if peer in skipped:
                self.failures[(table.PEERS[peer], "")] = skipped[peer]
        self.peers = [peer for peer in arguments.peers if peer not in skipped]

    def record(self, number, server, weights, line):
        line = {"round": number, "server": server, "weights": weights} | line
        self.records.append(line)
        with self.results.open("a") as out:
            out.write(json.dumps(line) + "\n")
        shown = {key: value for key, value in line.items() if key != "points"}
        print(json.dumps(shown), file=sys.stderr, flush=True)

    def run(self, number, server, weights, what, limit):
        """Runs `what`, a generator of lines, unless it failed before."""
        if (server, weights) in self.failures:
            return
        try:
            for line in what(time.monotonic() + limit):
                self.record(number, server, weights, line)
        except Failed as failed:
            # What cannot run does not become able to in the next round.
            self.failures[(server, weights)] = str(failed)
            print(f"{server} {weights}: {failed}", file=sys.stderr, flush=True)

    # What is measured without HTTP.

    def shape(self):
        return [
            "--decode", ",".join(map(str, self.decode)), "--prefill", "512",
            "--context", "64", "--steps", str(self.steps),
        ]  # fmt: skip

    def ours(self, ranks, quantization):
        command = [self.arguments.engine, "--model", self.arguments.model, "--tp", str(ranks)]
        command += self.shape()
        if quantization:
            command += ["--quantization", quantization]
        return lambda deadline: lines_of(command, {}, self.cores, deadline)

    def peer(self, name, weights, model, env=None):
        python = self.arguments.folder / name / "bin" / "python"
        script = HERE / f"peer_{name}.py"
        command = [python, script, "--model", model, "--weights", weights]
        command += ["--threads", str(self.arguments.threads), *self.shape()]

        def run(deadline):
            if not python.exists():
                raise Failed("not installed")
            started = ["--started", str(time.monotonic())]
            yield from lines_of(command + started, env or {}, self.cores, deadline)

        return run

    def engines(self):
        """Name, weights and run of each engine, ours first."""
        for ranks in (1, 2):
            for weights in ("bf16", "int8", "int4", "fp8"):
                quantization = weights if weights != "bf16" else None
                if ranks == 1 or not quantization:
                    yield f"cluster, TP {ranks}", weights, self.ours(ranks, quantization)
        model, folder = self.arguments.model, self.arguments.folder
        gguf = lambda kind: folder / f"{model.name}.{kind}.gguf"  # noqa: E731
        # Without instructions for bf16, torch computes it element by element: nobody would serve that way.
        kind = "bf16" if table.has_bf16() else "f32"
        peers = {
            "vllm": [(kind, model, self.vllm_variables())],
            "openvino": [("f16", gguf("f16")), ("q8_0", gguf("q8_0")), ("q4_0", gguf("q4_0"))],
            "transformers": [(kind, model)],
            "llama": [(kind, gguf(kind)) for kind in ("bf16", "q8_0", "q4_0")],
        }
        for name in self.peers:
            for weights, *rest in peers[name]:
                yield table.PEERS[name], weights, self.peer(name, weights, *rest)

    def vllm_variables(self):
        # The shared library of the OpenMP that it is built for has to be there before torch's own.
        openmp = list((self.arguments.folder / "vllm").glob("lib*/**/libiomp5.so"))
        return {
            "LD_PRELOAD": ":".join(str(path) for path in openmp[:1]),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores)),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(self.arguments.folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.arguments.folder / "cache" / "inductor"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    # What is measured through HTTP.

    def startup(self, ranks):
        def run(deadline):
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [self.arguments.cluster, "bench", "startup", "--num-iters-cold", "0"]
                command += ["--num-iters-warmup", "0", "--num-iters-warm", "1"]
                command += ["--output-json", file.name, "--", *self.up(ranks)]
                list(lines_of(command, {}, self.cores, deadline))
                found = json.load(file)
            yield {"what": "start", "seconds": found["median_warm_first_token_s"]}

        return run

    def up(self, ranks):
        cpus = ",".join(map(str, self.cores))
        return ["--model", self.arguments.model, "--cpus", cpus, "--tensor-parallel-size", str(ranks)]

    def sweep(self, server, deadline):
        """Loads a server that is named by flags, and says what came of it."""
        cluster = self.arguments.cluster
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [cluster, "bench", "sweep", "--ignore-eos", "--json", file.name]
            command += ["--random-input-len", "64", "--random-output-len", "64"]
            command += ["--max-concurrency", ",".join(map(str, self.loads))]
            if self.arguments.quick:
                command += ["--num-prompts", "8", "--random-output-len", "16"]
                # The last of two equal flags would be an error.
                command = without_first(command, "--random-output-len")
            list(lines_of(command + server, {}, self.cores, deadline))
            yield {"what": "sweep", "points": json.load(file)["points"]}

    def alone(self, server, deadline):
        """A prompt of 512 tokens with nobody else there."""
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [self.arguments.cluster, "bench", "latency", "--batch-size", "1"]
            command += ["--input-len", "512", "--output-len", "1", "--num-iters", "3"]
            command += ["--num-iters-warmup", "1", "--output-json", file.name]
            list(lines_of(command + server, {}, self.cores, deadline))
            yield {"what": "ttft_512", "seconds": json.load(file)["percentiles"]["50"]}

    def our_server(self, ranks):
        def run(deadline):
            flags = ["--host", "127.0.0.1", "--port", str(PORT)]
            command = [self.arguments.cluster, "up", *flags, *self.up(ranks)]
            yield from self.served(command, {}, "/ready", deadline)

        return run

    def vllm_server(self, deadline):
        python = self.arguments.folder / "vllm" / "bin" / "python"
        if not python.exists():
            raise Failed("not installed")
        command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--dtype", "bfloat16" if table.has_bf16() else "float32"]
        command += ["--model", self.arguments.model, "--max-model-len", "2048"]
        command += ["--host", "127.0.0.1", "--port", str(PORT), "--no-enable-prefix-caching"]
        command += ["--max-num-seqs", "64"]
        yield from self.served(command, self.vllm_variables(), "/health", deadline, say_start=True)

    def served(self, command, env, path, deadline, say_start=False):
        begun = time.monotonic()
        process = start(command, env, self.cores)
        url = f"http://127.0.0.1:{PORT}"
        try:
            wait_for(process, url + path, min(deadline, begun + START_LIMIT))
            first_token(url)
            if say_start:
                yield {"what": "start", "seconds": time.monotonic() - begun}
            yield from self.alone(["--base-url", url], deadline)
            yield from self.sweep(["--base-url", url], deadline)
            yield {"what": "memory", "bytes": memory_of(process.pid)}
        finally:
            stop(process)

    # Everything.

    def machine(self):
        """Bounds of this machine and the instruction set that was chosen, measured by the kernels' own bench."""

        def run(deadline):
            command = [self.arguments.kernels, "--threads", str(self.arguments.threads), "--bounds"]
            yield from lines_of(command, {}, self.cores, deadline)

        return run

    def round(self, number):
        self.run(number, "machine", "", self.machine(), ENGINE_LIMIT)
        if "engines" in self.arguments.parts:
            for server, weights, what in self.engines():
                self.run(number, server, weights, what, ENGINE_LIMIT)
        if "http" in self.arguments.parts:
            self.round_of_servers(number)

    def round_of_servers(self, number):
        for ranks in (1, 2):
            server = f"cluster, TP {ranks}"
            self.run(number, server, "bf16", self.startup(ranks), START_LIMIT)
            self.run(number, f"{server}, HTTP", "bf16", self.our_server(ranks), SWEEP_LIMIT)
        if "vllm" in self.peers:
            server = f"{table.PEERS['vllm']}, HTTP"
            kind = "bf16" if table.has_bf16() else "f32"
            self.run(number, server, kind, self.vllm_server, SWEEP_LIMIT)


def without_first(command, flag):
    at = command.index(flag)
    return command[:at] + command[at + 2 :]


def wait_for(process, url, deadline):
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(f"the server ended with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.02)
    raise Failed("the server was not ready in time")


def first_token(url):
    with urllib.request.urlopen(url + "/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": [300] * 32, "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def main():
    options = arguments()
    versus = Versus(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    begun = time.monotonic()
    for number in range(1, options.rounds + 1):
        versus.round(number)
    minutes = (time.monotonic() - begun) / 60
    print(table.render(versus.records, versus.failures, options, minutes))
    print(f"Every measurement: {versus.results}", file=sys.stderr)


if __name__ == "__main__":
    if not shutil.which("lscpu"):
        sys.exit("versus needs lscpu (util-linux)")
    main()
