"""Cancel, time-outs and progress: how they reach an executor, and how the task ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from helpers import PATIENCE, SOON, eventually, frequent_checks, pool_of

from taskx import (
    CancelReason,
    ConfigurationError,
    InvalidTransition,
    PayloadError,
    Permanent,
    Queue,
    Retry,
    RetryPolicy,
    Snooze,
    TaskCancelled,
    TaskFailed,
    TaskNotFound,
    TaskStatus,
)
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.writes import Insert, Update

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")


def test_a_cancelled_pending_task_never_runs(make_queue):
    """Each round cancels at a different moment on the task's way to a worker."""
    queue = make_queue(worker_num=2, buffer_size=1000)
    ran = set()
    queue.executor("note")(lambda n: ran.add(n))
    queue.start()
    cancelled = set()
    for n in range(400):
        handle = queue.submit("note", {"n": n})
        for _ in range(n % 40):
            pass
        try:
            if queue.cancel_task(handle.id):
                cancelled.add(n)
                assert n not in ran
        except InvalidTransition:
            assert n in ran
    assert queue.drain(PATIENCE)
    assert not cancelled & ran
    for task in queue.list_tasks()[0]:
        n = task.params["n"]
        if n in cancelled:
            assert task.status is TaskStatus.CANCELLED


@frequent_checks
@pytest.mark.parametrize("how", ["cancel_task", "delete", "cancel_many"])
def test_a_committed_cancel_or_delete_does_not_raise(started, repository, how):
    """If the repository fails just after the commit, the handle resolves when it is available again."""
    handle = started.submit("fine", delay=3600)
    assert not handle.done()  # watched from now on

    def away(writes):
        repository.down |= any(write.id == handle.id for write in writes)

    repository.after = away
    getattr(started, how)([handle.id] if how == "cancel_many" else handle.id)
    assert repository.down
    repository.after, repository.down = lambda writes: None, False
    eventually(handle.done)


def test_a_task_in_the_buffer_can_be_cancelled(busy, gate):
    queue = busy()
    handle = queue.submit("note", {"n": 1})
    assert queue.cancel_task(handle.id) is True
    task = handle.task()
    assert (task.status, task.starts) == (TaskStatus.CANCELLED, 0)
    assert task.completed_at is not None
    gate.open()
    assert queue.drain(PATIENCE)
    assert queue.ran == []
    with pytest.raises(CancelledError):
        handle.result(0)


def test_cancelled_tasks_free_their_slots_in_the_buffer(busy):
    queue = busy(buffer_size=2)
    for _ in range(10):
        queue.cancel_task(queue.submit("note").id)


def test_a_running_task_is_told_to_stop_at_once(started):
    begun, heard = threading.Event(), threading.Event()

    @started.executor("listen")
    def listen(ctx):
        begun.set()
        ctx.token.wait(PATIENCE)
        if ctx.token.reason is CancelReason.CANCEL:
            heard.set()
        ctx.token.raise_if_cancelled()

    handle = started.submit("listen")
    assert begun.wait(PATIENCE)
    began = time.monotonic()
    assert started.cancel_task(handle.id) is False
    assert heard.wait(PATIENCE)
    assert time.monotonic() - began < SOON
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    task = handle.task()
    assert task.status is TaskStatus.CANCELLED
    assert task.cancel_requested_at is not None
    assert (task.errors, task.error, task.owner) == (0, "", "")


@pytest.mark.parametrize(
    "error", [None, ValueError("while tidying up"), SystemExit(1), KeyboardInterrupt()], ids=repr
)
def test_a_cancelled_executor_may_raise_any_error(started, error):
    begun = threading.Event()

    @started.executor("listen", max_attempts=5)
    def listen(ctx):
        begun.set()
        try:
            ctx.sleep(PATIENCE)
        except TaskCancelled:
            if error is None:
                raise
            raise error from None

    handle = started.submit("listen")
    assert begun.wait(PATIENCE)
    started.cancel_task(handle.id)
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert (handle.task().status, handle.task().starts) == (TaskStatus.CANCELLED, 1)


def test_an_exception_handler_does_not_swallow_a_cancel(started):
    begun = threading.Event()

    @started.executor("careless")
    def careless(ctx):
        begun.set()
        try:
            ctx.sleep(PATIENCE)
        except Exception:  # noqa: BLE001  (as careless code does)
            return "swallowed"

    handle = started.submit("careless")
    assert begun.wait(PATIENCE)
    started.cancel_task(handle.id)
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)


def test_a_normal_return_completes_a_cancelled_task(started):
    begun = threading.Event()

    @started.executor("thorough")
    def thorough(ctx):
        begun.set()
        ctx.token.wait(PATIENCE)
        return "done all the same"

    handle = started.submit("thorough")
    assert begun.wait(PATIENCE)
    started.cancel_task(handle.id)
    assert handle.result(PATIENCE) == "done all the same"
    assert handle.task().status is TaskStatus.COMPLETED


def test_a_second_cancel_changes_nothing(started, gate):
    started.executor("hold")(lambda ctx: (gate(), ctx.token.raise_if_cancelled()))
    handle = started.submit("hold")
    gate.wait_for(1)
    assert started.cancel_task(handle.id) is False
    asked = handle.task().cancel_requested_at
    assert started.cancel_task(handle.id) is False
    assert handle.task().cancel_requested_at == asked
    gate.open()
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)


def test_finished_and_unknown_tasks_cannot_be_cancelled(started):
    handle = started.submit("fine")
    handle.result(PATIENCE)
    with pytest.raises(InvalidTransition, match="completed"):
        started.cancel_task(handle.id)
    assert handle.cancel() is False
    with pytest.raises(TaskNotFound):
        started.cancel_task("nobody")


def test_a_cancel_from_another_queue_reaches_a_running_task(started, make_queue):
    """The other queue shares only the repository, as in another process."""
    started.executor("listen")(lambda ctx: ctx.sleep(PATIENCE))
    handle = started.submit("listen")
    eventually(handle.running)
    began = time.monotonic()
    assert make_queue().cancel_task(handle.id) is False
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert time.monotonic() - began < SOON  # the executor would sleep for two minutes


def test_a_race_of_cancel_and_end_has_one_outcome(make_queue):
    queue = make_queue(worker_num=2)
    queue.executor("quick", max_attempts=3)(lambda ctx: ctx.token.raise_if_cancelled())
    queue.start()
    for _ in range(200):
        handle = queue.submit("quick")
        try:
            never_ran = queue.cancel_task(handle.id)
        except InvalidTransition:
            never_ran = False
        try:
            handle.result(PATIENCE)
            status = TaskStatus.COMPLETED
            assert not never_ran
        except CancelledError:
            status = TaskStatus.CANCELLED
        assert handle.task().status is status


# Time-outs


def test_a_timeout_fires_the_token_and_fails_the_task(started):
    @started.executor("slow", timeout=0.05)
    def slow(ctx):
        ctx.token.wait()
        assert ctx.token.reason is CancelReason.TIMEOUT
        ctx.token.raise_if_cancelled()

    handle = started.submit("slow")
    with pytest.raises(TaskFailed, match=r"timed out after 0\.05 s"):
        handle.result(PATIENCE)
    task = handle.task()
    assert (task.status, task.errors, task.error) == (
        TaskStatus.FAILED,
        1,
        "timed out after 0.05 s",
    )
    assert task.duration >= 0.05


def test_a_timeout_applies_to_each_attempt_and_counts_as_an_error(started):
    @started.executor("slow", timeout=0.02, max_attempts=3)
    def slow(ctx):
        ctx.sleep(PATIENCE)

    handle = started.submit("slow")
    assert handle.exception(PATIENCE).attempt == 3
    assert [a.error for a in handle.task().attempts] == ["timed out after 0.02 s"] * 3


@pytest.fixture
def past_its_deadline(make_queue, clock):
    """Return a function that runs a task whose deadline passes once it has begun; it returns the handle."""

    def run(function, **options):
        queue = make_queue(worker_num=1, clock=clock)

        @queue.executor("slow", timeout=60)
        def slow(ctx):
            clock.advance(60)
            return function(ctx)

        queue.start()
        return queue.submit("slow", **options)

    return run


def test_an_error_after_the_deadline_is_kept(past_its_deadline):
    def slow(ctx):
        ctx.token.wait()
        raise OSError("connection cut off")

    with pytest.raises(TaskFailed, match="timed out after 60 s: OSError: connection cut off"):
        past_its_deadline(slow).result(PATIENCE)


@pytest.mark.parametrize(
    ("raised", "policy", "attempts"),
    [
        (OSError("cut off"), {"retry_on": TimeoutError}, 3),
        (OSError("cut off"), {"give_up_on": TimeoutError}, 1),
        (EOFError("cut off"), {"give_up_on": EOFError}, 3),
        (Snooze(3600), {}, 3),
        (Retry("again", delay=0), {"give_up_on": TimeoutError}, 3),
        (Permanent("no use"), {}, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_any_error_after_a_timeout_counts_as_a_timeout_for_retry(
    past_its_deadline, raised, policy, attempts
):
    """For example, a connection that the time-out closed raises its own error. A snooze does not count."""

    def slow(ctx):
        ctx.token.wait()
        raise raised

    handle = past_its_deadline(slow, retry=RetryPolicy(3, base=0, **policy))
    assert handle.exception(PATIENCE).attempt == attempts
    assert (handle.task().errors, handle.task().snoozes) == (attempts, 0)


def test_a_return_after_the_deadline_completes_the_task(past_its_deadline):
    assert past_its_deadline(lambda ctx: ctx.token.wait()).result(PATIENCE) is True


def test_remaining_returns_the_seconds_until_the_deadline(busy, gate, clock):
    """A time-out counts from the start of the attempt."""
    queue = busy(clock=clock)

    @queue.executor("tell")
    def tell(ctx):
        told = [ctx.remaining()]
        if ctx.task.timeout is not None:
            clock.advance(99)
            told.append(ctx.remaining())
            clock.advance(1)
            with pytest.raises(TaskCancelled):
                ctx.remaining()
        return told

    handles = [queue.submit("tell", timeout=timeout) for timeout in (100, None)]
    clock.advance(50)
    gate.open()
    assert [handle.result(PATIENCE) for handle in handles] == [[100, 1], [None]]


def test_ctx_timeout_sets_a_narrower_deadline(make_queue, clock):
    queue = make_queue(clock=clock)

    @queue.executor("parts")
    def parts(ctx):
        outer = ctx.token

        def part():
            with ctx.timeout(20) as inner:
                assert ctx.token is inner
                assert inner.remaining() == ctx.remaining() == 20
                clock.advance(20)
                ctx.sleep(PATIENCE)

        with pytest.raises(TimeoutError, match="20 s") as caught:
            part()
        assert isinstance(caught.value.__cause__, TaskCancelled)
        assert ctx.token is outer
        assert not outer.cancelled
        assert ctx.remaining() is None
        with ctx.timeout(PATIENCE):
            pass
        with pytest.raises(KeyError), ctx.timeout(PATIENCE):
            raise KeyError
        with pytest.raises(ConfigurationError), ctx.timeout(-1):
            pass
        return "goes on"

    queue.start()
    assert queue.submit("parts").result(PATIENCE) == "goes on"


def test_ctx_timeouts_can_be_nested(started):
    @started.executor("nested")
    def nested(ctx):
        with ctx.timeout(PATIENCE):
            with pytest.raises(TimeoutError), ctx.timeout(0.02):
                ctx.sleep(PATIENCE)
            assert 1 < ctx.remaining() <= PATIENCE
        with pytest.raises(TimeoutError), ctx.timeout(0.02), ctx.timeout(PATIENCE):
            ctx.sleep(PATIENCE)
        return "goes on"

    assert started.submit("nested").result(PATIENCE) == "goes on"


def test_a_ctx_timeout_is_for_the_thread_that_opens_it(started):
    inside, leave = threading.Event(), threading.Event()

    @started.executor("threads")
    def threads(ctx):
        whole = ctx.token

        def part():
            with ctx.timeout(PATIENCE) as inner:
                inside.set()
                assert leave.wait(PATIENCE)
                return ctx.token is inner

        with ThreadPoolExecutor() as pool:
            other = pool.submit(part)
            assert inside.wait(PATIENCE)
            is_whole = ctx.token is whole
            leave.set()
            return [is_whole, other.result()]

    assert started.submit("threads").result(PATIENCE) == [True, True]


def test_the_tasks_deadline_is_not_reported_as_a_ctx_timeout(started):
    @started.executor("slow", timeout=0.05)
    def slow(ctx):
        with ctx.timeout(PATIENCE):
            ctx.sleep(PATIENCE)

    with pytest.raises(TaskFailed, match=r"timed out after 0\.05 s"):
        started.submit("slow").result(PATIENCE)


def test_a_cancel_interrupts_a_ctx_timeout(started):
    inside = threading.Event()

    @started.executor("slow")
    def slow(ctx):
        with ctx.timeout(PATIENCE):
            inside.set()
            ctx.sleep(PATIENCE)

    handle = started.submit("slow")
    assert inside.wait(PATIENCE)
    started.cancel_task(handle.id)
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)


# Callbacks


def test_callbacks_run_in_a_separate_thread(started):
    listens, called, threads = threading.Event(), threading.Event(), []

    @started.executor("listen")
    def listen(ctx):
        ctx.on_cancel(lambda: (threads.append(threading.current_thread()), called.set()))
        listens.set()
        assert called.wait(PATIENCE)
        ctx.token.raise_if_cancelled()

    handle = started.submit("listen")
    assert listens.wait(PATIENCE)
    started.cancel_task(handle.id)
    assert called.wait(PATIENCE)
    assert threads[0] not in (threading.current_thread(), *pool_of(started).threads)
    assert threads[0].name != "taskx-housekeeper"


def test_a_hanging_callback_blocks_nothing_else(started, gate):
    others, begun = [], threading.Event()

    @started.executor("listen")
    def listen(ctx):
        ctx.on_cancel(lambda: others.append(1))
        ctx.on_cancel(lambda: gate())
        ctx.on_cancel(lambda: others.append(2))
        ctx.on_cancel(lambda: 1 / 0)
        begun.set()
        ctx.sleep(PATIENCE)

    handle = started.submit("listen")
    assert begun.wait(PATIENCE)
    assert started.cancel_task(handle.id) is False
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    eventually(lambda: sorted(others) == [1, 2])
    assert started.submit("fine").result(PATIENCE) == "fine"
    late = started.submit("listen", timeout=0.01)  # deadlines do not wait for callbacks
    assert late.exception(PATIENCE)


def test_an_invalid_callback_fails_the_attempt(started):
    @started.executor("listen")
    def listen(ctx):
        ctx.on_cancel(5)

    with pytest.raises(TaskFailed, match="ConfigurationError: callback must be a function"):
        started.submit("listen").result(PATIENCE)


def test_a_removed_callback_is_not_called(started):
    called, taken_back = [], threading.Event()

    @started.executor("listen")
    def listen(ctx):
        remove = ctx.on_cancel(lambda: called.append("no"))
        ctx.on_cancel(lambda: called.append("yes"))
        remove()
        remove()
        taken_back.set()
        ctx.sleep(PATIENCE)

    handle = started.submit("listen")
    assert taken_back.wait(PATIENCE)
    started.cancel_task(handle.id)
    eventually(lambda: called)
    assert called == ["yes"]


# Progress


def progress_writes(queue: Queue) -> list[Update]:
    return [
        write
        for batch in queue.repository.batches
        for write in batch
        if isinstance(write, Update) and set(write.changes) == {"progress", "message"}
    ]


def test_very_many_progress_calls_are_a_few_writes(started):
    @started.executor("count")
    def count(ctx):
        for n in range(100_000):
            ctx.progress(n // 1_000, "counting")
        raise ValueError

    began = time.monotonic()
    handle = started.submit("count")
    assert handle.exception(PATIENCE)
    rounds = (time.monotonic() - began) / (
        0.9 * DEFAULT_TIMING.progress_every
    )  # the housekeeper may be early
    assert len(progress_writes(started)) <= rounds + 2
    assert (handle.task().progress, handle.task().message) == (99, "counting")


def test_progress_is_visible_while_a_task_runs(started, gate):
    @started.executor("show")
    def show(ctx):
        ctx.progress(30, "a third")
        gate()

    handle = started.submit("show")
    eventually(lambda: handle.task().progress == 30)
    assert handle.task().message == "a third"
    gate.open()
    handle.result(PATIENCE)
    assert (handle.task().progress, handle.task().message) == (100, "a third")


@pytest.mark.parametrize("how", ["fail", "cancel", "complete"])
def test_the_last_progress_is_always_stored(started, gate, how):
    @started.executor("show")
    def show(ctx):
        gate()
        ctx.progress(41, "before")
        ctx.progress(42, "the last")
        if how == "fail":
            raise ValueError
        if how == "cancel":
            ctx.sleep(PATIENCE)

    handle = started.submit("show")
    gate.wait_for(1)
    if how == "cancel":
        started.cancel_task(handle.id)
    gate.open()
    eventually(handle.done)
    task = handle.task()
    assert (task.progress, task.message) == (100 if how == "complete" else 42, "the last")


@pytest.mark.parametrize(
    ("told", "kept"),
    [(-5, 0), (0, 0), (42.9, 42), (1000, 100), (float("inf"), 100), (float("-inf"), 0)],
)
def test_progress_is_limited_to_0_to_100(started, told, kept):
    @started.executor("show")
    def show(ctx):
        ctx.progress(told)
        raise ValueError

    handle = started.submit("show")
    assert handle.exception(PATIENCE)
    assert handle.task().progress == kept


def test_invalid_progress_is_refused(started):
    @started.executor("show")
    def show(ctx):
        for wrong in (float("nan"), "50", None, True, 1j):
            with pytest.raises(PayloadError, match="progress"):
                ctx.progress(wrong)
        with pytest.raises(PayloadError, match="message"):
            ctx.progress(1, 5)
        ctx.progress(7, "x" * 50_000 + "\ud800")
        raise ValueError

    handle = started.submit("show")
    assert handle.exception(PATIENCE)
    assert handle.task().error == "ValueError"
    assert handle.task().progress == 7
    assert len(handle.task().message) == 10_000


def test_progress_can_be_set_through_the_repository(started):
    """This is the way of the original interface."""
    seen = []

    @started.executor("classic")
    def classic(ctx, fail):
        started.repository.update_progress(ctx.task.id, 60, "by hand")
        seen.append(started.get_task_status(ctx.task.id).progress)
        if fail:
            raise ValueError

    handle = started.submit("classic", {"fail": False})
    handle.result(PATIENCE)
    assert (handle.task().progress, handle.task().message) == (100, "by hand")
    handle = started.submit("classic", {"fail": True})
    assert handle.exception(PATIENCE)
    assert (handle.task().progress, handle.task().message) == (60, "by hand")
    assert seen == [60, 60]


def test_progress_after_the_attempt_is_ignored(queue):
    """A thread that outlived its attempt changes neither the record nor the next attempt."""
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
        threading.Event().wait(0.3)  # blocks on purpose: progress is written three times
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


def test_progress_of_a_run_that_was_taken_over_is_ignored(queue, gate):
    """The old run goes on and does not know that the task was started again elsewhere."""

    @queue.executor("work")
    def work(ctx):
        if ctx.task.starts == 1:
            gate()
            ctx.progress(90, "from the first")
            assert seen.wait(PATIENCE)  # after its end, the audit would hand the other one back

    tried, seen = threading.Event(), threading.Event()

    def watch(writes):
        if any(not isinstance(w, Insert) and w.changes.get("progress") == 90 for w in writes):
            tried.set()

    queue.repository.after = watch
    queue.start()
    handle = queue.submit("work")
    gate.wait_for(1)
    again = {"starts": 2, "progress": 10, "message": "from the second"}
    queue.repository.apply([Update(handle.id, {}, again)])
    gate.open()
    assert tried.wait(PATIENCE)
    task = handle.task()
    seen.set()
    assert (task.starts, task.progress, task.message) == (2, 10, "from the second")
