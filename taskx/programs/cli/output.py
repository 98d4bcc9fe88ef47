"""The output: tables that fit the terminal, JSON lines, colours, and text that cannot harm a terminal.

Data goes to stdout, words go to stderr. Colours and live views are for terminals only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cached_property
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

import attrs
import click

from taskx.tasks.display import printable
from taskx.tasks.model import TaskStatus

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Rows that are measured before the first one is printed.
_MEASURED = 500
# Cells between two columns.
_GAP = 2
# Fewest cells of a column that may be cut.
_LEAST = 8
# Most cells of a column that may be cut, where nothing limits it.
_MOST = 100

#: The colour of each status.
COLOURS = {
    TaskStatus.PENDING: "yellow",
    TaskStatus.RUNNING: "cyan",
    TaskStatus.COMPLETED: "green",
    TaskStatus.FAILED: "red",
    TaskStatus.CANCELLED: "bright_black",
}


def prepare_streams() -> None:
    """Print characters that the terminal's encoding does not have as escapes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


# --- text


def clean(text: str, *, lines: bool = False) -> str:
    """Return a text in which control characters are escapes such as ``\\x1b``.

    Characters that change the direction of the text are escaped, too.

    Args:
        text: any text, for example from a task.
        lines: keep line breaks, and tabs as spaces.
    """
    if not lines:
        return printable(text)
    return "\n".join(map(printable, text.expandtabs().split("\n")))


def one_line(text: str) -> str:
    """Return the first line of a text, cleaned."""
    first, *more = text.strip().splitlines() or [""]
    return clean(first.rstrip()) + (" …" if more else "")


def width_of(text: str) -> int:
    """Return the cells that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, width: int) -> str:
    """Return the text, shortened to a number of cells."""
    if width_of(text) <= width:
        return text
    from rich.cells import set_cell_size

    return f"{set_cell_size(text, width - 1).rstrip()}…" if width > 0 else ""


def age(seconds: float) -> str:
    """Return a duration in one unit: ``5s``, ``3m``, ``2h``, ``4d``."""
    if seconds < 0:
        return f"-{age(-seconds)}"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.0f}s" if seconds >= 10 else f"{seconds:.2g}s"
    for unit, size in (("m", 60), ("h", 3600)):
        if seconds < size * (60 if unit == "m" else 48):
            return f"{seconds // size:.0f}{unit}"
    return f"{seconds // 86400:.0f}d"


def moment(at: datetime | None) -> str:
    """Return a time in UTC as ISO text; an empty text for None."""
    return "" if at is None else f"{at.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON in ASCII. Times are ISO text."""
    return json.dumps(value, default=_to_json, indent=indent)


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat()
    if attrs.has(type(value)):
        return attrs.asdict(value)
    return str(value)


# --- tables


@attrs.frozen
class Cell:
    """A text with a style of rich."""

    text: str
    style: str = ""


@attrs.frozen
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        right: align it on the right.
        cut: it may be shortened.
        drop: it may be left out where it is empty, or where there is no room: higher numbers first; 0 for
            never.
    """

    title: str
    right: bool = False
    cut: bool = False
    drop: int = 0


Row = Sequence[str | Cell]


class Output:
    """The output of one call of the command line."""

    @cached_property
    def console(self) -> Console:
        """Rich's console of stdout."""
        from rich.console import Console

        return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)

    @property
    def live(self) -> bool:
        """True if stdout is a terminal."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    @property
    def width(self) -> int | None:
        """The width of the terminal in cells; None if stdout is not one."""
        return self.console.width if self.console.is_terminal else None

    def json(self, value: Any) -> None:
        """Print one JSON value on a line."""
        click.echo(to_json(value))

    def json_lines(self, values: Iterable[Any]) -> int:
        """Print each value on a line. Return their number."""
        number = 0
        for value in values:
            self.json(value)
            number += 1
        return number

    def line(self, text: str = "", style: str = "") -> None:
        """Print a text that is clean."""
        if style and self.console.is_terminal:
            self.console.print(text, style=style, soft_wrap=True)
        else:
            click.echo(text)

    def say(self, words: str) -> None:
        """Print words for people to stderr."""
        click.echo(clean(words), err=True)

    def table(self, columns: Sequence[Column], rows: Iterable[Row]) -> int:
        """Print a table that fits the terminal, row by row; nothing without rows. Return their number."""
        number, rows = count(), iter(rows)
        if not (first := [*islice(rows, 1)]):
            return 0
        rows = chain(first, rows)
        for line in self.table_lines(columns, (row for row, _ in zip(rows, number))):  # noqa: B905
            self.cells(line)
        return next(number)

    def cells(self, cells: Sequence[Cell]) -> None:
        """Print cells on one line."""
        if self.console.is_terminal:
            self.console.print(_text(cells), soft_wrap=True)
        else:
            click.echo("".join(cell.text for cell in cells).rstrip())

    def text(self, lines: Iterable[Sequence[Cell]], most: int) -> Text:
        """Return the first lines as a text of rich."""
        from rich.text import Text

        return Text("\n", no_wrap=True).join(_text(cells) for cells in islice(lines, most))

    def table_lines(self, columns: Sequence[Column], rows: Iterable[Row]) -> Iterator[list[Cell]]:
        """Yield the lines of a table, first the headings. Only the first rows are measured.

        Where the columns do not fit, the first one gets a line of its own.
        """
        all_rows = ([_cell(cell) for cell in row] for row in rows)
        first = list(islice(all_rows, _MEASURED))
        titles = [Cell(column.title, "bold") for column in columns]
        kept, widths, fits = fit(columns, first, self.width)
        if not fits and self.width is not None and len(columns) > 1:
            others = [row[1:] for row in first]
            kept, widths, _ = fit(columns[1:], others, max(1, self.width - _GAP))
            for row in chain([titles], first, all_rows):
                yield [row[0]]
                yield [Cell(" " * _GAP), *self._line(columns[1:], row[1:], kept, widths)]
        else:
            for row in chain([titles], first, all_rows):
                yield self._line(columns, row, kept, widths)

    def _line(
        self,
        columns: Sequence[Column],
        row: Sequence[Cell],
        kept: Sequence[int],
        widths: Sequence[int],
    ) -> list[Cell]:
        line: list[Cell] = []
        for number, width in zip(kept, widths, strict=True):
            column, cell = columns[number], row[number]
            text = cut(cell.text, width) if self.width or column.cut else cell.text
            space = " " * max(0, width - width_of(text))
            padded = space + text if column.right else text + space
            if line:
                line.append(Cell(" " * _GAP))
            line.append(Cell(padded, cell.style))
        return line


def _text(cells: Sequence[Cell]) -> Text:
    from rich.text import Text

    line = Text.assemble(*((cell.text, cell.style) for cell in cells))
    line.rstrip()
    return line


def _cell(cell: str | Cell) -> Cell:
    return Cell(clean(cell)) if isinstance(cell, str) else Cell(clean(cell.text), cell.style)


def fit(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None
) -> tuple[list[int], list[int], bool]:
    """Return the columns to print, their widths in cells, and False if some are cut that must not be."""
    wanted = [
        max(width_of(column.title), *(width_of(row[number].text) for row in rows), 0)
        for number, column in enumerate(columns)
    ]
    wanted = [
        min(most, _MOST) if column.cut else most
        for most, column in zip(wanted, columns, strict=True)
    ]
    kept = [
        number
        for number, column in enumerate(columns)
        if not column.drop or not rows or any(row[number].text for row in rows)
    ]
    if width is None:
        return kept, [wanted[number] for number in kept], True
    while True:
        widths = _shrunk(columns, kept, wanted, width)
        if widths is not None:
            return kept, widths, True
        droppable = [number for number in kept if columns[number].drop]
        if not droppable:
            return kept, _squeezed([wanted[number] for number in kept], width), False
        kept.remove(max(droppable, key=lambda number: columns[number].drop))


def _shrunk(
    columns: Sequence[Column], kept: Sequence[int], wanted: Sequence[int], width: int
) -> list[int] | None:
    """Return the widths of columns that fit; None if they do not."""
    room = width - _GAP * (len(kept) - 1) - sum(wanted[n] for n in kept if not columns[n].cut)
    flexible = sorted((n for n in kept if columns[n].cut), key=lambda n: wanted[n])
    widths = {n: wanted[n] for n in kept}
    for left, number in zip(range(len(flexible), 0, -1), flexible, strict=True):
        share = max(0, room) // left
        if share < min(_LEAST, wanted[number]):
            return None
        widths[number] = min(wanted[number], share)
        room -= widths[number]
    return [widths[n] for n in kept] if room >= 0 else None


def _squeezed(widths: list[int], width: int) -> list[int]:
    """Return widths that fit in any case: the widest columns are cut."""
    room = max(len(widths), width - _GAP * (len(widths) - 1))
    while sum(widths) > room:
        widest = widths.index(max(widths))
        widths[widest] -= 1
    return widths
