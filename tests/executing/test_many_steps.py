"""Many steps: the first ones are stored in notes, so that each step costs the same."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers import PATIENCE

from taskx import (
    MemoryRepository,
    PayloadError,
    RepositoryUnavailable,
    TaskStatus,
    Uncertain,
    ZlibCodec,
)
from taskx.node.retention import forget_steps, prune_all
from taskx.tasks.payload import DEFAULT_MAX_SIZE
from taskx.tasks.record import PART, checkpoints_to_text
from taskx.tasks.streams import Piece
from taskx.testing import ManualClock, ManualQueue

TEXT = "x" * 1000


def many(queue, count=60, **options):
    """Register an executor with so many steps of a thousand characters; the first attempt fails."""
    called = []

    @queue.executor("many", max_attempts=2, **options)
    def many(ctx, fails: bool = True):
        for n in range(count):
            ctx.step(f"step {n}", lambda n=n: called.append(n) or f"{n} {TEXT}")
        if fails and ctx.task.errors == 0:
            raise ValueError("once")
        return len(ctx.task.checkpoints["steps"]) if ctx.task.checkpoints else 0

    return called


def parts(queue):
    return queue.repository.notes(PART)


@pytest.mark.every_store
def test_a_later_attempt_gets_all_of_them(repository):
    clock = ManualClock()
    repository.clock = clock
    queue = ManualQueue(repository, clock=clock)
    called = many(queue)
    handle = queue.submit("many")
    queue.run_all()
    assert called == [*range(60)]
    assert handle.result() == 60
    stored = handle.task().checkpoints
    assert stored["steps"] == {f"step {n}": f"{n} {TEXT}" for n in range(60)}
    assert [*stored["steps"]] == [f"step {n}" for n in range(60)]  # in their order
    assert len(parts(queue)) == len(stored["parts"]) == 3


def test_each_step_costs_the_same(monkeypatch):
    """The work grows with the number of steps, not with its square."""
    queue, sizes = ManualQueue(), []
    apply, put = queue.repository.apply, queue.repository.put_note

    def count(writes, **options):
        sizes.extend(len(w.changes.get("checkpoints") or "") for w in writes)
        return apply(writes, **options)

    def count_note(name, text, version):
        sizes.append(len(text or ""))
        return put(name, text, version)

    monkeypatch.setattr(queue.repository, "apply", count)
    monkeypatch.setattr(queue.repository, "put_note", count_note)
    many(queue, count=400)
    queue.submit("many", {"fails": False})
    queue.run_all()
    assert max(sizes) < 25 * len(TEXT)
    assert sum(sizes) < 400 * 15 * len(TEXT)


def test_a_task_with_few_steps_has_no_notes():
    queue = ManualQueue()
    many(queue, count=3)
    handle = queue.submit("many")
    queue.run_all()
    assert handle.result() == 3
    assert parts(queue) == {}
    assert handle.task().checkpoints.keys() == {"steps"}


def test_a_codec_writes_them():
    queue = ManualQueue(MemoryRepository(codec=ZlibCodec()))
    called = many(queue)
    handle = queue.submit("many")
    queue.run_all()
    assert (handle.result(), len(called)) == (60, 60)
    assert all(TEXT not in note.text for note in parts(queue).values())


def test_waits_in_between():
    queue, called = ManualQueue(), []

    @queue.executor("waits")
    def waits(ctx):
        for n in range(30):
            ctx.step(f"step {n}", lambda n=n: called.append(n) or TEXT)
            if n % 10 == 9:
                ctx.sleep(timedelta(days=1), step=f"night {n}")
            if n == 20:
                ctx.once("pay", pay)
        return len(called)

    def pay():
        raise Uncertain

    handle = queue.submit("waits")
    queue.advance(timedelta(days=1))
    assert queue.wake(handle.id)
    queue.run_all()
    assert queue.finish(f"{handle.id}/pay", "rc_1")
    queue.advance(timedelta(days=2))
    assert handle.result() == 30
    assert handle.task().checkpoints["steps"]["pay"] == "rc_1"


def test_a_wake_leaves_them_where_they_are():
    queue = ManualQueue()

    @queue.executor("naps")
    def naps(ctx):
        for n in range(30):
            ctx.step(f"step {n}", lambda: TEXT)
        for n in range(3):
            ctx.sleep(timedelta(days=1), step=f"nap {n}")

    handle = queue.submit("naps")
    queue.run_all()
    before = parts(queue)
    steps = handle.task().checkpoints["steps"]
    for _ in range(3):
        assert queue.wake(handle.id)
        assert handle.task().checkpoints["steps"].keys() == steps.keys()
        queue.run_all()
        steps = handle.task().checkpoints["steps"]
    assert handle.task().status is TaskStatus.COMPLETED
    assert [*steps] == [*(f"step {n}" for n in range(30)), *(f"nap {n}" for n in range(3))]
    assert parts(queue) == before


def test_a_requeue_from_a_step():
    queue = ManualQueue()
    called = many(queue)

    @queue.executor("last")
    def last(ctx):
        for n in range(60):
            ctx.step(f"step {n}", lambda n=n: called.append(n) or f"{n} {TEXT}")
        if len(called) == 60:
            raise ValueError("once")
        return len(ctx.task.checkpoints["steps"])

    handle = queue.submit("last")
    queue.run_all()
    queue.requeue(handle.id, from_step="step 40")
    queue.run_all()
    assert called == [*range(60), *range(40, 60)]
    assert [*handle.task().checkpoints["steps"]] == [f"step {n}" for n in range(60)]


def test_an_attempt_that_dies_before_it_names_a_note(monkeypatch):
    queue = ManualQueue()
    called = many(queue)
    put, dies = queue.repository.put_note, [True]

    def put_note(*args):
        done = put(*args)
        if dies:
            dies.clear()
            raise ValueError("it dies")
        return done

    monkeypatch.setattr(queue.repository, "put_note", put_note)
    handle = queue.submit("many", {"fails": False})
    queue.run_all()
    assert len(handle.task().checkpoints["steps"]) == 60
    assert len(called) == 61  # the step whose result was not stored
    assert len(parts(queue)) == 1 + len(handle.task().checkpoints["parts"])


def test_a_note_that_was_stored_in_doubt_is_used(monkeypatch):
    queue = ManualQueue()
    many(queue)
    put, in_doubt = queue.repository.put_note, [True]

    def put_note(*args):
        done = put(*args)
        if in_doubt:
            in_doubt.clear()
            raise RepositoryUnavailable("the answer was lost")
        return done

    monkeypatch.setattr(queue.repository, "put_note", put_note)
    handle = queue.submit("many", {"fails": False})
    queue.run_all()
    assert handle.task().attempt == 1
    assert len(parts(queue)) == len(handle.task().checkpoints["parts"])


def test_a_note_that_is_gone_before_it_is_named_is_an_error_in_words(monkeypatch):
    queue = ManualQueue()
    many(queue)
    monkeypatch.setattr(queue.repository, "put_note", lambda *args: False)
    handle = queue.submit("many", max_attempts=1)
    queue.run_all()
    task = handle.task()
    assert task.error_type == "taskx.tasks.errors.RepositoryError"
    assert f"steps of task {task.id} are not stored" in task.error


@pytest.mark.parametrize("text", [100 * TEXT, 33_333 * "税"], ids=["one byte", "three bytes"])
def test_they_are_as_large_as_the_config_allows(text):
    queue = ManualQueue()

    @queue.executor("large")
    def large(ctx):
        for n in range(12):
            ctx.step(f"step {n}", lambda: text)

    handle = queue.submit("large")
    queue.run_all()
    assert handle.task().error_type == "taskx.tasks.errors.PayloadError"
    assert PayloadError.__name__ in handle.task().error
    assert len(handle.task().checkpoints["steps"]) == 10


def test_so_are_the_names_of_those_that_emit():
    """The default is for params and results that nothing else is said about."""
    pieces = {f"step {n}": [Piece(1, n, 1, 60)] for n in range(40_000)}
    text = checkpoints_to_text({}, None, None, pieces)
    assert len(text) > DEFAULT_MAX_SIZE


@pytest.mark.every_store
def test_the_notes_go_with_the_record(repository):
    clock = ManualClock()
    repository.clock = clock
    queue = ManualQueue(repository, clock=clock)
    many(queue)
    gone, stays = queue.submit("many"), queue.submit("many")
    queue.run_all()
    queue.delete(gone.id)
    assert forget_steps(queue.repository, queue._timing.scan_batch) == (3, "")
    assert stays.task().checkpoints["steps"]
    prune_all(queue._moves, queue._timing, clock.now() + timedelta(days=1), None)
    assert parts(queue) == {}


def test_a_note_that_is_gone_is_damage():
    queue = ManualQueue()
    many(queue)
    handle = queue.submit("many", max_attempts=1)
    queue.run_all()
    name, note = next(iter(parts(queue).items()))
    queue.repository.put_note(name, None, note.version)
    assert "the stored record is damaged" in handle.task().damage
    queue.requeue(handle.id)
    queue.run_all()
    assert handle.task().status is TaskStatus.FAILED


@pytest.mark.process
def test_in_a_child_process(make_queue):
    from . import isolated

    queue = make_queue(worker_num=1)
    queue.executor("steps", isolation="process", max_attempts=2)(isolated.many_steps)
    queue.start()
    handle = queue.submit("steps", {"text": TEXT, "count": 60})
    assert handle.result(PATIENCE) == 60
    assert len(parts(queue)) == 3
