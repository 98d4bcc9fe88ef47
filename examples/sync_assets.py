"""Sync the assets of cloud accounts: an executor class, with progress, errors and a cancel.

    python examples/sync_assets.py

The cloud is simulated; its calls block like real ones. All other code is as in a real program.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError, wait
from typing import Any

from taskx import (
    Config,
    Context,
    MemoryRepository,
    Queue,
    Task,
    TaskExecutor,
    TaskFailed,
    TaskHandle,
    TaskRepository,
)


class ProviderError(Exception):
    """The cloud refused a call."""


class Session:
    """A connection to one account of the simulated cloud."""

    def __init__(self, account: str, latency: float) -> None:
        self._account = account
        self._latency = latency
        self._aborted = threading.Event()

    def list_assets(self, region: str) -> list[str]:
        """Return the assets in a region. Block until they have arrived or :meth:`abort` is called."""
        if self._aborted.wait(self._latency):
            raise ConnectionError("aborted")
        if (self._account, region) == ("staging", "eu-west"):
            raise ProviderError("eu-west is under maintenance")
        return [f"{self._account}-{region}-{number}" for number in range(1, 1 + len(region))]

    def abort(self) -> None:
        """End the blocking call, from another thread."""
        self._aborted.set()

    def close(self) -> None:
        """Close the connection."""


class CloudProvider:
    """The simulated cloud. One of its accounts is closed; another one takes an hour for each call."""

    regions = ("us-east", "us-west", "eu-west", "eu-north", "ap-south")

    def connect(self, account: str) -> Session:
        """Open a connection to an account."""
        if account == "closed":
            raise ProviderError("the account is closed")
        return Session(account, latency=3600.0 if account == "archive" else 0.1)


class SyncAssetsExecutor(TaskExecutor):
    """Counts the assets in all regions of all accounts in ``params["accounts"]``.

    It can safely run twice: it only reads, and a new result replaces the old one.
    """

    type = "sync_assets"

    def __init__(self, provider: CloudProvider, repository: TaskRepository) -> None:
        self._provider = provider
        self._repository = repository

    def execute(self, ctx: Context, task: Task) -> None:
        """Run one task."""
        accounts = task.params["accounts"]
        steps = len(accounts) * len(self._provider.regions)
        counts: dict[str, int] = {}
        errors: list[str] = []
        for account in accounts:
            # A cancel calls session.abort(), so it does not wait for the blocking call.
            with ctx.closing(self._provider.connect(account)) as session:
                for region in self._provider.regions:
                    ctx.token.raise_if_cancelled()
                    place = f"{account}/{region}"
                    try:
                        counts[place] = len(session.list_assets(region))
                    except ProviderError as error:  # the other regions may still work
                        errors.append(f"{place}: {error}")
                    percent = 100 * (len(counts) + len(errors)) // steps
                    self._repository.update_progress(task.id, percent, f"{place} is done")
        task.result = {"assets": sum(counts.values()), "regions": len(counts), "errors": errors}


def follow(queue: Queue, handle: TaskHandle[Any]) -> None:
    """Print a task's progress until it ends, and then its result."""
    last = ""
    while True:
        ended = wait([handle], timeout=0.05).done
        task = queue.get_task_status(handle.id)
        if task.message not in ("", last):
            last = task.message
            print(f"  {task.progress:3d}%  {last}")
        if ended:
            break
    try:
        print(f"  {handle.task().status}: {handle.result()}")
    except TaskFailed as failed:
        print(f"  failed: {failed.error}")
    except CancelledError:
        print(f"  cancelled at {task.progress}%")


def wait_for_progress(handle: TaskHandle[Any], percent: int) -> None:
    """Wait until a task has made this progress."""
    while handle.task().progress < percent:
        time.sleep(0.02)


def quiet_logger() -> logging.Logger:
    """Return a logger that drops errors: this program prints failed tasks itself."""
    logger = logging.getLogger("sync_assets")
    logger.addFilter(lambda record: record.levelno != logging.ERROR)
    return logger


def main() -> None:
    """Sync, fail, and cancel."""
    repository = MemoryRepository()
    queue = Queue(repository, Config(worker_num=2), logger=quiet_logger())
    queue.register_executor(SyncAssetsExecutor(CloudProvider(), repository))
    with queue:
        print("Two accounts; one has a region under maintenance:")
        accounts = ["production", "staging"]
        task = Task(type="sync_assets", params={"accounts": accounts}, created_by="user123")
        follow(queue, queue.submit(task))

        print("A closed account:")
        follow(queue, queue.submit("sync_assets", {"accounts": ["closed"]}))

        print("Cancelled half-way, during a call that takes an hour:")
        handle = queue.submit("sync_assets", {"accounts": ["production", "archive"]})
        wait_for_progress(handle, 50)
        queue.cancel_task(handle.id)
        follow(queue, handle)


if __name__ == "__main__":
    main()
