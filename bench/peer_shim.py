#!/usr/bin/env python3
"""A thin OpenAI-compatible streaming server around engines whose wheels have none.

  peer_shim.py openvino|mistralrs MODEL.gguf PORT THREADS

Runs in the engine's own environment, beside aiohttp. It answers what `shoal bench serve` asks:
/health, /v1/models and /v1/chat/completions with stream=true and ignore_eos.
"""

import asyncio
import itertools
import json
import os
import pathlib
import sys
import threading
import time

from aiohttp import web

POOL_TOKENS = 8192  # 180 MiB of bf16 keys and values of the demo model
PAGE = 32


class OpenVino:
    """ContinuousBatchingPipeline: one thread runs its steps, requests are read as they grow."""

    def __init__(self, model, threads):
        import openvino_genai as genai

        self.genai = genai
        config = genai.SchedulerConfig()
        config.num_kv_blocks = POOL_TOKENS // PAGE
        config.max_num_seqs = 64
        config.enable_prefix_caching = True
        self.pipe = genai.ContinuousBatchingPipeline(
            model, config, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.tokenizer = self.pipe.get_tokenizer()
        self.ids = itertools.count()
        self.work = threading.Condition()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            with self.work:
                self.work.wait_for(self.pipe.has_non_finished_requests)
            self.pipe.step()

    def generate(self, messages, tokens, put):
        """Calls put(text) for every piece; gives the tokens of the prompt and of the answer."""
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        config = self.genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).input_ids
        with self.work:
            handle = self.pipe.add_request(next(self.ids), ids, config)
            self.work.notify()
        made, shown = [], ""
        while len(made) < tokens:
            if not handle.can_read():
                time.sleep(0.0005)
                continue
            for output in handle.read().values():
                made += output.generated_ids
            text = self.tokenizer.decode(made)
            if len(text) > len(shown):
                put(text[len(shown):])
                shown = text
        return ids.shape[-1], len(made)


class MistralRs:
    """Runner: a blocking iterator of chunks for every request."""

    def __init__(self, model, threads):
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        import mistralrs

        self.api = mistralrs
        path = pathlib.Path(model)
        which = mistralrs.Which.GGUF(
            tok_model_id=None, quantized_model_id=str(path.parent), quantized_filename=path.name)
        # It is several times slower with the file's own Q4_1.
        self.runner = mistralrs.Runner(which=which, max_seqs=64, in_situ_quant="Q8_0")
        # The runner takes one call at a time, and fails if two prompts come into one batch.
        self.prompt = threading.Lock()

    def generate(self, messages, tokens, put):
        request = self.api.ChatCompletionRequest(
            model="default", messages=messages, max_tokens=tokens, temperature=0.0, stream=True,
            ignore_eos=True)
        usage, pieces = None, 0
        with self.prompt:
            chunks = iter(self.runner.send_chat_completion_request(request))
            first = next(chunks)
        for chunk in itertools.chain([first], chunks):
            text = chunk.choices[0].delta.content
            if text:
                put(text)
                pieces += 1
            usage = getattr(chunk, "usage", None) or usage
        return (usage.prompt_tokens, usage.completion_tokens) if usage else (0, pieces)


def app(engine):
    async def completions(request):
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

        def put(piece):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work():
            try:
                put(engine.generate(body["messages"], body["max_tokens"], put))
            except Exception as error:  # a peer that fails is told to the client
                put(error)

        async def send(event):
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        threading.Thread(target=work, daemon=True).start()
        while isinstance(piece := await pieces.get(), str):
            await send({"choices": [{"index": 0, "delta": {"content": piece}}]})
        if isinstance(piece, Exception):
            await send({"error": repr(piece)})
        else:
            usage = dict(zip(("prompt_tokens", "completion_tokens"), piece))
            await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(_):
        return web.json_response({"data": [{"id": "peer"}]})

    async def health(_):
        return web.Response()

    server = web.Application()
    server.add_routes([web.post("/v1/chat/completions", completions), web.get("/v1/models", models),
                       web.get("/health", health)])
    return server


def main():
    kind, model, port, threads = sys.argv[1:]
    engine = {"openvino": OpenVino, "mistralrs": MistralRs}[kind](model, int(threads))
    web.run_app(app(engine), host="127.0.0.1", port=int(port), print=None, shutdown_timeout=1)


if __name__ == "__main__":
    main()
