"""``stall``: an attempt that gives no sign of life for some seconds is timed out."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from helpers import PATIENCE, eventually, pool_of

from executing import silent
from taskx import ConfigurationError, TaskStatus
from taskx.attempt.alarms import Alarms, Pulse
from taskx.tasks.errors import CancelReason
from taskx.tasks.timing import DEFAULT_TIMING
from taskx.tasks.token import CancelToken
from taskx.testing import ManualQueue, run_executor

SIGNS = {
    "progress": lambda ctx, n: ctx.progress(n),
    "step": lambda ctx, n: ctx.step(f"step {n}", lambda: n),
    "cursor": lambda ctx, n: setattr(ctx, "cursor", n),
    "log": lambda ctx, n: ctx.logger.info("page %d", n),
    "log of a library": lambda ctx, n: logging.getLogger("library").warning("page %d", n),
    "alive": lambda ctx, n: ctx.alive(),
}


@pytest.fixture
def manual(clock):
    with ManualQueue(clock=clock) as queue:
        yield queue


@pytest.mark.parametrize("sign", SIGNS)
def test_each_sign_of_life_puts_the_time_out_off(manual, sign):
    @manual.executor("crawl", stall=60, capture_log=True)
    def crawl(ctx):
        for n in range(20):
            ctx.sleep(50)
            SIGNS[sign](ctx, n)
        return ctx.task.attempt

    handle = manual.submit("crawl")
    manual.run_all()
    assert handle.task().result == 1


@pytest.mark.parametrize(
    "sign",
    {
        "a log line below the level": lambda ctx: ctx.logger.debug("page"),
        "a look at the token": lambda ctx: ctx.token.cancelled,
        "the time that remains": lambda ctx: ctx.remaining(),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_other_calls_are_no_signs_of_life(manual, clock, sign):
    @manual.executor("crawl", stall=60, capture_log="INFO")
    def crawl(ctx):
        for _ in range(20):
            ctx.sleep(50)
            sign[1](ctx)

    begun = clock.monotonic()
    handle = manual.submit("crawl")
    manual.run_all()
    task = handle.task()
    assert (task.status, task.error) == (
        TaskStatus.FAILED,
        "timed out: no sign of life for 60 s",
    )
    assert task.error_type == "TimeoutError"
    assert clock.monotonic() - begun == pytest.approx(60)
    assert task.duration == pytest.approx(60)


def test_the_time_counts_from_the_last_sign(manual, clock):
    @manual.executor("crawl", stall=60)
    def crawl(ctx):
        ctx.sleep(59)
        ctx.alive()
        ctx.sleep(1000)

    begun = clock.monotonic()
    manual.submit("crawl")
    manual.run_all()
    assert clock.monotonic() - begun == pytest.approx(119)


def test_the_end_of_a_step_is_a_sign_of_life(manual):
    @manual.executor("crawl", stall=60)
    def crawl(ctx):
        ctx.sleep(40)
        ctx.step("long", lambda: ctx.sleep(50))
        ctx.sleep(50)
        return "done"

    handle = manual.submit("crawl")
    manual.run_all()
    assert handle.task().result == "done"


@pytest.mark.parametrize(("timeout", "error"), [(100, "after 100 s"), (1000, "no sign of life")])
def test_with_a_time_out_too_the_first_one_counts(manual, timeout, error):
    @manual.executor("crawl", stall=60, timeout=timeout)
    def crawl(ctx):
        for _ in range(3):
            ctx.sleep(50)
            ctx.alive()
        ctx.sleep(10_000)

    handle = manual.submit("crawl")
    manual.run_all()
    assert error in handle.task().error


def test_a_deadline_of_a_block_is_its_own(manual):
    """It is not that of the signs of life, which later ones put off."""

    @manual.executor("crawl", stall=60)
    def crawl(ctx):
        with ctx.timeout(200) as token:
            for _ in range(3):
                ctx.sleep(50)
                ctx.alive()
            return token.remaining()

    handle = manual.submit("crawl")
    manual.run_all()
    assert handle.task().result == pytest.approx(50)


def test_a_silent_attempt_is_retried_and_each_attempt_counts_anew(manual):
    @manual.executor("crawl", stall=60, max_attempts=2)
    def crawl(ctx):
        ctx.sleep(50 if ctx.task.errors else 70)
        return "done"

    handle = manual.submit("crawl")
    manual.run_all()
    assert (handle.task().result, handle.task().errors) == ("done", 1)


def test_without_the_option_nothing_happens(manual):
    @manual.executor("crawl", capture_log=True)
    def crawl(ctx):
        ctx.alive()
        ctx.sleep(100_000)

    handle = manual.submit("crawl")
    manual.run_all()
    assert handle.task().status is TaskStatus.COMPLETED


def test_a_cancel_before_is_a_cancel(manual, clock):
    @manual.executor("crawl", stall=60)
    def crawl(ctx):
        ctx.sleep(1000)

    handle = manual.submit("crawl")
    clock.call_later(30, handle.cancel)
    manual.run_all()
    assert handle.task().status is TaskStatus.CANCELLED


def test_the_kit_for_single_executors_knows_it():
    from taskx import executor

    @executor("crawl", stall=60)
    def crawl(ctx, seconds):
        for n in range(5):
            ctx.sleep(seconds)
            ctx.progress(n)

    assert run_executor(crawl, {"seconds": 50}).error is None
    assert run_executor(crawl, {"seconds": 70}).task.error == "timed out: no sign of life for 60 s"


@pytest.mark.parametrize("stall", [0, -1, "soon", float("inf"), True])
def test_wrong_values_are_refused(queue, stall):
    with pytest.raises(ConfigurationError, match="stall"):
        queue.executor("crawl", stall=stall)


# --- with threads and processes


def test_a_silent_thread_is_told(make_queue, clock):
    queue, told, begun = make_queue(clock=clock), [], threading.Event()

    @queue.executor("crawl", stall=5)
    def crawl(ctx):
        begun.set()
        ctx.token.wait(PATIENCE)
        told.append(ctx.token.reason)
        ctx.token.raise_if_cancelled()

    queue.start()
    handle = queue.submit("crawl")
    assert begun.wait(PATIENCE)
    clock.advance(5)
    assert handle.exception(PATIENCE).error == "timed out: no sign of life for 5 s"
    assert told == [CancelReason.TIMEOUT]


def test_a_silent_thread_that_goes_on_is_stuck(make_queue, clock, gate):
    queue = make_queue(clock=clock)
    queue.executor("crawl", stall=5, grace=2)(gate)
    queue.start()
    handle = queue.submit("crawl")
    gate.wait_for(1)
    clock.advance(5)
    eventually(lambda: pool_of(queue).runs[handle.id].token.reason)  # the grace period begins
    clock.advance(2)
    error = handle.exception(PATIENCE)
    assert error.error == "timed out: no sign of life for 5 s; its thread still runs"
    assert handle.task().stuck_on
    assert handle.task().duration == 7


def test_a_thread_that_gives_signs_goes_on(make_queue):
    queue, alive = make_queue(), threading.Event()

    @queue.executor("crawl", stall=3 * PATIENCE)
    def crawl(ctx):
        ctx.alive()
        alive.set()
        return "done"

    queue.start()
    assert queue.submit("crawl").result(PATIENCE) == "done"
    assert alive.is_set()


def test_a_silent_coroutine_is_cancelled(make_queue, clock):
    queue, begun = make_queue(clock=clock), threading.Event()

    @queue.executor("crawl", stall=5)
    async def crawl():
        begun.set()
        await asyncio.sleep(10 * PATIENCE)

    queue.start()
    handle = queue.submit("crawl")
    assert begun.wait(PATIENCE)
    clock.advance(5)
    assert handle.exception(PATIENCE).error == "timed out: no sign of life for 5 s"


def test_the_end_of_a_step_of_a_coroutine_is_a_sign_of_life(make_queue):
    queue = make_queue()

    @queue.executor("crawl", stall=10 * PATIENCE)
    async def crawl(ctx):
        pulse, beats = pool_of(queue).runs[ctx.task.id].pulse, []

        async def page():
            beats.append(pulse.due)

        await ctx.astep("one", page)
        return pulse.due > beats[0]

    queue.start()
    assert queue.submit("crawl").result(PATIENCE) is True


@pytest.mark.process
@pytest.mark.parametrize("sign", ["progress", "step", "log", "alive"])
def test_the_signs_of_a_child_process_come_to_its_parent(make_queue, sign, tmp_path):
    queue, end = make_queue(), tmp_path / "end"
    queue.register_executor(silent.crawl, stall=10 * PATIENCE)
    queue.start()
    handle = queue.submit("crawl", {"sign": sign, "end": str(end)})
    eventually(lambda: handle.id in pool_of(queue).runs)
    pulse = pool_of(queue).runs[handle.id].pulse
    for _ in range(3):
        due = pulse.due
        eventually(lambda due=due: pulse.due > due)
    end.touch()
    assert handle.result(PATIENCE) == "done"


@pytest.mark.process
def test_a_silent_child_process_is_told_and_killed(make_queue):
    queue = make_queue()
    queue.register_executor(silent.crawl, stall=0.1, grace=0.05)
    queue.start()
    error = queue.submit("crawl", {"sign": "none", "end": ""}).exception(PATIENCE).error
    assert error.startswith("timed out: no sign of life for 0.1 s")


# --- the alarms


def test_a_pulse_moves_its_alarm_on_without_a_call_for_each_sign(clock):
    alarms, token, pulse = Quiet(clock, DEFAULT_TIMING), CancelToken(None, clock), Pulse(60, clock)
    pulse.beat()
    alarms.add(token, None, pulse)
    for _ in range(10):
        clock.advance(50)
        pulse.beat()
        assert 0 < alarms.ring() <= 60
        assert token.reason is None
    clock.advance(60)
    alarms.ring()
    assert (token.reason, pulse.silent) == (CancelReason.TIMEOUT, True)
    assert alarms.ring() is None


def test_a_token_that_has_fired_is_no_silent_one(clock):
    alarms, token, pulse = Quiet(clock, DEFAULT_TIMING), CancelToken(None, clock), Pulse(60, clock)
    pulse.beat()
    alarms.add(token, None, pulse)
    token.fire(CancelReason.CANCEL)
    clock.advance(100)
    assert alarms.ring() is None
    assert not pulse.silent


class Quiet(Alarms):
    """Alarms without a thread."""

    def go_on(self):
        pass


def test_a_token_with_a_pulse_alone_is_known_by_its_pulse_from_the_beginning(clock):
    """The thread forgets a token for which nothing is to be done."""

    class Known(dict):
        def __setitem__(self, token, steps):
            known.append(len(steps))
            super().__setitem__(token, steps)

    known = []
    alarms = Alarms(clock, DEFAULT_TIMING)
    alarms._steps, token, pulse = Known(), CancelToken(clock=clock), Pulse(60.0, clock)
    pulse.beat()
    alarms.add(token, pulse=pulse)
    alarms.remove(token)
    assert known == [1]
