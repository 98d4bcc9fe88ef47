"""Values as people read them: times, durations, sizes, schedules."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import attrs
from jinja2 import pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from taskx.programs.dashboard import words
from taskx.tasks.tags import without_trace
from taskx.tasks.ticks import Every

# The units of durations: seconds, and the text of one. The text of a number below the next unit is used.
_UNITS = (
    (86400.0, "{number} d"),
    (3600.0, "{number} h"),
    (60.0, "{number} min"),
    (1.0, "{number} s"),
    (0.001, "{number} ms"),
)
#: The largest number of waiting tasks that pages count for each type and node.
MOST_WAITING = 10_000
# An id as this program makes it; the middle is what differs between the tasks of a list.
_OWN_ID = re.compile(
    r"([0-9a-f]{8})-([0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4})-[0-9a-f]{12}(.*)", re.DOTALL
)
_LONGEST_ID = 24
_BYTES = ("B", "KB", "MB", "GB", "TB")
_DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@attrs.frozen
class Display:
    """Shows values in one language.

    Attributes:
        language: the code of the language.
        now: the time of the page.
    """

    language: str
    now: datetime

    def say(self, text: str, **values: object) -> str:
        """Return an English text in the language, with these values."""
        return words.translate(self.language, text, **values)

    def moment(self, at: datetime | None) -> Markup:
        """Return a time as HTML, in UTC; a dash if there is none."""
        if at is None:
            return Markup("–")
        utc = at.astimezone(timezone.utc)
        text = utc.strftime("%Y-%m-%d %H:%M:%S")
        return Markup('<time datetime="{}">{}</time>').format(utc.isoformat(), text)

    def clock(self, at: datetime, *, seconds: bool = False) -> str:
        """Return the hour and minute of a time, in UTC; with the day if it is not today's."""
        utc, today = at.astimezone(timezone.utc), self.now.astimezone(timezone.utc).date()
        clock = "%H:%M:%S" if seconds else "%H:%M"
        return utc.strftime(clock if utc.date() == today else f"%m-%d {clock}")

    def age(self, at: datetime | None) -> Markup:
        """Return the age of a time as HTML with the time itself, for a narrow column."""
        return self.ago(at, short=True)

    def ago(self, at: datetime | None, *, short: bool = False) -> Markup:
        """Return how long ago or in how long a time is, as HTML with the time itself."""
        if at is None:
            return Markup("–")
        seconds = (self.now - at).total_seconds()
        distance = self.seconds(abs(seconds))
        shown = distance
        if seconds < 0 or not short:
            shown = self.say("{time} ago" if seconds >= 0 else "in {time}", time=distance)
        utc = at.astimezone(timezone.utc)
        exact = utc.strftime("%Y-%m-%d %H:%M:%S UTC")
        return Markup('<time datetime="{}" title="{}">{}</time>').format(
            utc.isoformat(), exact, shown
        )

    def seconds(self, value: float | None) -> str:
        """Return a duration of seconds with a fitting unit; a dash if there is none."""
        if value is None:
            return "–"
        size, text = next((unit for unit in _UNITS if value >= unit[0]), _UNITS[-1])
        number = value / size
        shown = f"{number:.0f}" if number >= 10 else f"{number:.1f}".removesuffix(".0")
        return self.say(text, number="<0.1" if 0 < number < 0.05 else shown)

    def number(self, value: float | None) -> str:
        """Return a number with separators; a dash if there is none."""
        if value is None:
            return "–"
        whole = isinstance(value, int) or value.is_integer()
        return str(words.number(int(value))) if whole else f"{value:,.2f}"

    def total(self, value: int, *, exact: bool) -> str:
        """Return a number of tasks; if the count has ended there, say that there are more."""
        shown = self.number(int(value))
        return shown if exact else self.say("more than {number}", number=shown)

    def waiting(self, value: int) -> str:
        """Return the number of a type's waiting tasks, which are counted up to a limit."""
        return f"{self.number(value)}{'+' if value >= MOST_WAITING else ''}"

    def percent(self, share: float | None) -> str:
        """Return a share from 0 to 1 in percent; a dash if there is none."""
        if share is None:
            return "–"
        return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"

    def size(self, number: float | None) -> str:
        """Return a number of bytes with a fitting unit; a dash if there is none."""
        if number is None:
            return "–"
        left, unit = float(number), _BYTES[0]
        for unit in _BYTES:
            if left < 1024 or unit == _BYTES[-1]:
                break
            left /= 1024
        return f"{left:.0f} {unit}" if left >= 10 or unit == "B" else f"{left:.1f} {unit}"

    def spec(self, spec: str | Every) -> str:
        """Return a schedule's cron expression or interval in words; an unusual one as it is."""
        if isinstance(spec, Every):
            return self.say("every {time}", time=self.seconds(spec.seconds))
        return _cron(spec, self.say) or spec


def short_id(task_id: str) -> str:
    """Return the part of an id that tells it from its neighbours."""
    if found := _OWN_ID.fullmatch(task_id):
        return found[2] + found[3]
    return task_id if len(task_id) <= _LONGEST_ID else f"{task_id[: _LONGEST_ID - 1]}…"


def _cron(spec: str, say: Callable[..., str]) -> str:
    """Return a cron expression in words; an empty text for one that needs more than a short sentence."""
    fields = spec.split()
    if len(fields) != 5:
        return ""
    minute, hour, day, month, weekday = fields
    when = _time(minute, hour, say)
    if not when or month != "*":
        return ""
    if (day, weekday) == ("*", "*"):
        return (
            when if hour == "*" or minute == "*" or "/" in hour else say("daily, {when}", when=when)
        )
    if day == "*":
        days = _days(weekday, say)
        return days and say("{days}, {when}", days=days, when=when)
    if weekday == "*" and day.isdecimal():
        return say("monthly on day {day}, {when}", day=day, when=when)
    return ""


def _time(minute: str, hour: str, say: Callable[..., str]) -> str:
    if (minute, hour) == ("*", "*"):
        return say("every minute")
    if hour == "*" and minute.startswith("*/") and minute[2:].isdecimal():
        return say("every {count} minutes", count=int(minute[2:]))
    if not minute.isdecimal():
        return ""
    if hour == "*":
        return say("hourly, at minute {minute}", minute=minute)
    if hour.startswith("*/") and hour[2:].isdecimal():
        return say("every {count} hours, at minute {minute}", count=int(hour[2:]), minute=minute)
    hours = hour.split(",")
    if not all(part.isdecimal() for part in hours):
        return ""
    times = ", ".join(f"{int(part):02}:{int(minute):02}" for part in hours)
    return say("at {times}", times=times)


def _days(weekday: str, say: Callable[..., str]) -> str:
    if weekday.upper() in ("1-5", "MON-FRI"):
        return say("Monday to Friday")
    names = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
    found = []
    for part in weekday.upper().split(","):
        place = names.index(part) if part in names else int(part) if part.isdecimal() else -1
        if not 0 <= place < len(_DAYS):
            return ""
        found.append(say(_DAYS[place]))
    return ", ".join(found)


def _filter(name: str) -> Callable[..., Any]:
    @pass_context
    def shown(context: Context, value: Any, **options: Any) -> Any:
        return getattr(context["request"].display, name)(value, **options)

    return shown


#: The filters of the templates. Most use the ``display`` of the request.
FILTERS = {
    name: _filter(name)
    for name in (
        "moment",
        "clock",
        "ago",
        "age",
        "seconds",
        "number",
        "total",
        "waiting",
        "percent",
        "size",
        "spec",
    )
} | {"without_trace": without_trace, "short_id": short_id}
