"""Roles as processes of their own, which meet in a real etcd."""

import json
import os
import re
import signal
import subprocess
import threading
import urllib.request

import openai
import pytest
from conftest import BINARY, wait_until
from etcd import Etcd

# Seconds that a record outlives its process.
TTL = 2

CHAT = {"messages": [{"role": "user", "content": "Count from one to a thousand."}], "temperature": 0}


def metric(address, name):
    """The sum of a metric over the labels that are not given; 0 where there is none."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        rows = [row for row in answer.read().decode().splitlines() if row.startswith(f"shoal_{name}")]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows)


class Role:
    """One `shoal router` or `shoal worker`, and its log."""

    def __init__(self, role, etcd, *flags, env=None):
        self.process = subprocess.Popen(
            [BINARY, role, "--membership", etcd.source, "--membership-ttl", f"{TTL}s", "--listen", "127.0.0.1:0", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SHOAL_WORKER_THREADS": "1", **(env or {})},
        )
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """An orderly end."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, "".join(self.lines)


class Router(Role):
    def __init__(self, etcd, *flags, **options):
        super().__init__("router", etcd, *flags, **options)
        found = []

        def listens():
            found.extend(re.findall(r"router listens.*?(127\.0\.0\.1:\d+)", "".join(self.lines)))
            return found

        wait_until(listens, 20, "the router's address")
        self.address = found[0]
        self.client = openai.OpenAI(base_url=f"http://{self.address}/v1", api_key="-", max_retries=0, timeout=60)

    def cli(self, *arguments):
        return subprocess.run(
            [BINARY, *arguments, "--url", f"http://{self.address}"], capture_output=True, text=True, timeout=60
        )

    def groups(self):
        """What `shoal status` says, by group."""
        shown = self.cli("status", "--json")
        assert shown.returncode == 0, shown.stderr
        return {group["name"]: group for group in json.loads(shown.stdout)["groups"]}

    def ready(self):
        return {name for name, group in self.groups().items() if group["connected"] and group["state"] == "ready"}

    def becomes_ready(self, *names):
        wait_until(lambda: self.ready() == set(names), 30, f"{names} ready")

    def ask(self, tokens=16, **options):
        return self.client.chat.completions.create(
            model="", max_tokens=tokens, extra_body={"ignore_eos": True}, **CHAT, **options
        )

    def stream(self, tokens):
        """The text of a stream, and a list that grows with it."""
        pieces = []

        def run():
            for chunk in self.ask(tokens, stream=True):
                pieces.append(chunk.choices[0].delta.content or "")

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: len(pieces) > 5, 30, "the stream's start")
        return thread, pieces


@pytest.fixture(scope="module")
def etcd():
    started = Etcd()
    yield started
    started.stop()


@pytest.fixture
def roles(etcd):
    """Starts roles that end with the test."""
    started = []

    def start(role, *flags, **options):
        new = Router(etcd, *flags, **options) if role == "router" else Role("worker", etcd, *flags, **options)
        started.append(new)
        return new

    yield start
    for role in started:
        if role.process.poll() is None:
            role.kill()
    # What was killed leaves records behind, for as long as they live.
    wait_until(lambda: not etcd.records() and not etcd.records("routers"), 20, "the records' end")
