"""Workers behind links that can be cut, a router and an etcd, for tests that break them."""

import asyncio
import os
import pathlib
import signal
import subprocess

from conftest import BINARY
from etcd import Etcd, free_port
from roles import Router, metric


class Link:
    """A relay before a worker. A cut holds up what is under way, as a network does that drops packets
    which are sent again later."""

    def __init__(self):
        self.target, self.tasks = None, set()
        self.whole = asyncio.Event()
        self.whole.set()

    async def open(self):
        self.server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _relay(self, reader, writer):
        await self.whole.wait()
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _pump(self, source, sink):
        try:
            while data := await source.read(1 << 16):
                await self.whole.wait()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    async def cut(self, seconds):
        self.whole.clear()
        await asyncio.sleep(seconds)
        self.whole.set()

    def close(self):
        self.server.close()
        for task in self.tasks:
            task.cancel()


class Kept:
    """A worker that is started again whenever it ends, and the link to it."""

    def __init__(self, name, ranks):
        self.name, self.ranks, self.process = name, ranks, None
        self.link = Link()

    async def keep(self, membership):
        await self.link.open()
        command = [BINARY, "worker", "--membership", membership, "--membership-ttl", "2s", "--group", self.name,
                   "--advertise", f"127.0.0.1:{self.link.port}",
                   "--threads", "1", "--tensor-parallel", str(self.ranks), "--rank-timeout", "1s"]
        env = {**os.environ, "SHOAL_WORKER_KV_SIZE": "128MiB"}
        while True:
            # Another one each time: somebody else may have taken the last.
            self.link.target = free_port()
            self.process = await asyncio.create_subprocess_exec(
                *command, "--listen", f"127.0.0.1:{self.link.target}", env=env,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            await self.process.wait()
            await asyncio.sleep(0.1)

    def processes(self):
        """The worker and its other ranks."""
        if self.process is None:
            return []
        pid = self.process.pid
        tasks = pathlib.Path(f"/proc/{pid}/task")
        try:
            children = [c for t in tasks.iterdir() for c in (t / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [pid, *map(int, children)]


class World:
    """An etcd, a router, and a worker for each number of ranks."""

    def __init__(self, groups):
        self.workers = [Kept(f"group-{i}", ranks) for i, ranks in enumerate(groups)]

    async def __aenter__(self):
        self.etcd = await asyncio.to_thread(Etcd)
        self.router = await asyncio.to_thread(Router, self.etcd)
        self.url = f"http://{self.router.address}"
        self.keepers = [asyncio.create_task(worker.keep(self.etcd.source)) for worker in self.workers]
        return self

    def metric(self, name):
        return metric(self.router.address, name.removeprefix("shoal_"))

    def processes(self):
        return [pid for worker in self.workers for pid in worker.processes()]

    async def __aexit__(self, *_):
        for keeper, worker in zip(self.keepers, self.workers):
            keeper.cancel()
            worker.link.close()
            for pid in worker.processes():
                os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self.router.kill)
        await asyncio.to_thread(self.etcd.stop)
