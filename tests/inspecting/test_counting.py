"""What nodes count: it reaches the repository once, is added up there, and is bounded."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import PATIENCE, eventually, parts_of

import taskx
from taskx import ConfigurationError, Context, KeyUsage, RepositoryUnavailable, Snooze
from taskx.node import counts
from taskx.node.counts import KEYS, TYPES, Rollup
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending
from taskx.testing import ManualQueue
from taskx.testing.clock import ManualClock

DAY = timedelta(days=1)


@pytest.fixture
def make(repository):
    """Return a function that makes queues without threads, all on one repository and one clock."""
    clock, made = ManualClock(), []

    def make():
        queue = ManualQueue(repository, clock=clock)

        @queue.executor("a")
        def work(ctx: Context, spends: int = 0):
            if spends:
                ctx.spent(tokens=spends)

        made.append(queue)
        return queue

    yield make
    for queue in made:
        queue.close()


@pytest.fixture
def queue(make):
    return make()


def run(queue, **options):
    queue.submit("a", {}, **options)
    queue.run_all()


def total(queue, period=timedelta(days=700)):
    return queue.stats(period=period).types["a"].completed


def names(queue, levels=TYPES):
    """Return the number of notes of each level."""
    return [len(queue.repository.notes(level.prefix)) for level in levels]


# From memory to the repository


@pytest.mark.every_store
def test_what_a_node_counted_reaches_the_others_within_seconds(make):
    queue, other = make(), make()
    run(queue)
    assert (total(queue), total(other)) == (1, 0)
    queue.advance(6)
    assert (total(queue), total(other)) == (1, 1)


@pytest.mark.every_store
def test_a_stop_stores_what_was_counted(make):
    queue, other = make(), make()
    run(queue)
    queue.stop()
    assert total(other) == 1


def test_a_queue_without_new_counts_writes_nothing(queue):
    run(queue)
    queue.advance(6)
    before = queue.repository.notes("count/")
    queue.advance(60)
    assert queue.repository.notes("count/") == before


def test_a_cancel_by_a_queue_that_is_not_started_is_stored_at_once(make, make_queue, clock):
    other, queue = make(), make_queue(clock=make().clock)
    queue.declare("a")
    queue.submit("a").cancel()
    assert other.stats().types["a"].cancelled == 1


@pytest.mark.every_store
def test_counts_whose_storing_is_in_doubt_are_stored_once(make, monkeypatch):
    queue, other = make(), make()
    run(queue)
    store = parts_of(queue).moves.counts
    put = store.notes.put

    def stored_and_lost(changes):
        put(changes)
        raise RepositoryUnavailable("the answer was lost")

    monkeypatch.setattr(store.notes, "put", stored_and_lost)
    with pytest.raises(RepositoryUnavailable):
        store.store()
    monkeypatch.undo()
    assert (total(queue), total(other)) == (1, 1)
    run(queue)
    store.store()
    assert (total(queue), total(other)) == (2, 2)


def test_counts_wait_while_the_repository_is_away(queue, monkeypatch):
    run(queue)
    store = parts_of(queue).moves.counts

    def away(changes):
        raise RepositoryUnavailable("away")

    monkeypatch.setattr(store.notes, "put", away)
    with pytest.raises(RepositoryUnavailable):
        store.store()
    run(queue)
    assert total(queue) == 2
    monkeypatch.undo()
    store.store()
    assert (total(queue), store.some) == (2, False)


def test_threads_of_a_node_count_every_task(make_queue):
    queue = make_queue(worker_num=4, overflow="spill")
    queue.executor("a")(lambda: None)
    with queue:
        for _ in range(20):
            queue.submit_many([taskx.Task(type="a") for _ in range(100)])
            parts_of(queue).moves.counts.gather()
        assert queue.drain(PATIENCE)
        # A worker counts what it has committed, so the last end may be seen before it is counted.
        counted = lambda of: (of.started, of.completed)  # noqa: E731
        eventually(lambda: counted(queue.stats().types["a"]) == (2000, 2000))


def test_a_minute_that_a_wrong_clock_has_shown_is_not_counted_for_ever(queue):
    run(queue)
    queue.clock.set_wall(queue.clock.now() + timedelta(days=30))
    run(queue)
    queue.clock.set_wall(queue.clock.now() - timedelta(days=30))
    run(queue)
    assert sum(queue.history().completed) == 3


# Sums


@pytest.mark.every_store
def test_counts_are_added_up_by_minutes_hours_and_days_and_removed(make):
    queue, other = make(), make()
    for _ in range(3):
        run(queue)
        run(other)
        for one in (queue, other):
            one.advance(30)
    queue.advance(180)
    assert names(queue) == [0, 3, 0, 0, 0]
    assert total(other) == 6
    queue.advance(4 * 3600)
    assert names(queue) == [0, 0, 1, 0, 0]
    queue.advance(24 * 3600)
    assert names(queue) == [0, 0, 0, 1, 0]
    queue.advance(63 * DAY)
    assert names(queue) == [0, 0, 0, 0, 1]
    assert total(other) == 6
    queue.advance(801 * DAY)
    assert names(queue) == [0, 0, 0, 0, 0]


@pytest.fixture
def rollup(queue):
    return Rollup(parts_of(queue).moves.counts.notes, 4)


def store(queue, number):
    """Store some notes of one minute, and let them grow old."""
    for _ in range(number):
        run(queue)
        parts_of(queue).moves.counts.store()
    queue.clock.advance(180)


@pytest.mark.every_store
def test_a_sum_that_was_interrupted_counts_nothing_twice(queue, rollup, monkeypatch):
    store(queue, 3)
    with monkeypatch.context() as patch:
        patch.setattr(rollup, "_remove", lambda notes: None)  # it was killed before
        rollup.step(queue.clock.now_ms())
        assert (names(queue)[:2], total(queue)) == ([3, 1], 3)
        rollup.step(queue.clock.now_ms())
        assert (names(queue)[:2], total(queue)) == ([3, 1], 3)
    [sum_of_all] = queue.repository.notes(TYPES[1].prefix)
    late = f"{TYPES[0].prefix}{sum_of_all.removeprefix(TYPES[1].prefix)}/late"
    assert queue.repository.put_note(late, counts.to_text({"a": {"completed": 2}}), 0)
    rollup.step(queue.clock.now_ms())
    assert (names(queue)[:2], total(queue)) == ([0, 1], 5)


@pytest.mark.every_store
def test_a_sum_that_another_node_made_meanwhile_is_left_to_it(queue, rollup, monkeypatch):
    store(queue, 3)
    notes = rollup._notes
    other = Rollup(notes, 4)
    read = notes.named

    def overtaken(wanted):
        found = read(wanted)
        monkeypatch.undo()
        other.step(queue.clock.now_ms())
        return found

    monkeypatch.setattr(notes, "named", overtaken)
    rollup.step(queue.clock.now_ms())
    assert (names(queue)[:2], total(queue)) == ([0, 1], 3)


def test_more_notes_than_a_batch_are_added_up_in_several_steps(queue, rollup):
    store(queue, 10)
    assert [rollup.step(queue.clock.now_ms()) for _ in range(3)] == [True, True, False]
    assert (names(queue)[:2], total(queue)) == ([0, 1], 10)


@pytest.mark.parametrize("text", ["", "[]", '{"of":[],"cells":{"a":1}}', '{"cells":1}'])
def test_a_damaged_note_hides_no_other(queue, rollup, text):
    store(queue, 1)
    name = TYPES[0].name(queue.clock.now_ms() - 180_000)
    assert queue.repository.put_note(f"{name}/damaged", text, 0)
    assert queue.repository.put_note(f"{TYPES[0].prefix}damaged", text, 0)
    assert total(queue) == 1
    rollup.step(queue.clock.now_ms())
    assert (names(queue)[:2], total(queue)) == ([1, 1], 1)


# Since counting began


def end_uncounted(queue):
    """End a task as a TaskX did that did not count yet."""
    queue.declare("a")
    handle, now = queue.submit("a"), queue.clock.now_ms()
    queue.repository.apply([lifecycle.start(handle.task(), now, "node")])
    writes = lifecycle.conclude(handle.task(), Ending(returned=True), now)
    assert all(queue.repository.apply(writes))


@pytest.mark.every_store
def test_the_answers_say_since_when_tasks_are_counted(make, make_queue):
    clock = make().clock
    end_uncounted(make_queue(clock=clock))
    clock.advance(600)
    queue, began = make(), clock.now()
    assert (queue.stats().complete, queue.stats().since) == (False, began)
    run(queue)
    queue.advance(60)
    for found in (queue.stats(), make().stats(), make().history()):
        assert (found.complete, found.since) == (False, began)
    queue.advance(3600)
    assert queue.stats().complete


def test_all_is_counted_if_no_task_had_ended_before(make):
    run(make())
    queue = make()
    assert (queue.stats(period=790 * DAY).complete, total(queue)) == (True, 0)
    run(queue)
    queue.advance(6)
    assert make().stats(period=700 * DAY).complete


def test_the_answers_say_that_counts_were_removed(make):
    queue = make()
    run(queue)
    queue.advance(801 * DAY)
    kept = queue.clock.now() - timedelta(days=800)
    found = queue.stats(period=900 * DAY)
    assert (found.complete, found.since) == (False, kept)


# Keys


@pytest.fixture
def tenants(queue):
    """A queue with a limit for each tenant."""
    queue.limit("tenant:", concurrency=2)
    return queue


@pytest.mark.every_store
def test_the_usage_of_each_key_with_a_limit_is_counted(tenants):
    for key, spends in (("tenant:b", 0), ("tenant:b", 7), ("tenant:a", 0), ("other", 0)):
        tenants.submit("a", {"spends": spends}, key=key, cost={"tokens": 5})
    tenants.submit("a", key="tenant:a", delay=60).cancel()
    tenants.run_all()
    found = tenants.usage("tenant:")
    assert found.keys == {
        "tenant:a": KeyUsage(started=1, completed=1, cancelled=1, cost={"tokens": 5}),
        "tenant:b": KeyUsage(started=2, completed=2, cost={"tokens": 12}),
    }
    assert (found.rest, found.complete) == (KeyUsage(), True)
    assert [*tenants.usage("tenant:b").keys] == ["tenant:b"]
    assert tenants.stats().types["a"].cost == {"tokens": 22}
    assert taskx.tasks.payload.encode(found.to_dict(), "usage")


def test_an_attempt_that_snoozes_costs_only_what_it_has_spent(tenants):
    """Whoever was refused by the other side (HTTP 429) has taken nothing."""
    tenants.limit("model", rate="6000 tokens/m")

    @tenants.executor(limit="model")
    def think(ctx):
        if ctx.task.snoozes == 1:
            ctx.spent(tokens=3)
        if ctx.task.snoozes < 3:
            raise Snooze(0.1, limit=True)

    tenants.submit("think", key="tenant:a", cost={"tokens": 60})
    for _ in range(4):
        tenants.run_all()
        tenants.advance(2)
    assert tenants.usage("tenant:").keys["tenant:a"].cost == {"tokens": 63}


def test_a_task_that_waits_costs_its_estimate_once(tenants):
    @tenants.executor()
    def ask(ctx):
        return ctx.ask("one")

    handle = tenants.submit("ask", key="tenant:a", cost={"tokens": 60})
    tenants.run_all()
    tenants.finish(f"{handle.id}/one", 1)
    tenants.run_all()
    assert handle.result() == 1
    assert tenants.usage("tenant:").keys["tenant:a"].cost == {"tokens": 60}


@pytest.mark.every_store
def test_the_usage_is_kept_by_hours_and_then_by_days(tenants):
    begin = tenants.clock.now()
    for _ in range(2):
        run(tenants, key="tenant:a")
        tenants.advance(1.5 * DAY)
    assert tenants.usage("tenant:", period=1.6 * DAY).keys["tenant:a"].completed == 1
    assert tenants.usage("tenant:", since=begin).keys["tenant:a"].completed == 2
    tenants.advance(3 * DAY)
    assert names(tenants, KEYS) == [0, 0, 2]
    found = tenants.usage("tenant:", since=begin + 0.7 * DAY)
    assert (found.since, found.keys["tenant:a"].completed) == (begin, 2)


def test_the_smallest_of_too_many_keys_are_counted_together(tenants, monkeypatch):
    monkeypatch.setattr(counts, "MOST_KEYS", 2)
    for number in range(1, 6):
        for _ in range(number):
            run(tenants, key=f"tenant:{number}")
    tenants.advance(300)
    found = tenants.usage("tenant:")
    assert {key: of.completed for key, of in found.keys.items()} == {"tenant:4": 4, "tenant:5": 5}
    assert (found.rest.completed, found.complete) == (6, True)
    assert not tenants.usage("tenant:4").complete  # an hour may have had it among the rest


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [(("tenant",), {}, "'tenant' has no ':'"), (("a:",), {"period": -1}, "period")],
)
def test_a_wrong_argument_is_refused(queue, arguments, options, words):
    with pytest.raises(ConfigurationError, match=words):
        queue.usage(*arguments, **options)
