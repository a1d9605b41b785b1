#!/usr/bin/env python3
"""Measures what drafts gain, by kind of text, and writes the table of docs/speculation.md.

  cargo build --release && bench/speculation.py
  bench/speculation.py --servers llama --llama-server BINARY --dry

Four kinds of answer: free chat; quotations of an article in the prompt; support answers that other
users were given before, but for an order number; near-verbatim repetition of an earlier answer. Each
is asked with drafts off and on in turns, one stream, at temperature 0 and 0.7 with the same seeds. Both arms of Shoal
make the same tokens; the run ends where they do not. tok/s is decoding alone: the tokens after the first text by
the time after it. A step of Shoal's engine sends one event, so tokens per event are those per step.
Answers end where the model ends them, at 160 tokens at most; those of less than 16 do not count.
Distinct 4-grams tell how much a text loops, those of the prompt how much it quotes. llama.cpp and vLLM run
with each of their n-gram drafters beside their own plain decoding, installed as by peers.py.
"""

import argparse
import datetime
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
import urllib.request

import peer_servers
from peer_servers import ROOT, Server, free_port

BEGIN, END = "<!-- speculation -->", "<!-- /speculation -->"
TOKENS = 160
SHORTEST = 16
# The flags of each peer's drafters.
DRAFTERS = {
    "llama": {name: ("--spec-type", name) for name in ("ngram-simple", "ngram-mod", "ngram-cache")},
    "vllm": {"ngram": ("--speculative-config", json.dumps(
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}))},
}

ARTICLE = " ".join("""Returns and refunds. You may return unused goods within thirty days after delivery. Pack the
goods in their original box, print the label from your account and hand the parcel in at any post office.
The refund reaches your card within seven working days after the parcel has come in. Opened food and
personalised goods cannot be returned. Warranty. Every appliance has a warranty of two years. It covers
defects of material and workmanship, but no damage by water, falls or improper use. To make a claim, send
a photo of the defect and of the type plate, and keep the receipt. We repair the appliance within ten
working days, or replace it if it cannot be repaired. Delivery. Orders ship within two working days and
arrive in three to five days. If a parcel is late, ask your neighbours first, then open a ticket with the
number of your order; we search for seven days and then send the goods again free of charge.""".split())

CHAT = ["Tell me a short story about a lighthouse keeper who finds a strange letter.",
        "Explain how a bicycle stays upright while it moves.",
        "What should I cook tonight with rice, eggs and spinach?",
        "Write a letter to a friend about your first week in a new city."]
SECTIONS = ["returns and refunds", "the warranty", "delivery", "late parcels"]
# Sentences from which on the model does say six again when it is asked to.
REPEATED = [1, 3, 5, 9]
TOPICS = ["a parcel that never arrived", "a kettle that leaks", "a refund that is late", "a wrong colour"]


def prompts(kind, i, user):
    """The messages of question `i`, as user `user` asks it."""
    say = lambda text: [{"role": "user", "content": text}]
    if kind == "free chat":
        return say(CHAT[i])
    if kind == "retrieval":
        # A model this small quotes once it has seen it done.
        return [*say(f"What does the article say about opened food?\n\nArticle: {ARTICLE}"),
                {"role": "assistant",
                 "content": "The article says: Opened food and personalised goods cannot be returned."},
                *say(f"What does the article say about {SECTIONS[i]}?")]
    if kind == "template":
        return say(f"You are a support assistant. A customer with order NW-{91 + user}{i}4 writes about "
                   f"{TOPICS[i]}. Write the standard reply of the shop, politely and in full.")
    said = ". ".join(ARTICLE.split(". ")[REPEATED[i]:REPEATED[i] + 6]).rstrip(".") + "."
    return [*say("What does the article say?"), {"role": "assistant", "content": said}, *say("Please say that again.")]


KINDS = ("free chat", "retrieval", "template", "near-verbatim")


def ask(server, messages, **fields):
    """One streamed answer: its text, tok/s of its decoding, tokens per event, tokens, and when they came."""
    body = {"messages": messages, "max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True},
            **fields}
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    times, text, tokens = [], [], 0
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            for choice in event.get("choices", ()):
                if choice["delta"].get("content"):
                    times.append(time.perf_counter())
                    text.append(choice["delta"]["content"])
    rate = (tokens - 1) / (times[-1] - times[0]) if len(times) > 1 else 0
    return "".join(text), rate, tokens / len(times), tokens, times


def keep(arms, taken):
    """Counts a pair of answers, unless one is too short to measure."""
    if all(measured[2] >= SHORTEST for measured in taken.values()):
        for arm, (rate, step, _, *grams) in taken.items():
            arms[arm].append((rate, step, *grams))


def four_grams(text):
    words = text.split()
    return [tuple(words[i:i + 4]) for i in range(len(words) - 3)]


def novelty(text, messages):
    """How much of a text is new in it, and how much of it is copied from the prompt."""
    grams, prompt = four_grams(text), set(four_grams(" ".join(m["content"] for m in messages)))
    count = max(1, len(grams))
    return len(set(grams)) / count, sum(gram in prompt for gram in grams) / count


def shoal(binary, repeats, rows):
    arms = {(temperature, kind): {"off": [], "auto": []} for temperature in (0, 0.7) for kind in KINDS}
    for repeat in range(repeats):
        for temperature in (0, 0.7):
            fresh_shoal(binary, repeat, temperature, arms)
    for (temperature, kind), taken in arms.items():
        rows.append(("Shoal", kind, temperature, taken["off"], taken["auto"]))
        print(line(*rows[-1]), flush=True)


def fresh_shoal(binary, repeat, temperature, arms):
    """One repeat on a server that has seen no answers but templates: those of other repeats would be drafts."""
    port = free_port()
    server = Server([binary, "up", "--listen", f"127.0.0.1:{port}", "--log", "error"], port)
    try:
        # Users whose answers are templates for later ones, and a first look at the step times.
        for user in range(3):
            for i in range(4):
                ask(server, prompts("template", i, user), temperature=0, user=f"user {user}")
        for kind in KINDS:
            for i in range(4):
                texts, taken = {}, {}
                for arm in ("off", "auto") if (repeat + i) % 2 else ("auto", "off"):
                    messages = prompts(kind, i, 3 + repeat)
                    text, *measured, _ = ask(
                        server, messages, temperature=temperature, seed=7 * i + repeat,
                        speculation=arm, user=f"{kind} {i} {arm}")
                    texts[arm] = text
                    taken[arm] = (*measured, *novelty(text, messages))
                if texts["off"] != texts["auto"]:
                    raise SystemExit("drafts changed an answer")
                keep(arms[temperature, kind], taken)
    finally:
        server.stop()


def beside_itself(peer, drafters, repeats, rows):
    """A peer with each of its drafters beside the same peer without."""
    for drafter, flags in drafters.items():
        servers = {}
        try:
            for arm, more in (("off", ()), ("on", flags)):
                servers[arm] = peer.start(1, *more)
            for temperature, kind in itertools.product((0, 0.7), KINDS):
                arms = {"off": [], "on": []}
                for repeat in range(repeats):
                    for i in range(4):
                        taken = {}
                        for arm in ("off", "on") if (repeat + i) % 2 else ("on", "off"):
                            messages = prompts(kind, i, 3 + repeat)
                            text, *measured, _ = ask(
                                servers[arm], messages, temperature=temperature, seed=7 * i + repeat)
                            taken[arm] = (*measured, *novelty(text, messages))
                        keep(arms, taken)
                rows.append((f"{peer.name} {drafter}", kind, temperature, arms["off"], arms["on"]))
                print(line(*rows[-1]), flush=True)
        finally:
            for server in servers.values():
                server.stop()


def line(server, kind, temperature, off, on):
    rate = lambda arm: statistics.median(answer[0] for answer in arm)
    mean = lambda place: statistics.mean(answer[place] for answer in on)
    gains = [b[0] / a[0] for a, b in zip(off, on)] or [float("nan")]
    # llama.cpp sends every token by itself.
    steps = "" if server.startswith("llama.cpp") else f"{mean(1):.2f}"
    return (f"| {server} | {kind} | {temperature} | {rate(off):.0f} | {rate(on):.0f} "
            f"| {statistics.median(gains):.2f} [{min(gains):.2f}–{max(gains):.2f}] | {steps} "
            f"| {mean(2):.2f} | {mean(3):.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="shoal", help="some of shoal,llama,vllm; %(default)s if left out")
    parser.add_argument("--llama-server", type=pathlib.Path, help="a binary of your own")
    parser.add_argument("--shoal", type=pathlib.Path, default=ROOT / "target/release/shoal", help="another binary")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "target/peers")
    parser.add_argument("--threads", type=int, default=2, help="of a peer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print the table, leave docs/speculation.md alone")
    args = parser.parse_args()
    names = args.servers.split(",")
    args.cache.mkdir(parents=True, exist_ok=True)
    args.model = pathlib.Path(
        subprocess.run([args.shoal, "model", "fetch"], check=True, capture_output=True, text=True).stdout.strip())
    rows = []
    if "shoal" in names:
        shoal(args.shoal, args.repeats, rows)
    for name, drafters in DRAFTERS.items():
        if name in names:
            beside_itself(peer_servers.ALL[name](args), drafters, args.repeats, rows)
    cpu = next(l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    table = [BEGIN, f"{datetime.date.today()}, {cpu}, one stream; {4 * args.repeats} pairs each, medians [least–most].", "",
             "| server | text | T | off tok/s | drafts tok/s | × | tokens per event "
             "| distinct 4-grams | of the prompt |",
             "|---|---|---|---|---|---|---|---|---|", *(line(*row) for row in rows), END]
    if args.dry:
        print("\n".join(table[1:-1]))
        return
    page = ROOT / "docs/speculation.md"
    head, rest = page.read_text().split(BEGIN)
    page.write_text(head + "\n".join(table) + rest.split(END)[1])


if __name__ == "__main__":
    sys.exit(main())
