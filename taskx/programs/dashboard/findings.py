"""What is wrong, in sentences of one form: what, what waits for it, what to do; a link and a button."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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


#: What is said of each kind of problem. Some kinds have several forms.
TEXTS: Mapping[str, str] = {
    "repository": "The repository cannot be used: {error}. Look at its disk or its server.",
    "disk": "The disk is nearly full: soon no task can be stored. Free some space.",
    "nodes": (
        "No worker runs: {count} task waits. Start one: taskx worker module:queue.|"
        "No worker runs: {count} tasks wait. Start one: taskx worker module:queue."
    ),
    "nodes few": "Only {nodes} of {least} workers run. Start another one.",
    "nodes type": (
        "No node runs {type}: {count} task waits. Start a worker that has it, or cancel it.|"
        "No node runs {type}: {count} tasks wait. Start a worker that has it, or cancel them."
    ),
    "nodes type few": "Only {nodes} of {least} workers run {type}. Start another one.",
    "hold": (
        "Limit {limit} is held for another {time}, until {until} UTC: nothing starts under it. "
        "Release it when it may go on."
    ),
    "limit": (
        "Programs declare limit {limit} with different values: that of the last one holds. Deploy "
        "one value."
    ),
    "limit type": (
        "{type} names the limit {limit}, which no program declares: nothing limits it. Declare it "
        "with queue.limit()."
    ),
    "stuck": (
        "{count} thread on {name} runs on after its time-out. Look at it, then restart the node.|"
        "{count} threads on {name} run on after their time-out. Look at them, then restart the node."
    ),
    "stuck_type type": (
        "{type} stands still: {count} task waits for stuck threads on {nodes}. Restart the node.|"
        "{type} stands still: {count} tasks wait for stuck threads on {nodes}. Restart the node."
    ),
    "blocked_loop": (
        "A coroutine on {name} has blocked the event loop for {time}: no other one goes on. "
        "See what it does."
    ),
    "silent_node": (
        "{count} node may be dead: its last heartbeat is {time} old. If it lives, set its clock.|"
        "{count} nodes may be dead: the last heartbeat of one is {time} old. If they live, set their "
        "clocks."
    ),
    "broker": "{name} cannot use its broker: {error}. Look at the broker.",
    "snoozes type": (
        "A task of {type} has asked {snoozes} times to run later. Set max_snoozes, or cancel it."
    ),
    "oldest_due": "A task has waited for {time} since it was due. See what it waits for.",
    "failed": "{failed} tasks failed within {time}, more than {most}. Look at their errors.",
    "file_size": "The file has {size}, more than {most}. Delete old tasks.",
    "open_transaction": (
        "A transaction in the database has been open for {time}: it keeps removed rows, and tasks are "
        "found ever more slowly. End it."
    ),
    "schedule_overdue": (
        "A schedule is overdue for {time}: {names}. Start a worker, or run it now.|"
        "{count} schedules are overdue, one for {time}: {names}. Start a worker, or run them now."
    ),
    "schedule_damaged": "These schedules cannot be read: {names}. Store them again.",
}
# The pages that show more of them; of most of them the nodes.
_PAGES: Mapping[str, str] = {
    "repository": "",
    "nodes type": "tasks",
    "nodes type few": "types/one",
    "hold": "types",
    "limit": "types",
    "limit type": "types",
    "stuck_type type": "types/one",
    "snoozes type": "task",
    "oldest_due": "task",
    "failed": "failures",
    "disk": "system",
    "file_size": "system",
    "open_transaction": "system",
    "schedule_overdue": "schedules",
    "schedule_damaged": "schedules",
}
#: The text of the link to each page.
LABELS: Mapping[str, str] = {
    "failures": "Failures",
    "nodes": "Show the nodes",
    "schedules": "Show the schedules",
    "system": "System",
    "task": "Show the task",
    "tasks": "Show the tasks",
    "types": "Show the limits",
    "types/one": "Show the type",
}
# Kinds of problems with which tasks run on.
_MILD = frozenset(("limit", "snoozes", "file_size", "open_transaction"))


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
        kind, facts = problem.kind, problem.facts
        form = f"{kind} type" if facts.get("type") else kind
        if kind == "nodes" and facts["nodes"]:
            form += " few"
        page = _PAGES.get(form, "nodes")
        values: dict[str, str] = {}
        if page == "tasks":
            values["q"] = f"{term('type', facts['type'])} status:pending"
        elif page == "types/one":
            values["type"] = facts["type"]
        elif task_id := facts.get("task_id"):
            page, values["id"] = "task", task_id
        level = "warn" if kind in _MILD else "bad"
        found = self._linked(self._say(TEXTS[form], **self._shown(facts)), page, level, **values)
        return self._button(form, found, facts)

    def _shown(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return facts as a sentence names them."""
        show = self._display
        shown = {**facts, "time": show.seconds(abs(facts.get("seconds", 0)))}
        counts = (facts[name] for name in ("waiting", "threads", "number") if name in facts)
        shown["count"] = next(counts, self._waiting(facts.get("type")))
        shown["names"] = _listed(facts.get("schedules", ()))
        if isinstance(nodes := facts.get("nodes"), Mapping):
            shown["nodes"] = _listed(nodes.values())
        if "until" in facts:
            shown["until"] = show.clock(facts["until"])
        if "bytes" in facts:
            shown.update(size=show.size(facts["bytes"]), most=show.size(facts["most"]))
        return shown

    def _button(self, form: str, found: Finding, facts: Mapping[str, Any]) -> Finding:
        add = self._with_button
        if form in ("stuck", "stuck_type type", "blocked_loop"):
            node = facts.get("node") or next(iter(facts["nodes"]), "")
            return add(found, "read", "nodes/stacks", "What its threads do", id=node)
        if form == "nodes type":
            line = f"{term('type', facts['type'])} status:pending"
            return add(found, "cancel", "tasks/cancel", "Cancel them", whole="1", q=line)
        if form == "hold":
            return add(found, "tune", "types/release", "Release", limit=facts["limit"])
        if form == "schedule_overdue" and facts["number"] == 1:
            name = next(iter(facts["schedules"]))
            return add(found, "schedules", "schedules/trigger", "Run now", name=name)
        return found

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
                yield self._linked(text, "failures", period="hour")

    def pauses(self, paused: Paused) -> Iterator[Finding]:
        """Yield what is paused by hand."""
        if paused.everything:
            text = self._say(
                "Everything is paused: {count} task waits. Resume it when it may go on.|"
                "Everything is paused: {count} tasks wait. Resume it when they may go on.",
                count=self._waiting(None),
            )
            found = Finding(text=text, level="warn")
            yield self._with_button(found, "pause", "types/resume", "Resume")
        for type in sorted(paused.types):
            text = self._say(
                "{type} is paused: {count} task waits. Resume it when it may go on.|"
                "{type} is paused: {count} tasks wait. Resume it when they may go on.",
                count=self._waiting(type),
                type=type,
            )
            found = self._linked(text, "types/one", "warn", type=type)
            yield self._with_button(found, "pause", "types/resume", "Resume", type=type)

    def _linked(self, text: str, page: str, level: str = "bad", **values: str) -> Finding:
        if not page:
            return Finding(text=text, level=level)
        link, label = self._request.link(page, **values), self._say(LABELS[page])
        return Finding(text=text, level=level, link=link, label=label)

    def _with_button(
        self, found: Finding, permission: str, page: str, button: str, **fields: str
    ) -> Finding:
        if not self._request.may(permission):
            return found
        action = self._request.link(page)
        return attrs.evolve(found, action=action, button=self._say(button), fields=fields)

    def _waiting(self, type: str | None) -> int:
        """Return the number of tasks of a type that wait; of all types those that are due."""
        if type is None:
            return sum(of.waiting for of in self._stats.types.values())
        of = self._stats.types.get(type)
        return 0 if of is None else of.waiting + of.delayed + of.blocked


def _listed(names: Iterable[object]) -> str:
    some = [*names]
    more = "" if len(some) <= _LISTED else " …"
    return ", ".join(map(str, some[:_LISTED])) + more
