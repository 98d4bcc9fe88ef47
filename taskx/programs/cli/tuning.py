"""The commands about limits: limits, and tune, which changes limits and workers live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from taskx.insight.limits import LimitInfo
from taskx.programs.cli.completion import complete_nodes, complete_types, types_of
from taskx.programs.cli.errors import Usage
from taskx.programs.cli.nodes import node_id
from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import Column, Row, clean
from taskx.programs.cli.values import Duration, Rate
from taskx.queue.tuning import Tuned, TunedType
from taskx.tasks.findings import moment, suggestion
from taskx.tasks.options import NamedOptions

# The word that removes a limit.
_NONE = "none"


def _limit(name: str, text: str | None, number: bool) -> dict[str, Any]:
    """Return the value of an option as an argument of ``Queue.tune``; nothing if it was not given."""
    if text is None:
        return {}
    if text == _NONE:
        return {name: None}
    if not number:
        return {name: text}
    if not text.isdecimal():
        raise Usage(f"--{name.replace('_', '-')} must be a whole number or `none`, not {text!r}")
    return {name: int(text)}


def _some(name: str, texts: Sequence[str], number: bool) -> dict[str, Any]:
    """Return the values of an option that may be given several times."""
    values = [_limit(name, text, number)[name] for text in texts]
    return {} if not values else {name: values[0] if len(values) == 1 else values}


@command(
    "tune",
    """Show what was changed live, or change the limits of a type, a named limit or the number of workers.

A change is stored: all nodes follow within a second, and it lasts until --reset, even after restarts.
`none` as a value means no limit. Without options, prints the changes that are in effect.""",
    """
taskx tune
taskx tune email --max-concurrency 4 --rate 100/m
taskx tune --limit openai --concurrency 10 --rate 500/m --rate "90000 tokens/m"
taskx tune --workers 8
taskx tune email --reset
""",
    click.argument("type_", metavar="[TYPE]", required=False, shell_complete=complete_types),
    click.option("--max-concurrency", metavar="N", help="Most tasks of the type that run at once."),
    click.option(
        "--rate",
        "rates",
        metavar="RATE",
        type=Rate(_NONE),
        multiple=True,
        help="Most tasks that start in a period, such as 100/m. May be given several times.",
    ),
    click.option(
        "--burst",
        "bursts",
        metavar="N",
        multiple=True,
        help="Most tasks that start at once after a quiet period; one for each rate.",
    ),
    click.option("--limit", metavar="NAME", help="The named limit to change."),
    click.option(
        "--concurrency", metavar="N", help="Most tasks of the named limit that run at once."
    ),
    click.option(
        "--share",
        metavar="N",
        help="The weight with which keys of the named limit share the workers.",
    ),
    click.option(
        "--scope",
        "limit_scope",
        type=click.Choice(["node", "global"]),
        help="Who shares the limits.",
    ),
    click.option("--workers", type=click.IntRange(1), help="Workers of each node, or of --node."),
    click.option(
        "--node", help="Only this node, by its id or its name.", shell_complete=complete_nodes
    ),
    click.option(
        "--reset", is_flag=True, help="Take the changes back: of the type, or of the workers."
    ),
)
def tune(
    session: Session,
    type_: str | None,
    max_concurrency: str | None,
    rates: Sequence[str],
    bursts: Sequence[str],
    limit: str | None,
    concurrency: str | None,
    share: str | None,
    limit_scope: str | None,
    workers: int | None,
    node: str | None,
    reset: bool,
) -> None:
    """Change limits and workers."""
    node = None if node is None else node_id(session, node)
    limits: dict[str, Any] = {
        **_limit("max_concurrency", max_concurrency, True),
        **_limit("concurrency", concurrency, True),
        **_limit("share", share, True),
        **_some("rate", rates, False),
        **_some("burst", bursts, True),
        **_limit("limit_scope", limit_scope, False),
    }
    of_others = (type_, max_concurrency, limit_scope, node, workers)
    if limit is not None and any(given is not None for given in of_others):
        raise Usage("--limit goes with --concurrency, --rate, --burst, --share and --reset only")
    if limit is None and (concurrency is not None or share is not None):
        raise Usage("--concurrency and --share are those of a named limit: give --limit NAME, too")
    if reset:
        if limits or workers is not None:
            raise Usage("--reset takes changes back: leave out the values")
        before = _rows(session.queue.tuned(), type_, limit)
        _reset(session, type_, limit, node)
        left = {row[:2] for row in _rows(session.queue.tuned(), type_, limit)}
        if taken := [" ".join(row[:3]) for row in before if row[:2] not in left]:
            session.out.say(f"taken back: {clean(', '.join(taken))}")
            if not (left or session.json):
                return
    elif limit is not None and limits:
        session.queue.tune(limit=limit, **limits)
        session.note("tune", f"limit {limit}", limits)
    elif limits:
        _tune_type(session, type_, limits, workers)
    elif workers is not None:
        if type_ is not None:
            raise Usage("--workers are those of nodes, not of a type: leave out the type")
        session.queue.tune(workers=workers, node=node)
        session.note("tune", node or "workers", {"workers": workers})
    elif node is not None:
        raise Usage("--node needs --workers or --reset")
    _show(session, type_, limit)


def _tune_type(
    session: Session, type: str | None, limits: dict[str, Any], workers: int | None
) -> None:
    if type is None:
        raise Usage("the limits are those of a type: taskx tune TYPE --rate 100/m")
    if workers is not None:
        raise Usage("--workers are those of nodes: change them in a call of their own")
    known = types_of(session.queue)
    if type not in known:
        session.out.say(f"no node and no task has type {type!r}{suggestion(type, known)}")
    session.queue.declare(type)  # else the log would warn, too
    session.queue.tune(type, **limits)
    session.note("tune", type, limits)


def _reset(session: Session, type: str | None, limit: str | None, node: str | None) -> None:
    if limit is not None:
        session.queue.untune(limit=limit)
        session.note("untune", f"limit {limit}")
    elif type is not None:
        if node is not None:
            raise Usage("--node has workers, not a type: leave out one of them")
        session.queue.untune(type)
        session.note("untune", type)
    else:
        session.queue.untune(workers=True, node=node)
        session.note("untune", node or "workers")


TUNE_COLUMNS = (
    Column("WHAT", cut=True),
    Column("OPTION"),
    Column("NOW"),
    Column("OWN"),
)


def _types(tuned: Tuned, type: str | None, limit: str | None) -> dict[str, TunedType]:
    return {
        name: each for name, each in tuned.types.items() if limit is None and type in (None, name)
    }


def _named(tuned: Tuned, type: str | None, limit: str | None) -> dict[str, NamedOptions]:
    return {
        name: each for name, each in tuned.limits.items() if type is None and limit in (None, name)
    }


def _rows(tuned: Tuned, type: str | None, limit: str | None) -> list[tuple[str, str, str, str]]:
    """Return the cells of the changes for :data:`TUNE_COLUMNS`."""
    rows: list[tuple[str, str, str, str]] = []
    for name, each in _types(tuned, type, limit).items():
        own: Mapping[str, Any] = each.own or {}
        for option, value in each.limits.items():
            rows.append((name, option, _value(value), _value(own.get(option))))
    for name, options in _named(tuned, type, limit).items():
        rows += [(f"limit {name}", option, _value(value), "") for option, value in options.items()]
    if type is None and limit is None:
        if tuned.workers is not None:
            rows.append(("all nodes", "workers", str(tuned.workers), ""))
        rows += [
            (f"node {node}", "workers", str(number), "") for node, number in tuned.nodes.items()
        ]
    return rows


def _show(session: Session, type: str | None, limit: str | None) -> None:
    tuned = session.queue.tuned()
    if session.json:
        record = tuned.to_dict()
        record["types"] = {name: record["types"][name] for name in _types(tuned, type, limit)}
        session.out.json({**record, "limits": _named(tuned, type, limit)})
    elif rows := _rows(tuned, type, limit):
        session.out.table(TUNE_COLUMNS, rows)
    else:
        of = type or limit
        session.out.say(f"nothing was changed live{'' if of is None else ' for ' + clean(of)}")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return _NONE if value is None else str(value)


LIMIT_COLUMNS = (
    Column("LIMIT", cut=True),
    Column("RUNNING", right=True),
    Column("RATE"),
    Column("FREE"),
    Column("SHARE", right=True),
    Column("TYPES", cut=True),
    Column("CHANGED"),
    Column("HELD", cut=True),
)


def limit_row(limit: LimitInfo) -> Row:
    """Return the cells of a limit for :data:`LIMIT_COLUMNS`."""
    most = "" if limit.concurrency is None else f"{limit.concurrency} each"
    if most and limit.taken is not None:
        most = f"{limit.taken} of {limit.concurrency}"
    rates, free = ", ".join(limit.rates), ", ".join(map(str, limit.free))
    share = "" if limit.share is None else str(limit.share)
    held = ""
    if limit.held_until is not None:
        by = f"task {limit.held_by}" if limit.held_by else "hand"
        held = f"until {moment(limit.held_until)} by {by}"
    types, changed = " ".join(limit.types), ", ".join(limit.tuned)
    return limit.name, most, rates, free, share, types, changed, held


@command(
    "limits",
    """List the limits with names, and what is left of them.

FREE is what may start now by each rate. SHARE is the weight with which keys share the workers. CHANGED
names what `taskx tune --limit` has changed. HELD says until when nothing starts, by `taskx hold` or because
an API has refused a task. Limits of types and keys are listed only then.""",
    """
taskx limits
taskx limits --json | jq .taken
""",
)
def limits(session: Session) -> None:
    """List limits."""
    found = session.queue.limits()
    if session.json:
        session.out.json_lines(limit.to_dict() for limit in found)
    elif found:
        session.out.table(LIMIT_COLUMNS, [limit_row(limit) for limit in found])
    else:
        session.out.say("no program has declared a limit with a name")


_name = click.argument("name", metavar="LIMIT")


@command(
    "hold",
    """Hold a limit: nothing starts under it for some time, in any process.

LIMIT is the name of a limit, `type/TYPE` for a type, or a key. Running tasks go on. A hold is never
shortened: `taskx release` ends it.""",
    """
taskx hold openai 10m
taskx hold type/email 1h
taskx hold tenant:acme 30s
""",
    _name,
    click.argument("time", type=Duration(positive=True)),
)
def hold(session: Session, name: str, time: float) -> None:
    """Hold a limit."""
    session.queue.hold(name, time)
    session.note("hold", f"limit {name}", {"seconds": time})
    held = next((limit for limit in session.queue.limits() if limit.name == name), None)
    if held is None or held.held_until is None:
        session.out.say(f"{clean(name)} was held, and the time is over")
    elif session.json:
        session.out.json(held.to_dict())
    else:
        session.out.line(f"{clean(name)} is held until {moment(held.held_until)}")


@command(
    "release",
    """End the hold of a limit: its tasks start again, at its rate.""",
    """
taskx release openai
""",
    _name,
)
def release(session: Session, name: str) -> None:
    """End the hold of a limit."""
    was_held = session.queue.release(name)
    if was_held:
        session.note("release", f"limit {name}")
    if session.json:
        session.out.json({"limit": name, "was_held": was_held})
    else:
        session.out.line(f"{clean(name)} {'is released' if was_held else 'was not held'}")


COMMANDS: tuple[click.Command, ...] = (limits, tune, hold, release)
