"""The tasks that a node's threads began last: only these can have killed its process.

Each thread that begins a task notes it in a cell of a small file that is mapped into memory, which costs no
system call, and which the kernel keeps when the process dies. A cell keeps its task until another one is
begun: so a task that kills its process just after it returned is found, too.
"""

from __future__ import annotations

import mmap
import os
from functools import lru_cache
from zlib import crc32

#: Cells of a file: one more than the tasks that can be noted at the same time.
CELLS = 1024
_SIZE = 4 * CELLS


class Began:
    """The tasks that a node's threads began last.

    They are cells. The first one says whether the others are of this boot and complete.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._cells = memoryview(data).cast("I")
        self._free = list(range(CELLS - 1, 0, -1))  # the one that was left last is taken first

    @classmethod
    def make(cls, path: str) -> Began | None:
        """Make the cells of a new node; return None if they cannot be kept."""
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            # Written, not only made longer: a page that has no place on the disk cannot be mapped.
            if os.write(fd, bytes(_SIZE)) != _SIZE:
                return None
            made = cls(mmap.mmap(fd, _SIZE))
        except OSError:
            return None
        finally:
            os.close(fd)
        made._cells[0] = _boot()
        return made

    @classmethod
    def read(cls, path: str) -> Began | None:
        """Return what a dead node noted; None if that cannot be read, or is not complete."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return None
        found = cls(data) if len(data) == _SIZE else None
        return found if found is not None and found._cells[0] == _boot() else None

    def begin(self, task_id: str, starts: int) -> int:
        """Note that a thread begins a task; returns the cell, which is to be left by :meth:`end`."""
        try:
            cell = self._free.pop()
        except IndexError:
            self._cells[0] = 0
            return 0
        self._cells[cell] = crc32(task_id.encode(), starts)
        return cell

    def end(self, cell: int) -> None:
        """Free a cell: its thread has come back, and another one may take it."""
        if cell:
            self._free.append(cell)

    def __contains__(self, start: tuple[str, int]) -> bool:
        task_id, starts = start
        return crc32(task_id.encode(), starts) in self._cells[1:]


@lru_cache(maxsize=1)
def _boot() -> int:
    """A number for this boot of the machine, never 0; the same one always where the system does not say.

    After a power cut a file may hold less than was noted.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return crc32(file.read()) | 1
    except OSError:
        return 1
