"""The rules by which a supervisor starts, replaces and stops its processes."""

from __future__ import annotations

import errno
import itertools
import os
import signal

import pytest

from taskx.programs.worker.fleet import Fleet, backoff
from taskx.programs.worker.settings import AWAY, RECYCLE
from taskx.tasks.timing import DEFAULT_TIMING

KILLED = -signal.SIGKILL


class Handle:
    """A process that only notes what is done to it."""

    pids = itertools.count(100)

    def __init__(self, place):
        self.place = place
        self.pid = next(self.pids)
        self.orders = []
        self.killed = False

    def say(self, *message):
        self.orders += message

    def kill(self):
        self.killed = True


class Driven:
    """A fleet with a clock that the test moves."""

    def __init__(self, count=2, **options):
        self.now = 0.0
        self.spawned = []
        self.system_is_full = options.pop("system_is_full", False)
        self.fleet = Fleet(count, 30.0, self._spawn, lambda: self.now, **options)
        self.fleet.step()

    def _spawn(self, place):
        if self.system_is_full:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.spawned.append(Handle(place))
        return self.spawned[-1]

    def member(self, handle):
        return next(member for member in self.fleet.members() if member.handle is handle)

    def beat(self, *handles, healthy=True, problems=(), shared=True):
        for handle in handles:
            facts = {"healthy": healthy, "problems": problems, "shared": shared}
            self.fleet.heard(self.member(handle), "beat", facts)

    def hear(self, handle, *message):
        self.fleet.heard(self.member(handle), *message)
        self.fleet.step()

    def end(self, handle, status=0):
        self.fleet.ended(self.member(handle), status)
        self.fleet.step()

    def wait(self, seconds):
        self.now += seconds
        self.fleet.step()

    def new(self, before):
        """Return the handles that were started after the first ``before`` ones."""
        return self.spawned[before:]


@pytest.fixture
def driven():
    """A fleet of two processes that are ready."""
    made = Driven()
    made.beat(*made.spawned)
    return made


# Starting


def test_a_fleet_has_begun_when_all_its_queues_have_started():
    driven = Driven(count=2)
    first, second = driven.spawned
    driven.beat(first)
    assert not driven.fleet.begun
    driven.beat(second)
    assert driven.fleet.begun


def test_a_fleet_has_begun_also_if_the_queues_have_not_started_at_the_same_time():
    driven = Driven(count=2)
    first, second = driven.spawned
    driven.beat(first)
    driven.hear(first, "leaving", "it has run 10 tasks")
    driven.beat(second)
    assert driven.fleet.begun
    driven.end(second, KILLED)
    assert not driven.fleet.stops


def test_a_process_that_cannot_start_at_first_ends_the_worker_with_its_reason():
    driven = Driven(count=2)
    bad, good = driven.spawned
    driven.beat(good)
    driven.hear(bad, "failed", AWAY, "the disk is full")
    driven.end(bad, AWAY)
    assert good.orders == ["stop"]
    driven.end(good)
    assert driven.fleet.over
    assert driven.fleet.code == AWAY
    assert driven.fleet.fatal[1].endswith("cannot start: the disk is full")
    assert len(driven.spawned) == 2


def test_a_process_that_is_killed_before_it_is_ready_ends_the_worker_at_first():
    driven = Driven(count=1)
    driven.end(driven.spawned[0], KILLED)
    assert (driven.fleet.over, driven.fleet.code) == (True, 1)


def test_a_process_that_waits_for_a_change_does_not_end_the_worker():
    driven = Driven(count=1, patient=True)
    (bad,) = driven.spawned
    driven.hear(bad, "failed", 2, "there is no module 'app'")
    assert driven.fleet.problems() == ["Process 1 is down: there is no module 'app'."]
    driven.end(bad, RECYCLE)
    (good,) = driven.new(1)
    driven.beat(good)
    assert driven.fleet.begun
    assert driven.fleet.problems() == []


# Restarts


def test_a_process_that_dies_is_replaced_at_once_and_then_after_a_growing_back_off(driven):
    waits = []
    dying = driven.spawned[0]
    for _ in range(8):
        count, began = len(driven.spawned), driven.now
        driven.end(dying, KILLED)
        while len(driven.spawned) == count:
            driven.wait(1)
        waits.append(driven.now - began)
        dying = driven.spawned[-1]
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]


def test_a_process_that_has_run_for_a_minute_is_replaced_at_once(driven):
    dying = driven.spawned[0]
    for _ in range(3):
        driven.end(dying, 1)
        driven.wait(30)
        dying = driven.spawned[-1]
    driven.beat(dying)
    driven.wait(DEFAULT_TIMING.proven_after)
    count = len(driven.spawned)
    driven.end(dying, 1)
    assert len(driven.spawned) == count + 1


def test_a_process_that_the_system_cannot_start_is_tried_again_after_the_back_off(driven):
    driven.system_is_full = True
    driven.end(driven.spawned[0], KILLED)
    (problem,) = driven.fleet.problems()
    assert "Process 1 is down: it cannot be started: " in problem
    assert os.strerror(errno.EAGAIN) in problem
    assert [member.handle for member in driven.fleet.members()] == [driven.spawned[1]]
    driven.system_is_full = False
    driven.wait(1.0)
    (another,) = driven.new(2)
    driven.beat(another)
    assert driven.fleet.problems() == []


def test_a_worker_whose_first_process_the_system_cannot_start_ends():
    driven = Driven(count=2, system_is_full=True)
    assert (driven.fleet.over, driven.fleet.code) == (True, 1)
    assert "cannot be started" in driven.fleet.fatal[1]
    assert driven.spawned == []


def test_the_back_off_has_a_bound_whatever_the_number_of_deaths():
    assert backoff(10**9, 30.0) == 30.0


def test_a_place_without_a_process_is_a_problem_until_the_next_one_is_ready(driven):
    driven.end(driven.spawned[0], KILLED)
    assert driven.fleet.problems() == ["Process 1 is down: it was killed by SIGKILL."]
    driven.beat(driven.spawned[-1])
    assert driven.fleet.problems() == []


# Replacing


def test_processes_are_replaced_one_by_one_and_each_stops_after_its_successor_is_ready(driven):
    old = list(driven.spawned)
    driven.fleet.replace()
    driven.fleet.step()
    (first,) = driven.new(2)
    assert [one.orders for one in old] == [[], []]
    driven.beat(first)
    assert [one.orders for one in old] == [["stop"], []]
    driven.fleet.step()
    _, second = driven.new(2)
    driven.beat(second)
    assert [one.orders for one in old] == [["stop"], ["stop"]]
    assert not driven.fleet.replacing
    for one in old:
        driven.end(one)
    assert len(driven.spawned) == 4


def test_the_old_processes_go_on_if_the_new_code_cannot_start(driven):
    old = list(driven.spawned)
    driven.fleet.replace()
    driven.fleet.step()
    (broken,) = driven.new(2)
    driven.hear(broken, "failed", 2, "SyntaxError")
    driven.end(broken, 2)
    assert len(driven.spawned) == 3
    assert [one.orders for one in old] == [[], []]
    assert not driven.fleet.replacing
    assert driven.fleet.problems() == []


def test_the_old_processes_go_on_if_the_system_cannot_start_a_new_one(driven):
    driven.system_is_full = True
    driven.fleet.replace()
    driven.fleet.step()
    assert [member.handle for member in driven.fleet.members()] == driven.spawned
    assert [one.orders for one in driven.spawned] == [[], []]
    assert not driven.fleet.replacing
    assert driven.fleet.problems() == []


def test_another_replacement_takes_the_place_of_one_whose_start_hangs(driven):
    driven.fleet.replace()
    driven.fleet.step()
    (hanging,) = driven.new(2)
    driven.fleet.replace()
    driven.fleet.step()
    assert hanging.orders == ["stop"]
    (_, corrected) = driven.new(2)
    driven.beat(corrected)
    assert driven.fleet.places[0].member.handle is corrected


def test_a_process_that_dies_during_its_replacement_leaves_its_place_to_the_successor(driven):
    driven.fleet.replace()
    driven.fleet.step()
    driven.end(driven.spawned[0], KILLED)
    successor, *_ = driven.new(2)
    assert driven.fleet.places[0].member.handle is successor


def test_a_replacement_starts_processes_at_once_that_wait_for_their_back_off(driven):
    driven.end(driven.spawned[0], KILLED)
    driven.end(driven.spawned[-1], KILLED)
    assert driven.fleet.places[0].member is None
    driven.fleet.replace()
    driven.fleet.step()
    assert driven.fleet.places[0].member is not None


def test_a_process_that_asks_to_be_replaced_gets_a_successor_while_it_drains(driven):
    old = driven.spawned[0]
    driven.hear(old, "leaving", "it has run 1000 tasks")
    (successor,) = driven.new(2)
    assert successor.place == 1
    driven.end(old, RECYCLE)
    assert len(driven.spawned) == 3


def test_a_process_that_does_not_end_after_it_asked_to_be_replaced_is_killed(driven):
    old = driven.spawned[0]
    driven.hear(old, "leaving", "it is 60 s old")
    driven.wait(30.0 + DEFAULT_TIMING.end_within - 1)
    assert not old.killed
    driven.wait(1)
    assert old.killed


def test_one_of_several_processes_that_still_starts_goes_on_until_its_successor_is_ready():
    driven = Driven(count=2)
    starting, ready = driven.spawned
    driven.beat(ready)
    driven.fleet.replace()
    driven.fleet.step()
    (successor,) = driven.new(2)
    driven.beat(starting)
    assert [starting.orders, ready.orders] == [[], []]
    driven.beat(successor)
    assert [starting.orders, ready.orders] == [["stop"], []]


@pytest.fixture
def alone():
    """A fleet of one process, which is ready and whose repository is for one process."""
    made = Driven(count=1)
    made.beat(*made.spawned, shared=False)
    return made


def test_a_process_that_must_be_alone_ends_before_its_successor_starts(alone):
    (old,) = alone.spawned
    alone.fleet.replace()
    alone.fleet.step()
    assert old.orders == ["stop"]
    assert alone.new(1) == []
    assert alone.fleet.replacing
    alone.end(old)
    (successor,) = alone.new(1)
    assert alone.fleet.replacing
    alone.beat(successor, shared=False)
    assert not alone.fleet.replacing
    assert alone.fleet.problems() == []


def test_a_process_that_must_be_alone_and_asks_to_be_replaced_ends_first(alone):
    (old,) = alone.spawned
    alone.hear(old, "leaving", "it is 60 s old")
    alone.wait(1)
    assert alone.new(1) == []
    alone.end(old, RECYCLE)
    assert len(alone.new(1)) == 1


def test_a_process_whose_repository_is_not_known_yet_ends_before_its_successor_starts():
    driven = Driven(count=1)
    (starting,) = driven.spawned
    driven.fleet.replace()
    driven.fleet.step()
    assert starting.orders == ["stop"]
    assert driven.new(1) == []
    driven.end(starting)
    assert len(driven.new(1)) == 1


# Stopping


def test_a_stop_is_clean_if_all_processes_end_by_themselves(driven):
    driven.fleet.stop()
    assert [one.orders for one in driven.spawned] == [["stop"], ["stop"]]
    for one in driven.spawned:
        driven.end(one)
    assert (driven.fleet.over, driven.fleet.code) == (True, 0)
    assert len(driven.spawned) == 2


def test_a_process_that_does_not_stop_in_time_is_killed_and_the_exit_code_says_so(driven):
    slow, quick = driven.spawned
    driven.fleet.stop()
    driven.end(quick)
    driven.wait(30.0 + DEFAULT_TIMING.end_within)
    assert slow.killed
    driven.end(slow, KILLED)
    assert (driven.fleet.over, driven.fleet.code) == (True, 1)


def test_a_second_stop_is_at_once_and_a_third_one_kills(driven):
    slow = driven.spawned[0]
    driven.fleet.stop()
    driven.fleet.stop()
    assert slow.orders == ["stop", "now"]
    driven.wait(DEFAULT_TIMING.end_within)
    assert slow.killed
    other = driven.spawned[1]
    other.killed = False
    driven.fleet.stop()
    assert other.killed


def test_processes_that_start_or_drain_are_stopped_too(driven):
    draining = driven.spawned[0]
    driven.hear(draining, "leaving", "it is old")
    driven.fleet.stop()
    assert [one.orders for one in driven.spawned] == [["stop"]] * 3
    for one in driven.spawned:
        driven.end(one)
    assert driven.fleet.over


def test_nothing_is_replaced_after_a_stop(driven):
    driven.fleet.stop()
    driven.fleet.replace()
    driven.wait(1)
    assert len(driven.spawned) == 2


# Health


def test_a_silent_process_is_a_problem(driven):
    driven.wait(DEFAULT_TIMING.beat_within + 1)
    driven.beat(driven.spawned[0])
    (problem,) = driven.fleet.problems()
    assert problem.startswith("The process 2 (pid ")


def test_a_replaced_process_that_hangs_at_its_start_is_a_problem(driven):
    driven.hear(driven.spawned[0], "leaving", "it has run 10 tasks")
    (hanging,) = driven.new(2)
    driven.wait(DEFAULT_TIMING.beat_within + 1)
    driven.beat(driven.spawned[1])
    said = f"The process 1 (pid {hanging.pid}) has said nothing for 31 s."
    assert driven.fleet.broken() == driven.fleet.problems() == [said]
    driven.beat(hanging)
    assert driven.fleet.problems() == []


def test_the_first_start_may_take_its_time():
    driven = Driven(count=1)
    driven.wait(DEFAULT_TIMING.beat_within + 1)
    assert driven.fleet.problems() == []


def test_an_unhealthy_queue_is_a_problem(driven):
    driven.beat(driven.spawned[1], healthy=False)
    (problem,) = driven.fleet.problems()
    assert "is not healthy" in problem
    assert driven.fleet.broken() == [problem]


def test_what_a_process_finds_wrong_is_a_problem_that_another_process_would_have_too(driven):
    sentence = "The repository cannot be used: connection refused."
    driven.beat(driven.spawned[1], problems=[sentence])
    (problem,) = driven.fleet.problems()
    assert problem == f"In process 2 (pid {driven.spawned[1].pid}): {sentence}"
    assert driven.fleet.broken() == []
    driven.beat(driven.spawned[1], problems=[])
    assert driven.fleet.problems() == []
