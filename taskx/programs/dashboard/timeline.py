"""The timeline of a task as a picture: its attempts, and what they did and waited for.

Attempts, answers and children have times. A step has none: it is between its neighbours that have some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

import attrs

from taskx.attempt.waiting import waits_until
from taskx.programs.dashboard.request import Request
from taskx.tasks.children import list_of, may_be_list, name_in
from taskx.tasks.clock import to_datetime
from taskx.tasks.lifecycle import ANSWER, is_parked
from taskx.tasks.model import Attempt, Task, TaskStatus

#: Answers, children and steps that have a line of their own.
MOST = 30
#: Children of one list that have a line each; more of them share one.
MOST_CHILDREN = 5
#: The width of a picture, and of the shortest part of it.
WIDTH, SHORTEST = 1000, 4


@attrs.frozen
class Part:
    """A part of a line.

    Attributes:
        style: its class: a status, with ``thin`` for what is not work, and ``open`` for what is to come.
        start, end: its times.
    """

    style: str
    start: datetime
    end: datetime


@attrs.frozen
class Lane:
    """A line of the picture.

    Attributes:
        label: what it shows, in the language of the page.
        parts: its parts.
        task: the id of the task that it leads to; empty for none.
        seconds: what it took so far; None if nobody knows.
    """

    label: str
    parts: Sequence[Part]
    task: str = ""
    seconds: float | None = None


@attrs.frozen
class Timeline:
    """The picture.

    Attributes:
        lanes: its lines.
        start, end: the times at its edges.
    """

    lanes: Sequence[Lane]
    start: datetime
    end: datetime

    def place(self, part: Part) -> tuple[float, float]:
        """Return the left edge and the width of a part."""
        whole = (self.end - self.start).total_seconds() or 1.0
        left, right = (
            min(max((at - self.start).total_seconds() / whole, 0.0), 1.0)
            for at in (part.start, part.end)
        )
        width = max((right - left) * WIDTH, SHORTEST)
        return min(left * WIDTH, WIDTH - width), width


def timeline(request: Request, task: Task, others: Sequence[Task]) -> Timeline | None:
    """Return the timeline of a task.

    Args:
        request: the request.
        task: the task.
        others: the answers that it has asked for, the lists of its children, and these.
    """
    if task.created_at is None:
        return None
    drawn = _Drawn(request, task, others)
    lanes = [*drawn.attempts(), *drawn.details()]
    ends = [part.end for lane in lanes for part in lane.parts if "open" not in part.style]
    later = [part.end for lane in lanes for part in lane.parts if "open" in part.style]
    end = max(ends, default=request.now)
    if later:  # what is to come has a third of the picture at most
        end += min(max(later) - end, max((end - task.created_at) / 2, timedelta(seconds=1)))
    return Timeline(lanes, task.created_at, end)


class _Drawn:
    """The lines of one task."""

    def __init__(self, request: Request, task: Task, others: Sequence[Task]) -> None:
        assert task.created_at is not None
        self._say, self._now = request.say, request.now
        self._task, self._created = task, task.created_at
        self._others = {one.id: one for one in others if one.created_at is not None}
        # An attempt that has waited began before the time that is stored: at the latest when it asked.
        self._first = min((_created(one) for one in self._others.values()), default=self._now)

    def attempts(self) -> Iterator[Lane]:
        """Yield a line for each attempt, and one for the time in which it waits for the next."""
        since, task = self._created, self._task
        runs = [one for one in task.attempts if one.outcome != "requeued"]
        for number, run in enumerate(runs, 1):
            start = self._start(run, since, last=number == len(runs))
            end = run.ended_at or (task.completed_at if task.status.finished else None) or self._now
            style = run.outcome or ("pending" if task.status is TaskStatus.PENDING else "running")
            parts = [Part("pending thin", since, start), Part(style, start, end)]
            label = self._say("attempt {number}", number=number)
            yield Lane(label, parts, "", (end - start).total_seconds())
            since = end
        ended = task.completed_at or self._now
        if not task.status.finished and not is_parked(task) and (not runs or runs[-1].outcome):
            yield self._waiting(since)
        elif not runs:
            parts = [Part(f"{task.status} thin", since, ended)]
            yield Lane(self._say("waiting"), parts, "", (ended - since).total_seconds())

    def _start(self, run: Attempt, since: datetime, *, last: bool) -> datetime:
        start = run.started_at or run.ended_at or since
        return max(since, min(start, self._first) if last else start)

    def _waiting(self, since: datetime) -> Lane:
        parts, due = [Part("pending", since, self._now)], self._task.run_at
        if due is not None and due > self._now:
            parts.append(Part("pending open", self._now, due))
        return Lane(self._say("waiting"), parts, "", (self._now - since).total_seconds())

    def details(self) -> Iterator[Lane]:
        """Yield a line for each step, answer and child."""
        steps: Mapping[str, object] = (self._task.checkpoints or {}).get("steps") or {}
        known = dict(self._others)
        lanes: list[Lane | str] = []
        for name, value in [*steps.items()][:MOST]:
            if asked := known.pop(f"{self._task.id}/{name}", None):
                lanes.append(self._asked(asked))
            elif (until := waits_until(value)) is not None:
                lanes.append(self._sleeping(name, to_datetime(until)))
            elif (listed := known.pop(f"{self._task.id}/{name}/all", None)) is not None:
                lanes += self._children(listed, known)
            else:
                lanes.append(name)
        for one in sorted(known.values(), key=_created):
            if one.id in known and may_be_list(one.id):
                lanes += self._children(one, known)
            elif one.id in known and not list_of(one.id):
                lanes.append(self._asked(one))
        yield from self._placed(lanes[:MOST])

    def _placed(self, lanes: Sequence[Lane | str]) -> Iterator[Lane]:
        """Yield lines; a step without times is between its neighbours that have some."""
        before = self._first if self._others else self._created
        if self._task.attempts and (at := self._task.attempts[-1].started_at):
            before = min(before, at)
        for place, lane in enumerate(lanes):
            if isinstance(lane, str):
                after = (one.parts[0].start for one in lanes[place:] if isinstance(one, Lane))
                end = max(before, next(after, self._task.completed_at or self._now))
                yield Lane(lane, [Part("completed thin", before, end)])
            else:
                before = max(before, *(p.end for p in lane.parts if "open" not in p.style))
                yield lane

    def _asked(self, one: Task) -> Lane:
        name = one.id.removeprefix(f"{self._task.id}/")
        label = self._say("asks: {name}", name=name) if one.type == ANSWER else name
        lane = self._lane(label, one)
        if not one.status.finished and one.expires_at is not None:
            lane = attrs.evolve(
                lane, parts=[*lane.parts, Part("pending open", self._now, one.expires_at)]
            )
        return lane

    def _sleeping(self, name: str, until: datetime) -> Lane:
        since = self._task.started_at or self._created
        parts = [Part("pending", since, min(until, self._now))]
        if until > self._now:
            parts.append(Part("pending open", self._now, until))
        label = self._say("sleeps: {name}", name=name)
        return Lane(label, parts, "", (min(until, self._now) - since).total_seconds())

    def _children(self, listed: Task, known: dict[str, Task]) -> Iterator[Lane]:
        """Yield the line of a list of children, and theirs if they are few."""
        known.pop(listed.id, None)
        found = [known.pop(child) for child in listed.depends_on if child in known]
        start, ends = _created(listed), [self._end(one) for one in found]
        open_ends = [one for one in found if not one.status.finished]
        end = max(ends, default=self._end(listed))
        label = self._say("children: {name}", name=name_in(listed.id))
        style = "running" if open_ends else "completed"
        yield Lane(
            label, [Part(f"{style} thin", start, end)], listed.id, (end - start).total_seconds()
        )
        if len(found) <= MOST_CHILDREN:
            for one in found:
                yield self._lane(f"– {one.type}", one)

    def _lane(self, label: str, one: Task) -> Lane:
        start, end = _created(one), self._end(one)
        parts = [Part(one.status.value, start, end)]
        if one.started_at is not None and start < one.started_at < end:
            parts = [Part("pending thin", start, one.started_at)]
            parts.append(Part(one.status.value, one.started_at, end))
        return Lane(label, parts, one.id, (end - start).total_seconds())

    def _end(self, one: Task) -> datetime:
        return one.completed_at or self._now


def _created(task: Task) -> datetime:
    assert task.created_at is not None
    return task.created_at
