"""How keys share the workers, and what a backlog of one key costs the others: run by hand, on SQLite.

In ``tests``: ``python -m campaign.shares parts 0.05``, with the seconds of a task; or ``alone``,
``weights``, ``rates``, ``million``. The virtual workers of ``limiting/test_shares.py`` show the same
exactly. This shows it of processes, and prints what the machine did beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taskx import Config, Queue, SQLiteRepository, Task

#: Seconds in which a key may start one to four tasks.
PERIOD = 4.0
#: The limits of each measurement.
LIMITS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "parts": {"k:": {"share": True}},
    "alone": {"k:": {"share": True}},
    "weights": {"k:": {"share": True}, "k:a": {"share": 3}},
    "rates": {f"k{n}:": {"concurrency": n % 5 + 1, "rate": (n % 4 + 1, PERIOD)} for n in range(20)},
    "million": {"k:": {"concurrency": 2}},
}
#: The most tasks in one transaction.
BATCH = 10_000
_pause = threading.Event().wait


def work(what: str, file: str, log: str, workers: str) -> None:
    """Run tasks until somebody kills this process; write a line for each start and end."""
    queue = Queue(SQLiteRepository(file), Config(worker_num=int(workers)))
    for name, options in LIMITS[what].items():
        queue.limit(name, **options)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @queue.executor("t", max_attempts=1)
    def t(ctx: Any, seconds: float) -> None:
        began = time.time()
        _pause(seconds)
        os.write(out, f"{ctx.task.concurrency_key} {began} {time.time()}\n".encode())

    queue.start()
    print("started", flush=True)
    _pause()


class Place:
    """A file with tasks, and the processes that run them."""

    def __init__(self, what: str, folder: str, processes: int, workers: int) -> None:
        self.file, self.log = f"{folder}/tasks.db", Path(folder) / "log"
        self.log.touch()
        self.queue = Queue(SQLiteRepository(self.file))
        for name, options in LIMITS[what].items():
            self.queue.limit(name, **options)
        self.queue.declare("t")
        path = f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"
        arguments = [sys.executable, __file__, "work", what, self.file, str(self.log), str(workers)]
        self._start = lambda: subprocess.Popen(
            arguments, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
        )
        self.running: list[subprocess.Popen[bytes]] = []
        self._processes = processes

    def start(self) -> None:
        """Start the processes; return when their queues are started."""
        self.running = [self._start() for _ in range(self._processes)]
        for process in self.running:
            assert process.stdout is not None
            process.stdout.readline()

    def submit(self, key: str, number: int, seconds: float) -> None:
        """Store tasks, many in a transaction."""
        for first in range(0, number, BATCH):
            some = range(min(BATCH, number - first))
            self.queue.submit_many(
                Task(type="t", params={"seconds": seconds}, concurrency_key=key) for _ in some
            )

    @property
    def runs(self) -> dict[str, list[tuple[float, float]]]:
        """The times at which tasks of each key began and ended, by the clock."""
        found = defaultdict(list)
        for line in self.log.read_text().splitlines():
            key, began, ended = line.split()
            found[key].append((float(began), float(ended)))
        return found

    @property
    def seconds(self) -> float:
        """The processor time that the processes have used."""
        ticks = 0
        for process in self.running:
            facts = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(facts[11]) + int(facts[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def placed(what: str, processes: int, workers: int) -> Iterator[Place]:
    """Yield a place, and end its processes after the block."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(what, folder, processes, workers)
        try:
            yield place
        finally:
            for process in place.running:
                process.kill()
                process.wait()


def tell(place: Place, **facts: Any) -> None:
    """Print facts, the processor time of each task, and the load of the machine."""
    runs = sum(map(len, place.runs.values()))
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    spent = (
        f"{1000 * place.seconds / max(1, runs):.2f} ms of processor time for each of {runs} tasks"
    )
    print(f"{shown}; {spent}; load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")


def parts(seconds: float) -> None:
    """One key has 100,000 tasks, ten others 100 each a second later: each ends in its fair time."""
    with placed("parts", 2, 4) as place:
        place.submit("k:a", 100_000, seconds)
        place.start()
        _pause(1)
        began = time.time()
        others = [f"k:{n}" for n in range(10)]
        for key in others:
            place.submit(key, 100, seconds)
        fair = 100 * 11 * seconds / 8
        while any(len(place.runs[key]) < 100 for key in others):
            _pause(0.2)
        found = place.runs
        times = sorted(max(end for _, end in found[key]) - began for key in others)
        last = began + times[-1]
        every = sum(began <= end <= last for some in found.values() for _, end in some)
        possible = every * seconds / 8  # what eight workers would need that do nothing else
        tell(
            place,
            fair_time=f"{fair:.2f} s",
            first_key_done_in=f"{times[0] / fair:.2f} of it",
            last_in=f"{times[-1] / fair:.2f}",
            of_which_eight_workers_need=f"{possible / fair:.2f}",
        )


def alone(seconds: float) -> None:
    """A key that is alone has all workers, in 100 samples."""
    with placed("alone", 2, 4) as place:
        place.submit("k:a", 20_000, seconds)
        place.start()
        _pause(1)
        held, before, began = Counter[int](), len(place.runs["k:a"]), time.time()
        names = ["k:a", *(f"k:a\x1f{n}" for n in range(1, 100))]
        for _ in range(100):
            held[len(place.queue.repository.find("turn", names, ("id",)))] += 1
            _pause(0.1)
        rate = (len(place.runs["k:a"]) - before) / (time.time() - began)
        mean = sum(number * times for number, times in held.items()) / 100
        tell(
            place,
            turns_held_of_8=f"{mean:.2f} on average {dict(sorted(held.items()))}",
            rate=f"{rate:.1f}/s, {rate * seconds / 8:.2f} of the ideal one",
        )


def weights(seconds: float) -> None:
    """Weights 3 to 1, over 10 seconds."""
    with placed("weights", 2, 4) as place:
        for key in ("k:a", "k:b"):
            place.submit(key, 20_000, seconds)
        place.start()
        _pause(1)
        before = {key: len(some) for key, some in place.runs.items()}
        _pause(10)
        done = {key: len(some) - before.get(key, 0) for key, some in place.runs.items()}
        tell(place, tasks=done, ratio=f"{done['k:a'] / done['k:b']:.2f}")


def rates(seconds: float) -> None:
    """Each of 200 keys with waiting tasks gets at least 90 % of its rate."""
    with placed("rates", 4, 8) as place:
        keys = [f"k{n % 20}:{n}" for n in range(200)]
        for key in keys:
            place.submit(key, 120, seconds)
        place.start()
        _pause(10)
        began = time.time()
        _pause(60)
        ended, found = time.time(), place.runs
        allowed = lambda n: (n % 4 + 1) * (ended - began) / PERIOD  # noqa: E731
        got = sorted(
            sum(began <= at < ended for at, _ in found[key]) / allowed(n % 20)
            for n, key in enumerate(keys)
        )
        tell(
            place,
            least_part_of_its_rate=f"{got[0]:.2f}",
            of_a_twentieth_of_the_keys=f"{got[10]:.2f}",
            median=f"{got[100]:.2f}",
        )


def million(seconds: float) -> None:
    """How a million tasks of one key delay the first start of another one."""
    with placed("million", 1, 4) as place:
        place.start()
        _delay(place, "before", seconds)
        place.submit("k:a", 1_000_000, 0.05)
        _delay(place, "with a million", seconds)


def _delay(place: Place, what: str, seconds: float) -> None:
    times = []
    for n in range(40):
        began, key = time.time(), f"k:{what} {n}"
        place.queue.submit("t", {"seconds": seconds}, key=key.replace(" ", "-"))
        while not (found := place.runs[key.replace(" ", "-")]):
            _pause(0.01)
        times.append(1000 * (found[0][0] - began))
    times.sort()
    tell(place, **{f"first_start_{what}": f"{times[20]:.0f} ms, 90 % within {times[36]:.0f} ms"})


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(*sys.argv[2:])
    else:
        globals()[sys.argv[1]](float(sys.argv[2]))
