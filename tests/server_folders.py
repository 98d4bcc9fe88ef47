"""The folders of database servers for the tests, and their ends when the tests are killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: A program that runs a server, and ends it with a signal when the parent process ends, in any way. The
#: arguments: the number of the signal, options of ``Popen`` as JSON, and the server's command line.
RUN = """
import json, subprocess, sys, threading
number, options, *command = sys.argv[1:]
server = subprocess.Popen(command, stdin=subprocess.DEVNULL, **json.loads(options))
def end():
    sys.stdin.read()
    server.send_signal(int(number))
threading.Thread(target=end, daemon=True).start()
server.wait()
"""


@contextmanager
def new_folder(prefix: str, pid_file: str) -> Iterator[Path]:
    """Make a folder for a server, and remove those of processes that were killed.

    Args:
        prefix: the beginning of the names of such folders.
        pid_file: the path of the file inside the folder whose first line is the process of the server.
    """
    _remove_abandoned(prefix, pid_file)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int:
    """Lock the file of a server's folder for as long as this process, or a fork of it, lives."""
    new = folder / "new"
    lock = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(folder / "lock")  # only now others look at it
    return lock


def _remove_abandoned(prefix: str, pid_file: str) -> None:
    """End the servers of processes that were killed, and remove their folders."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*/lock"):
        with suppress(OSError):  # it is in use, belongs to another user, or is gone
            lock = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _end(path.parent, pid_file)
                shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(lock)


def _end(folder: Path, pid_file: str) -> None:
    """End the server on a folder, if it still runs."""
    with suppress(OSError, ValueError, IndexError):
        first = int((folder / pid_file).read_text().split()[0])
        if os.fsencode(folder) in Path(f"/proc/{first}/cmdline").read_bytes():
            os.kill(first, signal.SIGQUIT)
