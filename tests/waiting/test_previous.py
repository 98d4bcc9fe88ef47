"""A step of a flow gets the result of the step before it as its param ``previous``."""

from __future__ import annotations

from datetime import date

import pytest

from taskx import PayloadError, Task, answer, chain, group
from taskx.testing import ManualQueue, run_executor


@pytest.fixture
def queue():
    queue = ManualQueue()

    @queue.executor("give")
    def give(value):
        return value

    @queue.executor("double")
    def double(previous=1):
        return previous * 2

    @queue.executor("told")
    def told(ctx, n: int, previous=None):
        return [n, previous]

    queue.give = lambda value: give.task(value=value)
    queue.double, queue.told = double, told
    return queue


def result(queue, *steps):
    flow = queue.submit_flow(chain(*steps))
    queue.run_all(check=True)
    return flow.result()


def test_a_chain_passes_results(queue):
    assert result(queue, queue.give(3), queue.double, queue.double) == 12


def test_after_several_tasks_it_is_a_list(queue):
    both = group(queue.give("a"), queue.give("b"))
    assert result(queue, both, queue.told.task(n=1)) == [1, ["a", "b"]]


def test_params_win(queue):
    assert result(queue, queue.give(3), queue.told.task(n=1, previous="own")) == [1, "own"]


def test_the_first_step_has_none(queue):
    assert result(queue, queue.double, queue.double) == 4


def test_outside_of_a_flow_nothing_is_passed(queue):
    parent = queue.submit("give", {"value": 3})
    child = queue.submit("double", depends_on=[parent])
    queue.run_all()
    assert child.result() == 2
    assert run_executor(queue.double, parents=[3]).result == 2


def test_what_a_person_has_answered(queue):
    flow = queue.submit_flow(chain(answer("how many"), queue.double))
    queue.finish(flow.ids[0], 21)
    queue.run_all()
    assert flow.result() == 42


def test_it_is_decoded_by_its_annotation(queue):
    @queue.executor("year")
    def year(previous: date | None = None) -> int | None:
        return previous and previous.year

    assert result(queue, queue.give("2026-11-30"), year) == 2026


def test_middleware_may_be_around_it():
    queue = ManualQueue(middleware=[lambda ctx, task, call_next: call_next()])
    queue.executor("give")(lambda: 3)
    queue.executor("double")(lambda previous=0: previous * 2)
    flow = queue.submit_flow(chain(Task(type="give"), Task(type="double")))
    queue.run_all()
    assert flow.result() == 6


def test_without_a_default_it_is_required_as_any_param(queue):
    @queue.executor("strict")
    def strict(previous):
        return previous

    with pytest.raises(PayloadError, match="requires previous"):
        queue.submit_flow(chain(queue.give(1), strict))
