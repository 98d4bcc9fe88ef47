"""Executors with annotated params and results: they get and return objects, the store keeps JSON."""

from __future__ import annotations

import asyncio
import sys
import typing
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
from helpers import PATIENCE, parts_of

import taskx
from taskx import (
    Context,
    PayloadError,
    Task,
    TaskExecutor,
    TaskFailed,
    chain,
    every,
    group,
)
from taskx.tasks.values import values_of
from taskx.testing import ManualQueue, run_executor

from . import isolated

NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
STORED = {"day": "2026-03-01", "prices": {"tea": "1.50"}}


@dataclass
class Report:
    day: date
    prices: dict[str, Decimal]


REPORT = Report(date(2026, 3, 1), {"tea": Decimal("1.50")})


class Span(NamedTuple):
    start: datetime
    end: datetime


@taskx.executor("after")
def after(when: datetime, wait: timedelta = timedelta(hours=1)) -> datetime:
    assert isinstance(when, datetime)
    return when + wait


@taskx.executor("report")
def report(ctx: Context, of: Report, **paths: Path) -> Report:
    assert all(isinstance(path, Path) for path in paths.values())
    ctx.progress(50, f"{type(of).__name__} {ctx.task.params['of']['day']}")
    return of


@pytest.fixture
def ready(queue):
    queue.register_executor(after)
    queue.register_executor(report)
    queue.start()
    return queue


def test_an_executor_gets_and_returns_objects_and_the_record_keeps_json(ready):
    handle = report.submit(REPORT, out=Path("/a/b"))
    assert handle.result(PATIENCE) == REPORT
    task = handle.task()
    assert task.params == {"of": STORED, "out": "/a/b"}
    assert task.result == STORED
    assert task.message == "Report 2026-03-01"


def test_submit_by_type_takes_objects_and_their_json_form(ready):
    for given in (NOON, "2026-03-01T12:00:00+00:00", "2026-03-01T12:00:00Z"):
        handle = ready.submit("after", {"when": given, "wait": 1.5})
        assert handle.result(PATIENCE) == NOON + timedelta(seconds=1.5)
    task = ready.submit("after", {"when": NOON, "wait": timedelta(minutes=1)}).task()
    assert task.params == {"when": "2026-03-01T12:00:00+00:00", "wait": 60.0}


def test_a_task_has_json_params_at_once(ready):
    task = after.task(NOON)
    assert task.params == {"when": "2026-03-01T12:00:00+00:00"}
    assert ready.submit(task).result(PATIENCE) == NOON + timedelta(hours=1)
    assert ready.submit(after, {"when": NOON}).task().params == task.params
    by_hand = Task(type="after", params={"when": NOON})
    assert ready.submit_many([by_hand])[0].result(PATIENCE) == NOON + timedelta(hours=1)
    assert by_hand.params == {"when": NOON}


def test_the_function_can_still_be_called_with_objects():
    assert after(NOON) == NOON + timedelta(hours=1)


def test_a_value_that_does_not_fit_is_refused_at_submit(ready):
    refused = [
        (lambda: after.submit("soon"), "params.when", "must be datetime .*, not 'soon'"),
        (lambda: ready.submit("after", {"when": 5}), "params.when", "must be datetime .*, not 5"),
        (lambda: report.task({"day": "x", "prices": {}}), "params.of.day", "must be date "),
        (lambda: report.submit(REPORT, out=b"x"), "params.out", "must be Path .*, not bytes"),
    ]
    for call, path, problem in refused:
        with pytest.raises(PayloadError, match=problem) as caught:
            call()
        assert caught.value.path == path
    assert ready.list_tasks()[1] == 0


def test_a_process_without_the_executor_sees_and_submits_json(ready, make_queue):
    other = make_queue(ready.repository)
    other.declare("after", "report")
    with pytest.raises(PayloadError) as caught:
        other.submit("after", {"when": NOON})
    assert str(caught.value) == (
        "params.when: datetime is not JSON; to store one as a param or result, annotate that of the "
        "executor with datetime and register the executor with this queue"
    )
    handle = other.submit("after", {"when": "2026-03-01T12:00:00"})
    assert handle.result(PATIENCE) == "2026-03-01T13:00:00"
    assert ready.handle(handle.id).result(PATIENCE) == datetime(2026, 3, 1, 13)
    for task in (after.task(NOON), after.using(priority=1).task(NOON)):
        assert other.submit(task).result(PATIENCE) == "2026-03-01T13:00:00+00:00"
    assert other.submit(after, {"when": NOON}).result(PATIENCE) == "2026-03-01T13:00:00+00:00"
    assert list(other.map(after, [{"when": NOON}])) == ["2026-03-01T13:00:00+00:00"]


def test_all_ways_to_wait_give_the_decoded_result(ready, capsys):
    handle = after.submit(NOON)
    later = NOON + timedelta(hours=1)
    assert handle.follow(PATIENCE) == later
    assert handle.exception(PATIENCE) is None
    assert handle.result(0) is handle.result(0)

    async def wait():
        return [await after.submit(NOON), await asyncio.wrap_future(after.submit(NOON))]

    assert asyncio.run(wait()) == [later, later]
    assert handle.id in capsys.readouterr().err  # the display of follow()


def test_flows_take_objects_and_give_decoded_results(ready):
    @ready.executor("total")
    def total(ctx: Context, day: date) -> list[Decimal]:
        return [Decimal(parent.result["prices"]["tea"]) for parent in ctx.parents]

    flow = chain(group(report.task(REPORT), report.task(REPORT)), total.task(date(2026, 3, 1)))
    handle = ready.submit_flow(flow)
    assert handle.result(PATIENCE) == [Decimal("1.50"), Decimal("1.50")]
    assert [each.result(0) for each in handle.handles[:2]] == [REPORT, REPORT]


@pytest.mark.parametrize("executor", [after, "after"])
def test_a_map_takes_objects_as_items_and_gives_decoded_results(ready, executor):
    days = [NOON, NOON + timedelta(days=1), NOON]
    items = [{"when": day} for day in days]
    later = [day + timedelta(hours=1) for day in days]
    assert list(ready.map(executor, items)) == later
    as_json = [{"when": day.isoformat()} for day in days]
    assert list(ready.map(executor, as_json)) == later
    if executor is after:
        assert list(ready.map(after, days)) == later
    assert ready.list_tasks()[1] == 2  # the keys are made of the JSON form


def test_an_item_that_does_not_fit_is_refused_in_its_place(ready):
    results = ready.map("after", [{"when": NOON}, {"when": 5}], return_exceptions=True)
    first, second = results
    assert first == NOON + timedelta(hours=1)
    assert isinstance(second, PayloadError)


@pytest.mark.every_store
def test_a_schedule_stores_json_params(ready):
    schedule = ready.schedule("nightly", every(3600), "after", {"when": NOON})
    assert schedule.params == {"when": "2026-03-01T12:00:00+00:00"}
    assert schedule.trigger().result(PATIENCE) == NOON + timedelta(hours=1)
    with pytest.raises(PayloadError, match="must be datetime"):
        ready.schedule("nightly", every(3600), "after", {"when": "noon"})


def test_a_stored_value_that_does_not_fit_fails_the_attempt(ready, make_queue):
    other = make_queue(ready.repository)
    other.declare("after")
    failed = other.submit("after", {"when": "noon"}, max_attempts=2)
    with pytest.raises(TaskFailed, match=r"params\.when: must be datetime .*, not str"):
        failed.result(PATIENCE)
    task = failed.task()
    assert (task.error_type, task.errors) == ("taskx.tasks.errors.PayloadError", 2)


def test_a_result_that_does_not_fit_fails_the_attempt(ready):
    @ready.executor("wrong")
    def wrong() -> list[date]:
        return [date(2026, 1, 1), "soon"]

    with pytest.raises(TaskFailed, match=r"result\[1\]: must be date .*, not 'soon'"):
        wrong.submit().result(PATIENCE)


def test_a_result_of_an_older_executor_that_does_not_fit_raises_in_result(ready, make_queue):
    new = make_queue(ready.repository)

    @ready.executor("size")
    def size():
        return "large"

    @new.executor("size")
    def size_by_day() -> dict[str, date]:
        raise NotImplementedError

    stored = size.submit()
    assert stored.result(PATIENCE) == "large"
    handle = new.handle(stored.id)
    with pytest.raises(PayloadError, match="result: must be a dict, not str"):
        handle.result(PATIENCE)
    assert isinstance(handle.exception(), PayloadError)
    assert handle.task().result == "large"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a star in an annotation came with 3.11")
def test_a_tuple_with_a_star_is_kept_as_json(ready):
    code = "def count(of: tuple[int, *tuple[str, ...]]): return len(of)"
    exec(code, names := {})
    assert ready.executor()(names["count"]).submit((1, "a", "b")).result(PATIENCE) == 3


def test_bare_lists_and_dicts_inside_of_an_annotation_are_kept_as_json(ready):
    @ready.executor("count")
    def count(of: tuple[date, typing.List, typing.Dict]) -> int:  # noqa: UP006
        return len(of[1]) + len(of[2]) + isinstance(of[0], date)

    assert count.submit((date(2026, 1, 1), [1], {"a": 1})).result(PATIENCE) == 3


def test_tuples_come_back_as_tuples_where_they_are_annotated(ready):
    @ready.executor("halves")
    def halves(span: Span) -> tuple[Span, ...]:
        middle = span.start + (span.end - span.start) / 2
        return Span(span.start, middle), Span(middle, span.end)

    span = Span(NOON, NOON + timedelta(hours=2))
    assert halves.submit(span).result(PATIENCE) == (
        Span(NOON, NOON + timedelta(hours=1)),
        Span(NOON + timedelta(hours=1), span.end),
    )


def test_middleware_sees_the_json_that_is_stored(make_queue):
    seen = []

    def look(ctx, task, call_next):
        seen.append(task.params)
        ctx.task.params["wait"] = 0
        seen.append(call_next())
        return seen[-1]

    queue = make_queue(middleware=[look])
    queue.register_executor(after)
    queue.start()
    assert after.submit(NOON).result(PATIENCE) == NOON
    assert seen == [{"when": NOON.isoformat(), "wait": 0}, NOON.isoformat()]


def test_middleware_may_give_the_object_itself(make_queue):
    def parse(ctx, task, call_next):
        ctx.task.params.update(when=NOON, wait=timedelta(0))
        return call_next()

    queue = make_queue(middleware=[parse])
    queue.register_executor(after)
    queue.start()
    assert after.submit(datetime.now()).result(PATIENCE) == NOON


def test_a_class_may_annotate_its_result(ready):
    class Ids(TaskExecutor):
        type = "ids"

        def execute(self, ctx: Context, task: Task) -> list[UUID]:
            return [UUID(text) for text in task.params["ids"]]

    ready.register_executor(Ids())
    handle = ready.submit("ids", {"ids": [str(UUID(int=1))]})
    assert handle.result(PATIENCE) == [UUID(int=1)]
    assert handle.task().result == [str(UUID(int=1))]


@pytest.mark.parametrize("execute", [max, len])
def test_a_class_may_have_an_execute_without_annotations(queue, execute):
    class Builtin(TaskExecutor):
        type = "builtin"

    Builtin.execute = staticmethod(execute)
    Builtin.__abstractmethods__ = frozenset()
    queue.register_executor(Builtin())
    assert parts_of(queue).registry.registered["builtin"].values is None


@pytest.mark.process
def test_a_child_process_gets_and_returns_objects(ready):
    ready.register_executor(isolated.tomorrow)
    handle = isolated.tomorrow.submit(date(2026, 1, 31))
    assert handle.result(PATIENCE) == date(2026, 2, 1)
    assert handle.task().result == "2026-02-01"


@pytest.mark.process
def test_middleware_may_give_an_object_to_a_child_process(make_queue):
    def parse(ctx, task, call_next):
        task.params.update(day=date(2026, 1, 31))
        return call_next()

    queue = make_queue(middleware=[parse])
    queue.register_executor(isolated.tomorrow)
    queue.start()
    assert isolated.tomorrow.submit(date(2020, 1, 1)).result(PATIENCE) == date(2026, 2, 1)


def test_an_executor_that_is_replaced_brings_its_own_annotations(ready):
    @ready.executor("day", replace=True)
    def day(of: date) -> date:
        return of

    assert day.submit(date(2026, 1, 1)).result(PATIENCE) == date(2026, 1, 1)

    @ready.executor("day", replace=True)
    def plain_day(of: str) -> str:
        return of

    assert ready.submit("day", {"of": "today"}).result(PATIENCE) == "today"
    with pytest.raises(PayloadError, match="date is not JSON"):
        ready.submit("day", {"of": date(2026, 1, 1)})


def test_the_test_kit_runs_executors_with_objects():
    outcome = run_executor(report, {"of": REPORT})
    assert outcome.result == REPORT
    assert outcome.task.result == STORED


def test_the_test_kit_finds_tasks_by_objects_in_their_params():
    queue = ManualQueue()
    queue.register_executor(report)
    report.submit(REPORT)
    assert queue.assert_submitted("report", params={"of": REPORT}).params == {"of": STORED}
    queue.assert_submitted(params={"of": STORED})
    queue.assert_not_submitted("report", params={"of": Report(date(2026, 3, 2), {})})


def test_an_executor_without_such_annotations_costs_nothing(queue, monkeypatch):
    calls = Counter()
    monkeypatch.setattr("taskx.queue.intake.encoded", lambda *_: calls.update(["encoded"]))

    @queue.executor("plain")
    def plain(ctx: Context, text: str, many: list[int] | None = None) -> dict[str, int]:
        return {text: 1}

    assert plain._values is None
    entry = parts_of(queue).registry.registered["plain"]
    assert entry.function is plain.function
    queue.start()
    assert plain.submit("a").result(PATIENCE) == {"a": 1}
    assert not calls
    assert values_of(len) is None
