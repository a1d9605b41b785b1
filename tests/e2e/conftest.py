"""A cluster of real processes for the tests: `shoal up` on a free port."""

import os
import pathlib
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("SHOAL_BINARY", ROOT / "target/release/shoal"))


class Cluster:
    """One `shoal up`, its output and its address."""

    def __init__(self, *flags, env=None):
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [BINARY, "up", "--listen", "127.0.0.1:0", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.lines = []
        self.url = None
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(60) or self.url is None:
            self.process.kill()
            raise RuntimeError("the cluster did not come up:\n" + "".join(self.lines))
        self.seconds_to_ready = time.monotonic() - self.started

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"OpenAI API\s+(https?://\S+)/v1", line)
            if found:
                self.url = found.group(1)
                self._ready.set()
        self._ready.set()

    def children(self):
        """The processes below the supervisor, by role."""
        found = {}
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                stat = (entry / "stat").read_text()
                if int(stat.rsplit(")", 1)[1].split()[1]) == self.process.pid:
                    argv = (entry / "cmdline").read_bytes().split(b"\0")
                    role = next(r for r in ("router", "worker") if r.encode() in argv)
                    found.setdefault(role, []).append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, StopIteration):
                continue
        return found

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=60, **options)

    def get(self, path):
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name):
        """The sum of a metric over its labels."""
        _, text = self.get("/metrics")
        rows = [l for l in text.splitlines() if re.match(rf"{name}(\{{|\s)", l)]
        assert rows, f"no metric {name}"
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


def wait_until(condition, seconds=10, what="the condition"):
    """Polls until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def cluster():
    started = Cluster()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def client(cluster):
    return cluster.client()
