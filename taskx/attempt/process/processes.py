"""Killing a process and all processes that descend from it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from itertools import repeat
from typing import NamedTuple, NoReturn

#: The environment variable that marks a process and all that it starts.
MARK = "TASKX_CHILD"

# Each round finds processes that were started during the last one. Those already found are stopped.
_ROUNDS = 100


def kill_family(leader: int, mark: str = "", *, reaped: bool = False) -> None:
    """Kill a process and all its descendants, as far as they can be found.

    On Linux they are found in ``/proc``: by the ids of their parents, by the session or the process
    group that ``leader`` leads, and by the environment, which a program inherits. A descendant cannot be
    found if it has left the session, its parent has ended, and its environment was emptied. On other
    systems, only ``leader`` and the process group that it leads are killed.

    Args:
        leader: the id of the process; it may be this process, which is killed at the same moment.
        mark: a text that only the environments of these processes contain; empty if there is none.
        reaped: True if the process was waited for, so that its id may belong to another process.
    """
    own = os.getpid()
    found: dict[int, int] = {}  # the group of each process
    for _ in range(_ROUNDS):
        family = _family(leader, mark.encode(), reaped=reaped)
        new = {pid: group for pid, group in family.items() if pid not in found and pid != own}
        if not new:
            break
        for pid in new:  # so that they start none while others are searched
            _signal(pid, signal.SIGSTOP)
        found |= new
    outside = [pid for pid, group in found.items() if group != leader]
    # One call of C, in which no other thread runs Python: an executor in this process must not see the end
    # of its program, and take it for a result.
    with suppress(ProcessLookupError, PermissionError):
        list(map(os.kill, [*outside, -leader], repeat(signal.SIGKILL)))
    for pid in (
        *found,
        -leader,
    ):  # an error, such as that of a process that has ended, ends that call
        _signal(pid, signal.SIGKILL)
    if not reaped:
        _signal(leader, signal.SIGKILL)


def end_family() -> NoReturn:
    """Kill this process and all its descendants, as far as they can be found."""
    kill_family(os.getpid(), os.environ.get(MARK, "").rpartition(" ")[2])
    os._exit(1)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


class _Process(NamedTuple):
    pid: int
    parent: int
    group: int
    session: int


def _family(leader: int, mark: bytes, *, reaped: bool) -> dict[int, int]:
    """Return the processes of a family with their groups."""
    processes = {process.pid: process for process in _processes()}
    found = {
        process.pid
        for process in processes.values()
        if leader in (process.group, process.session)
        or (process.pid == leader and not reaped)
        or (mark and mark in _read(f"/proc/{process.pid}/environ"))
    }
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    parents = list(found)
    while parents:
        for child in children.get(parents.pop(), ()):
            if child not in found:
                found.add(child)
                parents.append(child)
    return {pid: processes[pid].group for pid in found}


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
