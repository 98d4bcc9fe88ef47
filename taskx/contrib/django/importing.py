"""Schedules of django-celery-beat become schedules of TaskX: ``manage.py taskx import-beat``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import attrs
import click
from django.apps import apps

from taskx.contrib.django.choosing import chosen
from taskx.contrib.django.places import place_of
from taskx.programs.cli.errors import FAILED, Usage
from taskx.programs.cli.opening import Session, command
from taskx.programs.cli.output import clean
from taskx.queue.queue import Queue
from taskx.queue.schedule import Schedule
from taskx.stores.memory import MemoryRepository
from taskx.tasks.errors import ConfigurationError, TaskxError
from taskx.tasks.ticks import Every, every

#: The label of django-celery-beat.
APP = "django_celery_beat"
# The task by which Celery removes old results; TaskX has Config(retention=...).
_CLEANUP = "celery.backend_cleanup"
# Fields of a row that say how Celery carries its messages.
_OF_BROKER = ("exchange", "routing_key", "priority")


class Refused(Exception):
    """A row cannot become a schedule; the text says why."""


@attrs.frozen(kw_only=True)
class Plan:
    """The schedule that a row becomes: arguments of ``Queue.schedule``."""

    name: str
    spec: str | Every
    tz: str | None
    type: str
    params: dict[str, Any]
    expires: float | None
    paused: bool


def plan_of(row: Any, now: datetime) -> Plan:
    """Return the schedule for a row of ``PeriodicTask``.

    Raises:
        Refused: there is no schedule that does the same.
    """
    spec, tz = _times(row)
    if row.one_off:
        raise Refused("it runs once: submit a task with run_after instead")
    if row.start_time is not None and row.start_time > now:
        raise Refused(f"it begins at {row.start_time.isoformat()}: import it after that")
    if row.expires is not None:
        raise Refused(
            f"it ends at {row.expires.isoformat()}: a schedule has no end, so remove it then"
        )
    return Plan(
        name=row.name,
        spec=spec,
        tz=tz,
        type=row.task if not row.queue or row.queue == "default" else f"{row.task}@{row.queue}",
        params=_params(row),
        expires=row.expire_seconds,
        paused=not row.enabled,
    )


def _times(row: Any) -> tuple[str | Every, str | None]:
    if row.crontab is not None:
        return _cron(row.crontab), str(row.crontab.timezone)
    if row.interval is not None:
        period = timedelta(**{row.interval.period: row.interval.every})
        try:
            return every(period), None
        except ConfigurationError as error:
            raise Refused(str(error)) from error
    if row.solar is not None:
        raise Refused("it follows the sun: TaskX has cron expressions and intervals")
    if row.clocked is not None:
        raise Refused("it runs once, at a time: submit a task with run_after instead")
    raise Refused("it has no times")


def _cron(crontab: Any) -> str:
    """Return the cron expression that ticks at the same times."""
    day, weekday = (_field(value) for value in (crontab.day_of_month, crontab.day_of_week))
    if not (day.startswith("*") or weekday.startswith("*")):
        raise Refused(
            f"its days are the days {day} of the month that are also the weekdays {weekday}; a cron "
            "expression means the days that are one or the other"
        )
    minute, hour, month = map(_field, (crontab.minute, crontab.hour, crontab.month_of_year))
    return f"{minute} {hour} {day} {month} {weekday}"


def _field(text: str) -> str:
    return "".join(str(text).split()) or "*"


def _params(row: Any) -> dict[str, Any]:
    try:
        args, kwargs = json.loads(row.args or "[]"), json.loads(row.kwargs or "{}")
    except ValueError as error:
        raise Refused(f"its arguments are not JSON: {error}") from error
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise Refused("its arguments are not a list and an object")
    return {"args": args, "kwargs": kwargs} if args else kwargs


def ignored(row: Any) -> Iterator[str]:
    """Yield the values of a row that have no meaning in TaskX."""
    for name in _OF_BROKER:
        if getattr(row, name, None) not in (None, ""):
            yield f"{name}={getattr(row, name)}"
    if row.headers not in (None, "", "{}"):
        yield f"headers={row.headers}"


def rows() -> list[Any]:
    """Return the rows of ``PeriodicTask``, in the order of their names.

    Raises:
        ConfigurationError: django-celery-beat is not installed in this site.
    """
    if not apps.is_installed(APP):
        raise ConfigurationError(
            f"{APP!r} is not in INSTALLED_APPS: add it again until its schedules are imported"
        )
    found = apps.get_model(APP, "PeriodicTask").objects.select_related(
        "crontab", "interval", "solar", "clocked"
    )
    return [*found.exclude(task=_CLEANUP).order_by("name")]


def find(alias: str, type: str) -> None:
    """Have the queue of an alias know the executor of a type.

    Raises:
        Refused: there is no task of Django at this path.
    """
    place = place_of(alias)
    if type in place.queue.types:
        return
    try:
        place.find(type)
    except ImportError as error:
        raise Refused(f"there is no task of Django at {type!r} ({error})") from error
    if type not in place.queue.types:
        raise Refused(f"{type!r} is not the path of a task, and no executor has this type")


def store(queue: Queue, plan: Plan, *, dry_run: bool) -> str:
    """Store a schedule; return what was done, or would be: ``added``, ``changed`` or ``unchanged``.

    A schedule that was paused or resumed in TaskX stays so.

    Raises:
        Refused: the queue does not accept it.
    """
    before = queue.schedules().get(plan.name)
    with closing(Queue(MemoryRepository(), queue.config)) as scratch:
        scratch.declare(plan.type)
        with suppress(ImportError):  # an executor that is no task of Django
            attrs.evolve(place_of(chosen()), queue=scratch).find(plan.type)
        after = _declared(scratch, plan)
    if not dry_run:
        schedule = _declared(queue, plan)
        schedule.store()
        if before is None and plan.paused:
            schedule.pause()
    if before is None:
        return "added"
    return "unchanged" if _same(before, after) else "changed"


def _declared(queue: Queue, plan: Plan) -> Schedule:
    try:
        return queue.schedule(
            plan.name, plan.spec, plan.type, plan.params, tz=plan.tz, expires=plan.expires
        )
    except TaskxError as error:
        raise Refused(str(error)) from error


def _same(before: Any, after: Any) -> bool:
    names = ("spec", "tz", "task", "expires", "misfire", "misfire_grace", "overlap")
    return all(getattr(before, name) == getattr(after, name) for name in names)


@command(
    "import-beat",
    """Import the schedules of django-celery-beat.

The rows of its table PeriodicTask become schedules of the same names; nothing is changed there. The name of
a Celery task must be the path of a task of Django, as it is if only the decorator was changed. Call it as
often as you like: it changes only what differs. A row that cannot be imported is shown with the reason,
and the exit code is 1.""",
    """
taskx import-beat --dry-run
taskx import-beat
taskx import-beat --json | jq -r 'select(.outcome == "refused") | .reason'
""",
    click.option("--dry-run", is_flag=True, help="Only say what would be done."),
)
def import_beat(session: Session, dry_run: bool) -> None:
    """Import schedules."""
    try:
        found = rows()
    except ConfigurationError as error:
        raise Usage(str(error)) from error
    refused = 0
    for row in found:
        told = _imported(session.queue, row, dry_run=dry_run)
        refused += told["outcome"] == "refused"
        if session.json:
            session.out.json({"name": row.name, **told})
        else:
            colour = "red" if told["outcome"] == "refused" else ""
            session.out.line(clean(_line(row.name, told)), colour)
    if not found:
        session.out.say("there are no rows in PeriodicTask")
    if refused:
        raise click.exceptions.Exit(FAILED)


def _imported(queue: Queue, row: Any, *, dry_run: bool) -> dict[str, Any]:
    try:
        plan = plan_of(row, datetime.now(timezone.utc))
        find(chosen(), plan.type)
        outcome = store(queue, plan, dry_run=dry_run)
    except Refused as error:
        return {"outcome": "refused", "reason": str(error)}
    told = {"outcome": outcome, "spec": str(plan.spec), "tz": plan.tz, "type": plan.type}
    return {**told, "paused": plan.paused, "ignored": [*ignored(row)]}


def _line(name: str, told: Mapping[str, Any]) -> str:
    if told["outcome"] == "refused":
        return f"refused    {name}: {told['reason']}"
    zone = f" {told['tz']}" if told["tz"] else ""
    more = ", paused" if told["paused"] else ""
    lost = f" (ignored: {', '.join(told['ignored'])})" if told["ignored"] else ""
    return f"{told['outcome']:<10} {name}: {told['spec']}{zone}, {told['type']}{more}{lost}"
