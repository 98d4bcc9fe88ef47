"""A step that is never called twice without being told to."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import PATIENCE, eventually

from taskx import (
    ConfigurationError,
    InvalidTransition,
    NotDone,
    Queue,
    TaskFailed,
    TaskStatus,
    Uncertain,
)
from taskx.tasks import lifecycle
from taskx.tasks.errors import CancelReason
from taskx.testing import ManualQueue, run_executor


class Dies(BaseException):
    """Stands for the death of a process: the run stores nothing more."""


class Payments:
    """A queue for tests with a task that pays once, and may die in the middle."""

    def __init__(self, *ends: object) -> None:
        #: What each call of the function ends with, after it has paid.
        self.ends = list(ends)
        self.paid: list[int] = []
        self.queue = ManualQueue()

        @self.queue.executor("order", max_attempts=3, max_crashes=1000)
        def order(ctx, price: int):
            return ctx.once("pay", self.pay, price)

        self.handle = self.queue.submit("order", {"price": 7})
        self.answer = f"{self.handle.id}/pay"

    def pay(self, price: int):
        end = self.ends.pop(0) if self.ends else "receipt"
        if isinstance(end, ValueError):  # before it has paid
            raise end
        self.paid.append(price)
        if isinstance(end, BaseException):
            raise end
        return end

    def crash(self) -> None:
        """Run the task until its process dies in the middle of the payment."""
        run = self.queue._start_next()
        with pytest.raises(Dies):
            run.executor.function(run.context, price=7)
        now = self.queue.clock.now_ms()
        pool = self.queue._driven.pool
        pool.runs.forget(run)
        writes = lifecycle.rescue([run.task], now, stopping=False)[0]
        self.queue.repository.apply(writes)

    @property
    def asked(self) -> bool:
        return self.queue.repository.statuses([self.answer]) == {self.answer: "pending"}


def test_it_is_called_once_as_any_step():
    payments = Payments()
    payments.queue.run_all()
    assert (payments.handle.result(), payments.paid) == ("receipt", [7])
    assert not payments.asked
    assert payments.handle.task().checkpoints == {"steps": {"pay": "receipt"}}


@pytest.mark.parametrize("method", ["once", "once_or"])
def test_a_coroutine_function_is_refused_before_anything_is_stored(method):
    async def pay():
        raise AssertionError

    outcome = run_executor(lambda ctx: getattr(ctx, method)("pay", *[pay] * len(method.split("_"))))
    with pytest.raises(ConfigurationError, match="is async; it must be a plain function"):
        outcome.result  # noqa: B018
    assert outcome.steps == {}


def test_a_name_by_which_nobody_could_be_asked_is_refused_before_the_call():
    queue, paid = ManualQueue(), []
    queue.executor("order")(lambda ctx: ctx.once("pay with the card", paid.append, 7))
    handle = queue.submit("order", id="x" * 240)
    queue.run_all()
    assert "choose a shorter name" in handle.task().error
    assert paid == []


def test_after_a_crash_a_person_is_asked():
    payments = Payments(Dies())
    payments.crash()
    payments.queue.run_all()
    assert payments.asked
    assert payments.queue.get_task_status(payments.answer).params == {"once": "pay"}
    assert payments.queue.finish(payments.answer, "rc_17", by="eva")
    payments.queue.run_all()
    assert (payments.handle.result(), payments.paid) == ("rc_17", [7])


def test_a_second_crash_while_asking_changes_nothing():
    payments = Payments(Dies())
    payments.crash()
    payments.queue.run_all()
    task = payments.handle.task()
    payments.queue.repository.apply([lifecycle.wake(task, 1)])
    payments.queue.run_all()
    assert payments.asked
    assert payments.paid == [7]


@pytest.mark.parametrize("crashes", [1, 3])
def test_a_person_says_that_it_shall_be_done_again(crashes):
    payments = Payments(*[Dies()] * crashes)
    for _ in range(crashes):
        payments.crash()
        payments.queue.run_all()
        assert payments.asked  # each time anew
        payments.queue.finish(payments.answer, again=True)
    payments.queue.run_all()
    assert (payments.handle.result(), payments.paid) == ("receipt", [7] * (crashes + 1))
    assert payments.queue.repository.statuses([payments.answer]) == {}


def test_a_person_says_that_it_has_failed():
    payments = Payments(Dies())
    payments.crash()
    payments.queue.run_all()
    payments.queue.finish(payments.answer, error="refused by the bank")
    payments.queue.run_all()
    with pytest.raises(TaskFailed, match="refused by the bank"):
        payments.handle.result()
    assert payments.paid == [7]


def test_an_ordinary_exception_means_that_it_was_not_done():
    payments = Payments(ValueError("no connection"))
    payments.queue.run_all()
    assert (payments.handle.result(), payments.paid) == ("receipt", [7])
    assert payments.handle.task().errors == 1


def test_the_function_may_say_that_it_does_not_know():
    payments = Payments(Uncertain("no answer of the bank"))
    payments.queue.run_all()
    assert payments.asked
    assert payments.handle.task().errors == 0
    payments.queue.finish(payments.answer, again=True)
    payments.queue.run_all()
    assert (payments.handle.result(), payments.paid) == ("receipt", [7, 7])


@pytest.mark.parametrize("reason", [CancelReason.STOP, CancelReason.TIMEOUT])
@pytest.mark.parametrize("heeds", [True, False])
def test_an_attempt_that_is_cut_short_leaves_it_unknown(reason, heeds):
    queue, paid = ManualQueue(), []

    @queue.executor("order", max_attempts=3)
    def order(ctx):
        def pay():
            paid.append(1)
            ctx.token.fire(reason)
            if heeds:
                ctx.token.raise_if_cancelled()
            raise ConnectionError("the token has closed it")

        return ctx.once("pay", pay)

    handle = queue.submit("order")
    queue.run_all()
    assert queue.repository.statuses([f"{handle.id}/pay"]) == {f"{handle.id}/pay": "pending"}
    assert paid == [1]


class TestFind:
    def run(self, find, *ends):
        queue, paid, ends = ManualQueue(), [], [*ends]

        @queue.executor("order", max_attempts=3)
        def order(ctx, price: int):
            def pay(price):
                paid.append(price)
                if ends:
                    raise ends.pop(0)
                return "receipt"

            return ctx.once_or("pay", pay, find, price)

        handle = queue.submit("order", {"price": 7})
        queue.run_all()
        return queue, handle, paid

    def test_it_is_asked_before_a_person_is(self):
        queue, handle, paid = self.run(lambda price: f"found {price}", Uncertain())
        assert (handle.result(), paid) == ("found 7", [7])
        assert queue.list_tasks(type="answer").tasks == []

    def test_it_is_not_asked_if_all_is_well(self):
        _, handle, paid = self.run(pytest.fail)
        assert (handle.result(), paid) == ("receipt", [7])

    def test_it_says_that_it_was_not_done(self):
        def find(price):
            raise NotDone

        _, handle, paid = self.run(find, Uncertain())
        assert (handle.result(), paid) == ("receipt", [7, 7])

    def test_it_does_not_know_either(self):
        def find(price):
            raise Uncertain

        queue, handle, paid = self.run(find, Uncertain())
        assert (handle.task().status, paid) == (TaskStatus.PENDING, [7])
        queue.finish(f"{handle.id}/pay", "by eva")
        queue.run_all()
        assert handle.result() == "by eva"


def test_only_a_call_can_be_made_again(queue):
    queue.declare("remote")
    handle = queue.submit("remote")
    with pytest.raises(InvalidTransition, match="not about a call"):
        queue.finish(f"{handle.id}/one", again=True)
    with pytest.raises(ConfigurationError, match="only one of them"):
        queue.finish(f"{handle.id}/one", 1, again=True)


def test_a_requeue_from_the_step_calls_it_again():
    payments = Payments(Dies())
    payments.crash()
    payments.queue.run_all()
    payments.queue.cancel_task(payments.handle.id)
    payments.queue.run_all()
    payments.queue.requeue(payments.handle.id)
    payments.queue.run_all()
    assert payments.asked  # it is still unknown
    payments.queue.cancel_task(payments.handle.id)
    payments.queue.run_all()
    payments.queue.requeue(payments.handle.id, from_step="pay")
    payments.queue.run_all()
    assert payments.paid == [7, 7]


def test_the_key_is_the_same_in_each_attempt():
    def order(ctx):
        return ctx.key("pay"), ctx.task.id

    first = run_executor(order).result
    assert first[0] == f"{first[1]}/pay"


DIES = """
import os, signal
from pathlib import Path

effects = Path(path + ".effects")

@queue.executor("order", max_crashes=1000)
def order(ctx, where):
    def die(here):
        if here == where and ctx.task.crashes == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def pay():
        die("before")
        with effects.open("a") as file:
            file.write("paid\\n")
        die("after")
        return "receipt"

    die("begin")
    receipt = ctx.once("pay", pay)
    die("end")
    return receipt
"""


@pytest.mark.process
@pytest.mark.parametrize("where", ["begin", "before", "after", "end"])
def test_a_process_is_killed(spawn, tmp_path, where):
    from workers import on_sqlite

    with on_sqlite(spawn, tmp_path) as workers:
        queue = Queue(workers.repository)
        queue.declare("order")
        handle = queue.submit("order", {"where": where})
        dead = workers.spawn(DIES)
        dead.process.wait(PATIENCE)
        workers.start(DIES)
        effects = Path(workers.repository.path + ".effects")
        unknown = where in ("before", "after")
        if unknown:
            eventually(lambda: queue.list_tasks(type="answer", status="pending").tasks)
            assert (effects.exists() and effects.read_text().count("paid")) == (where == "after")
            if where == "after":
                queue.finish(f"{handle.id}/pay", "receipt")
            else:
                queue.finish(f"{handle.id}/pay", again=True)
        assert handle.result(PATIENCE) == "receipt"
        assert effects.read_text() == "paid\n"
