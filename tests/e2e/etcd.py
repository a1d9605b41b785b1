"""A real etcd on free ports, which tests may kill, restart and compact."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile

from conftest import wait_until

ROOT_KEY = "/shoal/v1/test/"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


class Etcd:
    def __init__(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="shoal-etcd-"))
        self.port, self.peer = free_port(), free_port()
        self.process = None
        self.run()

    @property
    def source(self):
        """What `--membership` takes."""
        return f"etcd://127.0.0.1:{self.port}/test"

    def run(self):
        """Starts it, on the data it had."""
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.peer}"
        self.process = subprocess.Popen(
            ["etcd", "--name", "default", "--data-dir", self.directory / "data",
             "--listen-client-urls", client, "--advertise-client-urls", client,
             "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
             "--initial-cluster", f"default={peer}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: self.ctl("endpoint", "health", check=False).returncode == 0, 30, "etcd's health")

    def kill(self):
        """Takes it away as a crash does. Its data stays."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self):
        self.kill()
        self.run()

    def ctl(self, *arguments, check=True):
        return subprocess.run(
            ["etcdctl", "--endpoints", f"127.0.0.1:{self.port}", *arguments],
            env={**os.environ, "ETCDCTL_API": "3"},
            capture_output=True,
            text=True,
            check=check,
            timeout=30,
        )

    def compact(self):
        """Drops the history up to now."""
        status = json.loads(self.ctl("endpoint", "status", "-w", "json").stdout)
        self.ctl("compact", str(status[0]["Status"]["header"]["revision"]))

    def records(self, kind="instances"):
        """The records of the cluster, by name."""
        out = self.ctl("get", "--prefix", f"{ROOT_KEY}{kind}/", "--print-value-only").stdout
        return {r["name"]: r for r in map(json.loads, out.splitlines())}

    def stop(self):
        self.kill()
        shutil.rmtree(self.directory)
