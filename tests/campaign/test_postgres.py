"""Tests of the campaign on PostgreSQL: it kills processes and the server, and ends and cuts connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .campaign import Child, until
from .postgres_campaign import PostgresCampaign, on_own_server
from .test_campaign import prove

pytestmark = pytest.mark.postgres


@pytest.fixture
def campaign(tmp_path: Path) -> Iterator[PostgresCampaign]:
    with on_own_server(tmp_path, seed=33) as made:
        yield made


def goes_on(campaign: PostgresCampaign, child: Child) -> bool:
    """Wait until a process submits one more task."""

    def accepted() -> int:
        return sum(e.what == "accepted" and e.who == child.who for e in campaign.events())

    before = accepted()
    return bool(until(lambda: accepted() > before, "a task is submitted"))


def test_random_kills_cuts_and_restarts_break_no_promise(campaign):
    campaign.storm(kills=3)
    for hears in (True, False):
        child = campaign.spawn(retries=hears, seconds=60, workers=4)
        campaign.wait_for("end", who=child.who, outcome="returned")
        for how in campaign.disturbances:
            campaign.disturb(campaign.proxies[child.who], how, 0.2)
        campaign.restart_server()
        assert goes_on(campaign, child)
        child.kill()
    outcome = prove(campaign)
    assert Counter(event.what for event in outcome.events)["killed"] >= 2
    assert any(task.status == "completed" for task in outcome.records.values())
