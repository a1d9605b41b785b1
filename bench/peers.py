#!/usr/bin/env python3
"""Serves the demo model with Shoal and its peers on this machine, one at a time and interleaved, under
one load, and writes the table and the plot of docs/performance.md.

  cargo build --release && bench/peers.py
  bench/peers.py --peers llama --points streams --repeats 3

Each peer is installed from PyPI into an environment of its own below target/peers the first time;
llama.cpp is built from source, which needs cmake and a C++ compiler. A peer that cannot be installed,
breaks off or takes too long is a note under the table.
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import tempfile
import time
import traceback

import peer_plot
import peer_servers
from peer_servers import ROOT

TOKENS = 128
LIMIT = 240  # Seconds of a point, so that a peer that cannot serve it does not hold up the others.
BEGIN, END = "<!-- serving -->", "<!-- /serving -->"
SHARED = ROOT / "bench/prompts-shared-prefix.jsonl"
CLIENT = ROOT / "target/release/shoal"
WORDS = ("amber basil cedar delta ember fjord grove heron islet jade karst lemon maple nectar olive pearl quartz "
         "ridge sable thyme umber violet willow yarrow zephyr").split()


def unique_prompts():
    """The shared prompts, each with a first sentence of its own."""
    for i, line in enumerate(SHARED.read_text().splitlines()):
        messages = json.loads(line)["messages"]
        words = " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 6))
        messages[0]["content"] = f"Shop {i}: {words}. " + messages[0]["content"]
        yield messages


def long_prompts(tokens):
    """Prompts of about so many tokens, each different from its first words on."""
    for i in range(64):
        text, n = [], 0
        while n < tokens - 40:
            word = WORDS[(n * 7 + i * 11 + n // 25) % len(WORDS)]
            text.append(word)
            n += 2  # A word is about two tokens.
        yield [{"role": "user", "content": f"{i}. Sum this up: " + " ".join(text)}]


# Name: prompts, streams, requests of a run, most output tokens.
POINTS = {
    "1 stream": (None, 1, 4, TOKENS),
    "8 streams": (None, 8, 24, TOKENS),
    "32 streams": (None, 32, 32, TOKENS),
    "8 streams, nothing shared": (unique_prompts, 8, 24, TOKENS),
    "prompt of 512": (lambda: long_prompts(512), 1, 3, 1),
    "prompt of 2048": (lambda: long_prompts(2000), 1, 2, 1),
    "decode at 2048": (lambda: long_prompts(1920), 1, 1, TOKENS),
}
START = "start to first token"

# Heading, point, number of a report, its unit, whether more is better.
ROWS = [(p, p, lambda r: r["output_tok_s"], "tok/s", True) for p in list(POINTS)[:4]] + [
    ("prefill 512", "prompt of 512", lambda r: r["prompt_tokens_mean"] / r["ttft_ms_p50"] * 1e3, "tok/s", True),
    ("prefill 2048", "prompt of 2048", lambda r: r["prompt_tokens_mean"] / r["ttft_ms_p50"] * 1e3, "tok/s", True),
    ("decode at 2048", "decode at 2048", lambda r: 1e3 / r["tpot_ms_p50"], "tok/s", True),
    ("TTFT p50, 1 stream", "1 stream", lambda r: r["ttft_ms_p50"], "ms", False),
    ("TTFT p50, 8 streams", "8 streams", lambda r: r["ttft_ms_p50"], "ms", False),
    ("TTFT p50, 32 streams", "32 streams", lambda r: r["ttft_ms_p50"], "ms", False),
    ("PSS, 32 streams", "32 streams", lambda r: r["pss_peak_mib"], "MiB", False),
    (START, START, lambda r: r, "s", False),
]


def pss_mib(pid):
    """Memory of a process and its descendants, what is shared counted once."""
    todo, pss = [pid], 0
    while todo:
        process = pathlib.Path(f"/proc/{todo.pop()}")
        try:
            pss += sum(int(line.split()[1]) for line in (process / "smaps_rollup").open() if line.startswith("Pss:"))
            for task in process.glob("task/*/children"):
                todo += map(int, task.read_text().split())
        except OSError:  # It has ended.
            pass
    return pss / 1024


def load(server, point, offset):
    """One run of `shoal bench serve`, which takes less of the cores that it shares with the server than a
    client in Python: its report, with the greatest memory of the server's processes."""
    prompts, streams, requests, tokens = POINTS[point]
    messages = list(prompts()) if prompts else [json.loads(line)["messages"] for line in SHARED.open()]
    offset %= len(messages)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"messages": m}) + "\n" for m in messages[offset:] + messages[:offset])
        file.flush()
        client = subprocess.Popen(
            [CLIENT, "bench", "serve", "--api", "http", "--url", server.url, "--model", server.model,
             "--prompts", file.name, "--concurrency", str(streams), "--requests", str(requests),
             "--max-tokens", str(tokens), "--ignore-eos", "--warmup", "2" if tokens > 1 and streams > 1 else "1",
             "--json", "--log", "error"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        peak, end = 0, time.monotonic() + LIMIT
        while True:
            try:
                out, err = client.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, pss_mib(server.process.pid))
                if time.monotonic() > end:
                    client.kill()
                    client.communicate()
                    raise RuntimeError(f"not done within {LIMIT} s") from None
    if client.returncode:
        raise RuntimeError(err.strip().splitlines()[-1] if err.strip() else "the client failed")
    report = json.loads(out)
    if report["errors"]:
        raise RuntimeError(f"{report['errors']} of {requests} requests failed: {report['first_error']}")
    return {**report, "pss_peak_mib": max(peak, pss_mib(server.process.pid))}


def one_run(peer, point, offset):
    """The report of a point, or the seconds from start to first token."""
    server = peer.start(POINTS[point][1] if point in POINTS else 1)
    try:
        return server.first_token() if point == START else load(server, point, offset)
    finally:
        server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(peer_servers.ALL), help="some of %(default)s; empty for Shoal alone")
    parser.add_argument("--points", default="", help="only the points whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-server", type=pathlib.Path, help="a binary of your own")
    parser.add_argument("--shoal", type=pathlib.Path, help="another binary than target/release/shoal")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "target/peers")
    parser.add_argument("--dry", action="store_true", help="print the table, leave docs/performance.md alone")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    shoal = peer_servers.Shoal(args)
    args.model = pathlib.Path(
        subprocess.run([shoal.binary, "model", "fetch"], check=True, capture_output=True, text=True).stdout.strip())
    peers, notes = [shoal], []
    for name in filter(None, args.peers.split(",")):
        try:
            peers.append(peer_servers.ALL[name](args))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            notes.append(f"{peer_servers.ALL[name].name} could not be installed: {error}")
    points = [p for p in [*POINTS, START] if args.points in p]

    runs = {}
    for repeat in range(args.repeats):
        for point in points:
            # Every peer is first as often as last.
            for peer in peers if repeat % 2 else reversed(peers):
                if any(note.startswith(f"{peer.name}, {point}:") for note in notes):
                    continue
                try:
                    runs.setdefault((peer.name, point), []).append(one_run(peer, point, 7 * repeat))
                    print(repeat, point, peer.name, summary(point, runs[peer.name, point][-1]), flush=True)
                except (OSError, RuntimeError, subprocess.SubprocessError, KeyError) as error:
                    traceback.print_exc()
                    why = error if isinstance(error, RuntimeError) else repr(error)
                    notes.append(f"{peer.name}, {point}: {why}".splitlines()[0])
    cpu = next(l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    about = (f"{datetime.date.today()}, {cpu}, {args.threads} threads, {platform.system()}; {args.repeats} "
             "interleaved runs, median [least–most]; × is how much better Shoal is than the best peer.")
    names = [peer.name for peer in peers]
    notes = [f"{peer.name}: {peer.note}." for peer in peers if peer.note] + notes
    rows = [row for row in (figures(runs, names, *row) for row in ROWS) if row]
    table = "\n".join([about, "", *markdown(names, rows), "", *(f"- {note}" for note in notes)]).rstrip()
    print(table)
    if not args.dry:
        plot = ROOT / "docs/performance.svg"
        plot.write_text(peer_plot.svg(names, rows))
        page = ROOT / "docs/performance.md"
        head, rest = page.read_text().split(BEGIN)
        table += "\n\n![Shoal beside its peers](performance.svg)"
        page.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def summary(point, report):
    if point == START:
        return f"{report:.2f} s"
    return f"{report['output_tok_s']} tok/s, TTFT {report['ttft_ms_p50']} ms"


def figures(runs, names, heading, point, number, unit, more):
    """A row of the table: its heading, unit, direction, and (median, least, most) of every peer."""
    row = {}
    for name in names:
        numbers = [number(r) for r in runs.get((name, point), [])]
        if numbers:
            row[name] = statistics.median(numbers), min(numbers), max(numbers)
    return (heading, unit, more, row) if row else None


def markdown(names, rows):
    yield "| | " + " | ".join(names) + " | × |"
    yield "|---" * (len(names) + 2) + "|"
    for heading, unit, more, row in rows:
        digits = 2 if unit == "s" else 0
        cells = []
        for name in names:
            if name not in row:
                cells.append("–")
                continue
            median, least, most = row[name]
            cells.append(f"{median:.{digits}f} [{least:.{digits}f}–{most:.{digits}f}]")
        others = [row[name][0] for name in names[1:] if name in row]
        times = "–"
        if others and names[0] in row:
            own = row[names[0]][0]
            times = f"{own / max(others) if more else min(others) / own:.2f}"
        yield f"| {heading}, {unit} | " + " | ".join(cells) + f" | {times} |"


if __name__ == "__main__":
    main()
