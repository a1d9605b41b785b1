"""Hosts of a cluster, as network namespaces of this machine."""

import contextlib
import os
import subprocess
import threading

from conftest import BINARY, wait_until


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two hosts `a` and `b` with a link between them; this machine reaches `a` alone."""

    A, B = "10.213.2.1", "10.213.2.2"
    # Where this machine reaches `a`.
    FRONT = "10.213.1.2"

    def __init__(self):
        self.names = {host: f"shoal-{os.getpid()}-{host}" for host in "ab"}
        self.running = []
        self.front = f"sh{os.getpid()}"
        a, b = self.names.values()
        try:
            for name in (a, b):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            self.veth(None, self.front, "10.213.1.1", a, "front", self.FRONT)
            self.veth(a, "cable", self.A, b, "cable", self.B)
        except BaseException:
            self.stop()
            raise

    def veth(self, here, name, address, there, other, peer):
        """A cable between two hosts."""
        inside = ["-n", here] if here else []
        ip(*inside, "link", "add", name, "type", "veth", "peer", "name", other, "netns", there)
        for host, end, own in ((here, name, address), (there, other, peer)):
            inside = ["-n", host] if host else []
            ip(*inside, "address", "add", f"{own}/24", "dev", end)
            ip(*inside, "link", "set", "dev", end, "up")

    def run(self, host, *arguments):
        """A `shoal` on a host."""
        process = Process(["ip", "netns", "exec", self.names[host], BINARY, *map(str, arguments)])
        self.running.append(process)
        return process

    def cut(self):
        """Takes the link between the hosts away."""
        ip("-n", self.names["b"], "link", "set", "dev", "cable", "down")

    def mend(self):
        ip("-n", self.names["b"], "link", "set", "dev", "cable", "up")

    def stop(self):
        for process in self.running:
            process.kill()
        for name in self.names.values():
            # What could not be made cannot be taken away.
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.front], capture_output=True)


class Process:
    """A process, and what it says."""

    def __init__(self, command):
        self.lines = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def pid(self):
        return self.process.pid

    def says(self, text):
        """How many of its lines have the text."""
        return sum(text in line for line in self.lines)

    def wait_for(self, text, seconds=30):
        wait_until(lambda: self.says(text) > 0, seconds, f"{text!r}")

    @contextlib.contextmanager
    def saying(self, text, seconds=30):
        """Waits at the end until it has said the text once more than before."""
        before = self.says(text)
        yield
        wait_until(lambda: self.says(text) > before, seconds, f"{text!r} after {''.join(self.lines[-20:])}")

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self, seconds=30):
        """Waits for its end; its exit status."""
        status = self.process.wait(seconds)
        self.reader.join(5)
        return status
