"""Executors that are coroutines run on one event loop, and keep all that other executors have."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import wait
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass

import httpx
import pytest
from helpers import PATIENCE, eventually, no_rounds, parts_of
from strikes import every_strike

from taskx import (
    CancelReason,
    ConfigurationError,
    Context,
    MemoryRepository,
    Middleware,
    Queue,
    Retry,
    SQLiteRepository,
    Task,
    TaskCancelled,
    TaskExecutor,
    TaskFailed,
    TaskStatus,
    current_context,
)
from taskx.attempt.coroutines import Waiter, _serve
from taskx.testing import InlineQueue, ManualClock, ManualQueue, inline, run_executor, survives

from . import isolated

AGES = 3600.0


class Gate:
    """An event of the loop that other threads open."""

    def __init__(self):
        self.reached, self._loop, self._event = threading.Event(), None, None

    async def wait(self):
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self.reached.set()
        await self._event.wait()

    def open(self):
        assert self.reached.wait(PATIENCE)
        self._loop.call_soon_threadsafe(self._event.set)


def test_the_result_is_what_the_coroutine_returns(queue):
    @queue.executor()
    async def add(a: int, b: int = 2) -> int:
        await asyncio.sleep(0)
        return a + b

    queue.start()
    assert add.submit(1).result(PATIENCE) == 3
    assert asyncio.run(add(1, b=5)) == 6


def test_a_class_may_have_a_coroutine_as_execute(queue):
    class Add(TaskExecutor):
        type = "add"

        async def execute(self, ctx, task):
            await asyncio.sleep(0)
            return task.params["a"] + 1

    queue.register_executor(Add())
    queue.start()
    assert queue.submit("add", {"a": 1}).result(PATIENCE) == 2


@dataclass
class Point:
    x: int


def test_params_and_results_are_made_from_json_as_annotated(queue):
    @queue.executor()
    async def mirror(point: Point) -> Point:
        return Point(-point.x)

    queue.start()
    assert mirror.submit(Point(3)).result(PATIENCE) == Point(-3)


def test_two_workers_run_two_coroutines_at_the_same_time(queue):
    gates = {"a": Gate(), "b": Gate()}

    @queue.executor()
    async def meet(name):
        await gates[name].wait()
        return name

    queue.start()
    handles = [meet.submit("a"), meet.submit("b")]
    gates["a"].open()
    gates["b"].open()
    assert [handle.result(PATIENCE) for handle in handles] == ["a", "b"]


def test_an_error_fails_the_attempt_with_the_traceback_of_the_coroutine(queue):
    @queue.executor()
    async def fail():
        await asyncio.sleep(0)
        raise TimeoutError("the body's own")

    queue.start()
    handle = fail.submit()
    with pytest.raises(TaskFailed, match="the body's own"):
        handle.result(PATIENCE)
    task = queue.get_task_status(handle.id)
    assert "timed out" not in task.error
    assert "in fail" in task.traceback


class TestAnAsynchronousGenerator:
    """What it yields is emitted; its result is None."""

    def test_emits_what_it_yields(self, queue):
        @queue.executor()
        async def count(ctx, most: int) -> AsyncIterator[int]:
            for n in range(most):
                yield n
                await asyncio.sleep(0)

        queue.start()
        handle = count.submit(3)
        assert [chunk.value for chunk in handle.stream()] == [0, 1, 2]
        assert handle.result(PATIENCE) is None

        async def called():
            return [n async for n in count(None, 2)]

        assert asyncio.run(called()) == [0, 1]

    def test_may_be_the_method_of_a_class(self, queue):
        class Two(TaskExecutor):
            type = "two"

            async def execute(self, ctx, task):
                yield task.params["a"]
                yield 2

        queue.register_executor(Two())
        queue.start()
        handle = queue.submit("two", {"a": 1})
        assert [chunk.value for chunk in handle.stream()] == [1, 2]

    def test_is_closed_when_it_is_cancelled(self, queue):
        begun, closed = threading.Event(), threading.Event()

        @queue.executor(max_attempts=1)
        async def hang():
            try:
                yield "begun"
                begun.set()
                await asyncio.sleep(AGES)
            finally:
                closed.set()

        queue.start()
        handle = hang.submit()
        assert begun.wait(PATIENCE)
        handle.cancel()
        assert wait([handle], PATIENCE).done
        assert closed.is_set()
        assert handle.task().status is TaskStatus.CANCELLED

    def test_emits_no_value_that_is_not_json(self, queue):
        @queue.executor(max_attempts=1)
        async def wrong():
            yield object()

        queue.start()
        with pytest.raises(TaskFailed, match="JSON"):
            wrong.submit().result(PATIENCE)


@pytest.mark.process
def test_asyncio_is_imported_for_the_first_coroutine_only():
    code = """if True:
        import sys, taskx
        queue = taskx.Queue(taskx.MemoryRepository())
        @queue.executor()
        def add(a): return a
        @queue.executor()
        async def later(a): return a
        with queue:
            assert add.submit(1).result(60) == 1
            assert "asyncio" not in sys.modules
            assert later.submit(2).result(60) == 2
            assert "asyncio" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


class TestCancel:
    @pytest.fixture
    def queue(self, make_queue, clock):
        """A queue whose time-outs come when the test says so."""
        return make_queue(worker_num=2, clock=clock)

    @pytest.fixture
    def waiting(self, queue):
        """An executor that waits, and notes how it was cancelled."""
        queue.started, queue.reasons = threading.Event(), []

        @queue.executor(max_attempts=1)
        async def wait(ctx):
            queue.started.set()
            try:
                await asyncio.sleep(AGES)
            except asyncio.CancelledError:
                queue.reasons.append(ctx.token.reason)
                raise

        queue.start()
        return wait

    def test_a_cancel_is_raised_at_the_await(self, queue, waiting):
        handle = waiting.submit()
        assert queue.started.wait(PATIENCE)
        handle.cancel()
        assert wait([handle], PATIENCE).done
        assert queue.get_task_status(handle.id).status is TaskStatus.CANCELLED
        assert queue.reasons == [CancelReason.CANCEL]

    def test_so_is_a_time_out(self, queue, waiting, clock):
        handle = waiting.using(timeout=5).submit()
        assert queue.started.wait(PATIENCE)  # one that has timed out before is not called
        clock.advance(5)
        with pytest.raises(TaskFailed, match=r"timed out after 5 s"):
            handle.result(PATIENCE)
        assert queue.reasons == [CancelReason.TIMEOUT]

    def test_a_stop_puts_the_task_back(self, queue, waiting):
        handle = waiting.submit()
        assert queue.started.wait(PATIENCE)
        queue.stop(cancel=True)
        assert queue.get_task_status(handle.id).status is TaskStatus.PENDING
        assert queue.reasons == [CancelReason.STOP]

    def test_a_coroutine_that_cancels_itself_has_failed(self, queue):
        @queue.executor()
        async def give_up():
            asyncio.current_task().cancel()
            await asyncio.sleep(AGES)

        queue.start()
        with pytest.raises(TaskFailed, match="CancelledError"):
            give_up.submit().result(PATIENCE)

    def test_a_coroutine_that_raises_what_ends_generators_has_failed(self, queue):
        @queue.executor()
        async def give_up():
            raise GeneratorExit

        queue.start()
        with pytest.raises(TaskFailed, match="GeneratorExit"):
            give_up.submit().result(PATIENCE)

    def test_a_request_ends_with_it_and_so_does_its_connection(self, queue):
        ended = threading.Event()

        async def answer_never(reader, writer):
            await reader.readuntil(b"\r\n\r\n")  # anyio may drop a cancel while it connects
            queue.started.set()
            await reader.read()
            writer.close()
            ended.set()

        @queue.executor()
        async def fetch():
            server = await asyncio.start_server(answer_never, "127.0.0.1")
            host, port = server.sockets[0].getsockname()
            async with server, httpx.AsyncClient(trust_env=False, timeout=None) as client:
                await client.get(f"http://{host}:{port}/")

        queue.started = threading.Event()
        queue.start()
        handle = fetch.submit()
        assert queue.started.wait(PATIENCE)
        handle.cancel()
        assert wait([handle], PATIENCE).done
        assert handle.task().status is TaskStatus.CANCELLED
        assert ended.wait(PATIENCE)

    def test_a_part_may_have_a_time_out_of_its_own(self, queue, clock):
        inside = threading.Event()

        @queue.executor()
        async def patient(ctx):
            with contextlib.suppress(TimeoutError), ctx.timeout(5):
                inside.set()
                await asyncio.sleep(AGES)
            await asyncio.sleep(0)
            return "went on"

        queue.start()
        handle = patient.submit()
        assert inside.wait(PATIENCE)
        clock.advance(5)
        assert handle.result(PATIENCE) == "went on"

    def test_strikes_one_in_parts_once_so_that_it_can_clean_up(self, queue):
        inside, cleaned = threading.Event(), threading.Event()

        @queue.executor()
        async def careful(ctx):
            with ctx.timeout(AGES), ctx.timeout(AGES):
                try:
                    inside.set()
                    await asyncio.sleep(AGES)
                finally:
                    await asyncio.sleep(0.05)  # a second strike would come meanwhile
                    cleaned.set()

        queue.start()
        handle = careful.submit()
        assert inside.wait(PATIENCE)
        handle.cancel()
        assert wait([handle], PATIENCE).done
        assert cleaned.is_set()

    def test_the_time_out_of_a_part_ends_that_part_alone(self, queue, clock):
        @queue.executor()
        async def two(ctx):
            ended = asyncio.Event()

            async def late():
                with contextlib.suppress(TimeoutError), ctx.timeout(5):
                    clock.advance(5)
                    await asyncio.sleep(AGES)
                ended.set()

            async def other():
                with ctx.timeout(50):
                    await ended.wait()
                return "in time"

            return await asyncio.gather(other(), late())

        queue.start()
        assert two.submit().result(PATIENCE) == ["in time", None]

    def test_parts_at_the_same_time_have_their_own_tokens(self, queue):
        @queue.executor()
        async def two(ctx):
            whole, begun, ended = ctx.token, asyncio.Event(), asyncio.Event()

            async def first():
                with ctx.timeout(5) as inner:
                    await begun.wait()
                    assert ctx.token is inner
                ended.set()

            async def second():
                with ctx.timeout(50) as inner:
                    begun.set()
                    await ended.wait()
                    assert ctx.token is inner

            await asyncio.gather(first(), second())
            return ctx.token is whole

        queue.start()
        assert two.submit().result(PATIENCE)

    def test_what_was_begun_in_a_part_goes_on_after_it_as_the_whole(self, queue):
        @queue.executor()
        async def begin(ctx):
            whole, ended = ctx.token, asyncio.Event()

            async def background():
                await ended.wait()
                return ctx.token is whole

            with ctx.timeout(5):
                begun = asyncio.create_task(background())
                await asyncio.sleep(0)
            ended.set()
            return await begun

        queue.start()
        assert begin.submit().result(PATIENCE)

    def test_the_time_out_of_a_function_in_a_thread_cancels_no_coroutine(self, queue, clock):
        @queue.executor()
        async def call(ctx):
            loop = asyncio.get_running_loop()

            def slow():
                with ctx.timeout(5) as inner:
                    clock.advance(5)
                    assert inner.wait(PATIENCE)
                    # a cancel of the coroutine would come meanwhile
                    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(PATIENCE)
                return "went on"

            return await asyncio.to_thread(slow)

        queue.start()
        assert call.submit().result(PATIENCE) == "went on"

    @pytest.mark.parametrize("instead", [None, ValueError])
    def test_a_part_leaves_no_cancel_however_it_ends(self, queue, clock, instead):
        @queue.executor()
        async def stubborn(ctx):
            with contextlib.suppress(TimeoutError), ctx.timeout(5):
                try:
                    clock.advance(5)
                    await asyncio.sleep(AGES)
                except asyncio.CancelledError:
                    if instead is not None:
                        raise instead from None
            cancelling = getattr(asyncio.current_task(), "cancelling", int)  # since Python 3.11
            return cancelling()

        queue.start()
        assert stubborn.submit().result(PATIENCE) == 0

    def test_all_reasons_are_right_among_a_thousand(self, make_queue):
        queue, chance = make_queue(worker_num=40, buffer_size=1000), random.Random(4)
        reasons = {}

        @queue.executor(max_attempts=1)
        async def some(ctx, seconds):
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                reasons[ctx.task.id] = ctx.token.reason
                raise
            return "done"

        queue.start()
        handles, wanted = [], {}
        for _ in range(1000):
            what = chance.choice(["done", "timeout", "cancel"])
            timeout = 0.02 if what == "timeout" else None
            seconds = 0.001 if what == "done" else AGES
            handles.append(some.using(timeout=timeout).submit(seconds))
            wanted[handles[-1].id] = what
        for handle in handles:
            if wanted[handle.id] == "cancel":
                handle.cancel()
        assert not wait(handles, PATIENCE).not_done
        statuses = {"done": "completed", "timeout": "failed", "cancel": "cancelled"}
        for handle in handles:
            what, task = wanted[handle.id], queue.get_task_status(handle.id)
            assert task.status.value == statuses[what]
            if what != "done":  # a cancelled task may not have begun
                assert reasons.get(handle.id, CancelReason(what)) is CancelReason(what)


class TestOneThatDoesNotHeedItsTimeOut:
    @pytest.fixture
    def stuck(self, make_queue, clock):
        """A queue of one worker, and a task that has taken no notice of its time-out."""
        queue, begun = make_queue(worker_num=1, clock=clock), threading.Event()
        queue.gate = Gate()

        @queue.executor(timeout=5, grace=5, max_attempts=2)
        async def deaf(ctx):
            if ctx.task.attempt == 2:
                return "second"
            begun.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(AGES)
            await queue.gate.wait()
            return "late"

        @queue.executor()
        def add(a):
            return threading.get_ident()

        queue.start()
        queue.first = queue.submit("add", {"a": 1}).result(PATIENCE)
        queue.handle = deaf.submit()
        assert begun.wait(PATIENCE)
        clock.advance(5)
        assert queue.gate.reached.wait(PATIENCE)
        clock.advance(5)
        assert eventually(lambda: queue.get_task_status(queue.handle.id).stuck_on)
        yield queue
        queue.gate.open()

    def test_is_stuck_but_its_thread_goes_on(self, stuck):
        assert stuck.submit("add", {"a": 1}).result(PATIENCE) == stuck.first

    def test_its_late_result_is_dropped_and_the_next_attempt_begins_then(self, stuck):
        stuck.gate.open()
        assert stuck.handle.result(PATIENCE) == "second"

    def test_the_record_says_where_it_is(self, stuck):
        task = stuck.get_task_status(stuck.handle.id)
        assert "its coroutine still runs" in task.error
        assert "gate.wait" in str(stuck.why(stuck.handle.id))


@pytest.mark.parametrize("where", ["middleware", "call"])
def test_a_thread_that_does_more_than_wait_is_stuck_itself(make_queue, clock, gate, where):
    """It is in middleware after the coroutine has ended, or in a call that the coroutine asked it for."""

    def hang(ctx, task, call_next):
        found = call_next()
        if task.type == "work" and where == "middleware":
            gate()
        return found

    queue = make_queue(worker_num=1, clock=clock, middleware=[hang])

    @queue.executor("work", timeout=5, grace=5, max_attempts=1)
    async def work(ctx):
        if where == "call":
            await asyncio.get_running_loop().run_in_executor(ctx._awaited.thread, gate)

    queue.executor("other")(lambda: 1)
    queue.start()
    handle = work.submit()
    gate.wait_for()
    clock.advance(10)
    assert queue.submit("other").result(PATIENCE) == 1  # another thread runs it
    assert eventually(lambda: handle.task().stuck_on)
    assert "its thread still runs" in handle.task().error
    gate.open()
    assert eventually(lambda: not handle.task().stuck_on)


def test_a_thread_that_has_left_its_coroutine_makes_no_calls_for_it():
    thread = Waiter()
    waiting = thread.submit(int)
    assert thread.let_go(early=True)
    thread.wait()
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="does not wait"):
        thread.submit(int)
    assert not thread.let_go()


class TestSteps:
    def test_a_step_of_an_earlier_attempt_is_skipped(self, queue):
        calls = []

        @queue.executor(max_attempts=2)
        async def work(ctx):
            async def load():
                calls.append("load")
                await asyncio.sleep(0)
                return 1

            def parse(text):
                calls.append("parse")
                assert threading.current_thread().name != "taskx-loop"
                return int(text)

            found = [await ctx.astep("load", load), await ctx.astep("parse", parse, "2")]
            found.append(ctx.step("plain", lambda: 3))
            if ctx.task.attempt == 1:
                raise Retry(delay=0)
            return found

        queue.start()
        assert work.submit().result(PATIENCE) == [1, 2, 3]
        assert calls == ["load", "parse"]

    def test_a_failed_step_may_be_tried_again_in_the_same_attempt(self, queue):
        @queue.executor()
        async def work(ctx):
            with pytest.raises(ValueError, match="invalid literal"):
                await ctx.astep("one", int, "x")
            return await ctx.astep("one", int, "1")

        queue.start()
        assert work.submit().result(PATIENCE) == 1

    def test_a_function_that_has_no_next_value_has_failed(self, queue):
        @queue.executor()
        async def first(ctx):
            return await ctx.astep("first", next, iter([]))

        queue.start()
        with pytest.raises(TaskFailed, match="StopIteration"):
            first.submit().result(PATIENCE)

    def test_a_name_is_used_once(self, queue):
        @queue.executor(max_attempts=1)
        async def work(ctx):
            await ctx.astep("one", int, "1")
            await ctx.astep("one", int, "1")

        queue.start()
        with pytest.raises(TaskFailed, match="already called"):
            work.submit().result(PATIENCE)


class TestWaiting:
    def test_a_coroutine_asks_and_goes_on_after_the_answer(self, queue):
        @queue.executor()
        async def ask(ctx):
            await asyncio.sleep(0)
            return ctx.ask("boss", "May I?")

        queue.start()
        handle = ask.submit()
        assert eventually(lambda: queue.repository.statuses([f"{handle.id}/boss"]))
        queue.finish(f"{handle.id}/boss", "yes")
        assert handle.result(PATIENCE) == "yes"

    def test_a_coroutine_has_children(self, queue):
        @queue.executor()
        async def leaf(n):
            return n

        @queue.executor()
        async def top(ctx):
            return ctx.run_all("leaves", [leaf.task(n) for n in range(3)])

        queue.start()
        assert top.submit().result(PATIENCE) == [0, 1, 2]

    def test_a_coroutine_sleeps_without_a_thread(self):
        queue = ManualQueue(clock=ManualClock())

        @queue.executor()
        async def nap(ctx):
            ctx.sleep(86_400, step="night")
            ctx.sleep(0.5, step="snooze")  # a thread that waits would be that of all coroutines
            return "morning"

        handle = nap.submit()
        queue.run_all()
        assert queue.get_task_status(handle.id).status is TaskStatus.PENDING
        queue.advance(86_400)
        assert queue.get_task_status(handle.id).status is TaskStatus.PENDING
        queue.advance(0.5)
        assert handle.result() == "morning"

    def test_a_coroutine_polls_without_a_thread(self):
        queue, found = ManualQueue(clock=ManualClock()), [1, None, None]

        @queue.executor()
        async def look(ctx):
            return ctx.poll("look", found.pop, every=0.1)

        handle = look.submit()
        queue.run_all()
        assert queue.get_task_status(handle.id).status is TaskStatus.PENDING
        queue.advance(0.1)
        queue.advance(0.1)
        assert handle.result() == 1

    def test_a_sleep_that_is_no_step_is_refused(self, queue):
        @queue.executor(max_attempts=1)
        async def block(ctx):
            ctx.sleep(AGES)

        queue.start()
        with pytest.raises(TaskFailed, match=r"write await asyncio.sleep"):
            block.submit().result(PATIENCE)


class TestTheLoop:
    def test_a_call_that_blocks_it_is_named(self, queue, gate, caplog):
        @queue.executor()
        async def block():
            gate()

        @queue.executor()
        def plain():
            return 1

        def problems():
            return [p for p in queue.health().problems if p.kind == "blocked_loop"]

        queue.start()
        with no_rounds(queue):  # the housekeeper looks at the loop only once the call is there
            handle = block.submit()
            gate.wait_for(1)
        assert eventually(lambda: "blocks the event loop" in caplog.text)
        assert plain.submit().result(PATIENCE) == 1  # others go on
        (problem,) = problems()
        assert problem.facts["task_id"] == handle.id
        assert "gate()" in problem.facts["stack"]
        assert "gate()" in caplog.text
        gate.open()
        handle.result(PATIENCE)
        assert eventually(lambda: not problems())

    def test_it_ends_with_the_queue_and_closes_what_was_left(self, queue):
        closed = []

        async def numbers():
            try:
                while True:
                    yield 1
            finally:
                closed.append("generator")

        async def in_background():
            try:
                await asyncio.sleep(AGES)
            except asyncio.CancelledError:
                closed.append("background")
                raise

        @queue.executor()
        async def leave(ctx):
            left.append(asyncio.create_task(in_background()))
            left.append(numbers())
            await anext(left[-1])
            await asyncio.sleep(0)

        left = []
        queue.start()
        leave.submit().result(PATIENCE)
        thread = parts_of(queue).runner.loop._thread
        queue.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert closed == ["background", "generator"]

    def test_a_coroutine_that_ends_it_fails_and_the_next_one_has_another(self, queue):
        @queue.executor()
        async def end(at_once):
            loop = asyncio.get_running_loop()
            if at_once:
                loop.call_soon(loop.stop)
                await asyncio.sleep(AGES)

        queue.start()
        with pytest.raises(TaskFailed, match="CancelledError"):
            end.submit(at_once=True).result(PATIENCE)
        assert end.submit(at_once=False).result(PATIENCE) is None
        gc.collect()  # asyncio complains of the task now, and not in another test

    def test_the_end_of_a_loop_touches_no_coroutine_of_the_next_one(self):
        class Coroutine:
            def __init__(self, loop):
                self.loop = loop

            def cancel(self):
                cancelled.append(self)

        first, second, cancelled = asyncio.new_event_loop(), asyncio.new_event_loop(), []
        running = dict.fromkeys([Coroutine(first), Coroutine(second)])
        first.call_soon(first.stop)
        with closing(second):
            serving = threading.Thread(target=_serve, args=(first, running))
            serving.start()
            serving.join(PATIENCE)
        assert [coroutine.loop for coroutine in cancelled] == [first]

    def test_an_exit_in_a_coroutine_fails_that_attempt_alone(self, queue):
        @queue.executor(max_attempts=1)
        async def leave():
            sys.exit(3)

        @queue.executor()
        async def stay():
            return 1

        queue.start()
        with pytest.raises(TaskFailed, match="SystemExit"):
            leave.submit().result(PATIENCE)
        assert stay.submit().result(PATIENCE) == 1

    def test_it_goes_on_after_an_exit_in_the_background(self, queue, caplog):
        @queue.executor()
        async def leave():
            async def in_background():
                sys.exit(3)

            background.append(asyncio.create_task(in_background()))
            await asyncio.sleep(0.01)
            return 1

        background = []
        queue.start()
        assert leave.submit().result(PATIENCE) == 1
        with pytest.raises(SystemExit):
            background[0].result()
        assert "has ended the event loop" in caplog.text

    @pytest.mark.process
    def test_a_fork_has_none_of_its_own_yet(self, queue):
        @queue.executor()
        async def add(a):
            return a + 1

        queue.start()
        assert add.submit(1).result(PATIENCE) == 2
        child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(int(PATIENCE))  # in case it does not end
            with contextlib.suppress(BaseException):
                mine = Queue(MemoryRepository())
                mine.register_executor(add)
                with mine:
                    status = 0 if mine.submit("add", {"a": 2}).result(PATIENCE) == 3 else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert add.submit(5).result(PATIENCE) == 6

    def test_a_queue_that_was_dropped_leaves_no_thread(self):
        def use():
            queue = ManualQueue()
            queue.executor("one")(one)
            queue.submit("one")
            queue.run_all()
            return parts_of(queue).runner.loop._thread

        async def one():
            return 1

        loop = use()

        def ended():
            gc.collect()  # each time: the loop may just have been busy with what it had called last
            return not loop.is_alive()

        eventually(ended)


class TestSurroundings:
    def test_each_has_the_context_variables_of_its_worker(self, make_queue):
        tenant = ContextVar("tenant", default="")

        class Tenant(Middleware):
            def __call__(self, ctx, task, call_next):
                token = tenant.set(task.params["name"])
                try:
                    return call_next()
                finally:
                    tenant.reset(token)

        queue = make_queue(worker_num=2, middleware=[Tenant()])
        gates = {"a": Gate(), "b": Gate()}

        @queue.executor()
        async def told(name):
            await gates[name].wait()
            return tenant.get()

        queue.start()
        handles = [told.submit("a"), told.submit("b")]
        gates["b"].open()
        gates["a"].open()
        assert [handle.result(PATIENCE) for handle in handles] == ["a", "b"]

    def test_the_current_context_is_that_of_the_coroutine(self, queue):
        @queue.executor()
        async def mine(ctx: Context):
            async def part():
                return current_context().task.id

            here = current_context().task.id
            threads = await asyncio.to_thread(lambda: current_context().task.id)
            return [here, *await asyncio.gather(part(), part()), threads]

        queue.start()
        handle = mine.submit()
        assert handle.result(PATIENCE) == [handle.id] * 4
        assert current_context() is None

    def test_what_it_logs_is_kept_with_its_own_task(self, make_queue):
        queue, gates = make_queue(worker_num=2), {"a": Gate(), "b": Gate()}

        @queue.executor(capture_log=True)
        async def talk(ctx, name):
            logging.getLogger("some.library").info("before %s", name)
            await gates[name].wait()
            logging.getLogger("some.library").info("after %s", name)

        logging.getLogger("some.library").setLevel(logging.INFO)
        queue.start()
        handles = {"a": talk.submit("a"), "b": talk.submit("b")}
        gates["b"].open()
        gates["a"].open()
        for name, handle in handles.items():
            handle.result(PATIENCE)
            log = queue.get_task_status(handle.id).log
            assert [line.rpartition(": ")[2] for line in log.splitlines()[1:]] == [
                f"before {name}",
                f"after {name}",
            ]


# An interrupt between two calls may leave a coroutine that nobody awaits, or a loop that nobody closes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestAnInterruptOfTheThreadThatWaits:
    @pytest.fixture(autouse=True)
    def collect_what_is_left(self):
        """Else Python warns of it during a later test."""
        yield
        gc.collect()

    def test_cancels_the_coroutine_and_waits_for_its_end(self):
        begun, ended, left = [], [], []

        def run(point):
            queue = ManualQueue()

            @queue.executor(max_attempts=1000)
            async def work():
                begun.append(point)
                try:
                    await asyncio.sleep(0.002)
                finally:
                    ended.append(point)

            queue.submit("work")
            try:
                queue.run_all()
            finally:
                assert begun == ended
                left.extend(queue.stop())

        assert len(list(every_strike(run, first=3000, step=97))) > 5
        assert left == []


@pytest.mark.process
def test_a_coroutine_runs_in_a_child_process(make_queue, database):
    with SQLiteRepository(database) as repository:
        queue = make_queue(repository, worker_num=1)
        queue.register_executor(isolated.awaiting)
        queue.start()
        assert queue.submit("awaiting", {"a": 2}).result(PATIENCE) == [3, True]
        handle = queue.submit("awaiting", {"a": -1})
        assert eventually(lambda: queue.get_task_status(handle.id).progress == 50)
        handle.cancel()
        assert wait([handle], PATIENCE).done
        assert queue.get_task_status(handle.id).status is TaskStatus.CANCELLED
        queue.stop()


class TestInTests:
    def test_one_attempt(self):
        async def work(ctx, a):
            await ctx.astep("one", int, "1")
            await asyncio.sleep(0)
            return a

        outcome = run_executor(work, {"a": 5})
        assert (outcome.result, outcome.called, outcome.steps) == (5, ["one"], {"one": 1})

    def test_a_cancel_of_one_attempt(self):
        async def work(ctx):
            await asyncio.sleep(AGES)

        outcome = run_executor(work, cancel_after=0)
        assert isinstance(outcome.error, TaskCancelled)

    def test_an_inline_queue(self, queue):
        @queue.executor()
        async def add(a):
            await asyncio.sleep(0)
            return a + 1

        with inline(queue):
            assert add.submit(1).result() == 2

    def test_each_crash_is_survived(self):
        sent = []

        async def order(ctx, customer):
            async def charge():
                sent.append(customer)
                return 1

            await ctx.astep("charge", charge)
            return ctx.step("note", lambda: 2)

        survives(order, {"customer": 7}, effects=lambda: {"sent": sent}, twice=("sent",))


def test_a_coroutine_holds_a_worker_and_a_loop_serves_many(make_queue):
    queue = make_queue(worker_num=200, buffer_size=400)
    number, waiting = 150, []

    @queue.executor()
    async def one():
        mine = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        if len(waiting) == number:
            for future in waiting:
                future.set_result(None)
        await mine
        return threading.current_thread().name

    queue.start()
    handles = queue.submit_many([one.task() for _ in range(number)])
    assert {handle.result(PATIENCE) for handle in handles} == {"taskx-loop"}


def test_a_task_of_a_coroutine_can_be_submitted_by_its_type(queue):
    @queue.executor("work")
    async def work(n: int = 1) -> int:
        return n

    queue.start()
    assert queue.submit(Task(type="work", params={"n": 3})).result(PATIENCE) == 3


class TestOneThatWaitsForAnother:
    """A thread of the loop that runs a task itself must not wait for the loop."""

    @pytest.mark.parametrize("kind", [ManualQueue, InlineQueue])
    @pytest.mark.parametrize("how", ["await", "result", "thread"])
    def test_in_a_test_queue(self, kind, how):
        queue = kind()

        @queue.executor()
        async def count(left):
            if not left:
                return 0
            handle = count.submit(left - 1)
            if how == "await":
                return 1 + await handle
            if how == "result":
                return 1 + handle.result(PATIENCE)
            return 1 + await asyncio.to_thread(handle.result, PATIENCE)

        handle = count.submit(3)
        if kind is ManualQueue:
            queue.run_all()
        assert handle.result(0) == 3

    def test_if_the_buffer_is_full_and_the_caller_runs_the_task(self, make_queue):
        queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs")

        @queue.executor()
        async def one():
            return 1

        @queue.executor()
        async def many():
            return [one.submit().id for _ in range(3)]

        queue.start()
        ids = many.submit().result(PATIENCE)
        assert [queue.handle(one_id).result(PATIENCE) for one_id in ids] == [1, 1, 1]


def test_a_stop_inside_of_one_does_not_wait_for_it(queue):
    @queue.executor()
    async def stop(ctx):
        return queue.stop(timeout=AGES) == [ctx.task.id]

    queue.start()
    assert stop.submit().result(PATIENCE)


def test_a_transaction_is_for_a_thread_and_so_refused_on_the_loop(make_queue, database):
    """Else the writes of all other coroutines would be refused, or part of it."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE books (name TEXT)")
    with SQLiteRepository(database, prefix="taskx_") as repository:
        queue = make_queue(repository)

        @queue.executor()
        async def write(ctx):
            def commit():
                with ctx.transaction() as tx:
                    tx.connection.execute("INSERT INTO books VALUES ('Emma')")
                    tx.complete("done")

            with pytest.raises(ConfigurationError, match="to_thread"):
                commit()
            await asyncio.to_thread(commit)

        queue.start()
        assert write.submit().result(PATIENCE) == "done"
        queue.stop()
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT name FROM books").fetchall() == [("Emma",)]


@pytest.mark.process
def test_an_interrupt_while_a_thread_waits_ends_the_program_and_not_the_task():
    """``Ctrl-C`` in a program that runs a task on its main thread."""
    program = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=PATIENCE
    )
    assert program.stdout.split() == ["pending", "0", "1"], program.stderr


INTERRUPTED = """
import asyncio, os, signal
from taskx.testing import ManualQueue

queue = ManualQueue()
interrupted = []

def interrupt(number, frame):
    interrupted.append(number)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)

@queue.executor()
async def work():
    while not interrupted:  # a signal that comes just before the main thread waits would not end its wait
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(1)
    await asyncio.sleep(3600)

handle = work.submit()
try:
    queue.run_all()
except KeyboardInterrupt:
    task = handle.task()
    print(task.status, task.errors, task.interruptions)
"""
