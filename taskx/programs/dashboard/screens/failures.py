"""The failed tasks in groups of the same cause, to be run again group by group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import attrs
from werkzeug.exceptions import NotFound

from taskx.insight.failures import FailureGroup, Failures
from taskx.programs.dashboard.asking import question
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request

#: The periods that can be chosen: their names in URLs, their texts, and their lengths.
PERIODS = (
    ("hour", "1 hour", timedelta(hours=1)),
    ("day", "24 hours", timedelta(days=1)),
    ("week", "7 days", timedelta(days=7)),
    ("all", "all", None),
)
#: Most failed tasks that are read.
MOST = 1_000
# The intervals of the small chart of a group.
_INTERVALS = 24


@attrs.frozen(kw_only=True)
class Row:
    """A group with its numbers.

    Attributes:
        group: the group.
        place: the place of the error in the code, as text.
        counts: the number of its tasks in the last hour, in the last day, and in the last week.
        hours: the number of its tasks in each hour of the last day, the oldest first.
    """

    group: FailureGroup
    place: str
    counts: Sequence[int]
    hours: Sequence[int]


def show(request: Request) -> Page:
    """Show the groups of a period."""
    period, found = _read(request)
    now = request.display.now
    return Page(
        "failures.html",
        {
            "periods": [(name, text) for name, text, _ in PERIODS],
            "period": period,
            "found": found,
            "rows": [_row(group, now) for group in found],
            "charts": request.charts,
        },
    )


def _read(request: Request) -> tuple[str, Failures]:
    lengths = {name: length for name, _, length in PERIODS}
    period = request.values.get("period", "")
    if period not in lengths:
        period = "week"
    length = lengths[period]
    since = None if length is None else request.display.now - length
    return period, request.queue.failures(since=since, at_most=MOST)


def _row(group: FailureGroup, now: datetime) -> Row:
    ages = [(now - time).total_seconds() / 3600 for time in group.times]
    hours = [0] * _INTERVALS
    for age in ages:
        if age < _INTERVALS:
            hours[_INTERVALS - 1 - max(0, int(age))] += 1
    return Row(
        group=group,
        place=_place(group),
        counts=[sum(age <= most for age in ages) for most in (1, 24, 7 * 24)],
        hours=hours,
    )


def _place(group: FailureGroup) -> str:
    return "" if group.place is None else str(group.place)


def _question(request: Request, group: FailureGroup, rate: str | None) -> str:
    found = request.queue.requeue_failures(group, rate=rate, dry_run=True)
    return request.say(
        "Run {count} failed task of this group again?"
        "|Run all {count} failed tasks of this group again?",
        count=found.matched,
    )


def requeue(request: Request) -> Done | Page:
    """Run all tasks of a group again, also those that failed before the chosen period."""
    _, found = _read(request)
    wanted = tuple(request.form.get(name, "") for name in ("type", "error_type", "place"))
    for group in found:
        if (group.type, group.error_type, _place(group)) == wanted:
            return _requeue(request, group)
    raise NotFound(request.say("This group has no failed tasks any more."))


def _requeue(request: Request, group: FailureGroup) -> Done | Page:
    rate = request.form.get("rate", "").strip() or None
    if asked := question(request, lambda: _question(request, group, rate)):
        return asked
    bulk = request.queue.requeue_failures(group, rate=rate)
    number = bulk.changed + bulk.more
    request.note("requeue", f"failures of {group.type}", f"{group.error_type}: {number} tasks")
    return Done(request.say("{count} task runs again.|{count} tasks run again.", count=number))


SCREEN = Screen(
    name="failures",
    label="Failures",
    letter="f",
    show=show,
    actions={"requeue": Action("requeue", requeue)},
)
