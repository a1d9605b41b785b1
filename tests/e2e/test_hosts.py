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
            "--rank-payload", "f32", "--listen", WIDE, *SMALL,
        )

    def join(self, rank=1, world=2, secret=None, *arguments):
        return self.hosts.run(
            "b", "worker", "--tensor-parallel", world, "--rank", rank, "--join", RANKS,
            "--rank-secret", secret or self.secret, "--threads", 1, *arguments,
        )

    def streams_over(self, fault, streams=4):
        """Streams that begin at the group between the hosts, and may go on at the other."""

        def after_undrain():
            self.operate("undrain", LOCAL)
            fault()

        self.operate("drain", LOCAL)
        streams_over(self.both, after_undrain, streams)

    def operate(self, *arguments):
        subprocess.run([BINARY, *arguments, "--url", self.both.url], check=True, capture_output=True)

    def whole(self):
        """Waits until the group serves."""
        wait_until(lambda: ready(WIDE), 30, "the group")


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
    with site.rank_0.saying("waiting for ranks"):
        site.streams_over(site.rank_1.kill)
    assert not ready(WIDE) and ready(LOCAL)
    wait_until(lambda: site.both.states()[WIDE] == "starting", 10, "what the router sees")
    with site.rank_0.saying("the group is whole"):
        site.rank_1 = site.join()
    site.whole()
    streams_over(site.routers[WIDE], lambda: None, streams=2)


def test_streams_go_on_when_the_link_is_cut_and_the_rank_comes_again(site):
    with site.rank_0.saying("waiting for ranks"):
        site.streams_over(site.hosts.cut)
    assert not ready(WIDE)
    with site.rank_0.saying("the group is whole"), site.rank_1.saying("the weights are here already"):
        site.hosts.mend()
    site.whole()
    streams_over(site.routers[WIDE], lambda: None, streams=2)


def test_streams_go_on_when_a_rank_elsewhere_hangs(site):
    with site.rank_0.saying("waiting for ranks"):
        site.streams_over(lambda: site.rank_1.signal(signal.SIGSTOP), streams=2)
    with site.rank_0.saying("the group is whole"), site.rank_1.saying("the weights are here already"):
        site.rank_1.signal(signal.SIGCONT)
    site.whole()


def test_a_link_that_is_cut_while_nobody_asks_is_noticed_at_both_ends(site):
    with site.rank_0.saying("waiting for ranks"), site.rank_1.saying("cannot be reached"):
        site.hosts.cut()
    assert not ready(WIDE)
    with site.rank_0.saying("the group is whole"):
        site.hosts.mend()
    site.whole()
    assert ask(site.routers[WIDE], 1).usage.completion_tokens == 200


def test_ranks_keep_their_weights_when_rank_0_dies(site):
    with site.rank_1.saying("the weights are here already"):
        site.streams_over(site.rank_0.kill)
        site.rank_0 = site.lead()
    site.whole()
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
    with site.rank_0.saying("waiting for ranks"):
        site.rank_1.kill()
    stranger = site.join(1, 2, None, "--model", other)
    assert stranger.end() == 1
    assert stranger.says("other weights or another version"), stranger.lines
    site.rank_0.wait_for("other weights or another version")
    site.rank_1 = site.join()
    site.whole()


def test_rank_0_drains_and_ends_with_its_ranks_there_or_not(site):
    undisturbed = ask(site.routers[LOCAL], 1).choices[0].message.content
    text = ""
    for i, chunk in enumerate(ask(site.routers[WIDE], 1, stream=True)):
        text += chunk.choices[0].delta.content or ""
        if i == 5:
            site.rank_0.signal(signal.SIGTERM)
    assert text == undisturbed
    with site.rank_1.saying("cannot be reached"):
        assert site.rank_0.end() == 0
    site.rank_0 = site.lead()
    site.whole()
    with site.rank_0.saying("waiting for ranks"):
        site.rank_1.signal(signal.SIGTERM)
        assert site.rank_1.end() == 0
    started = time.monotonic()
    site.rank_0.signal(signal.SIGTERM)
    assert site.rank_0.end() == 0
    assert time.monotonic() - started < 10
