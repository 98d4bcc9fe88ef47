"""A queue on an eight-method repository that fails now and then.

Nothing is lost or done twice, and every answer is true.
"""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from helpers import PATIENCE, eventually, held_on, whole_round

from storage.repositories import TinyRepository
from taskx import (
    Config,
    ConfigurationError,
    DuplicateTask,
    Hook,
    Queue,
    RepositoryError,
    RepositoryUnavailable,
    Retry,
    TaskNotFound,
    TaskRepository,
)
from taskx.stores.adapter import EIGHT_METHODS, ORIGINAL_FIELDS, EightMethodAdapter
from taskx.stores.queries import shown
from taskx.tasks import lifecycle
from taskx.tasks.timing import Timing

QUICK = {"audit_every": 0.05, "progress_every": 0.01, "poll_every": 0.01}
# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = [pytest.mark.usefixtures("calm"), pytest.mark.timing(**QUICK)]

ALL = "all"


class Hiccups(TaskRepository):
    """A repository whose methods raise when a test asks for it.

    Calls are counted, of one method or of all. The ``first`` call and those after it raise, ``times`` calls
    in all. They raise before they do their work or, if ``late``, after it.
    """

    def __init__(self, method="", first=1, times=1, *, late=False, error=OSError):
        self.inner = TinyRepository()
        self.calls = Counter()
        self.lock = threading.Lock()
        self.fail(method, first, times, late=late, error=error)

    def fail(self, method, first=1, times=1, *, late=False, error=OSError):
        self.method, self.late, self.error = method, late, error
        start = self.calls[method] + first
        self.wrong = range(start, start + times)

    def call(self, method, *args):
        with self.lock:
            self.calls.update((method, ALL))
            fails = self.method in (method, ALL) and self.calls[self.method] in self.wrong
        if fails and not self.late:
            raise self.error("the disk failed")
        answer = getattr(self.inner, method)(*args)
        if fails:
            raise self.error("the disk failed")
        return answer

    def create(self, task):
        return self.call("create", task)

    def get_by_id(self, task_id):
        return self.call("get_by_id", task_id)

    def update(self, task):
        return self.call("update", task)

    def update_status(self, task_id, status, message=""):
        return self.call("update_status", task_id, status, message)

    def update_progress(self, task_id, progress, message=""):
        return self.call("update_progress", task_id, progress, message)

    def list(self, filter):
        return self.call("list", filter)

    def count(self, filter):
        return self.call("count", filter)

    def delete(self, task_id):
        return self.call("delete", task_id)

    def stored(self, task_id):
        try:
            return self.inner.get_by_id(task_id)
        except TaskNotFound:
            return None


class Told(Hook):
    def __init__(self):
        self.finished_ids = []

    def finished(self, task):
        self.finished_ids.append(task.id)


class Story:
    """The life of a queue on a repository, with the answer that the caller got at each step."""

    def __init__(self, repository):
        self.repository = repository
        self.hook = Told()
        self.queue = Queue(
            repository, Config(worker_num=2), hooks=[self.hook], timing=Timing(**QUICK)
        )
        self.told, self.named = {}, {}
        self.runs = Counter()
        self.at_once = []
        self._running = set()
        self._lock = threading.Lock()
        self.gate, self.holding = threading.Event(), threading.Event()
        self.queue.executor("work")(self.work)
        self.queue.executor("flaky", max_attempts=2)(self.flaky)
        self.queue.executor("bad")(self.bad)
        self.queue.executor("hold")(self.hold)

    def run(self, ctx):
        with self._lock:
            self.runs[ctx.task.id] += 1
            if ctx.task.id in self._running:
                self.at_once.append(ctx.task.id)
            self._running.add(ctx.task.id)

    def over(self, ctx):
        with self._lock:
            self._running.discard(ctx.task.id)

    def work(self, ctx, n):
        self.run(ctx)
        ctx.progress(50, "half")
        self.over(ctx)
        return n

    def flaky(self, ctx):
        self.run(ctx)
        self.over(ctx)
        if ctx.task.attempt == 1:
            raise Retry("not yet")
        return "in the end"

    def bad(self, ctx):
        self.run(ctx)
        self.over(ctx)
        raise ValueError("wrong")

    def hold(self, ctx):
        self.run(ctx)
        ctx.progress(30, "on it")
        self.holding.set()
        try:
            assert ctx.token.wait(PATIENCE)
            ctx.token.raise_if_cancelled()
        finally:
            self.over(ctx)

    def do(self, step, task_id, function):
        """Do a step and record its answer: True, ``refused`` or ``doubt``. Return True if it worked."""
        try:
            function()
        except RepositoryError as error:
            self.told[step, task_id] = "doubt" if error.in_doubt else "refused"
            self.named[step, task_id] = error.task_id
        else:
            self.told[step, task_id] = True
        return self.told[step, task_id] is True

    def submit(self, task_id, type, params=None, **options):
        return self.do(
            "submit", task_id, lambda: self.queue.submit(type, params or {}, id=task_id, **options)
        )

    def live(self):
        queue, repository = self.queue, self.repository
        self.submit("early", "work", {"n": 1})
        if self.submit("dropped", "work", {"n": 2}):
            self.do("cancel", "dropped", lambda: queue.cancel_task("dropped"))
        while True:
            try:
                queue.start()
                break
            except RepositoryError:
                continue
        for n in range(4):
            self.submit(f"work{n}", "work", {"n": n}, priority=n % 2)
        self.submit("flaky", "flaky")
        self.submit("bad", "bad", created_by="us")
        if self.submit("hold", "hold") or repository.stored("hold"):
            eventually(self.holding.is_set)
            eventually(lambda: repository.stored("hold").progress == 30)
            while not self.do("cancel", "hold", lambda: queue.cancel_task("hold")):
                continue  # a caller tries again
        self.wait()
        if repository.stored("bad"):
            self.do("requeue", "bad", lambda: queue.requeue("bad"))
        if repository.stored("early"):
            self.do("delete", "early", lambda: queue.delete("early"))
        self.wait()
        queue.stop()
        queue.close()

    def wait(self):
        """Wait until all tasks have ended."""
        eventually(lambda: self._drained() and not self.unfinished())

    def _drained(self):
        try:
            return self.queue.drain(PATIENCE)
        except RepositoryError:
            return False

    def unfinished(self):
        tasks = map(self.repository.stored, list(self.repository.inner._texts))
        return [task.id for task in tasks if task and not task.status.finished]


STATUSES = {"flaky": "completed", "bad": "failed", "hold": "cancelled", "dropped": "cancelled"}


def check(story):
    """Check that the answers to the caller, the stored tasks and the runs agree."""
    told, repository = story.told, story.repository
    assert story.at_once == []
    for (step, task_id), answer in told.items():
        if step != "submit":
            continue
        task, runs = repository.stored(task_id), story.runs[task_id]
        deleted = told.get(("delete", task_id))
        if answer == "doubt":
            assert story.named["submit", task_id] == task_id
        elif answer == "refused":
            assert task is None
            assert runs == 0
        elif answer is True:
            assert (task is None) == (deleted is True) or deleted == "doubt"
        if task is not None:
            cancelled = told.get(("cancel", task_id))
            wanted = STATUSES.get(task_id, "completed")
            if task_id == "dropped" and cancelled is not True:
                assert task.status in ("cancelled", "completed")
            else:
                assert task.status == wanted
                assert runs == {"flaky": 2, "dropped": 0}.get(task_id, runs)
            if task_id.startswith("work"):
                assert (task.result, runs) == (int(task_id[-1]), 1)
            if task_id == "bad":
                again = told.get(("requeue", "bad"))
                assert runs == {True: 2, "refused": 1}.get(again, runs)
        finished = story.hook.finished_ids.count(task_id)
        if answer is True and task_id != "dropped":  # no hook is called if the task cannot be read
            assert finished == (2 if runs == 2 and task_id == "bad" else 1)


def test_without_failures_every_step_succeeds():
    story = Story(Hiccups())
    story.live()
    assert set(story.told.values()) == {True}
    check(story)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("method", "times", "step"),
    [
        *((method, 1, 1) for method in EIGHT_METHODS),
        *((method, 3, 1) for method in ("create", "update", "delete")),
        (ALL, 3, 3),
    ],
)
def test_a_method_may_fail_at_any_call(method, times, step, late):
    """Each call in turn fails, of one method or of all, before or after it has done its work."""
    if late and method in ("get_by_id", "list", "count"):
        return  # a read has no effect, so it makes no difference
    calm = Story(Hiccups())
    calm.live()
    for first in range(1, calm.repository.calls[method] + 1, step):
        story = Story(Hiccups(method, first, times, late=late))
        story.live()
        check(story)


class TestSubmit:
    @pytest.fixture
    def repository(self):
        return Hiccups()

    @pytest.fixture
    def queue(self, make_queue, repository):
        queue = make_queue(repository)
        queue.executor("fine")(lambda: "ran")
        return queue

    @pytest.mark.parametrize("late", [False, True])
    def test_a_submit_survives_one_failure_of_create(self, queue, repository, late):
        repository.fail("create", late=late)
        queue.start()
        assert queue.submit("fine").result(PATIENCE) == "ran"

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (OSError, RepositoryUnavailable),
            (ValueError, RepositoryError),
            (MemoryError, RepositoryError),
        ],
    )
    def test_a_refused_task_is_not_stored(self, queue, repository, error, raised):
        repository.fail("create", times=2, error=error)
        with pytest.raises(raised, match="the disk failed") as refused:
            queue.submit("fine", id="a")
        assert type(refused.value) is raised
        assert isinstance(refused.value.__cause__, error)
        assert not refused.value.in_doubt
        assert repository.stored("a") is None
        queue.submit("fine", id="a")

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("options", [{}, {"priority": 3}, {"delay": 0.01}])
    def test_a_task_submitted_in_doubt_runs_if_it_was_stored(
        self, queue, repository, late, options
    ):
        queue.start()
        whole_round(queue)
        # ``create`` fails, and so do the reads that would show its outcome.
        repository.fail(ALL, times=3, late=late)
        with pytest.raises(RepositoryUnavailable, match="the write may have taken place") as doubt:
            queue.submit("fine", id="a", **options)
        assert str(doubt.value).startswith("task a: Hiccups: OSError")
        assert (doubt.value.in_doubt, doubt.value.task_id) == (True, "a")
        if late:
            with pytest.raises(DuplicateTask):
                queue.submit("fine", id="a", **options)
        else:
            assert repository.stored("a") is None
            queue.submit("fine", id="a", **options)
        eventually(lambda: repository.stored("a").status == "completed")

    def test_a_task_stored_by_an_interrupted_submit_runs(self, queue, repository):
        queue.start()
        repository.fail("create", late=True, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            queue.submit("fine", id="a")
        assert interrupt.value.task_id == "a"
        eventually(lambda: repository.stored("a").status == "completed")
        assert repository.stored("a").starts == 1

    def test_a_task_with_a_lost_option_is_removed_even_if_delete_fails(self, make_queue):
        repository = Hiccups()
        repository.inner = TinyRepository(ORIGINAL_FIELDS)
        queue = make_queue(repository)
        queue.executor("fine")(lambda: None)
        repository.fail("delete")
        with pytest.raises(ConfigurationError, match="does not keep priority"):
            queue.submit("fine", id="a", priority=1)
        assert repository.stored("a") is None


class TestApply:
    """The writes of several threads in one batch."""

    def writes(self, *names):
        made = (
            lifecycle.create(task_id=name, type="t", params="{}", created_by="", now=1)
            for name in names
        )
        return list(made)

    def test_writes_of_a_failed_batch_are_not_applied_twice(self):
        repository = Hiccups("create", 2, 2)
        adapter = EightMethodAdapter(repository)
        writes = self.writes("a", "b", "c")
        with pytest.raises(RepositoryError) as error:
            adapter.apply(writes)
        assert error.value.in_doubt  # some writes were stored
        assert [adapter.apply([write]) for write in writes] == [[True]] * 3
        assert adapter.apply(self.writes("a")) == [False]

    @pytest.mark.parametrize("late", [False, True])
    def test_a_start_in_doubt_took_place_wholly_or_not_at_all(self, late):
        repository = Hiccups()
        adapter = EightMethodAdapter(repository)
        adapter.apply(self.writes("a"))
        start = lifecycle.start(adapter.get_by_id("a"), 5, "node")
        repository.fail(ALL, first=2, times=3, late=late)
        with pytest.raises(RepositoryUnavailable) as error:
            adapter.apply([start])
        assert error.value.in_doubt
        task = adapter.get_by_id("a")
        assert (task.status, task.starts, task.owner) == (
            ("running", 1, "node") if late else ("pending", 0, "")
        )
        assert held_on(adapter, "node") == ["a"] * late
        assert adapter.apply([start]) == [True]
        assert adapter.apply([start]) == [False]

    @pytest.mark.parametrize("late", [False, True])
    def test_writes_that_took_place_before_an_interrupt_are_recognised(self, late):
        repository = Hiccups()
        adapter = EightMethodAdapter(repository)
        adapter.apply(self.writes("a", "b"))
        starts = [lifecycle.start(adapter.get_by_id(name), 5, "node") for name in "ab"]
        repository.fail("update", first=2, late=late, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            adapter.apply(starts)
        assert shown(adapter, starts) == [True, late]
        assert [adapter.get_by_id(name).owner for name in "ab"] == ["node", "node" if late else ""]

    def test_alternative_writes_read_the_record_once(self):
        repository = Hiccups()
        adapter = EightMethodAdapter(repository)
        adapter.apply(self.writes("a"))
        repository.calls.clear()
        assert adapter.apply(lifecycle.cancel("a", 5)) == [True, False, False, False]
        assert repository.calls["get_by_id"] == 1

    def test_a_start_fails_if_the_record_was_just_removed(self):
        repository = Hiccups()
        adapter = EightMethodAdapter(repository)
        adapter.apply(self.writes("a"))
        start = lifecycle.start(adapter.get_by_id("a"), 5, "node")
        update = repository.inner.update

        def too_late(task):
            repository.inner.delete(task.id)
            update(task)

        repository.inner.update = too_late
        assert adapter.apply([start]) == [False]


def test_progress_that_was_not_stored_is_stored_later(make_queue, repository, monkeypatch):
    """The executor need not report progress again."""
    queue = make_queue()

    @queue.executor("hold")
    def hold(ctx):
        ctx.progress(40)
        assert ctx.token.wait(PATIENCE)

    apply, refused = repository.apply, []

    def once_away(writes, **options):
        if not refused and any("progress" in getattr(w, "changes", ()) for w in writes):
            refused.append(True)
            raise RepositoryUnavailable("away")
        return apply(writes, **options)

    monkeypatch.setattr(repository, "apply", once_away)
    queue.start()
    handle = queue.submit("hold")
    eventually(lambda: handle.task().progress == 40)
    assert refused
    handle.cancel()
