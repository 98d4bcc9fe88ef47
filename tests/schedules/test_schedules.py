"""Schedules: each tick is one task, however often it is declared, whatever the clock does."""

from __future__ import annotations

import json
import logging
import threading
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from helpers import PATIENCE, eventually, housekeeper_of, ids, pool_of, services_of, whole_round
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
    tick_of,
)
from taskx.core.clock import to_ms
from taskx.core.ticks import BATCH
from taskx.core.writes import Insert
from taskx.schedules import ticker as ticker_module
from taskx.schedules.stored import PREFIX, store
from taskx.schedules.ticker import Ticker
from taskx.testing import ManualClock

pytestmark = pytest.mark.every_store

NOON = datetime(2026, 3, 27, 12, tzinfo=timezone.utc)  # two days before the clocks go forward
HOUR, DAY = 3600, 86400


@pytest.fixture
def clock():
    return ManualClock(NOON)


@pytest.fixture
def make(make_queue, clock):
    """Makes queues with a type that another process runs, so that its tasks stay as they are."""

    def make(on=None, **options):
        queue = make_queue(on, **{"worker_num": 1, "clock": clock, **options})
        queue.declare("remote")
        return queue

    return make


@pytest.fixture
def queue(make):
    return make()


@pytest.fixture
def started(queue):
    queue.start()
    return queue


def look(*queues):
    """Have them look, all at once; returns when nothing is due any more, its tasks being stored."""
    for queue in queues:
        services_of(queue).agenda.wake()
    for queue in queues:
        whole_round(queue)  # also where nothing is due, and nothing must come of it
    eventually(lambda: not any(is_due(s, queues[0]) for s in queues[0].schedules().values()))


def ticker(queue):
    return housekeeper_of(queue)._ticker


def has_looked(queue):
    """Whether its housekeeper has read all schedules."""
    return ticker(queue)._refresh_at and not ticker(queue).waiting


def is_due(schedule, queue):
    if schedule._entry.making is not None:
        return True
    return schedule.next_tick is not None and schedule.next_tick <= queue._clock.now()


def later(queue, clock, seconds):
    clock.advance(seconds)
    look(queue)


def ticks(queue):
    """The ticks that have a task, in order, as hours and minutes of UTC."""
    found = sorted(tick for task in queue.list_tasks()[0] if (tick := tick_of(task)))
    return [tick.strftime("%d %H:%M") for tick in found]


def note(queue, name):
    return queue.repository.notes(PREFIX + name)[PREFIX + name]


# Ticking


def test_each_tick_makes_one_task(started, clock):
    """Also on the days on which clocks are set forward and back."""
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


def test_the_task_is_as_the_schedule_says(started, clock):
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


def test_what_the_executor_says_holds_where_the_schedule_says_nothing(started, clock):
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


def test_the_thread_wakes_in_time_by_itself(make_queue, look_every):
    """On the clock of the machine, and not because it looks at something else."""
    look_every(poll=2 * PATIENCE)
    queue = make_queue(worker_num=1)
    late: list[float] = []

    @queue.executor()
    def note_lateness(ctx):
        late.append((datetime.now(timezone.utc) - tick_of(ctx.task)).total_seconds())

    queue.start()
    queue.schedule("beat", every(0.2), "note_lateness")
    eventually(lambda: len(late) >= 4)
    assert min(late) >= -0.001  # a millisecond, as ticks are whole ones


@pytest.fixture
def unhurried(monkeypatch):
    """What is not noticed at once is not noticed."""
    for interval in ("RECOVER_EVERY", "AUDIT_EVERY"):
        monkeypatch.setattr(f"taskx.upkeep.housekeeper.{interval}", float("inf"))


@pytest.mark.parametrize("way", ["tick", "trigger", "backfill"])
def test_its_task_is_taken_at_once(unhurried, started, clock, way):
    started.executor("mine")(lambda: "done")
    eventually(lambda: has_looked(started))
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


def test_a_store_that_is_away_at_the_start_is_asked_again(unhurried, queue, clock, monkeypatch):
    queue.schedule("s", every(60), "remote")
    notes, away = queue.repository.notes_after, [True]

    def failing(*args):
        if away:
            away.pop()
            raise RepositoryUnavailable("away for a moment")
        return notes(*args)

    monkeypatch.setattr(queue.repository, "notes_after", failing)
    queue.start()
    eventually(lambda: ticker(queue).next)
    assert not away


def test_what_somebody_changes_in_the_middle_of_a_tick_is_noticed(
    unhurried, make, clock, monkeypatch
):
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


def test_a_queue_that_is_stopping_does_not_tick(started, clock, gate):
    started.executor("hold")(lambda: gate())
    started.schedule("s", every(60), "remote")
    held = started.submit("hold", id="held")
    gate.wait_for()
    assert started.stop(timeout=0.1) == [held.id]
    clock.advance(60)
    housekeeper_of(started).tick()
    assert ids(started) == {"held"}
    gate.open()
    eventually(lambda: not started.repository.liveness.nodes())


def test_a_queue_that_is_stopping_is_not_woken_by_ticks_that_it_leaves_alone(started, clock, gate):
    started.executor("hold")(lambda: gate())
    started.submit("hold")
    gate.wait_for(1)
    started.schedule("s", every(60), "remote")
    eventually(lambda: ticker(started).next)
    agenda = services_of(started).agenda
    pool_of(started).begin_stop()
    clock.advance(60)
    waits, signal = [], agenda._bell
    agenda._bell = Waits(waits.append)
    eventually(lambda: len(waits) >= 3)
    agenda._bell = signal
    gate.open()
    assert min(waits[1:]) > 0.01


class Waits:
    """Tells how long the housekeeper would wait, and lets it wait for a moment."""

    def __init__(self, tell):
        self.tell = tell

    def wait(self, timeout):
        self.tell(timeout)
        threading.Event().wait(0.001)

    def set(self):
        """It is awake."""


def test_a_queue_that_is_not_started_does_not_tick(queue, clock):
    queue.schedule("beat", every(30), "remote")
    clock.advance(300)
    assert queue.schedules()["beat"].last_tick is None
    assert ids(queue) == set()


def test_a_full_buffer_refuses_no_tick(make_queue, clock, busy):
    queue = busy(buffer_size=1, overflow="reject", clock=clock)
    queue.submit("note")
    queue.schedule("beat", every(30), "note", {"n": 1})
    later(queue, clock, 30)
    assert "beat@2026-03-27T12:00:30Z" in ids(queue)


@pytest.mark.usefixtures("frequent_looks")
def test_hooks_are_told_by_whoever_stored_the_task(make, clock):
    told = []

    class Told(Hook):
        def submitted(self, task):
            told.append(task.id)

    queue, other = make(hooks=[Told()]), make(hooks=[Told()])
    queue.start(), other.start()
    queue.schedule("beat", every(30), "remote")
    eventually(lambda: ticker(other).next)
    clock.advance(30)
    look(queue, other)
    assert queue.drain(PATIENCE)
    assert other.drain(PATIENCE)
    assert told == ["beat@2026-03-27T12:00:30Z"]


# Declaring


def test_to_declare_it_again_changes_nothing(started, clock):
    started.schedule("nightly", "0 3 * * *", "remote", {"n": 1})
    for days in range(4):
        later(started, clock, DAY)
        before = note(started, "nightly")
        again = started.schedule("nightly", " 0  3 * * *", "remote", {"n": 1})
        assert note(started, "nightly") == before
        assert len(ticks(started)) == days + 1
        assert again.last_tick == again.next_tick - timedelta(days=1)


def test_a_start_of_the_program_declares_it_and_makes_good_what_was_missed(make, clock):
    first = make()
    first.schedule("nightly", "0 3 * * *", "remote")
    clock.advance(2 * DAY)
    second = make()
    second.schedule("nightly", "0 3 * * *", "remote")
    assert ids(second) == set()
    second.start()
    look(second)
    assert ticks(second) == ["29 03:00"]


def test_other_params_leave_its_ticks_alone(started, clock):
    started.schedule("beat", every(60), "remote", {"n": 1})
    later(started, clock, 50)
    started.schedule("beat", every(60), "remote", {"n": 2}, overlap="skip")
    later(started, clock, 10)
    assert started.get_task_status("beat@2026-03-27T12:01:00Z").params == {"n": 2}
    assert started.schedules()["beat"].overlap == "skip"


def test_another_spec_begins_from_now(started, clock):
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


def test_another_spec_never_ticks_again_where_the_old_one_did(started, clock):
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
        (("s", every(5), 5), {}, ConfigurationError, "Task or a type, not int"),
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
    ],
)
def test_what_cannot_work_is_refused_at_once(queue, arguments, options, error, complaint):
    queue.executor("mine")(lambda n: n)
    with pytest.raises(error, match=complaint):
        queue.schedule(*arguments, **options)
    assert queue.schedules() == {}


# Looking, pausing, removing


def test_they_are_listed_by_name(queue, clock):
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


def test_names_that_begin_alike_are_kept_apart(queue):
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


def test_a_preview_goes_on_while_it_is_paused_or_behind(queue, clock):
    schedule = queue.schedule("beat", every(60), "remote")
    clock.advance(150)
    assert schedule.next() == [NOON + timedelta(seconds=180)]
    schedule.pause()
    assert schedule.next() == [NOON + timedelta(seconds=180)]


def test_paused_it_does_not_tick_and_makes_nothing_good(started, clock):
    schedule = started.schedule("beat", every(60), "remote")
    schedule.pause()
    assert (schedule.paused, schedule.next_tick) == (True, None)
    later(started, clock, 600)
    assert started.schedule("beat", every(60), "remote").paused, "a start of the program"
    assert started.schedule("beat", every(50), "remote").paused, "a new version of it"
    later(started, clock, 30)
    schedule.resume()
    assert (schedule.paused, schedule.next_tick) == (False, NOON + timedelta(seconds=650))
    look(started)
    assert ids(started) == set()
    later(started, clock, 20)
    assert ids(started) == {"beat@2026-03-27T12:10:50Z"}


def test_what_it_was_paused_for_is_not_made_good(started, clock):
    schedule = started.schedule("beat", every(60), "remote")
    schedule.pause()
    clock.advance(90)
    schedule.resume()
    assert schedule.next_tick == NOON + timedelta(seconds=120)
    later(started, clock, 30)
    assert ticks(started) == ["27 12:02"]


def test_to_resume_what_is_not_paused_changes_nothing(queue, clock):
    """What it is behind with is made good all the same."""
    schedule = queue.schedule("beat", every(60), "remote")
    clock.advance(70)
    schedule.resume()
    queue.start()
    look(queue)
    assert ticks(queue) == ["27 12:01"]


def test_what_another_queue_changes_holds_at_the_next_tick(make, clock):
    ticking, web = make(), make()
    ticking.start()
    ticking.schedule("a", every(60), "remote", {"n": 1})
    ticking.schedule("b", every(60), "remote", {"n": 1})
    ticking.schedule("c", every(60), "remote", {"n": 1})
    look(ticking)
    web.schedules()["a"].pause()
    web.schedules()["b"].remove()
    web.schedule("c", every(60), "remote", {"n": 2})
    later(ticking, clock, 60)
    assert ids(ticking) == {"c@2026-03-27T12:01:00Z"}
    assert ticking.get_task_status("c@2026-03-27T12:01:00Z").params == {"n": 2}


def test_a_schedule_of_another_queue_is_noticed(make, clock, look_every):
    look_every(audit=0.05)
    look_every(schedules=0.05)
    ticking, web = make(), make()
    ticking.start()
    eventually(lambda: housekeeper_of(ticking)._last["audit"])  # it has looked, and found none
    web.schedule("beat", every(60), "remote")
    clock.advance(60)
    eventually(lambda: ids(web) == {"beat@2026-03-27T12:01:00Z"})


def test_removed_it_is_gone_and_its_tasks_stay(started, clock):
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


def test_declared_anew_after_it_was_removed_it_makes_no_task_twice(started, clock):
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
def test_an_id_that_looks_like_that_of_a_tick_is_that_of_none(name):
    assert tick_of(Task(type="remote", id=name)) is None


@pytest.mark.parametrize("thing", ["x", None])
def test_what_is_no_task_has_no_tick(thing):
    with pytest.raises(ConfigurationError, match="tick_of requires a Task"):
        tick_of(thing)


def test_triggered_it_runs_now_beside_its_ticks(started, clock):
    started.executor("mine")(lambda n: n)
    schedule = started.schedule("s", every(60), "mine", {"n": 5}, priority=3)
    schedule.pause()
    first, second = schedule.trigger(), schedule.trigger()
    assert first.result(PATIENCE) == second.result(PATIENCE) == 5
    assert first.id != second.id
    assert (first.task().priority, first.task().created_by) == (3, "schedule:s")
    assert tick_of(first.task()) is None
    assert schedule.last_tick is None


def test_triggered_on_a_queue_that_is_not_started_it_waits_for_one_that_is(make):
    """It need not know the type either."""
    make().schedule("s", every(60), "remote", {"n": 5})
    other = make()
    handle = other.schedules()["s"].trigger()
    assert handle.task().params == {"n": 5}
    runner = make()
    runner.executor("remote")(lambda n: n + 1)
    runner.start()
    assert runner.handle(handle.id).result(PATIENCE) == 6


def test_a_backfill_makes_the_tasks_that_are_missing(started, clock):
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


def test_a_backfill_of_many_ticks(queue, clock):
    schedule = queue.schedule("s", every(60), "remote")
    handles = schedule.backfill(clock.now() - timedelta(minutes=2 * BATCH + 1), clock.now())
    assert len({handle.id for handle in handles}) == 2 * BATCH + 2
    assert queue.list_tasks(TaskFilter(limit=0))[1] == 2 * BATCH + 2


def test_a_tick_that_was_filled_before_its_time_has_come_gets_no_other_task(queue, clock):
    """Nobody was there when it ticked, and somebody fills before somebody starts."""
    schedule = queue.schedule("s", every(60), "remote", {"by": "hand"})
    clock.advance(60)
    schedule.backfill(NOON, clock.now())
    queue.start()
    look(queue)
    assert ticks(queue) == ["27 12:00", "27 12:01"]
    assert queue.schedules()["s"].last_tick == clock.now()


@pytest.mark.parametrize(
    ("start", "end", "complaint"),
    [
        (NOON, NOON - timedelta(seconds=1), "requires start <= end"),
        (NOON, NOON + timedelta(seconds=1), "not in the future"),
        (datetime(2026, 3, 1), NOON, "aware"),
        (None, NOON, "start must be a datetime"),
        (NOON, "today", "end must be a datetime"),
    ],
)
def test_a_span_that_is_none_is_refused(queue, start, end, complaint):
    schedule = queue.schedule("s", every(0.5), "remote")
    with pytest.raises(ConfigurationError, match=complaint):
        schedule.backfill(start, end)
    assert ids(queue) == set()


def test_a_stopped_queue_makes_no_tasks(started, clock):
    schedule = started.schedule("s", every(60), "remote")
    started.stop()
    clock.advance(60)
    with pytest.raises(QueueStopped):
        schedule.trigger()
    with pytest.raises(QueueStopped):
        schedule.backfill(NOON, NOON)
    assert ids(started) == set()


def test_a_forked_child_has_the_schedules_of_its_parent(started):
    """As if the queue had not been started, nor stopped."""
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
def test_what_becomes_of_ticks_that_nobody_was_there_for(queue, clock, caplog, options, made):
    schedule = queue.schedule("s", every(60), "remote", **options)
    clock.advance(5 * 60 + 30)
    queue.start()
    look(queue)
    assert ticks(queue) == made
    assert f"ticks since 2026-03-27 12:01:00+00:00 were missed; {len(made)} of them" in (
        caplog.text
    )
    later(queue, clock, 30)
    assert ticks(queue) == [*made, "27 12:06"], "and then it goes on"
    assert queue.schedules()["s"].last_tick == NOON + timedelta(seconds=360)
    assert schedule.next() == [NOON + timedelta(seconds=420)]


def test_a_tick_a_little_late_is_none_that_was_missed(queue, clock, caplog):
    queue.schedule("s", every(60), "remote", misfire="skip")
    queue.start()
    look(queue)
    later(queue, clock, 69)
    assert ticks(queue) == ["27 12:01"]
    assert "were missed" not in caplog.text


def test_very_many_missed_ticks_are_made_good_in_parts(queue, clock, repository):
    queue.schedule("s", every(1), "remote", misfire="all", misfire_grace=DAY)
    clock.advance(3 * BATCH)
    queue.start()
    eventually(lambda: len(queue.repository.list(TaskFilter(limit=1000))) == 3 * BATCH)
    assert max(len(batch) for batch in repository.batches) == BATCH


# Overlap


def test_a_tick_is_skipped_while_the_task_of_an_earlier_one_has_not_ended(started, clock):
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


def test_a_running_task_has_not_ended(started, clock, gate):
    started.executor("hold")(lambda: gate())
    started.schedule("s", every(60), "hold", overlap="skip")
    later(started, clock, 60)
    gate.wait_for()
    later(started, clock, 60)
    gate.open()
    assert started.drain(PATIENCE)
    later(started, clock, 60)
    assert ticks(started) == ["27 12:01", "27 12:03"]


def test_tasks_made_by_hand_are_none_of_an_earlier_tick(started, clock):
    schedule = started.schedule("s", every(60), "remote", overlap="skip")
    schedule.trigger()
    later(started, clock, 60)
    assert ticks(started) == ["27 12:01"]


def test_of_missed_ticks_only_one_is_made_good_where_tasks_must_not_overlap(queue, clock):
    queue.schedule("s", every(60), "remote", overlap="skip", misfire="all", misfire_grace=DAY)
    clock.advance(200)
    queue.start()
    look(queue)
    assert ticks(queue) == ["27 12:01"]


# The clock


def test_a_clock_that_is_set_back_ticks_nothing_twice(started, clock):
    started.schedule("s", every(60), "remote")
    for _ in range(3):
        later(started, clock, 60)
    clock.set_wall(NOON - timedelta(hours=1))
    for _ in range(63):
        later(started, clock, 60)
    assert ticks(started) == ["27 12:01", "27 12:02", "27 12:03"]
    later(started, clock, 60)
    assert ticks(started)[-1] == "27 12:04"


def test_nothing_twice_even_where_the_tasks_are_gone(started, clock):
    """What was done is known by the schedule, too, not by the tasks alone."""
    started.schedule("s", every(60), "remote")
    later(started, clock, 60)
    started.delete("s@2026-03-27T12:01:00Z")
    clock.set_wall(NOON)
    later(started, clock, 60)
    assert ids(started) == set()


def test_a_clock_that_is_set_forward_is_a_misfire(started, clock):
    started.schedule("s", every(60), "remote")
    look(started)
    clock.set_wall(NOON + timedelta(days=365, seconds=10))
    look(started)
    assert ids(started) == {"s@2027-03-27T12:00:00Z"}


# Several nodes, crashes, faults


def test_of_several_nodes_one_makes_the_task(make, clock):
    queues = [make() for _ in range(3)]
    for queue in queues:
        queue.start()
        queue.schedule("s", every(60), "remote")
    for _ in range(5):
        clock.advance(60)
        look(*queues)
    assert ticks(queues[0]) == [f"27 12:0{n}" for n in range(1, 6)]


@pytest.mark.parametrize("overlap", ["allow", "skip"])
def test_a_node_that_died_between_task_and_schedule_is_made_good(make, clock, monkeypatch, overlap):
    """Whoever comes next finds the task there, and moves the schedule on."""
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
    look(other)
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
        patch.setattr(ticker_module, "store", die)
        with pytest.raises(RepositoryUnavailable):
            Ticker(services_of(dying)).tick()
    assert ids(dying) == set()
    clock.advance(5)
    return dying


def test_a_tick_that_a_node_took_up_before_it_died_gets_its_task(taken_up, make, clock):
    """Where tasks must not overlap the schedule is moved on first; the next tick knows of that task."""
    other = make()
    other.start()
    look(other)
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
def test_so_it_does_though_the_schedule_was_changed_meanwhile(taken_up, clock, change):
    change(taken_up)
    taken_up.start()
    look(taken_up)
    assert ticks(taken_up) == ["27 12:01"]


@pytest.mark.parametrize("misfire", ["skip", "one"])
@pytest.mark.parametrize("at", ["put_notes", "apply"])
def test_nodes_that_decide_about_different_ticks_make_no_two_tasks_at_once(
    make, clock, monkeypatch, at, misfire
):
    """One makes a missed tick good, and the next tick comes for another one before that is stored."""
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
    """As often as its schedules are due, as the housekeeper would."""
    ticker = Ticker(services_of(queue))
    while ticker.behind(queue._clock.now_ms()):
        ticker.tick()


@pytest.mark.parametrize("misfire", ["skip", "one"])
def test_what_a_dead_node_left_counts_as_overlap(make, clock, misfire):
    """It had stored the task of one of the missed ticks, and not moved the schedule on."""
    queue = make()
    schedule = queue.schedule("s", every(60), "remote", misfire=misfire, overlap="skip")
    clock.advance(120)
    schedule.backfill(clock.now(), clock.now())
    clock.advance(60)
    queue.start()
    look(queue)
    assert ticks(queue) == ["27 12:02"]


def test_a_store_that_was_away_is_a_misfire(started, repository, clock, caplog):
    started.schedule("s", every(60), "remote")
    repository.down = True
    clock.advance(130)
    eventually(lambda: "the housekeeper tries again" in caplog.text)
    repository.down = False
    eventually(lambda: ticks(started) == ["27 12:02"])


DAMAGED = ["{", "[]", "{}", '{"spec": 7}', None]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_schedule_does_not_keep_others_from_ticking(started, clock, caplog, text):
    started.schedule("broken", every(60), "remote")
    started.schedule("sound", every(60), "remote")
    stored = note(started, "broken")
    if text is None:  # of a version that can do more
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
def test_one_of_a_newer_version_that_is_declared_over_stays_paused(queue, paused):
    queue.schedule("s", every(60), "remote")
    stored = note(queue, "s")
    newer = {**json.loads(stored.text), "jitter": 5, "paused": paused}
    queue.repository.put_note(PREFIX + "s", json.dumps(newer), stored.version)
    assert queue.schedule("s", every(60), "remote").paused is paused


def read_version(queue):
    read = ticker(queue)._read.get(PREFIX + "s")
    return read and read.version


def test_what_others_go_on_ticking_is_complained_of_once(started, clock, caplog):
    """At each of their ticks it is changed."""
    started.schedule("s", every(60), "remote")
    for n in range(3):
        stored = note(started, "s")
        newer = {**json.loads(stored.text), "jitter": n}
        assert started.repository.put_note(PREFIX + "s", json.dumps(newer), stored.version)
        seen = note(started, "s").version
        ticker(started).refresh_now()
        services_of(started).agenda.wake()
        eventually(lambda seen=seen: read_version(started) == seen)
    assert caplog.text.count("schedule/s does not tick in this process") == 1


@pytest.mark.parametrize(
    "change",
    [{"next": "soon"}, {"tz": "Mars/Olympus"}, {"misfire": "two"}, {"task": {}}, {"spec": "x"}],
)
def test_values_that_this_process_cannot_know_are_told_once(started, clock, caplog, change):
    """It may be another host that knows them."""
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
    """One that refuses what it is told to."""

    name = "moody"
    refused = b"never"

    def encode(self, data):
        if self.refused in data:
            raise ConnectionError("no key server")
        return data

    def decode(self, data):
        return data


class TestParamsThatTheCodecRefuses:
    @pytest.fixture
    def codec(self):
        return Moody()

    @pytest.fixture(params=["memory", "sqlite", "mongomock"])
    def repository(self, request, tmp_path, clock, codec):
        with coded(request.param, tmp_path, clock, codec) as made:
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
        return queue

    def test_are_refused_when_it_is_declared(self, make, codec):
        codec.refused = b"poison"
        queue = make()
        with pytest.raises(PayloadError, match="params: codec 'moody' failed: ConnectionError"):
            queue.schedule("bad", every(60), "remote", {"x": "poison"})
        assert queue.schedules() == {}

    def test_keep_nothing_else_from_being_done(self, refused, clock, caplog):
        """Neither other schedules, nor what the housekeeper does after them."""
        queue = refused
        for done in (2, 3, 4):
            clock.advance(60)
            eventually(lambda done=done: len(ticks(queue)) == done)
        assert {task_id[:4] for task_id in ids(queue)} == {"good"}
        queue.cancel_many(ids(queue))
        clock.advance(120)  # old enough, and retention looks
        eventually(lambda: not any(task.status.finished for task in queue.list_tasks()[0]))
        assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []

    def test_are_tried_again_ever_more_rarely(self, refused, clock, caplog, monkeypatch):
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
        assert (
            caplog.text.count("schedule 'bad'") == 3
        )  # the 2nd, 4th and 8th time, beside the first

    def test_are_stored_when_it_takes_them(self, refused, clock, codec):
        """The ticks until then are missed ones."""
        codec.refused = b"never"
        clock.advance(180)
        eventually(lambda: "bad@2026-03-27T12:04:00Z" in ids(refused))
        clock.advance(60)
        eventually(lambda: "bad@2026-03-27T12:05:00Z" in ids(refused))

    def test_are_tried_at_once_when_they_are_changed(self, refused, clock):
        refused.schedule("bad", every(60), "remote", {"x": "better"})
        eventually(lambda: "bad@2026-03-27T12:01:00Z" in ids(refused))

    def test_are_tried_in_time_though_the_wall_clock_is_set_back(self, refused, clock, codec):
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

    def test_from_declaration_to_removal(self, make, clock):
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
        assert ticks(queue) == ["27 12:01"]  # the night was missed, as nobody looked
        handles = again.schedules()["nightly"].backfill(NOON - timedelta(days=2), clock.now())
        assert [handle.task().run_at.day for handle in handles] == [26, 27, 28]
        assert again.schedules()["nightly"].trigger().task().status == "pending"
        beat.resume()
        for schedule in again.schedules().values():
            schedule.remove()
        assert queue.schedules() == {}
        later(queue, clock, DAY)
        assert len(ids(queue)) == 1 + 3 + 1


def test_eight_methods_cannot_keep_schedules(make_queue, clock):
    queue = make_queue(TinyRepository(), clock=clock)
    queue.declare("remote")
    with pytest.raises(ConfigurationError, match="TinyRepository has only the eight methods"):
        queue.schedule("s", every(60), "remote")
    assert queue.schedules() == {}


@pytest.mark.usefixtures("unhurried")
def test_without_schedules_nothing_is_read_for_them_but_seldom(tmp_path, monkeypatch):
    """Not for each task: when it starts, and when others changed something."""
    queue = Queue(MAKERS["sqlite"](tmp_path, ManualClock()), Config(worker_num=1))
    queue.executor("fine")(lambda: None)
    looks, read = [], queue.repository.notes_after
    monkeypatch.setattr(
        queue.repository, "notes_after", lambda *args: looks.append(args) or read(*args)
    )
    with queue.repository, queue:
        for _ in range(50):
            queue.submit("fine")
        assert queue.drain(PATIENCE)
        eventually(lambda: looks)
        assert len(looks) < 5


# Many


@pytest.fixture
def many(make, clock):
    """A queue that is not started, with 200 schedules that tick at the same minute."""
    queue = make()
    for n in range(200):
        queue.schedule(f"s{n:03}", every(60), "remote")
    return queue


@pytest.fixture
def in_tens(monkeypatch):
    monkeypatch.setattr(ticker_module, "TOGETHER", 10)
    monkeypatch.setattr(ticker_module, "PAGE", 10)


def reads_of(queue, monkeypatch, before=lambda: None):
    """The schedules that are read of its repository: of each read, the names of those that there are.

    ``before`` is called before each.
    """
    reads, repository = [], queue.repository

    def read(way, *args):
        before()
        found = way(*args)
        if any(name.startswith(PREFIX) for name in found):
            reads.append([name[len(PREFIX) :] for name in found])
        return found

    for way in ("notes", "notes_named", "notes_after"):
        monkeypatch.setattr(repository, way, partial(read, getattr(repository, way)))
    return reads


def inserts_of(queue):
    return [[w.id for w in batch if isinstance(w, Insert)] for batch in queue.repository.batches]


def test_schedules_that_tick_together_take_few_transactions(many, clock, monkeypatch):
    puts, put_notes = [], many.repository.put_notes
    monkeypatch.setattr(many.repository, "put_notes", lambda c: (puts.append(c), put_notes(c))[1])
    looks = Ticker(services_of(many))
    looks.tick()
    clock.advance(60)
    many.repository.batches.clear()
    assert looks.tick()
    assert len(ids(many)) == 100  # of a page
    assert many.repository.count(TaskFilter()) == 200
    assert len(many.repository.batches) == len(puts) == 2
    assert all(len(batch) == 100 for batch in (*many.repository.batches, *puts))


def test_schedules_that_tick_together_are_read_together_and_no_others(many, clock, monkeypatch):
    for n in range(50):
        many.schedule(f"idle {n}", every(3600), "remote")
    looks = Ticker(services_of(many))
    looks.tick()
    reads = reads_of(many, monkeypatch)
    clock.advance(60)
    looks.tick()
    assert [len(read) for read in reads] == [100, 100]
    assert {name for read in reads for name in read} == {f"s{n:03}" for n in range(200)}


def test_of_many_that_must_not_overlap_the_earlier_tasks_are_looked_up_together(
    make, clock, monkeypatch
):
    queue = make()
    for n in range(20):
        queue.schedule(f"s{n:02}", every(60), "remote", overlap="skip")
    looks, asked = Ticker(services_of(queue)), []
    find = queue.repository.find
    monkeypatch.setattr(queue.repository, "find", lambda *args: asked.append(args) or find(*args))
    looks.tick()
    clock.advance(60)
    looks.tick()
    queue.cancel_task("s07@2026-03-27T12:01:00Z")
    clock.advance(60)
    asked.clear()
    looks.tick()
    assert len(asked) == 1
    assert {i for i in ids(queue) if "12:02" in i} == {"s07@2026-03-27T12:02:00Z"}


def test_a_transaction_has_no_more_tasks_however_many_ticks_were_missed(
    in_tens, make, clock, monkeypatch
):
    queue = make()
    for n in range(5):
        queue.schedule(f"s{n}", every(1), "remote", misfire="all", misfire_grace=DAY)
    clock.advance(7)
    Ticker(services_of(queue)).tick()
    made = [len(inserts) for inserts in inserts_of(queue) if inserts]
    assert made == [14, 14, 7]


def test_what_other_nodes_have_done_is_read_and_not_done_again(many, make, clock):
    one, other = Ticker(services_of(many)), Ticker(services_of(make()))
    for looks in (one, other):
        looks.tick()
    clock.advance(60)
    one.tick()
    many.repository.batches.clear()
    assert not other.tick()
    assert many.repository.batches == []
    assert other.next == one.next == to_ms(NOON) + 120_000


def test_a_look_at_all_goes_on_where_the_last_one_stopped(in_tens, many, clock, monkeypatch):
    reads = reads_of(many, monkeypatch)
    looks = Ticker(services_of(many))
    while looks.behind(clock.now_ms()):
        looks.tick(0.0)
    assert [len(read) for read in reads] == [10] * 20
    clock.advance(60)
    looks.tick()
    assert many.repository.count(TaskFilter()) == 200


def test_a_look_at_all_misses_no_change_of_another_process_meanwhile(in_tens, many, clock):
    looks = Ticker(services_of(many))
    looks.tick()
    assert len(looks._read) == 200
    for n in (0, 150, 190):
        many.schedules()[f"s{n:03}"].remove()
    looks.refresh_now()
    looks.tick(0.0)  # to s010
    many.schedules()["s005"].remove()
    many.schedule("s190", every(30), "remote")
    services_of(many).agenda.schedules.append("s150")  # as if this process had removed it
    while looks.waiting:
        looks.tick(0.0)
    looks.refresh_now()
    looks.tick()
    left = {f"schedule/s{n:03}" for n in range(200)} - {f"schedule/s{n:03}" for n in (0, 5, 150)}
    assert set(looks._read) == left
    clock.advance(30)
    looks.tick()
    assert ids(many) == {"s190@2026-03-27T12:00:30Z"}


def test_a_look_that_is_asked_for_in_the_middle_of_another_follows_it(
    in_tens, many, clock, monkeypatch
):
    looks = Ticker(services_of(many))
    looks.tick(0.0)
    looks.refresh_now()
    reads = reads_of(many, monkeypatch)
    looks.tick()
    assert len(reads) == 19
    assert looks.behind(clock.now_ms())
    looks.tick()
    assert len(reads) == 19 + 20
    assert not looks.behind(clock.now_ms())


def test_a_schedule_that_is_changed_again_and_again_leaves_nothing_behind(make, clock):
    queue = make()
    looks = Ticker(services_of(queue))
    for n in range(1000):
        queue.schedule("s", every(3600 + n), "remote")
        looks.refresh_now()
        looks.tick()
    assert len(looks._next) < 500
    clock.advance(3600 + 999)
    assert looks.tick()


def test_a_look_ends_in_time_though_more_tick(in_tens, many, clock):
    looks = Ticker(services_of(many))
    looks.tick()
    clock.advance(60)
    for made in range(10, 200, 10):
        assert looks.tick(0.0)
        assert many.repository.count(TaskFilter()) == made
        assert looks.behind(clock.now_ms())
    looks.tick(0.0)
    assert many.repository.count(TaskFilter()) == 200
    assert not looks.tick(0.0)
    assert not looks.behind(clock.now_ms())


@pytest.mark.parametrize("count", [1, 30])
def test_a_drain_hears_of_a_tick_until_its_task_is_stored(in_tens, make, clock, monkeypatch, count):
    """When all schedules are read, each, or some together, at the first look and later."""
    queue = make()
    for n in range(count):
        queue.schedule(f"s{n}", every(60), "remote")
    looks, told = Ticker(services_of(queue)), []

    def tell(*_):
        told.append(looks.behind(clock.now_ms()))

    reads_of(queue, monkeypatch, tell)
    queue.repository.before = tell
    for _ in range(2):
        clock.advance(60)
        assert looks.tick()
        assert not looks.behind(clock.now_ms())
    assert len(told) > 3
    assert all(told)


def test_a_drain_hears_of_a_tick_that_is_taken_up_while_it_looks(queue, clock, monkeypatch):
    queue.schedule("s", every(60), "remote")
    looks = Ticker(services_of(queue))
    looks.tick()
    clock.advance(60)

    def late(self):
        """The housekeeper came just before."""
        assert self._due_names()

    monkeypatch.setattr(Ticker, "next", property(late))
    assert looks.behind(clock.now_ms())


def test_two_nodes_take_up_different_ones_of_many(in_tens, make, many, clock):
    one, other = Ticker(services_of(many)), Ticker(services_of(make()))
    for looks in (one, other):
        looks.tick()
    clock.advance(60)
    many.repository.batches.clear()

    def at_the_same_time(writes):
        many.repository.before = lambda writes: None
        other.tick(0.0)

    many.repository.before = at_the_same_time
    one.tick(0.0)
    first, second = inserts_of(many)
    assert len(first) == len(second) == 10
    assert len({*first, *second}) >= 15  # in the same order it would be 10


def test_idle_schedules_are_not_read_again_as_others_tick(many, clock, monkeypatch):
    many.schedule("beat", every(1), "remote")
    looks = Ticker(services_of(many))
    looks.tick()
    reads = reads_of(many, monkeypatch)
    for _ in range(5):
        clock.advance(1)
        assert looks.tick()
    assert reads == [["beat"]] * 5


@pytest.mark.parametrize(
    ("takes", "pause"),
    [
        pytest.param(0.001, 1, id="short: at the usual pace"),
        pytest.param(0.015, 3, id="long: less often"),
        pytest.param(0.5, 5, id="very long: no less often than the bound"),
        pytest.param(60.0, 5, id="however long"),
    ],
)
def test_a_look_that_takes_long_is_taken_less_often_but_often_enough(
    make, monkeypatch, takes, pause
):
    queue, now, looked = make(), [0.0], []

    def slow(*args):
        now[0] += takes
        looked.append(now[0])
        return {}

    monkeypatch.setattr(ticker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(queue.repository, "notes_after", slow)
    looks = Ticker(services_of(queue))
    looks.tick()
    while len(looked) < 2:
        now[0] += 0.25
        looks.refresh_soon()
        looks.tick()
    assert looked[1] - takes - looked[0] == pytest.approx(pause, abs=0.3)


@pytest.mark.parametrize("misfire", ["one", "skip"])
def test_a_tick_that_a_busy_node_comes_late_to_is_not_missed(make, clock, misfire):
    """The housekeeper had other things to do; nobody was away."""
    queue = make()
    queue.schedule("s", every(1), "remote", misfire=misfire)
    looks = Ticker(services_of(queue))
    looks.tick()
    clock.advance(5)
    looks.tick()
    assert len(ids(queue)) == 5


def test_ticks_while_nobody_looked_for_long_are_missed(make, clock, caplog):
    queue = make()
    queue.schedule("s", every(1), "remote")
    looks = Ticker(services_of(queue))
    looks.tick()
    clock.advance(12)
    looks.tick()
    assert len(ids(queue)) == 1
    assert "were missed" in caplog.text


def test_a_schedule_whose_task_cannot_be_made_does_not_keep_others_from_ticking(
    many, clock, monkeypatch
):
    looks = Ticker(services_of(many))
    looks.tick()
    clock.advance(60)

    def refuse(services, inserts):
        if any(insert.id.startswith("s007") for insert in inserts):
            raise ConnectionError("no key server")
        return store(services, inserts)

    with monkeypatch.context() as patch:
        patch.setattr(ticker_module, "store", refuse)
        many.repository.batches.clear()
        looks.tick()
    assert many.repository.count(TaskFilter()) == 199
    assert len(many.repository.batches) < 10  # the one is sought by halves
    clock.advance(3)
    looks.tick()
    assert many.repository.count(TaskFilter()) == 200
