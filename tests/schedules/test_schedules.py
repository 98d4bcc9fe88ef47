"""Schedules: each tick gets one task, even if declared often, and whatever the clock does."""

from __future__ import annotations

import json
import logging
import threading
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import pairwise
from random import Random
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import attrs
import pytest
from helpers import (
    PATIENCE,
    eventually,
    frequent_checks,
    housekeeper_of,
    ids,
    parts_of,
    pool_of,
    storing,
    whole_round,
)
from storage.repositories import MAKERS, TinyRepository, coded

from taskx import (
    Codec,
    Config,
    ConfigurationError,
    Hook,
    PayloadError,
    Queue,
    QueueStopped,
    RepositoryUnavailable,
    RetryPolicy,
    ScheduleNotFound,
    Task,
    TaskFilter,
    UnknownTaskType,
    every,
    open_repository,
    tick_of,
)
from taskx.node import ticker as ticker_module
from taskx.node.node import LocalNode
from taskx.node.schedules import PREFIX
from taskx.node.ticker import Ticker
from taskx.tasks.clock import to_ms
from taskx.tasks.ticks import BATCH
from taskx.tasks.writes import Insert
from taskx.testing import ManualClock

NOON = datetime(2026, 3, 27, 12, tzinfo=timezone.utc)  # two days before the clocks go forward
HOUR, DAY = 3600, 86400


def ticker_of(queue, *chance):
    parts = parts_of(queue)
    about = (parts.hooks, parts.clock, parts.log, parts.timing)
    return Ticker(parts.moves, parts.agenda, *about, *chance)


@pytest.fixture
def clock():
    return ManualClock(NOON)


@pytest.fixture
def make(make_queue, clock):
    """Return a function that makes queues with a type of another process, so its tasks stay pending.

    They store schedules at once, as if they were started.
    """

    def make(on=None, **options):
        queue = make_queue(on, **{"worker_num": 1, "clock": clock, **options})
        queue.declare("remote")
        return storing(queue)

    return make


@pytest.fixture
def queue(make):
    return make()


@pytest.fixture
def started(queue):
    queue.start()
    return queue


def catch_up(*queues):
    """Let all queues do a round at once; return when no schedule is due and all tasks are stored."""
    for queue in queues:
        parts_of(queue).agenda.wake()
    for queue in queues:
        whole_round(queue)  # even if nothing is due, and nothing may happen
    eventually(lambda: not any(is_due(s, queues[0]) for s in queues[0].schedules().values()))


def ticker(queue):
    return housekeeper_of(queue)._ticker


def is_due(schedule, queue):
    if schedule._entry.making is not None:
        return True
    return schedule.next_tick is not None and schedule.next_tick <= queue.clock.now()


def later(queue, clock, seconds):
    clock.advance(seconds)
    catch_up(queue)


def ticks(queue):
    """Return the ticks that have a task, in order, as day, hour and minute in UTC."""
    found = sorted(tick for task in queue.list_tasks()[0] if (tick := tick_of(task)))
    return [tick.strftime("%d %H:%M") for tick in found]


def note(queue, name):
    return queue.repository.notes(PREFIX + name)[PREFIX + name]


# Ticking


def test_each_tick_makes_one_task(started, clock):
    """This includes the days on which clocks are set forward and back."""
    started.schedule("nightly", "30 2 * * *", "remote", {"n": 1}, tz="Europe/Berlin")
    for _ in range(4 * 24):
        later(started, clock, HOUR)
    assert ticks(started) == ["28 01:30", "29 01:00", "30 00:30", "31 00:30"]
    clock.set_wall(datetime(2026, 10, 24, 12, tzinfo=timezone.utc))
    for _ in range(2 * 24):
        later(started, clock, HOUR)
    assert ticks(started) == [
        *("28 01:30", "29 01:00", "30 00:30", "31 00:30"),
        *("24 00:30", "25 00:30", "26 01:30"),
    ]


def test_an_interval_is_counted_from_its_declaration(started, clock):
    clock.advance(7)
    schedule = started.schedule("beat", every(30), "remote")
    later(started, clock, 29)
    assert ids(started) == set()
    later(started, clock, 1)
    later(started, clock, 30)
    assert ids(started) == {"beat@2026-03-27T12:00:37Z", "beat@2026-03-27T12:01:07Z"}
    assert schedule.next(2) == [clock.now() + timedelta(seconds=s) for s in (30, 60)]


def test_a_task_has_the_options_of_its_schedule(started, clock):
    retry = RetryPolicy(4, backoff="fixed")
    options = {"priority": 3, "timeout": 60, "max_crashes": 2, "retry": retry}
    started.schedule("nightly", "0 3 * * *", "remote", {"n": 1}, created_by="ops", **options)
    started.schedule("other", "0 3 * * *", Task(type="remote", params={"n": 2}, priority=7))
    later(started, clock, DAY)
    task = started.get_task_status("nightly@2026-03-28T03:00:00Z")
    assert (task.type, task.params, task.created_by) == ("remote", {"n": 1}, "ops")
    assert {name: getattr(task, name) for name in options} == options
    assert task.max_attempts == 4
    assert tick_of(task) == task.run_at == datetime(2026, 3, 28, 3, tzinfo=timezone.utc)
    assert task.created_at == clock.now()
    other = started.get_task_status("other@2026-03-28T03:00:00Z")
    assert (other.params, other.priority, other.created_by) == ({"n": 2}, 7, "schedule:other")


def test_a_schedule_is_declared_again_with_its_task_and_some_options_changed(make, clock):
    queue = make()
    options = {
        "priority": 3,
        "timeout": 60.0,
        "max_attempts": 4,
        "max_crashes": 5,
        "retry": RetryPolicy(4, base=2.0),
        "concurrency_key": "one by one",
        "created_by": "ops",
    }
    given = {**options, "tags": ["a", "b"], "expires": 90}
    before = queue.schedule("nightly", "0 3 * * *", "remote", {"n": 1}, **given)
    task = before.task
    assert (task.id, task.type, task.params, task.tags) == ("", "remote", {"n": 1}, ("a", "b"))
    assert {name: getattr(task, name) for name in options} == options
    assert before.expires == 90
    queue.schedule(
        "nightly", "0 4 * * *", attrs.evolve(task, params={"n": 2}), expires=before.expires
    )
    after = queue.schedules()["nightly"]
    assert after.task == attrs.evolve(task, params={"n": 2})
    assert (after.spec, after.expires) == ("0 4 * * *", 90)
    assert make().schedule("plain", every(60), "remote").expires is None


def test_the_executors_options_apply_if_the_schedule_has_none(started, clock):
    started.executor("mine", priority=4, max_attempts=3)(lambda n: n)
    started.schedule("mine", every(60), "mine", {"n": 5})
    started.schedule("urgent", every(60), "mine", {"n": 6}, priority=0)
    later(started, clock, 60)
    task = started.handle("mine@2026-03-27T12:01:00Z")
    assert task.result(PATIENCE) == 5
    assert (task.task().priority, task.task().max_attempts) == (4, 3)
    assert started.get_task_status("urgent@2026-03-27T12:01:00Z").priority == 0


def test_tasks_of_one_concurrency_key_take_turns(started, clock, gate):
    ran = []

    @started.executor()
    def hold(ctx):
        ran.append(tick_of(ctx.task))
        gate()

    schedule = started.schedule("s", every(60), "hold", concurrency_key="one at a time")
    later(started, clock, 60)
    later(started, clock, 60)
    gate.wait_for()
    handle = schedule.trigger()
    gate.open()
    assert handle.result(PATIENCE) is None
    assert ran == [NOON + timedelta(seconds=60), NOON + timedelta(seconds=120), None]


def test_an_executor_knows_its_tick(started, clock):
    started.executor("tell")(lambda ctx: tick_of(ctx.task).isoformat())
    started.schedule("precise", every(0.25), "tell")
    later(started, clock, 0.25)
    handle = started.handle("precise@2026-03-27T12:00:00.250Z")
    assert handle.result(PATIENCE) == "2026-03-27T12:00:00.250000+00:00"
    assert tick_of(started.submit("tell", id="by hand@home").task()) is None


@pytest.mark.timing(poll_every=2 * PATIENCE)
def test_the_housekeeper_wakes_in_time_for_a_tick(make_queue):
    """It uses the real clock, and is not woken by other duties."""
    queue = make_queue(worker_num=1)
    late: list[float] = []

    @queue.executor()
    def note_lateness(ctx):
        late.append((datetime.now(timezone.utc) - tick_of(ctx.task)).total_seconds())

    queue.start()
    queue.schedule("beat", every(0.2), "note_lateness")
    eventually(lambda: len(late) >= 4)
    assert min(late) >= -0.001  # a millisecond, as ticks are whole ones


#: Disables the slow duties, so that only an immediate reaction helps.
unhurried = pytest.mark.timing(recover_every=float("inf"), audit_every=float("inf"))


@unhurried
@pytest.mark.parametrize("way", ["tick", "trigger", "backfill"])
def test_a_task_of_a_schedule_starts_at_once(started, clock, way):
    started.executor("mine")(lambda: "done")
    whole_round(started)  # it has read all schedules
    schedule = started.schedule("s", every(60), "mine")
    eventually(lambda: ticker(started).next)
    if way == "tick":
        clock.advance(60)
        eventually(lambda: len(ids(started)) == 1)
        handle = started.handle(*ids(started))
    elif way == "trigger":
        handle = schedule.trigger()
    else:
        [handle] = schedule.backfill(NOON, NOON)
    assert handle.result(PATIENCE) == "done"


@unhurried
def test_schedules_are_read_again_if_the_store_was_unavailable_at_the_start(
    queue, clock, monkeypatch
):
    queue.schedule("s", every(60), "remote")
    notes, away = queue.repository.reads.notes_after, [True]

    def failing(*args):
        if away:
            away.pop()
            raise RepositoryUnavailable("away for a moment")
        return notes(*args)

    monkeypatch.setattr(queue.repository.reads, "notes_after", failing)
    queue.start()
    eventually(lambda: ticker(queue).next)
    assert not away


@unhurried
def test_a_change_in_the_middle_of_a_tick_is_noticed(make, clock, monkeypatch):
    queue, web = make(), make()
    queue.schedule("s", every(60), "remote")
    put, once = queue.repository.put_notes, [True]

    def changed_before(changes):
        if once and changes[0].name.startswith("schedule/"):
            once.pop()
            web.schedule("s", every(1), "remote")
        return put(changes)

    queue.start()
    eventually(lambda: ticker(queue).next)
    monkeypatch.setattr(queue.repository, "put_notes", changed_before)
    clock.advance(60)
    eventually(lambda: ticker(queue).next == to_ms(NOON) + 61_000)
    assert ticks(queue) == ["27 12:01"]


@pytest.mark.timing(stop_extra=PATIENCE)  # the stop has begun when it returns
def test_a_queue_that_is_stopping_does_not_tick(started, clock, gate):
    started.executor("hold")(lambda: gate())
    started.schedule("s", every(60), "remote")
    held = started.submit("hold", id="held")
    gate.wait_for()
    assert started.stop(timeout=0.1) == [held.id]
    clock.advance(60)
    whole_round(started)
    assert ids(started) == {"held"}
    gate.open()
    eventually(lambda: not started.repository.liveness.nodes())


def test_a_queue_that_is_stopping_is_not_woken_by_ticks(started, clock, gate):
    started.executor("hold")(lambda: gate())
    started.submit("hold")
    gate.wait_for(1)
    started.schedule("s", every(60), "remote")
    eventually(lambda: ticker(started).next)
    agenda = parts_of(started).agenda
    pool_of(started).begin_stop()
    clock.advance(60)
    waits, signal = [], agenda._bell
    agenda._bell = Waits(waits.append)
    eventually(lambda: len(waits) >= 3)
    agenda._bell = signal
    gate.open()
    assert min(waits[1:]) > 0.01


class Waits:
    """A signal that reports how long the housekeeper would wait, and waits only for a moment."""

    def __init__(self, tell):
        self.tell = tell

    def wait(self, timeout):
        self.tell(timeout)
        threading.Event().wait(0.001)

    def set(self):
        """Do nothing: the housekeeper is awake."""


def test_a_queue_that_is_not_started_does_not_tick(queue, clock):
    queue.schedule("beat", every(30), "remote")
    clock.advance(300)
    assert queue.schedules()["beat"].last_tick is None
    assert ids(queue) == set()


def test_a_tick_gets_its_task_even_if_the_buffer_is_full(make_queue, clock, busy):
    queue = busy(buffer_size=1, overflow="reject", clock=clock)
    queue.submit("note")
    queue.schedule("beat", every(30), "note", {"n": 1})
    later(queue, clock, 30)
    assert "beat@2026-03-27T12:00:30Z" in ids(queue)


@frequent_checks
def test_only_the_node_that_stores_a_tick_tells_its_hooks(make, clock):
    told = []

    class Told(Hook):
        def submitted(self, task):
            told.append(task.id)

    queue, other = make(hooks=[Told()]), make(hooks=[Told()])
    queue.start(), other.start()
    queue.schedule("beat", every(30), "remote")
    eventually(lambda: ticker(other).next)
    clock.advance(30)
    catch_up(queue, other)
    assert queue.drain(PATIENCE)
    assert other.drain(PATIENCE)
    assert told == ["beat@2026-03-27T12:00:30Z"]


# Declaring


def test_the_same_declaration_again_changes_nothing(started, clock):
    started.schedule("nightly", "0 3 * * *", "remote", {"n": 1})
    for days in range(4):
        later(started, clock, DAY)
        before = note(started, "nightly")
        again = started.schedule("nightly", " 0  3 * * *", "remote", {"n": 1})
        assert note(started, "nightly") == before
        assert len(ticks(started)) == days + 1
        assert again.last_tick == again.next_tick - timedelta(days=1)


def test_a_new_declaration_does_not_lose_missed_ticks(make, clock):
    first = make()
    first.schedule("nightly", "0 3 * * *", "remote")
    clock.advance(2 * DAY)
    second = make()
    second.schedule("nightly", "0 3 * * *", "remote")
    assert ids(second) == set()
    second.start()
    catch_up(second)
    assert ticks(second) == ["29 03:00"]


def test_new_params_do_not_change_the_ticks(started, clock):
    started.schedule("beat", every(60), "remote", {"n": 1})
    later(started, clock, 50)
    started.schedule("beat", every(60), "remote", {"n": 2}, overlap="skip")
    later(started, clock, 10)
    assert started.get_task_status("beat@2026-03-27T12:01:00Z").params == {"n": 2}
    assert started.schedules()["beat"].overlap == "skip"


def test_a_new_spec_begins_from_now(started, clock):
    started.schedule("beat", every(60), "remote")
    later(started, clock, 60)
    later(started, clock, 50)
    changed = started.schedule("beat", every(100), "remote")
    assert changed.next_tick == clock.now() + timedelta(seconds=100)
    assert changed.last_tick == NOON + timedelta(seconds=60)
    changed = started.schedule("beat", "0 3 * * *", "remote")
    assert changed.next_tick == datetime(2026, 3, 28, 3, tzinfo=timezone.utc)
    changed = started.schedule("beat", "0 3 * * *", "remote", tz="Europe/Berlin")
    assert changed.next_tick == datetime(2026, 3, 28, 2, tzinfo=timezone.utc)


def test_a_new_spec_never_repeats_a_tick_of_the_old_one(started, clock):
    """The clock was set back in between."""
    started.schedule("s", "0 * * * *", "remote")
    later(started, clock, HOUR)
    clock.set_wall(NOON)
    assert started.schedule("s", "*/30 * * * *", "remote").next_tick == NOON + timedelta(hours=1.5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "complaint"),
    [
        (("", every(5), "remote"), {}, ConfigurationError, "1 to 200 characters"),
        (("x" * 201, every(5), "remote"), {}, ConfigurationError, "1 to 200 characters"),
        ((5, every(5), "remote"), {}, ConfigurationError, "name must be a str"),
        (("s", "0 25 * * *", "remote"), {}, ConfigurationError, "Bad hour"),
        (("s", 30, "remote"), {}, ConfigurationError, "every"),
        (
            ("s", "* * * * *", "remote"),
            {"tz": "Berlin"},
            ConfigurationError,
            "unknown time zone 'Berlin'",
        ),
        (("s", every(5), "remote"), {"tz": "UTC"}, ConfigurationError, "leave tz out"),
        (
            ("s", every(5), "remote"),
            {"misfire": "two"},
            ConfigurationError,
            "'skip', 'one' or 'all'",
        ),
        (
            ("s", every(5), "remote"),
            {"misfire": "all"},
            ConfigurationError,
            "requires misfire_grace",
        ),
        (("s", every(5), "remote"), {"misfire_grace": -1}, ConfigurationError, "misfire_grace"),
        (("s", every(5), "remote"), {"overlap": True}, ConfigurationError, "'allow' or 'skip'"),
        (("s", every(5), "unheard"), {}, UnknownTaskType, "unheard"),
        (("s", every(5), "remote", {"n": {1}}), {}, PayloadError, r"params\.n"),
        (("s", every(5), "mine", {"m": 1}), {}, PayloadError, "requires n"),
        (("s", every(5), "remote"), {"timeout": 0}, ConfigurationError, "timeout"),
        (("s", every(5), 5), {}, ConfigurationError, "an executor or a Task, not 5"),
        (("s", every(5), "remote"), {"misfire_grace": 1e30}, ConfigurationError, "at most"),
        (("s", every(5), "remote"), {"misfire_grace": 10**400}, ConfigurationError, "too large"),
        (("s", every(5), ""), {}, ConfigurationError, "type must not be empty"),
        (
            ("s", every(5), Task(type="remote", id="x")),
            {},
            ConfigurationError,
            "no id and no run_at",
        ),
        (
            ("s", every(5), Task(type="remote", run_at=NOON)),
            {},
            ConfigurationError,
            "no id and no run_at",
        ),
        (
            ("s", every(5), Task(type="remote", depends_on=["x"])),
            {},
            ConfigurationError,
            "depends_on",
        ),
        (
            ("s", every(5), Task(type="remote", unique_key="x", unique_scope="ever")),
            {},
            ConfigurationError,
            "unique_key",
        ),
        (("s", every(5), Task(type="remote"), {"n": 1}), {}, TypeError, "set task.params"),
        (("s", every(5), "remote"), {"delay": 5}, TypeError, "no option delay"),
        (("s", every(5), "remote"), {"priority": "high"}, ConfigurationError, "priority"),
    ],
)
def test_an_invalid_schedule_is_refused_at_once(queue, arguments, options, error, complaint):
    queue.executor("mine")(lambda n: n)
    with pytest.raises(error, match=complaint):
        queue.schedule(*arguments, **options)
    assert queue.schedules() == {}


# Listing, pausing, removing


def test_schedules_are_listed_by_name(queue, clock):
    queue.schedule("b", "0 3 * * *", "remote", {"n": 1}, tz="Europe/Berlin", misfire="skip")
    queue.schedule("a", every(90), "remote", misfire="all", misfire_grace=600, overlap="skip")
    found = queue.schedules()
    assert list(found) == ["a", "b"]
    a, b = found.values()
    assert (a.name, a.spec, a.type, a.params, a.tz) == ("a", every(90), "remote", {}, "UTC")
    assert (a.misfire, a.misfire_grace, a.overlap, a.paused) == ("all", 600, "skip", False)
    assert (a.next_tick, a.last_tick) == (clock.now() + timedelta(seconds=90), None)
    assert (b.spec, b.params, b.tz) == ("0 3 * * *", {"n": 1}, "Europe/Berlin")
    assert (b.misfire, b.misfire_grace, b.overlap) == ("skip", 10, "allow")
    assert repr(b) == "<Schedule 'b' (0 3 * * *): 'remote'>"


def test_similar_names_are_different_schedules(queue):
    for name in ("night", "nightly", "night*", "Night"):
        queue.schedule(name, every(60), "remote", {"of": name})
    assert {s.name: s.params["of"] for s in queue.schedules().values()} == {
        name: name for name in ("night", "nightly", "night*", "Night")
    }
    queue.schedules()["night"].remove()
    assert set(queue.schedules()) == {"nightly", "night*", "Night"}


def test_a_preview_shows_local_time(queue):
    schedule = queue.schedule("nightly", "30 2 * * *", "remote", tz="Europe/Berlin")
    assert [tick.isoformat() for tick in schedule.next(3)] == [
        "2026-03-28T02:30:00+01:00",
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
    ]
    with pytest.raises(ConfigurationError, match="count"):
        schedule.next(0)


def test_the_last_ticks_have_the_statuses_of_their_tasks(started, clock):
    schedule = started.schedule("s", "0 * * * *", "remote", tz="Europe/Berlin")
    assert schedule.last(5) == []
    later(started, clock, HOUR)
    schedule.pause()
    later(started, clock, HOUR)
    schedule.resume()
    later(started, clock, HOUR)
    started.cancel_task("s@2026-03-27T13:00:00Z")
    found = schedule.last(5)
    assert [(tick.at.isoformat(), tick.status) for tick in found] == [
        ("2026-03-27T16:00:00+01:00", "pending"),
        ("2026-03-27T15:00:00+01:00", None),
        ("2026-03-27T14:00:00+01:00", "cancelled"),
    ]
    assert [tick.task_id for tick in found] == [
        f"s@2026-03-27T{hour}:00:00Z" for hour in (15, 14, 13)
    ]
    assert schedule.last() == found[:1]
    with pytest.raises(ConfigurationError, match="count"):
        schedule.last(0)


def test_the_begin_of_an_interval_is_no_tick(started, clock):
    schedule = started.schedule("s", every(60), "remote")
    clock.advance(59)
    assert schedule.last(5) == []
    clock.advance(61)
    assert [tick.at - NOON for tick in schedule.last(5)] == [
        timedelta(seconds=120),
        timedelta(seconds=60),
    ]


def test_a_preview_works_while_a_schedule_is_paused_or_late(queue, clock):
    schedule = queue.schedule("beat", every(60), "remote")
    clock.advance(150)
    assert schedule.next() == [NOON + timedelta(seconds=180)]
    schedule.pause()
    assert schedule.next() == [NOON + timedelta(seconds=180)]


def test_a_paused_schedule_does_not_tick_even_after_a_new_declaration(started, clock):
    schedule = started.schedule("beat", every(60), "remote")
    schedule.pause()
    assert (schedule.paused, schedule.next_tick) == (True, None)
    later(started, clock, 600)
    assert started.schedule("beat", every(60), "remote").paused, "after a new declaration"
    assert started.schedule("beat", every(50), "remote").paused, "after a new spec"
    later(started, clock, 30)
    schedule.resume()
    assert (schedule.paused, schedule.next_tick) == (False, NOON + timedelta(seconds=650))
    catch_up(started)
    assert ids(started) == set()
    later(started, clock, 20)
    assert ids(started) == {"beat@2026-03-27T12:10:50Z"}


def test_ticks_during_a_pause_get_no_tasks(started, clock):
    schedule = started.schedule("beat", every(60), "remote")
    schedule.pause()
    clock.advance(90)
    schedule.resume()
    assert schedule.next_tick == NOON + timedelta(seconds=120)
    later(started, clock, 30)
    assert ticks(started) == ["27 12:02"]


def test_resuming_a_schedule_that_is_not_paused_changes_nothing(queue, clock):
    """The ticks that it missed still get their task."""
    schedule = queue.schedule("beat", every(60), "remote")
    clock.advance(70)
    schedule.resume()
    queue.start()
    catch_up(queue)
    assert ticks(queue) == ["27 12:01"]


def test_changes_by_another_queue_apply_at_the_next_tick(make, clock):
    ticking, web = make(), make()
    ticking.start()
    ticking.schedule("a", every(60), "remote", {"n": 1})
    ticking.schedule("b", every(60), "remote", {"n": 1})
    ticking.schedule("c", every(60), "remote", {"n": 1})
    catch_up(ticking)
    web.schedules()["a"].pause()
    web.schedules()["b"].remove()
    web.schedule("c", every(60), "remote", {"n": 2})
    later(ticking, clock, 60)
    assert ids(ticking) == {"c@2026-03-27T12:01:00Z"}
    assert ticking.get_task_status("c@2026-03-27T12:01:00Z").params == {"n": 2}


@pytest.mark.timing(audit_every=0.05, schedules_every=0.05)
def test_a_schedule_of_another_queue_is_noticed(make, clock):
    ticking, web = make(), make()
    ticking.start()
    # Wait until the housekeeper has read the schedules and found none.
    whole_round(ticking)
    web.schedule("beat", every(60), "remote")
    clock.advance(60)
    eventually(lambda: ids(web) == {"beat@2026-03-27T12:01:00Z"})


def test_a_removed_schedule_is_gone_and_its_tasks_stay(started, clock):
    schedule = started.schedule("beat", every(60), "remote")
    later(started, clock, 60)
    schedule.remove()
    later(started, clock, 60)
    assert ticks(started) == ["27 12:01"]
    assert started.schedules() == {}
    span = (clock.now(), clock.now())
    for call in (schedule.pause, schedule.resume, schedule.remove, schedule.trigger):
        with pytest.raises(ScheduleNotFound, match="no schedule named 'beat'"):
            call()
    with pytest.raises(ScheduleNotFound):
        schedule.backfill(*span)


def test_a_schedule_declared_after_its_removal_makes_no_task_twice(started, clock):
    started.schedule("s", "0 13 * * *", "remote").remove()
    started.schedule("s", "0 13 * * *", "remote")
    later(started, clock, HOUR)
    clock.set_wall(NOON)
    started.schedules()["s"].remove()
    started.schedule("s", "0 13 * * *", "remote")
    later(started, clock, HOUR)
    assert ticks(started) == ["27 13:00"]


# By hand


@pytest.mark.parametrize("name", ["a@2024-99-99T00:00:00Z", "a@noon", "a"])
def test_an_id_that_only_looks_like_a_tick_has_no_tick(name):
    assert tick_of(Task(type="remote", id=name)) is None


@pytest.mark.parametrize("thing", ["x", None])
def test_tick_of_refuses_other_objects(thing):
    with pytest.raises(ConfigurationError, match="tick_of requires a Task"):
        tick_of(thing)


@pytest.mark.every_store
def test_a_triggered_task_runs_now_in_addition_to_the_ticks(started, clock):
    started.executor("mine")(lambda n: n)
    schedule = started.schedule("s", every(60), "mine", {"n": 5}, priority=3)
    schedule.pause()
    first, second = schedule.trigger(), schedule.trigger()
    assert first.result(PATIENCE) == second.result(PATIENCE) == 5
    assert first.id != second.id
    assert (first.task().priority, first.task().created_by) == (3, "schedule:s")
    assert tick_of(first.task()) is None
    assert schedule.last_tick is None


def test_a_task_triggered_on_an_unstarted_queue_waits_for_a_node(make):
    """The queue that triggers need not have the executor."""
    make().schedule("s", every(60), "remote", {"n": 5})
    other = make()
    handle = other.schedules()["s"].trigger()
    assert handle.task().params == {"n": 5}
    runner = make()
    runner.executor("remote")(lambda n: n + 1)
    runner.start()
    assert runner.handle(handle.id).result(PATIENCE) == 6


def test_a_backfill_makes_only_the_missing_tasks(started, clock):
    schedule = started.schedule("nightly", "30 2 * * *", "remote", tz="Europe/Berlin")
    later(started, clock, DAY)
    assert ticks(started) == ["28 01:30"]
    clock.advance(2 * DAY)
    start = datetime(2026, 3, 26, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
    end = datetime(2026, 3, 30, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
    handles = schedule.backfill(start, end)
    wanted = ["26T01:30", "27T01:30", "28T01:30", "29T01:00", "30T00:30"]
    assert [handle.id for handle in handles] == [f"nightly@2026-03-{t}:00Z" for t in wanted]
    assert ids(started) == {handle.id for handle in handles}
    assert [h.id for h in schedule.backfill(start, end)] == [h.id for h in handles]
    assert len(ids(started)) == 5


def test_a_backfill_may_have_many_ticks(queue, clock):
    schedule = queue.schedule("s", every(60), "remote")
    handles = schedule.backfill(clock.now() - timedelta(minutes=2 * BATCH + 1), clock.now())
    assert len({handle.id for handle in handles}) == 2 * BATCH + 2
    assert queue.list_tasks(TaskFilter(limit=0))[1] == 2 * BATCH + 2


def test_a_backfilled_tick_gets_no_second_task(queue, clock):
    """No queue was started at the tick, and the back-fill comes before the start."""
    schedule = queue.schedule("s", every(60), "remote", {"by": "hand"})
    clock.advance(60)
    schedule.backfill(NOON, clock.now())
    queue.start()
    catch_up(queue)
    assert ticks(queue) == ["27 12:00", "27 12:01"]
    assert queue.schedules()["s"].last_tick == clock.now()


@pytest.mark.parametrize(
    ("start", "end", "complaint"),
    [
        (NOON, NOON - timedelta(seconds=1), "must not end before its start"),
        (NOON, NOON + timedelta(seconds=1), "nor in the future"),
        (datetime(2026, 3, 1), NOON, "aware"),
        (None, NOON, "start must be a datetime"),
        (NOON, "today", "end must be a datetime"),
    ],
)
def test_a_backfill_refuses_an_invalid_span(queue, start, end, complaint):
    schedule = queue.schedule("s", every(0.5), "remote")
    with pytest.raises(ConfigurationError, match=complaint):
        schedule.backfill(start, end)
    assert ids(queue) == set()


def test_a_backfill_refuses_more_ticks_than_it_makes(monkeypatch, queue, clock):
    monkeypatch.setattr("taskx.queue.schedule.MOST_BACKFILLED", 3)
    schedule = queue.schedule("s", every(60), "remote")
    clock.advance(300)
    with pytest.raises(ConfigurationError, match=r"more than 3 ticks .* back-fill a shorter span"):
        schedule.backfill(NOON, NOON + timedelta(minutes=3))
    assert ids(queue) == set()
    assert len(schedule.backfill(NOON, NOON + timedelta(minutes=2))) == 3


def test_a_stopped_queue_makes_no_tasks(started, clock):
    schedule = started.schedule("s", every(60), "remote")
    started.stop()
    clock.advance(60)
    with pytest.raises(QueueStopped):
        schedule.trigger()
    with pytest.raises(QueueStopped):
        schedule.backfill(NOON, NOON)
    assert ids(started) == set()


@pytest.mark.every_store
def test_a_forked_child_has_the_schedules_of_its_parent(started):
    """Its queue is neither started nor stopped."""
    schedule = started.schedule("s", every(60), "remote")
    started.stop()
    started.repository.close()  # no connection is open while a process forks
    started._renew_after_fork()
    assert schedule.trigger().task().status == "pending"


# Missed ticks


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({}, ["27 12:05"]),
        ({"misfire": "one", "misfire_grace": 29}, []),
        ({"misfire": "one", "misfire_grace": 30}, ["27 12:05"]),
        ({"misfire": "skip"}, []),
        ({"misfire": "skip", "misfire_grace": 45}, ["27 12:05"]),
        ({"misfire": "all", "misfire_grace": 100}, ["27 12:04", "27 12:05"]),
        ({"misfire": "all", "misfire_grace": HOUR}, [f"27 12:0{n}" for n in range(1, 6)]),
    ],
)
def test_misfire_decides_about_missed_ticks(queue, clock, caplog, options, made):
    schedule = queue.schedule("s", every(60), "remote", **options)
    clock.advance(5 * 60 + 30)
    queue.start()
    catch_up(queue)
    assert ticks(queue) == made
    assert f"ticks since 2026-03-27 12:01:00+00:00 were missed; tasks for them: {len(made)}" in (
        caplog.text
    )
    later(queue, clock, 30)
    assert ticks(queue) == [*made, "27 12:06"], "then it ticks as usual"
    assert queue.schedules()["s"].last_tick == NOON + timedelta(seconds=360)
    assert schedule.next() == [NOON + timedelta(seconds=420)]


def test_a_tick_that_is_a_little_late_was_not_missed(queue, clock, caplog):
    queue.schedule("s", every(60), "remote", misfire="skip")
    queue.start()
    catch_up(queue)
    later(queue, clock, 69)
    assert ticks(queue) == ["27 12:01"]
    assert "were missed" not in caplog.text


def test_tasks_of_many_missed_ticks_are_made_in_batches(queue, clock, repository):
    queue.schedule("s", every(1), "remote", misfire="all", misfire_grace=DAY)
    clock.advance(3 * BATCH)
    queue.start()
    eventually(lambda: len(queue.repository.list(TaskFilter(limit=1000))) == 3 * BATCH)
    assert max(len(batch) for batch in repository.batches) == BATCH


# Overlap


def test_a_tick_is_skipped_while_the_last_task_has_not_ended(started, clock):
    started.schedule("strict", every(60), "remote", overlap="skip")
    started.schedule("lax", every(60), "remote", overlap="allow")
    for _ in range(3):
        later(started, clock, 60)
    mine = sorted(task_id for task_id in ids(started) if task_id.startswith("strict"))
    assert mine == ["strict@2026-03-27T12:01:00Z"]
    assert len(ids(started)) == 1 + 3
    assert started.schedules()["strict"].last_tick == NOON + timedelta(seconds=60)
    started.cancel_task(mine[0])
    later(started, clock, 60)
    assert "strict@2026-03-27T12:04:00Z" in ids(started)


def test_a_tick_is_skipped_while_the_last_task_runs(started, clock, gate):
    started.executor("hold")(lambda: gate())
    started.schedule("s", every(60), "hold", overlap="skip")
    later(started, clock, 60)
    gate.wait_for()
    later(started, clock, 60)
    gate.open()
    assert started.drain(PATIENCE)
    later(started, clock, 60)
    assert ticks(started) == ["27 12:01", "27 12:03"]


def test_a_triggered_task_does_not_count_as_overlap(started, clock):
    schedule = started.schedule("s", every(60), "remote", overlap="skip")
    schedule.trigger()
    later(started, clock, 60)
    assert ticks(started) == ["27 12:01"]


def test_without_overlap_only_one_missed_tick_gets_a_task(queue, clock):
    queue.schedule("s", every(60), "remote", overlap="skip", misfire="all", misfire_grace=DAY)
    clock.advance(200)
    queue.start()
    catch_up(queue)
    assert ticks(queue) == ["27 12:01"]


# The clock


def test_a_clock_that_is_set_back_repeats_no_tick(started, clock):
    started.schedule("s", every(60), "remote")
    for _ in range(3):
        later(started, clock, 60)
    clock.set_wall(NOON - timedelta(hours=1))
    for _ in range(63):
        later(started, clock, 60)
    assert ticks(started) == ["27 12:01", "27 12:02", "27 12:03"]
    later(started, clock, 60)
    assert ticks(started)[-1] == "27 12:04"


def test_no_tick_is_repeated_even_if_its_task_was_deleted(started, clock):
    """The schedule stores its last tick; it does not depend on the tasks."""
    started.schedule("s", every(60), "remote")
    later(started, clock, 60)
    started.delete("s@2026-03-27T12:01:00Z")
    clock.set_wall(NOON)
    later(started, clock, 60)
    assert ids(started) == set()


def test_a_clock_that_is_set_forward_causes_missed_ticks(started, clock):
    started.schedule("s", every(60), "remote")
    catch_up(started)
    clock.set_wall(NOON + timedelta(days=365, seconds=10))
    catch_up(started)
    assert ids(started) == {"s@2027-03-27T12:00:00Z"}


# Several nodes, crashes, faults


def test_only_one_of_several_nodes_makes_a_task(make, clock):
    queues = [make() for _ in range(3)]
    for queue in queues:
        queue.start()
        queue.schedule("s", every(60), "remote")
    for _ in range(5):
        clock.advance(60)
        catch_up(*queues)
    assert ticks(queues[0]) == [f"27 12:0{n}" for n in range(1, 6)]


@pytest.mark.every_store
@pytest.mark.parametrize("overlap", ["allow", "skip"])
def test_a_death_after_the_task_was_stored_makes_no_second_task(make, clock, monkeypatch, overlap):
    """The next node finds the task and moves the schedule on."""
    dying = make()
    dying.schedule("s", every(60), "remote", overlap=overlap)
    put_notes, stored = type(dying.repository).put_notes, []

    def die(repository, changes):
        if ids(dying):
            raise RepositoryUnavailable("died here")
        stored.extend(change.name for change in changes if change.name.startswith("schedule/"))
        return put_notes(repository, changes)

    with monkeypatch.context() as patch:
        patch.setattr(type(dying.repository), "put_notes", die)
        dying.start()
        clock.advance(60)
        eventually(lambda: ticks(dying) == ["27 12:01"])
        dying.stop()
    assert len(stored) == (overlap == "skip")
    clock.advance(5)
    other = make()
    other.start()
    catch_up(other)
    assert ticks(other) == ["27 12:01"]
    assert other.schedules()["s"].last_tick == NOON + timedelta(seconds=60)
    assert other.schedules()["s"].next_tick == NOON + timedelta(seconds=120)
    later(other, clock, 55)
    assert ticks(other) == ["27 12:01", *(["27 12:02"] if overlap == "allow" else [])]
    assert not is_due(other.schedules()["s"], other)


@pytest.fixture
def taken_up(make, clock, monkeypatch):
    """A queue whose ticker died before it stored the task of a tick that it had taken up."""
    dying = make()
    dying.schedule("s", every(60), "remote", {"n": 1}, overlap="skip")

    def die(*args):
        raise RepositoryUnavailable("died here")

    clock.advance(60)
    with monkeypatch.context() as patch:
        patch.setattr(parts_of(dying).moves, "commit", die)
        with pytest.raises(RepositoryUnavailable):
            ticker_of(dying).tick()
    assert ids(dying) == set()
    clock.advance(5)
    return dying


def test_a_tick_of_a_node_that_died_gets_its_task(taken_up, make, clock):
    """If tasks must not overlap, the schedule is moved on first, and the next tick sees that task."""
    other = make()
    other.start()
    catch_up(other)
    assert ticks(other) == ["27 12:01"]
    assert other.schedules()["s"].last_tick == NOON + timedelta(seconds=60)
    later(other, clock, 60)
    assert ticks(other) == ["27 12:01"]
    other.cancel_task("s@2026-03-27T12:01:00Z")
    later(other, clock, 60)
    assert ticks(other) == ["27 12:01", "27 12:03"]


@pytest.mark.parametrize(
    "change",
    [
        lambda queue: queue.schedules()["s"].pause(),
        lambda queue: queue.schedule("s", every(60), "remote", {"n": 1}, overlap="allow"),
        lambda queue: queue.schedule("s", every(3600), "remote", {"n": 1}, overlap="skip"),
    ],
    ids=["paused", "lax", "rarer"],
)
def test_a_tick_of_a_dead_node_gets_its_task_after_a_change(taken_up, clock, change):
    change(taken_up)
    taken_up.start()
    catch_up(taken_up)
    assert ticks(taken_up) == ["27 12:01"]


@pytest.mark.parametrize("misfire", ["skip", "one"])
@pytest.mark.parametrize("at", ["put_notes", "apply"])
def test_nodes_with_different_ticks_make_no_overlapping_tasks(
    make, clock, monkeypatch, at, misfire
):
    """One node makes up for a missed tick; before that is stored, another node takes the next tick."""
    one, other = (make() for _ in range(2))
    one.schedule("s", every(60), "remote", misfire=misfire, misfire_grace=DAY, overlap="skip")
    clock.advance(119)
    write = getattr(one.repository, at)

    def late(*args, **options):
        monkeypatch.setattr(one.repository, at, write)
        clock.advance(2)
        tick_until_done(other)
        return write(*args, **options)

    monkeypatch.setattr(one.repository, at, late)
    tick_until_done(one)
    assert len(ticks(one)) == 1
    assert not is_due(one.schedules()["s"], one)


def tick_until_done(queue):
    """Tick while schedules of the queue are due, like the housekeeper."""
    ticker = ticker_of(queue)
    while ticker.behind(queue.clock.now_ms()):
        ticker.tick()


@pytest.mark.parametrize("misfire", ["skip", "one"])
def test_a_task_that_a_dead_node_stored_counts_as_overlap(make, clock, misfire):
    """The dead node had stored the task of a missed tick and had not moved the schedule on."""
    queue = make()
    schedule = queue.schedule("s", every(60), "remote", misfire=misfire, overlap="skip")
    clock.advance(120)
    schedule.backfill(clock.now(), clock.now())
    clock.advance(60)
    queue.start()
    catch_up(queue)
    assert ticks(queue) == ["27 12:02"]


def test_an_unavailable_store_causes_missed_ticks(started, repository, clock, caplog):
    started.schedule("s", every(60), "remote")
    repository.down = True
    clock.advance(130)
    eventually(lambda: "the housekeeper tries again" in caplog.text)
    repository.down = False
    eventually(lambda: ticks(started) == ["27 12:02"])


DAMAGED = ["{", "[]", "{}", '{"spec": 7}', None]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_schedule_does_not_stop_others(started, clock, caplog, text):
    started.schedule("broken", every(60), "remote")
    started.schedule("sound", every(60), "remote")
    stored = note(started, "broken")
    if text is None:  # of a newer version
        text = json.dumps({**json.loads(stored.text), "jitter": 5})
    assert started.repository.put_note(PREFIX + "broken", text, stored.version)
    for _ in range(3):
        later(started, clock, 60)
    assert [task_id[:5] for task_id in ids(started)] == ["sound"] * 3
    assert caplog.text.count("schedule/broken does not tick in this process") == 1
    assert list(started.schedules()) == ["sound"]
    started.schedule("broken", every(60), "remote")
    assert list(started.schedules()) == ["broken", "sound"]
    later(started, clock, 60)
    assert "broken@2026-03-27T12:04:00Z" in ids(started)


@pytest.mark.parametrize("paused", [True, False])
def test_a_paused_schedule_of_a_newer_version_stays_paused(queue, paused):
    queue.schedule("s", every(60), "remote")
    stored = note(queue, "s")
    newer = {**json.loads(stored.text), "jitter": 5, "paused": paused}
    queue.repository.put_note(PREFIX + "s", json.dumps(newer), stored.version)
    assert queue.schedule("s", every(60), "remote").paused is paused


def read_version(queue):
    read = ticker(queue)._read.get(PREFIX + "s")
    return read and read.version


def test_a_schedule_that_only_others_understand_is_logged_once(started, clock, caplog):
    """The other nodes change it at each tick."""
    started.schedule("s", every(60), "remote")
    for n in range(3):
        stored = note(started, "s")
        newer = {**json.loads(stored.text), "jitter": n}
        assert started.repository.put_note(PREFIX + "s", json.dumps(newer), stored.version)
        seen = note(started, "s").version
        ticker(started).refresh_now()
        parts_of(started).agenda.wake()
        eventually(lambda seen=seen: read_version(started) == seen)
    assert caplog.text.count("schedule/s does not tick in this process") == 1


@pytest.mark.parametrize(
    "change",
    [{"next": "soon"}, {"tz": "Mars/Olympus"}, {"misfire": "two"}, {"task": {}}, {"spec": "x"}],
)
def test_a_schedule_with_unknown_values_is_logged_once(started, clock, caplog, change):
    """Another host may know them."""
    started.schedule("s", "0 * * * *", "remote")
    stored = note(started, "s")
    text = json.dumps({**json.loads(stored.text), **change})
    assert started.repository.put_note(PREFIX + "s", text, stored.version)
    started.schedule("sound", every(60), "remote")
    for made in (1, 2):
        clock.advance(2 * HOUR)
        eventually(lambda made=made: [i[:5] for i in ids(started)] == ["sound"] * made)
    assert caplog.text.count("schedule/s does not tick in this process") == 1
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


class Moody(Codec):
    """A codec that refuses data which contains a given text."""

    name = "moody"
    refused = b"never"

    def encode(self, data):
        if self.refused in data:
            raise ConnectionError("no key server")
        return data

    def decode(self, data):
        return data


class TestRefusedParams:
    @pytest.fixture
    def codec(self):
        return Moody()

    @pytest.fixture
    def repository(self, tmp_path, clock, codec):
        with coded("memory", tmp_path, clock, codec) as made:
            yield made

    @pytest.fixture
    def refused(self, make, clock, codec, caplog):
        """A started queue with two schedules; the codec refuses the params of ``bad`` from now on."""
        queue = make(retention={"cancelled": 1})
        queue.schedule("bad", every(60), "remote", {"x": "poison"})
        queue.schedule("good", every(60), "remote", {"x": "fine"})
        codec.refused = b"poison"
        queue.start()
        clock.advance(60)
        eventually(lambda: "schedule 'bad': its tasks could not be made" in caplog.text)
        eventually(lambda: ticks(queue) == ["27 12:01"])  # else its tick might be missed
        return queue

    def test_refused_params_raise_at_the_declaration(self, make, codec):
        codec.refused = b"poison"
        queue = make()
        with pytest.raises(PayloadError, match="params: codec 'moody' failed: ConnectionError"):
            queue.schedule("bad", every(60), "remote", {"x": "poison"})
        assert queue.schedules() == {}

    def test_refused_params_do_not_stop_other_work(self, refused, clock, caplog):
        """Other schedules tick, and the housekeeper does its other duties."""
        queue = refused
        for done in (2, 3, 4):
            clock.advance(60)
            whole_round(queue)  # the housekeeper may be in the middle of one, at the time before
            eventually(lambda done=done: len(ticks(queue)) == done)
        assert {task_id[:4] for task_id in ids(queue)} == {"good"}
        queue.cancel_many(ids(queue))
        clock.advance(120)  # old enough, and retention runs
        eventually(lambda: not any(task.status.finished for task in queue.list_tasks()[0]))
        assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []

    def test_refused_params_are_tried_again_ever_more_rarely(
        self, refused, clock, caplog, monkeypatch
    ):
        queue, tried = refused, []
        plan = ticker(queue)._plan

        def watched(read, now):
            if read.entry.name == "bad":
                tried.append(clock.monotonic())
            return plan(read, now)

        monkeypatch.setattr(ticker(queue), "_plan", watched)
        for _ in range(600):
            clock.advance(1)
            whole_round(queue)
        pauses = [later - sooner for sooner, later in pairwise(tried)]
        assert pauses[:4] == [pytest.approx(pause, abs=1.1) for pause in (4, 8, 16, 32)]
        assert pauses[4:] == [pytest.approx(60, abs=1.1)] * len(pauses[4:])
        assert 8 < len(tried) < 16
        # Failures 2, 4 and 8; the first one was logged by the fixture.
        assert caplog.text.count("schedule 'bad'") == 3

    def test_refused_params_are_stored_once_the_codec_accepts_them(self, refused, clock, codec):
        """The ticks until then count as missed."""
        codec.refused = b"never"
        clock.advance(180)
        eventually(lambda: "bad@2026-03-27T12:04:00Z" in ids(refused))
        clock.advance(60)
        eventually(lambda: "bad@2026-03-27T12:05:00Z" in ids(refused))

    def test_changed_params_are_tried_at_once(self, refused, clock):
        refused.schedule("bad", every(60), "remote", {"x": "better"})
        eventually(lambda: "bad@2026-03-27T12:01:00Z" in ids(refused))

    def test_refused_params_are_retried_even_if_the_wall_clock_is_set_back(
        self, refused, clock, codec
    ):
        clock.set_wall(NOON + timedelta(seconds=60))
        codec.refused = b"never"
        clock.advance(5)
        eventually(lambda: "bad@2026-03-27T12:01:00Z" in ids(refused))


# Every repository


class TestEveryRepository:
    @pytest.fixture(params=[name for name in MAKERS if not name.startswith("adapter")])
    def repository(self, request, tmp_path, clock):
        with MAKERS[request.param](tmp_path, clock) as made:
            yield made

    def test_a_schedule_works_from_declaration_to_removal(self, make, clock):
        queue = make()
        queue.schedule("beat", every(60), "remote", {"ü": "☃"}, overlap="skip")
        queue.schedule("nightly", "30 2 * * *", "remote", tz="Europe/Berlin", misfire="skip")
        queue.start()
        later(queue, clock, 60)
        later(queue, clock, 60)
        assert ticks(queue) == ["27 12:01"]
        again = make()
        beat = again.schedule("beat", every(60), "remote", {"ü": "☃"}, overlap="skip")
        assert beat.next_tick == NOON + timedelta(seconds=180)
        beat.pause()
        later(queue, clock, DAY)
        assert again.schedules()["beat"].paused
        assert ticks(queue) == ["27 12:01"]  # the night was missed: no round took place
        handles = again.schedules()["nightly"].backfill(NOON - timedelta(days=2), clock.now())
        assert [handle.task().run_at.day for handle in handles] == [26, 27, 28]
        assert again.schedules()["nightly"].trigger().task().status == "pending"
        beat.resume()
        for schedule in again.schedules().values():
            schedule.remove()
        assert queue.schedules() == {}
        later(queue, clock, DAY)
        assert len(ids(queue)) == 1 + 3 + 1


def test_a_repository_of_eight_methods_refuses_schedules(make_queue, clock):
    queue = make_queue(TinyRepository(), clock=clock)
    queue.declare("remote")
    with pytest.raises(ConfigurationError, match="TinyRepository has only the eight methods"):
        queue.schedule("s", every(60), "remote")
    assert queue.schedules() == {}


@unhurried
def test_without_schedules_their_notes_are_seldom_read(tmp_path, monkeypatch, timing):
    """They are read at the start and when another process changes something, not for each task."""
    store = MAKERS["sqlite"](tmp_path, ManualClock())
    queue = Queue(store, Config(worker_num=1), timing=timing)
    queue.executor("fine")(lambda: None)
    reads, read = [], queue.repository.reads.notes_after
    monkeypatch.setattr(
        queue.repository.reads, "notes_after", lambda *args: reads.append(args) or read(*args)
    )
    with queue.repository, queue:
        for _ in range(50):
            queue.submit("fine")
        assert queue.drain(PATIENCE)
        eventually(lambda: reads)
        assert len(reads) < 25  # a slow machine may need some seconds


# Many


@pytest.fixture
def many(make, clock):
    """A queue that is not started, with 200 schedules that tick at the same minute."""
    queue = make()
    for n in range(200):
        queue.schedule(f"s{n:03}", every(60), "remote")
    return queue


#: Ten schedules, or ticks, in each step.
in_tens = pytest.mark.timing(tick_batch=10, batch=10)


def reads_of(queue, monkeypatch, before=lambda: None):
    """Record each read of schedules from the repository as a list of the names that it finds.

    ``before`` is called before each read.
    """
    reads, repository = [], queue.repository

    def read(way, *args):
        before()
        found = way(*args)
        if any(name.startswith(PREFIX) for name in found):
            reads.append([name[len(PREFIX) :] for name in found])
        return found

    owners = {"notes": repository, "notes_named": repository.reads, "notes_after": repository.reads}
    for way, owner in owners.items():
        monkeypatch.setattr(owner, way, partial(read, getattr(owner, way)))
    return reads


def inserts_of(queue):
    return [[w.id for w in batch if isinstance(w, Insert)] for batch in queue.repository.batches]


def test_schedules_that_tick_together_take_few_transactions(many, clock, monkeypatch):
    puts, put_notes = [], many.repository.put_notes
    monkeypatch.setattr(many.repository, "put_notes", lambda c: (puts.append(c), put_notes(c))[1])
    ticker = ticker_of(many)
    ticker.tick()
    clock.advance(60)
    many.repository.batches.clear()
    assert ticker.tick()
    assert len(ids(many)) == 100  # one page of the list
    assert many.repository.count(TaskFilter()) == 200
    assert len(many.repository.batches) == len(puts) == 2
    assert all(len(batch) == 100 for batch in (*many.repository.batches, *puts))


def test_only_schedules_that_are_due_are_read_and_together(many, clock, monkeypatch):
    for n in range(50):
        many.schedule(f"idle {n}", every(3600), "remote")
    ticker = ticker_of(many)
    ticker.tick()
    reads = reads_of(many, monkeypatch)
    clock.advance(60)
    ticker.tick()
    assert [len(read) for read in reads] == [100, 100]
    assert {name for read in reads for name in read} == {f"s{n:03}" for n in range(200)}


def test_earlier_tasks_of_many_schedules_are_read_in_one_query(make, clock, monkeypatch):
    queue = make()
    for n in range(20):
        queue.schedule(f"s{n:02}", every(60), "remote", overlap="skip")
    ticker, asked = ticker_of(queue), []
    find = queue.repository.find
    monkeypatch.setattr(queue.repository, "find", lambda *args: asked.append(args) or find(*args))
    ticker.tick()
    clock.advance(60)
    ticker.tick()
    queue.cancel_task("s07@2026-03-27T12:01:00Z")
    clock.advance(60)
    asked.clear()
    ticker.tick()
    assert len(asked) == 1
    assert {i for i in ids(queue) if "12:02" in i} == {"s07@2026-03-27T12:02:00Z"}


@in_tens
def test_a_transaction_stays_small_after_many_missed_ticks(make, clock, monkeypatch):
    queue = make()
    for n in range(5):
        queue.schedule(f"s{n}", every(1), "remote", misfire="all", misfire_grace=DAY)
    clock.advance(7)
    ticker_of(queue).tick()
    made = [len(inserts) for inserts in inserts_of(queue) if inserts]
    assert made == [14, 14, 7]


def test_ticks_that_another_node_has_handled_are_not_repeated(many, make, clock):
    one, other = ticker_of(many), ticker_of(make())
    for ticker in (one, other):
        ticker.tick()
    clock.advance(60)
    one.tick()
    many.repository.batches.clear()
    assert not other.tick()
    assert many.repository.batches == []
    assert other.next == one.next == to_ms(NOON) + 120_000


@in_tens
def test_a_refresh_continues_where_the_last_call_stopped(many, clock, monkeypatch):
    reads = reads_of(many, monkeypatch)
    ticker = ticker_of(many)
    while ticker.behind(clock.now_ms()):
        ticker.tick(0.0)
    assert [len(read) for read in reads] == [10] * 20
    clock.advance(60)
    ticker.tick()
    assert many.repository.count(TaskFilter()) == 200


@in_tens
def test_a_refresh_misses_no_change_by_another_process(many, clock):
    ticker = ticker_of(many)
    ticker.tick()
    assert len(ticker._read) == 200
    for n in (0, 150, 190):
        many.schedules()[f"s{n:03}"].remove()
    ticker.refresh_now()
    ticker.tick(0.0)  # to s010
    many.schedules()["s005"].remove()
    many.schedule("s190", every(30), "remote")
    parts_of(many).agenda.schedules.append("s150")  # as after a removal by this process
    while ticker.waiting:
        ticker.tick(0.0)
    ticker.refresh_now()
    ticker.tick()
    left = {f"schedule/s{n:03}" for n in range(200)} - {f"schedule/s{n:03}" for n in (0, 5, 150)}
    assert set(ticker._read) == left
    clock.advance(30)
    ticker.tick()
    assert ids(many) == {"s190@2026-03-27T12:00:30Z"}


@in_tens
def test_a_refresh_requested_during_another_follows_it(many, clock, monkeypatch):
    ticker = ticker_of(many)
    ticker.tick(0.0)
    ticker.refresh_now()
    reads = reads_of(many, monkeypatch)
    ticker.tick()
    assert len(reads) == 19
    assert ticker.behind(clock.now_ms())
    ticker.tick()
    assert len(reads) == 19 + 20
    assert not ticker.behind(clock.now_ms())


def test_frequent_changes_of_a_schedule_leave_no_garbage(make, clock):
    queue = make()
    ticker = ticker_of(queue)
    for n in range(1000):
        queue.schedule("s", every(3600 + n), "remote")
        ticker.refresh_now()
        ticker.tick()
    assert len(ticker._next) < 500
    clock.advance(3600 + 999)
    assert ticker.tick()


@in_tens
def test_a_round_ends_in_time_even_if_more_schedules_are_due(many, clock):
    ticker = ticker_of(many)
    ticker.tick()
    clock.advance(60)
    for made in range(10, 200, 10):
        assert ticker.tick(0.0)
        assert many.repository.count(TaskFilter()) == made
        assert ticker.behind(clock.now_ms())
    ticker.tick(0.0)
    assert many.repository.count(TaskFilter()) == 200
    assert not ticker.tick(0.0)
    assert not ticker.behind(clock.now_ms())


@in_tens
@pytest.mark.parametrize("count", [1, 30])
def test_a_drain_waits_for_a_tick_until_its_task_is_stored(make, clock, monkeypatch, count):
    """This holds for one schedule and for several batches, at the first round and later."""
    queue = make()
    for n in range(count):
        queue.schedule(f"s{n}", every(60), "remote")
    ticker, told = ticker_of(queue), []

    def tell(*_):
        told.append(ticker.behind(clock.now_ms()))

    reads_of(queue, monkeypatch, tell)
    queue.repository.before = tell
    for _ in range(2):
        clock.advance(60)
        assert ticker.tick()
        assert not ticker.behind(clock.now_ms())
    assert len(told) > 3
    assert all(told)


def test_a_drain_sees_a_tick_that_is_taken_up_during_its_check(queue, clock, monkeypatch):
    queue.schedule("s", every(60), "remote")
    ticker = ticker_of(queue)
    ticker.tick()
    clock.advance(60)

    def late(self):
        """The housekeeper takes the tick up just before the read."""
        assert self._due_names()

    monkeypatch.setattr(Ticker, "next", property(late, lambda self, tick: None), raising=False)
    assert ticker.behind(clock.now_ms())


@in_tens
def test_two_nodes_take_different_schedules(make, many, clock):
    one, other = (ticker_of(each, Random(n).random) for n, each in enumerate((many, make())))
    for ticker in (one, other):
        ticker.tick()
    clock.advance(60)
    many.repository.batches.clear()

    def at_the_same_time(writes):
        many.repository.before = lambda writes: None
        other.tick(0.0)

    many.repository.before = at_the_same_time
    one.tick(0.0)
    first, second = inserts_of(many)
    assert len(first) == len(second) == 10
    assert len({*first, *second}) > 15  # with the same order it would be 10


def test_idle_schedules_are_not_read_when_others_tick(many, clock, monkeypatch):
    many.schedule("beat", every(1), "remote")
    ticker = ticker_of(many)
    ticker.tick()
    reads = reads_of(many, monkeypatch)
    for _ in range(5):
        clock.advance(1)
        assert ticker.tick()
    assert reads == [["beat"]] * 5


@pytest.mark.parametrize(
    ("takes", "pause"),
    [
        pytest.param(0.001, 1, id="short: at the usual pace"),
        pytest.param(0.015, 3, id="long: less often"),
        pytest.param(0.5, 5, id="very long: no less often than the bound"),
        pytest.param(60.0, 5, id="extremely long: no less often than the bound"),
    ],
)
def test_a_slow_refresh_happens_less_often_but_often_enough(make, monkeypatch, takes, pause):
    queue, now, read_at = make(), [0.0], []

    def slow(*args):
        now[0] += takes
        read_at.append(now[0])
        return {}

    monkeypatch.setattr(ticker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(queue.repository.reads, "notes_after", slow)
    ticker = ticker_of(queue)
    ticker.tick()
    while len(read_at) < 2:
        now[0] += 0.25
        ticker.refresh_soon()
        ticker.tick()
    assert read_at[1] - takes - read_at[0] == pytest.approx(pause, abs=0.3)


@pytest.mark.parametrize("misfire", ["one", "skip"])
def test_a_busy_node_misses_no_tick(make, clock, misfire):
    """The housekeeper had other duties, but its node was running."""
    queue = make()
    queue.schedule("s", every(1), "remote", misfire=misfire)
    ticker = ticker_of(queue)
    ticker.tick()
    clock.advance(5)
    ticker.tick()
    assert len(ids(queue)) == 5


def test_ticks_during_a_long_gap_are_missed(make, clock, caplog):
    queue = make()
    queue.schedule("s", every(1), "remote")
    ticker = ticker_of(queue)
    ticker.tick()
    clock.advance(12)
    ticker.tick()
    assert len(ids(queue)) == 1
    assert "were missed" in caplog.text


def test_a_schedule_whose_task_fails_to_store_does_not_stop_others(many, clock, monkeypatch):
    ticker = ticker_of(many)
    ticker.tick()
    clock.advance(60)

    moves = parts_of(many).moves
    commit = moves.commit

    def refuse(inserts):
        if any(insert.id.startswith("s007") for insert in inserts):
            raise ConnectionError("no key server")
        return commit(inserts)

    with monkeypatch.context() as patch:
        patch.setattr(moves, "commit", refuse)
        many.repository.batches.clear()
        ticker.tick()
    assert many.repository.count(TaskFilter()) == 199
    assert len(many.repository.batches) < 10  # the bad one is found by halving
    clock.advance(3)
    ticker.tick()
    assert many.repository.count(TaskFilter()) == 200


# Before the start


@pytest.fixture
def unstarted(make_queue, clock):
    """A queue that is not started, and stores schedules as any queue does."""
    queue = make_queue(clock=clock)
    queue.executor("beat")(lambda n=0: n)
    return queue


def names_of(repository):
    return [name[len(PREFIX) :] for name in repository.notes(PREFIX)]


def test_a_schedule_is_stored_by_the_start_of_its_queue(unstarted, repository, clock):
    made = unstarted.schedule("hourly", every(HOUR), "beat", {"n": 1})
    assert (made.name, made.type, made.params, made.stored) == ("hourly", "beat", {"n": 1}, False)
    assert made.next() == [NOON + timedelta(hours=1)]
    assert names_of(repository) == []
    assert "not stored yet" in repr(made)
    clock.advance(60)
    unstarted.start()
    assert names_of(repository) == ["hourly"]
    assert unstarted.schedules()["hourly"].next_tick == NOON + timedelta(hours=1, minutes=1)
    assert unstarted.schedule("daily", every(DAY), "beat").stored
    assert sorted(names_of(repository)) == ["daily", "hourly"]


@pytest.mark.parametrize("stored_before", [False, True])
def test_a_schedule_that_was_declared_before_the_start_knows_its_ticks_after_it(
    unstarted, make, clock, stored_before
):
    """The ticks of an interval count from the moment at which it was stored first."""
    if stored_before:
        make().schedule("hourly", every(HOUR), "remote")
        clock.advance(7 * 60)
    made = unstarted.schedule("hourly", every(HOUR), "beat")
    clock.advance(60)
    unstarted.start()
    first = NOON + timedelta(minutes=60 if stored_before else 61)
    assert made.next(2) == [first, first + timedelta(hours=1)]
    clock.advance(HOUR)
    assert [tick.at for tick in made.last()] == [first]
    assert made.stored


def test_the_schedules_are_stored_before_the_housekeeper_can_make_a_tick(
    unstarted, repository, monkeypatch
):
    """A tick would go by the options that an earlier program had stored. Late declarations count, too."""
    seen = []

    def begin(node):
        seen.extend(names_of(repository))
        unstarted.schedule("late", every(HOUR), "beat")
        real(node)

    real = LocalNode._begin
    monkeypatch.setattr(LocalNode, "_begin", begin)
    unstarted.schedule("hourly", every(HOUR), "beat")
    unstarted.start()
    assert seen == ["hourly"]
    assert sorted(names_of(repository)) == ["hourly", "late"]


def test_the_last_declaration_of_a_name_counts(unstarted, repository):
    unstarted.schedule("hourly", every(HOUR), "beat", {"n": 1})
    unstarted.schedule("hourly", every(2 * HOUR), "beat", {"n": 2})
    unstarted.start()
    [made] = unstarted.schedules().values()
    assert (made.spec, made.params) == (every(2 * HOUR), {"n": 2})


def test_declared_schedules_are_listed_with_the_state_of_the_stored_ones(unstarted, make, clock):
    other = make()
    other.schedule("other", every(60), "remote")
    other.schedule("hourly", every(HOUR), "remote").pause()
    unstarted.schedule("new", every(60), "beat")
    unstarted.schedule("hourly", every(HOUR), "beat")
    found = unstarted.schedules()
    assert {name: (one.type, one.paused, one.stored) for name, one in found.items()} == {
        "hourly": ("beat", True, True),
        "new": ("beat", False, False),
        "other": ("remote", False, True),
    }
    assert other.schedules().keys() == {"hourly", "other"}
    unstarted.start()
    assert unstarted.schedules()["hourly"].paused


@pytest.mark.parametrize(
    "act",
    [
        lambda made: made.store(),
        lambda made: made.pause(),
        lambda made: made.resume(),
        lambda made: made.trigger(),
        lambda made: made.backfill(NOON, NOON),
    ],
)
def test_a_change_of_a_declared_schedule_stores_it(unstarted, repository, act):
    act(unstarted.schedule("hourly", every(HOUR), "beat"))
    assert names_of(repository) == ["hourly"]


def test_a_declared_schedule_that_is_removed_is_not_stored(unstarted, repository):
    made = unstarted.schedule("hourly", every(HOUR), "beat")
    made.remove()
    assert unstarted.schedules() == {}
    with pytest.raises(ScheduleNotFound):
        made.pause()
    unstarted.start()
    assert names_of(repository) == []


def test_a_schedule_that_was_stored_and_then_removed_by_others_stays_removed(unstarted, make):
    unstarted.schedule("hourly", every(HOUR), "beat").store()
    make().schedules()["hourly"].remove()
    unstarted.start()
    assert unstarted.schedules() == {}


def test_a_start_that_cannot_store_the_schedules_can_be_repeated(
    unstarted, repository, monkeypatch
):
    unstarted.schedule("hourly", every(HOUR), "beat")

    def fail(*_):
        raise RepositoryUnavailable("down")

    monkeypatch.setattr(unstarted._schedules, "_store", fail)
    with pytest.raises(RepositoryUnavailable):
        unstarted.start()
    assert repository.liveness.nodes() == []
    monkeypatch.undo()
    unstarted.start()
    assert names_of(repository) == ["hourly"]


def test_a_schedule_that_is_declared_during_the_start_is_stored(unstarted, repository, monkeypatch):
    publish = unstarted._node._publish

    def declare_first():
        unstarted.schedule("hourly", every(HOUR), "beat")
        return publish()

    monkeypatch.setattr(unstarted._node, "_publish", declare_first)
    unstarted.start()
    assert names_of(repository) == ["hourly"]


def test_a_declaration_opens_no_file(tmp_path):
    path = tmp_path / "tasks.db"
    queue = Queue(open_repository(f"sqlite:///{path}"))
    queue.declare("remote")
    queue.executor("beat")(lambda: None)
    queue.schedule("hourly", every(HOUR), "beat")
    queue.schedule("daily", every(DAY), "remote")
    assert not path.exists()
    with queue:
        assert queue.schedules().keys() == {"hourly", "daily"}
