"""Workers die, stop and restart under load; no client may notice more than a pause."""

import asyncio
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))
import chaos  # noqa: E402

def test_answers_survive_random_kills_and_stops():
    report, errors = asyncio.run(chaos.run(replicas=4, streams=32, seconds=60))
    print(report)
    assert not errors, errors[:5]
    assert report["faults"].keys() == {"kill", "stop"} and report["resubmissions"] > 0


def test_a_rolling_restart_is_not_noticed():
    report, errors = asyncio.run(chaos.rolling(replicas=3, streams=16))
    print(report)
    assert not errors, errors[:5]
