"""Bad input, vanishing clients and dying processes."""

import asyncio
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import aiohttp
import openai
import pytest
from conftest import BINARY, ROOT, Cluster, wait_until

CHAT = {"messages": [{"role": "user", "content": "Count from one to a thousand."}], "temperature": 0}


def raw(cluster, head, body=b""):
    """Sends bytes as they are; returns the status line and the rest."""
    host, port = cluster.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as s:
        request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n"
        s.sendall(request.encode())
        try:
            s.sendall(body)
        except ConnectionError:
            pass  # refused before all of it was read
        data = b""
        while chunk := s.recv(65536):
            data += chunk
    return int(data.split(b" ", 2)[1]), data


def test_bodies_that_are_no_requests(cluster):
    for body, status in [
        (b"{", 400),
        (b'{"messages": 5}', 400),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        (b"[]", 400),
        (b"", 400),
    ]:
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        got, answer = raw(cluster, head, body)
        assert got == status, body
        assert b'"error"' in answer and b'"message"' in answer
    large = b'{"messages": [{"role": "user", "content": "' + b"x" * (10 << 20) + b'"}]}'
    got, _ = raw(cluster, f"Content-Type: application/json\r\nContent-Length: {len(large)}\r\n", large)
    assert got == 413
    assert cluster.get("/health")[0] == 200


def test_a_thousand_clients_that_vanish_leave_nothing(cluster):
    async def vanish(session, gate):
        async with gate:
            body = {**CHAT, "stream": True, "max_tokens": 500}
            async with session.post(f"{cluster.url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200
                async for line in answer.content:
                    if b'"content":"' in line:
                        break
                answer.close()

    async def run():
        gate = asyncio.Semaphore(50)
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(vanish(session, gate) for _ in range(1000)))

    asyncio.run(run())
    wait_until(lambda: cluster.metric("shoal_requests_running") == 0, 20, "every request's end")
    answer = cluster.client().chat.completions.create(model="", max_tokens=4, **CHAT)
    assert answer.usage.completion_tokens == 4


def test_the_load_client(cluster):
    ran = subprocess.run(
        [BINARY, "bench", "serve", "--api", "http", "--url", cluster.url,
         "--prompts", ROOT / "bench/prompts-shared-prefix.jsonl", "--concurrency", "32", "--requests", "64",
         "--max-tokens", "32", "--ignore-eos", "--json"],
        check=True, capture_output=True, text=True, timeout=300,
    )
    report = json.loads(ran.stdout)
    assert (report["requests"], report["errors"], report["output_tokens"]) == (64, 0, 64 * 32)


@pytest.mark.parametrize("script", ["peers", "itl", "concurrency", "speculation"])
def test_benchmarks_have_all_that_they_import(script):
    ran = subprocess.run([sys.executable, ROOT / f"bench/{script}.py", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_benchmark_of_peers_runs():
    """Without the peers, which take long to install."""
    ran = subprocess.run(
        [sys.executable, ROOT / "bench/peers.py", "--peers", "", "--points", "1 stream", "--repeats", "1", "--dry"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^\| 1 stream, tok/s \| \d", ran.stdout, re.M), ran.stdout


def test_a_worker_that_dies_is_replaced_and_its_streams_go_on():
    cluster = Cluster()
    try:
        ask = dict(model="", max_tokens=200, extra_body={"ignore_eos": True}, **CHAT)
        undisturbed = cluster.client().chat.completions.create(**ask).choices[0].message.content
        stream = cluster.client().chat.completions.create(stream=True, **ask)
        text = ""
        for i, chunk in enumerate(stream):
            text += chunk.choices[0].delta.content or ""
            if i == 20:
                os.kill(cluster.children()["worker"][0], signal.SIGKILL)
        assert text == undisturbed
    finally:
        cluster.stop()


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_process_outlives_the_supervisor():
    for end in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        cluster = Cluster()
        pids = sum(cluster.children().values(), [])
        assert len(pids) == 2
        cluster.process.send_signal(end)
        cluster.process.wait(20)
        wait_until(lambda: not any(map(alive, pids)), 1, "the end of every process")


def test_running_requests_end_before_the_cluster_does():
    cluster = Cluster()
    results = []

    def ask():
        answer = cluster.client().chat.completions.create(
            model="", max_tokens=150, extra_body={"ignore_eos": True}, **CHAT
        )
        results.append(answer.usage.completion_tokens)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: cluster.metric("shoal_requests_running") >= 1, 10, "the request's start")
    cluster.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert results == [150]
    assert cluster.process.wait(20) == 0


def test_answers_that_outlast_the_drain_end_in_a_typed_error():
    cluster = Cluster("--drain-timeout", "300ms")
    stream = cluster.client().chat.completions.create(
        model="", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}, **CHAT
    )
    with pytest.raises(openai.APIError) as caught:
        for i, _ in enumerate(stream):
            if i == 5:
                cluster.process.send_signal(signal.SIGTERM)
    assert caught.value.code == "draining"
    assert cluster.process.wait(20) == 0
    assert not any("killed" in line for line in cluster.lines)


def test_ready_within_a_second():
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        cluster = Cluster()
        seconds.append(time.monotonic() - start)
        cluster.stop()
    print("seconds to ready:", sorted(seconds))
