"""Tasks that this process has submitted start without being read, and run in batches."""

from __future__ import annotations

import sqlite3

import attrs
import pytest
from helpers import PATIENCE, eventually, no_rounds, pool_of

from taskx import Queue, RetryPolicy, SQLiteRepository, Task, TaskStatus
from taskx.tasks import lifecycle, record
from taskx.tasks.writes import Update

# A slow machine hands no started task back.
pytestmark = pytest.mark.usefixtures("calm")

#: Makes all tasks count as short.
short_tasks = pytest.mark.timing(short_task=PATIENCE)


@pytest.fixture
def queue(busy):
    return busy()


@pytest.fixture
def read(queue, monkeypatch):
    """The ids of the tasks that were read as a whole."""
    ids, get_many = [], queue.repository.get_many
    monkeypatch.setattr(
        queue.repository, "get_many", lambda some: ids.extend(some) or get_many(some)
    )
    return ids


def note(n):
    return Task(type="note", params={"n": n})


@pytest.mark.every_store
def test_the_tasks_in_the_buffer_are_not_read(queue, read, gate):
    one = queue.submit("note", {"n": 0})
    many = queue.submit_many([note(n) for n in range(1, 4)])
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == [0, 1, 2, 3]
    assert not {one.id, *(handle.id for handle in many)}.intersection(read)


def test_their_executors_get_the_record_as_it_was_stored(queue, gate):
    seen = []
    queue.executor("look")(lambda ctx, **params: seen.append(ctx.task))
    options = {"priority": 3, "timeout": 60, "max_attempts": 2, "created_by": "me"}
    handle = queue.submit("look", {"text": "ä", "list": [1, None]}, **options)
    gate.open()
    assert queue.drain(PATIENCE)
    [task], stored = seen, handle.task()
    stored.status, stored.completed_at, stored.duration = task.status, None, 0.0
    assert stored.progress == 100
    stored.progress, stored.owner, stored.worker = 0, task.owner, task.worker
    assert task == stored


def test_a_task_with_a_chosen_id_is_read_where_records_have_no_numbers(queue, read, gate):
    """Another process may have deleted it, and stored another one with its id."""
    one = queue.submit("note", {"n": 1}, id="mine")
    many = queue.submit_many([note(2), Task(type="note", params={"n": 3}, id="yours")])
    gate.open()
    assert queue.drain(PATIENCE)
    assert set(read) == {one.id, many[1].id}


def test_a_task_with_much_data_is_read(queue, read, gate):
    """The buffer keeps no large params in memory."""
    handle = queue.submit("note", {"n": "x" * 3000})
    gate.open()
    assert queue.drain(PATIENCE)
    assert handle.id in read


@pytest.fixture
def fetching(tmp_path, make_queue, gate):
    """Return a queue that fetches each task from a file, and its tasks that are read as a whole."""
    repository = SQLiteRepository(tmp_path / "fetched.db")
    queue = make_queue(repository, worker_num=1)
    read, get_many = [], repository.get_many
    repository.get_many = lambda some: read.extend(some) or get_many(some)
    queue.read, queue.ran = read, []
    queue.executor("hold")(lambda: gate())
    queue.executor("note")(lambda n: queue.ran.append(n))
    yield queue
    repository.close()


def fetched(queue, gate, *tasks):
    """Store tasks, and have them fetched while the worker is busy. Return their handles."""
    queue.submit("hold", priority=1)
    handles = [queue.submit_many([task])[0] for task in tasks]
    queue.start()
    gate.wait_for()
    eventually(lambda: pool_of(queue).buffer.fetched == len(tasks))
    return handles


def test_small_tasks_that_are_fetched_are_read_once(fetching, gate):
    """The fetch reads them, so their start need not."""
    handles = fetched(
        fetching, gate, note(1), note(2), Task(id="chosen", type="note", params={"n": 3})
    )
    gate.open()
    assert fetching.drain(PATIENCE)
    assert fetching.ran == [1, 2, 3]
    assert not {handle.id for handle in handles}.intersection(fetching.read)


@pytest.mark.parametrize(
    "task",
    [
        Task(type="note", params={"n": "x" * 3000}),
        Task(type="note", params={"n": 1}, tags=["a"]),
        Task(type="note", params={"n": 1}, concurrency_key="a"),
        Task(type="note", params={"n": 1}, retry=RetryPolicy(base=1)),
    ],
    ids=["large", "tagged", "keyed", "retried"],
)
def test_other_tasks_are_read_before_their_start(fetching, gate, task):
    [handle] = fetched(fetching, gate, task)
    gate.open()
    assert fetching.drain(PATIENCE)
    assert fetching.ran == [task.params["n"]]
    assert handle.id in fetching.read


@pytest.mark.parametrize("count", [1, 3])
def test_tasks_with_chosen_ids_are_not_read_where_records_have_numbers(fetching, gate, count):
    tasks = [Task(id=f"t{n}", type="note", params={"n": n}) for n in range(count)]
    waiting(fetching, gate, *tasks)
    gate.open()
    assert fetching.drain(PATIENCE)
    assert fetching.ran == [*range(count)]
    assert not {task.id for task in tasks}.intersection(fetching.read)


def waiting(queue, gate, *tasks):
    """Submit tasks that wait in the buffer while the worker is busy. Return their handles."""
    queue.start()
    queue.submit("hold")
    gate.wait_for()
    handles = queue.submit_many(tasks)
    assert pool_of(queue).buffer.submitted == len(tasks)
    return handles


@pytest.mark.parametrize("place", [fetched, waiting])
@pytest.mark.parametrize("chosen", ["", "mine", "019b7c01-0400-7abc-a02d-0123456789ab"])
@pytest.mark.parametrize("others", [[], [note(2), Task(id="other", type="note", params={"n": 3})]])
def test_a_task_under_the_id_of_one_that_waits_and_was_deleted_runs_with_its_own_params(
    fetching, gate, others, chosen, place
):
    """Another process deletes the first one: this queue does not hear of it, and has its row in memory."""
    first, *_ = place(fetching, gate, Task(id=chosen, type="note", params={"n": 0}), *others)
    elsewhere = Queue(SQLiteRepository(fetching.repository.path))
    elsewhere.declare("note")
    elsewhere.delete(first.id)
    elsewhere.submit("note", {"n": 1}, id=first.id)
    elsewhere.close()
    gate.open()
    assert fetching.drain(PATIENCE)
    assert sorted(fetching.ran) == [1, *(other.params["n"] for other in others)]


def test_a_fetched_task_that_was_changed_since_starts_as_it_is_now(fetching, gate):
    [handle] = fetched(fetching, gate, note(1))
    wanted = handle.task()
    wanted.params = {"n": 2}
    now = fetching.repository.clock.now_ms()
    assert any(fetching.repository.apply(lifecycle.amend(handle.task(), wanted, now)))
    gate.open()
    assert fetching.drain(PATIENCE)
    assert fetching.ran == [2]


@pytest.mark.parametrize("damage", ["params = '[1]'", "params = '{'", "created_by = x'00ff'"])
def test_a_damaged_task_that_is_fetched_fails_with_its_damage(fetching, gate, damage):
    [handle] = fetching.submit_many([note(1)])
    with sqlite3.connect(fetching.repository.path) as file:
        file.execute(f"UPDATE tasks SET {damage} WHERE type = 'note'")
    file.close()
    fetching.start()
    assert fetching.drain(PATIENCE)
    assert fetching.ran == []
    assert "damaged" in handle.task().error


@pytest.mark.every_store
def test_a_task_that_another_process_has_changed_starts_as_it_is_now(queue, gate):
    handle = queue.submit("note", {"n": 1})
    wanted = handle.task()
    wanted.params = {"n": 2}
    now = queue.repository.clock.now_ms()
    assert any(queue.repository.apply(lifecycle.amend(handle.task(), wanted, now)))
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == [2]


def test_a_message_that_was_set_by_hand_is_not_lost(queue, gate):
    seen = []
    queue.executor("look")(lambda ctx: seen.append(ctx.task.message))
    handle = queue.submit("look")
    queue.repository.update_status(handle.id, TaskStatus.PENDING, "soon")
    gate.open()
    assert queue.drain(PATIENCE)
    assert seen == ["soon"]


def test_a_task_that_another_process_has_taken_does_not_run_here(queue, gate):
    handle = queue.submit("note", {"n": 1})
    started = lifecycle.start(handle.task(), queue.repository.clock.now_ms(), "another node")
    with no_rounds(queue):  # a round would find that the other node is dead, and rescue its task
        assert queue.repository.apply([started]) == [True]
        last = queue.submit("note", {"n": 2})
        gate.open()
        last.result(PATIENCE)
        assert queue.ran == [2]
        assert handle.task().owner == "another node"


@short_tasks
def test_a_batch_of_short_tasks_starts_in_one_transaction(queue, gate):
    """Their outcomes are stored together, too, unless one has waited for long."""
    ahead = pool_of(queue).ahead
    ahead._mean, ahead.short = 0.0, True
    queue.submit_many([note(n) for n in range(32)])
    queue.repository.batches.clear()
    with no_rounds(queue):  # the housekeeper commits an outcome that has waited for two rounds
        gate.open()
        assert queue.drain(PATIENCE)
    moves = [[write.move for write in batch] for batch in queue.repository.batches]
    assert moves[0] == ["complete", *["start"] * 32]
    assert [move for batch in moves[1:] for move in batch] == ["complete"] * 32


class Link:
    """A link that keeps its statements, each of which changes 32 rows."""

    rowcount = 32

    def __init__(self):
        self.statements = []

    def execute(self, sql, values):
        self.statements.append(sql.split()[0])
        return self


@pytest.fixture
def running(tmp_path):
    """A repository, and 32 tasks that run."""
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        inserts = [
            lifecycle.create(task_id=f"t{n}", now=n, type="t", params="{}", created_by="")
            for n in range(32)
        ]
        repository.apply(inserts)
        tasks = [*repository.get_many([insert.id for insert in inserts]).values()]
        starts = lifecycle.start_all(tasks, 50, "node", "worker")
        assert repository.apply(starts) == [True] * 32
        lifecycle.mark_started(tasks, starts)
        yield repository, starts, tasks


def outcomes(tasks):
    return [
        lifecycle.conclude(
            task, lifecycle.Ending(returned=True, result=f"{n}", duration=n / 100), 60 + n
        )[0]
        for n, task in enumerate(tasks)
    ]


def test_the_starts_and_the_outcomes_of_a_batch_are_one_statement_each(running):
    repository, starts, tasks = running
    link = Link()
    together = repository._writer.together
    assert together([*starts, *outcomes(tasks)], False, link) == [True] * 64
    assert link.statements == ["UPDATE", "UPDATE"]


def test_writes_that_know_the_numbers_of_their_records_share_statements_too(running):
    repository, starts, tasks = running
    link = Link()
    writes = [write._replace(seq=n) for n, write in enumerate([*starts, *outcomes(tasks)], 1)]
    assert repository._writer.together(writes, False, link) == [True] * 64
    assert link.statements == ["UPDATE", "UPDATE"]


def test_an_outcome_that_comes_too_late_leaves_the_others_of_its_batch_alone(running):
    repository, _, tasks = running
    tasks[7].starts += 1  # the run has lost its fence
    held = repository.apply(outcomes(tasks))
    assert held == [n != 7 for n in range(32)]
    found = repository.get_many([task.id for task in tasks])
    assert [task.result for task in found.values()] == [n if n != 7 else None for n in range(32)]


def test_starts_that_are_alike_share_what_they_change(running):
    _, starts, _ = running
    assert len({id(start.changes) for start in starts}) == 1
    assert len({start.id for start in starts}) == 32
    assert all(isinstance(start, Update) for start in starts)


def test_starts_that_differ_share_nothing(running):
    _, _, tasks = running
    for n, task in enumerate(tasks):
        task.status, task.starts = TaskStatus.PENDING, n
    alone = [lifecycle.start(task, 70, "node", "worker") for task in tasks]
    assert lifecycle.start_all(tasks, 70, "node", "worker") == alone


def test_progress_without_a_message_removes_the_one_before(running):
    _, _, (task, *_) = running
    ending = lifecycle.Ending(returned=True, progress=50)
    [write] = lifecycle.conclude(task, ending, 60)
    assert (write.changes["progress"], write.changes["message"]) == (100, "")


def test_a_task_that_is_made_without_the_constructor_is_the_same():
    assert attrs.asdict(record._new_task()) == attrs.asdict(Task())


def test_an_ending_has_no_unknown_fact():
    with pytest.raises(TypeError, match="an Ending has no wroker"):
        lifecycle.Ending(returned=True, wroker="w")
