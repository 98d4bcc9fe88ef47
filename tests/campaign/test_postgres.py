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


def told(campaign: PostgresCampaign, what: str, **like: str) -> int:
    """Return how many such events there were."""
    events = [event for event in campaign.events() if event.what == what]
    return sum(all(getattr(e, name) == value for name, value in like.items()) for e in events)


def goes_on(campaign: PostgresCampaign, child: Child) -> None:
    """Wait until a process submits one more task, or ends: a task may kill it. The proof finds hangs."""
    before = told(campaign, "accepted", who=child.who)

    def going() -> bool:
        return child.ended() or told(campaign, "accepted", who=child.who) > before

    until(going, "a task is submitted")


def test_random_kills_cuts_and_restarts_break_no_promise(campaign):
    campaign.storm(kills=3)
    for hears in (True, False):
        before = told(campaign, "end", outcome="returned")
        returns = lambda: told(campaign, "end", outcome="returned") > before  # noqa: E731, B023
        child = campaign.mix_until(returns, "a task returns", retries=hears)
        for how in campaign.disturbances:
            campaign.disturb(campaign.proxies[child.who], how, 0.2)
        campaign.restart_server()
        goes_on(campaign, child)
        if not child.ended():
            child.kill()
    outcome = prove(campaign)
    assert Counter(event.what for event in outcome.events)["dead"] >= 5
    assert any(task.status == "completed" for task in outcome.records.values())
