"""The native interfaces: tokenization, health, metrics, gRPC by reflection."""

import json
import pathlib
import subprocess
import sys
import urllib.request

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

CASES = json.loads((pathlib.Path(__file__).parents[2] / "router/text/tests/data/tokenization.json").read_text())


def post(cluster, path, body):
    request = urllib.request.Request(
        cluster.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_every_reference_tokenization(cluster):
    assert len(CASES) > 100
    for case in CASES:
        for special, ids in ((False, case["ids"]), (True, case["ids_parse_special"])):
            body = {"content": case["text"], "add_special": False, "parse_special": special}
            assert post(cluster, "/tokenize", body)["tokens"] == ids, case["text"]
        assert post(cluster, "/detokenize", {"tokens": case["ids"]})["content"] == case["text"]


def test_probes_and_metrics(cluster):
    for path in ("/health", "/ready", "/live"):
        assert cluster.get(path)[0] == 200
    assert cluster.get("/nowhere")[0] == 404
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
    post(cluster, "/v1/chat/completions", body)
    assert cluster.metric("shoal_time_to_first_token_seconds_count") >= 1


@pytest.fixture(scope="module")
def grpc_api(cluster):
    """A caller of gRPC methods that learns every type by reflection."""
    channel = grpc.insecure_channel(cluster.url.removeprefix("http://"))
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))

    def call(service, method, fields):
        found = pool.FindServiceByName(service).FindMethodByName(method)
        request = message_factory.GetMessageClass(found.input_type)(**fields)
        answer = message_factory.GetMessageClass(found.output_type)
        kind = channel.unary_stream if found.server_streaming else channel.unary_unary
        stub = kind(
            f"/{service}/{method}",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return stub(request, timeout=30)

    yield call
    channel.close()


INFERENCE = "shoal.inference.v1.Inference"


def test_grpc_generate_and_stream_agree(grpc_api):
    fields = {
        "text": "The capital of France is",
        "sampling": {"temperature": 0.0},
        "stopping": {"max_tokens": 16},
    }
    whole = grpc_api(INFERENCE, "Generate", fields)
    chunks = list(grpc_api(INFERENCE, "GenerateStream", fields))
    assert whole.choices[0].text == "".join(c.text for c in chunks)
    assert list(whole.choices[0].token_ids) == [t for c in chunks for t in c.token_ids]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 16


def test_grpc_health_and_models(grpc_api):
    assert grpc_api("grpc.health.v1.Health", "Check", {}).status == 1
    models = grpc_api(INFERENCE, "ListModels", {}).models
    assert models[0].context_length == 8192 and models[0].vocab_size == 49152


def test_grpc_errors_are_statuses(grpc_api):
    cases = [
        ({"text": "x", "sampling": {"temperature": float("nan")}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"text": "x", "model": "none"}, grpc.StatusCode.NOT_FOUND),
        ({"text": "x", "constraint": {"regex": "a"}}, grpc.StatusCode.UNIMPLEMENTED),
        ({}, grpc.StatusCode.INVALID_ARGUMENT),
    ]
    for fields, code in cases:
        with pytest.raises(grpc.RpcError) as caught:
            grpc_api(INFERENCE, "Generate", fields)
        assert caught.value.code() == code


def test_the_examples_run(cluster):
    root = pathlib.Path(__file__).parents[2]
    address = cluster.url.removeprefix("http://")
    for command in (
        [sys.executable, root / "examples/generate.py", address, "Tell me a story."],
        [root / "target/release/examples/generate", cluster.url, "Tell me a story."],
    ):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert len(answer.stdout.strip()) > 10
