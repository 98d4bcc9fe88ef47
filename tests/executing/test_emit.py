"""What executors emit while they run, and how it is read."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from concurrent.futures import CancelledError
from contextlib import closing

import pytest
from helpers import PATIENCE, nested, no_rounds, parts_of
from storage.repositories import MAKERS

from taskx import (
    Config,
    ConfigurationError,
    MemoryRepository,
    PayloadError,
    Queue,
    Retry,
    SQLiteRepository,
    TaskFailed,
    TaskNotFound,
    ZlibCodec,
)
from taskx.node.retention import forget_streams
from taskx.stores.streams import Reader
from taskx.tasks import lifecycle
from taskx.tasks.lifecycle import Ending
from taskx.tasks.payload import MAX_DEPTH
from taskx.tasks.streams import STREAM, Chunk, Events, Stream
from taskx.testing import ManualClock, ManualQueue

from . import isolated


@pytest.fixture
def queue(repository):
    clock = ManualClock()
    repository.clock = clock
    return ManualQueue(repository, clock=clock)


def stored(queue):
    return sorted(queue.repository.notes(STREAM))


def read(handle, after=None):
    """Return what a reader has after the last restart, and the number of restarts."""
    values, restarts = [], 0
    for chunk in handle.stream(after):
        if chunk.restart:
            values, restarts = [], restarts + 1
        values.append(chunk.value)
    return values, restarts


@pytest.mark.every_store
def test_chunks_come_in_order_and_then_the_result(queue):
    @queue.executor("letters")
    def letters(ctx):
        for letter in "ab☃":
            ctx.emit({"letter": letter})
        return 3

    handle = queue.submit("letters")
    queue.run_all()
    stream = handle.stream()
    assert [(c.value["letter"], c.position, c.restart) for c in stream] == [
        ("a", "1-1", False),
        ("b", "1-2", False),
        ("☃", "1-3", False),
    ]
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value == 3
    assert [chunk.value["letter"] for chunk in handle.stream("1-1")] == ["b", "☃"]
    assert [*handle.stream("1-3")] == []


@pytest.mark.every_store
def test_a_retry_begins_anew_but_completed_steps_are_not_called_again(queue):
    called = []

    def work(ctx, name):
        called.append(name)
        for n in range(3):
            ctx.emit(f"{name} {n}")

    @queue.executor("job", max_attempts=3)
    def job(ctx):
        ctx.emit(f"begin {ctx.task.attempt}")
        ctx.step("one", work, ctx, "one")
        ctx.emit("between")
        ctx.step("two", lambda: ctx.step("inner", work, ctx, "inner"))
        if ctx.task.attempt < 3:
            raise Retry(delay=0)
        ctx.emit("end")

    handle = queue.submit("job")
    reader, seen = Reader(queue.repository, handle.task()), []
    for _ in range(3):
        queue.run_next()
        seen.append(reader.read())
    assert called == ["one", "inner"]
    whole = [f"one {n}" for n in range(3)], [f"inner {n}" for n in range(3)]
    assert [[chunk.value for chunk in chunks] for chunks in seen] == [
        ["begin 1", *whole[0], "between", *whole[1]],
        ["begin 2", *whole[0], "between", *whole[1]],
        ["begin 3", *whole[0], "between", *whole[1], "end"],
    ]
    assert [[c.restart for c in chunks].count(True) for chunks in seen] == [0, 1, 1]
    assert [chunks[0].restart for chunks in seen] == [False, True, True]
    assert [c.position for c in seen[2]] == [f"3-{n}" for n in range(1, 10)]
    for n in range(10):  # from each place, also inside what a skipped step had emitted
        assert [c.value for c in handle.stream(f"3-{n}")] == [c.value for c in seen[2]][n:]
    assert read(handle, "1-2") == ([c.value for c in seen[2]], 1)
    # Nothing else is left of the earlier attempts.
    assert len(stored(queue)) < 9


def test_an_event_has_a_value_as_deep_as_it_may_be():
    queue = ManualQueue()
    deep = nested(MAX_DEPTH)
    queue.executor("tell")(lambda ctx: ctx.emit(deep))
    handle = queue.submit("tell")
    queue.run_all()
    _, told, _ = Events(handle.stream(), PATIENCE, lambda value: value)
    assert json.loads(told.decode().partition("data: ")[2]) == {"value": deep, "restart": False}


def test_a_wait_begins_anew_too():
    queue = ManualQueue()

    @queue.executor("asks")
    def asks(ctx):
        ctx.emit("hello")
        ctx.step("think", lambda: ctx.emit("thought"))
        answer = ctx.ask("sure?")
        ctx.emit(answer)

    handle = queue.submit("asks")
    queue.run_all()
    reader = Reader(queue.repository, handle.task())
    assert [chunk.value for chunk in reader.read()] == ["hello", "thought"]
    queue.finish(f"{handle.id}/sure?", "yes")
    queue.run_all()
    assert [(chunk.value, chunk.restart) for chunk in reader.read()] == [
        ("hello", True),
        ("thought", False),
        ("yes", False),
    ]


def test_an_error_comes_after_the_last_chunk():
    queue = ManualQueue()

    @queue.executor("fails")
    def fails(ctx):
        ctx.emit(1)
        raise ValueError("no")

    handle = queue.submit("fails")
    queue.run_all()
    stream = handle.stream()
    assert next(stream).value == 1
    for _ in range(2):
        with pytest.raises(TaskFailed):
            next(stream)
    cancelled = queue.submit("fails")
    cancelled.cancel()
    with pytest.raises(CancelledError):
        next(cancelled.stream())
    with pytest.raises(TaskNotFound):
        queue.handle("unknown").stream()


def test_async_for():
    queue = ManualQueue()

    @queue.executor("numbers")
    def numbers(ctx, fails: bool):
        for n in range(3):
            ctx.emit(n)
        if fails:
            raise ValueError("no")

    async def collect(handle):
        return [chunk.value async for chunk in handle.stream()]

    good, bad = (queue.submit("numbers", {"fails": fails}) for fails in (False, True))
    queue.run_all()
    assert asyncio.run(collect(good)) == [0, 1, 2]
    with pytest.raises(TaskFailed):
        asyncio.run(collect(bad))


def test_a_cancelled_wait_for_a_chunk_loses_none_and_disturbs_no_order():
    class Source:
        def __init__(self):
            self.reading, self.goes_on = threading.Event(), threading.Event()
            self.inside = self.number = 0

        def read(self):
            assert not self.inside
            self.inside, self.number = 1, self.number + 1
            number = self.number
            self.reading.set()
            assert self.goes_on.wait(PATIENCE)
            self.inside = 0
            return [Chunk(number, f"1-{number}")]

    async def main():
        first = asyncio.create_task(anext(stream))
        await asyncio.to_thread(source.reading.wait, PATIENCE)
        first.cancel()
        later = asyncio.create_task(anext(stream))
        asyncio.get_running_loop().call_later(0.05, source.goes_on.set)
        return [(await later).value, (await anext(stream)).value]

    queue, source = ManualQueue(), Source()
    queue.executor("a")(lambda: None)
    stream = Stream(queue.submit("a"), source, 0.1)
    assert asyncio.run(main()) == [1, 2]


def test_emit_waits_for_no_repository(monkeypatch):
    """A coroutine that emits would keep all others from going on."""
    repository = MemoryRepository()
    queue = ManualQueue(repository)

    @queue.executor("a", max_attempts=2)
    def a(ctx):
        with monkeypatch.context() as patch:
            for name in ("reads", "put_notes"):
                patch.setattr(repository, name, None)
            ctx.emit(ctx.task.attempt)
        if ctx.task.attempt == 1:
            raise Retry(delay=0)

    handle = queue.submit("a")
    queue.run_all()
    assert read(handle) == ([2], 0)
    assert len(stored(queue)) == 1


def test_steps_in_coroutines():
    queue = ManualQueue()
    called = []

    @queue.executor("thinks", max_attempts=2)
    async def thinks(ctx):
        async def think():
            called.append(1)
            ctx.emit("deep")
            await asyncio.sleep(0)
            ctx.emit("thought")

        await asyncio.gather(
            ctx.astep("one", think), ctx.astep("two", lambda: ctx.emit("in a thread"))
        )
        if ctx.task.attempt == 1:
            raise ValueError("again")

    handle = queue.submit("thinks")
    queue.run_all()
    queue.advance(100)
    values, restarts = read(handle)
    assert sorted(values) == ["deep", "in a thread", "thought"]
    assert values.index("deep") < values.index("thought")
    assert (called, restarts) == ([1], 0)  # a reader that comes late sees the last attempt only


def test_what_is_too_large():
    queue = ManualQueue(config=Config(max_payload_size=10_000))
    problems = []

    @queue.executor("large")
    def large(ctx):
        for value in ("x" * 70_000, {1}, b"x"):
            with pytest.raises(PayloadError) as error:
                ctx.emit(value)
            problems.append(str(error.value))
        for _ in range(3):
            ctx.emit("x" * 50_000)
        with pytest.raises(PayloadError) as error:
            ctx.emit("x" * 50_000)
        problems.append(str(error.value))
        ctx.emit("small")

    handle = queue.submit("large")
    queue.run_all()
    values, _ = read(handle)
    assert [len(value) for value in values] == [50_000] * 3 + [5]
    assert problems[0] == "chunk: 70,002 bytes as JSON, more than a chunk may have (65,536)"
    assert (
        problems[-1]
        == "chunk: the task has emitted more than 16 times max_payload_size (160,000 bytes)"
    )


def test_a_codec_hides_chunks(tmp_path):
    queue = ManualQueue(MemoryRepository(codec=ZlibCodec(min_size=1)))

    @queue.executor("secret", max_attempts=2)
    def secret(ctx):
        ctx.step("tell", lambda: ctx.emit("x" * 50_000))
        if ctx.task.attempt == 1:
            raise ValueError("again")

    handle = queue.submit("secret")
    queue.run_all()
    queue.advance(100)
    assert sum(len(note.text) for note in queue.repository.notes(STREAM).values()) < 1000
    assert read(handle) == (["x" * 50_000], 0)


def test_nothing_is_emitted_where_it_could_not_be_stored_in_time(tmp_path):
    with sqlite3.connect(tmp_path / "q.db") as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    queue, errors = ManualQueue(SQLiteRepository(tmp_path / "q.db", prefix="taskx_")), []

    @queue.executor("late")
    def late(ctx):
        ctx.emit("before")
        with ctx.transaction() as tx:
            with pytest.raises(ConfigurationError) as error:
                ctx.emit("inside")
            errors.append(str(error.value))
            tx.complete("done")
        with pytest.raises(ConfigurationError) as error:
            ctx.emit("after")
        errors.append(str(error.value))

    handle = queue.submit("late")
    queue.run_all()
    assert handle.task().error == ""
    assert read(handle) == (["before"], 0)
    assert "cannot be used inside ctx.transaction()" in errors[0]
    assert "tx.complete() has completed the task" in errors[1]


@pytest.mark.every_store
def test_chunks_go_with_their_task(queue):
    @queue.executor("a")
    def a(ctx, text: str = "old"):
        ctx.emit(text)

    queue.submit("a", id="x")
    queue.submit("a", id="x/1")  # its notes are among those of the other one
    queue.run_all()
    queue.clock.advance(1)
    assert forget_streams(queue.repository) == (0, "")
    queue.repository.delete("x")
    again = queue.submit("a", {"text": "new"}, id="x")  # before they are removed
    queue.run_all()
    assert read(again) == (["new"], 0)
    assert len(stored(queue)) == 3
    assert forget_streams(queue.repository) == (1, "")
    assert read(queue.handle("x/1")) == (["old"], 0)
    queue.clock.advance(1)
    assert queue.prune(before=queue.clock.now()) == 2
    assert stored(queue) == []


@pytest.mark.parametrize("store", ["django-sqlite", "postgres", "mongo"])
def test_so_it_is_on_every_store(store, tmp_path):
    clock = ManualClock()
    with closing(MAKERS[store](tmp_path, clock)) as repository:
        queue = ManualQueue(repository, clock=clock)
        test_chunks_go_with_their_task(queue)
        test_a_retry_begins_anew_but_completed_steps_are_not_called_again(queue)


@pytest.mark.every_store
def test_a_run_that_lost_its_task_writes_where_nobody_reads(queue):
    @queue.executor("a")
    def a(ctx):
        ctx.emit(f"start {ctx.task.starts}")

    handle = queue.submit("a")
    lost = queue._start_next()
    assert lost is not None
    parts = parts_of(queue)
    task = handle.task()
    parts.moves.commit(
        lifecycle.conclude(task, Ending(returned=False, snooze=0), 1), {task.id: task}
    )
    queue.run_all()
    assert len(stored(queue)) == 1
    assert parts.runner.run(lost, "late").returned
    assert len(stored(queue)) == 2
    assert read(handle) == (["start 2"], 0)


def test_a_reader_elsewhere_gets_chunks_while_the_task_runs(tmp_path):
    queue = Queue(SQLiteRepository(tmp_path / "q.db"))
    others = Queue(SQLiteRepository(tmp_path / "q.db"))
    read_first, chunks = threading.Event(), []

    @queue.executor("slow")
    def slow(ctx):
        ctx.emit(1)
        assert read_first.wait(PATIENCE)
        ctx.emit(2)
        return "done"

    handle = queue.submit("slow")
    with queue:
        for chunk in others.handle(handle.id).stream():
            chunks.append(chunk.value)
            read_first.set()
        assert handle.result(PATIENCE) == "done"
    assert chunks == [1, 2]


def test_the_chunks_of_many_tasks_are_one_commit(tmp_path, monkeypatch, gate):
    queue = Queue(SQLiteRepository(tmp_path / "q.db"), Config(worker_num=5))
    ready, puts = threading.Barrier(6), []
    put = queue.repository.put_notes

    def counted(changes):
        puts.extend([len(changes)] if changes[0].name.startswith(STREAM) else [])
        return put(changes)

    @queue.executor("one")
    def one(ctx):
        gate()
        ctx.emit(1)
        ready.wait(PATIENCE)
        ready.wait(PATIENCE)

    monkeypatch.setattr(queue.repository, "put_notes", counted)
    handles = [queue.submit("one") for _ in range(5)]
    with queue:
        gate.wait_for(5)
        with no_rounds(queue):  # the housekeeper comes when all of them have emitted
            gate.open()
            ready.wait(PATIENCE)
        readers = [handle.stream() for handle in handles]
        assert [next(reader).value for reader in readers] == [1] * 5
        ready.wait(PATIENCE)
        assert [handle.result(PATIENCE) for handle in handles] == [None] * 5
    assert sum(puts) == 5
    assert len(puts) < 5


@pytest.mark.process
def test_a_child_process_emits_through_its_parent(tmp_path):
    queue = Queue(SQLiteRepository(tmp_path / "q.db"))
    queue.register_executor(isolated.speak)
    with queue:
        handle = queue.submit("speak")
        handle.result(PATIENCE)
    chunks = [*handle.stream()]
    assert [chunk.value for chunk in chunks] == ["begin", "one", "two", "end"]
    assert chunks[0].position == "2-1"
