"""TaskX: a task framework that you embed in your program. You need no broker.

Tasks are records in a repository. A bounded queue feeds worker threads. Executors get a token for
cooperative cancellation. A process that is killed loses no task.

PYTEST_DONT_REWRITE: without this word, pytest warns if the program that runs it has imported TaskX.
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers know the name; importing it from typing takes milliseconds
if TYPE_CHECKING:
    from taskx.attempt.context import Context
    from taskx.attempt.current import TaskLogFilter, current_context
    from taskx.attempt.executors import (
        BatchExecutor,
        BoundExecutor,
        Executor,
        TaskExecutor,
        executor,
    )
    from taskx.attempt.registry import Middleware
    from taskx.attempt.together import BatchContext, BatchTask
    from taskx.attempt.transactions import Transaction
    from taskx.attempt.waiting import NotDone, Parked, Uncertain
    from taskx.insight.changelog import Change
    from taskx.insight.counted import KeyUsage, Usage
    from taskx.insight.diagnosis import Diagnosis
    from taskx.insight.failures import FailureGroup, Failures
    from taskx.insight.health import Health
    from taskx.insight.history import History, TypeHistory
    from taskx.insight.limits import LimitInfo
    from taskx.insight.nodes import NodeInfo, RunningTask
    from taskx.insight.places import Place
    from taskx.insight.stats import Percentiles, Stats, TypeStats
    from taskx.node.hooks import Hook
    from taskx.node.threads import ThreadStack
    from taskx.queue.bulk import Bulk
    from taskx.queue.flows import Flow, FlowHandle, FlowSummary, answer, chain, group
    from taskx.queue.mapping import MapOutcome, MapResults
    from taskx.queue.queue import Queue, run
    from taskx.queue.schedule import Schedule, Tick, tick_of
    from taskx.queue.tuning import Tuned, TunedType
    from taskx.stores.controls import Paused
    from taskx.stores.eight import TaskRepository
    from taskx.stores.memory import MemoryRepository
    from taskx.stores.mongo import MongoRepository
    from taskx.stores.postgres import PostgresRepository
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
    from taskx.tasks.findings import Check, Problem, Reason
    from taskx.tasks.handles import TaskHandle
    from taskx.tasks.model import Attempt, Task, TaskCount, TaskFilter, TaskPage, TaskStatus
    from taskx.tasks.refusals import retry_after
    from taskx.tasks.retry import Permanent, Retry, RetryPolicy, Snooze
    from taskx.tasks.streams import Chunk
    from taskx.tasks.ticks import every
    from taskx.tasks.token import CancelToken

__version__ = "0.2.0"

__all__ = [
    "Attempt",
    "BatchContext",
    "BatchExecutor",
    "BatchTask",
    "BoundExecutor",
    "Bulk",
    "CancelReason",
    "CancelToken",
    "Change",
    "Check",
    "Chunk",
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
    "KeyUsage",
    "LimitInfo",
    "MapOutcome",
    "MapResults",
    "MemoryRepository",
    "Middleware",
    "MongoRepository",
    "NodeInfo",
    "NodeNotFound",
    "NotDone",
    "Parked",
    "Paused",
    "PayloadError",
    "Percentiles",
    "Permanent",
    "Place",
    "PostgresRepository",
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
    "Uncertain",
    "UnknownTaskType",
    "Usage",
    "ZlibCodec",
    "answer",
    "chain",
    "current_context",
    "every",
    "executor",
    "group",
    "open_repository",
    "retry_after",
    "run",
    "tick_of",
]

#: The module of each public name, which is imported when the name is first used.
_HOMES = {
    "taskx.attempt.context": "Context",
    "taskx.attempt.current": "TaskLogFilter current_context",
    "taskx.attempt.executors": "BatchExecutor BoundExecutor Executor TaskExecutor executor",
    "taskx.attempt.registry": "Middleware",
    "taskx.attempt.together": "BatchContext BatchTask",
    "taskx.attempt.transactions": "Transaction",
    "taskx.attempt.waiting": "NotDone Parked Uncertain",
    "taskx.insight.changelog": "Change",
    "taskx.insight.counted": "KeyUsage Usage",
    "taskx.insight.diagnosis": "Diagnosis",
    "taskx.insight.failures": "FailureGroup Failures",
    "taskx.insight.health": "Health",
    "taskx.insight.history": "History TypeHistory",
    "taskx.insight.limits": "LimitInfo",
    "taskx.insight.nodes": "NodeInfo RunningTask",
    "taskx.insight.places": "Place",
    "taskx.insight.stats": "Percentiles Stats TypeStats",
    "taskx.node.hooks": "Hook",
    "taskx.node.threads": "ThreadStack",
    "taskx.queue.bulk": "Bulk",
    "taskx.queue.flows": "Flow FlowHandle FlowSummary answer chain group",
    "taskx.queue.mapping": "MapOutcome MapResults",
    "taskx.queue.queue": "Queue run",
    "taskx.queue.schedule": "Schedule Tick tick_of",
    "taskx.queue.tuning": "Tuned TunedType",
    "taskx.stores.controls": "Paused",
    "taskx.stores.eight": "TaskRepository",
    "taskx.stores.memory": "MemoryRepository",
    "taskx.stores.mongo": "MongoRepository",
    "taskx.stores.postgres": "PostgresRepository",
    "taskx.stores.sqlite": "SQLiteRepository",
    "taskx.stores.urls": "open_repository",
    "taskx.tasks.clock": "Clock SystemClock",
    "taskx.tasks.codec": "Codec ZlibCodec",
    "taskx.tasks.config": "Config",
    "taskx.tasks.errors": (
        "CancelReason ConfigurationError DuplicateTask InvalidTransition NodeNotFound "
        "PayloadError QueueFull QueueStopped RepositoryCorrupt RepositoryError "
        "RepositoryUnavailable ScheduleNotFound SchemaMismatch TaskCancelled TaskFailed "
        "TaskNotFound TaskxError UnknownTaskType"
    ),
    "taskx.tasks.findings": "Check Problem Reason",
    "taskx.tasks.handles": "TaskHandle",
    "taskx.tasks.model": "Attempt Task TaskCount TaskFilter TaskPage TaskStatus",
    "taskx.tasks.refusals": "retry_after",
    "taskx.tasks.retry": "Permanent Retry RetryPolicy Snooze",
    "taskx.tasks.streams": "Chunk",
    "taskx.tasks.ticks": "every",
    "taskx.tasks.token": "CancelToken",
}


if not TYPE_CHECKING:  # a type checker that knew of this function would believe any name

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used: ``import taskx`` alone loads almost nothing."""
        for home, names in _HOMES.items():
            if name in names.split():
                return globals().setdefault(name, getattr(import_module(home), name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "_HOMES", "import_module"})
