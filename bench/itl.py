#!/usr/bin/env python3
"""What a long prompt does to streams that are under way: the gaps between their tokens, alone and while
prompts of about 2,000 tokens arrive one after the other.

  bench/itl.py --base-url http://127.0.0.1:8080 --streams 8 --prompts 3

Needs aiohttp.
"""

import argparse
import asyncio
import json
import statistics
import time

import aiohttp

from peers import long_prompts, unique_prompts


async def stream(session, url, model, messages, tokens, times):
    """Appends the time of every event with text."""
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True}
    async with session.post(url + "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if any((c.get("delta") or {}).get("content") for c in json.loads(line[6:]).get("choices") or ()):
                    times.append(now)


async def keep_busy(ask, prompts, answers):
    """One answer after the other; appends the times of each."""
    while True:
        answers.append([])
        await ask(next(prompts), answers[-1])


async def run(args):
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        async with session.get(args.base_url + "/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        shorts, longs = unique_prompts(), long_prompts(2000)
        answers, spans = [], []
        ask = lambda messages, times: stream(session, args.base_url, model, messages, args.tokens, times)
        tasks = [asyncio.create_task(keep_busy(ask, shorts, answers)) for _ in range(args.streams)]
        while sum(map(len, answers)) < 100 * args.streams:
            await asyncio.sleep(0.01)
        for messages in (next(longs) for _ in range(args.prompts)):
            first, start = [], time.perf_counter()
            await stream(session, args.base_url, model, messages, 1, first)
            spans.append((start, first[0]))
            await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        # A stream that failed is an error of this run.
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        if failed := [error for error in ended if not isinstance(error, asyncio.CancelledError)]:
            raise failed[0]
    gaps = [(b, (b - a) * 1e3) for t in answers for a, b in zip(t[20:], t[21:])]
    during = [gap for at, gap in gaps if any(a <= at <= b for a, b in spans)]
    alone = [gap for at, gap in gaps if at < spans[0][0]]
    print(json.dumps({
        "streams": args.streams,
        "itl_ms_alone": spread(alone),
        "itl_ms_during": {**spread(during), "max": round(max(during), 1)},
        "ttft_ms_of_the_prompts": [round((b - a) * 1e3) for a, b in spans]}))


def spread(gaps):
    percentiles = statistics.quantiles(gaps, n=100, method="inclusive")
    return {"p50": round(percentiles[49], 1), "p99": round(percentiles[98], 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=3, help="long prompts, one after the other")
    parser.add_argument("--tokens", type=int, default=600, help="length of the answers; another follows each")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
