"""Duties: when a round takes a step of one, and when the next step is needed."""

from __future__ import annotations

import pytest
from helpers import housekeeper_of, joined_node

from taskx.node import housekeeper
from taskx.node.housekeeper import Duty
from taskx.tasks.bell import Agenda


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(housekeeper, "time", made)
    return made


@pytest.fixture
def rounds(make_queue, clock):
    """Makes rounds of a housekeeper that has no thread, with these duties only."""
    node = joined_node(make_queue())
    keeper = node._housekeeper

    def do(*duties: Duty, after: float = 0.0) -> None:
        keeper.duties = duties
        clock.now += after
        keeper.tick()

    yield do
    node.withdraw()


def test_a_duty_without_an_interval_takes_a_step_in_every_round(rounds):
    steps = []
    duty = Duty("note", steps.append)
    rounds(duty)
    rounds(duty)
    assert len(steps) == 2


def test_a_duty_with_an_interval_takes_a_step_when_it_has_passed(rounds):
    steps = []
    duty = Duty("note", steps.append, every=10.0)
    rounds(duty)
    rounds(duty, after=8.0)
    assert len(steps) == 1
    rounds(duty, after=2.0)
    assert len(steps) == 2


def test_a_duty_that_has_left_something_goes_on_in_the_next_round(rounds):
    left = [True, True, False]
    duty = Duty("work", lambda until: left.pop(0), every=3600.0)
    for _ in range(5):
        rounds(duty)
    assert left == []
    assert not duty.more


def test_a_duty_that_fails_stops_the_round_and_lets_the_others_come_first(rounds):
    done = []

    def fail(until):
        done.append("fails")
        raise OSError("away")

    failing = Duty("fails", fail, every=10.0)
    failing.more = True
    other = Duty("other", lambda until: done.append("other"))
    with pytest.raises(OSError, match="away"):
        rounds(failing, other)
    rounds(failing, other)
    assert done == ["fails", "other"]


def test_a_round_ends_the_steps_when_its_time_is_up(rounds, clock):
    given = []
    rounds(Duty("first", given.append), Duty("second", given.append))
    assert given == [clock.now + 0.01] * 2


def test_each_duty_has_a_name_of_its_own(make_queue):
    with make_queue() as queue:
        names = [duty.name for duty in housekeeper_of(queue).duties]
    assert len(names) == len({*names})


def test_a_delayed_task_is_noticed_that_is_stored_while_the_time_of_the_next_one_counts_as_known():
    class Raced(Agenda):
        """An agenda on which another thread posts a task right after each look."""

        known = False

        @property
        def due_known(self) -> bool:
            known, self.known = self.known, False
            return known

        @due_known.setter
        def due_known(self, known: bool) -> None:
            self.known = known

    agenda = Raced()
    assert agenda.claim_due()
    assert not agenda.claim_due()
    assert agenda.claim_due()
