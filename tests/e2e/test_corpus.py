"""Text that drafts in a cluster of several routers."""

import subprocess

from conftest import BINARY, wait_until
from roles import etcd, metric, roles  # noqa: F401 (fixtures)

TOKENS = 48
SEA, HILL = "Tell me of the sea and of its ships.", "Tell me of a hill and of the trees on it."


def ask(router, user=None, speculation=8, question=SEA):
    """An answer, of which drafts are verified."""
    return router.client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": question}],
        max_tokens=TOKENS,
        temperature=0,
        user=user or "",
        extra_body={"ignore_eos": True, "speculation": speculation},
    ).choices[0].message.content


def accepted(etcd, group, drafter):
    """Draft tokens of a drafter that were right, at a worker."""
    address = etcd.records()[group]["address"]
    return metric(address, f'engine_accepted_draft_tokens_total{{drafter="{drafter}"}}')


def drafts(etcd, group, router, drafter, user=None, question=SEA):
    """How many tokens of an answer a drafter had right."""
    before = accepted(etcd, group, drafter)
    ask(router, user, question=question)
    return accepted(etcd, group, drafter) - before


def corpus(router, *arguments, **options):
    done = subprocess.run(
        [BINARY, "corpus", *arguments, "--url", f"http://{router.address}"],
        capture_output=True, text=True, timeout=60, **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(router, name, text):
    corpus(router, "load", "-", "--name", name, input=text)


def test_routers_share_what_drafts_and_forget_together(etcd, roles):
    one, two = roles("router"), roles("router")
    first = roles("worker", "--group", "first")
    one.becomes_ready("first")
    two.becomes_ready("first")
    load(one, "ready", "Nothing of the sea.")
    wait_until(lambda: "ready" in corpus(two, "list"), 20, "the text at the other router")

    # Three users of two routers: what all were answered drafts for a fourth.
    answer = ask(one, "alice", "off")
    for router, user in [(two, "bob"), (one, "carol")]:
        assert ask(router, user, "off") == answer
    wait_until(lambda: drafts(etcd, "first", two, "tenant") > 0, 20, "shared text")

    # A router is lost, and with the worker all that it was told: the other one tells a new one.
    received = lambda: metric(two.address, "corpus_received_entries_total")
    wait_until(lambda: received() >= 3, 20, "a text and two answers")
    one.kill()
    first.kill()
    roles("worker", "--group", "second")
    two.becomes_ready("second")
    wait_until(lambda: drafts(etcd, "second", two, "user", "alice") > 0, 30, "alice's text of the lost router")

    # A new router has it all from the other; public text of one drafts at the other.
    three = roles("router")
    three.becomes_ready("second")
    wait_until(lambda: "ready" in corpus(three, "list"), 20, "the text at the new router")
    load(two, "hill", ask(two, question=HILL))
    wait_until(lambda: "hill" in corpus(three, "list"), 20, "the public text at the new router")
    wait_until(lambda: drafts(etcd, "second", three, "public", question=HILL) > 0, 20, "public text")

    # What one forgets, both forget, and the worker.
    corpus(three, "drop", "hill")
    wait_until(lambda: "hill" not in corpus(two, "list"), 20, "the drop at the other router")
    corpus(three, "erase", "--user", "alice")
    # Once the worker has heard of this, it has heard of what the router said before.
    wait_until(lambda: drafts(etcd, "second", two, "user", "dave") > 0, 20, "dave's text")
    assert drafts(etcd, "second", two, "user", "alice") == 0
    wait_until(lambda: drafts(etcd, "second", three, "user", "alice") > 0, 20, "alice's new text")
