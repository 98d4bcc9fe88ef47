"""A soak: several processes run for hours, one of them is killed every 30 seconds, and nothing may be lost.

    python -m tests.campaign.soak --hours 2
    python -m tests.campaign.soak --hours 1 --on postgres

The processes submit so many tasks that they take half of the processors' time. Each minute a line tells
what was done, with the memory, threads and open files of a process that is never killed. At the end the
processes finish, and the broken promises are printed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from taskx import Queue, TaskFilter, TaskStatus

from .sidelog import SideLog
from .soak_audit import Audit
from .soak_shop import Shop, shop_of

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parent.parent
# The package is tests.campaign or campaign; a child must import it under the same name.
_BASE = _FOLDER.parents[__package__.count(".")]
_never = threading.Event()

#: The columns of the table, each with its unit.
COLUMNS = (
    "minutes", "tasks", "kills", "MB", "threads", "files", "file MB", "busy %", "p95 ms", "violations",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Plan:
    """The plan of a soak. Times are in seconds.

    Attributes:
        kill_every: the time between two kills. Every fifth one is a SIGTERM.
        row_every: the time between two lines of the table.
        processes: how many processes run at once.
        rate: how many times a second each process submits; 0: such that all take ``share``.
        share: the part of the processors' time that all processes take together.
        patience: how long the processes have to finish the last tasks.
    """

    kill_every: float = 30.0
    row_every: float = 60.0
    processes: int = 4
    rate: float = 0.0
    share: float = 0.5
    patience: float = 600.0


class Soak:
    """A soak.

    Args:
        folder: for the logs of its processes.
        shop: the application whose tasks they are.
        plan: how many processes run, and how often one is killed.
    """

    def __init__(self, folder: Path, shop: Shop, plan: Plan, seed: int = 0) -> None:
        self.folder = folder
        self.shop = shop
        self.plan = plan
        self.kills = 0
        self._rng = random.Random(seed)
        self._log = SideLog(folder / "side.log", "conductor")
        self.audit = Audit(folder / "side.log")
        self._number = 0
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.orders = 0  # that were paid, and are removed since
        self._looked = busy()
        shop.make()

    def run(self, enough: Callable[[], bool]) -> Iterable[tuple[str, ...]]:
        """Run the soak until ``enough`` returns True, and yield the lines of the table."""
        began = time.monotonic()
        kill_at, row_at = began + self.plan.kill_every, began
        for _ in range(self.plan.processes):
            self._spawn()
        while not enough():
            _never.wait(min(1.0, self.plan.kill_every / 4))
            self.audit.follow()
            self._replace_the_dead()
            now = time.monotonic()
            if now >= kill_at:
                kill_at += self.plan.kill_every
                self._strike()
            if now >= row_at:
                row_at += self.plan.row_every
                yield self._row(now - began)
        (self.folder / "enough").touch()
        self._finish()
        yield self._row(time.monotonic() - began)
        self.end()
        self._judge()

    def end(self) -> None:
        """Let the processes end, and kill those that do not."""
        for child in self._children.values():
            assert child.stdin is not None
            child.stdin.close()
        for name, child in self._children.items():
            try:
                child.wait(self.plan.patience)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                self.audit.violations.append(f"{name} did not end")
        self._children.clear()
        self.audit.follow()

    def _spawn(self) -> None:
        name = f"p{self._number}"
        self._number += 1
        share = self.plan.share * (os.cpu_count() or 1) / self.plan.processes
        with (self.folder / f"{name}.log").open("wb") as output:
            self._children[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", f"{__package__}.soak_worker"),
                    *(str(self.folder), name, str(self.plan.rate), str(share), self.shop.place),
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join((str(_BASE), str(_ROOT)))},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )

    def _strike(self) -> None:
        """Kill a process that is at work, but never the oldest: its memory is watched."""
        names = [name for name in [*self._children][1:] if name in self.audit.at_work]
        if not names:
            return
        name = self._rng.choice(names)
        self.kills += 1
        if self.kills % 5 == 0:
            self._children[name].send_signal(signal.SIGTERM)
            return
        self._log.tell("killing", note=name)
        self._children[name].kill()
        self._children[name].wait()

    def _replace_the_dead(self) -> None:
        for name, child in [*self._children.items()]:
            code = child.poll()
            if code is None:
                continue
            del self._children[name]
            assert child.stdin is not None
            child.stdin.close()
            if code not in (0, -signal.SIGKILL):
                said = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                self.audit.violations.append(f"{name} ended with {code}: {said}")
            self._spawn()

    def _finish(self) -> None:
        """Answer what the killed processes have not, and wait until nothing is unfinished."""
        deadline = time.monotonic() + self.plan.patience
        with self.shop.repository() as repository:
            queue = Queue(repository)
            while time.monotonic() < deadline:
                for task in queue.iter_tasks(type="answer", status="pending"):
                    queue.finish(task.id, "yes")
                self.audit.follow()
                self._settle()
                if not self.audit.unfinished:
                    return
                _never.wait(0.2)

    def _settle(self) -> None:
        """Compare orders and payments: each order is paid once."""
        paid, wrong = self.shop.settle()
        self.orders += len(paid)
        self.audit.settle(paid)
        self.audit.violations += [f"{task} was paid twice, or was never ordered" for task in wrong]

    def _judge(self) -> None:
        lost = list(self.audit.unfinished.items())
        self.audit.violations += [f"{kind or 'task'} {id} was lost" for id, kind in lost[:20]]
        if len(lost) > 20:
            self.audit.violations.append(f"{len(lost) - 20} more tasks were lost")
        self._settle()
        unpaid = self.shop.unpaid()
        self.audit.violations += [f"{task} was ordered and not paid" for task in unpaid]
        with self.shop.repository() as repository:
            failed = repository.list(TaskFilter(status=TaskStatus.FAILED, limit=20))
            nodes = repository.liveness.nodes()
        self.audit.violations += [f"{task.type} {task.id} failed: {task.error}" for task in failed]
        self.audit.violations += [f"node {node.name} was left behind" for node in nodes]

    def _row(self, seconds: float) -> tuple[str, ...]:
        self.audit.follow()
        self._settle()
        waits = self.audit.take_waits()
        p95 = statistics.quantiles(waits, n=20)[-1] / 1e6 if len(waits) > 1 else 0.0
        memory, threads, files = watched(next(iter(self._children.values())).pid)
        before, self._looked = self._looked, busy()
        used, all_time = (now - then for now, then in zip(self._looked, before, strict=True))
        return (
            f"{seconds / 60:.0f}",
            str(self.audit.counts["end"]),
            str(self.kills),
            f"{memory / 2**20:.1f}",
            str(threads),
            str(files),
            f"{self.shop.size() / 2**20:.1f}",
            f"{100 * used / max(all_time, 1):.0f}",
            f"{p95:.1f}",
            str(len(self.audit.violations)),
        )


def watched(pid: int) -> tuple[int, int, int]:
    """Return the resident bytes, the threads and the open files of a process on Linux."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    resident = int(fields["VmRSS"].split()[0]) * 1024
    return resident, int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def busy() -> tuple[int, int]:
    """Return the time for which all processors of the machine have worked, and all their time, on Linux."""
    first = Path("/proc/stat").read_text().partition("\n")[0]
    times = [int(word) for word in first.split()[1:9]]  # the guests' are in the first ones
    return sum(times) - times[3] - times[4], sum(times)


@contextmanager
def application(folder: Path, on: str) -> Iterator[Shop]:
    """Give an application in a folder, or on a PostgreSQL server of its own."""
    if on == "sqlite":
        yield shop_of(str(folder / "app.db"))
        return
    sys.path.insert(0, str(_FOLDER.parent))  # the modules that start the tests' servers are there
    from postgres_server import private

    with private(fsync="on", full_page_writes="on") as server:
        yield shop_of(server.url(server.new_database()))


def line(cells: Iterable[str]) -> str:
    """Return a line of the table."""
    return "  ".join(f"{cell:>10}" for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="soak",
        description="Run processes for hours, kill one every 30 s, and prove the promises.",
    )
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument(
        "--rate", type=float, default=0.0, help="submits a second, per process; else half the load"
    )
    parser.add_argument("--folder", type=Path, default=None, help="keep all files in this folder")
    parser.add_argument("--on", choices=("sqlite", "postgres"), default="sqlite")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="taskx-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(processes=args.processes, rate=args.rate)
    with application(folder, args.on) as shop:
        soak = Soak(folder, shop, plan, random.SystemRandom().randrange(1 << 30))
        ends = time.monotonic() + args.hours * 3600
        print(line(COLUMNS), flush=True)
        try:
            for row in soak.run(lambda: time.monotonic() > ends):
                print(line(row), flush=True)
        finally:
            soak.end()
    counts, violations = soak.audit.counts, soak.audit.violations
    print(
        f"{counts['accepted']} tasks accepted, {counts['begin']} runs, {counts['cancelled']} cancelled, "
        f"{counts['tick']} ticks, {soak.orders} orders, {counts['streamed']} streams, "
        f"{soak.kills} kills, {len(violations)} violations"
    )
    for violation in violations[:50]:
        print(f"VIOLATION {violation}")
    if violations:
        print(f"the database, the side log and the logs of the processes are in {folder}")
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
