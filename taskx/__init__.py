"""TaskX: a task framework that you embed in your program. You need no broker.

Tasks are records in a repository. A bounded queue feeds worker threads. Executors get a token for
cooperative cancellation. A process that is killed loses no task.

PYTEST_DONT_REWRITE: without this word, pytest warns if the program that runs it has imported TaskX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taskx.common.config import Config
from taskx.common.controls import Paused
from taskx.common.handles import TaskHandle
from taskx.common.hooks import Hook
from taskx.core.clock import Clock, SystemClock
from taskx.core.codec import Codec, ZlibCodec
from taskx.core.errors import (
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
from taskx.core.model import Attempt, Task, TaskCount, TaskFilter, TaskPage, TaskStatus
from taskx.core.retry import Permanent, Retry, RetryPolicy, Snooze
from taskx.core.ticks import every
from taskx.core.token import CancelToken
from taskx.executing.context import Context
from taskx.executing.current import TaskLogFilter, current_context
from taskx.executing.executors import BoundExecutor, Executor, TaskExecutor, executor
from taskx.executing.registry import Middleware
from taskx.executing.transactions import Transaction
from taskx.queue import Queue, run
from taskx.schedules.schedule import Schedule, Tick, tick_of
from taskx.storage.eight import TaskRepository
from taskx.storage.memory import MemoryRepository
from taskx.storage.sqlite import SQLiteRepository
from taskx.storage.urls import open_repository
from taskx.submitting.bulk import Bulk

if TYPE_CHECKING:
    from taskx.core.findings import Check, Problem, Reason
    from taskx.flows import Flow, FlowHandle, FlowSummary, chain, group
    from taskx.inspecting.changelog import Change
    from taskx.inspecting.diagnosis import Diagnosis
    from taskx.inspecting.failures import FailureGroup, Failures
    from taskx.inspecting.health import Health
    from taskx.inspecting.history import History, TypeHistory
    from taskx.inspecting.nodes import NodeInfo, RunningTask
    from taskx.inspecting.places import Place
    from taskx.inspecting.stats import Percentiles, Stats, TypeStats
    from taskx.running.threads import ThreadStack
    from taskx.storage.mongo import MongoRepository
    from taskx.upkeep.tuning import Tuned, TunedType

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
    "Change": "taskx.inspecting.changelog",
    "Check": "taskx.core.findings",
    "Diagnosis": "taskx.inspecting.diagnosis",
    "FailureGroup": "taskx.inspecting.failures",
    "Failures": "taskx.inspecting.failures",
    "Flow": "taskx.flows",
    "FlowHandle": "taskx.flows",
    "FlowSummary": "taskx.flows",
    "Health": "taskx.inspecting.health",
    "History": "taskx.inspecting.history",
    "MongoRepository": "taskx.storage.mongo",
    "NodeInfo": "taskx.inspecting.nodes",
    "Percentiles": "taskx.inspecting.stats",
    "Place": "taskx.inspecting.places",
    "Problem": "taskx.core.findings",
    "Reason": "taskx.core.findings",
    "RunningTask": "taskx.inspecting.nodes",
    "Stats": "taskx.inspecting.stats",
    "ThreadStack": "taskx.running.threads",
    "Tuned": "taskx.upkeep.tuning",
    "TunedType": "taskx.upkeep.tuning",
    "TypeHistory": "taskx.inspecting.history",
    "TypeStats": "taskx.inspecting.stats",
    "chain": "taskx.flows",
    "group": "taskx.flows",
}


def __getattr__(name: str) -> Any:
    """Import a name that many programs do not need when it is first used."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
