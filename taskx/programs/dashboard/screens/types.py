"""The types of tasks: their numbers, limits and run times, and what can be set for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import attrs

from taskx.insight.nodes import NodeInfo
from taskx.insight.stats import TypeStats
from taskx.programs.dashboard.display import MOST_WAITING
from taskx.programs.dashboard.pages import Action, Done, Page, Screen
from taskx.programs.dashboard.request import Request
from taskx.tasks.errors import ConfigurationError

#: Types on a page.
ROWS = 100
# The limits that can be set, and the texts of their fields.
_LIMITS = {
    "max_concurrency": "Most at once",
    "rate": "Rate of starts",
    "burst": "Burst",
    "limit_scope": "Scope",
}


@attrs.frozen(kw_only=True)
class Row:
    """A type with its numbers.

    Attributes:
        name: the type.
        stats: its statistics.
        paused: True if none of its tasks may start.
        tuned: True if its limits are overridden.
        nodes: the live nodes that have an executor for it.
    """

    name: str
    stats: TypeStats
    paused: bool
    tuned: bool
    nodes: Sequence[NodeInfo]

    @property
    def limits(self) -> Mapping[str, Any]:
        """The limits in effect; empty if there are none. Those of the first node, if they differ."""
        return next((node.limits[self.name] for node in self.nodes if self.name in node.limits), {})

    @property
    def slots(self) -> int | None:
        """The number of its tasks that may run at once on all nodes together; None for no limit."""
        most = self.limits.get("max_concurrency")
        if most is None or self.limits.get("limit_scope") == "global":
            return most
        return int(most) * len(self.nodes)

    @property
    def rate(self) -> str:
        """Its rate of starts as text; empty for none."""
        return _rate(self.limits.get("rate"))


def _rate(given: Any) -> str:
    """Return a rate in the form in which it is entered."""
    if given is None or isinstance(given, str):
        return given or ""
    if isinstance(given, list):
        return ", ".join(map(_rate, given))
    count, seconds = given
    unit = {1: "s", 60: "m", 3600: "h", 86400: "d"}.get(seconds)
    return f"{count}/{unit}" if unit else f"{count}/{seconds:g}"


def _rows(request: Request) -> dict[str, Row]:
    """Return all types that are known, by name."""
    queue = request.queue
    stats = queue.stats(waiting_at_most=MOST_WAITING).types
    paused, plain = queue.paused, bool(queue.repository.shortcoming)
    tuned = {} if plain else queue.tuned().types
    nodes = [] if plain else [node for node in queue.nodes() if node.lives]
    of_nodes = {type for node in nodes for type in node.types}
    return {
        name: Row(
            name=name,
            stats=stats.get(name, TypeStats()),
            paused=name in paused,
            tuned=name in tuned,
            nodes=[node for node in nodes if name in node.types],
        )
        for name in sorted({*stats, *paused.types, *tuned, *of_nodes})
    }


def show(request: Request) -> Page:
    """Show all types."""
    rows = _rows(request)
    wanted, after = request.args.get("q", "").strip(), request.args.get("after", "")
    names = [name for name in rows if wanted.lower() in name.lower() and name > after]
    values = {
        "rows": [rows[name] for name in names[:ROWS]],
        "number": len(rows),
        "wanted": wanted,
        "following": names[ROWS - 1] if len(names) > ROWS else "",
        "everything": request.queue.paused.everything,
        "limits": [] if request.queue.repository.shortcoming else request.queue.limits(),
    }
    return Page("types.html", values)


def show_one(request: Request) -> Page:
    """Show one type: its run times, its limits, and its nodes."""
    name = request.args.get("type", "")
    row = _rows(request).get(name) or Row(
        name=name,
        stats=TypeStats(),
        paused=name in request.queue.paused,
        tuned=False,
        nodes=(),
    )
    history = request.queue.history(period=timedelta(days=1), intervals=48)
    plain = bool(request.queue.repository.shortcoming)
    tuned = None if plain else request.queue.tuned().types.get(name)
    values = {
        "row": row,
        "history": history.of(name),
        "charts": request.charts,
        "tuned": {} if tuned is None else _shown(tuned.limits),
        "own": {} if tuned is None or tuned.own is None else _shown(tuned.own),
        "limits": _shown(row.limits),
        "labels": _LIMITS,
        "everything": request.queue.paused.everything,
    }
    return Page("type.html", values)


def _shown(limits: Mapping[str, Any]) -> dict[str, str]:
    """Return limits as the texts of form fields."""
    texts = {name: _rate(value) if name == "rate" else value for name, value in limits.items()}
    return {name: "" if value is None else str(value) for name, value in texts.items()}


# --- changes


def _type(request: Request) -> str | None:
    """Return the type that a form names; None for all types."""
    return request.form.get("type") or None


def pause(request: Request) -> Done:
    """Let no task of a type start, or none at all."""
    type = _type(request)
    request.queue.pause(type)
    request.note("pause", type or "all types")
    if type is None:
        return Done(request.say("All types are paused."))
    return Done(request.say("Type {type} is paused.", type=type))


def resume(request: Request) -> Done:
    """Let the tasks of a type start again."""
    type = _type(request)
    request.queue.resume(type)
    request.note("resume", type or "all types")
    if type is None:
        return Done(request.say("Types that are not paused by name run again."))
    return Done(request.say("Type {type} runs again.", type=type))


def release(request: Request) -> Done:
    """End the hold of a limit."""
    name = request.form.get("limit", "")
    if not request.queue.release(name):
        return Done(request.say("Limit {limit} was not held.", limit=name))
    request.note("release", name)
    return Done(request.say("Limit {limit} is released: its tasks start at its rate.", limit=name))


def tune(request: Request) -> Done:
    """Override the limits of a type; an empty field leaves the executor's own limit."""
    type = request.form.get("type", "")
    given: dict[str, Any] = {
        name: text for name in _LIMITS if (text := request.form.get(name, "").strip())
    }
    for name in ("max_concurrency", "burst"):
        if name in given:
            given[name] = _number(given[name], name)
    if not given:
        raise ConfigurationError(
            "no limit was entered: fill in at least one field, or remove the override"
        )
    request.queue.tune(type, **given)
    if unset := [name for name in _LIMITS if name not in given]:
        request.queue.untune(type, only=unset)
    request.note("tune", type, ", ".join(f"{name}={value}" for name, value in given.items()))
    return Done(request.say("Type {type} has new limits.", type=type))


def untune(request: Request) -> Done:
    """Remove the overrides of a type."""
    type = request.form.get("type", "")
    request.queue.untune(type)
    request.note("untune", type)
    return Done(request.say("Type {type} has its own limits again.", type=type))


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{name} must be a whole number, not {text!r:.100}") from None


SCREEN = Screen(
    name="types",
    label="Types",
    letter="y",
    show=show,
    parts={"one": show_one},
    actions={
        "pause": Action("pause", pause),
        "resume": Action("pause", resume),
        "release": Action("tune", release),
        "tune": Action("tune", tune),
        "untune": Action("tune", untune),
    },
)
