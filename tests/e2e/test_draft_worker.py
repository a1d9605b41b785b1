"""A draft worker that runs ahead of a worker, here with the model itself."""

import pytest
from conftest import wait_until
from roles import etcd, metric, roles  # noqa: F401 (fixtures)

# Equal in every bit, and slow: the draft worker is to the target as a small model to a large one.
SLOW = {"SHOAL_ISA": "scalar"}


def ask(router, speculation, temperature, tokens=24, **options):
    return router.client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": "Tell me of the sea and of its ships."}],
        max_tokens=tokens,
        temperature=temperature,
        seed=7,
        extra_body={"ignore_eos": True, "speculation": speculation},
        **options,
    )


def text(answer):
    return answer.choices[0].message.content


def pushed(etcd):
    """Draft tokens of the draft worker that were right, at the target."""
    address = etcd.records()["target"]["address"]
    return metric(address, 'engine_accepted_draft_tokens_total{drafter="pushed"}')


@pytest.fixture
def pair(roles):
    """A router, a target, and its draft worker."""
    router = roles("router")
    roles("worker", "--group", "target", env=SLOW)
    drafter = roles("worker", "--group", "drafter", "--role", "draft")
    router.becomes_ready("target", "drafter")
    return router, drafter


def test_drafts_are_right_and_change_no_token(etcd, pair):
    router, _ = pair
    assert etcd.records()["drafter"]["role"] == "draft"
    assert len(router.client.models.list().data) == 1
    for temperature in (0, 0.7):
        expected = text(ask(router, "off", temperature))
        before = pushed(etcd)
        assert text(ask(router, 4, temperature)) == expected
        assert pushed(etcd) > before, f"none was right at {temperature}"
    assert metric(router.address, "led_right_tokens_total") > 0
    # The draft worker lets go of what it ran ahead of.
    drafter = etcd.records()["drafter"]["address"]
    wait_until(lambda: metric(drafter, "engine_running_sequences") == 0, 10, "the end of the leads")


def test_the_loss_of_the_draft_worker_changes_nothing(etcd, pair):
    router, drafter = pair
    expected = text(ask(router, "off", 0.7, 48))
    before, pieces = pushed(etcd), []
    for chunk in ask(router, 4, 0.7, 48, stream=True):
        pieces.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
        if drafter.process.poll() is None and pushed(etcd) > before:
            drafter.kill()
    assert drafter.process.poll() is not None, "it never drafted"
    assert "".join(pieces) == expected
    assert text(ask(router, 4, 0.7, 48)) == expected
