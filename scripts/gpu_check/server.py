"""Starts `cluster up`, waits until it serves, and asks it for text.

Invariant: leaving the `with` block ends the process and everything it started, whatever happened inside.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

PROMPTS = [
    "Once upon a time there was a little",
    "The cat",
    "Anna went to the market and",
    "In the morning the sun",
    "Tom said to his mother:",
]


class Server:
    """One cluster on a free port."""

    def __init__(self, programs, arguments, left):
        self.command = [str(programs / "cluster"), "up", "--port", "0", *arguments]
        self.limit = min(120, left)

    def __enter__(self):
        self.begun = time.monotonic()
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.address, self.model = self.wait()
        except BaseException:
            self.end()
            raise
        self.ready_s = time.monotonic() - self.begun
        return self

    def __exit__(self, *_):
        self.end()

    def said(self):
        # The child shares the file's position: reading must not move it.
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    def wait(self):
        """The address and the model's name, once the report is there: it comes when the cluster is ready."""
        while time.monotonic() - self.begun < self.limit:
            found = re.search(r"^(\S+) is served at (http://\S+)/v1", self.said(), re.M)
            if found and "ready after" in self.said():
                return found[2], found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.002)
        raise RuntimeError(f"cluster up is not ready: {self.said()[-1500:]}")

    def phases(self):
        """How long it took by its own account: `0.61 s (launch 20 ms, ...)`."""
        found = re.search(r"ready after (.*)", self.said())
        return found[1] if found else ""

    def complete(self, prompt, tokens):
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        request = urllib.request.Request(
            self.address + "/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["text"]

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                pass
        # Its own group, and nobody else's: shards end when it does, so only it may be left.
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(15)
        self.log.close()


def texts(programs, arguments, left, tokens=48):
    """The greedy continuations of some prompts; to be had in the `left` seconds."""
    with Server(programs, arguments, left) as server:
        return [server.complete(prompt, tokens) for prompt in PROMPTS]


def start(programs, arguments, left):
    """Seconds to ready and to the first token, and where they went."""
    with Server(programs, arguments, left) as server:
        server.complete("Hello", 1)
        first = time.monotonic() - server.begun
        return server.ready_s, first, server.phases()
