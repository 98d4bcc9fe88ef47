"""Checkpoints: results that an executor stores as it goes on, so that a later attempt can skip the work."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from typing import Any, NoReturn

from taskx.attempt.children import Children, Submit
from taskx.attempt.emitted import Emitted, in_step
from taskx.attempt.transactions import Completed, Transaction, opened
from taskx.attempt.waiting import (
    AGAIN,
    KEY,
    Parked,
    Uncertain,
    Waits,
    begun,
    is_begun,
    some_taken,
    taken_of,
    unfinished,
    waits_until,
)
from taskx.stores.door import Door
from taskx.tasks import forks, lifecycle, payload
from taskx.tasks.clock import Clock
from taskx.tasks.errors import (
    CancelReason,
    ConfigurationError,
    RepositoryError,
    RepositoryUnavailable,
)
from taskx.tasks.lifecycle import Ending, Park
from taskx.tasks.model import Task, check_name
from taskx.tasks.record import checkpoints_to_text, part_name, parts_of
from taskx.tasks.streams import Piece, Place, last_in, note_name, pieces_in, stream_of
from taskx.tasks.timing import Timing
from taskx.tasks.token import CancelToken
from taskx.tasks.values import Values
from taskx.tasks.writes import NoteChange, Write


class Keeper:
    """Stores the checkpoints of a queue's runs: at most ``max_payload_size`` bytes of JSON for each run."""

    def __init__(
        self,
        moves: Door,
        max_payload_size: int,
        values: Mapping[str, Values],
        clock: Clock,
        timing: Timing,
        submit: Submit,
    ) -> None:
        self._moves = moves
        self.max_payload_size = max_payload_size
        self._values = values
        self._clock = clock
        self._retry_every = timing.retry_every
        #: What these runs wait for.
        self.waits = Waits(moves, max_payload_size, timing.retry_every)
        #: The tasks that they submit, and whose ends their tasks wait for.
        self.children = Children(moves, submit, self.waits, values)
        #: Held while a run creates its ``Checkpoints``: several of its threads may be the first to ask.
        self.lock = threading.Lock()
        #: The process that these runs belong to: see :mod:`taskx.tasks.forks`.
        self.process = forks.generation

    def check(self) -> None:
        """Raise ``ConfigurationError`` if the repository cannot store checkpoints."""
        self._moves.repository.require("checkpoints")

    def refuse_fork(self) -> None:
        """Raise ``ConfigurationError`` in a forked child process."""
        if forks.generation != self.process:
            raise ConfigurationError(
                "a forked child process cannot store checkpoints; call ctx.step and ctx.emit, and set "
                "ctx.cursor, in the parent process, where the task runs"
            )

    def refuse_own_transaction(self) -> None:
        """Raise ``ConfigurationError`` if this thread's own transaction keeps others from storing."""
        self._moves.repository.transactions.refuse_write()

    def store(self, task: Task, text: str, *, durable: bool, token: CancelToken) -> bool:
        """Store the checkpoints of a run. Return False if the run has lost its task.

        While the repository is unavailable, this waits and tries again.

        Raises:
            TaskCancelled: the token fired before the repository was back; the checkpoints may be stored
                or not.
            ConfigurationError: see :meth:`refuse_own_transaction`.
            RepositoryError: the checkpoints cannot be stored.
        """
        write: Write = lifecycle.checkpoint(task, text, durable=durable)
        self.refuse_own_transaction()
        while True:
            try:
                return self._moves.commit([write])[0]
            except RepositoryUnavailable:  # also when in doubt: storing twice does no harm
                token.wait(self._retry_every)
                token.raise_if_cancelled()

    def file(self, task: Task, text: str, token: CancelToken) -> str:
        """Store steps of a run, as checkpoints of their own, in a note; return its name.

        Nobody reads it before the name is stored with the other steps.
        """
        self.refuse_own_transaction()
        coded = self._moves.repository.codecs.columns({"checkpoints": text})["checkpoints"]
        name = part_name(task.id)

        def put() -> str:
            # It may be there already, after an error that was in doubt.
            if not (
                self._moves.repository.put_note(name, coded, 0)
                or self._moves.repository.reads.notes_named([name])
            ):
                raise RepositoryError(
                    f"steps of task {task.id} are not stored: their note {name} was removed meanwhile"
                )
            return name

        return self.waits.patiently(token, put)

    def notes_of(self, task: Task, emitted: Emitted) -> tuple[dict[int, str], list[NoteChange]]:
        """Return what a run has emitted and is not stored: texts by numbers, and the notes to store.

        Raises:
            PayloadError: the codec failed.
        """
        texts = emitted.unsaved()
        stream, code = stream_of(task), self._moves.repository.codecs.columns
        return texts, [
            NoteChange(
                note_name(stream, Place(task.starts, number)),
                code({"checkpoints": text})["checkpoints"],
                0,
            )
            for number, text in texts.items()
        ]

    def save(self, task: Task, emitted: Emitted, token: CancelToken) -> None:
        """Store what a run has emitted, and remove what it replaces.

        Raises:
            TaskCancelled: the token fired before the repository was back.
            PayloadError: the codec failed.
            RepositoryError: it cannot be stored.
        """
        texts, changes = self.notes_of(task, emitted)
        if changes:
            self.refuse_own_transaction()
            self.waits.patiently(token, lambda: self._moves.repository.put_notes(changes))
            emitted.saved(texts)
        if emitted.some and not emitted.alone:
            with suppress(RepositoryError):  # the next call tries again, or it goes with the record
                self._forget_earlier(task)
                emitted.forgotten()

    def _forget_earlier(self, task: Task) -> None:
        """Remove what earlier runs of a task have emitted, except what its completed steps have."""
        if task.starts < 2:
            return
        self.refuse_own_transaction()
        pieces = [piece for some in pieces_in(task.checkpoints).values() for piece in some]
        stream, reads = stream_of(task), self._moves.repository.reads
        after = note_name(stream, Place(0, 0))
        last = Place(0, 0)
        while True:
            page = reads.notes_after(stream, after, _PAGE)
            gone = []
            for after in page:
                before, last = last, last_in(after)
                if last.start >= task.starts:
                    break
                first = before.number + 1 if before.start == last.start else 1
                if not any(piece.overlaps(last.start, first, last.number) for piece in pieces):
                    gone.append(NoteChange(after, None, page[after].version))
            if gone:
                self._moves.repository.put_notes(gone)
            if len(page) < _PAGE or last.start >= task.starts:
                return

    def transaction(
        self,
        kept: Checkpoints,
        token: CancelToken,
        ending_of: Callable[[str | None, int], Ending],
        completed: list[Completed],
    ) -> AbstractContextManager[Transaction]:
        """Open a transaction for a run: see :meth:`Context.transaction`.

        ``ending_of`` makes the ending of a run from its result as JSON text and the time. It is added to
        ``completed`` if the transaction has completed the task.
        """
        known = self._values.get(kept.task.type)

        def encode(result: Any) -> str | None:
            if known is not None:
                result = known.encode_result(result)
            return (
                None if result is None else payload.encode(result, "result", self.max_payload_size)
            )

        def ending(result: str | None) -> Ending:
            return ending_of(result, self._clock.now_ms())

        return opened(
            self._moves.repository,
            kept,
            token,
            encode=encode,
            ending_of=ending,
            clock=self._clock,
            completed=completed,
            retry_every=self._retry_every,
        )


# Notes of earlier runs that are read at a time.
_PAGE = 16

# Bytes of the steps in a record from which on they are put into a note.
_MOST_IN_RECORD = 16 * 1024


def _size(steps: Mapping[str, str]) -> int:
    """Return the size of steps, in bytes."""
    return len("".join([*steps, *steps.values()]).encode())


def _is_open(text: str) -> bool:
    """Return True if a step is not done."""
    if KEY not in text:
        return False
    value = payload.loads(text)
    return waits_until(value) is not None or is_begun(value)


class Checkpoints:
    """The checkpoints of one run. Several threads of the run may store some.

    ``task`` is the task as it was when the run began. ``token`` is fired if the run turns out to have lost
    the task.
    """

    def __init__(self, task: Task, token: CancelToken, keeper: Keeper, emitted: Emitted) -> None:
        keeper.check()
        self.task = task
        self._token = token
        self._keeper = keeper
        self._lock = threading.Lock()
        self._transaction: Transaction | None = None
        self._taken: set[str] = set()
        self._completed = False
        # Why nothing more can be stored: the run ends, and its task waits.
        self._parked: Parked | None = None
        #: The text that this run stored last.
        self.stored: str | None = None
        stored = task.checkpoints or {}
        # Kept as texts, because the executor may change the values that it gets.
        steps = {
            name: payload.encode(value, name, payload.NO_LIMIT)
            for name, value in stored.get("steps", {}).items()
        }
        # The notes that have the first steps, with the number of steps in each; and these steps.
        self._parts = parts_of(stored)
        first = sum(self._parts.values())
        self._filed = dict(islice(steps.items(), first))
        self._filed_size = _size(self._filed)
        # The steps that are stored in the record.
        self._steps = dict(islice(steps.items(), first, None))
        # What this run emits; where the chunks are that steps have emitted, and those of earlier runs that
        # this run has not skipped yet.
        self._stream = emitted
        self._emitted = pieces_in(stored)
        self._earlier = self._emitted.copy()
        self._cursor: str | None = None
        if "cursor" in stored:
            self._cursor = payload.encode(stored["cursor"], "cursor", payload.NO_LIMIT)

    def step(self, name: str, token: CancelToken, call: Callable[[], Any]) -> Any:
        """Return the result of the call in this attempt or an earlier one: see :meth:`Context.step`."""
        self._begin(name, token)
        if self._is_new(name):
            self._make(name, token, call)
        return self._value(name)

    def _is_new(self, name: str) -> bool:
        """Return True if a step has no result yet. Else what it has emitted becomes part of this run."""
        if name not in self._steps and name not in self._filed:
            return True
        self._repeat(name)
        return False

    def _repeat(self, name: str) -> None:
        """Emit what a step has emitted in an earlier run."""
        if pieces := self._earlier.pop(name, None):
            self._stream.repeat(pieces)

    async def astep(
        self,
        name: str,
        token: CancelToken,
        call: Callable[[], Awaitable[Any]],
        aside: Callable[..., Awaitable[object]],
    ) -> Any:
        """Do what :meth:`step` does in a coroutine; ``aside`` calls a function in another thread."""
        self._begin(name, token)
        if self._is_new(name):
            self._refuse_if_completed()
            try:
                with in_step(self._stream) as pieces:
                    value = await call()
                await aside(self._keep, name, token, value, pieces)
            except BaseException:  # as in _make
                self._taken.discard(name)
                raise
        return self._value(name)

    def _value(self, name: str) -> Any:
        """Return the result of a step; None if there is none."""
        text = self._filed.get(name) or self._steps.get(name)
        return None if text is None else payload.loads(text)

    def wait_step(
        self,
        name: str,
        token: CancelToken,
        call: Callable[[int | None], Any],
        what: str,
        *,
        durable: bool = True,
    ) -> Any:
        """Return the result of a step that waits: ``call`` returns it, or raises :class:`Parked`.

        ``call`` gets the moment until which the step waits, in milliseconds; None if no run has stored one.
        ``what`` is the name of the method that the executor has called.
        """
        self._refuse_inside(what)
        self._begin(name, token)
        if name not in self._filed and (name not in self._steps or self._until(name) is not None):
            self._make(name, token, lambda: call(self._until(name)), durable=durable)
        else:
            self._repeat(name)
        return self._value(name)

    def children(
        self,
        name: str,
        token: CancelToken,
        wait: Callable[[list[int] | None], list[int] | None],
        outcomes: Callable[[list[int] | None], list[Any]],
        what: str,
    ) -> tuple[list[Any], bool]:
        """Return how the children of a list have ended, and True if as many as are needed have completed.

        ``wait`` returns the numbers of those that are enough, or raises :class:`Parked`. They are stored:
        others may complete later. ``outcomes`` returns the values. In a test of a single attempt the values
        are those of a step.
        """
        self._refuse_inside(what)
        self._begin(name, token)
        self._refuse_if_completed()
        try:
            stored = self._value(name)
            if isinstance(stored, list):
                return stored, True
            before = taken_of(stored)
            taken = wait(before)
            if taken is not None and before is None:
                self._put(name, some_taken(taken), token, durable=False)
            return outcomes(taken), taken is not None
        except BaseException:  # after any error the executor may try again
            self._taken.discard(name)
            raise

    def fork(self, name: str, token: CancelToken, call: Callable[[], Sequence[str]]) -> list[str]:
        """Return the ids of the tasks that ``call`` submits: see :meth:`Context.fork`."""
        self._refuse_inside("ctx.fork()")
        self._begin(name, token)
        self._refuse_if_completed()
        try:
            return [*call()]
        except BaseException:  # after any error the executor may try again
            self._taken.discard(name)
            raise

    def _refuse_inside(self, what: str) -> None:
        if self._transaction is not None:
            raise ConfigurationError(
                f"{what} cannot be used inside ctx.transaction(): the transaction would have to wait, too"
            )

    def once(
        self, name: str, token: CancelToken, call: Callable[[], Any], unknown: Callable[[], Any]
    ) -> Any:
        """Return the result of a step that is never called twice by itself: see :meth:`Context.once`.

        ``unknown`` returns how a call has ended of which that is unknown, or ``AGAIN``.
        """
        self._refuse_inside("ctx.once()")
        self._begin(name, token)
        if name not in self._filed and (name not in self._steps or self._begun(name)):
            self._make(name, token, lambda: self._call_once(name, token, call, unknown))
        else:
            self._repeat(name)
        return self._value(name)

    def _call_once(
        self, name: str, token: CancelToken, call: Callable[[], Any], unknown: Callable[[], Any]
    ) -> Any:
        if self._begun(name):
            result = unknown()
        else:
            self._put(name, begun(), token, durable=True)
            result = AGAIN
        while result is AGAIN:
            try:
                return call()
            except Uncertain:
                result = unknown()
            except Exception:  # an ordinary error says that it was not done
                if not token.cancelled:  # else it was cut short, and perhaps done
                    self._put(name, None, token, durable=False)
                raise
        return result

    def _begun(self, name: str) -> bool:
        return is_begun(self._value(name))

    def note(self, name: str, until: int, token: CancelToken) -> None:
        """Store the moment until which a step waits."""
        self._put(name, unfinished(until), token, durable=False)

    def _put(
        self, name: str, value: dict[str, Any] | None, token: CancelToken, *, durable: bool
    ) -> None:
        """Store what is known of a step that is not done; None: nothing."""
        with self._lock:
            self._file(token)
            steps = {**self._steps}
            if value is not None:
                steps[name] = self._encode(value, name)
            else:
                steps.pop(name, None)
            self._store(steps, self._cursor, self._emitted, durable=durable, token=token)
            self._steps = steps

    def sleep(
        self, name: str, token: CancelToken, until: int, now: Callable[[], int], short: float
    ) -> None:
        """Sleep until a moment, or until that of an earlier run: see :meth:`Context.sleep`.

        A sleep of ``short`` seconds or longer holds no thread.
        """

        def call(stored: int | None) -> None:
            moment = until if stored is None else stored
            left = moment - now()
            if left >= short * 1000:
                raise Parked(Park(None, moment), name, moment if stored is None else None)
            token.wait(max(0, left) / 1000)
            token.raise_if_cancelled()

        # Not durable: if a power cut takes the end of the sleep, its moment is stored, and has passed.
        self.wait_step(name, token, call, "ctx.sleep() with a step", durable=False)

    def _until(self, name: str) -> int | None:
        return waits_until(self._value(name))

    def _begin(self, name: str, token: CancelToken) -> None:
        token.raise_if_cancelled()
        self._refuse_own_transaction()
        self._take(name)

    def _make(
        self, name: str, token: CancelToken, call: Callable[[], Any], *, durable: bool = True
    ) -> None:
        """Call a step, and store its result."""
        self._refuse_if_completed()
        try:
            with in_step(self._stream) as pieces:
                value = call()
            self._keep(name, token, value, pieces, durable=durable)
        except BaseException:  # after any error the executor may try again
            self._taken.discard(name)
            raise

    def _keep(
        self,
        name: str,
        token: CancelToken,
        value: Any,
        pieces: Sequence[Piece],
        *,
        durable: bool = True,
    ) -> None:
        """Store the result of a step, and where the chunks are that it has emitted."""
        text = self._encode(value, f"step {name!r}")
        if pieces and self._transaction is None:  # first: later runs read what the step names
            self._keeper.save(self.task, self._stream, token)
        with self._lock:
            self._file(token)
            steps = {**self._steps, name: text}
            emitted = {**self._emitted, name: [*pieces]} if pieces else self._emitted
            self._store(steps, self._cursor, emitted, durable=durable, token=token)
            self._steps, self._emitted = steps, emitted

    def _file(self, token: CancelToken) -> None:
        """Put the steps of the record into a note, if they are many: each further step rewrites the record.

        The next write names the note. Steps that are not done stay in the record.
        """
        if self._transaction is not None or _size(self._steps) <= _MOST_IN_RECORD:
            return
        self._refuse_to_store()
        done = {name: text for name, text in self._steps.items() if not _is_open(text)}
        if done:
            part = self._keeper.file(self.task, checkpoints_to_text(done, None), token)
            self._parts = {**self._parts, part: len(done)}
            self._filed.update(done)
            self._filed_size += _size(done)
            self._steps = {n: text for n, text in self._steps.items() if n not in done}

    def seal(self, parked: Parked) -> Park:
        """Store nothing more, because the run ends and its task waits; return what the task waits for.

        An unfinished step is stored with that.
        """
        with self._lock:
            self._parked, park = parked, parked.park
            if parked.until is not None:
                text = self._encode(unfinished(parked.until), parked.step)
                steps = {**self._steps, parked.step: text}
                self.stored = checkpoints_to_text(steps, self._cursor, self._parts, self._emitted)
                park = park._replace(checkpoints=self.stored)
            return park

    def _take(self, name: str) -> None:
        if not check_name(name, "the name of a step"):
            raise ConfigurationError("a step requires a name")
        with self._lock:
            if name in self._taken:
                raise ConfigurationError(
                    f"step {name!r} was already called in this attempt; give each step its own "
                    "name, for example f'page {n}' in a loop"
                )
            self._taken.add(name)

    @property
    def cursor(self) -> Any:
        """The value that was set last; None if none was set."""
        return None if self._cursor is None else payload.loads(self._cursor)

    def set_cursor(self, value: Any, token: CancelToken) -> None:
        """Store a value; None removes it. Raises ``TaskCancelled`` after storing if the token has fired."""
        text = None if value is None else self._encode(value, "cursor")
        self._refuse_own_transaction()
        with self._lock:
            self._store(self._steps, text, self._emitted, durable=False, token=token)
            self._cursor = text
        token.raise_if_cancelled()

    def _encode(self, value: Any, what: str) -> str:
        return payload.encode(value, what, self._keeper.max_payload_size)

    def _refuse_to_store(self) -> None:
        """Raise an error if nothing more can be stored."""
        self._keeper.refuse_fork()
        self._refuse_if_completed()
        if self._parked is not None:
            raise self._parked

    def _store(
        self,
        steps: dict[str, str],
        cursor: str | None,
        emitted: Mapping[str, Sequence[Piece]],
        *,
        durable: bool,
        token: CancelToken,
    ) -> None:
        self._refuse_to_store()
        whole = checkpoints_to_text(steps, cursor, self._parts, emitted)
        payload.check_size(
            whole, "checkpoints", self._keeper.max_payload_size, besides=self._filed_size
        )
        if self._transaction is not None:
            self._transaction._keep(whole)
            return
        if not self._keeper.store(self.task, whole, durable=durable, token=token):
            self.lose()
        self.stored = whole

    # --- inside a transaction of the run

    def refuse_transaction(self) -> None:
        """Raise ``ConfigurationError`` if the run cannot begin a transaction now.

        It has begun one already, or this thread is in one of its own.
        """
        if self._transaction is not None:
            raise ConfigurationError("ctx.transaction() cannot be used inside ctx.transaction()")
        self._keeper.refuse_own_transaction()

    def refuse_emit(self) -> None:
        """Raise an error if nothing can be emitted, because the task has ended or waits for its end."""
        self._refuse_if_completed()
        if self._parked is not None:
            raise self._parked
        if (transaction := self._transaction) is not None and transaction._is_here():
            raise ConfigurationError(
                "ctx.emit() cannot be used inside ctx.transaction(), of which it would be no part: emit "
                "before the block, or after it"
            )

    def _refuse_own_transaction(self) -> None:
        """Raise ``ConfigurationError`` if this thread is in a transaction that is not the run's.

        Called before this thread waits for another one of the run, which may wait for that transaction.
        """
        if self._transaction is None:
            self._keeper.refuse_own_transaction()

    def _refuse_if_completed(self) -> None:
        if self._completed:
            raise ConfigurationError(
                "tx.complete() has completed the task: call ctx.step and ctx.emit, and set ctx.cursor, "
                "before that, and return from the executor after it"
            )

    @contextmanager
    def inside(self, transaction: Transaction) -> Iterator[None]:
        """Leave what is stored in a block to a transaction. If the block raises, it was never stored."""
        before = None
        try:
            with self._lock:
                self.refuse_transaction()
                before = self._steps, self._cursor, set(self._taken), self._emitted
                transaction._before = checkpoints_to_text(*before[:2], self._parts, self._emitted)
                self._transaction = transaction
            yield
        finally:  # without a call, so that no interrupt comes in between
            if before is not None:
                if not transaction._committed:
                    self._steps, self._cursor, self._taken, self._emitted = before
                else:
                    self._completed = transaction._completes
                    if transaction._checkpoints is not None:
                        self.stored = transaction._checkpoints
                self._transaction = None

    def lose(self) -> NoReturn:
        """End the run, because it has lost its task."""
        self._token.fire(CancelReason.LEASE_LOST)
        self._token.raise_if_cancelled()
        raise AssertionError("the token has fired")
