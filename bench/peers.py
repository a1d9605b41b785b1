#!/usr/bin/env python3
"""Serves the demo model with Shoal and with llama.cpp on this machine, one after the other and
interleaved, under one load, and writes the table of docs/performance.md.

  cargo build --release && bench/peers.py

llama.cpp is built from the source in the llama-cpp-python package (release, native) the first
time; --llama-server takes a binary of your own. Needs cmake, a C++ compiler, aiohttp.
"""

import argparse
import datetime
import json
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLAMA = "llama-cpp-python==0.3.36"
POINTS = {1: 4, 8: 24, 32: 32}  # streams: requests of a run
TOKENS = 128
BEGIN, END = "<!-- serving -->", "<!-- /serving -->"


def build_llama(cache):
    """llama-server from the sdist, with the settings that suit it best."""
    binary = cache / "build/bin/llama-server"
    if binary.exists():
        return binary
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
             "-d", folder, LLAMA], check=True)
        (sdist,) = pathlib.Path(folder).glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(cache, filter="data")
    (source,) = cache.glob("llama_cpp_python-*/vendor/llama.cpp")
    subprocess.run(
        ["cmake", "-B", cache / "build", "-S", source, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
         "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DBUILD_SHARED_LIBS=OFF"], check=True)
    subprocess.run(["cmake", "--build", cache / "build", "-j", "--target", "llama-server"], check=True)
    return binary


class Server:
    """A server process that answers /health with 200 once it is ready."""

    def __init__(self, command, port):
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} did not come up")
            time.sleep(0.1)

    def healthy(self):
        try:
            return urllib.request.urlopen(self.url + "/health", timeout=1).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def model_name(url):
    with urllib.request.urlopen(url + "/v1/models", timeout=10) as answer:
        return json.load(answer)["data"][0]["id"]


def load(server, streams, requests, offset):
    """One run of the load client: its report."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run(
            [sys.executable, ROOT / "bench/load.py", "--base-url", server.url, "--model", model_name(server.url),
             "--prompts", ROOT / "bench/prompts-shared-prefix.jsonl", "--concurrency", str(streams),
             "--requests", str(requests), "--max-tokens", str(TOKENS), "--ignore-eos", "--warmup", "2",
             "--offset", str(offset), "--pid", str(server.process.pid), "--out", out.name],
            check=True, stdout=subprocess.DEVNULL)
        return json.load(open(out.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "target/peers")
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    shoal = ROOT / "target/release/shoal"
    model = subprocess.run([shoal, "model", "fetch"], check=True, capture_output=True, text=True).stdout.strip()
    args.cache.mkdir(parents=True, exist_ok=True)
    llama = args.llama_server or build_llama(args.cache)

    def start(peer, streams):
        port = free_port()
        if peer == "Shoal":
            return Server([shoal, "up", "--listen", f"127.0.0.1:{port}", "--log", "error"], port)
        return Server(
            [llama, "-m", model, "--port", str(port), "-t", args.threads, "-np", str(streams),
             "-c", str(512 * streams), "-fa", "off", "--no-webui"], port)

    runs = {}
    for repeat in range(args.repeats):
        for streams, requests in POINTS.items():
            for peer in ("Shoal", "llama.cpp") if repeat % 2 else ("llama.cpp", "Shoal"):
                server = start(peer, streams)
                try:
                    report = load(server, streams, requests, 7 * repeat)
                finally:
                    server.stop()
                runs.setdefault((peer, streams), []).append(report)
                record = {"repeat": repeat, "peer": peer, "streams": streams, **report}
                with open(args.cache / "runs.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
                print(f"{repeat} {peer} {streams}: {report['output_tok_s']} tok/s, {report['errors']} errors", flush=True)
    write(runs, args)


def write(runs, args):
    cpu = next(l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    lines = [
        BEGIN,
        f"{datetime.date.today()}, {cpu}, {args.threads} threads, {platform.system()}; "
        f"{args.repeats} interleaved runs, median [least–most].",
        "",
        "| server | streams | tok/s | × llama.cpp | TTFT p50 ms | TPOT p50 ms |",
        "|---|---|---|---|---|---|",
    ]
    median = lambda key, field: statistics.median(r[field] for r in runs[key])
    for streams in POINTS:
        for peer in ("llama.cpp", "Shoal"):
            all_ = [r["output_tok_s"] for r in runs[peer, streams]]
            ratio = median((peer, streams), "output_tok_s") / median(("llama.cpp", streams), "output_tok_s")
            lines.append(
                f"| {peer} | {streams} | {statistics.median(all_):.0f} [{min(all_):.0f}–{max(all_):.0f}] "
                f"| {ratio:.2f} | {median((peer, streams), 'ttft_ms_p50'):.0f} | {median((peer, streams), 'tpot_ms_p50'):.1f} |")
    lines.append(END)
    page = ROOT / "docs/performance.md"
    text = page.read_text()
    head, rest = text.split(BEGIN)
    page.write_text(head + "\n".join(lines) + rest.split(END)[1])


if __name__ == "__main__":
    main()
