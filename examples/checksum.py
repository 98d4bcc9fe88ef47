"""Hash every file of a folder with tasks. The default is the folder of Python's standard library.

    python examples/checksum.py [FOLDER] [--db FILE] [--workers N] [--fresh]

Each file is a task in a SQLite database, and its checksum is the task's result. Stop the program with
Ctrl-C, or kill it with ``kill -9``. If you run it again, it goes on with the remaining files.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import signal
import sys
import sysconfig
import time
import uuid
from pathlib import Path
from typing import Any

import attrs

from taskx import (
    Config,
    Context,
    DuplicateTask,
    Queue,
    SQLiteRepository,
    Task,
    TaskRepository,
    TaskStatus,
    TaskxError,
    executor,
)

CHUNK = 1 << 20


# The work


@executor("checksum")
def checksum(ctx: Context, path: str) -> dict[str, Any]:
    """Hash one file. Between two chunks, report the progress and stop if the task was cancelled."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        whole = os.fstat(file.fileno()).st_size
        while chunk := file.read(CHUNK):
            ctx.token.raise_if_cancelled()
            digest.update(chunk)
            size += len(chunk)
            ctx.progress(100 * size / max(whole, size), f"{size:,} bytes")
    return {"sha256": digest.hexdigest(), "bytes": size}


def make_queue(repository: TaskRepository, workers: int) -> Queue:
    """Return a queue that accepts any number of tasks: with a full buffer, tasks wait in the database."""
    queue = Queue(repository, Config(worker_num=workers, overflow="spill"))
    queue.register_executor(checksum)
    return queue


def make_task(path: str, folder: Path) -> Task:
    """Return the task of a file. Its id is computed from the path, so that no file has two tasks."""
    task = checksum.task(path=path)
    task.id = str(uuid.uuid5(uuid.NAMESPACE_URL, Path(path).as_uri()))
    task.created_by = str(folder)
    return task


def submit_missing(queue: Queue, tasks: list[Task], known: set[str]) -> None:
    """Submit the tasks that are not stored yet, in one transaction."""
    while missing := [task for task in tasks if task.id not in known]:
        try:
            queue.submit_many(missing)
            return
        except DuplicateTask:  # another run of this program at the same time was faster
            known = survey(queue, missing[0].created_by).known


def work_off(queue: Queue, progress: Progress, interruption: Interruption) -> None:
    """Wait until all tasks have ended or the program is interrupted."""
    while not interruption and not queue.drain(timeout=0.1):
        progress.show(count_finished(queue, progress.folder))
    progress.end(count_finished(queue, progress.folder))
    if interruption:
        queue.stop(cancel=True)


# The files


def find_files(folder: Path, database: Path) -> tuple[list[str], list[str]]:
    """Return the files below a folder, and the paths left out: unreadable folders, names not in UTF-8."""
    found: list[str] = []
    left_out: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=lambda e: left_out.append(e.filename)):
        folders[:] = sorted(
            name
            for name in folders
            if name not in ("site-packages", "dist-packages")
            and os.path.join(parent, name) != f"{database}-nodes"
        )
        for path in (os.path.join(parent, name) for name in sorted(names)):
            if not is_text(path):
                left_out.append(path)
            elif is_file(path) and path not in own_files(database):
                found.append(path)
    return found, left_out


def is_text(path: str) -> bool:
    """Return True if a path can be stored as JSON."""
    return path.encode("utf-8", "replace") == os.fsencode(path)


def is_file(path: str) -> bool:
    """Return True for a file or a broken link (which fails when opened), False for a pipe or device."""
    return os.path.isfile(path) or not os.path.exists(path)


def own_files(database: Path) -> list[str]:
    """Return the database's files. Only SQLite may open them: closing one drops the locks on it."""
    return [f"{database}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")]


def start_afresh(database: Path) -> None:
    """Remove the database. Stop with an error if it is in use or is not a TaskX database."""
    if database.exists():
        with SQLiteRepository(database, create=False) as repository:
            if any(node.alive for node in repository.nodes()):
                sys.exit(f"checksum: {database} is in use by another process; nothing was removed")
    for path in own_files(database):
        Path(path).unlink(missing_ok=True)
    shutil.rmtree(f"{database}-nodes", ignore_errors=True)


# The state of the work


@attrs.define
class Survey:
    """The stored tasks of a folder.

    Attributes:
        known: the ids of all its tasks.
        finished: the number of tasks that have ended.
        bytes: the number of bytes that were hashed.
        failed: the tasks of the files that could not be read.
    """

    known: set[str] = attrs.field(factory=set)
    finished: int = 0
    bytes: int = 0
    failed: list[Task] = attrs.field(factory=list)


def survey(queue: Queue, folder: str) -> Survey:
    """Read all tasks of a folder."""
    seen = Survey()
    for task in queue.iter_tasks(created_by=folder):
        seen.known.add(task.id)
        seen.finished += task.status.finished
        if task.status is TaskStatus.COMPLETED:
            seen.bytes += task.result["bytes"]
        elif task.status is TaskStatus.FAILED:
            seen.failed.append(task)
    return seen


def count_finished(queue: Queue, folder: str) -> int:
    """Return how many of a folder's tasks have ended. Counting reads no task."""
    ended = (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)
    pages = [queue.list_tasks(created_by=folder, status=status, limit=0) for status in ended]
    return sum(page.total for page in pages)


# The output


class Progress:
    """A progress bar on a terminal; elsewhere one line every few percent."""

    def __init__(self, folder: str, done: int, total: int) -> None:
        self.folder = folder
        self.total = total
        self._done_before = done
        self._began = time.monotonic()
        self._next_line = 0

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._began

    def show(self, done: int) -> None:
        """Show how many files are done."""
        share = done / self.total
        rate = (done - self._done_before) / max(self.seconds, 0.001)
        text = f"{share:4.0%}  {done:,} of {self.total:,} files  {rate:,.0f} files/s"
        if sys.stdout.isatty():
            width = max(0, min(40, shutil.get_terminal_size().columns - len(text) - 5))
            bar = "#" * int(share * width)
            print(f"\r[{bar:<{width}}] {text}\033[K", end="", flush=True)
        elif 100 * share >= self._next_line:
            self._next_line = int(100 * share) + 5
            print(text, flush=True)

    def end(self, done: int) -> None:
        """Show the progress for the last time."""
        self._next_line = 0
        self.show(done)
        if sys.stdout.isatty():
            print()


def announce(folder: str, done: int, total: int, left_out: list[str]) -> None:
    """Print the work to do."""
    if done == total:
        print(f"All {total:,} files of {folder} are already done. Use --fresh to start again.")
    elif done:
        print(f"{done:,} of {total:,} files of {folder} are already done.")
        print(f"Going on with the other {total - done:,}. Use --fresh to start again.")
    else:
        print(f"Hashing {total:,} files of {folder}.")
    for path in left_out:
        print(f"left out, because it cannot be listed or its name is not text: {path!a}")
    sys.stdout.flush()


def summarise(before: Survey, after: Survey, seconds: float, database: Path) -> None:
    """Print the results, in total and of this run."""
    print(
        f"{after.finished:,} files, {megabytes(after.bytes)}, "
        f"{len(after.failed):,} failed; the checksums are in {database}"
    )
    if hashed := after.finished - before.finished:
        rate = f"{hashed / seconds:,.0f} files/s, {megabytes((after.bytes - before.bytes) / seconds)}/s"
        print(f"This run: {hashed:,} files in {seconds:.1f} s, which is {rate}")
    for task in after.failed[:5]:
        print(f"failed: {task.params['path']}: {task.error}")
    if len(after.failed) > 5:
        print(f"… and {len(after.failed) - 5:,} more")


def megabytes(size: float) -> str:
    """Return a number of bytes as text in MB."""
    return f"{size / 1e6:,.1f} MB"


# The program


class Interruption:
    """True if the program was asked to stop, by Ctrl-C (SIGINT) or SIGTERM.

    The handler only notes the signal: a signal can arrive at any point of the program, even inside the
    queue's own code. A second signal ends the program at once. Even then no work is lost.
    """

    def __init__(self) -> None:
        self.signum = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.signum != 0


def run(root: Path, database: Path, workers: int) -> int:
    """Hash the files that are not hashed yet. Return the exit code."""
    paths, left_out = find_files(root, database)
    tasks = [make_task(path, root) for path in paths]
    folder = str(root)
    with SQLiteRepository(database) as repository:
        queue = make_queue(repository, workers)
        before = survey(queue, folder)
        total = len(before.known.union(task.id for task in tasks))
        announce(folder, before.finished, total, left_out)
        progress = Progress(folder, before.finished, total)
        interruption = Interruption()
        if before.finished < total:
            with queue:
                submit_missing(queue, tasks, before.known)
                work_off(queue, progress, interruption)
        seconds = progress.seconds
        after = survey(queue, folder)
    summarise(before, after, seconds, database)
    if interruption and after.finished < total:
        print(f"Stopped with {total - after.finished:,} files left. Run it again to go on.")
        return 128 + interruption.signum
    return 0


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=sysconfig.get_path("stdlib"))
    parser.add_argument("--db", type=Path, default="checksum.db", metavar="FILE")
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), metavar="N")
    parser.add_argument("--fresh", action="store_true", help="forget all results and start again")
    options = parser.parse_args()
    root, database = Path(options.folder).resolve(), Path(options.db).resolve()
    if not root.is_dir():
        parser.error(f"{root} is not a folder")
    # The summary at the end shows failed tasks, so they are not logged.
    logging.getLogger("taskx").addFilter(lambda record: record.levelno == logging.WARNING)
    try:
        if options.fresh:
            start_afresh(database)
        return run(root, database, options.workers)
    except TaskxError as error:
        print(f"checksum: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # during the search for files
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
