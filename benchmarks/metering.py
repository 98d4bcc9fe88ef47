"""The processor time of processes. Unlike elapsed time, it hardly depends on what else runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def seconds_of(pid: int) -> float:
    """Return the processor seconds of a process and of all its descendants, also of those that have ended.

    Linux only. A descendant whose parent has ended before it does not count.
    """
    total = 0.0
    with suppress(
        OSError
    ):  # it ends in this moment: its time is then that of its parent's children
        total += time.clock_gettime(
            (~pid << 3) | 2
        )  # the clock of a process; see clock_getcpuclockid(3)
        folder = Path(f"/proc/{pid}")
        ended = (folder / "stat").read_text().rpartition(")")[2].split()[13:15]
        total += sum(map(int, ended)) / _TICKS
        for children in folder.glob("task/*/children"):
            total += sum(map(seconds_of, map(int, children.read_text().split())))
    return total


def busy_seconds() -> float:
    """Return the processor seconds of all programs on this machine since it started."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICKS


class Meter:
    """The processor time that is used in its block, by role: ``with Meter(server=pid) as meter: ...``.

    Args:
        pids: the process of each role. Its descendants count, too.

    Attributes:
        used: the seconds of each role, and ``"own"``: those of this process without its descendants.
        elapsed: the seconds that the block took.
        others: the seconds of all other programs on this machine.
    """

    def __init__(self, **pids: int) -> None:
        self._pids: Mapping[str, int] = pids
        self.used: dict[str, float] = {}

    def _now(self) -> dict[str, float]:
        return {
            "own": time.process_time(),
            **{role: seconds_of(pid) for role, pid in self._pids.items()},
        }

    def __enter__(self) -> Meter:
        self._before, self._busy, self._began = self._now(), busy_seconds(), time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        after = self._now()
        self.elapsed = time.perf_counter() - self._began
        self.used = {role: after[role] - self._before[role] for role in after}
        self.others = busy_seconds() - self._busy - sum(self.used.values())
