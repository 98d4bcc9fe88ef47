"""A custom repository, which is eight methods on a dict in a JSON file, and a queue that uses it.

Run it: ``python examples/own_repository.py [FILE]``
"""

from __future__ import annotations

import json
import os
import sys
import threading
from copy import deepcopy

from taskx import DuplicateTask, Queue, Task, TaskFilter, TaskNotFound, TaskRepository, TaskStatus


class JSONFileRepository(TaskRepository):
    """Tasks in one JSON file. Every change writes the whole file, so it suits some hundreds of tasks."""

    def __init__(self, path: str) -> None:
        self._path, self._lock, self._records = path, threading.RLock(), {}
        if os.path.exists(path):
            with open(path) as file:
                self._records = json.load(file)

    def create(self, task: Task) -> None:
        with self._lock:
            if task.id in self._records:
                raise DuplicateTask(task.id)
            self._save({**self._records, task.id: task.to_dict()})

    def get_by_id(self, task_id: str) -> Task:
        with self._lock:
            if task_id not in self._records:
                raise TaskNotFound(task_id)
            return Task.from_dict(deepcopy(self._records[task_id]))

    def update(self, task: Task) -> None:
        with self._lock:
            self.get_by_id(task.id)
            self._save({**self._records, task.id: task.to_dict()})

    def update_status(self, task_id: str, status: TaskStatus, message: str = "") -> None:
        self._change(task_id, status=status.value, message=message)

    def update_progress(self, task_id: str, progress: int, message: str = "") -> None:
        self._change(task_id, progress=progress, message=message)

    def list(self, filter: TaskFilter) -> list[Task]:
        found = sorted(self._matching(filter), key=lambda task: task.created_at, reverse=True)
        return found[filter.offset : filter.offset + filter.limit]

    def count(self, filter: TaskFilter) -> int:
        return len(self._matching(filter))

    def delete(self, task_id: str) -> None:
        with self._lock:
            self.get_by_id(task_id)
            self._save({key: record for key, record in self._records.items() if key != task_id})

    def _matching(self, filter: TaskFilter) -> list[Task]:
        with self._lock:
            return [task for task in map(self.get_by_id, self._records) if filter.matches(task)]

    def _change(self, task_id: str, **fields: object) -> None:
        with self._lock:
            self._save({**self._records, task_id: {**self.get_by_id(task_id).to_dict(), **fields}})

    def _save(self, records: dict[str, dict[str, object]]) -> None:
        text = json.dumps(records)
        with open(f"{self._path}.part", "w") as file:
            file.write(text)
        os.replace(file.name, self._path)  # never leaves half a file
        self._records = json.loads(text)


def main(path: str = "own-repository.json") -> None:
    queue = Queue(JSONFileRepository(path))

    @queue.executor("double")
    def double(n: int) -> int:
        return 2 * n

    with queue:
        handles = [double.submit(n=n) for n in range(10)]
        print(*(handle.result() for handle in handles))
    _, total = queue.list_tasks(status="completed")
    print(f"{total} completed tasks in {path}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
