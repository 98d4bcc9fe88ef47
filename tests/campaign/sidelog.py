"""The side log: a file to which each process writes what it really does, line by line.

A line is one ``write`` to a file opened for appending, so lines of several processes never mix, and a kill
never leaves part of a line. Times are from CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One line of the side log.

    Attributes:
        ns: the time, in nanoseconds, taken before the line was written.
        who: the unique name of the process.
        what: the kind of the event.
        id: the id of the task.
        starts: the number of the task's run.
        kind: the type of the task.
        outcome: the outcome.
        note: a note for people.
    """

    ns: int
    who: str
    what: str
    id: str = ""
    starts: int = 0
    kind: str = ""
    outcome: str = ""
    note: str = ""


class SideLog:
    """The writing end of the side log, for the process ``who``."""

    def __init__(self, path: str | Path, who: str) -> None:
        self._who = who
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def tell(self, what: str, id: str = "", **more: Any) -> None:
        line = json.dumps(Event(time.monotonic_ns(), self._who, what, id, **more))
        os.write(self._fd, f"{line}\n".encode())

    def close(self) -> None:
        os.close(self._fd)


def read(path: str | Path) -> list[Event]:
    """Return all events, sorted by time."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return sorted(Event(*json.loads(line)) for line in lines)
