"""What an executor stores on its way, so that a later attempt need not do it again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from taskx.common import forks
from taskx.common.ledger import Ledger
from taskx.core import lifecycle, payload
from taskx.core.errors import CancelReason, ConfigurationError, RepositoryUnavailable
from taskx.core.model import Task, check_name
from taskx.core.token import CancelToken
from taskx.storage.base import Repository

# Seconds between two tries to store, while the repository is away.
_PAUSE = 0.2


class Keeper:
    """Stores the checkpoints of all runs of a queue: of each at most ``max_payload_size`` bytes of JSON."""

    def __init__(self, repository: Repository, ledger: Ledger, max_payload_size: int) -> None:
        self._repository = repository
        self._ledger = ledger
        self.max_payload_size = max_payload_size
        #: For a run that makes its checkpoints, as several of its threads may be the first to ask.
        self.lock = threading.Lock()
        #: The process whose runs these are: see :mod:`taskx.common.forks`.
        self.process = forks.generation

    def check(self) -> None:
        """Refuse, with a ``ConfigurationError``, where nothing could be stored."""
        self._repository.require("checkpoints")

    def store(self, task: Task, text: str, *, durable: bool, token: CancelToken) -> bool:
        """Store the checkpoints of a run; False if it has lost its task. Waits out an outage.

        Raises:
            TaskCancelled: the token fired before the repository was back; they may be stored or not.
            RepositoryError: they cannot be stored.
        """
        write = lifecycle.checkpoint(task, text, durable=durable)
        while True:
            try:
                return self._ledger.commit([write])[0]
            except RepositoryUnavailable:  # where it is in doubt, too: to store it twice is no harm
                token.wait(_PAUSE)
                token.raise_if_cancelled()


class Checkpoints:
    """The checkpoints of one run, several threads of which may store some.

    ``task`` is as it was when the run began; ``token`` is fired when it turns out that the run has lost it.
    """

    def __init__(self, task: Task, token: CancelToken, keeper: Keeper) -> None:
        keeper.check()
        self._task = task
        self._token = token
        self._keeper = keeper
        self._lock = threading.Lock()
        self._taken: set[str] = set()
        #: What this run has stored last, as text.
        self.stored: str | None = None
        stored = task.checkpoints or {}
        # As texts: what the executor is given is its own to change.
        self._steps = {
            name: payload.encode(value, name, payload.NO_LIMIT)
            for name, value in stored.get("steps", {}).items()
        }
        self._cursor: str | None = None
        if "cursor" in stored:
            self._cursor = payload.encode(stored["cursor"], "cursor", payload.NO_LIMIT)

    def step(self, name: str, token: CancelToken, call: Callable[[], Any]) -> Any:
        """Return what the call returned in this attempt or an earlier one: see :meth:`Context.step`."""
        token.raise_if_cancelled()
        self._take(name)
        if name not in self._steps:
            try:
                text = self._encode(call(), f"step {name!r}")
                with self._lock:
                    steps = {**self._steps, name: text}
                    self._store(steps, self._cursor, durable=True, token=token)
                    self._steps = steps
            except BaseException:  # whatever it is, the executor may try again
                self._taken.discard(name)
                raise
        return payload.loads(self._steps[name])

    def _take(self, name: str) -> None:
        if not check_name(name, "the name of a step"):
            raise ConfigurationError("a step must have a name")
        with self._lock:
            if name in self._taken:
                raise ConfigurationError(
                    f"step {name!r} was called before in this attempt: give each step a name of its "
                    "own, in a loop such as f'page {n}'"
                )
            self._taken.add(name)

    @property
    def cursor(self) -> Any:
        """The value that was set last; None if there is none."""
        return None if self._cursor is None else payload.loads(self._cursor)

    def set_cursor(self, value: Any, token: CancelToken) -> None:
        """Store a value, None for none; raises as :meth:`step` does, once it is stored."""
        text = None if value is None else self._encode(value, "cursor")
        with self._lock:
            self._store(self._steps, text, durable=False, token=token)
            self._cursor = text
        token.raise_if_cancelled()

    def _encode(self, value: Any, what: str) -> str:
        return payload.encode(value, what, self._keeper.max_payload_size)

    def _store(
        self, steps: dict[str, str], cursor: str | None, *, durable: bool, token: CancelToken
    ) -> None:
        if forks.generation != self._keeper.process:
            raise ConfigurationError(
                "a forked child cannot store checkpoints: the task runs in its parent; call ctx.step "
                "and set ctx.cursor there"
            )
        named = ",".join(f"{payload.encode(name, 'name')}:{text}" for name, text in steps.items())
        parts = [f'"steps":{{{named}}}'] if steps else []
        if cursor is not None:
            parts.append(f'"cursor":{cursor}')
        whole = f"{{{','.join(parts)}}}"
        payload.check_size(whole, "checkpoints", self._keeper.max_payload_size)
        if not self._keeper.store(self._task, whole, durable=durable, token=token):
            self._token.fire(CancelReason.LEASE_LOST)
            self._token.raise_if_cancelled()
        self.stored = whole
