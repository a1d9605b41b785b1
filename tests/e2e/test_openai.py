"""The official OpenAI client against a cluster with the demo model."""

import concurrent.futures

import openai
import pytest

ASK = [{"role": "user", "content": "Explain why the sky is blue in two sentences."}]


def ask(client, messages=ASK, **options):
    options = {"model": client.models.list().data[0].id, "max_tokens": 32, "temperature": 0, **options}
    return client.chat.completions.create(messages=messages, **options)


def test_models(client):
    models = client.models.list().data
    assert len(models) == 1 and "SmolLM2" in models[0].id
    assert client.models.retrieve(models[0].id).id == models[0].id


def test_chat(client):
    answer = ask(client)
    assert answer.choices[0].message.role == "assistant"
    assert "sky" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 32
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 32


def test_an_answer_that_ends_by_itself(client):
    answer = ask(client, max_tokens=500)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 500
    assert "<|im_end|>" not in answer.choices[0].message.content


def test_stream_is_the_same_text(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 32
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 32


def test_seed_reproduces_and_is_returned(client):
    first = ask(client, temperature=1.0, seed=7)
    again = ask(client, temperature=1.0, seed=7)
    assert first.choices[0].message.content == again.choices[0].message.content
    drawn = ask(client, temperature=1.0)
    replay = ask(client, temperature=1.0, seed=drawn.seed)
    assert drawn.choices[0].message.content == replay.choices[0].message.content


def test_choices(client):
    answer = ask(client, n=3, temperature=1.0, seed=3, extra_body={"ignore_eos": True})
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) == 3
    assert answer.usage.completion_tokens == 96


def test_stop_strings(client):
    whole = ask(client).choices[0].message.content
    stop = whole[20:26]
    answer = ask(client, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    parts = "".join(c.choices[0].delta.content or "" for c in ask(client, stop=[stop], stream=True))
    assert parts == whole[: whole.index(stop)]


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=8)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert "".join(t.token for t in content) == answer.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.logprob <= 0


def test_completions_echo_scores_the_prompt(client):
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt="The capital of France is", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "The capital of France is"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert all(x < 0 for x in answer.choices[0].logprobs.token_logprobs[1:])
    several = client.completions.create(model=model, prompt=["One", "Two"], max_tokens=4, temperature=0)
    assert [c.index for c in several.choices] == [0, 1]


def test_penalties_and_bias(client):
    plain = ask(client).choices[0].message.content
    assert ask(client, frequency_penalty=2.0, presence_penalty=2.0).choices[0].message.content != plain
    first = ask(client, max_tokens=1, logprobs=True).choices[0].message.content
    tokens = client.post("/../tokenize", body={"content": first}, cast_to=object)["tokens"]
    banned = ask(client, max_tokens=1, logit_bias={str(tokens[0]): -100}).choices[0].message.content
    assert banned != first


def test_min_tokens_and_ignore_eos(client):
    usual = ask(client, max_tokens=500).usage.completion_tokens
    longer = ask(client, max_tokens=usual + 40, extra_body={"ignore_eos": True})
    assert longer.usage.completion_tokens == usual + 40
    least = ask(client, max_tokens=usual + 40, extra_body={"min_tokens": usual + 20})
    assert least.usage.completion_tokens >= usual + 20


@pytest.mark.parametrize(
    "error, options",
    [
        (openai.NotFoundError, {"model": "no-such-model"}),
        (openai.BadRequestError, {"max_tokens": 0}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"top_p": 0}),
        (openai.BadRequestError, {"n": 1000}),
        (openai.BadRequestError, {"logprobs": True, "top_logprobs": 21}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "word " * 9000}]}),
        (openai.BadRequestError, {"logit_bias": {"999999": 1}}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, {"response_format": {"type": "json_object"}}),
    ],
)
def test_errors_are_typed(client, error, options):
    with pytest.raises(error) as caught:
        ask(client, **{"messages": ASK, **options})
    assert caught.value.body["message"]
    assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")
    assert ask(client, max_tokens=1).choices


def test_32_chats_at_once_say_what_each_says_alone(client):
    """Batching changes no token: greedy and sampled, prefill and decode mixed."""
    asks = [
        {
            "messages": [{"role": "user", "content": f"Tell me about the number {i}" + " and more" * (i * 7 % 40)}],
            "temperature": 0 if i % 2 else 0.9,
            "seed": i,
            "max_tokens": 24 + i % 9,
        }
        for i in range(32)
    ]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda a: ask(client, **a).choices[0].message.content, asks))
    alone = [ask(client, **a).choices[0].message.content for a in asks]
    assert together == alone
