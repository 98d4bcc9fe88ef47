"""Queues with a codec: users see plain values, and a value that cannot be coded affects only its task."""

from __future__ import annotations

import json

import pytest
from helpers import PATIENCE, eventually

from storage.repositories import Scramble, coded
from taskx import (
    Codec,
    Hook,
    PayloadError,
    RepositoryCorrupt,
    Retry,
    SQLiteRepository,
    TaskFailed,
    TaskFilter,
    TaskStatus,
)
from taskx.tasks.clock import SYSTEM_CLOCK

WORD = "hunter2"


@pytest.fixture(params=["memory", "sqlite", "mongomock"])
def repository(request, tmp_path):
    with coded(request.param, tmp_path, SYSTEM_CLOCK, Scramble()) as made:
        yield made


class Watch(Hook):
    """A hook that records the values that each event shows."""

    def __init__(self):
        self.seen = []

    def note(self, event, task):
        self.seen.append((event, task.params, task.result, task.checkpoints, task.damage))

    def submitted(self, task):
        self.note("submitted", task)

    def started(self, task):
        self.note("started", task)

    def retried(self, task, error, delay):
        self.note("retried", task)

    def finished(self, task):
        self.note("finished", task)

    def requeued(self, task):
        self.note("requeued", task)


def test_executors_hooks_and_reads_see_plain_values(make_queue):
    watch, seen = Watch(), []

    def around(ctx, task, call_next):
        seen.append(task.params)
        return call_next()

    queue = make_queue(hooks=[watch], middleware=[around], worker_num=1)

    @queue.executor(max_attempts=2)
    def work(ctx, word: str):
        seen.append((word, ctx.task.params, ctx.task.checkpoints))
        value = ctx.step("step", lambda: word.upper())
        if ctx.task.attempt == 1:
            raise Retry
        return {"value": value}

    queue.start()
    handle = work.submit(WORD)
    assert handle.result(PATIENCE) == {"value": "HUNTER2"}
    assert queue.drain(PATIENCE)
    params, kept = {"word": WORD}, {"steps": {"step": "HUNTER2"}}
    assert seen == [params, (WORD, params, None), params, (WORD, params, kept)]
    assert watch.seen == [
        ("submitted", params, None, None, ""),
        ("started", params, None, None, ""),
        ("retried", params, None, kept, ""),
        ("started", params, None, kept, ""),
        ("finished", params, {"value": "HUNTER2"}, kept, ""),
    ]
    for task in (
        handle.task(),
        queue.list_tasks(TaskFilter(type="work"))[0][0],
        queue.repository.get_by_id(handle.id),
    ):
        assert (task.params, task.result) == (params, {"value": "HUNTER2"})
        assert (task.checkpoints, task.damage) == (kept, "")


def test_dead_letters_requeues_and_maps_see_plain_values(make_queue):
    watch = Watch()
    queue = make_queue(hooks=[watch])
    failing = True

    @queue.executor()
    def work(word: str):
        if failing:
            raise ValueError(word)
        return [word]

    queue.start()
    with pytest.raises(TaskFailed, match="a"):
        next(queue.map(work, ["a"]))
    assert [task.params for task in queue.dead_letters()[0]] == [{"word": "a"}]
    failing = False
    assert list(queue.map(work, ["a", "b"])) == [["a"], ["b"]]
    assert list(queue.map(work, ["a", "b"])) == [["a"], ["b"]]
    assert queue.drain(PATIENCE)
    told = [(event, params["word"]) for event, params, *_ in watch.seen]
    assert ("requeued", "a") in told
    assert told.count(("submitted", "b")) == 1


def test_tasks_of_a_batch_see_plain_values(make_queue):
    queue = make_queue(worker_num=2)
    work = queue.executor("work")(lambda word: word * 2)
    queue.start()
    handles = queue.submit_many([work.task(str(n)) for n in range(50)])
    assert [handle.result(PATIENCE) for handle in handles] == [str(n) * 2 for n in range(50)]


def test_max_payload_size_counts_the_plain_values(make_queue):
    queue = make_queue(max_payload_size=1000)
    work = queue.executor("work")(lambda word: word + "!" * 20)
    queue.start()
    # It takes more than 1000 bytes in the store.
    assert len(work.submit("x" * 970).result(PATIENCE)) == 990
    with pytest.raises(PayloadError, match="more than max_payload_size"):
        work.submit("x" * 1000)
    with pytest.raises(TaskFailed, match="result: 1,007 bytes as JSON"):
        work.submit("x" * 985).result(PATIENCE)


class Moody(Codec):
    """A codec that fails on chosen values."""

    name = "moody"

    def encode(self, data):
        if b"refuse" in data:
            raise ConnectionError("no key server")
        return data

    def decode(self, data):
        return data


class TestEncodingFails:
    @pytest.fixture(params=["memory", "sqlite", "mongomock"])
    def repository(self, request, tmp_path):
        with coded(request.param, tmp_path, SYSTEM_CLOCK, Moody()) as made:
            yield made

    def test_a_submit_that_cannot_be_encoded_stores_nothing(self, make_queue):
        queue = make_queue(buffer_size=2)
        work = queue.executor("work")(lambda word: word)
        queue.start()
        for _ in range(3):  # more often than the buffer has places: a failed submit takes none
            with pytest.raises(PayloadError, match="params: codec 'moody' failed: ConnectionError"):
                work.submit("refuse")
        with pytest.raises(PayloadError):
            queue.submit_many([work.task("fine"), work.task("refuse")])
        assert queue.list_tasks() == ([], 0)
        assert work.submit("fine").result(PATIENCE) == "fine"

    def test_a_result_that_cannot_be_encoded_fails_its_attempt(self, make_queue):
        """A result that is not JSON does so, too. The other tasks of the transaction are not affected."""
        queue = make_queue(worker_num=4)

        @queue.executor(max_attempts=2)
        def work(ctx, word: str):
            return word if ctx.task.attempt == 2 else f"{word}use"

        queue.start()
        handles = queue.submit_many([work.task(word) for word in ("fine", "ref") * 10])
        results = [handle.result(PATIENCE) for handle in handles]
        assert results == ["fineuse", "ref"] * 10
        assert {handle.task().errors for handle in handles[::2]} == {0}
        task = handles[1].task()
        assert [attempt.outcome for attempt in task.attempts] == ["retried", "completed"]
        error = "the result could not be stored: PayloadError: result: codec 'moody' failed"
        assert task.attempts[0].error.startswith(error)

    def test_a_result_that_can_never_be_encoded_makes_a_dead_letter(self, make_queue, gate):
        queue = make_queue(worker_num=1)
        queue.executor("work")(lambda ctx: "refuse")
        queue.start()
        handle = queue.submit("work")
        with pytest.raises(TaskFailed, match="could not be stored"):
            handle.result(PATIENCE)
        assert queue.drain(PATIENCE)
        task = handle.task()
        assert (task.status, task.errors, task.interruptions) == (TaskStatus.FAILED, 1, 0)
        assert queue.running == 0

    def test_a_checkpoint_that_cannot_be_encoded_raises_in_the_executor(self, make_queue):
        queue = make_queue()

        @queue.executor()
        def work(ctx):
            with pytest.raises(PayloadError, match="checkpoints: codec 'moody' failed"):
                ctx.step("one", lambda: "refuse")
            return ctx.step("one", lambda: "fine")

        queue.start()
        assert queue.submit("work").result(PATIENCE) == "fine"


class TestUnknown:
    """A queue that was not given the codec."""

    @pytest.fixture
    def repository(self, database):
        with SQLiteRepository(database, codec=Scramble()) as made:
            yield made

    @pytest.fixture
    def stranger(self, database, make_queue):
        with SQLiteRepository(database) as made:
            queue = make_queue(made, worker_num=2)
            queue.executor("work")(lambda word: word)
            yield queue
            queue.stop(PATIENCE, cancel=True)

    def test_an_unknown_codec_fails_only_its_own_task(self, make_queue, stranger, database):
        handle = make_queue_and_declare(make_queue, "work").submit("work", {"word": WORD})
        stranger.start()
        assert stranger.submit("work", {"word": "plain"}).result(PATIENCE) == "plain"
        with pytest.raises(
            TaskFailed, match="RepositoryCorrupt: the stored record is damaged: it was"
        ):
            stranger.handle(handle.id).result(PATIENCE)
        assert WORD not in json.dumps(stranger.get_task_status(handle.id).to_dict())

    def test_a_result_that_cannot_be_decoded_raises(self, make_queue, stranger):
        owner = make_queue(worker_num=1)
        work = owner.executor("work")(lambda word: word)
        owner.start()
        assert list(owner.map(work, ["a"], key=str)) == ["a"]
        owner.stop(PATIENCE)  # an idle owner would take the next task
        with pytest.raises(RepositoryCorrupt, match="codec 'scramble'; give that codec"):
            stranger.handle("work:a").result(PATIENCE)
        stranger.start()
        items = [{"word": "a"}, {"word": "b"}]
        results = stranger.map("work", items, key=lambda item: item["word"])
        with pytest.raises(RepositoryCorrupt):
            next(results)
        assert next(results) == "b"

    def test_a_parents_result_that_cannot_be_decoded_raises(self, make_queue, stranger):
        """The child must not see None as its result."""
        owner = make_queue(worker_num=1)
        owner.executor("work")(lambda word: word)
        owner.start()
        owner.submit("work", {"word": "a"}, id="parent").result(PATIENCE)
        stranger.executor("child")(lambda ctx: ctx.parents[0].result)
        stranger.start()
        child = stranger.submit("child", depends_on=["parent"])
        with pytest.raises(TaskFailed, match=r"RepositoryCorrupt: parent parent: .*'scramble'"):
            child.result(PATIENCE)

    def test_a_requeued_task_runs_where_the_codec_is_known(self, make_queue, stranger, repository):
        """The failure left the stored values unchanged."""
        handle = make_queue_and_declare(make_queue, "work").submit("work", {"word": WORD})
        stranger.start()
        eventually(lambda: stranger.dead_letters()[1])
        stranger.stop(PATIENCE)
        owner = make_queue(worker_num=1)
        owner.executor("work")(lambda word: word)
        owner.start()
        owner.requeue(handle.id)
        assert owner.handle(handle.id).result(PATIENCE) == WORD


def make_queue_and_declare(make_queue, *types):
    queue = make_queue()
    queue.declare(*types)
    return queue
