"""A call that must not happen twice, whose process dies between any two bytecodes of Python.

A process that is killed leaves the files as they are. So the task runs once, and before each bytecode the
files are compared with those before. A task goes on from each state that they have had.

python -m tests.waiting.once_killed            or only before each line: … once_killed lines
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from taskx import SQLiteRepository
from taskx.testing import ManualQueue


def make_queue(folder: Path, begin: Callable[[], object] = dict) -> ManualQueue:
    """Return a queue on the tasks in a folder, whose executor leaves a line there for each call.

    The executor calls ``begin()`` first.
    """
    queue = ManualQueue(SQLiteRepository(folder / "tasks.db", "process"))

    def pay() -> str:
        with (folder / "paid").open("a") as file:
            file.write("paid\n")
        return "receipt"

    @queue.executor("order", max_crashes=10)
    def order(ctx: Any) -> str:
        begin()
        return str(ctx.once("pay", pay))

    return queue


def paid(folder: Path) -> int:
    """Return how often the call was made."""
    file = folder / "paid"
    return file.read_text().count("paid") if file.exists() else 0


class States:
    """The states that the files of a folder have had, each in a folder of its own.

    Args:
        folder: the folder.
        copies: the folder of the copies.
        only_lines: look only before each line.

    Attributes:
        copies: the folders, in order.
        moments: the number of moments at which the process may have died.
        lines: the number of lines among them.
    """

    def __init__(self, folder: Path, copies: Path, *, only_lines: bool) -> None:
        self._folder, self._under, self._opcodes = folder, copies, not only_lines
        self._last: dict[str, bytes] = {}
        self.copies: list[Path] = []
        self.moments = self.lines = 0

    def watch(self) -> None:
        """Look before each bytecode from here on, also of the functions that are running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frame.f_trace_opcodes, frame.f_trace = self._opcodes, self._trace
            frame = frame.f_back
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes = self._opcodes
        self.lines += event == "line"
        self.moments += 1
        now = dict(self._read())
        if now != self._last:
            self._last = now
            self.copies.append(copy := self._under / str(len(self.copies)))
            for name, content in now.items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(content)
        return self._trace

    def _read(self) -> Iterator[tuple[str, bytes]]:
        for folder, _, names in os.walk(self._folder):
            for name in names:
                if not name.endswith("-shm"):  # it is made again by whoever opens the tasks first
                    path = os.path.join(folder, name)
                    with open(path, "rb", buffering=0) as file:
                        yield os.path.relpath(path, self._folder), file.read()


def go_on(folder: Path) -> bool:
    """Run the task to its end; return True if somebody had to say how the call ended."""
    queue = make_queue(folder)
    queue.run_all()
    [task] = queue.iter_tasks(type="order")
    asked = task.status == "pending"
    assert paid(folder) <= 1
    if asked and paid(folder):
        assert queue.finish(f"{task.id}/pay", "receipt")
    elif asked:
        assert queue.finish(f"{task.id}/pay", again=True)
    queue.run_all()
    [task] = queue.iter_tasks(type="order")
    assert task.result == "receipt", task
    assert paid(folder) == 1, f"paid {paid(folder)} times"
    queue.repository.close()
    return asked


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="taskx-once-", dir="/dev/shm") as name:
        folder = Path(name, "of the task")
        folder.mkdir()
        states = States(folder, Path(name, "copies"), only_lines="lines" in sys.argv)
        queue = make_queue(folder, states.watch)
        queue.submit("order")
        queue.run_all()
        sys.settrace(None)
        queue.repository.close()
        asked = sum(map(go_on, states.copies))
        print(
            f"{states.lines} lines, {states.moments} moments, {len(states.copies)} states, asked {asked} "
            "times, never paid twice"
        )


if __name__ == "__main__":
    main()
