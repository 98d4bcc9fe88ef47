"""TaskX: a task framework that you embed in your program. You need no broker.

Tasks are records in a repository. A bounded queue feeds worker threads. Executors get a token for
cooperative cancellation. A process that is killed loses no task.

PYTEST_DONT_REWRITE: without this word, pytest warns if the program that runs it has imported TaskX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taskx.attempt.context import Context
from taskx.attempt.current import TaskLogFilter, current_context
from taskx.attempt.executors import BoundExecutor, Executor, TaskExecutor, executor
from taskx.attempt.registry import Middleware
from taskx.attempt.transactions import Transaction
from taskx.node.hooks import Hook
from taskx.queue.bulk import Bulk
from taskx.queue.queue import Queue, run
from taskx.queue.schedule import Schedule, Tick, tick_of
from taskx.stores.controls import Paused
from taskx.stores.eight import TaskRepository
from taskx.stores.memory import MemoryRepository
from taskx.stores.sqlite import SQLiteRepository
from taskx.stores.urls import open_repository
from taskx.tasks.clock import Clock, SystemClock
from taskx.tasks.codec import Codec, ZlibCodec
from taskx.tasks.config import Config
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    NodeNotFound,
    PayloadError,
    QueueFull,
    QueueStopped,
    RepositoryCorrupt,
    RepositoryError,
    RepositoryUnavailable,
    ScheduleNotFound,
    SchemaMismatch,
    TaskCancelled,
    TaskFailed,
    TaskNotFound,
    TaskxError,
    UnknownTaskType,
)
from taskx.tasks.handles import TaskHandle
from taskx.tasks.model import Attempt, Task, TaskCount, TaskFilter, TaskPage, TaskStatus
from taskx.tasks.retry import Permanent, Retry, RetryPolicy, Snooze
from taskx.tasks.ticks import every
from taskx.tasks.token import CancelToken

if TYPE_CHECKING:
    from taskx.insight.changelog import Change
    from taskx.insight.diagnosis import Diagnosis
    from taskx.insight.failures import FailureGroup, Failures
    from taskx.insight.health import Health
    from taskx.insight.history import History, TypeHistory
    from taskx.insight.nodes import NodeInfo, RunningTask
    from taskx.insight.places import Place
    from taskx.insight.stats import Percentiles, Stats, TypeStats
    from taskx.node.threads import ThreadStack
    from taskx.queue.flows import Flow, FlowHandle, FlowSummary, chain, group
    from taskx.queue.tuning import Tuned, TunedType
    from taskx.stores.mongo import MongoRepository
    from taskx.tasks.findings import Check, Problem, Reason

__version__ = "0.2.0"

__all__ = [
    "Attempt",
    "BoundExecutor",
    "Bulk",
    "CancelReason",
    "CancelToken",
    "Change",
    "Check",
    "Clock",
    "Codec",
    "Config",
    "ConfigurationError",
    "Context",
    "Diagnosis",
    "DuplicateTask",
    "Executor",
    "FailureGroup",
    "Failures",
    "Flow",
    "FlowHandle",
    "FlowSummary",
    "Health",
    "History",
    "Hook",
    "InvalidTransition",
    "MemoryRepository",
    "Middleware",
    "MongoRepository",
    "NodeInfo",
    "NodeNotFound",
    "Paused",
    "PayloadError",
    "Percentiles",
    "Permanent",
    "Place",
    "Problem",
    "Queue",
    "QueueFull",
    "QueueStopped",
    "Reason",
    "RepositoryCorrupt",
    "RepositoryError",
    "RepositoryUnavailable",
    "Retry",
    "RetryPolicy",
    "RunningTask",
    "SQLiteRepository",
    "Schedule",
    "ScheduleNotFound",
    "SchemaMismatch",
    "Snooze",
    "Stats",
    "SystemClock",
    "Task",
    "TaskCancelled",
    "TaskCount",
    "TaskExecutor",
    "TaskFailed",
    "TaskFilter",
    "TaskHandle",
    "TaskLogFilter",
    "TaskNotFound",
    "TaskPage",
    "TaskRepository",
    "TaskStatus",
    "TaskxError",
    "ThreadStack",
    "Tick",
    "Transaction",
    "Tuned",
    "TunedType",
    "TypeHistory",
    "TypeStats",
    "UnknownTaskType",
    "ZlibCodec",
    "chain",
    "current_context",
    "every",
    "executor",
    "group",
    "open_repository",
    "run",
    "tick_of",
]


#: Names that many programs do not need, and the modules that have them. They are imported at first use.
_LATER = {
    "Change": "taskx.insight.changelog",
    "Check": "taskx.tasks.findings",
    "Diagnosis": "taskx.insight.diagnosis",
    "FailureGroup": "taskx.insight.failures",
    "Failures": "taskx.insight.failures",
    "Flow": "taskx.queue.flows",
    "FlowHandle": "taskx.queue.flows",
    "FlowSummary": "taskx.queue.flows",
    "Health": "taskx.insight.health",
    "History": "taskx.insight.history",
    "MongoRepository": "taskx.stores.mongo",
    "NodeInfo": "taskx.insight.nodes",
    "Percentiles": "taskx.insight.stats",
    "Place": "taskx.insight.places",
    "Problem": "taskx.tasks.findings",
    "Reason": "taskx.tasks.findings",
    "RunningTask": "taskx.insight.nodes",
    "Stats": "taskx.insight.stats",
    "ThreadStack": "taskx.node.threads",
    "Tuned": "taskx.queue.tuning",
    "TunedType": "taskx.queue.tuning",
    "TypeHistory": "taskx.insight.history",
    "TypeStats": "taskx.insight.stats",
    "chain": "taskx.queue.flows",
    "group": "taskx.queue.flows",
}


def __getattr__(name: str) -> Any:
    """Import a name that many programs do not need when it is first used."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
