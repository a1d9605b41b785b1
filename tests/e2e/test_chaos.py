"""Workers, ranks, links and etcd fail under load; no client may notice more than a pause."""

import asyncio
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))
import chaos  # noqa: E402


@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [2, 2]], ids=["4 workers", "2 groups of 2"])
def test_answers_survive_faults(groups):
    report, errors = asyncio.run(chaos.run(groups, streams=32, seconds=60))
    print(report)
    assert not errors, errors[:5]
    assert report["faults"].keys() >= {"kill", "stop", "cut", "etcd kill"} and report["resubmissions"] > 0


def test_a_rolling_restart_is_not_noticed():
    report, errors = asyncio.run(chaos.rolling(replicas=3, streams=16))
    print(report)
    assert not errors, errors[:5]
