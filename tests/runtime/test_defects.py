"""What the original got wrong, where no other test would notice: each of these could fail there."""

from __future__ import annotations

import ast
import threading
from itertools import count
from pathlib import Path

import pytest

import taskx
from taskx import QueueStopped, RepositoryError, Task, TaskFilter, TaskStatus
from taskx.core.clock import to_datetime
from taskx.core.writes import Insert, Update
from taskx.storage.sqlite import statements

from .conftest import PATIENCE, eventually, run_in_thread


@pytest.mark.every_store
def test_nothing_runs_before_it_is_stored(queue):
    """Enqueued first, a task could run before its record was there, or without one for ever."""
    ran = []
    queue.executor("note")(lambda: ran.append(1))
    queue.start()
    reached, go_on = threading.Event(), threading.Event()

    def hold(writes):
        if any(isinstance(write, Insert) for write in writes):
            reached.set()
            assert go_on.wait(PATIENCE)
            if not allowed:
                raise RepositoryError("no room for this one")

    allowed = []
    queue.repository.before = hold
    refused = run_in_thread(lambda: queue.submit("note", id="x"))
    assert reached.wait(PATIENCE)
    assert not queue._node.engine.buffer.ids
    assert ran == []
    go_on.set()
    with pytest.raises(RepositoryError, match="no room"):
        refused()
    assert queue.repository.get_many(["x"]) == {}
    assert not queue._node.engine.buffer.ids
    allowed.append(True)
    assert queue.submit("note", id="y").result(PATIENCE) is None
    assert ran == [1]


@pytest.mark.every_store
@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
def test_the_end_is_one_write_and_forgets_nothing_of_before(queue, how):
    """Not a status first and the result after, and no field that is set back."""

    @queue.executor("end")
    def end(ctx, how):
        queue.repository.update_progress(ctx.task.id, 30, "half way")
        if how == "failed":
            raise ValueError("no")
        if how == "cancelled":
            queue.cancel_task(ctx.task.id)
            ctx.token.raise_if_cancelled()
        return {"n": 1}

    queue.start()
    handle = queue.submit("end", {"how": how}, created_by="user123")
    eventually(handle.done)
    task = handle.task()
    assert (task.status, task.created_by, task.message) == (how, "user123", "half way")
    assert (task.progress, task.params) == (100 if how == "completed" else 30, {"how": how})
    assert task.created_at <= task.started_at <= task.completed_at
    ends = [
        write
        for batch in queue.repository.batches
        for write in batch
        if not isinstance(write, Insert) and write.changes.get("status") == how
    ]
    assert len([write for write in ends if "duration" in write.changes]) == 1
    assert "completed_at" in ends[-1].changes
    if how == "completed":
        assert ends[-1].changes["result"] == '{"n":1}'


def test_a_store_that_hangs_holds_up_only_who_needs_it(queue, gate):
    """While one submit hangs: others register, look, report progress; what runs goes on."""
    seen = []

    @queue.executor("work")
    def work(ctx):
        gate()
        ctx.progress(50, "half way")
        seen.append(ctx.task.id)

    queue.start()
    running = queue.submit("work")
    gate.wait_for(1)
    reached, go_on = threading.Event(), threading.Event()

    def hang(writes):
        queue.repository.before = lambda writes: None
        reached.set()
        assert go_on.wait(3 * PATIENCE)

    queue.repository.before = hang
    hanging = run_in_thread(lambda: queue.submit("work", id="slow"))
    try:
        assert reached.wait(PATIENCE)
        other = run_in_thread(lambda: queue.executor("other")(lambda: None))
        assert other() is not None
        assert queue.get_task_status(running.id).status is TaskStatus.RUNNING
        assert [task.id for task in queue.list_tasks()[0]] == [running.id]
        gate.open()
        eventually(lambda: seen == [running.id])
    finally:
        go_on.set()
    assert hanging().result(PATIENCE) is None
    assert running.result(PATIENCE) is None


def test_what_a_caller_sets_beside_the_order_is_not_stored(queue):
    """A result, times, counts and progress are the queue's to set."""
    queue.declare("note")
    long_ago = to_datetime(0)
    mine = Task(
        type="note",
        result={"n": 1},
        error="x",
        progress=70,
        message="x",
        created_at=long_ago,
        started_at=long_ago,
        completed_at=long_ago,
        duration=9.0,
        errors=4,
        crashes=4,
        starts=4,
        owner="x",
        dead_letter=True,
    )
    task = queue.submit(mine).task()
    assert task.created_at > long_ago
    assert (task.started_at, task.completed_at, task.result, task.duration) == (None, None, None, 0)
    assert (task.error, task.progress, task.message, task.owner) == ("", 0, "", "")
    assert (task.errors, task.crashes, task.starts, task.dead_letter) == (0, 0, 0, False)


@pytest.mark.every_store
def test_late_progress_is_ignored(queue):
    """Told by a thread that outlived its attempt, it touches neither the record nor the next one."""
    leaked, second = [], threading.Event()

    @queue.executor("leak", max_attempts=2)
    def leak(ctx):
        leaked.append(ctx)
        if ctx.task.attempt == 1:
            raise ValueError
        ctx.progress(20, "second")
        second.set()
        leaked[0].progress(90, "from the first")
        eventually(lambda: handle.task().message == "second")
        leaked[0].progress(91, "from the first")
        threading.Event().wait(0.3)  # blocks on purpose: progress is written thrice meanwhile
        seen.append((handle.task().progress, handle.task().message))

    seen = []
    handle = queue.submit("leak")
    queue.start()
    assert second.wait(PATIENCE)
    handle.result(PATIENCE)
    assert seen == [(20, "second")]
    for ctx in leaked:
        ctx.progress(10, "late")
    queue.submit("leak", id="other").result(PATIENCE)
    assert (handle.task().progress, handle.task().message) == (100, "second")


@pytest.mark.every_store
def test_progress_of_a_run_that_was_taken_over_is_ignored(queue, gate):
    """It goes on, and does not know yet that the task has been started again elsewhere."""

    @queue.executor("work")
    def work(ctx):
        if ctx.task.starts == 1:
            gate()
            ctx.progress(90, "from the first")
            assert tried.wait(PATIENCE)

    tried = threading.Event()

    def look(writes):
        if any(not isinstance(w, Insert) and w.changes.get("progress") == 90 for w in writes):
            tried.set()

    queue.repository.after = look
    queue.start()
    handle = queue.submit("work")
    gate.wait_for(1)
    again = {"starts": 2, "progress": 10, "message": "from the second"}
    queue.repository.apply([Update(handle.id, {}, again)])
    gate.open()
    assert tried.wait(PATIENCE)
    task = handle.task()
    assert (task.starts, task.progress, task.message) == (2, 10, "from the second")


@pytest.mark.every_store
def test_submits_that_race_with_the_stop_are_kept_or_refused(make_queue, repository):
    """Some rounds of ten threads that submit while the queue is stopped in the middle of it.

    What is kept and did not run does with whoever comes next.
    """
    all_left = []
    for _ in range(5):
        queue = make_queue(worker_num=2, buffer_size=1_000_000)
        ran, line = [], threading.Barrier(11)
        # So long that some are left, however slowly they are submitted.
        queue.executor("n")(lambda ctx, n, ran=ran: (ctx.token.wait(0.02), ran.append(n))[1])
        queue.start()

        def submit(first, queue=queue, line=line):
            line.wait(PATIENCE)
            accepted = []
            try:
                for n in count(first, 10):
                    queue.submit("n", {"n": n})
                    accepted.append(n)
            except QueueStopped:
                return accepted

        threads = [
            run_in_thread(lambda first=first, submit=submit: submit(first)) for first in range(10)
        ]
        line.wait(PATIENCE)
        eventually(lambda: repository.count(TaskFilter()) > 50)
        assert queue.stop(PATIENCE) == []
        accepted = sorted(n for thread in threads for n in thread())
        kept = {task.params["n"]: task for task in repository.list(TaskFilter(limit=1_000_000))}
        assert sorted(kept) == accepted
        done = sorted(n for n, task in kept.items() if task.status is TaskStatus.COMPLETED)
        assert done == sorted(ran)
        left = [task for task in kept.values() if task.status is not TaskStatus.COMPLETED]
        assert {task.status for task in left} <= {TaskStatus.PENDING}
        all_left += left
        with make_queue() as another:
            another.executor("n")(lambda n: n)
            assert another.drain(PATIENCE)
        assert repository.count(TaskFilter(status="completed")) == len(kept)
        for task in kept.values():
            repository.delete(task.id)
    assert all_left


@pytest.mark.every_store
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_a_list_and_how_many_there_are_agree(queue, monkeypatch, limit):
    """Though one more is stored between the two looks, if there are two."""
    queue.declare("note")
    queue.submit("note")
    coming = []

    def one_more_after(look):
        def looks(*args):
            seen = look(*args)
            stored = threading.Event()
            coming.append(run_in_thread(lambda: (queue.submit("note"), stored.set())))
            stored.wait(0.1)  # a repository may let nobody in before both looks are done
            return seen

        return looks

    monkeypatch.setattr(queue.repository, "list", one_more_after(queue.repository.list))
    monkeypatch.setattr(statements, "count_tasks", one_more_after(statements.count_tasks))
    tasks, total = queue.list_tasks(TaskFilter(limit=limit))
    assert len(tasks) == 1
    assert total == 1 or (limit == 1 and total == 2)  # then it is on the next page
    assert coming
    for come in coming:
        come()
    monkeypatch.undo()
    tasks, total = queue.list_tasks(TaskFilter(limit=limit))
    assert (len(tasks), total) == (min(limit, 1 + len(coming)), 1 + len(coming))


def test_nothing_is_pickled_or_evaluated():
    """In the whole package: no module that runs what it reads, and no call of what runs text."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
    package = Path(taskx.__file__).parent
    files = list(package.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), file
                continue
            else:
                continue
            assert not names & forbidden, file
