#!/usr/bin/env python3
"""Kills and stops workers at random under streaming load, and compares every answer with the
one that an undisturbed cluster gave.

  tests/chaos.py --minutes 10

Exits with 1 if a request failed or an answer differs in a single character or token.
"""

import argparse
import asyncio
import json
import os
import pathlib
import random
import signal
import sys
import time

import aiohttp

sys.path.insert(0, str(pathlib.Path(__file__).parent / "e2e"))
from conftest import Cluster, wait_until  # noqa: E402

TOPICS = ["the sea", "a refund", "winter", "rust", "a lost parcel", "tea", "the moon", "chess"]


def requests(tokens):
    """Greedy and sampled requests; a seed makes the sampled ones repeatable."""
    for i, topic in enumerate(TOPICS):
        for sampled in (False, True):
            yield {
                "model": "",
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant of a shop. " * (1 + i % 4)},
                    {"role": "user", "content": f"Write a long text about {topic}."},
                ],
                "temperature": 0.9 if sampled else 0,
                "top_p": 0.95 if sampled else 1,
                "seed": 1000 + i,
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }


async def ask(session, url, body):
    """The text, its tokens, and the longest time that nothing came."""
    text, tokens, longest, last = "", None, 0.0, time.monotonic()
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {await answer.text()}")
        async for line in answer.content:
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return text, tokens, longest


class Load:
    """Clients that ask over and over, and check what they get."""

    def __init__(self, cluster, streams, tokens=96):
        self.cluster, self.streams = cluster, streams
        self.bodies = list(requests(tokens))
        self.expected, self.pauses, self.errors = [], [], []
        self.stopping = False

    async def __aenter__(self):
        timeout = aiohttp.ClientTimeout(total=120)
        self.session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        undisturbed = [ask(self.session, self.cluster.url, body) for body in self.bodies]
        self.expected = [(text, tokens) for text, tokens, _ in await asyncio.gather(*undisturbed)]
        self.tasks = [asyncio.create_task(self._client(i)) for i in range(self.streams)]
        return self

    async def _client(self, i):
        while not self.stopping:
            which = i % len(self.bodies)
            try:
                text, tokens, longest = await ask(self.session, self.cluster.url, self.bodies[which])
                self.pauses.append(longest)
                if (text, tokens) != self.expected[which]:
                    self.errors.append(f"request {which} differs: {text!r} of {tokens} tokens")
            except Exception as error:  # whatever a client may see
                self.errors.append(f"request {which}: {type(error).__name__} {error}")
            i += 7

    async def __aexit__(self, *_):
        self.stopping = True
        await asyncio.gather(*self.tasks)
        await self.session.close()


def ready(cluster):
    return cluster.metric("shoal_worker_ready")


async def all_ready(cluster, replicas):
    back = lambda: ready(cluster) >= replicas
    await asyncio.to_thread(wait_until, back, 60, "the workers' return")


def signal_to(pid, which):
    try:
        os.kill(pid, which)
    except ProcessLookupError:
        pass  # it died meanwhile


async def disturb(cluster, rng, seconds, every, faults):
    """Does something to a random worker, again and again."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(every, left))
        workers = await asyncio.to_thread(lambda: cluster.children().get("worker", []))
        if not workers:
            continue
        pid = rng.choice(workers)
        fault = rng.choice(["kill", "stop"])
        faults[fault] = faults.get(fault, 0) + 1
        if fault == "kill":
            signal_to(pid, signal.SIGKILL)
        else:
            signal_to(pid, signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(0.6, 2.5))
            signal_to(pid, signal.SIGCONT)


async def restart(cluster, replicas):
    """Ends every worker in order, one after the other."""
    await all_ready(cluster, replicas)
    for pid in cluster.children()["worker"]:
        os.kill(pid, signal.SIGTERM)
        ended = lambda: pid not in cluster.children().get("worker", [])
        await asyncio.to_thread(wait_until, ended, 60, f"the end of process {pid}")
        await all_ready(cluster, replicas)


def report(load, faults):
    pauses = sorted(load.pauses)
    at = lambda p: round(pauses[min(len(pauses) - 1, int(len(pauses) * p))], 3) if pauses else None
    return {
        "answers": len(pauses),
        "errors": len(load.errors),
        "faults": faults,
        "resubmissions": load.cluster.metric("shoal_resubmissions_total"),
        "suspicions": load.cluster.metric("shoal_worker_suspicions_total"),
        "longest_pause_p50_s": at(0.5),
        "longest_pause_p99_s": at(0.99),
        "longest_pause_max_s": at(1.0),
    }


def start(replicas):
    return Cluster("--replicas", str(replicas), env={"SHOAL_WORKER_KV_SIZE": "128MiB", **os.environ})


async def run(replicas, streams, seconds, every=3.0, seed=1):
    """A cluster under chaos; its report and the errors that clients saw."""
    cluster = start(replicas)
    faults = {}
    try:
        await all_ready(cluster, replicas)
        async with Load(cluster, streams) as load:
            await disturb(cluster, random.Random(seed), seconds, every, faults)
        return report(load, faults), load.errors
    finally:
        cluster.stop()


async def rolling(replicas, streams):
    """A restart of every worker under load; its report and the errors that clients saw."""
    cluster = start(replicas)
    try:
        await all_ready(cluster, replicas)
        async with Load(cluster, streams) as load:
            await restart(cluster, replicas)
        return report(load, {"restart": replicas}), load.errors
    finally:
        cluster.stop()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=1)
    p.add_argument("--replicas", type=int, default=4)
    p.add_argument("--streams", type=int, default=32)
    p.add_argument("--every", type=float, default=3, help="seconds between faults")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    result, errors = asyncio.run(run(a.replicas, a.streams, a.minutes * 60, a.every, a.seed))
    print(json.dumps(result, indent=1))
    for error in errors[:20]:
        print(error, file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
