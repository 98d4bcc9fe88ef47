"""What is wrong, in sentences of one form: what, what waits for it, what to do; a link and a button."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import attrs

from taskx.insight.health import Health
from taskx.insight.stats import Stats
from taskx.programs.dashboard.request import Request
from taskx.programs.dashboard.terms import term
from taskx.stores.controls import Paused
from taskx.tasks.findings import Problem

#: A type fails too often if so many of its tasks have failed in an hour, and such a share of them.
MANY_FAILURES, LARGE_SHARE = 10, 0.05
# A sentence, and those that follow it.
_FIRST = re.compile(r"(.+?(?:\. |。))(.+)", re.DOTALL)
# The names that a sentence lists.
_LISTED = 3


@attrs.frozen(kw_only=True)
class Finding:
    """Something that is wrong.

    Attributes:
        text: the sentence.
        level: ``bad`` if tasks do not run, ``warn`` otherwise: the class of its line.
        link: the URL of a page that shows more; empty for none.
        label: the text of the link.
        action: the URL of the button's form; empty for none.
        button: the text of the button.
        fields: the fields of its form.
    """

    text: str
    level: str = "bad"
    link: str = ""
    label: str = ""
    action: str = ""
    button: str = ""
    fields: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def parts(self) -> tuple[str, str]:
        """What is wrong, and what to do about it."""
        if found := _FIRST.match(self.text):
            return found[1], found[2]
        return self.text, ""


def findings(request: Request, health: Health, stats: Stats, paused: Paused) -> Iterator[Finding]:
    """Yield everything that is wrong, the most serious first."""
    about = _About(request, stats)
    for problem in health.problems:
        yield about.problem(problem)
    yield from about.failures()
    yield from about.pauses(paused)


class _About:
    """Says what is wrong in the language of one page."""

    def __init__(self, request: Request, stats: Stats) -> None:
        self._request, self._stats = request, stats
        self._say, self._display = request.say, request.display

    def problem(self, problem: Problem) -> Finding:
        say: Callable[[Mapping[str, Any]], Finding] | None
        say = getattr(self, f"_{problem.kind}", None)
        return Finding(text=problem.sentence) if say is None else say(problem.facts)

    def failures(self) -> Iterator[Finding]:
        """Yield the types of which many tasks have failed in the last hour."""
        for type, of in self._stats.types.items():
            if of.failed >= MANY_FAILURES and (of.error_share or 0) >= LARGE_SHARE:
                text = self._say(
                    "{type} fails: {failed} of {number} tasks of the last hour. Look at their errors.",
                    type=type,
                    failed=of.failed,
                    number=of.failed + of.completed,
                )
                yield self._linked(text, "failures", "Failures", period="hour")

    def pauses(self, paused: Paused) -> Iterator[Finding]:
        """Yield what is paused by hand."""
        if paused.everything:
            text = self._count(
                "Everything is paused: {count} task waits. Resume it when it may go on.|"
                "Everything is paused: {count} tasks wait. Resume it when they may go on.",
                sum(of.waiting for of in self._stats.types.values()),
            )
            yield self._with_button(
                Finding(text=text, level="warn"), "pause", "types/resume", "Resume"
            )
        for type in sorted(paused.types):
            text = self._count(
                "{type} is paused: {count} task waits. Resume it when it may go on.|"
                "{type} is paused: {count} tasks wait. Resume it when they may go on.",
                self._waiting(type),
                type=type,
            )
            found = self._of_type(text, type, "warn")
            yield self._with_button(found, "pause", "types/resume", "Resume", type=type)

    # --- one for each kind of problem

    def _repository(self, facts: Mapping[str, Any]) -> Finding:
        return Finding(
            text=self._say(
                "The repository cannot be used: {error}. Look at its disk or its server.",
                error=facts["error"],
            )
        )

    def _nodes(self, facts: Mapping[str, Any]) -> Finding:
        type, live, least = facts["type"], facts["nodes"], facts["least"]
        if type is None:
            text = self._count(
                "No worker runs: {count} task waits. Start one: taskx worker module:queue.|"
                "No worker runs: {count} tasks wait. Start one: taskx worker module:queue.",
                sum(of.waiting for of in self._stats.types.values()),
            )
            if live:
                values = {"nodes": live, "least": least}
                text = self._say(
                    "Only {nodes} of {least} workers run. Start another one.", **values
                )
            return self._linked(text, "nodes", "Show the nodes")
        if live:
            text = self._say(
                "Only {nodes} of {least} workers run {type}. Start another one.",
                nodes=live,
                least=least,
                type=type,
            )
            return self._of_type(text, type)
        text = self._count(
            "No node runs {type}: {count} task waits. Start a worker that has it, or cancel it.|"
            "No node runs {type}: {count} tasks wait. Start a worker that has it, or cancel them.",
            self._waiting(type),
            type=type,
        )
        line = f"{term('type', type)} status:pending"
        found = self._linked(text, "tasks", "Show the tasks", q=line)
        return self._with_button(found, "cancel", "tasks/cancel", "Cancel them", whole="1", q=line)

    def _hold(self, facts: Mapping[str, Any]) -> Finding:
        name, left = facts["limit"], self._display.seconds(facts["seconds"])
        text = self._say(
            "Limit {limit} is held for another {time}, until {until} UTC: nothing starts under it. "
            "Release it when it may go on.",
            limit=name,
            time=left,
            until=self._clock(facts["until"]),
        )
        found = self._linked(text, "types", "Show the limits")
        return self._with_button(found, "tune", "types/release", "Release", limit=name)

    def _limit(self, facts: Mapping[str, Any]) -> Finding:
        if "type" in facts:
            text = self._say(
                "{type} names the limit {limit}, which no program declares: nothing limits it. Declare it "
                "with queue.limit().",
                **facts,
            )
        else:
            text = self._say(
                "Programs declare limit {limit} with different values: that of the last one holds. Deploy "
                "one value.",
                limit=facts["limit"],
            )
        return self._linked(text, "types", "Show the limits", level="warn")

    def _stuck(self, facts: Mapping[str, Any]) -> Finding:
        text = self._count(
            "{count} thread on {name} runs on after its time-out. Look at it, then restart the node.|"
            "{count} threads on {name} run on after their time-out. Look at them, then restart the node.",
            facts["threads"],
            name=facts["name"],
        )
        return self._stacks(self._linked(text, "nodes", "Show the nodes"), facts["node"])

    def _stuck_type(self, facts: Mapping[str, Any]) -> Finding:
        text = self._count(
            "{type} stands still: {count} task waits for stuck threads on {nodes}. Restart the node.|"
            "{type} stands still: {count} tasks wait for stuck threads on {nodes}. Restart the node.",
            facts["waiting"],
            type=facts["type"],
            nodes=self._listed(facts["nodes"].values()),
        )
        found = self._of_type(text, facts["type"])
        return self._stacks(found, next(iter(facts["nodes"]), ""))

    def _blocked_loop(self, facts: Mapping[str, Any]) -> Finding:
        text = self._say(
            "A coroutine on {name} has blocked the event loop for {time}: no other one goes on. "
            "See what it does.",
            name=facts["name"],
            time=self._display.seconds(facts["seconds"]),
        )
        found = self._linked(text, "nodes", "Show the nodes")
        if facts.get("task_id"):
            found = self._linked(text, "task", "Show the task", id=facts["task_id"])
        return self._stacks(found, facts["node"])

    def _silent_node(self, facts: Mapping[str, Any]) -> Finding:
        text = self._count(
            "{count} node may be dead: its last heartbeat is {time} old. If it lives, set its clock.|"
            "{count} nodes may be dead: the last heartbeat of one is {time} old. If they live, set their "
            "clocks.",
            facts["number"],
            time=self._display.seconds(abs(facts["seconds"])),
        )
        return self._linked(text, "nodes", "Show the nodes")

    def _broker(self, facts: Mapping[str, Any]) -> Finding:
        values = {"name": facts["name"], "error": facts["error"]}
        text = self._say("{name} cannot use its broker: {error}. Look at the broker.", **values)
        return self._linked(text, "nodes", "Show the nodes")

    def _snoozes(self, facts: Mapping[str, Any]) -> Finding:
        text = self._say(
            "A task of {type} has asked {snoozes} times to run later. Set max_snoozes, or cancel it.",
            type=facts["type"],
            snoozes=facts["snoozes"],
        )
        return self._one_task(text, facts["task_id"], "warn")

    def _oldest_due(self, facts: Mapping[str, Any]) -> Finding:
        text = self._say(
            "A task has waited for {time} since it was due. See what it waits for.",
            time=self._display.seconds(facts["seconds"]),
        )
        return self._one_task(text, facts["task_id"])

    def _failed(self, facts: Mapping[str, Any]) -> Finding:
        text = self._say(
            "{failed} tasks failed within {time}, more than {most}. Look at their errors.",
            failed=facts["failed"],
            time=self._display.seconds(facts["seconds"]),
            most=facts["most"],
        )
        return self._linked(text, "failures", "Failures")

    def _file_size(self, facts: Mapping[str, Any]) -> Finding:
        text = self._say(
            "The file has {size}, more than {most}. Delete old tasks.",
            size=self._display.size(facts["bytes"]),
            most=self._display.size(facts["most"]),
        )
        return self._linked(text, "system", "System", level="warn")

    def _schedule_overdue(self, facts: Mapping[str, Any]) -> Finding:
        text = self._count(
            "A schedule is overdue for {time}: {names}. Start a worker, or run it now.|"
            "{count} schedules are overdue, one for {time}: {names}. Start a worker, or run them now.",
            facts["number"],
            time=self._display.seconds(facts["seconds"]),
            names=self._listed(facts["schedules"]),
        )
        found = self._linked(text, "schedules", "Show the schedules")
        if facts["number"] > 1:
            return found
        name = next(iter(facts["schedules"]))
        return self._with_button(found, "schedules", "schedules/trigger", "Run now", name=name)

    def _schedule_damaged(self, facts: Mapping[str, Any]) -> Finding:
        names = self._listed(facts["schedules"])
        text = self._say("These schedules cannot be read: {names}. Store them again.", names=names)
        return self._linked(text, "schedules", "Show the schedules")

    # --- parts of findings

    def _linked(
        self, text: str, page: str, label: str, *, level: str = "bad", **values: Any
    ) -> Finding:
        link = self._request.link(page, **values)
        return Finding(text=text, level=level, link=link, label=self._say(label))

    def _of_type(self, text: str, type: str, level: str = "bad") -> Finding:
        return self._linked(text, "types/one", "Show the type", level=level, type=type)

    def _one_task(self, text: str, task_id: str, level: str = "bad") -> Finding:
        return self._linked(text, "task", "Show the task", level=level, id=task_id)

    def _with_button(
        self, found: Finding, permission: str, page: str, button: str, **fields: str
    ) -> Finding:
        if not self._request.may(permission):
            return found
        action = self._request.link(page)
        return attrs.evolve(found, action=action, button=self._say(button), fields=fields)

    def _stacks(self, found: Finding, node: str) -> Finding:
        return self._with_button(found, "read", "nodes/stacks", "What its threads do", id=node)

    def _waiting(self, type: str) -> int:
        of = self._stats.types.get(type)
        return 0 if of is None else of.waiting + of.delayed + of.blocked

    def _count(self, text: str, count: int, **values: Any) -> str:
        return self._say(text, count=count, **values)

    def _listed(self, names: Any) -> str:
        some = [*names]
        more = "" if len(some) <= _LISTED else " …"
        return ", ".join(map(str, some[:_LISTED])) + more

    def _clock(self, at: datetime) -> str:
        return self._display.clock(at)
