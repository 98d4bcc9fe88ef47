"""The peers: similar libraries, each with its defaults and each cell in a process of its own.

Each peer has four worker threads, or four processes if it has no threads. The task returns a value.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

from benchmarks import children
from benchmarks.harness import ELSEWHERE, LATENCIES, RECORD, Cell, Plan
from benchmarks.peers.base import Peer
from benchmarks.peers.services import redis_version

_SERVER = "redis-server"


_ALL = ("backlog", "together", "latency", "sleepers", "elsewhere")
_BEGINS = LATENCIES[:2]


@dataclass(frozen=True)
class Kind:
    """A peer and the amount of its work.

    Attributes:
        name: the name in the table.
        needs: the required distributions, and ``redis-server`` if it is required.
        durability: the failures that its tasks survive.
        module: the module of its class; only the child imports it.
        of: the name of the class.
        options: the options of the class.
        most: the largest number of tasks in a cell.
        samples: the largest number of tasks whose latency is measured.
        told: the latencies that can be measured.
        does: the names in :data:`benchmarks.peers.base.MEASURES` that it can do.
        keeps: what it keeps of a task that has ended.
        slow: True if its setup is so slow that it is measured only once.
    """

    name: str
    needs: tuple[str, ...]
    durability: str
    module: str
    of: str
    options: tuple[tuple[str, Any], ...] = ()
    most: int = 1_000_000
    samples: int = 1_000_000
    told: tuple[str, ...] = LATENCIES
    does: tuple[str, ...] = _ALL
    keeps: str = RECORD
    slow: bool = False

    def make(self, folder: str, workers: int) -> Peer:
        """Return the peer, in this folder."""
        module = import_module(f"benchmarks.peers.{self.module}")
        peer: Peer = getattr(module, self.of)(folder, workers, **dict(self.options))
        return peer


_WITHOUT_THREADS = ("backlog", "together", "latency", "elsewhere")
#: DBOS workers see only tasks of their own process at once; they poll for others once per second.
_IN_ITS_PROCESS = ("backlog", "together", "latency", "sleepers")
#: Peers that are slow, or that slow down with their backlog or their history, get fewer tasks.
KINDS = (
    Kind(
        "TaskX, workers apart",
        (),
        "process",
        "taskx_peer",
        "TaskxApart",
        samples=100,
        slow=True,
    ),
    Kind(
        "ThreadPoolExecutor",
        (),
        "memory",
        "threads",
        "Pool",
        does=(*_IN_ITS_PROCESS, "map"),
        keeps="nothing",
    ),
    Kind("joblib", ("joblib",), "memory", "threads", "Joblib", does=("map",), keeps="nothing"),
    Kind("huey", ("huey",), "full", "threads", "Huey", most=2_000, samples=30, keeps="result"),
    Kind(
        "huey fsync=False",
        ("huey",),
        "none",
        "threads",
        "Huey",
        options=(("fsync", False),),
        most=8_000,
        samples=30,
        keeps="result",
    ),
    Kind(
        "litequeue",
        ("litequeue",),
        "process",
        "threads",
        "LiteQueue",
        most=2_000,
        told=_BEGINS,
        keeps="record",
    ),
    Kind(
        "persist-queue",
        ("persist-queue",),
        "full",
        "threads",
        "PersistQueue",
        most=2_000,
        told=_BEGINS,
        does=_IN_ITS_PROCESS,
        keeps="status",
    ),
    Kind(
        "honker",
        ("honker",),
        "process",
        "honker_peer",
        "Honker",
        most=1_500,
        samples=200,
        slow=True,
        keeps="result",
    ),
    Kind(
        "honker in batches",
        ("honker",),
        "process",
        "honker_peer",
        "HonkerInBatches",
        most=8_000,
        told=_BEGINS,
        keeps="nothing",
    ),
    Kind(
        "flexiq",
        ("flexiq",),
        "process",
        "flexiq_peer",
        "Flexiq",
        most=1_500,
        samples=50,
        slow=True,
    ),
    Kind(
        "tinyjobs",
        ("tinyjobs",),
        "process",
        "tinyjobs_peer",
        "Tinyjobs",
        most=1_500,
        samples=100,
        slow=True,
    ),
    Kind(
        "DBOS",
        ("dbos",),
        "full",
        "dbos_peer",
        "Dbos",
        most=600,
        samples=200,
        does=_IN_ITS_PROCESS,
        slow=True,
    ),
    Kind(
        "django-tasks-db",
        ("django-tasks-db",),
        "full",
        "django_peer",
        "DjangoTasks",
        most=300,
        samples=5,
        does=_WITHOUT_THREADS,
        slow=True,
    ),
    Kind(
        "django-ox",
        ("django-ox",),
        "process",
        "django_peer",
        "DjangoOx",
        most=600,
        samples=100,
        slow=True,
    ),
    Kind(
        "threadmill",
        ("threadmill", _SERVER),
        "server",
        "django_peer",
        "Threadmill",
        most=3_000,
        samples=200,
        slow=True,
    ),
    Kind(
        "RQ",
        ("rq", _SERVER),
        "server",
        "rq_peer",
        "Rq",
        most=1_500,
        samples=200,
        does=_WITHOUT_THREADS,
        slow=True,
    ),
    Kind(
        "Dramatiq",
        ("dramatiq", _SERVER),
        "server",
        "dramatiq_peer",
        "Dramatiq",
        most=3_000,
        samples=200,
        told=_BEGINS,
        slow=True,
        keeps="nothing",
    ),
    Kind(
        "Celery",
        ("celery", _SERVER),
        "server",
        "celery_peer",
        "Celery",
        most=2_000,
        samples=200,
        slow=True,
    ),
)


def on_mongo(url: str) -> tuple[Kind, ...]:
    """Return the peers that store tasks on a MongoDB server."""
    return (
        Kind(
            "Celery",
            ("celery", "kombu"),
            "majority",
            "celery_mongo",
            "CeleryOnMongo",
            options=(("url", url),),
            samples=10,
            does=("backlog", "together", "latency"),
            slow=True,
        ),
    )


def named(name: str, url: str = "") -> Kind:
    """Return the peer with this name; with a URL, one of those on a MongoDB server."""
    [kind] = [kind for kind in (on_mongo(url) if url else KINDS) if kind.name == name]
    return kind


def versions(kinds: Sequence[Kind] = KINDS) -> dict[str, str | None]:
    """Return the version of each requirement of the peers; None for one that is not installed."""
    return {need: _version(need) for kind in kinds for need in kind.needs}


@lru_cache
def _version(need: str) -> str | None:
    if need == _SERVER:
        return redis_version()
    try:
        return importlib.metadata.version(need)
    except importlib.metadata.PackageNotFoundError:
        return None


def cells(plan: Plan) -> list[Cell]:
    """Return all cells of the peers. Cells of a peer that is not installed name what is missing."""
    return [cell for kind in KINDS for cell in _cells_of(kind, plan)]


def cells_on_mongo(plan: Plan, url: str) -> list[Cell]:
    """Return all cells of the peers that store tasks on a MongoDB server."""
    return [cell for kind in on_mongo(url) for cell in _cells_of(kind, plan, url)]


def _cells_of(kind: Kind, plan: Plan, url: str = "") -> list[Cell]:
    count = min(plan.count(kind.durability), kind.most)
    samples = min(plan.samples, kind.samples)
    lacks = ", ".join(need for need in kind.needs if _version(need) is None)
    few = kind.slow or kind.samples < plan.samples
    measures: dict[str, tuple[int, tuple[str, ...], bool]] = {
        "backlog": (count, ("submit", "drain"), kind.slow),
        "together": (count, ("together",), kind.slow),
        "map": (count, ("map",), kind.slow),
        "latency": (samples, kind.told, few),
        "sleepers": (plan.sleepers, ("sleepers",), kind.slow),
        "elsewhere": (min(plan.messages, kind.samples), ELSEWHERE, True),
    }
    return [
        Cell(
            kind.name,
            kind.durability,
            partial(_measure, kind.name, what, number, url),
            figures,
            rival=True,
            once=once,
            lacks=lacks,
            keeps=kind.keeps,
        )
        for what in kind.does
        for number, figures, once in [measures[what]]
    ]


def _measure(name: str, what: str, count: int, url: str, folder: str) -> dict[str, float]:
    """Measure in a child, so that no peer affects another one or TaskX."""
    printed = children.run("-m", "benchmarks.peers", name, what, str(count), folder, url)
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    return figures
