"""A call that must not happen twice, in processes that die at each line of Python in turn.

python -m tests.waiting.once_killed [STEP]         each line, or each STEP-th
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from itertools import count
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


def run(folder: Path, at: int) -> int:
    """Run the task in a child process that dies at a line; return how many lines it ran if it did not."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
        return 0 if os.WIFSIGNALED(status) else int((folder / "lines").read_text())
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def begin() -> None:
        """Count the lines from here on, also those of the functions that are running."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frame.f_trace, frame = trace, frame.f_back
        sys.settrace(trace)

    try:
        make_queue(folder, begin).run_all()
        sys.settrace(None)
        (folder / "lines").write_text(str(lines))
    finally:
        os._exit(0)


def finish(folder: Path) -> bool:
    """Run the task to its end in this process; return True if somebody had to say how the call ended."""
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
    logging.getLogger("taskx").setLevel(logging.ERROR)  # deaths are not news
    step, asked = int(sys.argv[1]) if len(sys.argv) > 1 else 1, 0
    for at in count(1, step):
        folder = Path(tempfile.mkdtemp(prefix="taskx-once-", dir="/dev/shm"))
        try:
            queue = make_queue(folder)
            queue.submit("order")
            queue.repository.close()
            lines = run(folder, at)
            asked += finish(folder)
        finally:
            shutil.rmtree(folder)
        if lines:
            print(f"{lines} lines, {at // step} deaths, asked {asked} times, never paid twice")
            return


if __name__ == "__main__":
    main()
