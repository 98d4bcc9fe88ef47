"""The figures' names and goals, and the table of them as text and as reStructuredText."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness import FLOOR, TASKX, Key, Measured


@dataclass(frozen=True)
class Figure:
    """A figure, with the goals for TaskX.

    Attributes:
        title: the name in the table.
        form: the format of a value.
        more: True if a larger value is better.
        ratio: goal: the smallest share of the floor's value.
        value: goal: the smallest value, or the largest one if less is better. If there is a ``ratio``,
            too, either goal is enough.
        growth: goal: the largest factor between the times with many and with few other tasks.
        durability: the only durability for which the goal is valid; None for all.
        ahead: goal: at the durability ``process``, be ahead of every rival that stores tasks.
    """

    title: str
    form: str
    more: bool = False
    ratio: float | None = None
    value: float | None = None
    growth: float | None = None
    durability: str | None = None
    ahead: bool = False


FIGURES: dict[str, Figure] = {
    "submit": Figure("submit one by one", "{:,.0f}/s", more=True, ratio=0.6, ahead=True),
    "many": Figure("submit_many", "{:,.0f}/s", more=True, ratio=0.4, value=100_000),
    "drain": Figure("drain a backlog", "{:,.0f}/s", more=True, ratio=1.0, ahead=True),
    "left": Figure("drain a dead process's tasks", "{:,.0f}/s", more=True, ratio=1.0),
    "together": Figure("producer and workers", "{:,.0f}/s", more=True, ratio=0.8, ahead=True),
    "map": Figure("map over items", "{:,.0f}/s", more=True, value=15_000, durability="process"),
    "begins-p50": Figure(
        "idle: submit to begin, p50", "{:,.0f} µs", value=250, durability="process", ahead=True
    ),
    "begins-p99": Figure(
        "idle: submit to begin, p99", "{:,.0f} µs", value=2_000, durability="process"
    ),
    "result-p50": Figure(
        "idle: submit to result, p50", "{:,.0f} µs", value=500, durability="process", ahead=True
    ),
    "result-p99": Figure("idle: submit to result, p99", "{:,.0f} µs"),
    "sleepers": Figure("10 ms sleeps on 32 threads", "{:.2f} × ideal", value=1.15, ahead=True),
    "sleepers-many": Figure("10 ms sleeps, by submit_many", "{:.2f} × ideal", value=1.15),
    "both-alone": Figure("one process drains a file", "{:,.0f}/s", more=True),
    "both-together": Figure("two processes drain one file", "{:,.0f}/s", more=True),
    "both-ratio": Figure("two processes: to one", "{:.2f} × one", more=True, value=0.8),
    "both-share": Figure("two processes: the smaller share", "{:.0f} %", more=True, value=40),
    "rescue": Figure("kill -9: task starts again elsewhere", "{:,.0f} ms", value=1_000),
    "elsewhere-p50": Figure(
        "submit to begin elsewhere, p50", "{:,.1f} ms", value=3, durability="accepted"
    ),
    "elsewhere-p99": Figure(
        "submit to begin elsewhere, p99", "{:,.1f} ms", value=15, durability="accepted"
    ),
    "outcome-p50": Figure(
        "end of a task elsewhere to result(), p50", "{:,.1f} ms", value=3, durability="accepted"
    ),
    "outcome-p99": Figure(
        "end of a task elsewhere to result(), p99", "{:,.1f} ms", value=15, durability="accepted"
    ),
    "cancel-p50": Figure(
        "cancel reaches a task elsewhere, p50", "{:,.1f} ms", value=3, durability="accepted"
    ),
    "cancel-p99": Figure(
        "cancel reaches a task elsewhere, p99", "{:,.1f} ms", value=15, durability="accepted"
    ),
    "others-cpu": Figure("idle with busy others: share of a core", "{:.2f} %", value=2),
    "finished-drain": Figure("drain with finished tasks", "{:,.0f}/s", more=True, growth=1.3),
    "finished-get": Figure("get one with finished tasks", "{:,.0f} µs", growth=1.3),
    "finished-list": Figure("list 20 newest with finished tasks", "{:,.0f} µs", growth=1.3),
    "finished-count": Figure("count finished tasks", "{:,.2f} ms", value=50),
    "delayed-drain": Figure("drain with delayed tasks", "{:,.0f}/s", more=True, growth=1.3),
    "delayed-late": Figure("begins after its run_at, p99", "{:,.0f} ms", value=100),
    "burst-ticks": Figure("many schedules tick: longest round", "{:,.0f} ms", value=50),
    "burst-ticks-work": Figure("many schedules tick: work of a round", "{:,.0f} ms", value=50),
    "burst-due": Figure("many tasks are due: longest round", "{:,.0f} ms", value=50),
    "burst-due-work": Figure("many tasks are due: work of a round", "{:,.0f} ms", value=50),
    "idle-schedules": Figure("many idle schedules: share of a core", "{:.2f} %", value=1),
    "import": Figure("import taskx", "{:,.1f} ms", value=60),
    "import-queue": Figure("import Queue and SQLiteRepository", "{:,.0f} ms"),
    "import-optional": Figure("import taskx: optional packages", "{:.0f}", value=0),
    "memory": Figure("memory per spilled task", "{:,.0f} bytes", value=200),
    "idle-cpu": Figure("idle queue: share of a core", "{:.2f} %", value=0.5),
    "idle-commits": Figure("idle queue: commits", "{:.1f}/s", value=0),
    "trips-submit": Figure("a submit: round trips", "{:.2f}", value=1),
    "trips-submitting": Figure("a submit with workers: round trips", "{:.2f}", value=1),
    "trips-many": Figure("submit_many: round trips a batch", "{:.0f}"),
    "trips-backlog": Figure("start and finish, of a backlog: round trips", "{:.2f}", value=1.5),
    "trips-producer": Figure("start and finish, with a producer: round trips", "{:.2f}", value=1.5),
    "trips-alone": Figure("a task alone, to its result: round trips", "{:.2f}"),
    "trips-polls": Figure("a working node: polls per second", "{:.0f}"),
    "trips-stream": Figure("change stream: round trips a task", "{:.2f}"),
    "cost-submit-reads": Figure("a submit: reads", "{:.2f}"),
    "cost-submit-writes": Figure("a submit: writes", "{:.2f}"),
    "cost-submit-commits": Figure("a submit: commits", "{:.2f}"),
    "cost-submit-elsewhere": Figure("submits written by another thread", "{:.1f} %"),
    "cost-submit-switches": Figure("a submit: times the thread waited", "{:.2f}"),
    "cost-drain-reads": Figure("a task of a backlog: reads", "{:.2f}"),
    "cost-drain-writes": Figure("a task of a backlog: writes", "{:.2f}"),
    "cost-drain-commits": Figure("a task of a backlog: commits", "{:.2f}"),
    "cost-alone-reads": Figure("a task alone, to its result: reads", "{:.2f}"),
    "cost-alone-writes": Figure("a task alone, to its result: writes", "{:.2f}"),
    "cost-alone-commits": Figure("a task alone, to its result: commits", "{:.2f}"),
}


def _unit(figure: Figure) -> str:
    return figure.form.partition("}")[2]


HEADER = ("what", "who", "durability", "measured", "× floor", "goal", "met")
MISSING, FAILED = "NOT INSTALLED", "FAILED"
#: The lines in the documentation between which the tables of a run are; and those for a run on MongoDB.
MARKS = ("\n.. measured from here on\n", "\n.. measured up to here\n")
MARKS_ON_MONGO = (
    "\n.. measured on MongoDB from here on\n",
    "\n.. measured on MongoDB up to here\n",
)

#: The figures in the table of the peers, with the headings of their columns.
SIDE_BY_SIDE = {
    "submit": "submit",
    "drain": "drain",
    "together": "both",
    "begins-p50": "begins p50",
    "begins-p99": "p99",
    "result-p50": "result p50",
    "result-p99": "p99",
    "sleepers": "sleeps",
    "elsewhere-p50": "wake-up p50",
    "elsewhere-p99": "p99",
}
HEADER_SIDE_BY_SIDE = (
    "who",
    "durability",
    "keeps",
    *(f"{title}{_unit(FIGURES[name])}" for name, title in SIDE_BY_SIDE.items()),
)
_NO_FIGURE = "–"

Row = tuple[str, ...]


def rows(measured: Mapping[Key, Measured]) -> list[Row]:
    """Return the rows by figure, with goals: the floor, TaskX, and peers that are in no other table."""
    return [
        _row(figure, m, measured)
        for name, figure in FIGURES.items()
        for (of, _, _), m in measured.items()
        if of == name and m.values and not (m.rival and name in SIDE_BY_SIDE)
    ]


def side_by_side(measured: Mapping[Key, Measured]) -> list[Row]:
    """Return the table of the peers, which also has rows for the floors and TaskX.

    A figure of a queue that stores tasks has its rank in the column. Peers that are not installed or fail
    have a row, too. Without any peer, there are no rows.
    """
    if not any(m.rival for m in measured.values()):
        return []
    whose = {
        (who, durability): m.keeps
        for (name, who, durability), m in measured.items()
        if name in SIDE_BY_SIDE and (m.rival or m.values)
    }
    ranked = {name: _ranked(name, measured) for name in SIDE_BY_SIDE}
    return [
        (*row, keeps, *(_side(measured.get((name, *row)), ranked[name]) for name in SIDE_BY_SIDE))
        for row, keeps in whose.items()
    ]


def _ranked(name: str, measured: Mapping[Key, Measured]) -> list[float]:
    """Return the values of a figure of all queues that store tasks, the best first."""
    more = FIGURES[name].more
    values = [
        m.value(more_is_better=more)
        for (of, _, _), m in measured.items()
        if of == name and m.values and _stores(m)
    ]
    return sorted(values, reverse=more)


def _stores(m: Measured) -> bool:
    """Return True if tasks are stored: by TaskX or a rival, not by a floor."""
    return m.durability != "memory" and (m.rival or m.who.startswith(TASKX))


def _side(m: Measured | None, ranked: Sequence[float]) -> str:
    if m is None:
        return _NO_FIGURE
    if not m.values:
        return MISSING if m.lacks else FAILED
    figure = FIGURES[m.figure]
    value = m.value(more_is_better=figure.more)
    text = figure.form.format(value).removesuffix(_unit(figure))
    return f"{text} ({ranked.index(value) + 1})" if _stores(m) else text


def complaints(measured: Mapping[Key, Measured]) -> list[str]:
    """Return the peers that were not measured, each with the reason."""
    short = {m.who: m.lacks for m in measured.values() if m.rival and not m.values}
    return [f"{who} ({f'{lacks} {MISSING}' if lacks else FAILED})" for who, lacks in short.items()]


def _row(figure: Figure, m: Measured, measured: Mapping[Key, Measured]) -> Row:
    value = m.value(more_is_better=figure.more)
    share = _share(m, value, measured)
    goals = _goals(figure, m, value, share, measured) if m.who.startswith(TASKX) else []
    reached = "" if not goals else "yes" if all(met for _, met in goals) else "SHORT"
    return (
        figure.title,
        m.who,
        m.durability,
        figure.form.format(value),
        "" if share is None else f"{share:.2f}",
        ", ".join(goal for goal, _ in goals),
        reached,
    )


def _share(m: Measured, value: float, measured: Mapping[Key, Measured]) -> float | None:
    floor = measured.get((m.figure, FLOOR, m.durability))
    if floor is None or not floor.values or floor is m:
        return None
    return value / floor.value(more_is_better=True)


Goal = tuple[str, bool]


def _goals(
    figure: Figure,
    m: Measured,
    value: float,
    share: float | None,
    measured: Mapping[Key, Measured],
) -> list[Goal]:
    """Return all goals of a value, each with True if it is reached."""
    if figure.durability not in (None, m.durability):
        return []
    either: list[Goal] = []
    if figure.ratio is not None and share is not None:
        either.append((f"≥ {figure.ratio} × floor", share >= figure.ratio))
    if figure.value is not None:
        sign, least = ("≥", value >= figure.value) if figure.more else ("≤", value <= figure.value)
        either.append((f"{sign} {figure.form.format(figure.value)}", least))
    goals = [(" or ".join(goal for goal, _ in either), any(met for _, met in either))]
    goals = goals if either else []
    if figure.ahead and m.durability == "process":
        goals += _ahead_of_rivals(figure, m, value, measured)
    if figure.growth is not None:
        goals += _growth(figure, m, value, measured)
    return goals


def _ahead_of_rivals(
    figure: Figure, m: Measured, value: float, measured: Mapping[Key, Measured]
) -> list[Goal]:
    rivals = [
        (other.value(more_is_better=figure.more), other.who)
        for (of, _, _), other in measured.items()
        if of == m.figure and other.values and _stores(other) and not other.who.startswith(TASKX)
    ]
    if not rivals:
        return []
    best, who = max(rivals) if figure.more else min(rivals)
    return [(f"ahead of {who}", value > best if figure.more else value < best)]


def _growth(
    figure: Figure, m: Measured, value: float, measured: Mapping[Key, Measured]
) -> list[Goal]:
    """Compare the second of two sizes with the first."""
    first = next(other for (of, _, _), other in measured.items() if of == m.figure)
    if first is m:
        return []
    assert figure.growth is not None
    few = first.value(more_is_better=figure.more)
    times = few / value if figure.more else value / few
    return [(f"time grows ≤ {figure.growth} × ({times:.2f})", times <= figure.growth)]


def machine(store: str, versions: Mapping[str, str | None]) -> str:
    """Return a description of the machine and the software, without the host's name."""
    cores = len(os.sched_getaffinity(0))
    found = [f"{name} {version or MISSING}" for name, version in sorted(versions.items())]
    return (
        f"{cores} core{'s' if cores > 1 else ''}, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, {store}{'; ' if found else ''}{', '.join(found)}"
    )


def as_text(table: Sequence[Row], header: Row = HEADER) -> str:
    """Return a table as columns for a terminal."""
    shown, previous = [header], ""
    for row in table:
        shown.append(row if row[0] != previous else ("", *row[1:]))
        previous = row[0]
    return "\n".join(_lines(shown))


def as_rst(table: Sequence[Row], header: Row = HEADER) -> str:
    """Return a table as a simple table of reStructuredText."""
    first, *others = _lines([header, *table])
    rule = "  ".join("=" * width for width in _widths([header, *table]))
    return "\n".join([rule, first, rule, *others, rule])


def put_between_marks(document: str, text: str, marks: tuple[str, str]) -> str:
    """Return the document with the text between its marks.

    Raises:
        ValueError: the document does not have the marks.
    """
    before, begin, rest = document.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(
            f"the document has no place for the tables: add the lines {marks[0]!r} and {marks[1]!r}"
        )
    return f"{before}{begin}\n{text}\n{end}{after}"


def _widths(table: Sequence[Row]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _lines(table: Sequence[Row]) -> list[str]:
    """Return a line for each row, with numbers aligned to the right."""
    widths = _widths(table)
    right = range(3, len(widths)) if table[0] == HEADER_SIDE_BY_SIDE else (3, 4)
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
