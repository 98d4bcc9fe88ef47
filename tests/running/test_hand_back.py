"""Handing back: the start of a task that no thread executes is undone, and counts nothing."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, joined_node, pool_of

from taskx import DuplicateTask, RepositoryUnavailable, TaskStatus
from taskx.node.audit import Audit
from taskx.tasks import lifecycle


@pytest.fixture
def node(make_queue):
    """A node without threads, with three tasks in its buffer."""
    queue = make_queue(worker_num=2)
    queue.executor("t")(lambda: None)
    for name in "abc":
        queue.submit("t", id=name)
    node = joined_node(queue)
    yield node
    node.withdraw()


def start(node):
    return node.pool.starter.start(node.pool.buffer.take(3), "worker")


def tasks(node):
    return list(node.pool.moves.repository.get_many(["a", "b", "c"]).values())


def all_untouched(node):
    """Return True if all tasks are pending, as if they had never been started."""
    return all(
        (task.status, task.interruptions, task.crashes, len(task.attempts))
        == (TaskStatus.PENDING, 0, 0, 0)
        for task in tasks(node)
    )


@pytest.fixture
def away(node):
    """Return a function that lets the repository fail, or work again."""
    repository = node.pool.moves.repository

    def fail(writes):
        raise RepositoryUnavailable("away")

    def set_away(away=True):
        repository.before = fail if away else lambda writes: None

    yield set_away
    set_away(False)


def test_the_housekeeper_hands_back_what_could_not_be_handed_back(node, away):
    pool = node.pool
    runs = start(node)
    away()
    with pytest.raises(RepositoryUnavailable):
        pool.starter.hand_back(runs)
    with pytest.raises(RepositoryUnavailable):
        pool.hand_on()
    assert pool.runs == {}
    assert sorted(node.still_running()) == ["a", "b", "c"]
    away(False)
    pool.hand_on()
    assert all_untouched(node)
    assert node.still_running() == []


def test_the_audit_does_not_interrupt_what_could_not_be_handed_back(node, away):
    runs, audit = start(node), Audit(node.pool)
    away()
    with pytest.raises(RepositoryUnavailable):
        node.pool.starter.hand_back(runs)
    for _ in range(3):
        with pytest.raises(RepositoryUnavailable):
            audit.check()
    away(False)
    audit.check()
    assert all_untouched(node)


def test_the_audit_hands_back_a_run_that_no_thread_has(node):
    audit = Audit(node.pool)
    assert len(start(node)) == 3  # and nobody takes them
    audit.check()
    assert {task.status for task in tasks(node)} == {TaskStatus.RUNNING}
    audit.check()
    assert all_untouched(node)


def test_a_run_whose_outcome_is_stored_has_used_its_token_however_late_that_is_told(make_queue):
    """The audit forgets the run; no other task may start with its token."""
    queue = make_queue(worker_num=2)
    queue.executor("t", rate="1/d")(lambda: None)
    queue.submit("t")
    node = joined_node(queue)
    pool, audit = node.pool, Audit(node.pool)
    (run,) = pool.starter.start(pool.buffer.take(1), "worker")
    ending = pool.execute(run, "worker", lambda run, ending: None)
    pool.moves.repository.apply(lifecycle.conclude(run.task, ending, pool.clock.now_ms()))
    for _ in range(2):
        assert pool.runs.ids == [run.task.id]
        audit.check()
    assert pool.runs == {}
    assert not pool.admission.open("t")
    node.withdraw()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_start_that_was_interrupted_counts_no_interruption(node, when):
    """It may be stored: the transaction was interrupted just before or after its end."""
    repository = node.pool.moves.repository

    def strike(writes):
        setattr(repository, when, lambda writes: None)
        raise KeyboardInterrupt

    setattr(repository, when, strike)
    with pytest.raises(KeyboardInterrupt):
        start(node)
    assert node.pool.runs == {}
    node.pool.hand_on()
    assert all_untouched(node)


def test_a_stop_hands_back_what_it_could_not_hand_back_at_first(node, away):
    pool, begin_stop = node.pool, node._begin_stop
    pool.ahead.lay_out(start(node))

    def struck():
        away()
        begin_stop()
        away(False)

    node._begin_stop = struck
    assert node.stop(PATIENCE, cancel=False) == []
    assert all_untouched(node)
    assert {task.owner for task in tasks(node)} == {""}


@pytest.mark.timing(hand_back_after=3600.0)
def test_what_was_laid_out_just_after_a_stop_looked_is_handed_back_at_once(node):
    pool, runs = node.pool, start(node)
    pool.begin_stop()
    pool.ahead.lay_out(runs)
    pool.hand_on()
    assert all_untouched(node)


@pytest.mark.parametrize("state", ["executing", "concluding"])
def test_a_run_that_a_thread_executes_is_not_handed_back(node, state):
    """A thread that has just begun may have executed it by the time at which its state is read."""
    first, *others = start(node)
    first.state = state
    node.pool.starter.hand_back([first, *others])
    assert node.pool.runs == {first.task.id: first}
    [running] = [task for task in tasks(node) if task.status is TaskStatus.RUNNING]
    assert running.id == first.task.id
    assert not node.pool.starter.unexecuted


def test_a_later_run_of_the_task_is_not_handed_back(node):
    """The first start was in doubt and not stored; a worker has started the task again."""
    stale = start(node)
    for run in stale:
        run.state = "ahead"
        node.pool.runs[run.task.id] = node.pool.starter._make_run(run.task)
    node.pool.starter.hand_back(stale)
    assert {task.status for task in tasks(node)} == {TaskStatus.RUNNING}


@pytest.mark.parametrize("taken", [False, True])
def test_a_task_whose_start_freed_its_key_takes_it_again(make_queue, taken):
    """If another task has taken the key meanwhile, it keeps it; both run."""
    queue = make_queue(worker_num=2)
    queue.executor("t")(lambda: None)
    key = {"unique_key": "k", "unique_scope": "pending"}
    first = queue.submit("t", **key)
    node = joined_node(queue)
    runs = node.pool.starter.start(node.pool.buffer.take(1), "worker")
    holder = queue.submit("t", **key) if taken else first
    node.pool.starter.hand_back(runs)
    assert first.task().status is TaskStatus.PENDING
    with pytest.raises(DuplicateTask) as caught:
        queue.submit("t", **key)
    assert caught.value.task_id == holder.id
    node.withdraw()


def test_tasks_that_are_handed_back_start_again_in_their_order(busy, gate):
    queue = busy()
    for n in range(4):
        queue.submit("note", {"n": n})
    pool = pool_of(queue)
    runs = pool.starter.start(pool.buffer.take(3), "worker")
    pool.buffer.started()
    pool.starter.hand_back(runs)
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == [0, 1, 2, 3]
