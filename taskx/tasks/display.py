"""A live display for people: a bar where the package rich is installed, else lines of text.

Everything is written to ``sys.stderr``, so that it does not mix with a program's output.
"""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from taskx.tasks.payload import clean_text
from taskx.tasks.timing import DEFAULT_TIMING, Timing

# Most characters of the words beside a state.
_MOST_WORDS = 200


def printable(text: str) -> str:
    """Return a text in which control characters are escapes such as ``\\x1b``, which no terminal obeys.

    Characters that change the direction of the text are escaped, too.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class _Screen(Protocol):
    def draw(self, done: int, total: int | None, words: str) -> None: ...
    def close(self) -> None: ...


class Display:
    """Shows how much is done, and some words. Nothing is shown before the first call.

    After :meth:`close` the next call begins a new display. A display that is left open is closed when it is
    dropped, or when the program ends.

    Args:
        title: what the display is about.
        total: the number of things to do; None if it is not known.
        timing: says how often a new state is shown.
    """

    def __init__(
        self, title: str, total: int | None = None, timing: Timing = DEFAULT_TIMING
    ) -> None:
        self._timing = timing
        self._title, self._total = title, total
        self._done = self._failed = self._stored = 0
        self._screen: _Screen | None = None
        self._close: Callable[[], object] | None = None

    def add(self, done: int = 0, failed: int = 0, *, stored: int = 0) -> None:
        """Count more things as done, or as failed. The last one ends the display.

        ``stored`` is the number of those done that were done before.
        """
        self._failed += failed
        self._stored += stored
        counts = {"stored": self._stored, "failed": self._failed}
        words = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        self.update(self._done + done + failed, words)
        if self._done == self._total:  # the caller may not come back: ``zip(names, map)`` does not
            self.close()

    def update(self, done: int, words: str = "", total: int | None = None) -> None:
        """Show a new state."""
        self._done = done
        self._total = self._total if total is None else total
        if self._screen is None:
            title = printable(self._title)
            self._screen = _bar(title, self._timing) or _Lines(title, self._timing)
            self._close = weakref.finalize(self, self._screen.close)
        self._screen.draw(done, self._total, clean_text(printable(words), _MOST_WORDS))

    def close(self) -> None:
        """Show the last state for good. May be called any number of times."""
        self._screen = None
        if self._close is not None:
            self._close()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Lines:
    """Lines of text: one every few seconds, and the last one."""

    def __init__(self, title: str, timing: Timing) -> None:
        self._title, self._every = title, timing.line_every
        self._next, self._unsaid = time.monotonic() + self._every, ""

    def draw(self, done: int, total: int | None, words: str) -> None:
        share = f" of {total:,} ({done / total:.0%})" if total else ""
        self._unsaid = f"{self._title}: {done:,}{share}" + (f", {words}" if words else "")
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._write()

    def _write(self) -> None:
        line, self._unsaid = self._unsaid, ""
        if line and sys.stderr is not None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def close(self) -> None:
        self._write()


class _Bar:
    """A bar in a terminal or a notebook, drawn by rich.

    It is drawn without the thread of rich, which an interrupt could leave behind.
    """

    def __init__(self, title: str, progress: Any, timing: Timing) -> None:
        self._every = timing.bar_every
        self._progress, self._next = progress, -math.inf
        self._bar = progress.add_task(title, total=None, words="")

    def draw(self, done: int, total: int | None, words: str) -> None:
        self._progress.update(self._bar, completed=done, total=total, words=words)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._progress.start()
            self._progress.refresh()

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()


def _bar(title: str, timing: Timing) -> _Bar | None:
    """Return a bar, or None if a package is not installed or nothing can be redrawn."""
    try:
        from rich import console, progress
    except ImportError:
        return None
    screen = console.Console(stderr=True)
    if screen.is_jupyter and find_spec("ipywidgets") is None:
        return None  # rich would only warn that it is missing
    if not (screen.is_terminal or screen.is_jupyter) or screen.is_dumb_terminal:
        return None
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[words]}", markup=False),
    )
    # Output that does not go to the terminal must go on to where it goes.
    redirect = sys.stdout is not None and sys.stdout.isatty()
    return _Bar(
        title,
        progress.Progress(*columns, console=screen, auto_refresh=False, redirect_stdout=redirect),
        timing,
    )
