"""Charts as SVG: bars over time, sparklines, histograms and bars of shares.

An SVG has no styles of its own, only classes. Each chart has a title and a description for screen readers.
The larger ones have their numbers as a table, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import count

import attrs
from markupsafe import Markup

from taskx.insight.history import History, TypeHistory
from taskx.programs.dashboard.display import Display

_HEIGHT = 100
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
        say, clock = self.display.say, self.display.clock
        step = timedelta(seconds=history.interval)
        columns = [
            _Column(clock(history.start + place * step), (completed, failed))
            for place, (completed, failed) in enumerate(
                zip(history.completed, history.failed, strict=True)
            )
        ]
        number = {"completed": sum(history.completed), "failed": sum(history.failed)}
        text = say("{completed} completed, {failed} failed", **number)
        if not history.complete:
            text += ". " + say("Tasks are counted since {time}.", time=clock(history.since))
        shown = self.display.seconds(history.interval)
        return self._bars(
            columns,
            title,
            text,
            (say("time (UTC)"), say("completed"), say("failed")),
            axis=(clock(history.start), say("intervals of {time}", time=shown), say("now")),
            hollow=_hollow(history),
        )

    def run_times(self, history: TypeHistory, bounds: Sequence[float], title: str) -> Markup:
        """Return a histogram of run times, without the empty groups at both ends."""
        say, seconds = self.display.say, self.display.seconds
        names = [f"≤ {seconds(bound)}" for bound in bounds]
        names.append(f"> {seconds(bounds[-1])}")
        full = [place for place, number in enumerate(history.run_times) if number]
        if not full:
            return Markup('<p class="muted">{}</p>').format(say("No run times yet."))
        columns = [
            _Column(names[place], (history.run_times[place],))
            for place in range(full[0], full[-1] + 1)
        ]
        text = say("{count} task|{count} tasks", count=sum(history.run_times))
        axis = (columns[0].name, "", columns[-1].name if len(columns) > 1 else "")
        return self._bars(columns, title, text, (say("run time"), say("tasks")), axis=axis)

    def sparkline(self, values: Sequence[int], title: str) -> Markup:
        """Return a small line without axes; its title has its numbers in words."""
        most = max(values, default=0)
        text = self.display.say(
            "{title}: {count} in all, at most {most} at a time",
            title=title,
            count=sum(values),
            most=most,
        )
        scale = 18 / most if most else 0
        points = " ".join(f"{place},{19 - value * scale:.4g}" for place, value in enumerate(values))
        return Markup(
            '<svg class="spark" role="img" viewBox="0 0 {} 20" preserveAspectRatio="none">'
            '<title>{}</title><polyline points="{}"/></svg>'
        ).format(max(1, len(values) - 1), text, points)

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
            '<svg class="bar" role="img" viewBox="0 0 100 1" preserveAspectRatio="none">'
            "<title>{}: {}</title>{}</svg>"
        ).format(title, ", ".join(words), parts)

    def _bars(
        self,
        columns: Sequence[_Column],
        title: str,
        text: str,
        heads: Sequence[str],
        *,
        axis: Sequence[str],
        hollow: int = 0,
    ) -> Markup:
        """Return a figure with stacked bars.

        Args:
            columns: the bars.
            title: the title of the figure.
            text: its numbers in one sentence.
            heads: the heads of the table: of the names, and of each value.
            axis: texts below the bars: left, in the middle, right.
            hollow: the number of bars, from the left, that may be too short.
        """
        number = next(self._ids)
        most = max((sum(column.values) for column in columns), default=0)
        shown = Markup()
        if hollow:
            shown += Markup('<rect class="hollow" width="{}" height="{}"/>').format(hollow, _HEIGHT)
        for place, column in enumerate(columns):
            shown += _bar(place, column, heads[1:], most)
        svg = Markup(
            '<svg role="img" viewBox="0 0 {} {}" preserveAspectRatio="none" '
            'aria-labelledby="c{n}t c{n}d"><title id="c{n}t">{}</title><desc id="c{n}d">{}</desc>{}</svg>'
        ).format(len(columns), _HEIGHT, title, text, shown, n=number)
        below = Markup("").join(Markup("<span>{}</span>").format(word) for word in axis)
        head = Markup('{} <span class="muted">{}</span>').format(title, text)
        return Markup(
            '<figure class="chart"><figcaption>{}</figcaption><div class="top muted">{}</div>{}'
            '<div class="axis muted" aria-hidden="true">{}</div>{}</figure>'
        ).format(head, f"{most:,}", svg, below, self._table(columns, heads))

    def _table(self, columns: Sequence[_Column], heads: Sequence[str]) -> Markup:
        rows = Markup("").join(
            Markup("<tr><th scope=row>{}</th>{}</tr>").format(
                column.name,
                Markup("").join(Markup("<td>{:,}</td>").format(value) for value in column.values),
            )
            for column in columns
            if any(column.values)
        )
        top = Markup("").join(Markup("<th scope=col>{}</th>").format(head) for head in heads)
        return Markup(
            "<details><summary>{}</summary><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>"
            "</details>"
        ).format(self.display.say("as a table"), top, rows)


@attrs.frozen
class _Column:
    """A bar: its name and the values that are stacked in it, the lowest one last."""

    name: str
    values: tuple[int, ...]


# The classes of the parts of a bar.
_PARTS = ("ok", "bad")


def _bar(place: int, column: _Column, names: Sequence[str], most: int) -> Markup:
    if not any(column.values):
        return Markup()
    parts, y = Markup(), float(_HEIGHT)
    for part, value in reversed([*zip(_PARTS, column.values, strict=False)]):
        height = _HEIGHT * value / most
        y -= height
        if value:
            parts += Markup(
                '<rect class="{}" x="{}" y="{:.4g}" width=".8" height="{:.4g}"/>'
            ).format(part, place + 0.1, y, height)
    text = ", ".join(
        f"{value:,} {name}" for name, value in zip(names, column.values, strict=True) if value
    )
    return Markup("<g><title>{}: {}</title>{}</g>").format(column.name, text, parts)


def _hollow(history: History) -> int:
    """Return the number of intervals, from the first on, that may miss tasks."""
    if history.complete:
        return 0
    covered = (history.since - history.start).total_seconds() / history.interval
    return min(len(history.completed), max(0, -int(-covered // 1)))
