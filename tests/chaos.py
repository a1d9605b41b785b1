#!/usr/bin/env python3
"""Kills and stops workers and ranks, cuts links and takes etcd away at random under streaming load, and
compares every answer with the one that an undisturbed cluster gave.

  tests/chaos.py --minutes 10                  # four workers of one rank
  tests/chaos.py --minutes 10 --groups 2,2     # two groups of two ranks

Exits with 1 if a request failed or an answer differs in a single character or token (with groups of several
sizes, whose tokens differ: in its number of tokens).
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
from world import World  # noqa: E402

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

    def __init__(self, cluster, streams, tokens=96, same=True):
        self.cluster, self.streams, self.same = cluster, streams, same
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
                if (text, tokens) != self.expected[which] and (self.same or tokens != self.expected[which][1]):
                    self.errors.append(f"request {which} differs: {text!r} of {tokens} tokens")
            except Exception as error:  # whatever a client may see
                self.errors.append(f"request {which}: {type(error).__name__} {error}")
            i += 7

    async def __aexit__(self, *_):
        self.stopping = True
        await asyncio.gather(*self.tasks)
        await self.session.close()


def signal_to(pid, which):
    try:
        os.kill(pid, which)
    except ProcessLookupError:
        pass  # it died meanwhile


async def disturb(world, rng, seconds, every, faults):
    """Does something to a random process or link, again and again, and to etcd meanwhile."""
    end = time.monotonic() + seconds
    etcd = asyncio.create_task(disturb_etcd(world.etcd, seconds, faults))
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(every, left))
        fault = rng.choice(["kill", "stop", "cut"])
        faults[fault] = faults.get(fault, 0) + 1
        pause = rng.uniform(0.6, 2.5)
        if fault == "cut":
            await rng.choice(world.workers).link.cut(pause)
        elif processes := await asyncio.to_thread(world.processes):
            pid = rng.choice(processes)
            signal_to(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            if fault == "stop":
                await asyncio.sleep(pause)
                signal_to(pid, signal.SIGCONT)
    await etcd


async def disturb_etcd(etcd, seconds, faults):
    """Restarts it, compacts it, and takes it away: for 30 s of ten minutes, or a sixth of less."""
    gone = min(30, seconds / 6)
    for fault in (etcd.restart, etcd.compact, etcd.kill):
        await asyncio.sleep((seconds - gone) / 4)
        faults[f"etcd {fault.__name__}"] = 1
        await asyncio.to_thread(fault)
    await asyncio.sleep(gone)
    await asyncio.to_thread(etcd.run)


async def all_ready(cluster, replicas):
    back = lambda: cluster.metric("shoal_worker_ready") >= replicas
    await asyncio.to_thread(wait_until, back, 60, "the workers' return")


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


async def run(groups, streams, seconds, every=3.0, seed=1):
    """Workers of `groups` ranks each under chaos; a report and the errors that clients saw. Only groups
    of one size give the same tokens; of several, every answer must be whole."""
    faults = {}
    async with World(groups) as world:
        await all_ready(world, len(groups))
        async with Load(world, streams, same=len(set(groups)) == 1) as load:
            await disturb(world, random.Random(seed), seconds, every, faults)
        return report(load, faults), load.errors


async def rolling(replicas, streams):
    """A restart of every worker under load; its report and the errors that clients saw."""
    cluster = Cluster("--replicas", str(replicas), env={"SHOAL_WORKER_KV_SIZE": "128MiB", **os.environ})
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
    p.add_argument("--groups", default="1,1,1,1", help="ranks of each worker [default: %(default)s]")
    p.add_argument("--streams", type=int, default=32)
    p.add_argument("--every", type=float, default=3, help="seconds between faults")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    groups = [int(ranks) for ranks in a.groups.split(",")]
    result, errors = asyncio.run(run(groups, a.streams, a.minutes * 60, a.every, a.seed))
    print(json.dumps(result, indent=1))
    for error in errors[:20]:
        print(error, file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
