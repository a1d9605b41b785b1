"""Workers whose model is shared among processes."""

import os
import pathlib
import signal
import threading

from conftest import Cluster, wait_until
from test_faults import CHAT, alive


def ranks(cluster):
    """The other ranks of every worker, by worker."""
    workers = cluster.children()["worker"]
    found = {worker: [] for worker in workers}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            argv = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent in found and b"rank" in argv:
            found[parent].append(int(entry.name))
    return found


def ask(cluster, number, **options):
    messages = [{"role": "user", "content": f"Count from {number} to a thousand."}]
    return cluster.client().chat.completions.create(
        model="", messages=messages, temperature=0, max_tokens=200, extra_body={"ignore_eos": True}, **options
    )


def streams_over(cluster, fault, streams=6):
    """Streams that `fault` comes in between, and what they are undisturbed."""
    undisturbed = [ask(cluster, n).choices[0].message.content for n in range(streams)]
    texts, started = [""] * streams, threading.Barrier(streams + 1)

    def read(n):
        for i, chunk in enumerate(ask(cluster, n, stream=True)):
            texts[n] += chunk.choices[0].delta.content or ""
            if i == 20:
                started.wait(60)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(streams)]
    for thread in threads:
        thread.start()
    started.wait(60)
    fault()
    for thread in threads:
        thread.join(120)
    assert texts == undisturbed


def test_streams_go_on_when_a_rank_is_killed_and_its_group_meets_again():
    cluster = Cluster("--replicas", "2", "--tensor-parallel", "2")
    try:
        before = ranks(cluster)
        assert [len(others) for others in before.values()] == [1, 1]
        streams_over(cluster, lambda: os.kill(next(iter(before.values()))[0], signal.SIGKILL))

        def met_again():
            now = ranks(cluster)
            return now.keys() == before.keys() and all(len(others) == 1 for others in now.values())

        wait_until(met_again, 10, "a new rank")
        assert ranks(cluster) != before
        # Both groups serve again.
        streams_over(cluster, lambda: None)
        pids = sum(ranks(cluster).values(), sum(cluster.children().values(), []))
        cluster.process.kill()
        cluster.process.wait(20)
        wait_until(lambda: not any(map(alive, pids)), 1, "the end of every process")
    finally:
        cluster.stop()


def test_streams_go_on_when_a_rank_hangs():
    cluster = Cluster("--tensor-parallel", "2", env={"SHOAL_WORKER_RANK_TIMEOUT": "500ms"})
    try:
        [[rank]] = ranks(cluster).values()
        streams_over(cluster, lambda: os.kill(rank, signal.SIGSTOP), streams=2)
        wait_until(lambda: not alive(rank), 10, "the end of what hung")
        answer = cluster.client().chat.completions.create(model="", max_tokens=4, **CHAT)
        assert answer.usage.completion_tokens == 4
    finally:
        cluster.stop()
