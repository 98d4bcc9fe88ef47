"""Charts as SVG: bars and lines over time, sparklines, histograms and bars of shares.

An SVG has no styles of its own, only classes. Each chart has a title and a description for screen readers.
The larger ones have axes with values, and their numbers as a table, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import count

import attrs
from markupsafe import Markup

from taskx.insight.history import History, TypeHistory
from taskx.programs.dashboard.display import Display

_HEIGHT = 100
# A histogram has the room of so many bars at least: a single one does not fill the page.
_FEWEST = 8
#: Statuses in the order in which a bar shows them.
STATUSES = ("completed", "running", "pending", "failed", "cancelled")


@attrs.define
class Charts:
    """Draws the charts of one page.

    Attributes:
        display: shows times and numbers.
    """

    display: Display
    _ids: Iterator[int] = attrs.field(factory=count, init=False)

    def over_time(self, history: History, title: str) -> Markup:
        """Return a chart of the completed and failed tasks in each interval."""
        say = self.display.say
        pairs = [*zip(history.completed, history.failed, strict=True)]
        text = say(
            "{completed} completed, {failed} failed",
            completed=sum(history.completed),
            failed=sum(history.failed),
        )
        top, shown = _nice(max(map(sum, pairs), default=0)), Markup()
        if hollow := _hollow(history):
            text += ". " + say(
                "Tasks are counted since {time}.", time=self.display.clock(history.since)
            )
            shown += Markup('<rect class="hollow" width="{}" height="{}"/>').format(hollow, _HEIGHT)
        heads = say("time (UTC)"), say("completed"), say("failed")
        names = self._intervals(history)
        for place, (name, pair) in enumerate(zip(names, pairs, strict=True)):
            shown += _bar(place, name, pair, heads[1:], top)
        rows = [(name, *pair) for name, pair in zip(names, pairs, strict=True) if any(pair)]
        figure = _Figure(title, text, len(pairs), top, self.display.number)
        return self._figure(figure, shown, self._axis(history), heads, rows)

    def latency(self, history: History, title: str) -> Markup:
        """Return a chart of how long tasks waited for their start, in each interval."""
        say, seconds = self.display.say, self.display.seconds
        found = [*enumerate(history.start_latency)]
        known = [(place, one) for place, one in found if one is not None]
        if not known:
            return self.nothing(title, say("No task has started in this time."))
        top = _nice(max(one.p95 for _, one in known))
        text = say(
            "of 100 tasks, 95 waited at most {time} (thin line: 50)",
            time=seconds(max(one.p95 for _, one in known)),
        )
        shown = Markup()
        for style, values in (
            ("second", [(place, one.p50) for place, one in known]),
            ("first", [(place, one.p95) for place, one in known]),
        ):
            heights = ((place, f"{_HEIGHT * (1 - value / top):.4g}") for place, value in values)
            points = " ".join(f"{place},{height} {place + 1},{height}" for place, height in heights)
            shown += Markup('<polyline class="{}" points="{}"/>').format(style, points)
        names = self._intervals(history)
        heads = say("time (UTC)"), "p50", "p95"
        rows = [(names[place], seconds(one.p50), seconds(one.p95)) for place, one in known]
        figure = _Figure(title, text, len(found), top, seconds)
        return self._figure(figure, shown, self._axis(history), heads, rows)

    def run_times(self, history: TypeHistory, bounds: Sequence[float], title: str) -> Markup:
        """Return a histogram of run times, without the empty groups at both ends."""
        say, seconds = self.display.say, self.display.seconds
        names = [f"≤ {seconds(bound)}" for bound in bounds]
        names.append(f"> {seconds(bounds[-1])}")
        full = [place for place, number in enumerate(history.run_times) if number]
        if not full:
            return self.nothing(title, say("No run times yet."))
        first, last = full[0], full[-1]
        last = min(len(names) - 1, max(last, first + _FEWEST - 1))
        first = max(0, min(first, last - _FEWEST + 1))
        numbers = history.run_times[first : last + 1]
        top, heads = _nice(max(numbers)), (say("run time"), say("tasks"))
        shown = Markup("").join(
            _bar(place, names[first + place], (number,), heads[1:], top)
            for place, number in enumerate(numbers)
        )
        text = say("{count} task|{count} tasks", count=sum(history.run_times))
        rows = [(names[first + place], number) for place, number in enumerate(numbers) if number]
        figure = _Figure(title, text, len(numbers), top, self.display.number)
        axis = [names[first], names[(first + last) // 2], names[last]]
        return self._figure(figure, shown, axis, heads, rows)

    def nothing(self, title: str, text: str) -> Markup:
        """Return what stands in the place of a chart that has no values."""
        return Markup('<h2>{}</h2><p class="muted">{}</p>').format(title, text)

    def sparkline(self, values: Sequence[float | None], title: str, style: str = "") -> Markup:
        """Return a small line without axes; its title has its numbers in words."""
        known = [value or 0 for value in values]
        most = max(known, default=0)
        text = self.display.say(
            "{title}: at most {most} at a time",
            title=title,
            most=most if isinstance(most, int) else self.display.seconds(most),
        )
        scale = 18 / most if most else 0
        points = " ".join(f"{place},{19 - value * scale:.4g}" for place, value in enumerate(known))
        return Markup(
            '<svg class="spark {}" role="img" viewBox="0 0 {} 20" preserveAspectRatio="none">'
            '<title>{}</title><polyline points="{}"/></svg>'
        ).format(style, max(1, len(known) - 1), text, points)

    def shares(self, counts: Mapping[str, int], title: str) -> Markup:
        """Return a bar with one part for each status."""
        whole = sum(counts.values())
        parts, x, words = Markup(), 0.0, []
        for status in (*STATUSES, *sorted(counts.keys() - {*STATUSES})):
            if number := counts.get(status, 0):
                width, word = 100 * number / whole, f"{self.display.say(status)} {number:,}"
                words.append(word)
                parts += Markup(
                    '<rect class="fill {}" x="{:.4g}" width="{:.4g}" height="1"><title>{}</title></rect>'
                ).format(status, x, width, word)
                x += width
        return Markup(
            '<svg class="share" role="img" viewBox="0 0 100 1" preserveAspectRatio="none">'
            "<title>{}: {}</title>{}</svg>"
        ).format(title, ", ".join(words), parts)

    def _intervals(self, history: History) -> list[str]:
        step = timedelta(seconds=history.interval)
        return [
            self.display.clock(history.start + place * step)
            for place in range(len(history.completed))
        ]

    def _axis(self, history: History) -> list[str]:
        step = self.display.seconds(history.interval)
        middle = self.display.say("intervals of {time}", time=step)
        return [self.display.clock(history.start), middle, self.display.say("now")]

    def _figure(
        self,
        of: _Figure,
        shown: Markup,
        axis: Sequence[str],
        heads: Sequence[str],
        rows: Sequence[Sequence[object]],
    ) -> Markup:
        """Return a figure: its title, its values on the left, its drawing, and its table.

        Args:
            of: what is drawn.
            shown: the drawing.
            axis: texts below it: left, in the middle, right.
            heads: the heads of the table.
            rows: its rows.
        """
        number = next(self._ids)
        grid = Markup('<line x2="{w}" y1="50" y2="50"/><line x2="{w}" y1="0" y2="0"/>').format(
            w=of.width
        )
        svg = Markup(
            '<svg role="img" viewBox="0 0 {} {}" preserveAspectRatio="none" '
            'aria-labelledby="c{n}t c{n}d"><title id="c{n}t">{}</title><desc id="c{n}d">{}</desc>{}{}</svg>'
        ).format(of.width, _HEIGHT, of.title, of.text, grid, shown, n=number)
        marks = [of.name(of.top), of.name(of.top / 2), "0"]
        return Markup(
            '<figure><figcaption><h2>{}</h2><p class="muted small">{}</p></figcaption>'
            '<div class="plot"><div class="y" aria-hidden="true">{}</div>{}'
            '<div class="axis" aria-hidden="true">{}</div></div>'
            '<details id="c{}"><summary class="small muted">{}</summary>{}</details></figure>'
        ).format(
            of.title,
            of.text,
            _spans(marks),
            svg,
            _spans(axis),
            number,
            self.display.say("as a table"),
            _table(heads, rows),
        )


@attrs.frozen
class _Figure:
    """The parts that all figures have: the value at the top of the axis, and what names a value."""

    title: str
    text: str
    width: int
    top: float
    name: Callable[[float], str]


def _spans(texts: Sequence[str]) -> Markup:
    return Markup("").join(Markup("<span>{}</span>").format(text) for text in texts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    top = Markup("").join(Markup("<th scope=col>{}</th>").format(head) for head in heads)
    body = Markup("").join(
        Markup("<tr><th scope=row>{}</th>{}</tr>").format(
            name, Markup("").join(Markup("<td>{}</td>").format(_number(v)) for v in values)
        )
        for name, *values in rows
    )
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(top, body)


def _number(value: object) -> object:
    return f"{value:,}" if isinstance(value, int) else value


def _nice(most: float) -> float:
    """Return a round number that is at least so high: the top of an axis."""
    if most <= 0:
        return 2
    if isinstance(most, int) and most <= 2:
        return 2
    size = 10.0 ** math.floor(math.log10(most))
    top = next(step * size for step in (1, 2, 4, 6, 10) if most <= step * size * 1.000001)
    return round(top) if isinstance(most, int) else top


# The classes of the parts of a bar.
_PARTS = ("ok", "bad")


def _bar(place: int, name: str, values: Sequence[int], names: Sequence[str], top: float) -> Markup:
    """Return a bar; its values are stacked, the last one at the bottom."""
    if not any(values):
        return Markup()
    parts, y = Markup(), float(_HEIGHT)
    for part, value in reversed([*zip(_PARTS, values, strict=False)]):
        height = _HEIGHT * value / top
        y -= height
        if value:
            parts += Markup(
                '<rect class="{}" x="{}" y="{:.4g}" width=".8" height="{:.4g}"/>'
            ).format(part, place + 0.1, y, height)
    text = ", ".join(f"{v:,} {what}" for what, v in zip(names, values, strict=True) if v)
    return Markup("<g><title>{}: {}</title>{}</g>").format(name, text, parts)


def _hollow(history: History) -> int:
    """Return the number of intervals, from the first on, that may miss tasks."""
    if history.complete:
        return 0
    covered = (history.since - history.start).total_seconds() / history.interval
    return min(len(history.completed), max(0, -int(-covered // 1)))
