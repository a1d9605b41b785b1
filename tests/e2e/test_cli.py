"""The command as it is typed."""

import os
import pathlib
import signal
import socket
import subprocess

import pytest
from conftest import BINARY, Cluster


def shoal(*arguments, env=None, stdin="", seconds=60):
    return subprocess.run(
        [BINARY, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture(scope="module")
def model():
    return pathlib.Path(shoal("model", "fetch").stdout.strip())


def test_broken_files_end_with_one_clear_line(model, tmp_path):
    whole = model.read_bytes()
    cases = {
        "empty.gguf": (b"", "GGUF"),
        "text.gguf": (b"hello, world, this is no model", "GGUF"),
        "header.gguf": (whole[:1000], "more than its bytes can hold"),
        "half.gguf": (whole[: len(whole) // 2], "ends after"),
        "architecture.gguf": (whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00lemma", 1), "lemma"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        ran = shoal("worker", "--model", path, "--listen", "127.0.0.1:0", "--log", "error")
        assert ran.returncode == 1, name
        assert words in ran.stderr, (name, ran.stderr)
        assert "panicked" not in ran.stderr
    assert shoal("model", "inspect", tmp_path / "half.gguf").returncode == 1
    assert shoal("model", "inspect", tmp_path / "missing.gguf").returncode == 1


def test_a_pool_larger_than_memory_is_refused(model):
    ran = shoal("worker", "--model", model, "--listen", "127.0.0.1:0", "--kv-size", "100000GiB")
    assert ran.returncode == 1 and "available" in ran.stderr


def test_wrong_usage_is_2_and_settings_are_checked():
    assert shoal("worker", "--no-such-flag").returncode == 2
    assert shoal().returncode == 2
    for arguments, env in [
        (("worker", "--isa", "sse9"), {}),
        (("worker", "--backend", "tpu"), {}),
        (("router", "--workers", "127.0.0.1:1"), {"SHOAL_ROUTER_LISTEN": "nowhere"}),
        (("up", "--replicas", "0"), {}),
    ]:
        ran = shoal(*arguments, env=env)
        assert ran.returncode in (1, 2) and ran.stderr, arguments


def test_an_unknown_key_of_the_file_is_named(tmp_path):
    file = tmp_path / "shoal.toml"
    file.write_text("[worker]\nthread = 4\n")
    ran = shoal("--config", file, "worker", "--print-config")
    assert ran.returncode == 2
    assert "thread" in ran.stderr and "threads" in ran.stderr


def test_a_busy_port_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = shoal("up", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert ran.returncode == 1 and "in use" in ran.stderr


def test_chat_answers_every_line(cluster):
    ran = shoal("chat", "--url", cluster.url, "--temperature", "0", "--max-tokens", "16", stdin="Hello!\nWho are you?\n")
    assert ran.returncode == 0
    assert len(ran.stdout.strip().splitlines()) >= 2


def test_chat_stops_an_answer_on_ctrl_c(cluster):
    process = subprocess.Popen(
        [BINARY, "chat", "--url", cluster.url, "--max-tokens", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("Count from one to a thousand.\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.close()
    process.wait(10)


def test_bench_reports(cluster):
    ran = shoal("bench", "serve", "--url", cluster.url, "--concurrency", "4", "--requests", "8", "--max-tokens", "8", "--json")
    assert ran.returncode == 0 and "tokens" in ran.stdout


def test_the_portable_backend_serves():
    cluster = Cluster(env={"SHOAL_WORKER_BACKEND": "candle"})
    try:
        ask = {"model": "", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
        assert cluster.client().chat.completions.create(**ask).choices
    finally:
        cluster.stop()
