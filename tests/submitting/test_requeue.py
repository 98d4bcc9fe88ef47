"""Requeuing a task otherwise than it was: with other params, or from a step on."""

from __future__ import annotations

import json
from datetime import date

import pytest
from helpers import PATIENCE, SpyMemory
from storage.repositories import TinyRepository

from taskx import (
    Attempt,
    Codec,
    ConfigurationError,
    DuplicateTask,
    Hook,
    InvalidTransition,
    MemoryRepository,
    PayloadError,
    Permanent,
    Queue,
    RepositoryCorrupt,
    SQLiteRepository,
    Task,
    TaskNotFound,
    TaskStatus,
    chain,
)


def requeues(task: Task) -> list[Attempt]:
    return [attempt for attempt in task.attempts if attempt.outcome == "requeued"]


@pytest.fixture
def queue(make_queue, clock):
    """A started queue whose executor ``pay`` fails at its third step unless params say ``ok``."""
    queue = make_queue(worker_num=1, clock=clock)
    queue.calls = []

    @queue.executor("pay")
    def pay(ctx, to: str, amount: int = 1, on: date | None = None):
        def call(name):
            queue.calls.append((name, to))
            return {"by": to}

        ctx.cursor = "here"
        for name in ("charge", "post", "mail"):
            if name == "mail" and to != "ok":
                raise Permanent(f"no such address: {to}")
            ctx.step(name, call, name)
        return ctx.cursor

    queue.start()
    return queue


@pytest.fixture
def failed(queue):
    """The id of a failed task with two stored steps."""
    task_id = queue.submit("pay", {"to": "nobody", "amount": 7}).id
    assert queue.drain(PATIENCE)
    queue.calls.clear()
    return task_id


def run(queue, task_id):
    assert queue.drain(PATIENCE)
    return queue.get_task_status(task_id)


class TestParams:
    def test_a_task_runs_again_with_corrected_params(self, queue, failed, clock):
        clock.advance(5)
        at = clock.now()
        queue.requeue(failed, params={"to": "ok"})
        task = run(queue, failed)
        assert (task.status, task.params) == ("completed", {"to": "ok"})
        assert queue.calls == [("mail", "ok")]  # it goes on where it was
        [note] = requeues(task)
        assert note == Attempt(
            outcome="requeued", ended_at=at, old_params={"to": "nobody", "amount": 7}
        )
        assert [attempt.outcome for attempt in task.attempts] == ["failed", "requeued", "completed"]

    def test_params_are_encoded_as_by_a_submit(self, queue, failed):
        queue.requeue(failed, params={"to": "ok", "on": date(2026, 11, 27)})
        assert run(queue, failed).params == {"to": "ok", "on": "2026-11-27"}

    def test_a_plain_requeue_notes_nothing(self, queue, failed):
        queue.requeue(failed)
        assert [attempt.outcome for attempt in run(queue, failed).attempts] == ["failed", "failed"]

    @pytest.mark.parametrize(
        ("params", "error"),
        [
            ({"to": "ok", "on": "soon"}, "on"),
            ({}, "to"),
            ({"to": "ok", "other": 1}, "other"),
            ({"to": object()}, "to"),
            ([1], "must be a dict"),
        ],
    )
    def test_params_are_checked_as_by_a_submit(self, queue, failed, params, error):
        before = queue.get_task_status(failed)
        with pytest.raises(PayloadError, match=error) as requeued:
            queue.requeue(failed, params=params)
        with pytest.raises(PayloadError) as submitted:
            queue.submit("pay", params)
        assert str(requeued.value) == str(submitted.value)
        assert queue.get_task_status(failed) == before

    def test_params_of_unknown_types_need_only_be_json(self, make_queue, queue, failed):
        other = make_queue(max_payload_size=100)
        other.requeue(failed, params={"to": 5})
        assert other.get_task_status(failed).params == {"to": 5}

    def test_params_must_not_be_larger_than_those_of_a_submit(self, make_queue, queue, failed):
        other = make_queue(max_payload_size=100)
        with pytest.raises(PayloadError, match="more than max_payload_size"):
            other.requeue(failed, params={"to": "x" * 100})

    def test_every_change_of_a_task_is_kept(self, queue, failed):
        for to in ("a", "b"):
            queue.requeue(failed, params={"to": to})
            run(queue, failed)
        notes = requeues(queue.get_task_status(failed))
        assert [note.old_params for note in notes] == [{"to": "nobody", "amount": 7}, {"to": "a"}]

    def test_the_whole_change_is_one_write(self, queue, failed, repository):
        queue.stop()
        other = Queue(repository)
        repository.batches.clear()
        other.requeue(failed, params={"to": "ok"}, from_step="post")
        [[write]] = repository.batches
        assert {"status", "params", "checkpoints", "earlier_attempts"} <= write.changes.keys()

    def test_a_key_that_is_held_meanwhile_changes_nothing(self, queue):
        first = queue.submit("pay", {"to": "x"}, unique_key="k").id
        assert queue.drain(PATIENCE)
        queue.submit("pay", {"to": "x"}, unique_key="k", delay=60)
        before = queue.get_task_status(first)
        with pytest.raises(DuplicateTask):
            queue.requeue(first, params={"to": "ok"})
        assert queue.get_task_status(first) == before

    def test_the_rest_of_a_chain_runs_after_the_corrected_task(self, queue):
        queue.executor("after")(lambda: queue.calls.append("after"))
        flow = queue.submit_flow(
            chain(Task(type="pay", params={"to": "x"}), Task(type="after"), Task(type="after"))
        )
        assert queue.drain(PATIENCE)
        queue.calls.clear()
        queue.requeue(flow.ids[0], params={"to": "ok"})
        assert queue.drain(PATIENCE)
        assert queue.calls == [("mail", "ok"), "after", "after"]

    def test_hooks_are_told_of_the_new_params(self, make_queue, queue, failed):
        told = []

        class Note(Hook):
            def requeued(self, task):
                told.append((task.params, task.attempts[-1].old_params))

        other = make_queue(hooks=[Note()])
        other.requeue(failed, params={"to": "ok"})
        other.stop()
        assert told == [({"to": "ok"}, {"to": "nobody", "amount": 7})]

    def test_a_task_that_was_never_started_can_be_corrected(self, queue):
        task_id = queue.submit("pay", {"to": "x"}, delay=60).id
        queue.cancel_task(task_id)
        queue.requeue(task_id, params={"to": "ok"})
        task = run(queue, task_id)
        assert [attempt.outcome for attempt in task.attempts] == ["requeued", "completed"]


class TestFromStep:
    def test_a_step_and_all_later_ones_run_again(self, queue, failed):
        assert queue.get_task_status(failed).checkpoints["cursor"] == "here"
        queue.pause("pay")
        queue.requeue(failed, params={"to": "ok"}, from_step="post")
        stored = queue.get_task_status(failed).checkpoints
        queue.resume("pay")
        task = run(queue, failed)
        assert queue.calls == [("post", "ok"), ("mail", "ok")]
        assert stored == {"steps": {"charge": {"by": "nobody"}}}
        [note] = requeues(task)
        assert (note.from_step, note.old_params) == ("post", {"to": "nobody", "amount": 7})

    def test_the_first_step_means_all(self, queue, failed, make_queue):
        queue.stop()
        other = make_queue()
        other.requeue(failed, from_step="charge")
        task = other.get_task_status(failed)
        assert task.checkpoints is None
        [note] = requeues(task)
        assert (note.from_step, note.old_params) == ("charge", None)

    def test_the_error_for_an_unknown_step_names_the_stored_ones(self, queue, failed):
        before = queue.get_task_status(failed)
        with pytest.raises(
            ConfigurationError, match=r"no step 'mail': it has stored 'charge', 'post'$"
        ):
            queue.requeue(failed, from_step="mail", params={"to": "ok"})
        with pytest.raises(ConfigurationError, match="from_step must be a str, not int"):
            queue.requeue(failed, from_step=3)
        assert queue.get_task_status(failed) == before

    def test_the_error_for_a_task_without_steps_says_so(self, queue):
        queue.executor("plain")(lambda: 1 / 0)
        task_id = queue.submit("plain").id
        assert queue.drain(PATIENCE)
        with pytest.raises(ConfigurationError, match="no step 'a': it has stored none"):
            queue.requeue(task_id, from_step="a")

    def test_the_error_names_at_most_twenty_steps(self, queue):
        @queue.executor("long")
        def long(ctx):
            for number in range(30):
                ctx.step(f"s{number}", lambda: 1)
            raise Permanent("enough")

        task_id = queue.submit("long").id
        assert queue.drain(PATIENCE)
        with pytest.raises(ConfigurationError, match=r"'s19' and 10 more$"):
            queue.requeue(task_id, from_step="s30")


class TestOtherStatuses:
    @pytest.fixture
    def queue(self, make_queue):
        queue = make_queue(worker_num=1)
        queue.executor("fine")(lambda: "fine")
        return queue

    def test_a_completed_task_must_be_submitted_anew(self, queue):
        queue.start()
        handle = queue.submit("fine")
        handle.result(PATIENCE)
        with pytest.raises(InvalidTransition, match=r"is completed.*submit a new task"):
            queue.requeue(handle.id, params={})

    def test_a_pending_task_must_be_cancelled_first(self, queue):
        with pytest.raises(InvalidTransition, match=r"is pending.*cancel it first"):
            queue.requeue(queue.submit("fine").id)

    def test_a_running_task_must_be_cancelled_first(self, queue, gate):
        queue.executor("hold")(gate)
        queue.start()
        task_id = queue.submit("hold").id
        gate.wait_for(1)
        with pytest.raises(InvalidTransition, match=r"is running.*Cancel it first"):
            queue.requeue(task_id)

    def test_an_unknown_task_is_not_found(self, queue):
        with pytest.raises(TaskNotFound):
            queue.requeue("unknown", params={})


class Secret(Codec):
    """A codec that hides what it writes, and writes it differently each time."""

    name = "secret"
    count = 0

    def encode(self, data):
        self.count += 1
        return bytes([self.count % 256]) + bytes(byte ^ 255 for byte in data)

    def decode(self, data):
        return bytes(byte ^ 255 for byte in data[1:])


def failing(repository):
    """Return a queue on a repository, and the id of a failed task with a password in its params."""
    queue = Queue(repository)
    queue.executor("log in")(lambda password: 1 / 0)
    handle = queue.submit("log in", {"password": "first"})
    with queue:
        assert queue.drain(PATIENCE)
    return Queue(repository), handle.id


class TestCodecs:
    def test_old_params_are_stored_by_the_codec(self, database):
        with SQLiteRepository(database, codec=Secret()) as repository:
            queue, task_id = failing(repository)
            queue.requeue(task_id, params={"password": "second"})
            row = repository.find("id", [task_id], ("params", "earlier_attempts"))[0]
            assert not any(word in text for word in ("first", "second") for text in row)
            task = queue.get_task_status(task_id)
            assert requeues(task)[0].old_params == {"password": "first"}
            assert task.params == {"password": "second"}

    def test_a_process_without_the_codec_keeps_them_as_they_are(self, database):
        with SQLiteRepository(database, codec=Secret()) as repository:
            queue, task_id = failing(repository)
            queue.requeue(task_id, params={"password": "second"})
        with SQLiteRepository(database) as blind:
            other = Queue(blind)
            other.cancel_task(task_id)
            assert requeues(other.get_task_status(task_id))[0].old_params.keys() == {
                *("taskx:codec", "data")
            }
            with pytest.raises(RepositoryCorrupt, match=r"only be requeued as it is.*submit a new"):
                other.requeue(task_id, params={"password": "third"})
            other.requeue(task_id)
        with SQLiteRepository(database, codec=Secret()) as repository:
            task = repository.get_by_id(task_id)
            assert requeues(task)[0].old_params == {"password": "first"}
            assert task.params == {"password": "second"}

    def test_a_write_in_doubt_is_recognised(self):
        """The codec writes the same params differently each time."""
        repository = MemoryRepository(codec=Secret())
        queue, task_id = failing(repository)
        queue.requeue(task_id, params={"password": "second"})
        row = repository.find("id", [task_id], ("earlier_attempts",))[0]
        plain = MemoryRepository()
        plain_queue, plain_id = failing(plain)
        plain_queue.requeue(plain_id, params={"password": "second"})
        same = repository.codecs.same
        text = json.dumps([["requeued", 1, 2, "", "", "", "", {"params": '{"password":"first"}'}]])
        other = text.replace("first", "other")
        coded = repository.codecs.columns({"earlier_attempts": text})["earlier_attempts"]
        assert same("earlier_attempts", coded, text)
        assert not same("earlier_attempts", coded, other)
        assert same("earlier_attempts", row[0], row[0])
        assert not same("earlier_attempts", "", text)

    def test_params_that_the_codec_refuses_change_nothing(self):
        class Moody(Secret):
            def encode(self, data):
                if b"refuse" in data:
                    raise ConnectionError
                return super().encode(data)

        queue, task_id = failing(MemoryRepository(codec=Moody()))
        with pytest.raises(PayloadError, match="codec 'secret' failed"):
            queue.requeue(task_id, params={"password": "refuse"})
        assert queue.get_task_status(task_id).params == {"password": "first"}
        assert queue.get_task_status(task_id).status == "failed"


class TestBounds:
    def test_old_params_are_bounded_and_the_latest_are_kept(self):
        queue, task_id = failing(SpyMemory())
        big = "x" * 400_000
        for number in range(5):
            queue.requeue(task_id, params={"password": f"{number}{big}"})
            queue.cancel_task(task_id)
        notes = requeues(queue.get_task_status(task_id))
        assert len(notes) == 5
        kept = [note.old_params and note.old_params["password"][0] for note in notes]
        assert kept == [None, None, None, "2", "3"]

    def test_params_may_be_as_deep_as_those_of_a_submit(self):
        queue, task_id = failing(SpyMemory())
        deep: object = 1
        for _ in range(89):
            deep = [deep]
        for _ in range(2):
            queue.requeue(task_id, params={"password": deep})
            queue.cancel_task(task_id)
        assert requeues(queue.get_task_status(task_id))[1].old_params == {"password": deep}


def test_a_task_with_changes_survives_to_dict_and_back():
    queue, task_id = failing(SpyMemory())
    queue.requeue(task_id, params={"password": "second"})
    task = queue.get_task_status(task_id)
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
    assert "first" not in repr(task)


def test_a_repository_of_eight_methods_takes_params(make_queue):
    queue = make_queue(TinyRepository(), worker_num=1)
    queue.executor("work")(lambda n: 1 / n)
    queue.start()
    task_id = queue.submit("work", {"n": 0}).id
    assert queue.drain(PATIENCE)
    queue.requeue(task_id, params={"n": 2})
    task = run(queue, task_id)
    assert (task.status, task.result, task.params) == ("completed", 0.5, {"n": 2})
    assert requeues(task)[0].old_params == {"n": 0}


@pytest.mark.every_store
def test_a_task_that_waits_in_a_buffer_runs_with_the_params_of_its_requeue(repository, busy, gate):
    """Its node has its old record in memory."""
    queue, seen, other = busy(), [], Queue(repository)
    queue.executor("name")(lambda name: seen.append(name))
    handle = queue.submit("name", {"name": "old"})
    other.declare("name")
    other.cancel_task(handle.id)
    other.requeue(handle.id, params={"name": "new"})
    gate.open()
    handle.result(PATIENCE)
    assert seen == [queue.get_task_status(handle.id).params["name"]] == ["new"]


def test_a_task_that_waits_in_a_buffer_runs_with_the_params_of_its_update(repository, busy, gate):
    queue, seen = busy(), []
    queue.executor("name")(lambda name: seen.append(name))
    handle = queue.submit("name", {"name": "old"})
    Queue(repository).cancel_task(handle.id)
    task = queue.get_task_status(handle.id)
    task.status, task.params = TaskStatus.PENDING, {"name": "new"}
    repository.update(task)
    gate.open()
    handle.result(PATIENCE)
    assert seen == ["new"]
