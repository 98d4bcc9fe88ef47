"""The side log: what really happened, told line by line by those who did it.

A line is one ``write`` to a file opened for appending, so lines of many processes never mix and none
is torn by a kill. Moments are CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One line.

    Attributes:
        ns: when, taken before the line was written.
        who: the process, by a name that no other one ever had.
        what: what happened.
        id: the task it happened to.
        starts: in which of its runs.
        kind: the type of the task.
        outcome: how it went.
        note: for people.
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
    """Writes lines as ``who``."""

    def __init__(self, path: str | Path, who: str) -> None:
        self._who = who
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def tell(self, what: str, id: str = "", **more: Any) -> None:
        line = json.dumps(Event(time.monotonic_ns(), self._who, what, id, **more))
        os.write(self._fd, f"{line}\n".encode())

    def close(self) -> None:
        os.close(self._fd)


def read(path: str | Path) -> list[Event]:
    """All events, by time."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return sorted(Event(*json.loads(line)) for line in lines)
