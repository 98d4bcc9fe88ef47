"""One call of an executor for many tasks."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from datetime import date, timedelta

import pytest
from helpers import PATIENCE, SOON, eventually, pool_of
from strikes import strike_at

from taskx import (
    BatchContext,
    CancelReason,
    Codec,
    ConfigurationError,
    Hook,
    MemoryRepository,
    Middleware,
    PayloadError,
    Permanent,
    Retry,
    RetryPolicy,
    Snooze,
    Task,
    TaskCancelled,
    TaskExecutor,
    TaskStatus,
    current_context,
    executor,
)
from taskx.tasks.writes import Update
from taskx.testing import InlineQueue, ManualQueue, run_executor


@dataclass
class Doc:
    day: date
    text: str = ""


@pytest.fixture
def manual():
    """A queue that the test drives: a call takes what is there."""
    return ManualQueue()


@pytest.fixture
def calls(manual):
    """The params of each call of the executor ``add`` of the queue, in order. It adds 1 to ``n``."""
    made = []

    @manual.executor("add", batch=3)
    def add(tasks):
        made.append([task["n"] for task in tasks])
        manual.clock.advance(1)
        if any(task["n"] < 0 for task in tasks):
            raise ValueError("poison")
        return [task["n"] + 1 for task in tasks]

    return made


def submitted(queue, *numbers, **options):
    return [queue.submit("add", {"n": n}, **options) for n in numbers]


# --- the call


def test_an_executor_gets_the_params_of_many_tasks_and_returns_a_result_for_each(manual, calls):
    handles = submitted(manual, 1, 2, 3, 4)
    assert len(manual.run_all()) == 4
    assert calls == [[1, 2, 3], [4]]
    assert [handle.result() for handle in handles] == [2, 3, 4, 5]
    assert all(handle.task().attempts[0].outcome == "completed" for handle in handles)


def test_tasks_whose_start_frees_their_keys_share_a_call(manual, calls):
    for n in range(3):
        submitted(manual, n, unique_key=f"k{n}", unique_scope="pending")
    assert len(manual.run_all()) == 3
    assert calls == [[0, 1, 2]]


def test_a_returned_exception_is_the_error_of_its_task_alone(manual):
    @manual.executor("each", batch=9, retry=RetryPolicy(max_attempts=5, base=60))
    def each(tasks):
        found = {
            "error": KeyError("x"),
            "retry": Retry(5),
            "snooze": Snooze(7),
            "no": Permanent("no"),
        }
        return [found.get(task["is"], task["is"]) for task in tasks]

    asked = ("fine", "error", "retry", "snooze", "no")
    handles = [manual.submit("each", {"is": kind}) for kind in asked]
    manual.run_all()
    fine, error, retry, snooze, no = (handle.task() for handle in handles)
    assert (fine.status, fine.result) == (TaskStatus.COMPLETED, "fine")
    assert (error.status, error.attempts[0].error) == (TaskStatus.PENDING, "KeyError: 'x'")
    assert error.run_at - manual.clock.now() > timedelta(seconds=20)
    assert (retry.status, retry.run_at - manual.clock.now()) == (error.status, timedelta(seconds=5))
    assert (snooze.snoozes, snooze.run_at - manual.clock.now()) == (1, timedelta(seconds=7))
    assert (no.status, no.error) == (TaskStatus.FAILED, "Permanent: no")


def test_a_result_that_is_not_json_fails_its_task_alone(manual):
    manual.executor("odd", batch=2)(lambda tasks: [object(), 1])
    handles = [manual.submit("odd"), manual.submit("odd")]
    manual.run_all()
    assert [handle.task().status.value for handle in handles] == ["failed", "completed"]
    assert "result" in handles[0].task().error


def test_params_and_results_have_the_forms_of_the_items_of_the_annotated_lists(manual):
    seen = []

    @manual.executor("typed", batch=5)
    def typed(docs: list[Doc]) -> list[timedelta | Exception]:
        seen.extend(docs)
        return [timedelta(days=doc.day.day) if doc.text else ValueError("empty") for doc in docs]

    first = typed.submit(Doc(date(2030, 1, 2), "a"))
    second = manual.submit(typed, {"day": date(2030, 1, 3), "text": "b"})
    third = manual.submit("typed", {"day": "2030-01-04"})
    manual.run_all()
    assert seen == [Doc(date(2030, 1, 2), "a"), Doc(date(2030, 1, 3), "b"), Doc(date(2030, 1, 4))]
    assert first.task().params == {"day": "2030-01-02", "text": "a"}
    assert [first.result(), second.result()] == [timedelta(days=2), timedelta(days=3)]
    assert third.task().error == "ValueError: empty"


def test_params_that_do_not_fit_an_item_are_refused_at_the_submit(manual):
    @manual.executor("typed", batch=5)
    def typed(docs: list[Doc]) -> list[int]:
        return [1 for _ in docs]

    @manual.executor("open", batch=5)
    def open_(items):
        return items

    for wrong in ({"day": "no day"}, {"when": "2030-01-02"}, {}):
        with pytest.raises(PayloadError):
            manual.submit(typed, wrong)
    for wrong in (5, [1], None):
        with pytest.raises(PayloadError, match="an object"):
            open_.task(wrong)
    assert open_.task({"a": 1}).params == {"a": 1}
    assert typed.using(priority=3).task(Doc(date(2030, 1, 2))).priority == 3


def test_a_map_gives_each_item_to_a_task(make_queue):
    queue = make_queue()

    @queue.executor("double", batch=4, wait=0.01)
    def double(items):
        return [2 * item["n"] for item in items]

    with queue:
        assert list(queue.map(double, [{"n": n} for n in range(10)])) == [*range(0, 20, 2)]


def test_a_batch_executor_can_be_called_as_its_function(manual):
    @manual.executor(batch=2)
    def embed(texts: list[str]) -> list[int]:
        return [len(text) for text in texts]

    assert embed(["a", "bc"]) == [1, 2]
    assert embed.type == "embed"


# --- which tasks share a call


def test_a_more_urgent_task_comes_first_and_tasks_of_other_types_are_not_in_the_call(manual, calls):
    ran = []
    manual.executor("other")(lambda: ran.append(len(calls)))
    submitted(manual, 1, 2)
    manual.submit("other", priority=5)
    submitted(manual, 3, 4, priority=9)
    manual.run_all()
    assert calls == [[3, 4, 1], [2]]
    assert ran == [1]


def test_a_call_waits_for_more_tasks_and_at_most_so_long(make_queue):
    queue, sizes = make_queue(worker_num=2), []

    @queue.executor("add", batch=3, wait=10 * PATIENCE)
    def add(tasks):
        sizes.append(len(tasks))
        return [task["n"] for task in tasks]

    @queue.executor("few", batch=3, wait=0.05)
    def few(tasks):
        return [len(tasks) for _ in tasks]

    with queue:
        handles = submitted(queue, 1, 2)
        assert queue.submit("few").result(PATIENCE) == 1
        assert not any(handle.done() for handle in handles)
        handles += submitted(queue, 3)
        assert [handle.result(PATIENCE) for handle in handles] == [1, 2, 3]
    assert sizes == [3]


def test_other_tasks_run_while_a_call_waits_for_more_even_on_the_only_worker(make_queue):
    queue = make_queue(worker_num=1)
    queue.executor("add", batch=3, wait=PATIENCE)(lambda tasks: [1 for _ in tasks])
    queue.executor("other")(lambda: 5)
    with queue:
        (waiting,) = submitted(queue, 1)
        assert [queue.submit("other").result(PATIENCE) for _ in range(3)] == [5, 5, 5]
        assert waiting.task().status is TaskStatus.PENDING
        assert waiting.cancel()
        assert waiting.task().status is TaskStatus.CANCELLED


def test_why_says_that_a_task_may_wait_for_more_tasks(make_queue):
    queue = make_queue(worker_num=1)
    queue.executor("add", batch=3, wait=PATIENCE)(lambda tasks: tasks)
    with queue:
        (handle,) = submitted(queue, 1)
        (reason,) = queue.why(handle.id)
        assert reason.sentence.endswith(", or up to 120 s for more tasks to share its call.")
        assert reason.facts["wait"] == PATIENCE
        handle.cancel()


def test_tasks_with_a_key_have_their_turns_and_share_calls_with_others(manual, calls):
    submitted(manual, 1, 2, key="a")
    submitted(manual, 3)
    manual.run_all()
    assert sorted(map(sorted, calls)) == [[1, 3], [2]]


def test_hooks_hear_of_each_task():
    heard = []

    class Heard(Hook):
        def started(self, task):
            heard.append(("started", task.params["n"]))

        def finished(self, task):
            heard.append((task.status.value, task.params["n"]))

    queue = ManualQueue(hooks=[Heard()])
    queue.executor("add", batch=3)(lambda tasks: [1, ValueError()])
    submitted(queue, 1, 2)
    queue.run_all()
    assert heard == [("started", 1), ("started", 2), ("completed", 1), ("failed", 2)]


def test_tasks_of_a_backlog_share_calls(make_queue):
    queue, sizes = make_queue(worker_num=2), []

    @queue.executor("add", batch=100, wait=SOON)
    def add(tasks):
        sizes.append(len(tasks))
        return [task["n"] for task in tasks]

    handles = queue.submit_many(Task(type="add", params={"n": n}) for n in range(400))
    with queue:
        assert [handle.result(PATIENCE) for handle in handles] == [*range(400)]
    assert sum(sizes) == 400
    assert sizes.count(100) >= 3


def test_a_call_has_at_most_as_many_tasks_as_a_limit_lets_start(make_queue):
    queue, sizes = make_queue(worker_num=2), []

    @queue.executor("add", batch=10, max_concurrency=2)
    def add(tasks):
        sizes.append(len(tasks))
        return [task["n"] for task in tasks]

    handles = submitted(queue, *range(6))
    with queue:
        assert [handle.result(PATIENCE) for handle in handles] == [*range(6)]
    assert max(sizes) <= 2


def test_a_task_that_must_not_crash_twice_runs_in_a_call_of_its_own(manual, calls):
    submitted(manual, 1, 2)
    submitted(manual, 3, max_crashes=1)
    manual.run_all()
    assert sorted(calls) == [[1, 2], [3]]


def test_a_task_whose_process_died_runs_in_a_call_of_its_own(manual, calls):
    handles = submitted(manual, 1, 2, 3)
    manual.repository.apply([Update(handles[0].id, {}, {"crashes": 1})])
    manual.run_all()
    assert sorted(calls) == [[1], [2, 3]]


def test_a_task_whose_chunks_cannot_be_stored_has_failed():
    class KeyServer(Codec):
        name = "away"

        def encode(self, data):
            if b"secret" in data:
                raise OSError("the key server is away")

        def decode(self, data):
            return data

    queue = ManualQueue(MemoryRepository(codec=KeyServer()))

    @queue.executor("tell", batch=2)
    def tell(ctx, tasks):
        for each, task in zip(ctx.each, tasks, strict=True):
            each.emit(["open", "secret"][task["n"]])
        return ["told", "told"]

    handles = [queue.submit("tell", {"n": n}) for n in (0, 1)]
    queue.run_all()
    assert [handle.task().result for handle in handles] == ["told", None]
    assert "codec 'away' failed" in handles[1].task().error


# --- a call that fails as a whole


def test_after_an_exception_each_task_of_the_call_runs_in_a_call_of_its_own(manual, calls, caplog):
    handles = submitted(manual, 1, -2, 3)
    manual.run_all()
    assert calls[0] == [1, -2, 3]
    assert sorted(calls[1:]) == [[-2], [1], [3]]
    assert [handle.task().status.value for handle in handles] == [
        "completed",
        "failed",
        "completed",
    ]
    assert handles[0].task().errors == 0  # the call of all uses up no attempt
    first, second = handles[1].task().attempts
    assert (first.outcome, first.error) == (
        "interrupted",
        "in a call with 2 other tasks: ValueError: poison",
    )
    assert (second.outcome, second.error) == ("failed", "ValueError: poison")
    assert caplog.text.count("the call for 3 tasks failed") == 1


def test_a_retry_runs_in_a_call_of_its_own(manual):
    sizes = []

    @manual.executor("add", batch=5, max_attempts=2)
    def add(tasks):
        sizes.append(len(tasks))
        return [ValueError("again") for _ in tasks]

    submitted(manual, 1, 2)
    manual.run_all()
    assert sizes == [2, 1, 1]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1], "has returned 1 results for 2 tasks"),
        ([1, 2, 3], "has returned 3 results for 2 tasks"),
        (None, "must return a list"),
        ("ab", "must return a list"),
        ({"a": 1}, "must return a list"),
    ],
)
def test_a_wrong_number_of_results_fails_the_call_with_both_numbers(manual, returned, words):
    manual.executor("add", batch=2)(lambda tasks: returned)
    first, _ = submitted(manual, 1, 2)
    manual.run_next()
    assert words in first.task().attempts[0].error
    manual.run_all()
    if not isinstance(returned, list) or len(returned) != 1:
        assert first.task().status is TaskStatus.FAILED


def test_a_snooze_of_the_call_is_for_all_its_tasks_and_they_share_a_call_again(manual):
    sizes = []

    @manual.executor("add", batch=5)
    def add(tasks):
        sizes.append(len(tasks))
        if len(sizes) == 1:
            raise Snooze(60)
        return [1 for _ in tasks]

    submitted(manual, 1, 2, 3)
    manual.run_all()
    manual.advance(61)
    assert sizes == [3, 3]


def test_after_a_time_out_each_task_of_the_call_runs_in_a_call_of_its_own(manual):
    @manual.executor("add", batch=5, timeout=10)
    def add(ctx, tasks):
        if any(task["n"] < 0 for task in tasks):
            ctx.sleep(60)
        return [task["n"] for task in tasks]

    handles = submitted(manual, 1, -2, 3)
    manual.run_all()
    assert [handle.task().status.value for handle in handles] == [
        "completed",
        "failed",
        "completed",
    ]
    assert handles[1].task().error == "timed out after 10 s"


# --- tokens


def test_a_cancelled_task_gets_its_own_outcome_and_does_not_disturb_the_others(manual):
    @manual.executor("add", batch=5)
    def add(ctx: BatchContext, tasks):
        manual.cancel_task(ctx.each[1].task.id)
        assert [one.token.reason for one in ctx.each] == [None, CancelReason.CANCEL, None]
        assert not ctx.token.cancelled
        return [
            TaskCancelled(one.token.reason) if one.token.cancelled else task["n"]
            for one, task in zip(ctx.each, tasks, strict=True)
        ]

    handles = submitted(manual, 1, 2, 3)
    manual.run_all()
    assert [handle.task().status.value for handle in handles] == [
        "completed",
        "cancelled",
        "completed",
    ]


def test_a_task_that_was_cancelled_is_cancelled_even_if_its_call_fails(manual):
    @manual.executor("add", batch=5)
    def add(ctx, tasks):
        if len(tasks) > 1:
            manual.cancel_task(ctx.each[0].task.id)
            raise ValueError
        return [task["n"] for task in tasks]

    handles = submitted(manual, 1, 2)
    manual.run_all()
    assert [handle.task().status.value for handle in handles] == ["cancelled", "completed"]


def test_the_token_of_the_call_fires_when_all_its_tasks_are_cancelled(manual):
    reasons = []

    @manual.executor("add", batch=5)
    def add(ctx, tasks):
        for one in ctx.each:
            assert not ctx.token.cancelled
            manual.cancel_task(one.task.id)
        reasons.append(ctx.token.reason)
        ctx.token.raise_if_cancelled()

    handles = submitted(manual, 1, 2, 3)
    manual.run_all()
    assert reasons == [CancelReason.CANCEL]
    assert {handle.task().status for handle in handles} == {TaskStatus.CANCELLED}


def test_each_task_has_its_own_time_out_and_the_call_that_of_the_last_one(manual):
    seen = []

    @manual.executor("add", batch=5, timeout=10)
    def add(ctx, tasks):
        assert ctx.remaining() == 30
        ctx.sleep(20)
        seen.append([one.token.reason for one in ctx.each])
        return [1 for _ in tasks]

    handles = [*submitted(manual, 1), *submitted(manual, 2, timeout=30)]
    manual.run_all()
    assert seen == [[CancelReason.TIMEOUT, None]]
    assert [handle.result() for handle in handles] == [1, 1]  # returned values complete


def test_a_stop_fires_the_token_of_the_call_and_interrupts_its_tasks(make_queue):
    queue, inside = make_queue(worker_num=1), threading.Event()

    @queue.executor("add", batch=2, wait=PATIENCE)
    def add(ctx, tasks):
        inside.set()
        ctx.sleep(PATIENCE)
        return [1 for _ in tasks]

    queue.start()
    handles = submitted(queue, 1, 2)
    assert inside.wait(PATIENCE)
    assert queue.stop(SOON, cancel=True) == []
    for handle in handles:
        task = queue.repository.get_many([handle.id])[handle.id]
        assert (task.status, task.interruptions) == (TaskStatus.PENDING, 1)


def test_a_call_that_does_not_end_after_its_time_out_is_abandoned_with_its_thread(make_queue, gate):
    queue = make_queue(worker_num=1, max_stuck=1)

    @queue.executor("add", batch=2, wait=PATIENCE, timeout=0.05, grace=0)
    def add(tasks):
        if len(tasks) > 1:
            gate()
        return [task["n"] for task in tasks]

    queue.executor("other")(lambda: 1)
    queue.start()
    handles = submitted(queue, 1, 2)
    pool = pool_of(queue)
    eventually(lambda: len(pool.stuck.runs) == 2)
    assert pool.stuck.healthy  # one thread, which was replaced
    assert queue.submit("other").result(PATIENCE) == 1
    eventually(lambda: all(handle.task().stuck_on for handle in handles))
    assert {handle.task().status for handle in handles} == {TaskStatus.PENDING}
    gate.open()
    eventually(lambda: all(not handle.task().stuck_on for handle in handles))


# --- the context


def test_what_belongs_to_a_single_task_is_refused_in_a_call_for_many(manual):
    wrong = []

    @manual.executor("add", batch=5)
    def add(ctx: BatchContext, tasks):
        for use in (
            lambda: ctx.step("a", int),
            lambda: ctx.once("a", int),
            lambda: ctx.ask("a"),
            lambda: ctx.wait("a"),
            lambda: ctx.run_all("a", []),
            lambda: ctx.sleep(5, step="a"),
            lambda: ctx.poll("a", int, every=1),
            lambda: ctx.cursor,
            lambda: setattr(ctx, "cursor", 1),
            lambda: ctx.transaction().__enter__(),
            lambda: ctx.task,
            lambda: ctx.parents,
            lambda: ctx.key("a"),
            lambda: ctx.spent(tokens=1),
        ):
            with pytest.raises(ConfigurationError, match="has batch=…: its context is that of all"):
                use()
            wrong.append(use)
        return tasks

    submitted(manual, 1, 2)
    submitted(manual, 3, max_crashes=1)  # the same if it is alone
    manual.run_all(check=True)
    assert len(wrong) == 28


def test_progress_logs_and_parents_belong_to_each_task(manual):
    @manual.executor("add", batch=5, capture_log=True)
    def add(ctx, tasks):
        first, second = sorted(ctx.each, key=lambda one: one.task.params["n"])
        ctx.progress(10, "all")
        first.progress(50, "first")
        ctx.logger.info("for all")
        second.logger.info("for the second")
        assert current_context() is ctx
        assert [parent.result for one in ctx.each for parent in one.parents] == [7]
        return [ValueError(), ValueError()]

    manual.executor("parent")(lambda: 7)
    first = manual.submit("add", {"n": 1}, depends_on=[manual.submit("parent")])
    manual.run_next()
    (second,) = submitted(manual, 2)
    manual.run_all()
    first, second = first.task(), second.task()
    assert (first.progress, first.message) == (50, "first")
    assert (second.progress, second.message) == (10, "all")
    assert ("for all" in first.log, "for the second" in first.log) == (True, False)
    assert ("for all" in second.log, "for the second" in second.log) == (True, True)
    assert "[add 2 tasks] for all" in second.log


def test_middleware_is_called_once_for_the_call():
    seen = []

    class Layer(Middleware):
        def __call__(self, ctx, task, call_next):
            seen.append((len(ctx.each), task.type))
            return [result + 1 for result in call_next()]

    queue = ManualQueue(middleware=[Layer()])
    queue.executor("add", batch=5)(lambda tasks: [task["n"] for task in tasks])
    handles = submitted(queue, 1, 2, 3)
    handles += submitted(queue, 4, max_crashes=1)
    queue.run_all()
    assert [handle.result() for handle in handles] == [2, 3, 4, 5]
    assert sorted(seen) == [(1, "add"), (3, "add")]


# --- declarations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "from 1 to 1000"),
        ({"batch": 1001}, "from 1 to 1000"),
        ({"batch": True}, "whole number"),
        ({"batch": 5, "wait": -1}, "wait"),
        ({"wait": 5}, "wait requires batch"),
        ({"batch": 5, "isolation": "process"}, "isolation"),
        ({"batch": 5, "stall": 60}, "stall"),
        ({"batch": 5, "max_crashes": 1}, "max_crashes=1"),
    ],
)
def test_options_that_do_not_fit_are_refused_when_the_executor_is_declared(manual, options, words):
    with pytest.raises(ConfigurationError, match=words):
        manual.executor("add", **options)(lambda tasks: tasks)


def test_the_function_must_take_one_list(manual):
    for function in (list, lambda a, b: [], lambda *, tasks: tasks, lambda ctx: []):
        with pytest.raises(ConfigurationError):
            manual.executor("add", batch=5)(function)
    manual.executor("add", batch=5)(lambda ctx, tasks, client=None: tasks)


def test_a_coroutine_cannot_have_a_batch(manual):
    async def work(tasks):
        return tasks

    with pytest.raises(ConfigurationError, match="with batch"):
        manual.executor("add", batch=5)(work)


def test_a_class_cannot_have_a_batch(manual):
    class Classic(TaskExecutor):
        type = "classic"

        def execute(self, ctx, task):
            return 1

    with pytest.raises(ConfigurationError, match="function that was decorated"):
        manual.register_executor(Classic(), batch=5)


def test_a_registration_can_change_batch_and_wait(manual):
    @executor("add", batch=2)
    def add(tasks):
        return [len(tasks) for _ in tasks]

    manual.register_executor(add, batch=4, wait=1)
    handles = submitted(manual, 1, 2, 3)
    manual.run_all()
    assert [handle.result() for handle in handles] == [3, 3, 3]


# --- other queues


def test_an_inline_queue_runs_a_call_for_each_submit():
    queue = InlineQueue()
    queue.executor("add", batch=5)(lambda tasks: [len(tasks) for _ in tasks])
    assert submitted(queue, 1)[0].result() == 1
    handles = queue.submit_many([Task(type="add", params={"n": n}) for n in range(3)])
    assert [handle.result() for handle in handles] == [3, 3, 3]


def test_the_caller_runs_a_call_for_its_task(make_queue):
    queue = make_queue(buffer_size=1, overflow="caller_runs")
    queue.executor("add", batch=5, wait=PATIENCE)(lambda tasks: [len(tasks) for _ in tasks])
    with queue:
        _, second = submitted(queue, 1, 2)
        assert second.result(PATIENCE) == 1


def test_a_single_attempt_is_a_call_for_one_task(manual):
    @manual.executor("add", batch=5)
    def add(ctx, tasks):
        ctx.progress(30)
        return [task["n"] + 1 for task in tasks]

    outcome = run_executor(add, {"n": 1})
    assert (outcome.result, outcome.progress) == (2, [(30, "")])


# --- interrupts


def test_an_interrupt_at_any_point_loses_no_task_of_a_call():
    """What the interrupt has left, the next calls of the test run; a task runs again at most once."""
    strikes = 0
    for point in itertools.count(0, 61):
        queue, began = ManualQueue(), []
        queue.executor("start")(lambda: None)
        queue.submit("start")
        queue.run_all()

        @queue.executor("add", batch=3, max_attempts=2)  # an interrupt may look like an error
        def add(tasks, began=began):
            began.extend(task["n"] for task in tasks)
            return [task["n"] for task in tasks]

        handles = queue.submit_many([Task(type="add", params={"n": n}) for n in range(3)])
        if strike_at(point, queue.run_all) is None:
            break
        strikes += 1
        queue.advance(60)
        left = [handle.task() for handle in handles]
        assert [task.status.value for task in left] == ["completed"] * 3, (point, left)
        assert all(began.count(n) in (1, 2) for n in range(3)), (point, began)
        assert queue.stop(0.0) == []
    assert strikes > 20
