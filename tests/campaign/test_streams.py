"""A campaign about streams: what readers have in the end is what the last attempt has emitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import PATIENCE, eventually

from taskx import Queue, SQLiteRepository
from taskx.tasks.streams import STREAM

from . import streams_worker

SCRIPT = Path(streams_worker.__file__)


def start(*args: object) -> subprocess.Popen[bytes]:
    path = f"{SCRIPT.parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    words = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})


def killed(folder: Path, *, chunks: int, pause: float, readers: int, kills: int) -> list[dict]:
    """Kill the producer of a stream while others read it; return what each reader has in the end."""
    file = folder / "tasks.db"
    queue = Queue(SQLiteRepository(file))
    queue.declare("speak")
    last = folder / "last"  # a producer ends only after the last kill, however late that comes
    handle = queue.submit("speak", {"chunks": chunks, "pause": pause, "until": str(last)})
    notes = lambda: queue.repository.notes(STREAM)  # noqa: E731
    producer = start("produce", file, 1)
    others = [start("read", file, handle.id, n, folder / f"{n}.json") for n in range(readers)]
    try:
        known: set[str] = set()
        for _ in range(kills):
            # After some notes of its own: a later start has other names.
            before = {name.rpartition("/")[0] for name in known}
            eventually(
                lambda before=before: (
                    sum(name.rpartition("/")[0] not in before for name in notes()) >= 3
                )
            )
            producer.kill()
            producer.wait()
            known = {*notes()}
            producer = start("produce", file, 1)
        last.touch()
        assert handle.result(PATIENCE * 10) == chunks
        for other in others:
            assert other.wait(PATIENCE) == 0
    finally:
        for process in (producer, *others):
            process.kill()
            process.wait()
    assert handle.task().starts == kills + 1
    return [json.loads((folder / f"{n}.json").read_text("utf-8")) for n in range(readers)]


def check(read: list[dict], chunks: int, starts: int) -> None:
    """Check that each reader has the whole output of the last attempt, without a gap or a repeat."""
    for one in read:
        positions, values = zip(*one["values"], strict=True)
        assert [number for _, number in values] == [*range(chunks)]
        assert [*positions] == [f"{starts}-{number}" for number in range(1, chunks + 1)]
        assert one["restarts"] <= starts - 1
    kept = {start for start, _ in read[0]["values"][0] and [v for _, v in read[0]["values"]]}
    assert starts in kept  # emitted by the last one; the others by steps that were not called again


@pytest.mark.process
def test_readers_have_what_the_last_attempt_has_emitted(tmp_path):
    read = killed(tmp_path, chunks=1000, pause=0.001, readers=2, kills=2)
    check(read, 1000, 3)


def costs(folder: Path, *, streams: int, chunks: int, pause: float) -> float:
    """Return the commits a second while so many tasks emit."""
    file = folder / "tasks.db"
    queue = Queue(SQLiteRepository(file))
    queue.declare("speak")
    for _ in range(streams):
        queue.submit("speak", {"chunks": chunks, "pause": pause})
    producer = start("produce", file, streams)
    seen, marks = set(), []
    try:
        eventually(lambda: len(queue.repository.notes(STREAM)) >= streams)
        begun = time.monotonic()
        while queue.count_tasks(status="completed") < streams // 2:
            mark = queue.repository.version()
            if mark not in seen:
                seen.add(mark)
                marks.append(mark)
            time.sleep(0.005)  # blocks on purpose: it takes samples
        return len(marks) / (time.monotonic() - begun)
    finally:
        producer.kill()
        producer.wait()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = killed(Path(folder), chunks=10_000, pause=0.002, readers=5, kills=2)
        check(found, 10_000, 3)
        print([(one["restarts"], one["breaks"]) for one in found], "restarts and breaks of each")
    with tempfile.TemporaryDirectory() as folder:
        print(
            round(costs(Path(folder), streams=100, chunks=500, pause=0.02), 1), "commits a second"
        )
