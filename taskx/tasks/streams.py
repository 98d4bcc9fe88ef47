"""What tasks emit: chunks, the notes that keep them, and the iterator that reads them.

A note has some chunks of a run, as a JSON list: its name is ``stream/<id>/<life>-<start>/<n>``. ``life`` is
the creation of the record, as a task may get the id of a deleted one. ``start`` is the number of the start
of the run, which no other run has. ``n`` is the number of its last chunk, so that the note of any chunk is
the first one that follows the name with the number before. A note may instead name chunks of an earlier
run: those of a step that this run has skipped.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from taskx.tasks import payload
from taskx.tasks.clock import to_ms
from taskx.tasks.codec import Codecs
from taskx.tasks.errors import ConfigurationError, QueueFull, RepositoryCorrupt
from taskx.tasks.payload import CODEC_KEY
from taskx.tasks.record import EMITTED

if TYPE_CHECKING:
    from taskx.tasks.bell import Signal
    from taskx.tasks.model import Task

R_co = TypeVar("R_co", covariant=True)

#: The names of the notes with chunks begin with this.
STREAM = "stream/"
#: This follows all that may come after the beginning of such a name.
AFTER_ALL = "~"
#: Most bytes of a chunk, as JSON.
MAX_CHUNK = 64 * 1024
#: Most bytes of all chunks of a run, in units of ``max_payload_size``.
MAX_PAYLOADS = 16


class Place(NamedTuple):
    """The place of a chunk: the start of its run, and its number in it."""

    start: int
    number: int

    def __str__(self) -> str:
        return f"{self.start}-{self.number}"


class Piece(NamedTuple):
    """Some chunks of a run that follow each other: ``length`` of them, from the number ``first`` on."""

    start: int
    first: int
    length: int
    size: int  #: the bytes of their JSON

    @property
    def next(self) -> Place:
        """The place of the chunk that follows."""
        return Place(self.start, self.first + self.length)

    def overlaps(self, start: int, first: int, last: int) -> bool:
        """Return True if some chunks belong to the piece: those of a run from one number to another."""
        return start == self.start and first < self.next.number and last >= self.first


class Chunk(NamedTuple):
    """A value that a task has emitted: see :meth:`Context.emit`."""

    #: The value, as JSON gives it back.
    value: Any
    #: Its place, such as ``"3-17"``: a stream goes on after it.
    position: str
    #: True if the executor was called anew: forget the chunks that came before this one.
    restart: bool = False


def place_of(position: str) -> Place:
    """Return the place that a text names. Raises ``ConfigurationError`` if it is none."""
    if not isinstance(position, str) or not re.fullmatch(r"\d{1,9}-\d{1,9}", position, re.ASCII):
        raise ConfigurationError(
            f"after must be the position of a chunk, such as '3-17', not {position!r:.50}"
        )
    return Place(*map(int, position.split("-")))


# --- names of notes


def life_of(created_at: int) -> str:
    """Return the life of a record in the names of its notes; ``created_at`` is in milliseconds."""
    return f"{created_at:x}"


def stream_of(task: Task) -> str:
    """Return what the names of all notes with chunks of a task begin with."""
    life = life_of(0 if task.created_at is None else to_ms(task.created_at))
    return f"{STREAM}{task.id}/{life}-"


def note_name(stream: str, place: Place) -> str:
    """Return the name of the note whose last chunk has this place."""
    return f"{stream}{place.start:08x}/{place.number:08x}"


def last_in(name: str) -> Place:
    """Return the place of the last chunk in a note."""
    _, run, number = name.rsplit("/", 2)
    return Place(int(run.rpartition("-")[2], 16), int(number, 16))


def task_of(name: str) -> tuple[str, str]:
    """Return the id and the life of the task to which a note belongs."""
    task_id, run, _ = name.removeprefix(STREAM).rsplit("/", 2)
    return task_id, run.rpartition("-")[0]


# --- texts of notes


def text_of_chunks(texts: Sequence[str]) -> str:
    """Return the text of a note with chunks, which are JSON texts."""
    return f'{{"chunks":[{",".join(texts)}]}}'


def text_of_piece(piece: Piece) -> str:
    """Return the text of a note that names chunks of an earlier run."""
    return f'{{"piece":{payload.encode([*piece], "piece")}}}'


def content_of(name: str, text: str, codecs: Codecs) -> list[Any] | Piece:
    """Return the chunks in a note, or the piece that it names. Raises ``RepositoryCorrupt``."""
    try:
        stored = payload.loads(text)
        if CODEC_KEY in stored:
            stored = codecs.value(stored)
        chunks = stored.get("chunks")
        return chunks if isinstance(chunks, list) else Piece(*map(int, stored["piece"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise RepositoryCorrupt(
            f"what a task has emitted is damaged: {problem} in {name}"
        ) from None


def pieces_in(checkpoints: Any) -> dict[str, list[Piece]]:
    """Return what the completed steps of a task have emitted, by the names of the steps."""
    try:
        return {
            name: [Piece(*map(int, piece)) for piece in pieces]
            for name, pieces in (checkpoints or {}).get(EMITTED, {}).items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}  # damaged: the step has emitted nothing


# --- reading


class Source(Protocol):
    """Where a stream reads: see :class:`taskx.stores.streams.Reader`."""

    def read(self) -> Sequence[Chunk]:
        """Return the next chunks; empty if there are no more yet."""
        ...


class _Handle(Protocol[R_co]):
    """What a stream needs of the :class:`TaskHandle` of its task."""

    def done(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def result(self, timeout: float, /) -> R_co: ...
    def exception(self, timeout: float, /) -> BaseException | None: ...
    def _sleep(self, timeout: float, /) -> None: ...
    def _signal(self) -> Signal: ...


class Stream(Generic[R_co]):
    """An iterator over what a task emits: use it in ``for`` or in ``async for``.

    It ends with the task, and then raises what :meth:`TaskHandle.result` raises. Otherwise the result of
    the task is the value of the ``StopIteration``, as of a generator.
    """

    def __init__(self, handle: _Handle[R_co], source: Source, every: float) -> None:
        self._handle = handle
        self._source = source
        self._every = every
        self._ready: deque[Chunk] = deque()
        self._over = False
        # A thread still looks if the coroutine that waited for it was cancelled.
        self._looking = threading.Lock()

    def __iter__(self) -> Stream[R_co]:
        return self

    def __next__(self) -> Chunk:
        while not self._ready:
            if self._over:
                raise StopIteration(self._handle.result(0))
            if not self._look():
                self._handle._sleep(self._every)
        return self._ready.popleft()

    def __aiter__(self) -> Stream[R_co]:
        return self

    async def __anext__(self) -> Chunk:
        import asyncio  # at first use: the core needs no event loop

        while not self._ready:
            if self._over:
                self._handle.result(0)
                raise StopAsyncIteration
            if self._handle._signal().virtual:
                if not self._look():
                    self._handle._sleep(self._every)
            # The read may block, and Django refuses reads of a thread that runs an event loop.
            elif not await asyncio.to_thread(self._look):
                await asyncio.sleep(self._every)
        return self._ready.popleft()

    def events(self) -> Events:
        """Return what the task emits from now on as server-sent events, for at most 30 seconds.

        Browsers then go on by themselves, after the position that they send as ``Last-Event-ID``. The data
        of an event is a JSON object with ``value`` and ``restart``. The last event is called ``end``, and
        has the ``status`` of the task.

        Raises:
            QueueFull: this process sends as many such streams as it may.
        """
        return Events(self)

    def _status(self) -> str:
        """Return how the task has ended."""
        if self._handle.cancelled():
            return "cancelled"
        return "completed" if self._handle.exception(0) is None else "failed"

    def _look(self) -> bool:
        """Read what is stored by now. Return False if there is nothing, and the task goes on."""
        with self._looking:
            ended = self._handle.done()  # before the read: all is stored before the end
            self._ready.extend(self._source.read())
            self._over = ended and not self._ready
            return self._over or bool(self._ready)


# --- server-sent events

#: Seconds after which the events end, so that no thread of a server is taken for long.
EVENTS_WITHIN = 30.0
#: Most events that a process sends at the same time.
MOST_EVENTS = 16
# Seconds after which something is sent, to notice that the reader is gone.
_SIGN_EVERY = 5.0
# Bytes at the beginning of events: milliseconds after which a browser goes on.
_BEGIN = b"retry: 1000\n\n"


class Events:
    """The chunks of a task as server-sent events, in bytes: an iterator, for a web server.

    Args:
        stream: the chunks.
        within: seconds after which they end.
        shown: changes the value of a chunk before it is sent.
    """

    #: The headers of the response.
    headers = MappingProxyType(
        {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )
    # Those that are sent, each with the time at which it ends: a server may forget to close one.
    _sent: ClassVar[dict[Events, float]] = {}
    _taking: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        stream: Stream[Any],
        within: float = EVENTS_WITHIN,
        shown: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self._stream, self._shown = stream, shown
        now = time.monotonic()
        self._signed, self._until = now, now + within
        self._begun = self._ended = False
        with self._taking:
            for one in [one for one, until in self._sent.items() if until + _SIGN_EVERY < now]:
                del self._sent[one]
            if len(self._sent) >= MOST_EVENTS:
                raise QueueFull(
                    f"this process sends {MOST_EVENTS} streams, as many as it may: try again later"
                )
            self._sent[self] = self._until

    def close(self) -> None:
        """Send nothing more."""
        self._ended = True
        with self._taking:
            self._sent.pop(self, None)

    def __iter__(self) -> Iterator[bytes]:
        try:
            while not self._ended:
                if (some := self._next()) is not None:
                    yield some
                else:
                    self._stream._handle._sleep(self._pause())
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        import asyncio

        try:
            while not self._ended:
                if (some := await asyncio.to_thread(self._next)) is not None:
                    yield some
                else:
                    await asyncio.sleep(self._pause())
        finally:
            self.close()

    def _pause(self) -> float:
        return max(0.0, min(self._stream._every, self._until - time.monotonic()))

    def _next(self) -> bytes | None:
        """Return what to send now, perhaps nothing; None: wait a moment."""
        stream, now = self._stream, time.monotonic()
        if not self._begun:
            self._begun = True
            return _BEGIN
        stream._look()
        ready = [*stream._ready]
        stream._ready.clear()
        if ready:
            self._signed = now
            return b"".join(self._event(chunk) for chunk in ready)
        if stream._over:
            self._ended = True
            return f'event: end\ndata: {{"status":"{stream._status()}"}}\n\n'.encode()
        if now >= self._until:
            self._ended = True
            return b""
        if now >= self._signed + _SIGN_EVERY:
            self._signed = now
            return b":\n\n"
        return None

    def _event(self, chunk: Chunk) -> bytes:
        told = {"value": self._shown(chunk.value), "restart": chunk.restart}
        # JSON has no newlines, except between its tokens, where none is written.
        data = payload.joined(told)
        return f"id: {chunk.position}\ndata: {data}\n\n".encode()
