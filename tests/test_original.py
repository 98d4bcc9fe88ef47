"""The original's description of TaskX, with the same names in Python: every line of it is true here."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

import attrs
import pytest

import taskx
from taskx import Context, MemoryRepository, SQLiteRepository, Task, TaskFilter, TaskRepository

THIRTEEN = [
    *("id", "type", "status", "params", "result", "error", "progress", "message", "created_by"),
    *("created_at", "started_at", "completed_at", "duration"),
]
EIGHT = [
    *("create", "get_by_id", "update", "update_status", "update_progress", "list", "count"),
    "delete",
]


class MyRepository(TaskRepository):
    """自定义仓储实现: the eight methods on a dict, with the original's thirteen fields."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tasks: dict[str, str] = {}

    def create(self, task: Task) -> None:
        """Store a copy."""
        with self._lock:
            if task.id in self._tasks:
                raise taskx.DuplicateTask(task.id)
            self._put(task)

    def get_by_id(self, task_id: str) -> Task:
        """Return a copy."""
        with self._lock:
            if task_id not in self._tasks:
                raise taskx.TaskNotFound(task_id)
            return Task.from_dict(json.loads(self._tasks[task_id]))

    def update(self, task: Task) -> None:
        """Replace a task."""
        with self._lock:
            self.get_by_id(task.id)
            self._put(task)

    def update_status(self, task_id: str, status: taskx.TaskStatus, message: str = "") -> None:
        """Set status and message."""
        with self._lock:
            self._put(attrs.evolve(self.get_by_id(task_id), status=status, message=message))

    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        """Set progress and message."""
        with self._lock:
            self._put(attrs.evolve(self.get_by_id(task_id), progress=progress, message=message))

    def list(self, filter: TaskFilter) -> Sequence[Task]:
        """Return a page of the matching tasks, newest first."""
        found = self._matching(filter)
        return found[filter.offset : filter.offset + filter.limit]

    def count(self, filter: TaskFilter) -> int:
        """Return the number of matching tasks, without offset and limit."""
        return len(self._matching(filter))

    def delete(self, task_id: str) -> None:
        """Remove a task."""
        with self._lock:
            self.get_by_id(task_id)
            del self._tasks[task_id]

    def _put(self, task: Task) -> None:
        data = task.to_dict()
        self._tasks[task.id] = json.dumps({name: data[name] for name in THIRTEEN})

    def _matching(self, wanted: TaskFilter) -> list[Task]:
        with self._lock:
            tasks = [self.get_by_id(task_id) for task_id in reversed(self._tasks)]
        return [
            task
            for task in tasks
            if wanted.type in (None, task.type)
            and wanted.status in (None, task.status)
            and wanted.created_by in (None, task.created_by)
            and (wanted.start_date is None or wanted.start_date <= task.created_at)
            and (wanted.end_date is None or task.created_at <= wanted.end_date)
        ]


@pytest.fixture(params=["sqlite", "memory", "own"])
def repo(request, tmp_path) -> Iterator[TaskRepository]:
    """1. 创建任务仓储: each kind of repository."""
    if request.param == "sqlite":
        with SQLiteRepository(tmp_path / "tasks.db") as repository:
            yield repository
    else:
        yield MemoryRepository() if request.param == "memory" else MyRepository()


@pytest.fixture
def queue(repo) -> Iterator[taskx.Queue]:
    """2. 创建任务队列, not started yet."""
    logger = logging.getLogger("the original")
    config = taskx.Config(
        worker_num=5,
        buffer_size=100,
    )
    queue = taskx.Queue(repo, config, logger)
    yield queue
    queue.stop()


def executor(type: str, execute: Callable[[Context, Task], Any]) -> taskx.TaskExecutor:
    """Return a class executor with this body."""

    class MyTaskExecutor(taskx.TaskExecutor):
        def execute(self, ctx: Context, task: Task) -> Any:
            return execute(ctx, task)

    MyTaskExecutor.type = type
    return MyTaskExecutor()


# 快速开始


def test_the_quick_start_works(repo):
    """Snippets 1 to 6, in order."""
    # 2.
    logger = logging.getLogger("original")
    config = taskx.Config(
        worker_num=5,
        buffer_size=100,
    )
    queue = taskx.Queue(repo, config, logger)

    # 3.
    class MyTaskExecutor(taskx.TaskExecutor):
        type = "my_task"

        def execute(self, ctx: Context, task: Task) -> None:
            params = task.params
            assert params == {"key": "value"}
            repo.update_progress(task.id, 50, "处理中...")
            seen.append(repo.get_by_id(task.id))
            task.result = {
                "count": 100,
            }

    seen: list[Task] = []

    # 4.
    executor = MyTaskExecutor()
    queue.register_executor(executor)
    queue.start()
    try:
        # 5.
        task = Task(
            id=str(uuid.uuid4()),
            type="my_task",
            params={
                "key": "value",
            },
            created_by="user123",
        )
        handle = queue.submit(task)
        assert handle.result(timeout=60) == {"count": 100}

        # 6.
        task = queue.get_task_status(task.id)
        assert (
            f"Status: {task.status}, Progress: {task.progress}%"
            == "Status: completed, Progress: 100%"
        )
    finally:
        queue.stop()
    assert [(t.status, t.progress, t.message) for t in seen] == [("running", 50, "处理中...")]
    assert (task.created_by, task.error, task.message) == ("user123", "", "处理中...")
    assert task.created_at <= task.started_at <= task.completed_at
    assert task.duration >= 0


def test_the_queue_uses_the_given_logger(queue, caplog):
    """``NewQueue(repo, logger, config)``: all log lines of the queue go there."""
    caplog.set_level(logging.INFO, logger="the original")
    queue.start()
    queue.stop()
    assert {record.name for record in caplog.records} == {"the original"}


# 核心概念


def test_there_are_the_five_statuses():
    """任务状态."""
    assert [str(status) for status in taskx.TaskStatus] == [
        *("pending", "running", "completed", "failed", "cancelled")
    ]
    assert taskx.TaskStatus.COMPLETED == "completed"


def test_a_task_has_the_thirteen_fields_and_json_names():
    """任务结构."""
    assert [field.name for field in attrs.fields(Task)][:13] == THIRTEEN
    moment = datetime(2024, 5, 1, 12, 30, tzinfo=timezone.utc)
    task = Task(
        id="a",
        type="my_task",
        status=taskx.TaskStatus.COMPLETED,
        params={"key": "value"},
        result={"count": 100},
        progress=100,
        created_by="user123",
        created_at=moment,
        started_at=moment,
        completed_at=moment,
        duration=3.0,
    )
    data = task.to_dict()
    assert list(data)[:13] == THIRTEEN
    assert data["status"] == "completed"
    assert data["created_at"] == "2024-05-01T12:30:00+00:00"
    assert (data["error"], data["message"]) == ("", "")
    assert Task.from_dict(json.loads(json.dumps(data))) == task


def test_json_of_a_go_service_can_be_read():
    """Its times end in Z and have nanoseconds; unset times are null or missing."""
    text = """{
        "id": "a", "type": "my_task", "status": "running", "params": {}, "result": null,
        "error": "", "progress": 50, "message": "处理中...", "created_by": "user123",
        "created_at": "2024-05-01T12:30:00.123456789Z", "started_at": null, "duration": 0
    }"""
    task = Task.from_dict(json.loads(text))
    assert task.created_at == datetime(2024, 5, 1, 12, 30, 0, 123_000, tzinfo=timezone.utc)
    assert (task.status, task.completed_at) == (taskx.TaskStatus.RUNNING, None)


def test_a_filter_has_the_seven_conditions():
    """``TaskFilter``."""
    assert [field.name for field in attrs.fields(TaskFilter)][:7] == [
        *("type", "status", "created_by", "start_date", "end_date", "offset", "limit")
    ]


def test_a_repository_has_the_eight_methods():
    """任务仓储接口: these methods are abstract, and no others."""
    assert sorted(TaskRepository.__abstractmethods__) == sorted(EIGHT)
    assert isinstance(SQLiteRepository("never opened.db"), TaskRepository)


def test_an_executor_has_a_type_and_executes():
    """任务执行器接口."""
    assert taskx.TaskExecutor.__abstractmethods__ == {"execute"}


# 高级用法


def test_an_executor_reports_progress_through_the_repository(queue, repo):
    """任务进度更新: after the end it is 100, without a call."""
    seen = []

    def execute(ctx: Context, task: Task) -> None:
        for percent, message in ((10, "开始处理"), (50, "处理中..."), (90, "即将完成")):
            repo.update_progress(task.id, percent, message)
            seen.append((queue.get_task_status(task.id).progress, message))

    queue.register_executor(executor("my_task", execute))
    queue.start()
    handle = queue.submit("my_task")
    assert handle.result(timeout=60) is None
    task = handle.task()
    assert seen == [(10, "开始处理"), (50, "处理中..."), (90, "即将完成")]
    assert (task.progress, task.message) == (100, "即将完成")


def test_tasks_can_be_listed(queue):
    """查询任务列表: filter, limit, offset, and the total number."""
    queue.register_executor(executor("my_task", lambda ctx, task: None))
    queue.register_executor(executor("other", lambda ctx, task: None))
    queue.start()
    for number in range(25):
        queue.submit(Task(id=f"{number:02}", type="my_task"))
        queue.submit("other")
    assert queue.drain(timeout=60)

    filter = TaskFilter(
        type="my_task",
        status=taskx.TaskStatus.COMPLETED,
        limit=20,
        offset=0,
    )
    tasks, total = queue.list_tasks(filter)
    rest, same_total = queue.list_tasks(attrs.evolve(filter, offset=20))

    assert total == same_total == 25
    assert [task.id for task in [*tasks, *rest]] == [f"{n:02}" for n in reversed(range(25))]


def test_a_custom_repository_refuses_what_it_cannot_store():
    """自定义仓储实现: features that need more than eight methods and thirteen fields raise an error."""
    queue = taskx.Queue(MyRepository())
    queue.declare("my_task")
    with pytest.raises(taskx.ConfigurationError, match="priority"):
        queue.submit("my_task", priority=1)
    with pytest.raises(taskx.ConfigurationError, match="transaction"):
        queue.submit_many([Task(type="my_task"), Task(type="my_task")])
    assert queue.list_tasks()[1] == 0


# 配置选项


def test_the_number_of_workers_can_be_set():
    """Worker 数量."""
    cores = os.cpu_count() or 1
    assert taskx.Config(worker_num=cores).worker_num == cores
    assert taskx.Config(worker_num=cores * 2).worker_num == cores * 2
    assert taskx.Config(buffer_size=1000).buffer_size == 1000
    assert (taskx.Config().worker_num, taskx.Config().buffer_size) == (5, 100)


# 最佳实践


def test_an_executor_can_set_a_time_out(repo):
    """4. 超时控制: a deadline inside the executor, which all its calls through ctx respect."""

    def execute(ctx: Context, task: Task) -> str:
        with ctx.timeout(30 * 60) as token:
            assert 0 < ctx.remaining() <= 30 * 60
            assert ctx.token is token
        try:
            with ctx.timeout(0.01):
                ctx.sleep(60)
        except TimeoutError:
            return "too slow"
        return "in time"

    queue = taskx.Queue(repo)
    queue.register_executor(executor("my_task", execute))
    with queue:
        assert queue.submit("my_task").result(timeout=60) == "too slow"


def test_a_time_out_that_is_not_handled_fails_the_task(repo):
    """In the original, this corresponds to returning the context's error."""

    def execute(ctx: Context, task: Task) -> None:
        with ctx.timeout(0.01):
            ctx.sleep(60)

    queue = taskx.Queue(repo)
    queue.register_executor(executor("my_task", execute))
    with queue:
        handle = queue.submit("my_task")
        with pytest.raises(taskx.TaskFailed, match="not done within"):
            handle.result(timeout=60)
        assert handle.task().status is taskx.TaskStatus.FAILED


# 限制


# 特性


def test_a_stop_waits_for_running_tasks(repo):
    """优雅的启动和关闭: running tasks may end, and waiting tasks stay pending for the next start."""
    begun, gate = threading.Event(), threading.Event()

    def execute(ctx: Context, task: Task) -> None:
        begun.set()
        gate.wait(60)

    def made() -> taskx.Queue:
        queue = taskx.Queue(repo, taskx.Config(worker_num=1))
        queue.register_executor(executor("my_task", execute))
        return queue

    first = made()
    first.start()
    running, waiting = first.submit("my_task"), first.submit("my_task")
    assert begun.wait(60)
    stopper = threading.Thread(target=first.stop)
    stopper.start()
    while first.get_task_status(waiting.id).owner:  # the queue has not freed it yet
        stopper.join(0.001)
    with pytest.raises(taskx.QueueStopped):
        first.submit("my_task")
    gate.set()
    stopper.join(60)
    statuses = [str(first.get_task_status(handle.id).status) for handle in (running, waiting)]
    assert statuses == ["completed", "pending"]

    with made() as second:
        assert second.handle(waiting.id).result(timeout=60) is None
