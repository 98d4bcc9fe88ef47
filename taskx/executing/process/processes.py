"""Killing a process and all processes that descend from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

# Each round finds processes that were started during the last one. Those already found are stopped.
_ROUNDS = 100


def kill_family(root: int | None, mark: str = "") -> None:
    """Kill a process and all its descendants, as far as they can be found.

    On Linux they are found in ``/proc``: by the ids of their parents, by the session or the process
    group that ``root`` leads, and by the environment, which a program inherits. A descendant cannot be
    found if it has left the session, its parent has ended, and its environment was emptied. On other
    systems, only ``root`` and the process group that it leads are killed.

    Args:
        root: the id of a process that was not waited for yet; None if it was.
        mark: a text that only the environments of these processes contain; empty if there is none.
    """
    found: set[int] = set()
    for _ in range(_ROUNDS):
        new = _family(root, mark.encode()) - found
        if not new:
            break
        _signal(new, signal.SIGSTOP)  # so that they start none while others are searched
        found |= new
    _signal(found, signal.SIGKILL)
    if root is not None:
        with suppress(ProcessLookupError, PermissionError):  # root does not lead a process group
            os.killpg(root, signal.SIGKILL)
        _signal([root], signal.SIGKILL)


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


class _Process(NamedTuple):
    pid: int
    parent: int
    group: int
    session: int


def _family(root: int | None, mark: bytes) -> set[int]:
    processes = _processes()
    found = {
        process.pid
        for process in processes
        if (root is not None and root in (process.pid, process.group, process.session))
        or (mark and mark in _read(f"/proc/{process.pid}/environ"))
    }
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    parents = list(found)
    while parents:
        for child in children.get(parents.pop(), ()):
            if child not in found:
                found.add(child)
                parents.append(child)
    return found


def _processes() -> list[_Process]:
    """Return all processes that have not ended; empty on a system without ``/proc``."""
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []
    found = []
    for pid in pids:
        # After the name, which may contain anything: state, parent, group, session.
        state, *ids = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[:4] or [b"Z"]
        if state not in (b"Z", b"X"):
            found.append(_Process(pid, *map(int, ids)))
    return found


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # the process has ended, or belongs to another user
        return b""
