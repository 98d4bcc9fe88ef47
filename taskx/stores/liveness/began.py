"""The tasks that a node's threads began last: only these can have killed its process.

Each thread notes the task that it begins in a cell of a small file that is mapped into memory. This needs
no system call, and the kernel keeps the file when the process dies. A cell keeps its task until another
task begins, so a task that kills its process just after it returned is found, too.
"""

from __future__ import annotations

import mmap
import os
from functools import lru_cache
from zlib import crc32

#: The number of cells in a file: one more than the number of tasks that can be noted at a time.
CELLS = 1024
_SIZE = 4 * CELLS


class Began:
    """The tasks that a node's threads began last, one in a cell.

    The first cell says whether the other cells are complete and were written since this boot.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._cells = memoryview(data).cast("I")
        self._free = list(range(CELLS - 1, 0, -1))  # a stack: the cell freed last is taken first
        #: Frees a cell: its thread has returned, and another thread may use it.
        self.end = self._free.append

    @classmethod
    def make(cls, path: str) -> Began | None:
        """Create the cells of a new node; return None if the file cannot be created."""
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            # Write zeros instead of extending the file: a page without space on the disk cannot be used.
            if os.write(fd, bytes(_SIZE)) != _SIZE:
                return None
            made = cls(mmap.mmap(fd, _SIZE))
        except OSError:
            return None
        finally:
            os.close(fd)
        made._cells[0] = boot()
        return made

    @classmethod
    def read(cls, path: str) -> Began | None:
        """Return the cells of a dead node; None if they cannot be read or are not complete."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return None
        found = cls(data) if len(data) == _SIZE else None
        return found if found is not None and found._cells[0] == boot() else None

    def begin(self, task_id: str, starts: int) -> int:
        """Note that a thread begins a task; return its cell, to be freed with :attr:`end`; 0 for none."""
        try:
            cell = self._free.pop()
        except IndexError:
            self._cells[0] = 0
            return 0
        self._cells[cell] = crc32(task_id.encode(), starts)
        return cell

    def __contains__(self, start: tuple[str, int]) -> bool:
        task_id, starts = start
        return crc32(task_id.encode(), starts) in self._cells[1:]


@lru_cache(maxsize=1)
def boot() -> int:
    """Return a number for this boot of the machine, never 0; always 1 if the system does not tell.

    Cells of an earlier boot are not used: after a power cut a file may lack tasks that were noted.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return crc32(file.read()) | 1
    except OSError:
        return 1
