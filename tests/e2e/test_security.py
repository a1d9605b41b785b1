"""Keys, quotas and TLS."""

import hashlib
import json
import ssl
import subprocess
import urllib.error
import urllib.request

import openai
import pytest
from conftest import Cluster

ASK = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A cluster whose router asks for keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    hashed = lambda key: hashlib.sha256(key.encode()).hexdigest()
    keys.write_text(
        f"""
        [[tenants]]
        name = "small"
        requests_per_minute = 2

        [[keys]]
        sha256 = "{hashed("sk-large")}"
        tenant = "large"

        [[keys]]
        sha256 = "{hashed("sk-small")}"
        tenant = "small"
        """
    )
    cluster = Cluster(env={"SHOAL_ROUTER_API_KEYS": str(keys)})
    yield cluster
    cluster.stop()


def client(cluster, key):
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=0, timeout=60)


def test_a_key_is_asked_for(guarded):
    with pytest.raises(openai.AuthenticationError):
        client(guarded, "sk-wrong").chat.completions.create(model="", **ASK)
    assert client(guarded, "sk-large").chat.completions.create(model="", **ASK).choices
    assert guarded.get("/health")[0] == 200


def test_tenants_share_no_pages(guarded):
    ask = {**ASK, "messages": [{"role": "user", "content": "Tell me all about it. " * 30}]}
    cached = lambda key: client(guarded, key).chat.completions.create(model="", **ask).usage.prompt_tokens_details.cached_tokens
    assert cached("sk-large") == 0
    assert cached("sk-large") > 100
    assert cached("sk-small") == 0


def test_a_quota_ends_with_429_and_a_time_to_wait(guarded):
    small = client(guarded, "sk-small")
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(4):
            small.chat.completions.create(model="", **ASK)
    assert float(caught.value.response.headers["retry-after"]) > 0
    assert client(guarded, "sk-large").chat.completions.create(model="", **ASK).choices


def test_tls(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    cluster = Cluster(env={"SHOAL_ROUTER_TLS_CERT": str(cert), "SHOAL_ROUTER_TLS_KEY": str(key)})
    try:
        request = urllib.request.Request(
            cluster.url + "/v1/chat/completions", json.dumps(ASK).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(request, timeout=10)
        trusted = ssl.create_default_context(cafile=str(cert))
        with urllib.request.urlopen(request, timeout=20, context=trusted) as answer:
            assert json.load(answer)["choices"]
    finally:
        cluster.stop()
