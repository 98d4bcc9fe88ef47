"""Concurrency keys: one task of a key at a time, in the order of submission, across processes."""

from __future__ import annotations

import pytest
from helpers import PATIENCE, eventually, frequent_checks, no_rounds, undisturbed, whole_round
from storage.repositories import TinyRepository

from taskx import (
    ConfigurationError,
    DuplicateTask,
    Queue,
    RepositoryUnavailable,
    Retry,
    Task,
    TaskFilter,
    TaskStatus,
)


class Track:
    """A record of the tasks that began and ended, in order."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.events: list[str] = []
        queue.executor("note")(self.note)

    def note(self, n=0):
        self.events.append(f"begin {n}")
        self.events.append(f"end {n}")

    def submit(self, n, key="k", **options):
        return self.queue.submit("note", {"n": n}, id=str(n), concurrency_key=key, **options)

    def took_turns(self, order):
        return self.events == [event for n in order for event in (f"begin {n}", f"end {n}")]


@pytest.fixture
def track(make_queue, clock):
    return Track(make_queue(worker_num=4, clock=clock))


def held_up(queue, n):
    """Return True if this task is the first that waits for the turn of key ``k``."""
    return queue.repository.find("line", ["k"], ("id",), 1) == [(str(n),)]


# One at a time, in order


def test_tasks_of_one_key_run_one_at_a_time_in_order(track):
    track.queue.start()
    for n in range(60):
        track.submit(n)
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(60))


def test_tasks_stored_before_the_start_run_one_at_a_time_in_order(track):
    """They are submitted to a queue that is not started, some of them in one transaction."""
    track.submit(0)
    tasks = [Task(id=str(n), type="note", params={"n": n}, concurrency_key="k") for n in (1, 2, 3)]
    track.queue.submit_many(tasks)
    track.submit(4)
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(5))


def test_a_turn_passes_on_without_a_round_of_the_housekeeper(make_queue, gate):
    queue = make_queue(worker_num=2)
    queue.executor("hold")(lambda: gate())
    queue.start()
    handles = [queue.submit("hold", concurrency_key="k") for _ in range(5)]
    gate.wait_for(1)
    with no_rounds(queue):
        gate.open()
        for handle in handles:
            handle.result(PATIENCE)


def test_other_keys_and_tasks_without_one_do_not_wait(make_queue, gate):
    queue = make_queue(worker_num=4)
    queue.executor("hold")(lambda: gate())
    queue.start()
    for key in ("a", "a", "b", "b", None):
        queue.submit("hold", concurrency_key=key)
    gate.wait_for(3)
    assert queue.running == 3
    gate.open()
    assert queue.drain(PATIENCE)


def test_priorities_do_not_change_the_order_within_a_key(track):
    for n in range(5):
        track.submit(n, priority=n)
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(5))


def test_tasks_that_wait_for_their_turn_take_no_room_in_the_buffer(busy):
    queue = busy(buffer_size=2)
    for n in range(10):
        queue.submit("note", {"n": n}, concurrency_key="k")
    queue.submit("note")
    queue.submit("note")
    assert queue.buffered == 2


def test_tasks_of_several_types_share_the_turns_of_a_key(track):
    track.queue.executor("other")(track.note)
    for n in range(6):
        track.queue.submit("other" if n % 2 else "note", {"n": n}, concurrency_key="k")
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(6))


# Ways in which a task ends


def test_a_retry_keeps_the_turn(track, clock):
    """The next tasks wait for the end of its last attempt, whether it is retried at once or later."""

    @track.queue.executor("fails", max_attempts=3)
    def fails(ctx):
        track.events.append(f"attempt {ctx.task.attempt}")
        if ctx.task.attempt == 1:
            raise ValueError("at once")
        raise Retry(delay=60)

    track.queue.start()
    failing = track.queue.submit("fails", concurrency_key="k")
    track.submit("next")
    eventually(lambda: failing.task().errors == 2)
    assert track.queue.drain(PATIENCE)
    assert track.events == ["attempt 1", "attempt 2"]
    clock.advance(61)
    eventually(lambda: track.events[2:] == ["attempt 3", "begin next", "end next"])
    assert failing.task().status is TaskStatus.FAILED


def test_a_delayed_task_holds_up_the_later_tasks_of_its_key(track, clock):
    track.queue.start()
    track.submit("late", delay=60)
    track.submit("behind")
    track.submit("elsewhere", key="other")
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(["elsewhere"])
    clock.advance(61)
    eventually(lambda: track.took_turns(["elsewhere", "late", "behind"]))


def test_a_delay_runs_while_the_task_waits_for_its_turn(track, gate, clock):
    """The delay runs while the task waits for its turn."""
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    track.queue.submit("hold", concurrency_key="k")
    gate.wait_for(1)
    track.submit("late", delay=60)
    clock.advance(61)
    gate.open()
    eventually(lambda: track.took_turns(["late"]))


@pytest.mark.parametrize("started", [True, False])
def test_a_cancel_gives_the_turn_to_the_next_task(track, clock, started):
    """The first task, which has the turn and has not begun, and one in the middle are cancelled."""
    if started:
        track.queue.start()
    first = track.submit("first", delay=60)
    middle = track.submit("middle")
    track.submit("last")
    assert middle.cancel()
    assert first.cancel()
    track.queue.start()
    eventually(lambda: track.took_turns(["last"]))


@pytest.mark.timing(audit_every=3600)
def test_cancel_many_gives_the_turn_to_the_next_task(track):
    track.queue.start()
    handles = [track.submit(n, delay=60) for n in range(3)]
    track.submit("last")
    track.queue.cancel_many([handle.id for handle in handles])
    eventually(lambda: track.took_turns(["last"]))


def test_a_cancelled_running_task_gives_the_turn_to_the_next(track):
    track.queue.executor("sleeps")(lambda ctx: ctx.sleep(PATIENCE))
    track.queue.start()
    running = track.queue.submit("sleeps", concurrency_key="k")
    track.submit("next")
    eventually(lambda: track.queue.running == 1)
    running.cancel()
    eventually(lambda: track.took_turns(["next"]))


@undisturbed
@pytest.mark.parametrize("end", [Queue.cancel_task, Queue.delete])
def test_a_task_whose_key_is_not_read_gives_the_turn_to_the_next_at_once(track, end):
    """The housekeeper looks which key it is, and nothing else wakes it."""
    track.queue.start()
    track.submit("first", delay=60)
    track.submit("next")
    for _ in range(2):  # at the second one, nothing of the submits is left
        whole_round(track.queue)
    end(track.queue, "first")
    eventually(lambda: track.took_turns(["next"]))


def test_a_requeued_task_waits_for_its_turn_again(track, gate):
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    cancelled = [track.submit(n, delay=60) for n in (1, 2)]
    for handle in cancelled:
        assert handle.cancel()
    track.queue.submit("hold", concurrency_key="k")
    gate.wait_for(1)
    track.queue.requeue("2")
    track.queue.requeue("1")
    assert held_up(track.queue, 1)  # its old place
    gate.open()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns([1, 2])


@pytest.mark.timing(audit_every=3600)
def test_a_requeued_task_runs_if_no_other_waits(track):
    track.queue.start()
    assert track.submit(1, delay=60).cancel()
    track.queue.requeue("1")
    eventually(lambda: track.took_turns([1]))


@pytest.mark.timing(audit_every=3600)
def test_dead_letters_that_are_requeued_together_take_turns(track):
    broken = [True]

    @track.queue.executor("maybe")
    def maybe(n):
        if broken:
            raise ValueError("broken")
        track.note(n)

    track.queue.start()
    for n in range(5):
        track.queue.submit("maybe", {"n": n}, concurrency_key="k")
    assert track.queue.drain(PATIENCE)
    broken.clear()
    assert track.queue.requeue_dead_letters() == 5
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(range(5))


@frequent_checks
def test_a_task_that_is_ended_by_hand_gives_the_turn_to_the_next(track, repository):
    """No event reports it, so the slow scan must find it."""
    track.queue.start()
    track.submit("first", delay=3600)
    track.submit("next")
    repository.update_status("first", TaskStatus.CANCELLED, "by hand")
    eventually(lambda: track.took_turns(["next"]))


def test_two_tasks_of_a_key_cannot_be_started_by_hand_at_once(track, repository):
    from taskx import InvalidTransition

    track.submit("first", delay=3600)
    track.submit("second")
    with pytest.raises(InvalidTransition):
        repository.update_status("second", TaskStatus.RUNNING)
    repository.update_status("first", TaskStatus.RUNNING)
    repository.update_status("first", TaskStatus.COMPLETED)
    repository.update_status("second", TaskStatus.RUNNING)
    assert not track.queue.repository.distinct("line", "", 10)


# Together with other options


def test_a_child_waits_for_its_turn_after_its_parents_have_completed(track, gate):
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    parent = track.queue.submit("hold")
    gate.wait_for(1)
    track.submit("child", depends_on=[parent])
    track.submit("stranger")
    eventually(lambda: track.took_turns(["stranger"]))
    gate.open()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(["stranger", "child"])


def test_a_parent_may_have_a_concurrency_key(track):
    parent = track.submit("parent")
    track.submit("child", depends_on=[parent])
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    assert track.took_turns(["parent", "child"])


def test_a_task_that_replaces_another_takes_its_place(track):
    """It must have the same key. With another key, or with a key for a task without one, it is refused."""
    track.submit("a", unique_key="u")
    track.submit("b")
    track.queue.submit("note", {"n": "old"}, unique_key="v")
    for unique, key in (("u", "other"), ("u", None), ("v", "k")):
        new = {"unique_key": unique, "on_conflict": "replace", "concurrency_key": key}
        with pytest.raises(DuplicateTask):
            track.queue.submit("note", {"n": "no"}, **new)
    track.submit("new a", unique_key="u", on_conflict="replace")
    track.queue.start()
    assert track.queue.drain(PATIENCE)
    begun = [event for event in track.events if event.startswith("begin ")]
    assert sorted(begun) == ["begin b", "begin new a", "begin old"]
    assert begun.index("begin new a") < begun.index("begin b")


def test_a_paused_type_holds_up_its_keys(track):
    track.queue.executor("other")(track.note)
    track.queue.pause("other")
    track.queue.start()
    track.queue.submit("other", {"n": 0}, concurrency_key="k")
    track.submit(1)
    assert track.queue.drain(PATIENCE)
    assert track.events == []
    track.queue.resume("other")
    assert track.queue.drain(PATIENCE)
    eventually(lambda: track.took_turns([0, 1]))


# Faults


@pytest.mark.timing(audit_every=3600)
@pytest.mark.parametrize("failures", [1, 2, 3])
def test_turns_go_on_after_the_repository_failed(track, repository, gate, monkeypatch, failures):
    """The repository fails once or several times when a task has ended and the next one is searched."""
    track.queue.executor("hold")(lambda: gate())
    track.queue.start()
    track.queue.submit("hold", concurrency_key="k")
    gate.wait_for(1)
    track.submit(0)
    find, fails = repository.find, [True] * failures

    def shaky(column, *args):
        if column == "line" and fails:
            fails.pop()
            raise RepositoryUnavailable("down for a moment")
        return find(column, *args)

    monkeypatch.setattr(repository, "find", shaky)
    gate.open()
    eventually(lambda: track.took_turns([0]))
    assert not fails


def test_a_submit_is_accepted_if_the_turn_cannot_be_given(track, repository, monkeypatch):
    """The task is stored; it gets its turn later."""
    find = repository.find

    def shaky(column, *args):
        if column == "line":
            raise RepositoryUnavailable("down for a moment")
        return find(column, *args)

    monkeypatch.setattr(repository, "find", shaky)
    track.submit(0)
    monkeypatch.undo()
    track.queue.start()
    eventually(lambda: track.took_turns([0]))


@pytest.mark.every_store
def test_a_drain_ends_after_the_last_task_of_a_key(track, make_queue):
    """The drain of another queue also waits, between the end of a task and the turn of the next."""
    other = make_queue(worker_num=1)
    other.executor("note")(track.note)
    for n in range(30):
        track.submit(n)
    track.queue.start()
    other.start()
    assert other.drain(PATIENCE)
    assert track.took_turns(range(30))


def test_a_task_without_a_key_costs_no_query(queue, repository, monkeypatch):
    """No query when the task is submitted, and none when it ends."""
    asked, find = [], repository.find

    def counted(column, *args):
        asked.append(column)
        return find(column, *args)

    monkeypatch.setattr(repository, "find", counted)
    queue.executor("t")(lambda: None)
    queue.start()
    queue.submit("t").result(PATIENCE)
    queue.submit_many([Task(type="t")])[0].result(PATIENCE)
    assert "id" in asked
    assert "line" not in asked


@pytest.mark.parametrize("key", ["", 5, "a\0", "k" * 256, "\ud800"])
def test_an_invalid_key_is_refused(queue, key):
    queue.declare("t")
    with pytest.raises(ConfigurationError, match="concurrency_key"):
        queue.submit("t", concurrency_key=key)
    assert queue.list_tasks()[1] == 0


def test_a_repository_of_eight_methods_refuses_a_key():
    queue = Queue(TinyRepository())
    queue.declare("t")
    with pytest.raises(ConfigurationError, match="concurrency_key"):
        queue.submit("t", concurrency_key="k")
    assert queue.list_tasks()[1] == 0


# Several processes

WORK = """
@queue.executor("work", max_crashes=100)
def work(ctx, key, n, seconds=0.0):
    note("begin", key, n, os.getpid())
    ctx.sleep(seconds)
    note("end", key, n, os.getpid())
"""


def broken_rules(log):
    """Return the lines of the log where two tasks of a key ran at once or in the wrong order.

    A task whose process died has no end in the log; the next line of its key must be its next attempt.
    """
    broken, running, last = [], {}, {}
    for event, key, n, who in log:
        if event == "begin":
            if running.get(key) not in (None, n) or int(n) < last.get(key, -1):
                broken.append((event, key, n, who))
            running[key], last[key] = n, int(n)
        elif running.pop(key, None) != n:
            broken.append((event, key, n, who))
    return broken


def test_the_check_of_the_log_finds_errors():
    sound = ["begin k 0 x", "begin j 0 y", "end k 0 x", "begin k 1 y", "end j 0 y", "end k 1 y"]
    assert broken_rules([line.split() for line in sound]) == []
    assert broken_rules([line.split() for line in ["begin k 0 x", "begin k 1 y"]])
    assert broken_rules(
        [line.split() for line in ["begin k 1 x", "end k 1 x", "begin k 0 y", "end k 0 y"]]
    )


KEYS, EACH = ("a", "b", "c"), 25


def test_several_processes_take_turns(workers):
    """Three processes work and one submits: the tasks of each key run one at a time and in order."""
    repository = workers.repository
    children = workers.start(WORK, 3)
    queue = Queue(repository)
    queue.declare("work")
    for n in range(EACH):
        for key in KEYS:
            queue.submit("work", {"key": key, "n": n}, concurrency_key=key)
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 3 * EACH)
    log = workers.log()
    assert broken_rules(log) == []
    assert len(log) == 2 * 3 * EACH
    assert {len(task.attempts) for task in repository.list(TaskFilter())} == {1}
    for child in children:
        child.tell()
        child.ends()


def test_turns_go_on_after_a_process_was_killed(workers):
    """Another process runs its task again, before the next task of the key."""
    repository = workers.repository
    [child] = workers.start(WORK)
    queue = Queue(repository)
    queue.declare("work")
    for n in range(4):
        params = {"key": "k", "n": n, "seconds": 0.0 if n else 600.0}
        queue.submit("work", params, concurrency_key="k", id=str(n))
    eventually(lambda: repository.get_by_id("0").status is TaskStatus.RUNNING)
    eventually(lambda: len(workers.log()) == 1)
    child.kill()
    [other] = workers.start(WORK)
    eventually(lambda: len(workers.log()) == 2)  # it runs again
    assert queue.cancel_task("0") is False
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 3)
    log = workers.log()
    assert [line[:3] for line in log[:2]] == [["begin", "k", "0"]] * 2
    assert broken_rules([*log[1:2], ["end", "k", "0", "-"], *log[2:]]) == []
    other.tell()
    other.ends()


def test_turns_go_on_if_a_process_died_before_it_gave_the_turn(workers):
    """On SQLite both are one transaction; so the test suppresses the second part."""
    repository = workers.repository
    queue = Queue(repository)
    queue.declare("work")
    for n in range(3):  # before the child starts, as a submit would give the free turn
        queue.submit("work", {"key": "k", "n": n}, concurrency_key="k", id=str(n))
    dies = """
queue._moves.turns.next_turn = lambda key, leaver: ()
queue._moves.turns.advance = lambda keys: os._exit(9)
"""
    child = workers.spawn(WORK + dies)
    assert child.process.wait(PATIENCE) == 9
    assert repository.get_by_id("0").status is TaskStatus.COMPLETED
    assert repository.distinct("line", "", 10) == ["k"]
    assert repository.find("turn", ["k"], ("id",)) == []
    [other] = workers.start(WORK)
    eventually(lambda: repository.count(TaskFilter(status="completed")) == 3)
    assert broken_rules(workers.log()) == []
    other.tell()
    other.ends()
