"""Clusters whose roles meet in etcd: their life, and what etcd does to them."""

import re
import signal
import threading
import time

import openai
from conftest import wait_until
from roles import TTL, etcd, roles  # noqa: F401 (fixtures)


def test_a_cluster_forms_and_shows_itself(etcd, roles):
    one, two = roles("router"), roles("router", "--name", "second")
    worker = roles("worker", "--group", "blue")
    one.becomes_ready("blue")
    two.becomes_ready("blue")
    record = etcd.records()["blue"]
    assert record["state"] == "READY" and record["model"] and record["epoch"] > 0
    assert record["capabilities"]["tensor_parallel"] == 1 and len(record["numerics_id"]) == 64
    assert set(etcd.records("routers")) == {one.address, "second"}
    shown = one.cli("status").stdout
    assert "blue" in shown and "second" in shown and "1 of 1 groups ready" in shown
    epochs = [record["epoch"]]
    assert one.ask().usage.completion_tokens == 16

    # A new start has a new epoch, and takes traffic at once.
    worker.kill()
    assert one.ready() == set() or one.cli("status").returncode == 0
    roles("worker", "--group", "blue")
    wait_until(lambda: etcd.records().get("blue", {}).get("epoch", 0) > epochs[0], 30, "the new epoch")
    wait_until(lambda: etcd.records()["blue"]["state"] == "READY", 30, "the new worker")
    ready = time.monotonic()
    one.becomes_ready("blue")
    print("seconds from READY to traffic:", time.monotonic() - ready)
    assert one.ask().usage.completion_tokens == 16


def test_an_orderly_end_withdraws_the_record_after_the_streams(etcd, roles):
    router = roles("router")
    worker = roles("worker", "--group", "blue")
    router.becomes_ready("blue")
    thread, pieces = router.stream(150)
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: etcd.records()["blue"]["state"] == "DRAINING", 10, "DRAINING in etcd")
    thread.join(60)
    assert worker.process.wait(30) == 0
    assert len("".join(pieces)) > 100
    assert "blue" not in etcd.records()


def test_without_etcd_all_goes_on(etcd, roles):
    router = roles("router")
    roles("worker", "--group", "blue")
    victim = roles("worker", "--group", "green")
    router.becomes_ready("blue", "green")
    undisturbed = router.ask(150).choices[0].message.content
    thread, pieces = router.stream(150)
    etcd.kill()
    killed = time.monotonic()
    assert router.ask().usage.completion_tokens == 16
    # Nor does a death go unseen.
    victim.kill()
    wait_until(lambda: router.ready() == {"blue"}, 10, "the victim's loss")
    thread.join(60)
    assert "".join(pieces) == undisturbed
    # Longer than the records live.
    while time.monotonic() < killed + 1.5 * TTL:
        assert router.ask().usage.completion_tokens == 16

    etcd.run()
    roles("worker", "--group", "red")
    wait_until(lambda: set(etcd.records()) == {"blue", "red"}, 20, "the records' return")
    etcd.compact()
    router.becomes_ready("blue", "red")
    assert router.ask().usage.completion_tokens == 16


def test_lost_leases_are_taken_again(etcd, roles):
    router = roles("router")
    roles("worker", "--group", "blue")
    router.becomes_ready("blue")
    thread, pieces = router.stream(100)
    for lease in etcd.ctl("lease", "list").stdout.split()[1:]:
        if re.fullmatch(r"[0-9a-f]{16}", lease):
            etcd.ctl("lease", "revoke", lease)
    assert etcd.records().keys() <= {"blue"}
    wait_until(lambda: set(etcd.records()) == {"blue"}, 20, "the record's return")
    assert router.ask().usage.completion_tokens == 16
    thread.join(60)
    assert len(pieces) > 50


def test_drains_by_command_and_by_intent(etcd, roles):
    router = roles("router")
    roles("worker", "--group", "blue")
    roles("worker", "--group", "green")
    router.becomes_ready("blue", "green")
    thread, pieces = router.stream(100)
    busy = max(router.groups().values(), key=lambda group: group["placed"])["name"]
    other = ({"blue", "green"} - {busy}).pop()

    # The stream moves at the deadline, and the drain has waited for it.
    drained = router.cli("drain", busy, "--deadline", "300ms")
    assert (drained.returncode, drained.stdout) == (0, f"{busy} is drained\n"), drained.stderr
    assert router.groups()[busy]["placed"] == 0
    assert router.ready() == {other}
    thread.join(60)
    assert "".join(pieces) == router.ask(100).choices[0].message.content
    assert router.cli("undrain", busy).returncode == 0
    router.becomes_ready("blue", "green")

    etcd.ctl("put", f"/shoal/v1/test/intent/{other}", '{"action":"DRAIN"}')
    wait_until(lambda: etcd.records()[other]["state"] == "DRAINING", 10, "the intent's effect")
    router.becomes_ready(busy)
    etcd.ctl("del", f"/shoal/v1/test/intent/{other}")
    router.becomes_ready("blue", "green")

    unknown = router.cli("drain", "nobody")
    assert unknown.returncode == 1 and "no group" in unknown.stderr


def test_a_rolling_restart_under_load_loses_nothing(etcd, roles):
    router = roles("router")
    workers = {name: roles("worker", "--group", name) for name in ("blue", "green")}
    router.becomes_ready(*workers)
    undisturbed = router.ask(60).choices[0].message.content
    stop, answers, errors = threading.Event(), [], []

    def load():
        while not stop.is_set():
            try:
                answers.append(router.ask(60).choices[0].message.content)
            except openai.OpenAIError as error:
                errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for name in list(workers):
        wait_until(lambda: len(answers) > 3, 30, "answers")
        workers[name].stop()
        workers[name] = roles("worker", "--group", name)
        router.becomes_ready(*workers)
        answers_before = len(answers)
        wait_until(lambda: len(answers) > answers_before + 3, 30, "answers")
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert set(answers) == {undisturbed}
