"""The test kit answers, lets days pass, and counts parks, without a sleep."""

from __future__ import annotations

from datetime import timedelta

from taskx.testing import InlineQueue, ManualQueue, run_executor


def refund(ctx, order: int):
    ctx.step("draft", str, "letter")
    if ctx.ask("approval", {"order": order}, timeout=timedelta(days=3)) != "yes":
        return "refused"
    ctx.sleep(timedelta(days=14), step="grace")
    return "paid"


def test_a_manual_queue():
    queue = ManualQueue()
    queue.executor("refund")(refund)
    handle = queue.submit("refund", {"order": 7})
    [ran] = queue.run_all()
    assert (ran.status, queue.parks[handle.id]) == ("pending", 1)
    assert queue.finish(f"{handle.id}/approval", "yes")
    assert [task.id for task in queue.advance(timedelta(days=14))] == [handle.id] * 2
    assert (handle.result(), queue.parks[handle.id]) == ("paid", 2)
    assert queue.parks["another"] == 0
    queue.assert_submitted("refund", times=1)
    assert queue.submitted("answer") == []


def test_an_inline_queue():
    queue = InlineQueue()
    queue.executor("refund")(refund)
    handle = queue.submit("refund", {"order": 7})
    assert handle.task().status == "pending"
    queue.finish(f"{handle.id}/approval", "yes")  # it runs on at once
    assert queue.parks[handle.id] == 2
    assert handle.result() == "paid"  # the clock moves to the end of its sleep


def test_an_inline_queue_waits_until_nobody_has_answered():
    queue = InlineQueue()
    queue.executor("refund")(refund)
    handle = queue.submit("refund", {"order": 7})
    assert handle.exception() is not None  # TimeoutError, three days later
    assert handle.task().error_type == "TimeoutError"


def test_a_single_attempt():
    outcome = run_executor(refund, {"order": 7})
    assert (outcome.parked, outcome.error, outcome.status) == ("approval", None, "pending")
    outcome = run_executor(refund, {"order": 7}, steps={"approval": "yes"})
    assert (outcome.parked, outcome.called) == ("grace", ["draft"])
    outcome = run_executor(refund, {"order": 7}, steps={"approval": "yes", "grace": None})
    assert (outcome.parked, outcome.result) == ("", "paid")
    assert run_executor(refund, {"order": 7}, steps={"approval": "no"}).result == "refused"
