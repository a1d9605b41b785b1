#!/usr/bin/env python3
"""Measures whether the controller of drafts is in nobody's way: for 1 to 32 streams, the rate of decoding
with drafts as it chooses them, beside none and beside fixed numbers of rows; writes a table into
docs/speculation.md.

  cargo build --release && bench/concurrency.py

The streams ask the four kinds of question of speculation.py in turns, at temperature 0, as no user, so
that drafts come from each answer's own text alone and every arm makes the same tokens. What counts is
what comes until the last question is asked: as long as all streams are busy. All arms of a
repeat run one after the other, in an order that rotates; a ratio is of runs of one repeat.
"""

import argparse
import concurrent.futures
import datetime
import itertools
import statistics
import sys
import time

from peer_servers import ROOT, Server, free_port
from speculation import KINDS, ask, prompts

BEGIN, END = "<!-- concurrency -->", "<!-- /concurrency -->"
ARMS = ["off", 2, 4, 8, "auto"]
STREAMS = [1, 2, 4, 8, 16, 32]
ANSWERS = 5  # of a stream, in a run


def run(server, streams, arm):
    """The texts, and tok/s while all streams are busy."""
    questions = itertools.islice(itertools.cycle([(k, i) for i in range(4) for k in KINDS]), ANSWERS * streams)
    # A question is asked once with each order number, so that streams do not repeat each other.
    asks = [prompts(kind, i, n // 16) for n, (kind, i) in enumerate(questions)]
    asked = []

    def answer(messages):
        asked.append(time.perf_counter())
        return ask(server, messages, temperature=0, speculation=arm)

    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        answers = list(pool.map(answer, asks))
    start, end = min(asked), max(asked)
    # Of an answer on its way then, the share of its events that had come.
    made = sum(tokens * sum(at <= end for at in times) / len(times) for *_, tokens, times in answers)
    return [text for text, *_ in answers], made / (end - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="from 8 streams on; of fewer up to four times as many")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)), help="%(default)s if left out")
    parser.add_argument("--dry", action="store_true", help="print the table, leave docs/speculation.md alone")
    args = parser.parse_args()
    port = free_port()
    server = Server([ROOT / "target/release/shoal", "up", "--listen", f"127.0.0.1:{port}", "--log", "error"], port)
    rows = []
    try:
        for streams in map(int, args.streams.split(",")):
            rates = {arm: [] for arm in ARMS}
            run(server, streams, "auto")  # Prompts into the cache, step times into the model.
            for repeat in range(args.repeats * min(4, max(1, 8 // streams))):
                texts = {}
                for arm in ARMS[repeat % len(ARMS):] + ARMS[:repeat % len(ARMS)]:
                    texts[arm], rate = run(server, streams, arm)
                    rates[arm].append(rate)
                if any(other != texts["off"] for other in texts.values()):
                    raise SystemExit("drafts changed an answer")
            best = max(ARMS[:-1], key=lambda arm: statistics.median(rates[arm]))
            ratios = [auto / other for auto, other in zip(rates["auto"], rates[best])]
            low, median, high = statistics.quantiles(ratios, n=4)
            medians = " | ".join(f"{statistics.median(rates[arm]):.0f}" for arm in ARMS)
            rows.append(f"| {streams} | {len(ratios)} | {medians} | {median:.2f} [{low:.2f}–{high:.2f}] |")
            print(rows[-1], flush=True)
    finally:
        server.stop()
    cpu = next(l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    table = [BEGIN, f"{datetime.date.today()}, {cpu}, 2 threads; interleaved runs, median tok/s; the last "
             "column is auto beside the best of the others, paired: the median and the middle half.", "",
             "| streams | runs | off | 2 | 4 | 8 | auto | auto / best |", "|---|---|---|---|---|---|---|---|", *rows, END]
    if not args.dry:
        page = ROOT / "docs/speculation.md"
        head, rest = page.read_text().split(BEGIN)
        page.write_text(head + "\n".join(table) + rest.split(END)[1])


if __name__ == "__main__":
    sys.exit(main())
