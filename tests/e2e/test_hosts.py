"""A worker whose model is shared between two hosts."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest
from conftest import BINARY, wait_until
from hosts import Hosts
from test_group import ask, streams_over

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)

RANKS, WIDE, LOCAL = f"{Hosts.A}:7001", f"{Hosts.FRONT}:9091", f"{Hosts.FRONT}:9092"
SMALL = ["--threads", "1", "--kv-size", "64MiB"]


class Site:
    """On host `a` a router before rank 0 of a group between the hosts, and before a group of that
    host alone, which computes the same; on host `b` rank 1."""

    def __init__(self, directory):
        self.hosts = Hosts()
        self.secret = directory / "secret"
        self.secret.write_text("known to the ranks alone\n")
        try:
            local = ["--tensor-parallel", "2", "--listen", LOCAL, *SMALL]
            self.local = self.hosts.run("a", "worker", *local)
            self.rank_0, self.rank_1 = self.lead(), self.join()
            self.routers = {}
            for port, workers in enumerate((f"{WIDE},{LOCAL}", WIDE, LOCAL), 8080):
                address = f"{Hosts.FRONT}:{port}"
                self.hosts.run("a", "router", "--workers", workers, "--listen", address)
                self.routers[workers] = Router(f"http://{address}")
            self.both = self.routers[f"{WIDE},{LOCAL}"]
            wait_until(lambda: all(ready(address) for address in (WIDE, LOCAL)), 30, "the workers")
            wait_until(lambda: all(r.ready() for r in self.routers.values()), 30, "the routers")
        except BaseException:
            self.hosts.stop()
            raise

    def lead(self):
        return self.hosts.run(
            "a", "worker", "--tensor-parallel", 2, "--rank-listen", RANKS, "--rank-secret", self.secret,
            "--rank-payload", "f32", "--rank-timeout", "1s", "--listen", WIDE, *SMALL,
        )

    def join(self, rank=1, world=2, secret=None, *arguments):
        return self.hosts.run(
            "b", "worker", "--tensor-parallel", world, "--rank", rank, "--join", RANKS,
            "--rank-secret", secret or self.secret, "--threads", 1, *arguments,
        )

    def whole(self, times):
        """Waits until the group has met so often."""
        self.rank_0.wait_for("the group is whole", times)
        wait_until(lambda: ready(WIDE), 10, "the group")


class Router:
    def __init__(self, url):
        self.url = url

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=60)

    def ready(self):
        return ready(self.url.removeprefix("http://"))

    def states(self):
        """The state of every group."""
        status = subprocess.run(
            [BINARY, "status", "--json", "--url", self.url], capture_output=True, text=True, check=True
        )
        return {group["name"]: group["state"] for group in json.loads(status.stdout)["groups"]}


def ready(address):
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    started = Site(tmp_path_factory.mktemp("site"))
    yield started
    started.hosts.stop()


def test_two_hosts_give_the_tokens_of_one(site):
    for number in range(4):
        wide, local = (ask(site.routers[w], number).choices[0].message.content for w in (WIDE, LOCAL))
        assert wide == local
    # It was weighed, and a small model is too small.
    assert site.rank_0.says("what a token saves in reading weights") == 1


def test_streams_go_on_when_a_rank_elsewhere_is_killed_and_one_comes_again(site):
    met = site.rank_0.says("the group is whole")
    streams_over(site.both, site.rank_1.kill, streams=4)
    site.rank_0.wait_for("waiting for ranks")
    assert not ready(WIDE) and ready(LOCAL)
    wait_until(lambda: site.both.states()[WIDE] == "starting", 10, "what the router sees")
    site.rank_1 = site.join()
    site.whole(met + 1)
    streams_over(site.routers[WIDE], lambda: None, streams=2)


def test_streams_go_on_when_the_link_is_cut_and_the_rank_comes_again(site):
    met, kept = site.rank_0.says("the group is whole"), site.rank_1.says("the weights are here already")
    try:
        streams_over(site.both, site.hosts.cut, streams=4)
        site.rank_0.wait_for("waiting for ranks", 2)
        assert not ready(WIDE)
    finally:
        site.hosts.mend()
    site.whole(met + 1)
    assert site.rank_1.says("the weights are here already") == kept + 1
    streams_over(site.routers[WIDE], lambda: None, streams=2)


def test_a_link_that_is_cut_while_nobody_asks_is_noticed(site):
    met = site.rank_0.says("the group is whole")
    site.hosts.cut()
    try:
        wait_until(lambda: not ready(WIDE), 20, "the loss")
        # The rank sees it, too, and does not wait for ever.
        site.rank_1.wait_for("cannot be reached")
    finally:
        site.hosts.mend()
    site.whole(met + 1)
    assert ask(site.routers[WIDE], 1).usage.completion_tokens == 200


def test_ranks_keep_their_weights_when_rank_0_dies(site):
    kept = site.rank_1.says("the weights are here already")
    streams_over(site.both, site.rank_0.kill, streams=4)
    site.rank_0 = site.lead()
    site.whole(1)
    assert site.rank_1.says("the weights are here already") == kept + 1
    assert ask(site.routers[WIDE], 1).usage.completion_tokens == 200


def test_who_does_not_belong_is_told_so_and_so_is_rank_0(site, tmp_path):
    (tmp_path / "secret").write_text("known to nobody else\n")
    other = tmp_path / "other.gguf"
    shape = "--layers 2 --width 256 --heads 4 --kv-heads 2 --ff 512 --vocab 1024".split()
    subprocess.run([BINARY, "model", "random", other, *shape], check=True, capture_output=True)
    for stranger, theirs, ours in [
        (site.join(secret=tmp_path / "secret"), "secret is not this rank's", "its secret is not the group's"),
        (site.join(world=3), "the group has 2 ranks", "the group has 2 ranks"),
        (site.join(), "another process is this rank already", "another process is this rank already"),
    ]:
        assert stranger.end() == 1
        assert stranger.says(theirs), stranger.lines
        site.rank_0.wait_for(ours)
    site.rank_1.kill()
    site.rank_0.wait_for("waiting for ranks")
    stranger = site.join(1, 2, None, "--model", other)
    assert stranger.end() == 1
    assert stranger.says("other weights or another version"), stranger.lines
    site.rank_0.wait_for("other weights or another version")
    met = site.rank_0.says("the group is whole")
    site.rank_1 = site.join()
    site.whole(met + 1)


def test_rank_0_drains_and_ends_with_its_ranks_there_or_not(site):
    undisturbed = ask(site.routers[LOCAL], 1).choices[0].message.content
    text = ""
    for i, chunk in enumerate(ask(site.routers[WIDE], 1, stream=True)):
        text += chunk.choices[0].delta.content or ""
        if i == 5:
            site.rank_0.signal(signal.SIGTERM)
    assert text == undisturbed
    assert site.rank_0.end() == 0
    site.rank_1.wait_for("cannot be reached")
    site.rank_0 = site.lead()
    site.whole(1)
    site.rank_1.signal(signal.SIGTERM)
    assert site.rank_1.end() == 0
    site.rank_0.wait_for("waiting for ranks")
    started = time.monotonic()
    site.rank_0.signal(signal.SIGTERM)
    assert site.rank_0.end() == 0
    assert time.monotonic() - started < 10
